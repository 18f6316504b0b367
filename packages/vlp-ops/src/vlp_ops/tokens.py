"""Keeping a part of the tokens and putting them back, as masked auto-encoders do.

Source: Masked Autoencoders, arXiv 2111.06377, section 3 ("simple implementation").

N batch   L tokens   K kept tokens   D width
"""

from typing import Any

import torch
from torch import Tensor

from vlp_ops import _library
from vlp_ops._checks import accumulate_dtype, check_device, check_dim, check_float, check_integer, check_range


def take_tokens(x: Tensor, ids: Tensor) -> Tensor:
    """Rows of each sample by index: out[n, k] = x[n, ids[n, k]]; (N, L, D), (N, K) -> (N, K, D). An index may
    occur more than once.

    Raises ValueError for shapes, devices and (on the CPU; elsewhere with VLP_OPS_VALIDATE=1) ids outside
    0..L-1; TypeError for dtypes.
    """
    check_dim("take_tokens", "x", x, "N, L, D")
    check_float("take_tokens", "x", x)
    check_integer("take_tokens", "ids", ids)
    if ids.dim() != 2 or ids.shape[0] != x.shape[0]:
        raise ValueError(
            f"take_tokens: ids must have shape (N, K) with N={x.shape[0]}, got {tuple(ids.shape)}"
        )
    check_device("take_tokens", "x", x, ids=ids)
    looks = _library.validates(ids)
    # The compiled CPU kernel looks at every id anyway; to look twice would take a tenth of the time.
    late = looks and x.device.type == "cpu" and _library.is_native("cpu")
    if looks and not late:
        check_range("take_tokens", "index", ids, x.shape[1], f"{x.shape[1]} tokens")
    _library.note_backend(x)
    try:
        return torch.ops.vlp_ops.take_tokens(x, ids)
    except RuntimeError:
        if late:
            check_range("take_tokens", "index", ids, x.shape[1], f"{x.shape[1]} tokens")
        raise


def restore_tokens(kept: Tensor, ids_restore: Tensor, mask_token: Tensor) -> Tensor:
    """Kept tokens in their places, the mask token in all others: (N, K, D), (N, L), (D) -> (N, L, D).

    out[n, l] = kept[n, ids_restore[n, l]] where ids_restore[n, l] < K, else mask_token. Each row of
    ids_restore must be a permutation of 0..L-1 (checked on the CPU; elsewhere with VLP_OPS_VALIDATE=1).
    mask_token: (D,), or (1, 1, D) as models keep it. Its gradient is summed in float32 or wider. Raises
        ValueError for shapes and devices, TypeError for dtypes.
    """
    check_dim("restore_tokens", "kept", kept, "N, K, D")
    check_float("restore_tokens", "kept", kept)
    check_integer("restore_tokens", "ids_restore", ids_restore)
    batch, count, width = kept.shape
    if ids_restore.dim() != 2 or ids_restore.shape[0] != batch or ids_restore.shape[1] < count:
        shape = tuple(ids_restore.shape)
        raise ValueError(
            f"restore_tokens: ids_restore must have shape (N, L) with N={batch} and L >= {count}, got {shape}"
        )
    if mask_token.numel() != width:
        raise ValueError(
            f"restore_tokens: mask_token must hold D={width} numbers, got shape {tuple(mask_token.shape)}"
        )
    if mask_token.dtype != kept.dtype and not torch.is_autocast_enabled(kept.device.type):
        raise TypeError(f"restore_tokens: mask_token must be {kept.dtype} like kept, got {mask_token.dtype}")
    check_device("restore_tokens", "kept", kept, ids_restore=ids_restore, mask_token=mask_token)
    if _library.validates(ids_restore) and ids_restore.numel():
        length = ids_restore.shape[1]
        check_range("restore_tokens", "index", ids_restore, length, f"{length} tokens")
        places = _library.in_memory(ids_restore).long()
        seen = torch.zeros_like(places, dtype=torch.bool)
        if not seen.scatter_(-1, places, True).all():
            raise ValueError("restore_tokens: each row of ids_restore must be a permutation of 0..L-1")
    _library.note_backend(kept)
    return torch.ops.vlp_ops.restore_tokens(kept, ids_restore, mask_token.reshape(width).to(kept.dtype))


