"""Process information and the few collectives that vlp needs. Everything works without a process group, as one rank."""

from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor

GatherGradient = Literal["local", "full", "none"]


def _active() -> bool:
    return dist.is_available() and dist.is_initialized()


def rank() -> int:
    """Number of this process, 0 without a process group."""
    return dist.get_rank() if _active() else 0


def world_size() -> int:
    """Number of processes, 1 without a process group."""
    return dist.get_world_size() if _active() else 1


def is_main() -> bool:
    """Whether this is rank 0, the one that writes files."""
    return rank() == 0


def barrier() -> None:
    """Wait until every rank is here."""
    if world_size() > 1:
        dist.barrier()


def mean_over_ranks(tensor: Tensor) -> Tensor:
    """Mean of a tensor over all ranks, without gradient."""
    total = tensor.detach().clone()
    if world_size() > 1:
        dist.all_reduce(total)
    return total / world_size()


def broadcast_object(value: Any, *, source: int = 0) -> Any:
    """The value that rank `source` passes, on every rank. The object travels pickled between the ranks of one run."""
    if world_size() == 1:
        return value
    box = [value]
    dist.broadcast_object_list(box, src=source)
    return box[0]


def gather(tensor: Tensor, gradient: GatherGradient) -> Tensor:
    """Concatenate equally shaped tensors of all ranks along axis 0, in rank order; [B, ...] -> [G, ...] with G = B * ranks.

    What goes back to this rank's rows:

    - "local": its slice of this rank's own gradient. When every rank computes the same loss on the gathered rows and gradients are
      averaged (DDP), encoders get 1/ranks of the gradient of that loss, while what is used after the gather (the temperature) gets all
      of it. X-VLM and ALBEF train this way.
    - "full": its slice of the sum of all ranks' gradients. Averaged, this is the gradient of one process on the whole batch.
    - "none": nothing; the result carries no gradient (queues, statistics).

    Raises:
        ValueError: `gradient` is none of these.

    Ranks with different B make the collective hang or fail: use batches of fixed size.
    """
    match gradient:
        case "none":
            return _all_gather(tensor.detach())
        case "local" | "full":
            return tensor if world_size() == 1 else _Gather.apply(tensor, gradient == "full")
        case _:
            raise ValueError(f"gradient={gradient!r} is not known; choose local, full or none")


def _all_gather(tensor: Tensor) -> Tensor:
    if world_size() == 1:
        return tensor
    everything = tensor.new_empty((world_size() * tensor.shape[0], *tensor.shape[1:]))
    dist.all_gather_into_tensor(everything, tensor.contiguous())
    return everything


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: Tensor, full: bool) -> Tensor:
        ctx.full, ctx.rows = full, tensor.shape[0]
        return _all_gather(tensor)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        if not ctx.full:
            return gradient[rank() * ctx.rows : (rank() + 1) * ctx.rows], None
        mine = gradient.new_empty((ctx.rows, *gradient.shape[1:]))
        dist.reduce_scatter_tensor(mine, gradient.contiguous())
        return mine, None
