"""One front end for the masks of the five systems over PyTorch's own attention kernels; no kernel of our own.

Masks stay in their small form (a padding mask is (B, 1, 1, K) all the way), so memory is O(Q + K) where the
kernel allows it. `attention_backend` says which of these a call takes:

sdpa: `F.scaled_dot_product_attention`, the default everywhere. Which kernel runs inside follows PyTorch's
    rules, `torch.nn.attention.sdpa_kernel` and `torch.nn.attention.activate_flash_attention_impl`
    (FlashAttention 3 and 4, if installed).
flex: FlexAttention, where SDPA would hold what a mask needs for every pair of tokens and the call is large
    (`FLEX_PAIRS`, `FLEX_BYTES`): packed sequences (blocks between two sequences are skipped, no Q x K mask is
    made) and a bias shared by the batch that SDPA would have to expand, for a mask beside it or for its
    gradient. On CUDA only by itself, because on the CPU it has no gradient and is no faster; the thresholds
    follow from memory and were not tuned on a GPU.
xformers: `memory_efficient_attention`, for its own mask objects and only for them: it adds nothing to SDPA
    for plain tensors.

`torch.nn.attention.varlen` is not used: it needs the longest length on the host (a wait for the device), half
types and no bias.

B batch   H heads   Q queries   K keys   D width per head
"""

import math
import sys
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from vlp_ops._checks import FLOATS, check_device, check_dim, check_float, check_integer

OP = "attention"
# FlexAttention by itself from this many query-key pairs of packed tokens, and from this size of an expanded
# bias.
FLEX_PAIRS, FLEX_BYTES = 1 << 22, 1 << 28
# Side of the blocks that FlexAttention skips, computes whole, or masks one by one.
BLOCK = 128


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    mask: Tensor | Any | None = None,
    bias: Tensor | None = None,
    key_lengths: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    empty_rows: Literal["zero", "all"] = "zero",
    scale: float | None = None,
    dropout_p: float = 0.0,
    backend: Literal["sdpa", "flex"] | None = None,
) -> Tensor:
    """softmax(scale * query . key + bias) . value over the allowed keys: (B, H, Q, D).

    query (B, H, Q, D), key and value (B, H, K, D). The masks below combine: a key must be allowed by all of
    them.
    mask: bool, True = attend: (B, K) key padding, (B, Q, K) the same for all heads, or broadcastable to (B,
        H, Q, K). Or an attention bias object of xformers (`xformers.ops.fmha.attn_bias`), alone: on CUDA
        xformers computes, elsewhere the object is written out and SDPA does.
    bias: added to the scaled products: (H, Q, K), or broadcastable to (B, H, Q, K); it may need a gradient
    (relative positions). key_lengths (B,): keys 0..length-1 of each sample are there.
    cu_seqlens (S+1,): several sequences packed into one row of tokens (B = 1, Q = K); token i and j attend
    when they lie in the same segment
        [cu_seqlens[s], cu_seqlens[s+1]).
    empty_rows: a query with no allowed key gives 0 and no gradient ("zero"), or attends to all keys ("all",
        Mask2Former).
    scale: default 1/sqrt(D). dropout_p: on the attention weights.
    backend: "sdpa" or "flex" by name; None chooses (see the top of this module and `attention_backend`).
        FlexAttention outside torch.compile is compiled on its first call on CUDA.
    Without keys or queries the result is zeros, and every input has a gradient of zeros. Raises ValueError
    for shapes, devices and a backend that cannot serve the call, TypeError for dtypes, also where query, key
    and value differ in it outside autocast. Source: arXiv 1706.03762; empty rows: arXiv 2112.01527, section
    3.2.1; FlexAttention: arXiv 2412.05496.
    """
    call = _checked(query, key, value, mask, bias, key_lengths, cu_seqlens, empty_rows, scale, dropout_p)
    match _route(call, backend):
        case "empty":
            return _empty(call)
        case "xformers":
            return _xformers(call)
        case "flex":
            return _flex(call)
        case _:
            return _sdpa(call)