def random_masking(
    x: Tensor, mask_ratio: float, *, noise: Tensor | None = None, generator: torch.Generator | None = None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Keeps int(L * (1 - mask_ratio)) random tokens of each sample: (kept, mask, ids_restore, ids_keep).

    x (N, L, D); kept (N, K, D) in random order; mask (N, L) float32, 1 = removed; ids_restore (N, L) for
    `restore_tokens`; ids_keep (N, K).
    noise: (N, L) numbers to sort by, smallest kept; drawn uniformly (with `generator`) when not given.
    Gather the patches before projecting them where the model allows it: the projection of removed tokens is
    wasted. Raises ValueError for shapes and a ratio outside [0, 1].
    """
    check_dim("random_masking", "x", x, "N, L, D")
    if not 0.0 <= mask_ratio <= 1.0:
        raise ValueError(f"random_masking: mask_ratio must lie in [0, 1], got {mask_ratio}")
    batch, length, _ = x.shape
    if noise is None:
        noise = torch.rand(batch, length, device=x.device, generator=generator)
    elif tuple(noise.shape) != (batch, length):
        raise ValueError(f"random_masking: noise must have shape {(batch, length)}, got {tuple(noise.shape)}")
    elif generator is not None:
        raise ValueError("random_masking: give noise or generator, not both")
    ids_shuffle = noise.argsort(dim=1, stable=True)
    places = torch.arange(length, device=x.device).expand(batch, length)
    ids_restore = torch.empty_like(ids_shuffle).scatter_(1, ids_shuffle, places)
    count = int(length * (1 - mask_ratio))
    ids_keep = ids_shuffle[:, :count].contiguous()
    mask = (ids_restore >= count).float()
    return take_tokens(x, ids_keep), mask, ids_restore, ids_keep


# ---- PyTorch implementation
# ------------------------------------------------------------------------------------------------------


def _flat(ids: Tensor, length: int) -> Tensor:
    """Row numbers in a (N*length, D) view."""
    return (ids.long() + torch.arange(ids.shape[0], device=ids.device)[:, None] * length).flatten()


def _take(x: Tensor, ids: Tensor) -> Tensor:
    # index_select copies whole rows; gather would need an int64 index of the size of the output.
    batch, length, width = x.shape
    return (
        x.reshape(batch * length, width).index_select(0, _flat(ids, length)).view(batch, ids.shape[1], width)
    )


def _take_backward(grad: Tensor, ids: Tensor, length: int) -> Tensor:
    batch, count, width = grad.shape
    total = torch.zeros(batch * length, width, dtype=accumulate_dtype(grad.dtype), device=grad.device)
    total.index_add_(0, _flat(ids, length), grad.reshape(batch * count, width).to(total.dtype))
    return total.to(grad.dtype).view(batch, length, width)


def _restore(kept: Tensor, ids_restore: Tensor, mask_token: Tensor) -> Tensor:
    batch, count, width = kept.shape
    rows = torch.where(ids_restore < count, _flat(ids_restore, count).view_as(ids_restore), batch * count)
    source = torch.cat([kept.reshape(batch * count, width), mask_token[None]])
    return source.index_select(0, rows.flatten()).view(batch, ids_restore.shape[1], width)


def _restore_backward(grad: Tensor, ids_restore: Tensor, kept: int) -> tuple[Tensor, Tensor]:
    batch, length, width = grad.shape
    places = torch.arange(length, device=grad.device).expand(batch, length)
    inverse = torch.zeros_like(ids_restore, dtype=torch.int64).scatter_(1, ids_restore.long(), places)
    precise = accumulate_dtype(grad.dtype)
    removed = (ids_restore >= kept).to(precise).view(1, batch * length)
    grad_mask = (removed @ grad.reshape(batch * length, width).to(precise))[0].to(grad.dtype)
    return _take(grad, inverse[:, :kept]), grad_mask


def _fake_take(x: Tensor, ids: Tensor) -> Tensor:
    return x.new_empty(x.shape[0], ids.shape[1], x.shape[2])


def _fake_take_backward(grad: Tensor, ids: Tensor, length: int) -> Tensor:
    return grad.new_empty(grad.shape[0], length, grad.shape[2])


def _fake_restore(kept: Tensor, ids_restore: Tensor, mask_token: Tensor) -> Tensor:
    return kept.new_empty(kept.shape[0], ids_restore.shape[1], kept.shape[2])


def _fake_restore_backward(grad: Tensor, ids_restore: Tensor, kept: int) -> tuple[Tensor, Tensor]:
    return grad.new_empty(grad.shape[0], kept, grad.shape[2]), grad.new_empty(grad.shape[2])


def _setup_take(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.length = inputs[0].shape[1]
    ctx.save_for_backward(inputs[1])


def _gradient_take(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    return torch.ops.vlp_ops.take_tokens_backward(grad.contiguous(), *ctx.saved_tensors, ctx.length), None


def _setup_restore(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.kept = inputs[0].shape[1]
    ctx.save_for_backward(inputs[1])


def _gradient_restore(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    kept, mask = torch.ops.vlp_ops.restore_tokens_backward(grad.contiguous(), *ctx.saved_tensors, ctx.kept)
    return kept, None, mask


_library.register("take_tokens", _take, _fake_take, backward=_gradient_take, setup_context=_setup_take)
_library.register("take_tokens_backward", _take_backward, _fake_take_backward)
_library.register(
    "restore_tokens", _restore, _fake_restore, backward=_gradient_restore, setup_context=_setup_restore
)
_library.register("restore_tokens_backward", _restore_backward, _fake_restore_backward)
