"""What all evaluations share: the model's mode, device and precision, images in batches, and samples shared
out among ranks.

Rank r of w takes the samples r, r + w, ...; none is evaluated twice when their number does not divide, unlike
with a sampler that pads. Every rank gets all results, in order of the samples.
"""

import contextlib
from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, TypeVar

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from vlp_core import distributed
from vlp_core.images import Images
from vlp_data.concept_text import concept_words
from vlp_data.errors import BadSample, DataError
from vlp_data.images import open_image
from vlp_data.objects import pad_images
from vlp_data.options import ConceptOptions
from vlp_data.schema import Sample, Source
from vlp_data.text import Reading

from vlp_eval.benchmarks.options import BenchmarkOptions
from vlp_eval.concepts import ConceptReader, words_of

if TYPE_CHECKING:
    from vlp_eval.subject import Subject

Precision = Literal["fp32", "bf16", "fp16"]
Progress = Callable[[str, int, int], None]
"""Called with what is counted, how many are done, and of how many."""
View = Callable[[Any], Tensor]
"""From an image to the model's input [3,H,W]; picklable when worker processes are used."""

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class Execution:
    """How an evaluation runs; changes nothing but rounding."""

    workers: int = 0
    """Processes that decode images; 0 decodes in this one."""
    device: torch.device | str | None = None
    """Where images and texts go; None: where the model is. The model is not moved."""
    precision: Precision = "fp32"
    """Below fp32 the model runs in autocast."""
    progress: Progress | None = None
    """Told what is counted, how many are done, and of how many."""

    def place(self, model: Any) -> torch.device:
        """The device that images and texts go to."""
        return device_of(model) if self.device is None else torch.device(self.device)


EXECUTION = Execution()
"""In this process, where the model is, in fp32."""


def silent(what: str, done: int, total: int) -> None:
    """No progress."""


def speaker(progress: Progress | None) -> Progress:
    """The progress function of this rank: rank 0 speaks for all."""
    return progress if progress is not None and distributed.is_main() else silent


def device_of(model: Any) -> torch.device:
    """Where the model's first parameter is."""
    first = next(model.parameters(), None)
    return torch.device("cpu") if first is None else first.device


