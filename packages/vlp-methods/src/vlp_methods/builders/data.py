"""From the data section of a recipe to paths in full, a tokenizer, loaders."""

import logging
import os
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor
from vlp_core import distributed
from vlp_core.images import Concepts, Images
from vlp_core.recipe import dump
from vlp_data import shapes
from vlp_data.batch import ImageBatch, NlvrBatch
from vlp_data.examples import Examples
from vlp_data.loader import Loader
from vlp_data.roots import rooted

from vlp_methods.engine.job import Mixing, Stream
from vlp_methods.engine.options import Training
from vlp_methods.sections.data import Data, ShapesWorld

log = logging.getLogger(__name__)

_Data = TypeVar("_Data", bound=Data)

TRAIN = "train"
ALWAYS = Mixing(((TRAIN, 1.0),))
"""The mixing of a task with one stream."""

Streams = Callable[[], Mapping[str, Stream]]
"""`Job.streams`: opens the data."""


def settle(data: _Data) -> _Data:
    """The same data with every path in full; draws the shapes world where it is asked for and not there
    yet."""
    root = data.root if data.world is None else draw_world(data.world, data.root)
    return replace(rooted(data, root), root=root)


def draw_world(world: ShapesWorld, folder: str) -> str:
    """The folder of a world, drawn if it is not there yet; "" is a folder of the user's cache."""
    if not folder:
        cache = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "vlp"
        name = "shapes" if world.difficulty == "full" else f"shapes-{world.difficulty}"
        folder = str(cache / f"{name}-{world.images}-{world.size}px-{world.seed}")
    shapes.ensure(folder, **dump(world), workers=os.cpu_count() or 1)
    return folder


def open_loader(
    recipe: Training, data: Data, name: str, examples: Examples[Any], *, global_batch: int
) -> Loader[Any]:
    """This rank's share of a stream; says what it is."""
    loader = Loader(
        examples,
        global_batch=global_batch,
        seed=recipe.seed,
        rank=distributed.rank(),
        world=distributed.world_size(),
        workers=recipe.workers,
        max_bad_fraction=data.max_bad_fraction,
        pin_memory=torch.cuda.is_available() and recipe.device != "cpu",
    )
    share = {key: value for key, value in loader.describe().items() if key != "position"}
    log.info("stream %s: %s", name, ", ".join(f"{key} {value}" for key, value in share.items()))
    return loader


def images_of(batch: ImageBatch) -> Images:
    """The images of a batch, with what the data has beside them: padding, concepts."""
    return Images(batch.image, batch.padding, _concepts(batch.concepts))


def sides_of(batch: NlvrBatch) -> tuple[Images, Images]:
    """The first and the second images of the sentences of a batch; concepts of each side are padded by
    themselves."""
    both = Images(batch.image, batch.padding)
    first, second = both.split([len(batch.labels)] * 2)
    return (
        replace(first, concepts=_concepts(batch.concepts)),
        replace(second, concepts=_concepts(batch.second_concepts)),
    )


def _concepts(concepts: tuple[Tensor, Tensor] | None) -> Concepts | None:
    return None if concepts is None else Concepts(*concepts)
