"""What stands between a task and its ranks: the one place that knows how gradients are shared."""

import contextlib
from collections.abc import Iterable

from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from vlp_methods.engine.ranks import Ranks


def wrap(task: nn.Module, ranks: Ranks) -> nn.Module:
    """The module whose forward trains `task` on all ranks: the task itself on one."""
    if ranks.world == 1:
        return task
    return DistributedDataParallel(
        task,
        device_ids=[ranks.device] if ranks.device.type == "cuda" else None,
        # Tasks keep buffers equal: sending queues at every forward would cost more than the gradients.
        broadcast_buffers=False,
        gradient_as_bucket_view=True,
    )


def gradients_stay_here(module: nn.Module) -> contextlib.AbstractContextManager[object]:
    """While open, `backward` adds up gradients on this rank alone: for all batches of an update but the
    last."""
    return module.no_sync() if isinstance(module, DistributedDataParallel) else contextlib.nullcontext()


def connect(loss: Tensor, unused: Iterable[nn.Parameter]) -> Tensor:
    """The same loss, with a gradient of zero for parameters that it does not depend on.

    DDP waits for a gradient of every parameter; this serves it without searching the graph of every step. The
    gradient must be taken away again before the optimizer sees it: zero is not the same as none, Adam's
    moments would still move the parameter and weight decay would shrink it.
    """
    for parameter in unused:
        loss = loss + 0.0 * parameter.sum()
    return loss
