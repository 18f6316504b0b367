"""The gradient of a batch: in one, or in the memory of a part of it (`parts` of a recipe).

A contrastive loss compares all rows of a batch, so its gradient is not the mean over parts (`accumulate`).
With `InParts` each encoder runs twice, the rest of the task once:

    1. encode      part by part without gradient: the states of all rows are kept
    2. objective   losses of the states, piece by piece; each piece gives its gradient back at once, to the
                   parameters that it uses and to the states
    3. encode      part by part again, with gradient: the gradient of the states goes on to the encoders

A task says what 1 and 2 are (`TaskInParts`); its `forward` is the same two with one part (`in_one`), so that
there is one formula for both. Whatever a loss needs of all rows is a state: projections for a contrastive
loss; all tokens for image-text matching, whose negatives are drawn from the whole batch as without parts.

Equal to the step in one part: every loss and gradient (of the temperature, too), the gathers across ranks,
and the draws of the objective, such as hard negatives. Different: the draws of the encoders (dropout, drop
path), which follow from the step and the number of the part; they are equal in 1 and 3.

Source: GradCache, arXiv 2101.06983; BASIC, arXiv 2111.10050 section 4.
"""

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, Protocol, overload

import torch
from torch import Tensor, nn
from vlp_core.precision import wide

from vlp_methods.engine.entry import UserError
from vlp_methods.engine.wrap import Alone, connect

States = Any
"""A NamedTuple of tensors whose rows follow those of the batch, or None."""


class TaskInParts(Protocol):
    """A task that can be trained in parts. It may also have `divide(batch, parts)`, which says how a batch is
    divided, and may put its rows in another order; without it, `batch.split(parts)` does."""

    def encode(self, batch: Any) -> States:
        """States of a batch, or of some of its rows: a NamedTuple of tensors, whose first axis follows the
        rows, or None. Must not depend on other rows of the batch, and must not change the task."""
        ...

    def objective(self, states: States, parts: Sequence[Any]) -> Iterator[Mapping[str, Tensor]]:
        """Losses by name, in pieces; a loss is the sum of its pieces.

        `states` are those of all rows, `parts` the batches that they come from. What a piece has computed
        must not be used by a later one, except without gradient.
        """
        ...


class Piece(NamedTuple):
    """A part of a batch: its number, its rows in the whole batch, and its share of all rows."""

    number: int
    rows: slice
    share: float


def pieces(sizes: Iterable[int]) -> list[Piece]:
    """The parts of a batch by their numbers of rows."""
    sizes = list(sizes)
    ends = [sum(sizes[: number + 1]) for number in range(len(sizes))]
    return [
        Piece(number, slice(end - size, end), size / ends[-1])
        for number, (size, end) in enumerate(zip(sizes, ends, strict=True))
    ]


def shares(counts: Sequence[Tensor]) -> list[Tensor]:
    """Share of each part in what a mean counts over the batch (labels, boxes): 0 everywhere where nothing
    counts, as such a mean is."""
    total = torch.stack(list(counts)).sum().clamp(min=1)
    return [count / total for count in counts]


