"""Looking at data before training on it: what is in it, and what cannot be used."""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from vlp_data.errors import BadSample
from vlp_data.order import Order
from vlp_data.schema import Sample, Source
from vlp_data.sources.lines import ImageTextRows, RegionRows

SHOWN_FILES = 5
"""Files named per cause."""


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
    """Images by the class of size of their longer side; empty when none was opened."""
    problems: dict[str, list[str]] = field(default_factory=dict)
    """The first files, by cause."""
    counts: Counter[str] = field(default_factory=Counter)
    """How often, by cause."""
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

    A row is unusable when the loader would skip it. A box outside the image is always reported, though
    training skips the row only if it draws its crop around this box.
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
    """Lines of each file, in the order in which the files are read."""

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
