"""Contrastive losses that never hold the n x m logits of a large batch: tiles of rows forward, recomputed
tiles backward.

Exact in float32 at any scale: the log-sum-exp runs over the negatives only (N), so that with the positive
logit P the loss of a row is softplus(N - P) and the gradient of its positive is -sigmoid(N - P); neither is a
difference of two nearly equal numbers. Features may be float32, float64, float16 or bfloat16; logits, sums
and losses are float32 (float64 for float64 features).
Sources: CLIP, arXiv 2103.00020; SigLIP, arXiv 2303.15343; X-VLM, arXiv 2111.08276 (several positives per
row); ALBEF, arXiv 2107.07651 (queue and soft targets).

n rows   m columns   d width
"""

import math
from typing import Any, Literal, overload

import torch
import torch.nn.functional as F
from torch import Tensor

from vlp_ops import _library
from vlp_ops._checks import (
    accumulate_dtype,
    check_device,
    check_dim,
    check_float,
    check_integer,
    check_range,
    check_shape,
)
from vlp_ops.dense import product

# Elements of one tile of logits: 8 MB of float32 stay near the caches of a CPU. A GPU needs more rows to be
# busy; its 64 MB are a guess that keeps 32768 x 512 in bfloat16 below 0.3 GB, not a measurement.
TILE_CPU, TILE_GPU = 1 << 21, 1 << 24
# Up to this many products (64 MB of float32) are kept on the CPU for the backward pass instead of being made
# again there, which is a quarter of all the work; not when `tile` is given, which asks for little memory.
KEEP_CPU = 1 << 24


def clip_loss(
    image: Tensor,
    text: Tensor,
    logit_scale: Tensor | float,
    *,
    logit_bias: Tensor | float | None = None,
    labels_offset: int = 0,
    ids: Tensor | None = None,
    text_ids: Tensor | None = None,
    all_image: Tensor | None = None,
    all_text: Tensor | None = None,
    reduction: Literal["mean", "sum", "none"] = "mean",
    tile: int | None = None,
) -> Tensor:
    """Symmetric contrastive loss: half the image-to-text cross-entropy plus half the text-to-image one.

    image (n, d) and text (m, d), usually normalised; logits are logit_scale * image . text + logit_bias.
    logit_scale multiplies (it is already exponentiated; 1/temperature); it may be learned. logit_bias
    cancels: its gradient is exactly 0. Row i pairs with column labels_offset + i; text may have more rows
    than image. Both directions are averaged over the n pairs. ids (n,), text_ids (m,) (default: ids): instead
    of pairs, all columns with an equal id are positives, each with weight 1/count
        (X-VLM); each direction is averaged over its rows; a row without a positive contributes 0.
    all_image, all_text (g, d): rows gathered from all ranks, this rank's at labels_offset: local images are
    compared with all texts and
        local texts with all images. The mean over ranks is the loss of the global batch (`gather_features`).
    reduction: "none" gives (n,), half the sum of both directions for each pair (with ids: n = m is needed).
    tile: rows held at a time (default: by the memory of a tile); never changes the result beyond rounding.
    Raises ValueError for shapes, devices and contradictory options, TypeError for dtypes.
    """
    op = "clip_loss"
    _check_features(op, image=image, text=text)
    if reduction not in ("mean", "sum", "none"):
        raise ValueError(f"{op}: reduction must be 'mean', 'sum' or 'none', got {reduction!r}")
    if (all_image is None) != (all_text is None):
        raise ValueError(f"{op}: give all_image and all_text together")
    if ids is None and text_ids is not None:
        raise ValueError(f"{op}: text_ids needs ids")
    if ids is not None and (labels_offset or all_image is not None):
        raise ValueError(
            f"{op}: ids replace pairs; labels_offset, all_image and all_text do not go with them"
        )
    n = image.shape[0]
    scale = _scalar(op, "logit_scale", logit_scale, image)
    if all_image is not None and all_text is not None:
        _check_features(op, image=image, text=text, all_image=all_image, all_text=all_text)
        check_shape(op, "text", text, tuple(image.shape))
        check_shape(op, "all_text", all_text, tuple(all_image.shape))
        labels = _labels(op, n, labels_offset, all_text.shape[0])
        each = _loss(image, all_text, scale, labels=labels, tile=tile) / 2
        each = each + _loss(text, all_image, scale, labels=labels.to(image.device), tile=tile) / 2
        return _with_bias(op, _reduce(each, reduction, n), logit_bias, image)
    if ids is not None:
        text_ids = ids if text_ids is None else text_ids
        _check_ids(op, image, ids=(ids, n), text_ids=(text_ids, text.shape[0]))
        if reduction == "none" and n != text.shape[0]:
            raise ValueError(
                f"{op}: reduction='none' with ids needs as many texts as images, got {text.shape[0]} and {n}"
            )
        rows, columns = _both(image, text, scale, None, ids, text_ids, tile)
        if reduction == "none":
            return _with_bias(op, (rows + columns) / 2, logit_bias, image)
        value = (_reduce(rows, reduction, n) + _reduce(columns, reduction, text.shape[0])) / 2
        return _with_bias(op, value, logit_bias, image)
    labels = _labels(op, n, labels_offset, text.shape[0]).to(image.device)
    rows, columns = _both(image, text, scale, labels, None, None, tile)
    each = (rows + columns[labels_offset : labels_offset + n]) / 2
    return _with_bias(op, _reduce(each, reduction, n), logit_bias, image)