def attention_backend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    mask: Tensor | Any | None = None,
    bias: Tensor | None = None,
    key_lengths: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    empty_rows: Literal["zero", "all"] = "zero",
    scale: float | None = None,
    dropout_p: float = 0.0,
    backend: Literal["sdpa", "flex"] | None = None,
) -> str:
    """What `attention` takes for the same arguments: "flex", "xformers", "empty" (no keys or no queries:
    zeros), or SDPA with its kernel.

    SDPA's kernels are named as in `torch.nn.attention.SDPBackend`: "sdpa:flash_attention",
    "sdpa:efficient_attention", "sdpa:cudnn_attention", "sdpa:math". The answer depends on dtype, device,
    sizes, and on whether a gradient is wanted, as the choice does. Raises what `attention` raises.
    """
    call = _checked(query, key, value, mask, bias, key_lengths, cu_seqlens, empty_rows, scale, dropout_p)
    route = _route(call, backend)
    if route != "sdpa":
        return route
    from torch.nn.attention import SDPBackend

    # What scaled_dot_product_attention itself asks before it calls a kernel.
    number = torch._fused_sdp_choice(query, key, value, _sdpa_mask(call)[0], dropout_p, False, scale=scale)
    return f"sdpa:{SDPBackend(number).name.lower()}"


# ---- arguments ---------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class _Call:
    """Checked arguments: mask and bias have four axes, none expanded."""

    query: Tensor
    key: Tensor
    value: Tensor
    mask: Tensor | None
    bias: Tensor | None
    key_lengths: Tensor | None
    cu_seqlens: Tensor | None
    foreign: Any
    """A mask object of xformers."""
    empty_rows: str
    scale: float | None
    dropout_p: float


def _checked(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Any,
    bias: Tensor | None,
    key_lengths: Tensor | None,
    cu_seqlens: Tensor | None,
    empty_rows: str,
    scale: float | None,
    dropout_p: float,
) -> _Call:
    for name, tensor in (("query", query), ("key", key), ("value", value)):
        check_dim(OP, name, tensor, "B, H, Q, D" if name == "query" else "B, H, K, D")
        check_float(OP, name, tensor)
    if key.shape[:3] != value.shape[:3] or query.shape[:2] != key.shape[:2] or query.shape[3] != key.shape[3]:
        shapes = f"query {tuple(query.shape)}, key {tuple(key.shape)}, value {tuple(value.shape)}"
        raise ValueError(f"{OP}: shapes (B, H, Q, D), (B, H, K, D), (B, H, K, D) do not fit: {shapes}")
    for name, tensor in (("key", key), ("value", value)):
        if tensor.dtype != query.dtype and not torch.is_autocast_enabled(query.device.type):
            raise TypeError(f"{OP}: query is {query.dtype} but {name} is {tensor.dtype}")
    if empty_rows not in ("zero", "all"):
        raise ValueError(f"{OP}: empty_rows must be 'zero' or 'all', got {empty_rows!r}")
    foreign = None
    if _is_of_xformers(mask):
        if bias is not None or key_lengths is not None or cu_seqlens is not None or empty_rows == "all":
            raise ValueError(
                f"{OP}: a {type(mask).__name__} of xformers does not combine with bias, key_lengths, "
                "cu_seqlens or empty_rows='all'"
            )
        mask, foreign = None, mask
    check_device(
        OP,
        "query",
        query,
        key=key,
        value=value,
        mask=mask,
        bias=bias,
        key_lengths=key_lengths,
        cu_seqlens=cu_seqlens,
    )
    full = (*query.shape[:3], key.shape[2])
    batch, _, queries, keys = full
    if key_lengths is not None:
        check_integer(OP, "key_lengths", key_lengths)
        if tuple(key_lengths.shape) != (batch,):
            raise ValueError(f"{OP}: key_lengths must have shape ({batch},), got {tuple(key_lengths.shape)}")
    if cu_seqlens is not None:
        check_integer(OP, "cu_seqlens", cu_seqlens)
        if cu_seqlens.dim() != 1 or batch != 1 or queries != keys:
            raise ValueError(
                f"{OP}: cu_seqlens (S+1,) needs packed tokens with B=1 and Q=K, "
                f"got cu_seqlens {tuple(cu_seqlens.shape)}, "
                f"B={batch}, Q={queries}, K={keys}"
            )
    return _Call(
        query=query,
        key=key,
        value=value,
        mask=_four_axes_of_mask(mask, full),
        bias=_four_axes_of_bias(bias, full),
        key_lengths=key_lengths,
        cu_seqlens=cu_seqlens,
        foreign=foreign,
        empty_rows=empty_rows,
        scale=scale,
        dropout_p=dropout_p,
    )


