"""What a training step gets. Fields are tensors; `.to(device)` moves them all.

B texts   N pictures   R image side   L text length   M masked positions   P patches
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
class ImageTextBatch(_Batch):
    """Pictures with one caption each, and the captions masked."""

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
class RegionBatch(_Batch):
    """(region or whole picture, text) pairs from fewer pictures."""

    image: Tensor
    """[N, 3, R, R] float32, normalised."""
    image_index: Tensor
    """[B] int64, which picture a pair belongs to."""
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
    """[B, 4] float32, cx cy w h in 0..1 of the input picture."""
    is_image: Tensor
    """[B] int64, 1 = the pair is about the whole picture (no box loss)."""
    padded_pairs: int = 0
    """Pairs that repeat others because too few were found; they act as false negatives, so they are counted."""


@dataclass(frozen=True, kw_only=True)
class RetrievalBatch(_Batch):
    """Pictures with one caption each, for retrieval training."""

    image: Tensor
    """[B, 3, R, R] float32, normalised."""
    text_ids: Tensor
    """[B, L] int64."""
    attention_mask: Tensor
    """[B, L] int64."""
    image_ids: Tensor
    """[B] int64, equal where two captions belong to the same picture."""
