"""Gathering rows from all ranks, for contrastive losses over the global batch and for what else needs every
rank's rows."""

from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor

GatherGradient = Literal["sum", "local", "none"]


def gather_features(features: Tensor, gather_grad: GatherGradient = "sum", *, group: Any = None) -> Tensor:
    """Rows of all ranks in rank order: (n, ...) -> (ranks*n, ...). Without a process group, or with one rank:
    the tensor itself.

    Every rank must hold the same n: otherwise the collective hangs or fails. Any dtype; integers need
    gather_grad="none".
    gather_grad: what flows back to this rank's rows.
    "sum": the gradients that all ranks have for them (reduce-scatter); with the mean of the gradients over
    ranks that data parallelism takes, this
        is the gradient of the global loss.
    "local": only this rank's own gradient (X-VLM and ALBEF). When every rank computes the same loss on the
    gathered rows, data parallelism then
        gives encoders 1/ranks of its gradient, and what is used after the gather (the temperature) all of it.
    "none": nothing; the result carries no gradient (queues, ids, statistics; open_clip without
    gather_with_grad). Raises ValueError for another value.
    """
    if gather_grad not in ("sum", "local", "none"):
        raise ValueError(
            f"gather_features: gather_grad must be 'sum', 'local' or 'none', got {gather_grad!r}"
        )
    if gather_grad == "none":
        features = features.detach()
    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size(group) == 1:
        return features
    if gather_grad == "none":
        return _all_gather(features, group)
    return _Gather.apply(features, gather_grad, group)


def _all_gather(rows: Tensor, group: Any) -> Tensor:
    everything = rows.new_empty(dist.get_world_size(group) * rows.shape[0], *rows.shape[1:])
    dist.all_gather_into_tensor(everything, rows.contiguous(), group=group)
    return everything


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, features: Tensor, gather_grad: str, group: Any) -> Tensor:
        ctx.gather_grad, ctx.group, ctx.rows = gather_grad, group, features.shape[0]
        return _all_gather(features, group)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        if ctx.gather_grad == "local":
            start = dist.get_rank(ctx.group) * ctx.rows
            return grad[start : start + ctx.rows], None, None
        own = grad.new_empty(ctx.rows, *grad.shape[1:])
        dist.reduce_scatter_tensor(own, grad.contiguous(), group=ctx.group)
        return own, None, None