def _four_axes_of_mask(mask: Tensor | None, full: tuple[int, ...]) -> Tensor | None:
    if mask is None:
        return None
    if mask.dtype != torch.bool:
        raise TypeError(
            f"{OP}: mask must be bool (True = attend), got {mask.dtype}; additive numbers go to bias"
        )
    shape = tuple(mask.shape)
    if mask.dim() == 2:
        mask = mask[:, None, None, :]
    elif mask.dim() == 3:
        mask = mask[:, None]
    if mask.dim() != 4 or any(have not in (1, want) for have, want in zip(mask.shape, full, strict=True)):
        batch, heads, queries, keys = full
        raise ValueError(
            f"{OP}: mask must have shape (B, K), (B, Q, K) or (B, H, Q, K) with B={batch}, H={heads}, "
            f"Q={queries}, "
            f"K={keys}, got {shape}"
        )
    return mask


def _four_axes_of_bias(bias: Tensor | None, full: tuple[int, ...]) -> Tensor | None:
    if bias is None:
        return None
    if bias.dtype not in FLOATS:
        raise TypeError(f"{OP}: bias must be a floating type, got {bias.dtype}; a bool mask goes to mask")
    shape = tuple(bias.shape)
    if bias.dim() == 3:
        bias = bias[None]
    if bias.dim() != 4 or any(have not in (1, want) for have, want in zip(bias.shape, full, strict=True)):
        raise ValueError(f"{OP}: bias must have shape (H, Q, K) or broadcast to {full}, got {shape}")
    return bias


# ---- choice ------------------------------------------------------------------------------------------------


def _route(call: _Call, backend: str | None) -> str:
    query, key, bias = call.query, call.key, call.bias
    if backend not in (None, "sdpa", "flex"):
        raise ValueError(f"{OP}: backend must be 'sdpa', 'flex' or None, got {backend!r}")
    if backend is not None and call.foreign is not None:
        raise ValueError(f"{OP}: a {type(call.foreign).__name__} of xformers goes without backend")
    if query.numel() == 0 or key.shape[2] == 0:
        return "empty"
    if call.foreign is not None:
        return "xformers" if query.is_cuda else "sdpa"
    tensors = (query, key, call.value)
    refusal = why_not_flex(
        device=query.device.type,
        dtypes={tensor.dtype for tensor in tensors},
        widths=(query.shape[3], call.value.shape[3]),
        mask_shape=None if call.mask is None else tuple(call.mask.shape),
        empty_rows=call.empty_rows,
        dropout_p=call.dropout_p,
        wants_gradient=torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors),
    )
    if backend == "flex" and refusal:
        raise ValueError(f"{OP}: FlexAttention cannot serve this call: {refusal}")
    if backend is None and not refusal:
        batch, heads, queries, _ = query.shape
        pays = flex_pays(
            device=query.device.type,
            heads=batch * heads,
            pairs=queries * key.shape[2],
            bytes_per_number=query.element_size(),
            packed=call.cu_seqlens is not None,
            masked=call.mask is not None or call.key_lengths is not None,
            shared_bias=bias is not None and bias.shape[0] < batch,
            bias_gradient=bias is not None and torch.is_grad_enabled() and bias.requires_grad,
        )
        backend = "flex" if pays else "sdpa"
    return backend or "sdpa"


def why_not_flex(
    *,
    device: str,
    dtypes: set[torch.dtype],
    widths: tuple[int, int],
    mask_shape: tuple[int, ...] | None,
    empty_rows: str,
    dropout_p: float,
    wants_gradient: bool,
) -> str | None:
    """The first reason why FlexAttention cannot compute a call, or None."""
    if device not in ("cpu", "cuda"):
        return f"it is not used on {device}"
    if len(dtypes) > 1:
        return "query, key and value have different dtypes"
    if dropout_p > 0:
        return "it has no dropout on the attention weights"
    if empty_rows == "all":
        return "rows without a key give 0 there (empty_rows='zero')"
    if mask_shape is not None and mask_shape[1:3] != (1, 1):
        return (
            "a mask that differs between queries or heads is a tensor of its own; SDPA reads it just as well"
        )
    if device == "cpu" and wants_gradient:
        return "it has no gradient on the CPU"
    if device == "cuda" and torch.float64 in dtypes:
        return "its CUDA kernels have no float64"
    if device == "cuda" and min(widths) < 16:
        return "its CUDA kernels need a width of at least 16 per head"
    return None


