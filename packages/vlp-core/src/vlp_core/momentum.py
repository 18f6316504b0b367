"""Momentum teachers and queues of past features (MoCo, ALBEF, ViCHA).

A teacher is a copy of the model whose parameters follow it slowly and get no gradient. A queue holds features
of earlier batches as further negatives; all ranks hold the same one.

Source: MoCo, arXiv 1911.05722; ALBEF, arXiv 2107.07651 section 3.3 and 3.4.

Shape letters: B pairs of all ranks, Q entries of the queue, E shared embedding.
"""

import copy
from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

NO_ID = -100
"""Identity of entries whose image is not known; equal to no other."""


def teacher_of(model: nn.Module, *, without: Iterable[str] = ()) -> nn.Module:
    """A copy of a model that gets no gradient, without the named parts (direct children or parameters that a
    teacher has no use for)."""
    teacher = copy.deepcopy(model)
    for name in without:
        if hasattr(teacher, name):
            delattr(teacher, name)
    return teacher.requires_grad_(False)


@torch.no_grad()
def follow(teacher: nn.Module, model: nn.Module, momentum: float) -> None:
    """Every parameter of the teacher: p <- momentum * p + (1 - momentum) * (the model's). Buffers stay.

    Raises:
        ValueError: A momentum outside 0..1.
    """
    if not 0 <= momentum <= 1:
        raise ValueError(f"momentum={momentum} must lie in 0..1")
    theirs = dict(model.named_parameters())
    pairs = [(parameter, theirs[name]) for name, parameter in teacher.named_parameters()]
    torch._foreach_lerp_([own for own, _ in pairs], [source for _, source in pairs], 1 - momentum)


class FeatureQueue(nn.Module):
    """The latest Q pairs of image and text features, oldest overwritten first.

    Args:
        size: Q.
        width: E.
        identities: Also keep a number for each pair, such as its image's; -100 where there is none yet.

    Buffers: `image`, `text` [Q, E], at first random directions; `pointer`, where the next pair goes; `ids`
        [Q] int64.
    """

    def __init__(self, size: int, width: int, *, identities: bool = False) -> None:
        super().__init__()
        if size < 1:
            raise ValueError(f"a queue of size={size} holds nothing; give at least 1")
        for name in ("image", "text"):
            self.register_buffer(name, F.normalize(torch.randn(size, width), dim=1))
        self.register_buffer("pointer", torch.zeros((), dtype=torch.int64))
        self.register_buffer("ids", torch.full((size,), NO_ID) if identities else None)
        self.image: Tensor
        self.text: Tensor
        self.pointer: Tensor
        self.ids: Tensor | None

    @torch.no_grad()
    def put(self, image_BE: Tensor, text_BE: Tensor, ids_B: Tensor | None = None) -> None:
        """Write the pairs of all ranks; goes round at the end, so that no batch size is special.

        Raises:
            ValueError: More pairs than the queue holds; identities for a queue without, or none for one with
                them.
        """
        size, count = len(self.image), len(image_BE)
        if count > size:
            raise ValueError(
                f"{count} pairs of all ranks do not fit a queue of {size}; make the queue larger or the "
                "batch smaller"
            )
        if (ids_B is None) != (self.ids is None):
            raise ValueError("identities go with a queue that keeps them, and only with one")
        places = (self.pointer + torch.arange(count, device=self.pointer.device)) % size
        self.image.index_copy_(0, places, image_BE.to(self.image.dtype))
        self.text.index_copy_(0, places, text_BE.to(self.text.dtype))
        if self.ids is not None and ids_B is not None:
            self.ids.index_copy_(0, places, ids_B)
        self.pointer.add_(count).remainder_(size)
