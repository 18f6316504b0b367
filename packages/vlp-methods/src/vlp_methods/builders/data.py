"""From the data section of a recipe to paths in full, a tokenizer, loaders."""

import logging
import os
import typing
from collections.abc import Callable, Mapping
from dataclasses import fields, is_dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import torch
from vlp_core import distributed
from vlp_core.concepts import Concepts
from vlp_core.recipe import PathText, dump
from vlp_data import shapes
from vlp_data.examples import Examples
from vlp_data.files import join
from vlp_data.loader import Loader
from vlp_data.roots import rooted
from vlp_data.text import Tokenizer

from vlp_methods.engine.job import Mixing, Stream
from vlp_methods.engine.options import Training
from vlp_methods.sections.data import Data, ShapesWorld, TokenizerFiles

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
    return replace(_below(data, root), root=root)


def draw_world(world: ShapesWorld, folder: str) -> str:
    """The folder of a world, drawn if it is not there yet; "" is a folder of the user's cache."""
    if not folder:
        cache = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "vlp"
        name = "shapes" if world.difficulty == "full" else f"shapes-{world.difficulty}"
        folder = str(cache / f"{name}-{world.images}-{world.size}px-{world.seed}")
    shapes.ensure(folder, **dump(world), workers=os.cpu_count() or 1)
    return folder


def open_tokenizer(options: TokenizerFiles | None) -> Tokenizer | None:
    """The tokenizer of a recipe, None for one without texts."""
    if options is None:
        return None
    open_ = Tokenizer.wordpiece if options.kind == "bert" else Tokenizer.roberta
    return open_(*options.files)


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


def concepts_of(batch: Any) -> Concepts | None:
    """The concepts of a batch's images, or None where the data is read without."""
    return None if batch.concepts is None else Concepts(*batch.concepts)


def _below(options: Any, root: str) -> Any:
    """The same options with relative paths below `root`: of sources, and of fields of type `PathText`."""
    if hasattr(options, "open"):
        return rooted(options, root)
    kinds = typing.get_type_hints(type(options), include_extras=True)
    changed: dict[str, Any] = {}
    for field in fields(options):
        value = getattr(options, field.name)
        if is_dataclass(value):
            changed[field.name] = _below(value, root)
        elif kinds[field.name] == PathText and value:
            changed[field.name] = join(root, value)
        elif kinds[field.name] == tuple[PathText, ...]:
            changed[field.name] = tuple(join(root, item) for item in value)
    return replace(options, **changed)