def flex_pays(
    *,
    device: str,
    heads: int,
    pairs: int,
    bytes_per_number: int,
    packed: bool,
    masked: bool,
    shared_bias: bool,
    bias_gradient: bool,
) -> bool:
    """Whether SDPA would hold something large that FlexAttention does not. heads: B*H; pairs: Q*K."""
    if device != "cuda":
        return False
    expanded = shared_bias and (masked or bias_gradient) and heads * pairs * bytes_per_number >= FLEX_BYTES
    return (packed and pairs >= FLEX_PAIRS) or expanded


# ---- nothing to attend to ----------------------------------------------------------------------------------


def _empty(call: _Call) -> Tensor:
    """Zeros that hang on every input: a rank without keys must have a gradient, although it is 0, for every
    parameter that the others have one for."""
    scores = call.query @ call.key.transpose(-1, -2)
    if call.bias is not None:
        scores = scores + call.bias.to(scores.dtype)
    # Sums over no key: 0 whatever the numbers are.
    return scores[..., :0] @ call.value[..., :0, :]


# ---- SDPA --------------------------------------------------------------------------------------------------


def _sdpa(call: _Call) -> Tensor:
    mask, some = _sdpa_mask(call)
    out = F.scaled_dot_product_attention(
        call.query, call.key, call.value, attn_mask=mask, scale=call.scale, dropout_p=call.dropout_p
    )
    return out if some is None else torch.where(some, out, 0.0)


def _sdpa_mask(call: _Call) -> tuple[Tensor | None, Tensor | None]:
    """What SDPA is given as mask, and which rows to keep of its output (None: all)."""
    allowed, bias = _allowed(call), call.bias
    if call.foreign is not None:
        shape = (*call.query.shape[:3], call.key.shape[2])
        bias = call.foreign.materialize(shape, dtype=call.query.dtype, device=call.query.device)
        allowed = bias > -math.inf
        bias = bias.masked_fill(~allowed, 0.0)
    if allowed is not None and call.empty_rows == "all":
        allowed = allowed | ~allowed.any(-1, keepdim=True)
    if bias is None:
        return allowed, None
    additive = bias.to(call.query.dtype)
    if allowed is None:
        return additive, None
    # A row of -inf has no softmax: it gets finite scores and its output is set to 0 after.
    some = allowed.any(-1, keepdim=True)
    additive = additive.masked_fill(~allowed & some, -math.inf)
    return additive, None if call.empty_rows == "all" else some


def _allowed(call: _Call) -> Tensor | None:
    """The product of all masks, 4-dimensional, not expanded."""
    parts = [] if call.mask is None else [call.mask]
    if call.key_lengths is not None:
        parts.append(_there(call)[:, None, None, :])
    if call.cu_seqlens is not None:
        segment, within = _segments(call)
        parts.append(((segment[:, None] == segment[None, :]) & within)[None, None])
    allowed = None
    for part in parts:
        allowed = part if allowed is None else allowed & part
    return allowed


def _there(call: _Call) -> Tensor:
    """(B, K) of key_lengths."""
    assert call.key_lengths is not None
    return torch.arange(call.key.shape[2], device=call.key.device) < call.key_lengths[:, None]


def _segments(call: _Call) -> tuple[Tensor, Tensor]:
    """Number of each packed token's segment, never falling, and whether the token lies in one at all."""
    starts = call.cu_seqlens
    assert starts is not None
    place = torch.arange(call.key.shape[2], device=starts.device, dtype=starts.dtype)
    segment = torch.searchsorted(starts, place, right=True)
    return segment, (segment > 0) & (segment < starts.shape[0])


