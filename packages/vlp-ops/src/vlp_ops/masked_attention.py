"""One front end for the masks of the five systems over PyTorch's own attention kernels; no kernel of our own.

Masks stay in their small form (a padding mask is (B, 1, 1, K) all the way), so memory is O(Q + K) where the kernel allows it. Which kernel
PyTorch takes follows its own rules and `torch.nn.attention.sdpa_kernel`.

B batch   H heads   Q queries   K keys   D width per head
"""

import math
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from vlp_ops._checks import FLOATS, check_device, check_dim, check_float, check_integer


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    mask: Tensor | None = None,
    bias: Tensor | None = None,
    key_lengths: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    empty_rows: Literal["zero", "all"] = "zero",
    scale: float | None = None,
    dropout_p: float = 0.0,
) -> Tensor:
    """softmax(scale * query . key + bias) . value over the allowed keys: (B, H, Q, D).

    query (B, H, Q, D), key and value (B, H, K, D). The masks below combine: a key must be allowed by all of them.
    mask: bool, True = attend: (B, K) key padding, (B, Q, K) the same for all heads, or broadcastable to (B, H, Q, K).
    bias: added to the scaled products: (H, Q, K), or broadcastable to (B, H, Q, K); it may need a gradient (relative positions).
    key_lengths (B,): keys 0..length-1 of each sample are there.
    cu_seqlens (S+1,): several sequences packed into one row of tokens (B = 1, Q = K); token i and j attend when they lie in the same segment
        [cu_seqlens[s], cu_seqlens[s+1]).
    empty_rows: a query with no allowed key gives 0 and no gradient ("zero"), or attends to all keys ("all", Mask2Former).
    scale: default 1/sqrt(D). dropout_p: on the attention weights.
    Raises ValueError for shapes and devices, TypeError for dtypes. Source: arXiv 1706.03762; empty rows: arXiv 2112.01527, section 3.2.1.
    """
    for name, tensor in (("query", query), ("key", key), ("value", value)):
        check_dim("attention", name, tensor, "B, H, Q, D" if name == "query" else "B, H, K, D")
        check_float("attention", name, tensor)
    if key.shape[:3] != value.shape[:3] or query.shape[:2] != key.shape[:2] or query.shape[3] != key.shape[3]:
        shapes = f"query {tuple(query.shape)}, key {tuple(key.shape)}, value {tuple(value.shape)}"
        raise ValueError(f"attention: shapes (B, H, Q, D), (B, H, K, D), (B, H, K, D) do not fit: {shapes}")
    if empty_rows not in ("zero", "all"):
        raise ValueError(f"attention: empty_rows must be 'zero' or 'all', got {empty_rows!r}")
    check_device(
        "attention",
        "query",
        query,
        key=key,
        value=value,
        mask=mask,
        bias=bias,
        key_lengths=key_lengths,
        cu_seqlens=cu_seqlens,
    )
    allowed = _allowed(query, key, mask, key_lengths, cu_seqlens)
    if allowed is not None and empty_rows == "all":
        allowed = allowed | ~allowed.any(-1, keepdim=True)
    if query.numel() == 0 or key.shape[2] == 0:
        return query.new_zeros(*query.shape[:3], value.shape[3])
    additive = _additive(query, key, bias, allowed)
    if allowed is None or additive is None:
        chosen = allowed if additive is None else additive
        return F.scaled_dot_product_attention(
            query, key, value, attn_mask=chosen, scale=scale, dropout_p=dropout_p
        )
    # A row of -inf has no softmax: it gets finite scores and its output is set to 0 after.
    some = allowed.any(-1, keepdim=True)
    additive = additive.masked_fill(~allowed & some, -math.inf)
    out = F.scaled_dot_product_attention(
        query, key, value, attn_mask=additive, scale=scale, dropout_p=dropout_p
    )
    return out if empty_rows == "all" else torch.where(some, out, 0.0)


def _allowed(
    query: Tensor, key: Tensor, mask: Tensor | None, key_lengths: Tensor | None, cu_seqlens: Tensor | None
) -> Tensor | None:
    """The product of all masks, 4-dimensional, not expanded."""
    batch, heads, queries, _ = query.shape
    keys = key.shape[2]
    parts = []
    if mask is not None:
        if mask.dtype != torch.bool:
            raise TypeError(
                f"attention: mask must be bool (True = attend), got {mask.dtype}; additive numbers go to bias"
            )
        shape = tuple(mask.shape)
        if mask.dim() == 2:
            mask = mask[:, None, None, :]
        elif mask.dim() == 3:
            mask = mask[:, None]
        full = (batch, heads, queries, keys)
        if mask.dim() != 4 or any(have not in (1, want) for have, want in zip(mask.shape, full, strict=True)):
            raise ValueError(
                f"attention: mask must have shape (B, K), (B, Q, K) or (B, H, Q, K) with B={batch}, H={heads}, Q={queries}, "
                f"K={keys}, got {shape}"
            )
        parts.append(mask)
    if key_lengths is not None:
        check_integer("attention", "key_lengths", key_lengths)
        if tuple(key_lengths.shape) != (batch,):
            raise ValueError(
                f"attention: key_lengths must have shape ({batch},), got {tuple(key_lengths.shape)}"
            )
        parts.append((torch.arange(keys, device=key.device) < key_lengths[:, None])[:, None, None, :])
    if cu_seqlens is not None:
        check_integer("attention", "cu_seqlens", cu_seqlens)
        if cu_seqlens.dim() != 1 or batch != 1 or queries != keys:
            raise ValueError(
                f"attention: cu_seqlens (S+1,) needs packed tokens with B=1 and Q=K, got cu_seqlens {tuple(cu_seqlens.shape)}, "
                f"B={batch}, Q={queries}, K={keys}"
            )
        place = torch.arange(keys, device=key.device, dtype=cu_seqlens.dtype)
        segment = torch.searchsorted(cu_seqlens, place, right=True)
        within = (segment > 0) & (segment < cu_seqlens.shape[0])
        parts.append(((segment[:, None] == segment[None, :]) & within)[None, None])
    allowed = None
    for part in parts:
        allowed = part if allowed is None else allowed & part
    return allowed


def _additive(query: Tensor, key: Tensor, bias: Tensor | None, allowed: Tensor | None) -> Tensor | None:
    if bias is None:
        return None
    if bias.dtype not in FLOATS:
        raise TypeError(
            f"attention: bias must be a floating type, got {bias.dtype}; a bool mask goes to mask"
        )
    shape, full = tuple(bias.shape), (*query.shape[:3], key.shape[2])
    if bias.dim() == 3:
        bias = bias[None]
    if bias.dim() != 4 or any(have not in (1, want) for have, want in zip(bias.shape, full, strict=True)):
        raise ValueError(f"attention: bias must have shape (H, Q, K) or broadcast to {full}, got {shape}")
    return bias.to(query.dtype)
