"""Gathering features from all ranks for a contrastive loss over the global batch."""

from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor


def gather_features(
    features: Tensor, *, gather_grad: Literal["sum", "local", "none"] = "sum", group: Any = None
) -> Tensor:
    """Rows of all ranks in rank order: (n, d) -> (ranks*n, d). Every rank must hold the same n. Without a process group: the tensor itself.

    gather_grad: what flows back to this rank's rows.
    "sum": the gradients that all ranks have for them (reduce-scatter); with the mean of the gradients over ranks that data parallelism takes, this
        is the gradient of the global loss.
    "local": only this rank's own gradient (X-VLM and ALBEF: under data parallelism 1/ranks of the true gradient reaches the gathered side).
    "none": nothing (open_clip without gather_with_grad).
    Raises ValueError for another value.
    """
    if gather_grad not in ("sum", "local", "none"):
        raise ValueError(
            f"gather_features: gather_grad must be 'sum', 'local' or 'none', got {gather_grad!r}"
        )
    if not (dist.is_available() and dist.is_initialized()):
        return features.detach() if gather_grad == "none" else features
    return _Gather.apply(features, gather_grad, group)


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, features: Tensor, gather_grad: str, group: Any) -> Tensor:
        ctx.gather_grad, ctx.group, ctx.rows = gather_grad, group, features.shape[0]
        ranks = dist.get_world_size(group)
        everything = features.new_empty(ranks * features.shape[0], *features.shape[1:])
        dist.all_gather_into_tensor(everything, features.contiguous(), group=group)
        if gather_grad == "none":
            ctx.mark_non_differentiable(everything)
        return everything

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        if ctx.gather_grad == "local":
            start = dist.get_rank(ctx.group) * ctx.rows
            return grad[start : start + ctx.rows], None, None
        own = grad.new_empty(ctx.rows, *grad.shape[1:])
        dist.reduce_scatter_tensor(own, grad.contiguous(), group=ctx.group)
        return own, None, None
