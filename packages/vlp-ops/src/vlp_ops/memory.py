"""Product-key memory: exact top-k over n*n slots from 2*n scores, the weighted embedding bag, and both
together.

Source: Large Memory Layers with Product Keys, arXiv 1907.05242; Memory Layers at Scale, arXiv 2412.09764.

T tokens   H heads   n keys per half   R rows of scores (T*H)   B bags   K table rows   D table width
"""

from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from vlp_ops import _library
from vlp_ops._checks import (
    FLOATS,
    accumulate_dtype,
    check_device,
    check_dim,
    check_float,
    check_integer,
    check_range,
    check_shape,
)

# Largest intermediate of the PyTorch implementation of the bag, in elements.
CHUNK = 1 << 22


# ---- top-k -------------------------------------------------------------------------------------------------


def product_key_topk(
    query: Tensor, keys: Tensor, k: int, *, n_heads: int | None = None
) -> tuple[Tensor, Tensor]:
    """The k best of the n*n slots of each head: scores (in the dtype of the products) and slot indices
    (int64), both (T, H, k), best first.

    query: (T, H, K), or (T*H, K) with the heads of a token in consecutive rows and n_heads given.
    keys: (2*H*n, K/2), that is (H, 2, n, K/2) flattened; either form. Slot i*n + j scores query[:K/2] .
        keys[h, 0, i] + query[K/2:] . keys[h, 1, j]. Only sums of the k best of each half can be among the k
        best, so no n*n scores are made.
    Equal scores come in ascending slot order from the compiled kernels and in any order from PyTorch. NaN
    comes first. Raises ValueError for shapes, devices and k > n; TypeError for dtypes. Source: arXiv
    1907.05242, section 3.2.
    """
    op = "product_key_topk"
    query, keys = _check_query(op, query, keys, n_heads)
    heads, _, n_keys, half = keys.shape
    if not 1 <= k <= n_keys:
        what = (
            f"k={k} exceeds the number of keys per half ({n_keys})"
            if k > n_keys
            else f"k must be at least 1, got {k}"
        )
        raise ValueError(f"{op}: {what}")
    tokens = query.shape[0]
    _library.note_backend(query)
    query = query.transpose(0, 1)
    scores1 = torch.bmm(query[..., :half], keys[:, 0].transpose(1, 2))
    scores2 = torch.bmm(query[..., half:], keys[:, 1].transpose(1, 2))
    scores, indices = torch.ops.vlp_ops.product_key_topk(scores1.flatten(0, 1), scores2.flatten(0, 1), k)
    return scores.view(heads, tokens, k).transpose(0, 1), indices.view(heads, tokens, k).transpose(0, 1)


def _check_query(op: str, query: Tensor, keys: Tensor, n_heads: int | None) -> tuple[Tensor, Tensor]:
    """query as (T, H, K) and keys as (H, 2, n, K/2)."""
    check_float(op, "query", query)
    check_float(op, "keys", keys)
    check_device(op, "query", query, keys=keys)
    if n_heads is None:
        if query.dim() != 3 and keys.dim() != 4:
            raise ValueError(
                f"{op}: n_heads is needed for query {tuple(query.shape)} and keys {tuple(keys.shape)}"
            )
        n_heads = query.shape[1] if query.dim() == 3 else keys.shape[0]
    if query.dim() == 2 and n_heads > 0 and query.shape[0] % n_heads == 0:
        query = (
            query.view(-1, n_heads, query.shape[1])
            if query.is_contiguous()
            else query.reshape(-1, n_heads, query.shape[1])
        )
    if query.dim() != 3 or query.shape[1] != n_heads or query.shape[2] % 2:
        raise ValueError(
            f"{op}: query must have shape (T, H, K) or (T*H, K) with H={n_heads} and an even K, "
            f"got {tuple(query.shape)}"
        )
    half = query.shape[2] // 2
    if keys.dim() == 2 and keys.shape[1] == half and n_heads > 0 and keys.shape[0] % (2 * n_heads) == 0:
        keys = keys.reshape(n_heads, 2, -1, half)
    if keys.dim() != 4 or keys.shape[0] != n_heads or keys.shape[1] != 2 or keys.shape[3] != half:
        raise ValueError(
            f"{op}: keys must have shape (2*H*n, K/2) or (H, 2, n, K/2) with H={n_heads}, K={2 * half}, "
            f"got {tuple(keys.shape)}"
        )
    return query, keys


