"""Looking at data before training on it: which format files have, what is in them, what cannot be used."""

import json
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal, TypeAlias

from vlp_data import files
from vlp_data.errors import BadSample, DataError
from vlp_data.options import (
    CocoCaptions,
    CocoInstances,
    ImageTextLines,
    ImageTextSource,
    Karpathy,
    RegionLines,
    RegionSource,
    TaskJson,
)
from vlp_data.order import Order
from vlp_data.schema import Sample, Source
from vlp_data.sources.lines import ImageTextSource as ImageTextRows
from vlp_data.sources.lines import RegionSource as RegionRows

Format: TypeAlias = Literal[
    "xvlm_images", "xvlm_regions", "task_json", "coco_captions", "coco_instances", "karpathy"
]

SHOWN_FILES = 5
"""Files named per cause."""


def detect(paths: tuple[str, ...]) -> Format:
    """The format of files, from the first one's content. Raises FileNotFoundError; DataError when it is none
    of the known ones."""
    path = files.expand(paths)[0]
    with files.open_read(path) as stream:
        line = stream.readline()
        try:
            entry = json.loads(line)
        except ValueError:  # an indented document, or no JSON
            try:
                entry = json.loads(line + stream.read())
            except ValueError as error:
                raise DataError(f"{path} is neither JSON nor lines of JSON: {error}") from error
    if isinstance(entry, list):
        return "task_json"
    if isinstance(entry, dict):
        if "elems" in entry:
            return "xvlm_regions"
        if "annotations" in entry and "images" in entry:
            return "coco_instances" if "categories" in entry else "coco_captions"
        if isinstance(entry.get("images"), list):
            return "karpathy"
        if "binary" in entry or "image_rpath" in entry:
            return "xvlm_images"
    raise DataError(f"{path} has none of the known formats; see the README of vlp-data")


def source_options(
    paths: tuple[str, ...], *, format: Format | None = None, root: str = "", split: str = "train"
) -> ImageTextSource | RegionSource:
    """Options of a source for files of a format (None: `detect` it), images below `root`. `split` is for
    Karpathy's file."""
    format = format or detect(paths)
    if format in ("coco_captions", "coco_instances", "karpathy") and len(paths) != 1:
        raise DataError(f"{format} takes one file, got {len(paths)}")
    match format:
        case "xvlm_images":
            return ImageTextLines(files=paths, root=root)
        case "xvlm_regions":
            return RegionLines(files=paths, root=root)
        case "task_json":
            return TaskJson(files=paths, root=root)
        case "coco_captions":
            return CocoCaptions(annotations=paths[0], images=root)
        case "coco_instances":
            return CocoInstances(annotations=paths[0], images=root)
        case "karpathy":
            if split not in ("train", "restval", "val", "test"):
                raise DataError(f"split {split!r} is not one of train, restval, val, test")
            return Karpathy(annotations=paths[0], images=root, split=split)


@dataclass
class Report:
    """What `inspect` found."""

    described: dict[str, Any]
    rows: int = 0
    """Rows looked at."""
    usable: int = 0
    texts: Counter[str] = field(default_factory=Counter)
    """Texts by role."""
    regions: int = 0
    images: Counter[str] = field(default_factory=Counter)
    """Images by class of their longer side; empty when none was opened."""
    problems: dict[str, list[str]] = field(default_factory=dict)
    """Per cause the first files."""
    counts: Counter[str] = field(default_factory=Counter)
    """Per cause how often."""
    first: Sample | None = None

    def note(self, cause: str, file: str) -> None:
        """Count a problem."""
        self.counts[cause] += 1
        shown = self.problems.setdefault(cause, [])
        if len(shown) < SHOWN_FILES and file not in shown:
            shown.append(file)

    def lines(self) -> list[str]:
        """The report as text."""
        found = [f"{name}: {value}" for name, value in self.described.items()]
        found.append(f"rows looked at: {self.rows}, usable: {self.usable}")
        if self.texts:
            found.append("texts: " + ", ".join(f"{count} {role}" for role, count in self.texts.most_common()))
        if self.regions:
            found.append(f"boxes: {self.regions}")
        if self.images:
            found.append(
                "images (longer side): " + ", ".join(f"{n} {side}" for side, n in sorted(self.images.items()))
            )
        if self.first is not None:
            found.append(
                f"first: {self.first.key}: {'; '.join(text.text for text in self.first.texts[:2])}"[:200]
            )
        for cause, shown in self.problems.items():
            more = ", ..." if self.counts[cause] > len(shown) else ""
            found.append(f"{cause}: {self.counts[cause]} ({', '.join(shown)}{more})")
        return found


