"""Looking at data before training on it: what is in it, and what cannot be used."""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from vlp_data.boxes import fault, scales
from vlp_data.errors import BadSample, shown
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
    turned: int = 0
    """Images that EXIF would turn; they are used as stored."""
    scaled: int = 0
    """Rows whose image is a scaled copy of the one that their boxes belong to; the boxes are scaled."""
    first: Sample | None = None

    def note(self, cause: str, file: str) -> None:
        """Count a problem."""
        self.counts[cause] += 1
        named = self.problems.setdefault(cause, [])
        if len(named) < SHOWN_FILES and file not in named:
            named.append(file)

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
        if self.turned:
            found.append(f"images that EXIF would turn, used as stored: {self.turned}")
        if self.scaled:
            found.append(f"rows whose image has another scale than stated, boxes are scaled: {self.scaled}")
        if self.first is not None:
            found.append(
                f"first: {self.first.key}: {'; '.join(text.text for text in self.first.texts[:2])}"[:200]
            )
        for cause, named in self.problems.items():
            more = ", ..." if self.counts[cause] > len(named) else ""
            found.append(f"{cause}: {self.counts[cause]} ({', '.join(named)}{more})")
        return [shown(line) for line in found]


def inspect(
    source: Source,
    *,
    rows: int | None = None,
    images: bool = True,
    progress: Callable[[int, int], None] | None = None,
) -> Report:
    """Read rows (the first `rows`, None: all), open their images unless told not to, and check texts, boxes,
    stated sizes and keys.

    A row is unusable when the loader would skip it. A box outside the image is always reported, though
    training skips the row only if it draws its crop around this box. Of an image whose stated size is another
    one it is told whether boxes are scaled or the row is refused.
    """
    from vlp_data.images import is_turned, open_image

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
                opened = [open_image(image, sample.key) for image in sample.images]
                sizes = [image.size for image in opened]
                report.images.update(_class(max(image.size)) for image in opened)
                report.turned += sum(map(is_turned, opened))
        except BadSample as error:
            report.note(error.cause, error.file or f"row {number}")
            continue
        finally:
            if progress is not None:
                progress(number + 1, total)
        scale = scales(sample.images[0].size, sizes[0]) if sample.regions and sizes[0] else (1.0, 1.0)
        if scale is None:
            report.note("image of another size", sample.key)
            continue
        report.scaled += scale != (1.0, 1.0)
        report.usable += 1
        report.texts.update(text.role for text in sample.texts)
        report.regions += len(sample.regions)
        if any(not text.text.strip() for text in sample.texts):
            report.note("empty text", sample.key)
        if any(text.cut for text in sample.texts):
            report.note("text with half of a character, which is left out", sample.key)
        width, height = (sizes[0] if sizes else None) or (float("inf"), float("inf"))
        across, down = scale
        for x0, y0, x1, y1 in (region.box for region in sample.regions):
            box = (x0 * across, y0 * down, x1 * across, y1 * down)
            cause = fault(box, width, height)
            if not (0 <= box[0] < box[2] <= width and 0 <= box[1] < box[3] <= height):
                cause = "box outside the image" if cause != "box that is no number" else cause
            if cause:
                report.note(cause, sample.key)
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
