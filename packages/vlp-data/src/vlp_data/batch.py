"""What a training step gets. `.to(device)` moves every field that is a tensor.

A answers   B texts   N images   R image side   L text length   K length of the concepts   M masked positions   P patches
"""

from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import Self

import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class _Batch:
    keys: tuple[str, ...]
    """Keys of the samples behind the rows, for messages."""

    def _map(self, function: Callable[[Tensor], Tensor]) -> Self:
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return replace(self, **{name: function(v) for name, v in values.items() if isinstance(v, Tensor)})

    def to(self, device: torch.device | str, *, non_blocking: bool = True) -> Self:
        """The same batch on `device`. Copies overlap with computing when the batch is pinned."""
        return self._map(lambda tensor: tensor.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> Self:
        """The same batch in page-locked memory."""
        return self._map(Tensor.pin_memory)


@dataclass(frozen=True, kw_only=True)
class _ImageBatch(_Batch):
    concept_ids: Tensor | None = None
    """[B, K] int64, the concepts of each image (regions: [N, K]; pairs: of the first images); None without
    concepts."""
    concept_mask: Tensor | None = None
    """[B, K] int64, 1 = token, 0 = padding."""

    @property
    def concepts(self) -> tuple[Tensor, Tensor] | None:
        """Ids and mask of the concepts, or None."""
        return _both(self.concept_ids, self.concept_mask)


def _both(ids: Tensor | None, mask: Tensor | None) -> tuple[Tensor, Tensor] | None:
    return None if ids is None or mask is None else (ids, mask)


@dataclass(frozen=True, kw_only=True)
class ImageTextBatch(_ImageBatch):
    """Images with one caption each, and the captions masked."""

    image: Tensor
    """[B, 3, R, R] float32, normalised."""
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
class RegionBatch(_ImageBatch):
    """(region or whole image, text) pairs from fewer images."""

    image: Tensor
    """[N, 3, R, R] float32, normalised."""
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


@dataclass(frozen=True, kw_only=True)
class RetrievalBatch(_ImageBatch):
    """Images with one caption each, for retrieval training."""

    image: Tensor
    """[B, 3, R, R] float32, normalised."""
    text_ids: Tensor
    """[B, L] int64."""
    attention_mask: Tensor
    """[B, L] int64."""
    image_ids: Tensor
    """[B] int64, equal where two captions belong to the same image."""


@dataclass(frozen=True, kw_only=True)
class VqaBatch(_ImageBatch):
    """Questions about images, and their distinct answers with weights."""

    image: Tensor
    """[B, 3, R, R] float32, normalised."""
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


@dataclass(frozen=True, kw_only=True)
class NlvrBatch(_ImageBatch):
    """Sentences about two images each."""

    image: Tensor
    """[2B, 3, R, R] float32, normalised: the first images of all sentences, then the second ones."""
    text_ids: Tensor
    """[B, L] int64."""
    attention_mask: Tensor
    """[B, L] int64."""
    labels: Tensor
    """[B] int64, 1 = the sentence is true."""
    second_concept_ids: Tensor | None = None
    """[B, K'] int64, the concepts of the second images, padded by themselves; None without concepts."""
    second_concept_mask: Tensor | None = None
    """[B, K'] int64."""

    @property
    def second_concepts(self) -> tuple[Tensor, Tensor] | None:
        """Ids and mask of the second images' concepts, or None."""
        return _both(self.second_concept_ids, self.second_concept_mask)


@dataclass(frozen=True, kw_only=True)
class EntailmentBatch(_ImageBatch):
    """Images with a hypothesis each."""

    image: Tensor
    """[B, 3, R, R] float32, normalised."""
    text_ids: Tensor
    """[B, L] int64."""
    attention_mask: Tensor
    """[B, L] int64."""
    labels: Tensor
    """[B] int64: 0 contradiction, 1 neutral, 2 entailment
    (`vlp_data.sources.task_json.ENTAILMENT_LABELS`)."""


@dataclass(frozen=True, kw_only=True)
class CaptionBatch(_ImageBatch):
    """Images with a caption each, to be written."""

    image: Tensor
    """[B, 3, R, R] float32, normalised."""
    text_ids: Tensor
    """[B, L] int64: [CLS], the prompt, the caption, [SEP]."""
    attention_mask: Tensor
    """[B, L] int64."""
    labels: Tensor
    """[B, L] int64, `text_ids` with -100 on [CLS], the prompt and padding; not shifted."""


@dataclass(frozen=True, kw_only=True)
class CaptionReferencesBatch(_Batch):
    """Images with what people wrote about them, for rewards of sampled captions."""

    image: Tensor
    """[B, 3, R, R] float32, normalised."""
    references: tuple[tuple[str, ...], ...]
    """Per image its captions as the source has them."""


@dataclass(frozen=True, kw_only=True)
class BoxBatch(_ImageBatch):
    """Images with an expression each and the box it refers to."""

    image: Tensor
    """[B, 3, R, R] float32, normalised."""
    text_ids: Tensor
    """[B, L] int64."""
    attention_mask: Tensor
    """[B, L] int64."""
    target_boxes: Tensor
    """[B, 4] float32, cx cy w h in 0..1 of the input image."""