def inspect(
    source: Source,
    *,
    rows: int | None = None,
    images: bool = True,
    progress: Callable[[int, int], None] | None = None,
) -> Report:
    """Read rows (the first `rows`, None: all), open their images unless told not to, and check boxes and
    keys.

    A row counts as unusable for what would make the loader pass it over; a box outside the image is reported
    also where training would not draw its crop around it.
    """
    from vlp_data.images import open_image

    report = Report(source.describe())
    keys: set[str] = set()
    total = len(source) if rows is None else min(rows, len(source))
    for number in range(total):
        report.rows += 1
        try:
            sample = source[number]
            if sample.key in keys:
                report.note("key occurs twice", sample.key)
            keys.add(sample.key)
            report.first = report.first or sample
            sizes = [image.size for image in sample.images]
            if images:
                sizes = [open_image(image, sample.key).size for image in sample.images]
                report.images.update(_class(max(size)) for size in sizes)
        except BadSample as error:
            report.note(error.cause, error.file or f"row {number}")
            continue
        finally:
            if progress is not None:
                progress(number + 1, total)
        report.usable += 1
        report.texts.update(text.role for text in sample.texts)
        report.regions += len(sample.regions)
        if any(not text.text.strip() for text in sample.texts):
            report.note("empty text", sample.key)
        width, height = sizes[0] or (float("inf"), float("inf"))
        for x0, y0, x1, y1 in (region.box for region in sample.regions):
            if not (0 <= x0 < x1 <= width and 0 <= y0 < y1 <= height):
                report.note("box outside the image", sample.key)
    return report


def _class(pixels: int) -> str:
    for limit in (128, 256, 512, 1024, 2048):
        if pixels <= limit:
            return f"up to {limit:4d} px"
    return "above 2048 px"


@dataclass(frozen=True, kw_only=True)
class Part:
    """What one worker of one rank reads in an epoch."""

    rank: int
    worker: int
    samples: int
    files: dict[str, int]
    """Lines of each file, in the order they are come to."""

    def line(self) -> str:
        """The part as text."""
        shown = ", ".join(
            f"{file.rsplit('/', 1)[-1]}: {count}" for file, count in list(self.files.items())[:8]
        )
        more = f" and {len(self.files) - 8} more files" if len(self.files) > 8 else ""
        return f"rank {self.rank} worker {self.worker}: {self.samples} lines ({shown}{more})"


def plan(
    source: ImageTextRows | RegionRows,
    *,
    global_batch: int,
    world: int,
    workers: int,
    seed: int,
    epoch: int = 0,
) -> list[Part]:
    """Which lines each rank and worker of a `Loader` reads in an epoch, if training began at position 0.

    Raises ValueError when the ranks cannot share the batch.
    """
    if global_batch <= 0 or global_batch % world:
        raise ValueError(f"the global batch {global_batch} must be a positive multiple of the {world} ranks")
    order = Order(len(source), seed, runs=source.runs)
    own, first, count = global_batch // world, epoch * len(source), len(source)
    read: dict[tuple[int, int], list[int]] = {(r, w): [] for r in range(world) for w in range(workers)}
    start = first - first % global_batch
    for batch in range(start // global_batch, -(-(first + count) // global_batch)):
        for rank in range(world):
            places = order.indices(batch * global_batch + rank * own, own)
            read[rank, batch % workers] += [index for at, index in places if at == epoch]
    taken = Counter(index for indices in read.values() for index in indices)
    assert len(taken) == taken.total() == count, "a line is read twice or by nobody"
    return [
        Part(
            rank=rank,
            worker=worker,
            samples=len(indices),
            files=dict(Counter(source.lines.place(index)[0] for index in indices)),
        )
        for (rank, worker), indices in read.items()
    ]