@overload
def info_nce(
    query: Tensor,
    keys: Tensor,
    scale: Tensor | float,
    *,
    positives: Tensor | None = None,
    ids: Tensor | tuple[Tensor, Tensor] | None = None,
    soft_targets: Tensor | None = None,
    return_lse: Literal[False] = False,
    tile: int | None = None,
) -> Tensor: ...


@overload
def info_nce(
    query: Tensor,
    keys: Tensor,
    scale: Tensor | float,
    *,
    positives: Tensor | None = None,
    ids: Tensor | tuple[Tensor, Tensor] | None = None,
    soft_targets: Tensor | None = None,
    return_lse: Literal[True],
    tile: int | None = None,
) -> tuple[Tensor, Tensor]: ...


def info_nce(
    query: Tensor,
    keys: Tensor,
    scale: Tensor | float,
    *,
    positives: Tensor | None = None,
    ids: Tensor | tuple[Tensor, Tensor] | None = None,
    soft_targets: Tensor | None = None,
    return_lse: bool = False,
    tile: int | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Contrastive loss in one direction, one number per query: (n,).

    query (n, d), keys (m, d); logits are scale * query . keys. At most one of
    positives (n,): the column of each row's positive (default: row i pairs with column i);
    ids: (n,) and (m,) ids, or one tensor for both; all columns with an equal id are positives with weight
    1/count, none gives 0; soft_targets (n, m): weights of the columns, no gradient reaches them; loss =
    -sum_j t_ij log softmax_ij (momentum targets of ALBEF; a
        queue is part of keys).
    return_lse: also the log-sum-exp of each row's logits (n,), without gradient.
    Raises ValueError for shapes, devices, positives out of range (CPU; elsewhere with VLP_OPS_VALIDATE=1),
    TypeError for dtypes.
    """
    op = "info_nce"
    _check_features(op, query=query, keys=keys)
    if sum(option is not None for option in (positives, ids, soft_targets)) > 1:
        raise ValueError(f"{op}: give at most one of positives, ids and soft_targets")
    n, m = query.shape[0], keys.shape[0]
    labels = ids_query = ids_keys = None
    if ids is not None:
        ids_query, ids_keys = (ids, ids) if isinstance(ids, Tensor) else ids
        _check_ids(op, query, ids=(ids_query, n), key_ids=(ids_keys, m))
    elif soft_targets is not None:
        check_shape(op, "soft_targets", soft_targets, (n, m))
        check_float(op, "soft_targets", soft_targets)
        check_device(op, "query", query, soft_targets=soft_targets)
    elif positives is not None:
        check_integer(op, "positives", positives)
        check_shape(op, "positives", positives, (n,))
        check_device(op, "query", query, positives=positives)
        if _library.validates(positives):
            check_range(op, "positive", positives, m, f"{m} keys")
        labels = positives.long()
    else:
        if n > m:
            raise ValueError(f"{op}: query has {n} rows but keys has only {m}; row i pairs with column i")
        labels = torch.arange(n, device=query.device)
    scale = _scalar(op, "scale", scale, query)
    loss, stats = _rows(query, keys, scale, labels, ids_query, ids_keys, soft_targets, tile)
    return (loss, torch.logaddexp(stats[0], stats[1])) if return_lse else loss


def siglip_loss(
    image: Tensor,
    text: Tensor,
    logit_scale: Tensor | float,
    logit_bias: Tensor | float,
    *,
    negative_only: bool = False,
    labels_offset: int = 0,
    tile: int | None = None,
) -> Tensor:
    """Sigmoid loss: (1/n) sum_ij softplus(-z_ij (logit_scale * image_i . text_j + logit_bias)), z = 1 on
    pairs and -1 elsewhere.

    image (n, d), text (m, d); row i pairs with column labels_offset + i, with nothing when negative_only
    (texts of another rank). The normaliser is the number of local images, so the sum over text shards,
    averaged over ranks, is the loss of the global batch. When a gradient is wanted it is made in the forward
    pass: three matrix products in all instead of four. Once differentiable: a second derivative is refused.
    Raises ValueError for shapes and devices, TypeError for dtypes. Source: arXiv 2303.15343, algorithm 1.
    """
    op = "siglip_loss"
    _check_features(op, image=image, text=text)
    if negative_only and labels_offset:
        raise ValueError(f"{op}: labels_offset has no meaning with negative_only")
    if not negative_only:
        _labels(op, image.shape[0], labels_offset, text.shape[0])
    scale = _scalar(op, "logit_scale", logit_scale, image)
    bias = _scalar(op, "logit_bias", logit_bias, image)
    with_grad = torch.is_grad_enabled() and any(t.requires_grad for t in (image, text, scale, bias))
    rows = _tile_rows(op, tile, image, text)
    return torch.ops.vlp_ops.sigmoid_loss(
        image, text, scale, bias, labels_offset, negative_only, with_grad, rows
    )[0]


# ---- checks and small parts --------------------------------------------------------------------------------


def _check_features(op: str, **features: Tensor) -> None:
    (first_name, first), *others = features.items()
    check_dim(op, first_name, first, "n, d")
    for name, tensor in features.items():
        check_float(op, name, tensor)
    for name, tensor in others:
        check_dim(op, name, tensor, "m, d")
        if tensor.shape[1] != first.shape[1]:
            raise ValueError(
                f"{op}: {first_name} has {first.shape[1]} channels but {name} has {tensor.shape[1]}"
            )
        if tensor.dtype != first.dtype:
            raise TypeError(f"{op}: {first_name} is {first.dtype} but {name} is {tensor.dtype}")
    check_device(op, first_name, first, **dict(others))
    _library.note_backend(first)


def _check_ids(op: str, like: Tensor, **ids: tuple[Tensor, int]) -> None:
    for name, (tensor, length) in ids.items():
        check_integer(op, name, tensor)
        check_shape(op, name, tensor, (length,))
        check_device(op, "image" if op == "clip_loss" else "query", like, **{name: tensor})


def _scalar(op: str, name: str, value: Tensor | float, like: Tensor) -> Tensor:
    """A scalar tensor in the type of the logits; learned scales may be (1,)."""
    dtype = accumulate_dtype(like.dtype)
    if not isinstance(value, Tensor):
        return torch.full((), value, dtype=dtype, device=like.device)
    if value.numel() != 1:
        raise ValueError(f"{op}: {name} must be one number, got shape {tuple(value.shape)}")
    return value.reshape(()).to(like.device, dtype)


def _labels(op: str, n: int, offset: int, columns: int) -> Tensor:
    first = "image"
    if offset < 0 or offset + n > columns:
        raise ValueError(
            f"{op}: {first} has {n} rows and labels_offset is {offset}, but text has only {columns} rows"
        )
    return torch.arange(offset, offset + n)


def _with_bias(op: str, loss: Tensor, bias: Tensor | float | None, like: Tensor) -> Tensor:
    # A constant added to all logits cancels in a softmax; the product keeps the parameter in the graph with
    # gradient 0.
    return loss if bias is None else loss + 0.0 * _scalar(op, "logit_bias", bias, like)


def _reduce(each: Tensor, reduction: str, count: int) -> Tensor:
    if reduction == "none":
        return each
    return each.sum() / max(count, 1) if reduction == "mean" else each.sum()


def _tile_rows(op: str, tile: int | None, a: Tensor, b: Tensor) -> int:
    if tile is not None:
        if tile < 1:
            raise ValueError(f"{op}: tile must be at least 1, got {tile}")
        return tile
    budget = TILE_GPU if a.is_cuda else TILE_CPU
    return max(16, budget // max(1, b.shape[0]))


def _keeps(a: Tensor, b: Tensor, scale: Tensor, tile: int | None) -> bool:
    """Whether the products of the forward pass are kept for the backward pass."""
    return (
        tile is None
        and a.device.type == "cpu"
        and a.shape[0] * b.shape[0] <= KEEP_CPU
        and torch.is_grad_enabled()
        and any(tensor.requires_grad for tensor in (a, b, scale))
    )


def _rows(a, b, scale, labels, ids_a, ids_b, soft, tile) -> tuple[Tensor, Tensor]:
    rows = _tile_rows("info_nce", tile, a, b)
    loss, _, stats, *_ = torch.ops.vlp_ops.contrastive_loss(
        a, b, scale, labels, ids_a, ids_b, soft, False, rows, _keeps(a, b, scale, tile)
    )
    return loss, stats


def _loss(a: Tensor, b: Tensor, scale: Tensor, *, labels: Tensor, tile: int | None) -> Tensor:
    return _rows(a, b, scale, labels.to(a.device), None, None, None, tile)[0]


def _both(a, b, scale, labels, ids_a, ids_b, tile) -> tuple[Tensor, Tensor]:
    rows = _tile_rows("clip_loss", tile, a, b)
    loss_row, loss_col, *_ = torch.ops.vlp_ops.contrastive_loss(
        a, b, scale, labels, ids_a, ids_b, None, True, rows, _keeps(a, b, scale, tile)
    )
    return loss_row, loss_col


# ---- softmax losses ----------------------------------------------------------------------------------------


def _product(a: Tensor, b: Tensor, dtype: torch.dtype) -> Tensor:
    """a @ b with sums and result in `dtype`; half types on a GPU keep their fast products."""
    if a.dtype == dtype and b.dtype == dtype:
        return product(a, b)
    if a.is_cuda:
        half = a.dtype if a.dtype != dtype else b.dtype
        return torch.mm(a.to(half), b.to(half), out_dtype=dtype)
    return torch.mm(a.to(dtype), b.to(dtype))


def _prepare(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor, torch.dtype]:
    dtype = accumulate_dtype(a.dtype)
    return (a, b, dtype) if a.is_cuda else (a.to(dtype), b.to(dtype), dtype)


def _softmax_loss(a, b, scale, labels, ids_a, ids_b, soft, columns, tile, keep):
    """Loss of each row and column, and what the backward pass needs of each: (3, n) and (3, m); with `keep`
    also the products (n, m).

    Statistics: log-sum-exp of the negatives N and of the positives P (-inf if there are none), and the number
        of positives (for soft
    targets: all columns count as negatives, and the third number is the sum of the targets).
    """
    a, b, dtype = _prepare(a, b)
    n, m = a.shape[0], b.shape[0]
    row, loss_row = _new_stats(n, a, dtype), torch.zeros(n, dtype=dtype, device=a.device)
    width = m if columns else 0
    col, loss_col = _new_stats(width, a, dtype), torch.zeros(width, dtype=dtype, device=a.device)
    positive_sum = torch.zeros(width, dtype=dtype, device=a.device)
    kept = torch.empty((n, m) if keep else (0, 0), dtype=dtype, device=a.device)
    for start in range(0, n if m else 0, tile):
        part = slice(start, min(start + tile, n))
        products = _product(a[part], b.T, dtype)
        if keep:
            kept[part] = products
        positive = None
        if labels is not None:
            label = labels[part]
            positive = products.gather(1, label[:, None])[:, 0] * scale
            row[1, part], row[2, part] = positive, 1.0
            if columns:
                col[1, label], col[2, label], positive_sum[label] = positive, 1.0, positive
        by_row, by_col = torch.ops.vlp_ops.contrastive_tile(
            products, scale, *_of_rows(part, labels, ids_a, ids_b, soft, dtype), columns
        )
        row[0, part] = by_row[0].logsumexp(1)
        if positive is None:
            row[1, part], row[2, part] = by_row[1].logsumexp(1), by_row[2].sum(1)
        sums = by_row[3].sum(1) if positive is None else positive
        loss_row[part] = _row_loss(row[:, part], sums, soft is not None)
        if columns:
            col[0] = torch.logaddexp(col[0], by_col[0].logsumexp(0))
            if positive is None:
                col[1] = torch.logaddexp(col[1], by_col[1].logsumexp(0))
                col[2] += by_col[2].sum(0)
                positive_sum += by_col[3].sum(0)
    if columns and n:
        loss_col = _row_loss(col, positive_sum, False)
    return loss_row, loss_col, row, col, kept


def _of_rows(part: slice, labels, ids_a, ids_b, soft, dtype: torch.dtype) -> tuple[Tensor | None, ...]:
    """What says which columns are positive, for some rows."""
    rows = (None if tensor is None else tensor[part] for tensor in (labels, ids_a))
    return *rows, ids_b, None if soft is None else soft[part].to(dtype)


def _tile(products, scale, labels, ids_a, ids_b, soft, columns):
    """Sums over one tile of products (r, m), which are used up: (k, r, p) for the rows and, if wanted, (k, q,
    m) for the columns.

    k = 1: log-sum-exp of the negatives, when each row has its positive in `labels`. k = 4: also that of the
    positives, their number and the sum of their logits; for soft targets -inf, the sum of the targets and of
    the logits times the targets. A kernel gives p and q parts of each sum, which are still to be added up
    (log-sum-exp: as logarithms); here they are 1.
    """
    logits = products.mul_(scale)
    if labels is not None:
        logits.scatter_(1, labels[:, None], -math.inf)
        rows, cols = [], []
    elif soft is not None:
        rows, cols = [logits.new_full((len(logits),), -math.inf), soft.sum(1), (soft * logits).sum(1)], []
    else:
        equal = ids_a[:, None] == ids_b[None, :]
        only = logits.masked_fill(~equal, -math.inf)
        chosen = torch.where(equal, logits, 0.0)
        count = equal.to(logits.dtype)
        rows = [only.logsumexp(1), count.sum(1), chosen.sum(1)]
        cols = [only.logsumexp(0), count.sum(0), chosen.sum(0)] if columns else []
        logits.masked_fill_(equal, -math.inf)
    by_row = torch.stack([logits.logsumexp(1), *rows])[:, :, None]
    if not columns:
        return by_row, logits.new_empty(len(by_row), 1, 0)
    return by_row, torch.stack([logits.logsumexp(0), *cols])[:, None]


def _new_stats(length: int, like: Tensor, dtype: torch.dtype) -> Tensor:
    stats = torch.full((3, length), -math.inf, dtype=dtype, device=like.device)
    stats[2] = 0.0
    return stats


def _row_loss(stats: Tensor, positive_sum: Tensor, soft: bool) -> Tensor:
    negative, positive, count = stats
    if soft:
        return negative * count - positive_sum
    zero = torch.zeros_like(negative)
    loss = torch.logaddexp(negative - positive, zero) + (positive - positive_sum / count.clamp(min=1))
    return torch.where(count > 0, loss, zero)


def _positive_gradient(stats: Tensor, logits: Tensor | None) -> Tensor:
    """Gradient of a row's loss by its positive logits: softmax - 1/count, without cancellation when there is
    one positive."""
    negative, positive, count = stats
    single = -torch.sigmoid(negative - positive)
    if logits is None:
        return single
    share = (logits - torch.logaddexp(negative, positive)[:, None]).exp() - 1 / count.clamp(min=1)[:, None]
    return torch.where((count == 1)[:, None], single[:, None], share)


def _tile_gradient(
    products, scale, labels, ids_a, ids_b, soft, grad_row, row, lse_row, grad_col, col, lse_col, out
):
    """Gradient by the logits of one tile of products (r, m), into `out`, which may be the products; these are
    used up."""
    logits, upstream, columns = products.mul_(scale), grad_row[:, None], grad_col is not None
    if labels is not None:
        at_label = grad_row * _positive_gradient(row, None)
        if columns:
            at_label = at_label + grad_col[labels] * _positive_gradient(col[:, labels], None)
            by_column = (logits - lse_col).exp_().mul_(grad_col)
        logits.sub_(lse_row[:, None]).exp_().mul_(upstream)
        if columns:
            logits += by_column  # pyrefly: ignore[unbound-name]  bound above under the same condition
            del by_column
        gradient = logits.scatter_(1, labels[:, None], at_label[:, None])
    elif soft is not None:
        gradient = logits.sub_(lse_row[:, None]).exp_().mul_(row[2, :, None]).sub_(soft).mul_(upstream)
    else:
        equal = ids_a[:, None] == ids_b[None, :]
        by_row = torch.where(equal, _positive_gradient(row, logits), (logits - lse_row[:, None]).exp_())
        gradient = by_row.mul_(upstream)
        if columns:
            by_column = torch.where(equal, _positive_gradient(col, logits.T).T, (logits - lse_col).exp_())
            gradient += by_column.mul_(grad_col)
    if gradient.data_ptr() != out.data_ptr():
        out.copy_(gradient)


# What a float16 tile of gradients of the sigmoid loss is multiplied by: float16 holds nothing below 6e-8. The
# kernel has the same number.
HALF_SCALE = 2.0**15


def _half_factor(grad_row: Tensor, grad_col: Tensor, soft: Tensor | None) -> Tensor:
    """A power of 2 that brings gradients by the logits just below the largest float16.

    Without it those of a large batch (softmax / n) fall below its smallest number. No gradient is larger than
    its upstream gradient times the weights of its row; a row and a column add up.
    """
    top = torch.cat([grad_row.abs(), grad_col.abs()]).amax() if len(grad_row) else grad_row.new_ones(())
    if soft is not None and soft.numel():
        weights = torch.maximum(soft.abs().amax(), soft.sum(1, dtype=top.dtype).abs().amax())
        top = top * weights.to(top.dtype).clamp(min=1)
    factor = torch.exp2(torch.clamp(13 - torch.floor(torch.log2(top)), max=100))
    return torch.where(torch.isfinite(top) & (top > 0), factor, 1.0)


def _softmax_loss_backward(
    grad_row, grad_col, a, b, scale, labels, ids_a, ids_b, soft, row, col, kept, columns, tile, mask
):
    source = a
    a, b, dtype = _prepare(a, b)
    n, m = a.shape[0], b.shape[0]
    grad_a = torch.zeros(a.shape if mask[0] else (0,), dtype=dtype, device=a.device)
    grad_b = torch.zeros(b.shape if mask[1] else (0,), dtype=dtype, device=a.device)
    grad_scale = torch.zeros((), dtype=torch.float64, device=a.device)
    lse_row, lse_col = torch.logaddexp(row[0], row[1]), torch.logaddexp(col[0], col[1])
    if soft is None:
        grad_row = torch.where(row[2] > 0, grad_row, 0.0)
        grad_col = torch.where(col[2] > 0, grad_col, 0.0)
    back, factor = scale, None
    if a.dtype == torch.float16:
        factor = _half_factor(grad_row, grad_col, soft)
        grad_row, grad_col, back = grad_row * factor, grad_col * factor, scale / factor
    of_columns = (grad_col.contiguous(), col, lse_col) if columns else (None, None, None)
    for start in range(0, n if m else 0, tile):
        part = slice(start, min(start + tile, n))
        products = kept[part].clone() if kept.numel() else _product(a[part], b.T, dtype)
        gradient = products if a.dtype == dtype else torch.empty_like(products, dtype=a.dtype)
        torch.ops.vlp_ops.contrastive_tile_gradient(
            products,
            scale,
            *_of_rows(part, labels, ids_a, ids_b, soft, dtype),
            grad_row[part],
            row[:, part],
            lse_row[part],
            *of_columns,
            gradient,
        )
        del products
        if mask[0] or mask[2]:
            # sum_ij G_ij (a_i . b_j) = sum_i a_i . (G b)_i
            weighted = _product(gradient, b, dtype)
            grad_scale += (weighted * a[part]).sum(dtype=torch.float64)
            if mask[0]:
                grad_a[part] = weighted.mul_(back)
        if mask[1]:
            grad_b += _product(gradient.T, a[part], dtype)
    if mask[1]:
        grad_b *= back
    if factor is not None:
        grad_scale /= factor
    grad_scale = grad_scale.to(dtype)
    return (
        grad_a.to(source.dtype),
        grad_b.to(source.dtype),
        grad_scale if mask[2] else grad_scale.new_empty(0),
    )


def _fake_softmax_loss(a, b, scale, labels, ids_a, ids_b, soft, columns, tile, keep):
    dtype = accumulate_dtype(a.dtype)
    n, width = a.shape[0], b.shape[0] if columns else 0
    sizes = ((n,), (width,), (3, n), (3, width), (n, b.shape[0]) if keep else (0, 0))
    return tuple(a.new_empty(size, dtype=dtype) for size in sizes)


def _fake_softmax_loss_backward(
    grad_row, grad_col, a, b, scale, labels, ids_a, ids_b, soft, row, col, kept, columns, tile, mask
):
    return (
        a.new_empty(a.shape if mask[0] else (0,)),
        b.new_empty(b.shape if mask[1] else (0,)),
        scale.new_empty(() if mask[2] else (0,)),
    )


def _setup_softmax_loss(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *tensors, ctx.columns, ctx.tile, _ = inputs
    ctx.save_for_backward(*tensors, *output[2:])
    ctx.mark_non_differentiable(*output[2:])


def _gradient_softmax_loss(ctx: Any, grad_row: Tensor, grad_col: Tensor, *_: Any) -> tuple[Any, ...]:
    mask = list(ctx.needs_input_grad[:3])
    grads = torch.ops.vlp_ops.contrastive_loss_backward(
        grad_row.contiguous(), grad_col.contiguous(), *ctx.saved_tensors, ctx.columns, ctx.tile, mask
    )
    return *(grad if needed else None for grad, needed in zip(grads, mask, strict=True)), *[None] * 7


_library.register(
    "contrastive_loss",
    _softmax_loss,
    _fake_softmax_loss,
    backward=_gradient_softmax_loss,
    setup_context=_setup_softmax_loss,
)
_library.register("contrastive_loss_backward", _softmax_loss_backward, _fake_softmax_loss_backward)
# The tiles change their arguments and are seen by the losses only, which are opaque to autograd and
# compilers: they need no more than a kernel.
for _name, _function in (("contrastive_tile", _tile), ("contrastive_tile_gradient", _tile_gradient)):
    _library.LIBRARY.impl(_name, _function, "CompositeExplicitAutograd")


# ---- sigmoid loss ------------------------------------------------------------------------------------------


def _softplus(x: Tensor) -> Tensor:
    # The default threshold of 20 is an error of 2e-9, too much for float64.
    return F.softplus(x, threshold=40.0)


def _sigmoid_tile(products, scale, bias, diagonal, paired, out):
    """(2, p) parts of the sums of the losses and of their derivatives over one tile of products, which are
    used up; the derivatives in `out`.

    Row i pairs with column diagonal + i if paired; a float16 `out` holds HALF_SCALE times them. Without
    `out` the second sum means nothing here.
    """
    logits = products.mul_(scale).add_(bias)
    rows = torch.arange(len(logits), device=logits.device)
    pairs = None
    if paired:
        # softplus(-x) for a pair: the sign of its logit is turned, and that of its gradient turned back
        # below.
        pairs = -logits[rows, rows + diagonal]
        logits[rows, rows + diagonal] = pairs
    loss = _softplus(logits).sum(1)
    if out is None:
        return torch.stack([loss, torch.zeros_like(loss)])
    gradient = logits.sigmoid_()
    if pairs is not None:
        gradient[rows, rows + diagonal] = -pairs.sigmoid()
    slopes = gradient.sum(1)
    if gradient.data_ptr() != out.data_ptr():
        out.copy_(gradient.mul_(HALF_SCALE) if out.dtype == torch.float16 else gradient)
    return torch.stack([loss, slopes])


def _sigmoid_loss(a, b, scale, bias, offset, negative_only, with_grad, tile):
    source = a
    a, b, dtype = _prepare(a, b)
    n, m = a.shape[0], b.shape[0]
    unit = 1 / HALF_SCALE if a.dtype == torch.float16 else 1.0
    loss, grad_bias, grad_scale = torch.zeros(3, dtype=torch.float64, device=a.device).unbind()
    grad_a = torch.zeros(a.shape if with_grad else (0,), dtype=dtype, device=a.device)
    grad_b = torch.zeros(b.shape if with_grad else (0,), dtype=dtype, device=a.device)
    for start in range(0, n if m else 0, tile):
        part = slice(start, min(start + tile, n))
        products = _product(a[part], b.T, dtype)
        gradient = None
        if with_grad:
            gradient = products if a.dtype == dtype else torch.empty_like(products, dtype=a.dtype)
        sums = torch.ops.vlp_ops.sigmoid_tile(
            products, scale, bias, start + offset, not negative_only, gradient
        ).sum(1, dtype=torch.float64)
        loss += sums[0]
        if gradient is not None:
            del products
            grad_bias += sums[1]
            weighted = _product(gradient, b, dtype)
            grad_scale += (weighted * a[part]).sum(dtype=torch.float64)
            grad_a[part] = weighted.mul_(scale * unit / n)
            grad_b += _product(gradient.T, a[part], dtype)
    count = max(n, 1)
    grad_b *= scale * unit / count
    grad_scale *= unit
    numbers = [(total / count).to(dtype) for total in (loss, grad_scale, grad_bias)]
    return numbers[0], grad_a.to(source.dtype), grad_b.to(source.dtype), numbers[1], numbers[2]


def _fake_sigmoid_loss(a, b, scale, bias, offset, negative_only, with_grad, tile):
    loss = scale.new_empty(())
    grads = (a.new_empty(a.shape), b.new_empty(b.shape)) if with_grad else (a.new_empty(0), b.new_empty(0))
    return loss, *grads, torch.empty_like(loss), torch.empty_like(loss)


def _setup_sigmoid_loss(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(*output[1:])
    ctx.with_grad = inputs[6]
    ctx.save_for_backward(*inputs[:4], *output[1:])


def _gradient_sigmoid_loss(ctx: Any, grad: Tensor | None, *_: Any) -> tuple[Any, ...]:
    if grad is None:
        return (None,) * 8
    if not ctx.with_grad:
        raise RuntimeError(
            "vlp_ops::sigmoid_loss was called with with_grad=False; it kept nothing for a backward pass"
        )
    mask = list(ctx.needs_input_grad[:4])
    # An operator, although it only multiplies: it knows the inputs, so a second derivative is refused.
    grads = torch.ops.vlp_ops.sigmoid_loss_backward(grad, *ctx.saved_tensors, mask)
    return *(found if needed else None for found, needed in zip(grads, mask, strict=True)), *[None] * 4


def _sigmoid_loss_backward(grad, a, b, scale, bias, grad_a, grad_b, grad_scale, grad_bias, mask):
    return tuple(
        (saved * grad).to(saved.dtype) if needed else saved.new_empty(0)
        for saved, needed in zip((grad_a, grad_b, grad_scale, grad_bias), mask, strict=True)
    )


def _fake_sigmoid_loss_backward(grad, a, b, scale, bias, grad_a, grad_b, grad_scale, grad_bias, mask):
    return tuple(
        torch.empty_like(saved) if needed else saved.new_empty(0)
        for saved, needed in zip((grad_a, grad_b, grad_scale, grad_bias), mask, strict=True)
    )


_library.register(
    "sigmoid_loss",
    _sigmoid_loss,
    _fake_sigmoid_loss,
    backward=_gradient_sigmoid_loss,
    setup_context=_setup_sigmoid_loss,
)
_library.register("sigmoid_loss_backward", _sigmoid_loss_backward, _fake_sigmoid_loss_backward)
_library.LIBRARY.impl("sigmoid_tile", _sigmoid_tile, "CompositeExplicitAutograd")
