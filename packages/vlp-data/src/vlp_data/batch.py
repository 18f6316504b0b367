"""What a training step gets: values that move to a device, into page-locked memory and apart into smaller
batches as a whole.

A field of a batch may be a tensor, whose first axis counts the rows; a tuple or list with one item per row
(ragged values: a tensor of boxes per image, several captions per image); a NamedTuple, dataclass or mapping
of such values; or a number, text or None, which belongs to the whole batch. Batches of methods outside vlp
extend `Batch` in the same way.

A answers   B rows   N images   R image side   L text length   K length of the concepts   M masked positions
P patches   H height   W width
"""

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, replace
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor

from vlp_data.order import share

Index = slice | Tensor


class Concepts(NamedTuple):
    """The words beside N images, one token sequence each."""

    ids: Tensor
    """[N, K] int64."""
    attention_mask: Tensor
    """[N, K] int64, 1 = token, 0 = padding."""


@dataclass(frozen=True, kw_only=True)
class Batch:
    """Some rows of a source. What differs from the rules above (an index into another axis) is said by
    `rows` of the class."""

    keys: tuple[str, ...]
    """Keys of the samples behind the rows, for messages."""

    def __len__(self) -> int:
        return len(self.keys)

    def map(self, function: Callable[[Tensor], Tensor]) -> Self:
        """The same batch with every tensor in it, however deep, replaced."""
        return _mapped(self, function)

    def to(self, device: torch.device | str, *, non_blocking: bool = True) -> Self:
        """The same batch on `device`. Copies overlap with computing when the batch is pinned."""
        return self.map(lambda tensor: tensor.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> Self:
        """The same batch in page-locked memory."""
        return self.map(Tensor.pin_memory)

    def split(self, parts: int) -> tuple[Self, ...]:
        """The rows in order as `parts` smaller batches, as even as can be. Raises ValueError for more parts
        than rows."""
        if not 1 <= parts <= len(self):
            raise ValueError(f"{len(self)} rows cannot be split into {parts} batches")
        shares = (share(len(self), part, parts) for part in range(parts))
        return tuple(self.rows(rows.start, rows.stop) for rows in shares)

    def rows(self, start: int, stop: int) -> Self:
        """The rows from `start` up to `stop` as a batch. Raises ValueError for a field with another number of
        entries than there are rows."""
        return self._cut(slice(start, stop))

    def _cut(self, rows: Index, **others: Any) -> Self:
        """The fields cut to `rows`, but for `others`, which are given as they shall be."""
        values = dict(others)
        for field in fields(self):
            if field.name not in values:
                values[field.name] = _taken(getattr(self, field.name), rows, len(self), field.name)
        return replace(self, **values)


def _mapped(value: Any, function: Callable[[Tensor], Tensor]) -> Any:
    if isinstance(value, Tensor):
        return function(value)
    return _rebuilt(value, lambda item: _mapped(item, function))


def _rebuilt(value: Any, function: Callable[[Any], Any]) -> Any:
    """A structure with `function` applied to the values it holds; anything else as it is."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        names = [field.name for field in fields(value)]
        return replace(value, **{name: function(getattr(value, name)) for name in names})
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*map(function, value))
    if isinstance(value, (tuple, list)):
        return type(value)(map(function, value))
    if isinstance(value, Mapping):
        return {key: function(item) for key, item in value.items()}
    return value


def _taken(value: Any, chosen: Index, count: int, name: str) -> Any:
    """What `chosen` names of a value that holds `count` entries. Raises ValueError when it holds another
    number."""
    ragged = isinstance(value, (tuple, list)) and not hasattr(value, "_fields")
    if ragged or (isinstance(value, Tensor) and value.dim()):
        if len(value) != count:
            raise ValueError(
                f"{name} holds {len(value)} entries where {count} are to be split; "
                "the class of the batch must say in `rows` how this field is split"
            )
        if not ragged or isinstance(chosen, slice):
            return value[chosen]
        return type(value)(value[number] for number in chosen.tolist())
    return _rebuilt(value, lambda item: _taken(item, chosen, count, name))


@dataclass(frozen=True, kw_only=True)
class ImageBatch(Batch):
    """Rows with an image each."""

    image: Tensor
    """[B, 3, H, W] float32, normalised; H = W = R but for views that keep the aspect."""
    padding: Tensor | None = None
    """[B, H, W] bool, True where there is no image; None for views of one size."""
    concepts: Concepts | None = None
    """The words beside each image; None without."""


@dataclass(frozen=True, kw_only=True)
class ImageTextBatch(ImageBatch):
    """Images with one caption each, and the captions masked."""

    text_ids: Tensor
    """[B, L] int64."""
    attention_mask: Tensor
    """[B, L] int64, 1 = token, 0 = padding."""
    masked_ids: Tensor
    """[B, L] int64, `text_ids` with masked and replaced tokens."""
    masked_positions: Tensor
    """[B, M] int64, positions to predict; unused entries are 0."""
    masked_labels: Tensor
    """[B, M] int64, original ids at these positions; -100 = unused."""


@dataclass(frozen=True, kw_only=True)
class RegionBatch(ImageBatch):
    """(region or whole image, text) pairs from fewer images; the rows are the pairs."""

    image: Tensor
    """[N, 3, R, R] float32, normalised."""
    concepts: Concepts | None = None
    """The words beside each of the N images; None without."""
    image_index: Tensor
    """[B] int64, which image a pair belongs to."""
    image_attention_mask: Tensor
    """[B, 1 + P] int64; entry 0 is the pooled token and always 1, then patches row by row."""
    text_ids: Tensor
    """[B, L] int64."""
    attention_mask: Tensor
    """[B, L] int64."""
    masked_ids: Tensor
    """[B, L] int64."""
    masked_positions: Tensor
    """[B, M] int64."""
    masked_labels: Tensor
    """[B, M] int64, -100 = unused."""
    target_boxes: Tensor
    """[B, 4] float32, cx cy w h in 0..1 of the input image."""
    is_image: Tensor
    """[B] int64, 1 = the pair is about the whole image (no box loss)."""
    padded_pairs: int = 0
    """Pairs that repeat others because too few were found; they act as false negatives, so they are
    counted."""

    def rows(self, start: int, stop: int) -> Self:
        """Pairs from `start` up to `stop` with the images they belong to; `image_index` counts these. The
        first part of a batch keeps the whole count of padded pairs."""
        used, index = torch.unique(self.image_index[start:stop], return_inverse=True)
        count = len(self.image)
        return self._cut(
            slice(start, stop),
            image=_taken(self.image, used, count, "image"),
            padding=_taken(self.padding, used, count, "padding"),
            concepts=_taken(self.concepts, used, count, "concepts"),
            image_index=index,
            padded_pairs=0 if start else self.padded_pairs,
        )

    def by_image(self) -> Self:
        """The same pairs, those of one image next to each other: split, such a batch has each image in one
        part, or in two."""
        order = torch.argsort(self.image_index, stable=True)
        return self._cut(
            order,
            image=self.image,
            padding=self.padding,
            concepts=self.concepts,
            padded_pairs=self.padded_pairs,
        )


@dataclass(frozen=True, kw_only=True)
class RetrievalBatch(ImageBatch):
    """Images with one caption each, for retrieval training."""

    text_ids: Tensor
    """[B, L] int64."""
    attention_mask: Tensor
    """[B, L] int64."""
    image_ids: Tensor
    """[B] int64, equal where two captions belong to the same image."""


@dataclass(frozen=True, kw_only=True)
class VqaBatch(ImageBatch):
    """Questions about images, and their distinct answers with weights."""

    question_ids: Tensor
    """[B, L] int64."""
    question_mask: Tensor
    """[B, L] int64."""
    answer_ids: Tensor
    """[A, L'] int64, framed by [CLS] and [SEP]; all answers of the first question, then those of the second,
    ..."""
    answer_mask: Tensor
    """[A, L'] int64."""
    answer_weights: Tensor
    """[A] float32, the share of people who gave this answer; 0.5 for the only answer of a Visual Genome
    question."""
    question_index: Tensor
    """[A] int64, which question an answer belongs to."""

    def rows(self, start: int, stop: int) -> Self:
        """Questions from `start` up to `stop` with their answers; `question_index` counts from `start`."""
        count = len(self.question_index)
        answers = torch.nonzero((self.question_index >= start) & (self.question_index < stop)).flatten()
        apart = ("answer_ids", "answer_mask", "answer_weights")
        return self._cut(
            slice(start, stop),
            **{name: _taken(getattr(self, name), answers, count, name) for name in apart},
            question_index=self.question_index[answers] - start,
        )


@dataclass(frozen=True, kw_only=True)
class NlvrBatch(ImageBatch):
    """Sentences about two images each."""

    image: Tensor
    """[2B, 3, R, R] float32, normalised: the first images of all sentences, then the second ones."""
    text_ids: Tensor
    """[B, L] int64."""
    attention_mask: Tensor
    """[B, L] int64."""
    labels: Tensor
    """[B] int64, 1 = the sentence is true."""
    padding: Tensor | None = None
    """[2B, H, W] bool in the order of `image`; None for views of one size."""
    concepts: Concepts | None = None
    """The words beside each first image, B rows; None without."""
    second_concepts: Concepts | None = None
    """The words beside each second image, B rows, padded by themselves; None without."""

    def rows(self, start: int, stop: int) -> Self:
        """Sentences from `start` up to `stop` with both images of each."""
        count = len(self)
        both = torch.tensor([*range(start, stop), *range(count + start, count + stop)])
        return self._cut(
            slice(start, stop),
            image=_taken(self.image, both, 2 * count, "image"),
            padding=_taken(self.padding, both, 2 * count, "padding"),
        )


@dataclass(frozen=True, kw_only=True)
class EntailmentBatch(ImageBatch):
    """Images with a hypothesis each."""

    text_ids: Tensor
    """[B, L] int64."""
    attention_mask: Tensor
    """[B, L] int64."""
    labels: Tensor
    """[B] int64: 0 contradiction, 1 neutral, 2 entailment
    (`vlp_data.sources.task_json.ENTAILMENT_LABELS`)."""


@dataclass(frozen=True, kw_only=True)
class CaptionBatch(ImageBatch):
    """Images with a caption each, to be written."""

    text_ids: Tensor
    """[B, L] int64: [CLS], the prompt, the caption, [SEP]."""
    attention_mask: Tensor
    """[B, L] int64."""
    labels: Tensor
    """[B, L] int64, `text_ids` with -100 on [CLS], the prompt and padding; not shifted."""


@dataclass(frozen=True, kw_only=True)
class CaptionReferencesBatch(ImageBatch):
    """Images with what people wrote about them, for rewards of sampled captions."""

    references: tuple[tuple[str, ...], ...]
    """Per image its captions as the source has them."""


@dataclass(frozen=True, kw_only=True)
class BoxBatch(ImageBatch):
    """Images with an expression each and the box it refers to."""

    text_ids: Tensor
    """[B, L] int64."""
    attention_mask: Tensor
    """[B, L] int64."""
    target_boxes: Tensor
    """[B, 4] float32, cx cy w h in 0..1 of the input image."""
