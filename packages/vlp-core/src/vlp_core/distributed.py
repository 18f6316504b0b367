"""Process information and the few collectives that vlp needs. Everything works without a process group, as
one rank.

`gather` is `vlp_ops.gather_features`.
"""

from typing import Any

import torch.distributed as dist
from torch import Tensor
from vlp_ops.distributed import GatherGradient
from vlp_ops.distributed import gather_features as gather

__all__ = [
    "GatherGradient",
    "barrier",
    "broadcast_object",
    "gather",
    "gather_objects",
    "is_main",
    "mean_over_ranks",
    "rank",
    "world_size",
]


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
    """The value that rank `source` passes, on every rank. The object travels pickled between the ranks of one
    run."""
    if world_size() == 1:
        return value
    box = [value]
    dist.broadcast_object_list(box, src=source)
    return box[0]


def gather_objects(value: Any) -> list[Any]:
    """The values of all ranks, in their order, on every rank. They travel pickled between the ranks of one
    run."""
    values = [value] * world_size()
    if len(values) > 1:
        dist.all_gather_object(values, value)
    return values
