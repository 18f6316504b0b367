"""Momentum teachers and queues of past features (MoCo, ALBEF, ViCHA), and the moving average of weights.

A teacher is a copy of the model whose parameters follow it slowly and get no gradient. A queue holds features
of earlier batches as further negatives; all ranks hold the same one.

Source: MoCo, arXiv 1911.05722; ALBEF, arXiv 2107.07651 section 3.3 and 3.4.

Shape letters: B pairs of all ranks, Q entries of the queue, E shared embedding.
"""

import contextlib
import copy
from collections.abc import Iterable, Iterator, Mapping

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


class WeightAverage:
    """Exponential moving average (EMA) of parameters, in tensors beside the model.

    Args:
        parameters: What is averaged, by name. Nothing is a valid average: then every call does nothing.
        decay: Share of the old average that an update leaves.
        warmup: Use min(decay, (1 + n) / (10 + n)) at the n-th update, counted from 1.

    Source: arXiv 1703.01780; warm-up as in timm and TensorFlow.
    """

    def __init__(
        self, parameters: Mapping[str, nn.Parameter], *, decay: float = 0.9999, warmup: bool = True
    ) -> None:
        if not 0 <= decay < 1:
            raise ValueError(f"decay={decay} must lie in 0..1")
        self.parameters = dict(parameters)
        self.decay, self.warmup = decay, warmup
        self.updates = 0
        self.tensors = {name: p.detach().clone() for name, p in self.parameters.items()}

    @torch.no_grad()
    def update(self) -> None:
        """Move the average towards the parameters; called after each update of the optimizer."""
        if not self.tensors:
            return
        self.updates += 1
        n = self.updates
        decay = min(self.decay, (1 + n) / (10 + n)) if self.warmup else self.decay
        torch._foreach_lerp_(list(self.tensors.values()), list(self.parameters.values()), 1 - decay)

    @contextlib.contextmanager
    def applied(self) -> Iterator[None]:
        """While open, the parameters have the averaged values; afterwards their own, bit for bit."""
        own = {name: parameter.detach().clone() for name, parameter in self.parameters.items()}
        self._set(self.tensors)
        try:
            yield
        finally:
            self._set(own)

    @torch.no_grad()
    def _set(self, values: Mapping[str, Tensor]) -> None:
        for name, parameter in self.parameters.items():
            parameter.copy_(values[name])

    @torch.no_grad()
    def load(self, tensors: Mapping[str, Tensor] | None, updates: int) -> None:
        """Go on from a saved average after `updates` updates; without one, start from the parameters as they
        are.

        Raises:
            ValueError: It is an average of other parameters.
        """
        if tensors is None:
            tensors, updates = {name: p.detach() for name, p in self.parameters.items()}, 0
        if tensors.keys() != self.tensors.keys():
            names = ", ".join(sorted(tensors.keys() ^ self.tensors.keys())[:5])
            raise ValueError(f"the saved average is one of other parameters; not on both sides: {names}")
        self.updates = updates
        for name, value in tensors.items():
            self.tensors[name].copy_(value)


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