@contextlib.contextmanager
def evaluating(model: Any) -> Iterator[None]:
    """The model in evaluation mode meanwhile; each part gets its mode back."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        # One by one: a frozen part in evaluation mode inside a model in training mode must stay so.
        for module in training:
            module.training = True


def autocast(device: torch.device, precision: Precision) -> contextlib.AbstractContextManager[Any]:
    """Autocast to `precision`; nothing for fp32."""
    if precision == "fp32":
        return contextlib.nullcontext()
    return torch.autocast(device.type, dtype={"bf16": torch.bfloat16, "fp16": torch.float16}[precision])


class ImageWithWords(NamedTuple):
    """A decoded image, and the words attached to it."""

    image: Any
    words: tuple[str, ...] = ()


class _Viewed(NamedTuple):
    """What a worker makes of a row: views [3,H,W] and sizes of its images, ids of their concepts; or what is
    wrong with them."""

    views: list[Tensor]
    sizes: list[tuple[int, int]]
    concepts: list[list[int]]
    problem: str = ""


class ViewedRows(Dataset):
    """Views of the images of a row with their sizes and concepts, or what is wrong with them.

    An exception would reach the user wrapped in the tracebacks of worker processes, so a fault is returned as
    a sentence. Without `concepts` the words attached to images are not looked at.
    """

    def __init__(
        self,
        images: Callable[[int], Sequence[ImageWithWords]],
        rows: Sequence[int],
        view: View,
        name: Callable[[int], str],
        concepts: ConceptReader | None = None,
    ) -> None:
        self.images, self.rows, self.view, self.name, self.concepts = images, rows, view, name, concepts

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, place: int) -> _Viewed:
        row = self.rows[place]
        try:
            images = self.images(row)
            sizes = [getattr(one.image, "size", (0, 0)) for one in images]
            words = [] if self.concepts is None else [self.concepts.ids(one.words) for one in images]
            return _Viewed([self.view(one.image) for one in images], sizes, words)
        except Exception as problem:  # whatever a decoder raises: a missing image would change the result
            return _Viewed([], [], [], f"{self.name(row)}: {problem}")


class ImageBatch(NamedTuple):
    """The images of some rows.

    `groups` holds the first images of the rows, the second ones and so on; `sizes` for each row the (width,
    height) of its images as stored.
    """

    groups: tuple[Images, ...]
    sizes: list[list[tuple[int, int]]]

    def to(self, device: torch.device) -> "ImageBatch":
        """The same on a device."""
        return self._replace(groups=tuple(images.to(device) for images in self.groups))

    @property
    def images(self) -> Images:
        """The one image of each row. Raises ValueError for rows of several images."""
        (images,) = self.groups
        return images


def image_batches(rows: ViewedRows, *, batch: int, workers: int) -> Iterator[ImageBatch]:
    """The rows in order. Raises ValueError that names the first image that cannot be used."""
    # A generator of its own: the loader draws a seed for its workers, and evaluation must not move the
    # training's random state.
    loader = DataLoader(
        rows, batch_size=batch, num_workers=workers, collate_fn=_collate, generator=torch.Generator()
    )
    reader = rows.concepts
    for groups, sizes, words, problem in loader:
        if problem:
            raise ValueError(problem)
        concepts = [None] * len(groups) if reader is None else map(reader.collate, zip(*words, strict=True))
        yield ImageBatch(
            tuple(
                Images(pixels, padding, own) for (pixels, padding), own in zip(groups, concepts, strict=True)
            ),
            sizes,
        )


def _collate(
    rows: Sequence[_Viewed],
) -> tuple[list[tuple[Tensor, Tensor | None]], list[list[tuple[int, int]]], list[list[list[int]]], str]:
    problem = next((row.problem for row in rows if row.problem), "")
    if problem:
        return [], [], [], problem
    groups = [_stack(views) for views in zip(*(row.views for row in rows), strict=True)]
    return groups, [row.sizes for row in rows], [row.concepts for row in rows], ""


def _stack(views: Sequence[Tensor]) -> tuple[Tensor, Tensor | None]:
    """Views as one batch [B,3,H,W], with a padding mask [B,H,W] where their sizes differ."""
    if len({view.shape for view in views}) == 1:
        return torch.stack(tuple(views)), None
    return pad_images(views)


class SourceImages:
    """Decodes the images of a row of a source; a class and not a closure, so that worker processes can have
    it."""

    def __init__(self, source: Source) -> None:
        self.source = source

    def __call__(self, row: int) -> list[ImageWithWords]:
        sample = self.source[row]
        return [
            ImageWithWords(open_image(image, sample.key), words_of(sample, number))
            for number, image in enumerate(sample.images)
        ]


def _row(row: int) -> str:
    """What a row of a source is called in messages; the problem itself names its file."""
    return f"row {row} of the source"


def read(
    source: Source,
    parse: Callable[[Sample], T],
    limit: int | None,
    concepts: ConceptOptions | None = None,
) -> list[T]:
    """What `parse` makes of the first `limit` rows, or of all.

    Raises DataError for a row that cannot be read, or that lacks the concepts of an image where they are
    wanted: leaving it out would change the result.
    """
    total = len(source) if limit is None else min(limit, len(source))
    if not total:
        raise DataError("the source has no rows to evaluate")

    def one(sample: Sample) -> T:
        if concepts is not None:
            for number in range(len(sample.images)):
                concept_words(sample, image=number)
        return parse(sample)

    try:
        return [one(source[row]) for row in range(total)]
    except BadSample as problem:
        raise DataError(f"{problem}; an evaluation needs every row") from problem


def require_unique(ids: Iterable[Hashable], what: str) -> None:
    """Raise DataError for an id that occurs twice: results are kept by id."""
    (one, times), *_ = Counter(ids).most_common(1)
    if times > 1:
        raise DataError(f"{what} {one!r} occurs {times} times in the source; results are kept by id")


def evaluate_rows(
    subject: "Subject",
    source: Source,
    rows: int,
    run: Callable[[Sequence[int], ImageBatch], Sequence[T]],
    options: BenchmarkOptions,
    execution: Execution,
    *,
    what: str,
) -> list[T]:
    """Results of the first `rows` rows of a source, each evaluated by exactly one rank, in order of the rows
    on every rank.

    `run(rows, images)` returns one picklable result for each of the rows of a batch; the model is in
    evaluation mode meanwhile. `what` is counted. An image that cannot be used is a ValueError on all ranks.
    """
    own = range(distributed.rank(), rows, distributed.world_size())
    device = execution.place(subject.model)
    say = speaker(execution.progress)
    found: dict[int, T] = {}
    problem = ""
    viewed = ViewedRows(SourceImages(source), own, subject.view, _row, subject.concept_reader())
    try:
        with evaluating(subject.model), autocast(device, execution.precision):
            for part in image_batches(viewed, batch=options.image_batch, workers=execution.workers):
                chosen = own[len(found) : len(found) + len(part.sizes)]
                results = run(chosen, part.to(device))
                found |= dict(zip(chosen, results, strict=True))
                say(what, len(found), len(own))
    except ValueError as error:
        if distributed.world_size() == 1:
            raise
        problem = str(error)
    everyone = distributed.gather_objects((found, problem))
    if problem := next((problem for _, problem in everyone if problem), ""):
        raise ValueError(problem)
    merged = [item for part, _ in everyone for item in part.items()]
    ordered = dict(sorted(merged))
    assert len(merged) == len(ordered) and list(ordered) == list(range(rows)), (
        "a row was not evaluated exactly once"
    )
    return list(ordered.values())


def settings_of(subject: "Subject", execution: Execution, reading: Reading | None = None) -> dict[str, Any]:
    """What a report says of these: that which changes numbers."""
    return {
        **({} if reading is None else asdict(reading)),
        "precision": execution.precision,
        **({} if subject.concepts is None else {"concepts": asdict(subject.concepts)}),
    }
