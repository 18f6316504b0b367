"""What stands between a task and its ranks: the one place that knows how gradients are shared."""

import contextlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from vlp_methods.engine.ranks import Ranks

BUCKET = 8 << 20
"""Numbers that travel together when gradients are shared by hand: 32 MiB of fp32."""


class Alone:
    """A task on one rank."""

    def __init__(self, task: nn.Module) -> None:
        self.task = task

    def __call__(self, batch: Any) -> Any:
        """The losses of a batch, whose gradients are shared by the next `backward`."""
        return self.task(batch)

    def run(self, function: Callable[..., Any], *arguments: Any) -> Any:
        """Call something else of the task; gradients stay here until `share_gradients`."""
        return function(*arguments)

    def gradients_stay_here(self) -> contextlib.AbstractContextManager[object]:
        """While open, `backward` adds up gradients on this rank alone: for all batches of an update but the
        last."""
        return contextlib.nullcontext()

    def share_gradients(self) -> None:
        """Make gradients of `run` the means over ranks."""


class Replicas(Alone):
    """A task on several ranks, whole on each of them (DDP)."""

    def __init__(self, task: nn.Module, ranks: Ranks) -> None:
        super().__init__(task)
        self.module = DistributedDataParallel(
            task,
            device_ids=[ranks.device] if ranks.device.type == "cuda" else None,
            # Tasks keep buffers equal: sending queues at every forward would cost more than the gradients.
            broadcast_buffers=False,
            gradient_as_bucket_view=True,
        )

    def __call__(self, batch: Any) -> Any:
        return self.module(batch)

    def gradients_stay_here(self) -> contextlib.AbstractContextManager[object]:
        return self.module.no_sync()

    def share_gradients(self) -> None:
        trained = [parameter for parameter in self.task.parameters() if parameter.requires_grad]
        for parameter in trained:
            if parameter.grad is None:  # another rank may have one
                parameter.grad = torch.zeros_like(parameter)
        for bucket in _buckets([parameter.grad for parameter in trained if parameter.grad is not None]):
            together = torch.cat([gradient.flatten() for gradient in bucket]).div_(dist.get_world_size())
            dist.all_reduce(together)
            parts = together.split([gradient.numel() for gradient in bucket])
            torch._foreach_copy_(bucket, [p.view_as(g) for p, g in zip(parts, bucket, strict=True)])


def _buckets(gradients: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    """Successive gradients of one type, about `BUCKET` numbers at a time."""
    bucket: list[Tensor] = []
    for gradient in gradients:
        full = sum(each.numel() for each in bucket) + gradient.numel() > BUCKET
        if bucket and (full or bucket[0].dtype != gradient.dtype):
            yield bucket
            bucket = []
        bucket.append(gradient)
    if bucket:
        yield bucket


def wrap(task: nn.Module, ranks: Ranks) -> Alone:
    """What trains `task` on all ranks."""
    return Alone(task) if ranks.world == 1 else Replicas(task, ranks)


def connect(loss: Tensor, unused: Iterable[nn.Parameter]) -> Tensor:
    """The same loss, with a gradient of zero for parameters that it does not depend on.

    DDP waits for a gradient of every parameter; this serves it without searching the graph of every step. The
    gradient must be taken away again before the optimizer sees it: zero is not the same as none, Adam's
    moments would still move the parameter and weight decay would shrink it.
    """
    for parameter in unused:
        loss = loss + 0.0 * parameter.sum()
    return loss