def added(losses: Iterable[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """Losses by name from their pieces."""
    total: dict[str, Tensor] = {}
    for piece in losses:
        for name, value in piece.items():
            total[name] = total[name] + value if name in total else value
    return total


def in_one(task: TaskInParts, batch: Any) -> dict[str, Tensor]:
    """The losses of a batch in one part: what `forward` of such a task is."""
    return added(task.objective(task.encode(batch), (batch,)))


def summed(losses: Mapping[str, Tensor]) -> Tensor:
    """What is minimised, in fp32 at least."""
    return torch.stack([wide(term) for term in losses.values()]).sum()


class _OnDevice(Sequence[Any]):
    """Parts of a batch that come to the device when they are asked for."""

    def __init__(self, parts: Sequence[Any], device: torch.device) -> None:
        self.parts, self.device = parts, device

    def __len__(self) -> int:
        return len(self.parts)

    @overload
    def __getitem__(self, index: int) -> Any: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[Any]: ...
    def __getitem__(self, index: int | slice) -> Any:
        if isinstance(index, slice):
            return _OnDevice(self.parts[index], self.device)
        return self.parts[index].to(self.device)


@contextlib.contextmanager
def drawn_from(seed: int, device: torch.device) -> Iterator[None]:
    """While open, torch draws from this seed; afterwards it goes on where it was."""
    cpu = torch.get_rng_state()
    own = None
    if device.type == "cuda":
        own = torch.cuda.get_rng_state(device)
    elif device.type == "mps":
        own = torch.mps.get_rng_state()
    torch.manual_seed(seed)
    try:
        yield
    finally:
        torch.set_rng_state(cpu)
        if own is not None and device.type == "cuda":
            torch.cuda.set_rng_state(own, device)
        elif own is not None:
            torch.mps.set_rng_state(own)


class InOne:
    """Gradients of a batch as a whole.

    Args:
        module: Task on its ranks.
        device: Where it is computed.
        autocast: Makes the context of a forward pass.
        scale: What is done to a loss before its gradient is taken.
    """

    def __init__(
        self,
        module: Alone,
        *,
        device: torch.device,
        autocast: Callable[[], contextlib.AbstractContextManager[Any]],
        scale: Callable[[Tensor], Tensor],
    ) -> None:
        self.module, self.device = module, device
        self.autocast, self.scale = autocast, scale

    def __call__(
        self, batch: Any, *, count: int, last: bool, unused: Sequence[nn.Parameter], seed: int
    ) -> dict[str, Tensor]:
        """Add the gradient of the losses / `count` to the parameters; returns the losses.

        Args:
            batch: On the host.
            count: Batches of the update.
            last: Whether this is the last of them, after which gradients are those of all ranks.
            unused: Parameters that the batch has no part in.
            seed: Differs for every batch and rank.
        """
        del seed  # it draws from the generator of the update
        with contextlib.nullcontext() if last else self.module.gradients_stay_here():
            with self.autocast():
                losses: dict[str, Tensor] = dict(self.module(batch.to(self.device)))
            self.scale(connect(summed(losses), unused) / count).backward()
        return {name: term.detach() for name, term in losses.items()}


class InParts:
    """Gradients of a batch by `parts` parts.

    Args:
        module: Task on its ranks.
        parts: How many.
        device, autocast, scale: As in `InOne`.

    Raises:
        UserError: A task that does not say how its loss is computed in parts.
    """

    def __init__(
        self,
        module: Alone,
        parts: int,
        *,
        device: torch.device,
        autocast: Callable[[], contextlib.AbstractContextManager[Any]],
        scale: Callable[[Tensor], Tensor],
    ) -> None:
        task = module.task
        if not (hasattr(task, "encode") and hasattr(task, "objective")):
            raise UserError(
                f"parts={parts}: this task compares no rows of a batch, so it needs no parts; leave parts at "
                "1 and use accumulate with a smaller batch"
            )
        self.task: Any = task
        self.module, self.parts, self.device = module, parts, device
        self.autocast, self.scale = autocast, scale

    def __call__(
        self, batch: Any, *, count: int, last: bool, unused: Sequence[nn.Parameter], seed: int
    ) -> dict[str, Tensor]:
        """As `InOne`.

        Raises:
            UserError: A batch with fewer rows than parts.
        """
        if len(batch) < self.parts:
            raise UserError(
                f"parts={self.parts}: a batch of this rank has {len(batch)} rows; use fewer parts, or a "
                "larger batch"
            )
        divide = getattr(self.task, "divide", None)
        divided = batch.split(self.parts) if divide is None else divide(batch, self.parts)
        parts = _OnDevice(divided, self.device)
        seeds = torch.Generator().manual_seed(seed)
        drawn = [int(torch.randint(1 << 62, (1,), generator=seeds)) for _ in range(len(parts))]
        states, ends = self._encode_all(parts, drawn)
        losses: dict[str, Tensor] = {}
        pieces = self.module.run(self.task.objective, states, parts)
        while True:
            with self.autocast():
                piece = self.module.run(next, pieces, None)
                if piece is None:
                    break
            total = summed(piece)
            if total.requires_grad:
                self.scale(total / count).backward()
            losses = added([losses, {name: term.detach() for name, term in piece.items()}])
            del piece, total
        gradients = [None if leaf is None else leaf.grad for leaf in states]
        del states, pieces
        self._encode_again(parts, drawn, gradients, ends)
        if last:
            self.module.share_gradients()
        return losses

    def _encode_all(self, parts: Sequence[Any], seeds: Sequence[int]) -> tuple[States, list[list[int]]]:
        """The states of all rows as leaves, and for each field where each part ends."""
        made: list[list[Tensor | None]] = []
        kind: Any = None
        for part, seed in zip(parts, seeds, strict=True):
            with torch.no_grad(), drawn_from(seed, self.device), self.autocast():
                found = self.module.run(self.task.encode, part)
            kind = type(found)
            made.append(list(found))
            del found
        fields: list[Tensor | None] = []
        ends: list[list[int]] = []
        for number in range(len(made[0])):
            values = [state[number] for state in made]
            for state in made:
                state[number] = None  # one field at a time is there twice
            tensors = [value for value in values if value is not None]
            if tensors and len(tensors) < len(values):
                raise ValueError(f"field {number} of the states is None in some parts and not in others")
            lengths = [len(value) for value in tensors]
            ends.append([sum(lengths[: end + 1]) for end in range(len(lengths))])
            joined = torch.cat(tensors) if tensors else None
            fields.append(
                joined.requires_grad_() if joined is not None and joined.is_floating_point() else joined
            )
        return kind(*fields), ends

    def _encode_again(
        self,
        parts: Sequence[Any],
        seeds: Sequence[int],
        gradients: Sequence[Tensor | None],
        ends: Sequence[Sequence[int]],
    ) -> None:
        for number, (part, seed) in enumerate(zip(parts, seeds, strict=True)):
            with drawn_from(seed, self.device), self.autocast():
                found = self.module.run(self.task.encode, part)
            wanted = [
                (state, gradient[end[number] - len(state) : end[number]])
                for state, gradient, end in zip(found, gradients, ends, strict=True)
                if state is not None and state.requires_grad and gradient is not None
            ]
            del found, part
            if wanted:
                torch.autograd.backward([state for state, _ in wanted], [g for _, g in wanted])
            del wanted
