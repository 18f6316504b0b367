"""What all evaluations share: the model's mode, device and precision, pictures in batches, and samples shared out among ranks.

Rank r of w takes the samples r, r + w, ...; none is evaluated twice when their number does not divide, unlike with a sampler that pads. Every
rank gets all results, in order of the samples.
"""

import contextlib
from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from typing import Any, Literal, NamedTuple, TypeVar, cast

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from vlp_core import distributed
from vlp_data.errors import BadSample, DataError
from vlp_data.images import open_image
from vlp_data.schema import Sample, Source

Precision = Literal["fp32", "bf16", "fp16"]
Progress = Callable[[str, int, int], None]
"""Called with what is counted, how many are done, and of how many."""
View = Callable[[Any], Tensor]
"""From a picture to the model's input [3,H,W]; picklable when worker processes are used."""

T = TypeVar("T")


def silent(stage: str, done: int, total: int) -> None:
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


class Pictures(Dataset):
    """Views of the pictures of a row, stacked [I,3,H,W], with their sizes, and what is wrong with them.

    An exception would reach the user wrapped in the tracebacks of worker processes, so a fault is returned as a sentence.
    """

    def __init__(
        self,
        pictures: Callable[[int], Sequence[Any]],
        rows: Sequence[int],
        view: View,
        name: Callable[[int], str],
    ) -> None:
        self.pictures, self.rows, self.view, self.name = pictures, rows, view, name

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, place: int) -> tuple[Tensor | None, list[tuple[int, int]], str]:
        row = self.rows[place]
        try:
            pictures = self.pictures(row)
            sizes = [getattr(picture, "size", (0, 0)) for picture in pictures]
            return torch.stack([self.view(picture) for picture in pictures]), sizes, ""
        except Exception as problem:  # whatever a decoder raises: a missing picture would change the result
            return None, [], f"{self.name(row)}: {problem}"


class PictureBatch(NamedTuple):
    """Views [B,I,3,H,W] of the I pictures of B rows, and the pictures' (width, height) as stored."""

    image: Tensor
    sizes: list[list[tuple[int, int]]]


def picture_batches(pictures: Pictures, *, batch: int, workers: int) -> Iterator[PictureBatch]:
    """The rows of `pictures` in order. Raises ValueError that names the first picture that cannot be used."""
    # A generator of its own: the loader draws a seed for its workers, and evaluation must not move the training's random state.
    loader = DataLoader(
        pictures, batch_size=batch, num_workers=workers, collate_fn=_stack, generator=torch.Generator()
    )
    for image, sizes, problem in loader:
        if problem:
            raise ValueError(problem)
        yield PictureBatch(image, sizes)


def _stack(
    rows: Sequence[tuple[Tensor | None, list[tuple[int, int]], str]],
) -> tuple[Tensor | None, list[list[tuple[int, int]]], str]:
    problem = next((problem for _, _, problem in rows if problem), "")
    if problem:
        return None, [], problem
    return torch.stack([cast(Tensor, views) for views, _, _ in rows]), [sizes for _, sizes, _ in rows], ""


class SourcePictures:
    """Decodes the pictures of a row of a source; a class and not a closure, so that worker processes can have it."""

    def __init__(self, source: Source) -> None:
        self.source = source

    def __call__(self, row: int) -> list[Any]:
        sample = self.source[row]
        return [open_image(image, sample.key) for image in sample.images]


def _row(row: int) -> str:
    """What a row of a source is called in messages; the problem itself names its file."""
    return f"row {row} of the source"


def read(source: Source, parse: Callable[[Sample], T], *, limit: int | None = None) -> list[T]:
    """What `parse` makes of each row, or of the first `limit`. Raises DataError for a row that cannot be read: leaving it out would change
    the result."""
    total = len(source) if limit is None else min(limit, len(source))
    if not total:
        raise DataError("the source has no rows to evaluate")
    try:
        return [parse(source[row]) for row in range(total)]
    except BadSample as problem:
        raise DataError(f"{problem}; an evaluation needs every row") from problem


def require_unique(ids: Iterable[Hashable], what: str) -> None:
    """Raise DataError for an id that occurs twice: results are kept by id."""
    (one, times), *_ = Counter(ids).most_common(1)
    if times > 1:
        raise DataError(f"{what} {one!r} occurs {times} times in the source; results are kept by id")


def evaluate_rows(
    source: Source,
    rows: int,
    run: Callable[[Sequence[int], PictureBatch], Sequence[T]],
    *,
    view: View,
    batch: int,
    workers: int,
    device: torch.device,
    say: Progress,
    what: str,
) -> list[T]:
    """Results of the first `rows` rows of a source, each evaluated by exactly one rank, in order of the rows on every rank.

    `run(rows, pictures)` returns one picklable result for each of the rows of a batch. A picture that cannot be used is a ValueError on
    all ranks.
    """
    own = range(distributed.rank(), rows, distributed.world_size())
    found: dict[int, T] = {}
    problem = ""
    pictures = Pictures(SourcePictures(source), own, view, _row)
    try:
        for part in picture_batches(pictures, batch=batch, workers=workers):
            chosen = own[len(found) : len(found) + len(part.image)]
            results = run(chosen, PictureBatch(part.image.to(device), part.sizes))
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