# ---- FlexAttention -----------------------------------------------------------------------------------------


def _flex(call: _Call) -> Tensor:
    from torch.nn.attention.flex_attention import flex_attention

    run = _compiled_flex() if call.query.is_cuda and not torch.compiler.is_compiling() else flex_attention
    return run(
        call.query,
        call.key,
        call.value,
        score_mod=None if call.bias is None else _add(call.bias),
        block_mask=_block_mask(call),
        scale=call.scale,
    )


@cache
def _compiled_flex() -> Any:
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention)


def _add(bias: Tensor) -> Any:
    """Adds the bias by its own axes: expanding it would make its gradient (B, H, Q, K)."""
    own = [axis for axis, size in enumerate(bias.shape) if size > 1]
    bias = bias.squeeze()

    def score_mod(score: Tensor, *place: Tensor) -> Tensor:
        return score + bias[tuple(place[axis] for axis in own)]

    return score_mod


def _block_mask(call: _Call) -> Any:
    """Which blocks of BLOCK x BLOCK pairs to compute, and which of them whole, without ever holding Q x K."""
    from torch.nn.attention.flex_attention import BlockMask

    padding = None if call.mask is None else call.mask[:, 0, 0]
    if call.key_lengths is not None:
        padding = _there(call) if padding is None else padding & _there(call)
    if padding is None and call.cu_seqlens is None:
        return None
    queries, keys = call.query.shape[2], call.key.shape[2]
    device = call.query.device
    tests = []
    rows, columns = -(-queries // BLOCK), -(-keys // BLOCK)
    some = torch.ones(1, 1, rows, columns, dtype=torch.bool, device=device)
    every = _complete(queries, rows, device)[:, None] & _complete(keys, columns, device) & some
    if call.cu_seqlens is not None:
        segment, within = _segments(call)
        first, last = segment[::BLOCK], segment[BLOCK - 1 :: BLOCK]
        last = torch.cat([last, segment[-1:]])[:rows]
        some = some & (first[:, None] <= last) & (last[:, None] >= first)
        every = every & (first[:, None] == last) & (last[:, None] == first) & within[::BLOCK]
        tests.append(lambda b, h, q, k: (segment[q] == segment[k]) & within[q])
    if padding is not None:
        padding = padding.expand(call.query.shape[0], keys)
        blocks = F.pad(padding, (0, columns * BLOCK - keys)).unflatten(1, (columns, BLOCK))
        some, every = some & blocks.any(2)[:, None, None], every & blocks.all(2)[:, None, None]
        tests.append(lambda b, h, q, k: padding[b, k])

    def mask_mod(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        allowed = tests[0](b, h, q, k)
        return allowed & tests[1](b, h, q, k) if len(tests) > 1 else allowed

    return BlockMask.from_kv_blocks(
        *_listed(some & ~every),
        *_listed(every),
        BLOCK_SIZE=BLOCK,
        mask_mod=mask_mod,
        seq_lengths=(queries, keys),
    )


def _complete(length: int, blocks: int, device: torch.device) -> Tensor:
    """Blocks that lie inside the length as a whole."""
    return (torch.arange(blocks, device=device) + 1) * BLOCK <= length


def _listed(blocks: Tensor) -> tuple[Tensor, Tensor]:
    """How many blocks of each row are True, and their numbers first."""
    order = blocks.to(torch.int8).argsort(dim=-1, descending=True, stable=True)
    return blocks.sum(-1, dtype=torch.int32), order.to(torch.int32)


# ---- xformers ----------------------------------------------------------------------------------------------


def _is_of_xformers(mask: Any) -> bool:
    # Who holds such an object has imported its module.
    module = sys.modules.get("xformers.ops.fmha.attn_bias")
    return module is not None and isinstance(mask, module.AttentionBias)


def _xformers(call: _Call) -> Tensor:
    memory_efficient_attention = import_module("xformers.ops").memory_efficient_attention
    # Its axes are (B, tokens, heads, width).
    query, key, value = (tensor.transpose(1, 2) for tensor in (call.query, call.key, call.value))
    out = memory_efficient_attention(
        query, key, value, attn_bias=call.foreign, p=call.dropout_p, scale=call.scale
    )
    return out.transpose(1, 2)