@cache
def _candidates(k: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Pairs (u, v) of ranks that can be among the k best sums: all (u', v') <= (u, v) are at least as good,
    so (u+1)(v+1) <= k."""
    pairs = [(u, v) for u in range(k) for v in range(k // (u + 1))]
    u, v = torch.tensor(pairs).T
    return u.to(device), v.to(device)


def _topk(scores1: Tensor, scores2: Tensor, k: int) -> tuple[Tensor, Tensor]:
    best1, index1 = scores1.topk(k, dim=1)
    best2, index2 = scores2.topk(k, dim=1)
    u, v = _candidates(k, scores1.device)
    precise = accumulate_dtype(scores1.dtype)
    sums = best1.to(precise)[:, u] + best2.to(precise)[:, v]
    scores, chosen = sums.topk(k, dim=1)
    indices = index1.gather(1, u[chosen]) * scores2.shape[1] + index2.gather(1, v[chosen])
    return scores.to(scores1.dtype), indices


def _fake_topk(scores1: Tensor, scores2: Tensor, k: int) -> tuple[Tensor, Tensor]:
    rows = scores1.shape[0]
    return scores1.new_empty(rows, k), scores1.new_empty(rows, k, dtype=torch.int64)


def _topk_backward(grad: Tensor, indices: Tensor, n1: int, n2: int) -> tuple[Tensor, Tensor]:
    # Sums of a half-score's several uses are made in float32, as in the kernels.
    precise = grad.to(accumulate_dtype(grad.dtype))
    result = []
    for length, index in ((n1, indices // n2), (n2, indices % n2)):
        dense = precise.new_zeros(grad.shape[0], length).scatter_add_(1, index, precise)
        result.append(dense.to(grad.dtype))
    return result[0], result[1]


def _fake_topk_backward(grad: Tensor, indices: Tensor, n1: int, n2: int) -> tuple[Tensor, Tensor]:
    return grad.new_empty(grad.shape[0], n1), grad.new_empty(grad.shape[0], n2)


def _setup_topk(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.sizes = inputs[0].shape[1], inputs[1].shape[1]
    ctx.save_for_backward(output[1])


def _gradient_topk(ctx: Any, grad: Tensor, _: Any) -> tuple[Any, ...]:
    (indices,) = ctx.saved_tensors
    return *torch.ops.vlp_ops.product_key_topk_backward(grad.contiguous(), indices, *ctx.sizes), None


_library.register("product_key_topk", _topk, _fake_topk, backward=_gradient_topk, setup_context=_setup_topk)
_library.register("product_key_topk_backward", _topk_backward, _fake_topk_backward)


# ---- bag ---------------------------------------------------------------------------------------------------


def embedding_bag(
    indices: Tensor, weight: Tensor, per_sample_weights: Tensor, *, sparse_grad: bool = False
) -> Tensor:
    """out[b] = sum_j per_sample_weights[b, j] * weight[indices[b, j]]: (B, D) in the dtype of weight, summed
    in float32 or wider.

    indices (B, bag), int64 or int32; weight (K, D); per_sample_weights (B, bag) in the dtype of weight or
    float32.
    sparse_grad: the gradient of weight is a sparse tensor that holds each used row once (eager mode only: its
        size depends on the data). Use it for tables that are much larger than B*bag, with an optimizer that
        takes sparse gradients.
    Once differentiable: a second derivative is refused. Raises ValueError for shapes, devices and (on the
    CPU; elsewhere with VLP_OPS_VALIDATE=1) indices out of
    range; TypeError for dtypes.
    """
    op = "embedding_bag"
    check_dim(op, "indices", indices, "B, bag")
    check_dim(op, "weight", weight, "K, D")
    check_integer(op, "indices", indices)
    check_float(op, "weight", weight)
    check_shape(op, "per_sample_weights", per_sample_weights, tuple(indices.shape))
    if per_sample_weights.dtype not in (weight.dtype, accumulate_dtype(weight.dtype)):
        if per_sample_weights.dtype not in FLOATS or not torch.is_autocast_enabled(weight.device.type):
            wanted = f"{weight.dtype} or {accumulate_dtype(weight.dtype)}"
            raise TypeError(f"{op}: per_sample_weights must be {wanted}, got {per_sample_weights.dtype}")
        per_sample_weights = per_sample_weights.to(accumulate_dtype(weight.dtype))
    check_device(op, "weight", weight, indices=indices, per_sample_weights=per_sample_weights)
    if _library.validates(indices):
        check_range(op, "index", indices, weight.shape[0], f"a table of {weight.shape[0]} rows")
    _library.note_backend(weight)
    if sparse_grad:
        return _SparseBag.apply(indices, weight, per_sample_weights)
    return torch.ops.vlp_ops.embedding_bag(indices, weight, per_sample_weights)


def product_key_lookup(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    k: int,
    *,
    n_heads: int | None = None,
    sparse_grad: bool = False,
) -> Tensor:
    """Memory lookup: softmax over the k best scores of each head, then the weighted rows of all heads summed:
    (T, V).

    query and keys as in `product_key_topk`; values (n*n, V), shared by the heads; the result has its dtype.
    The softmax is taken in float32 (float64 for float64 scores) and rounded to the type of the scores.
    sparse_grad as in `embedding_bag`. Raises ValueError and TypeError as these two do, and ValueError when
    values has other than n*n rows.
    """
    scores, indices = product_key_topk(query, keys, k, n_heads=n_heads)
    tokens, heads, _ = scores.shape
    slots = heads * k
    half = query.shape[-1] // 2
    n_keys = keys.numel() // (2 * heads * half) if half else 0
    check_dim("product_key_lookup", "values", values, "n*n, V")
    if values.shape[0] != n_keys * n_keys:
        raise ValueError(
            f"product_key_lookup: values must have n*n={n_keys * n_keys} rows for n={n_keys} keys per half, "
            f"got {values.shape[0]}"
        )
    weights = scores.softmax(-1, dtype=accumulate_dtype(scores.dtype)).to(scores.dtype).reshape(tokens, slots)
    if weights.dtype not in (values.dtype, accumulate_dtype(values.dtype)):
        weights = weights.to(accumulate_dtype(values.dtype))
    return embedding_bag(indices.reshape(tokens, slots), values, weights, sparse_grad=sparse_grad)


def _rows_per_chunk(bag: int, width: int) -> int:
    return max(1, CHUNK // max(1, bag * width))


def _bag(indices: Tensor, weight: Tensor, per_sample_weights: Tensor) -> Tensor:
    if indices.numel() == 0 or weight.numel() == 0:
        return weight.new_zeros(indices.shape[0], weight.shape[1])
    if weight.dtype == per_sample_weights.dtype and weight.dtype in (torch.float32, torch.float64):
        return F.embedding_bag(indices, weight, per_sample_weights=per_sample_weights, mode="sum")
    rows = _rows_per_chunk(indices.shape[1], weight.shape[1])
    parts = []
    for index, share in zip(indices.split(rows), per_sample_weights.split(rows), strict=True):
        picked = weight[index.long()].float()
        parts.append(torch.bmm(share.float()[:, None], picked)[:, 0].to(weight.dtype))
    return torch.cat(parts)


def _bag_backward(
    grad: Tensor, indices: Tensor, weight: Tensor, per_sample_weights: Tensor, mask: list[bool]
) -> tuple[Tensor, Tensor]:
    precise = accumulate_dtype(weight.dtype)
    bag, width = indices.shape[1], weight.shape[1]
    grad_weight = torch.zeros(weight.shape if mask[0] else (0,), dtype=precise, device=weight.device)
    grad_shares = torch.zeros(indices.shape if mask[1] else (0,), dtype=precise, device=weight.device)
    rows = _rows_per_chunk(bag, width)
    for start in range(0, indices.shape[0] if indices.numel() else 0, rows):
        part = slice(start, start + rows)
        index, upstream = indices[part].long(), grad[part].to(precise)
        if mask[0]:
            each = per_sample_weights[part].to(precise)[..., None] * upstream[:, None]
            grad_weight.index_add_(0, index.flatten(), each.flatten(0, 1))
        if mask[1]:
            grad_shares[part] = torch.bmm(weight[index].to(precise), upstream[..., None])[..., 0]
    return grad_weight.to(weight.dtype), grad_shares.to(per_sample_weights.dtype)


def _fake_bag(indices: Tensor, weight: Tensor, per_sample_weights: Tensor) -> Tensor:
    return weight.new_empty(indices.shape[0], weight.shape[1])


def _fake_bag_backward(grad, indices, weight, per_sample_weights, mask):
    return (
        weight.new_empty(weight.shape if mask[0] else (0,)),
        per_sample_weights.new_empty(indices.shape if mask[1] else (0,)),
    )


def _setup_bag(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _gradient_bag(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    mask = list(ctx.needs_input_grad[1:3])
    grads = torch.ops.vlp_ops.embedding_bag_backward(grad.contiguous(), *ctx.saved_tensors, mask)
    return None, grads[0] if mask[0] else None, grads[1] if mask[1] else None


_library.register("embedding_bag", _bag, _fake_bag, backward=_gradient_bag, setup_context=_setup_bag)
_library.register("embedding_bag_backward", _bag_backward, _fake_bag_backward)


class _SparseBag(torch.autograd.Function):
    """The bag with a sparse gradient: the same backward operator on the table of used rows."""

    @staticmethod
    def forward(ctx: Any, indices: Tensor, weight: Tensor, per_sample_weights: Tensor) -> Tensor:
        ctx.save_for_backward(indices, weight, per_sample_weights)
        return torch.ops.vlp_ops.embedding_bag(indices, weight, per_sample_weights)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        # Not once_differentiable: that drops a second derivative without a word where grad is a constant; the
        # operator below refuses it.
        indices, weight, per_sample_weights = ctx.saved_tensors
        mask = list(ctx.needs_input_grad[1:3])
        used, positions = indices.unique(return_inverse=True)
        grads = torch.ops.vlp_ops.embedding_bag_backward(
            grad.contiguous(), positions.view(indices.shape), weight[used.long()], per_sample_weights, mask
        )
        grad_weight = None
        if mask[0]:
            grad_weight = torch.sparse_coo_tensor(
                used[None].long(), grads[0], weight.shape, is_coalesced=True, check_invariants=False
            )
        return None, grad_weight, grads[1] if mask[1] else None
