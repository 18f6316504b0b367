"""Texts and images to vectors of a CLIP, as work of a job."""

import os
import posixpath
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, TypeAlias, TypeVar

import numpy as np
import pyarrow as pa

from vlp_data.concepts.encoders import Clip, Encoder
from vlp_data.concepts.tables import vector_table
from vlp_data.errors import BadSample, DataError
from vlp_data.images import open_image
from vlp_data.paths import image_at

if TYPE_CHECKING:
    import torch

Stored: TypeAlias = Literal["float16", "float32"]
_Item = TypeVar("_Item")
_Result = TypeVar("_Result")


@dataclass(frozen=True, kw_only=True)
class EmbedTexts:
    """Work of a job: texts (column `key`) to vectors."""

    clip: Clip
    batch: int = 256
    stored: Stored = "float16"

    def identity(self) -> dict[str, Any]:
        return {"work": "embed texts", "stored": self.stored, **self.clip.identity()}

    def start(self) -> Callable[[pa.Table], pa.Table]:
        encoder = self.clip.load()

        def compute(items: pa.Table) -> pa.Table:
            keys = items["key"].to_pylist()
            found = [encoder.texts(part) for part in _batches(keys, self.batch)]
            return vector_table(keys, np.concatenate(found).astype(self.stored))

        return compute


@dataclass(frozen=True, kw_only=True)
class ImageFiles:
    """Where the images of a list are, and how many are decoded at a time."""

    root: str = ""
    prefixes: Mapping[str, str] = field(default_factory=dict)
    """{old: new} beginnings of paths (`paths.rebase`)."""
    suffix: str = ""
    """Put behind names without an extension: lists of SNLI-VE leave out ".jpg"."""
    batch: int = 64
    threads: int = 0
    """Images decoded at a time; 0: one per core."""
    schemes: tuple[str, ...] = ()
    """Schemes of URLs that the lists may name (s3, https, ...), besides those of `root` and `prefixes`."""

    def identity(self) -> dict[str, Any]:
        return {"root": self.root, "prefixes": dict(self.prefixes), "suffix": self.suffix}


@dataclass(frozen=True, kw_only=True)
class EmbedImages:
    """Work of a job: images (column `key`, their names in the list) to vectors. One that cannot be read gets
    a `problem` instead."""

    clip: Clip
    images: ImageFiles
    stored: Stored = "float16"

    def identity(self) -> dict[str, Any]:
        return {
            "work": "embed images",
            "stored": self.stored,
            **self.images.identity(),
            **self.clip.identity(),
        }

    def start(self) -> Callable[[pa.Table], pa.Table]:
        encoder = self.clip.load()

        def compute(items: pa.Table) -> pa.Table:
            keys = items["key"].to_pylist()
            values, problems = encode_images(encoder, keys, self.images)
            return vector_table(keys, values.astype(self.stored), problems)

        return compute


def encode_images(
    encoder: Encoder, keys: Sequence[str], options: ImageFiles
) -> tuple[np.ndarray, list[str | None]]:
    """(vectors [N, D] float32, zeros where there is a problem; what is wrong with each image or None).

    Images are decoded in threads while the model works on the ones before. Raises DataError when none can be
    read, OSError when the storage fails.
    """

    def prepared(key: str) -> "torch.Tensor | str":
        name = key if posixpath.splitext(key)[1] else key + options.suffix
        try:
            image = image_at(name, root=options.root, prefixes=options.prefixes, schemes=options.schemes)
            return encoder.prepare(open_image(image))
        except BadSample as error:
            # The storage may be back tomorrow; a part that says otherwise stays.
            if error.cause == "unreadable file":
                raise OSError(str(error)) from error
            return str(error)

    rows: list[np.ndarray] = []
    problems: list[str | None] = []
    threads = options.threads or os.cpu_count() or 1
    with ThreadPoolExecutor(threads) as pool:
        ready = _ahead(pool, prepared, keys, 2 * options.batch)
        for part in _batches(ready, options.batch):
            problems += [view if isinstance(view, str) else None for view in part]
            if views := [view for view in part if not isinstance(view, str)]:
                rows.append(encoder.images(views))
    if not rows:
        raise DataError(
            f"none of the {len(keys)} images can be read, the first is {problems[0]}; do root, "
            "prefixes and suffix fit the list?"
        )
    good = np.array([problem is None for problem in problems])
    found = np.concatenate(rows)
    values = np.zeros((len(keys), found.shape[1]), dtype=np.float32)
    values[good] = found
    return values, problems


def _ahead(
    pool: ThreadPoolExecutor, function: Callable[[_Item], _Result], items: Iterable[_Item], number: int
) -> Iterator[_Result]:
    """Results in order, `number` of them on their way: all at once would hold every image in memory."""
    waiting: deque[Future[_Result]] = deque()
    for item in items:
        waiting.append(pool.submit(function, item))
        if len(waiting) > number:
            yield waiting.popleft().result()
    while waiting:
        yield waiting.popleft().result()


def _batches(items: Iterable[_Item], size: int) -> Iterator[list[_Item]]:
    part: list[_Item] = []
    for item in items:
        part.append(item)
        if len(part) == size:
            yield part
            part = []
    if part:
        yield part
