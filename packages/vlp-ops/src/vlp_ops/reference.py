"""What every operator computes, written for reading: no tiles, no kernels, differentiable as often as PyTorch
allows.

These are the oracle of the tests and a base for research code; they hold every intermediate in memory.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor


def ms_deform_attn(
    value_NSMD: Tensor,
    spatial_shapes: list[tuple[int, int]],
    sampling_locations: Tensor,
    attention_weights: Tensor,
    *,
    softmax: bool = False,
) -> Tensor:
    """Weighted sum of bilinear samples from several maps, for each query and head.

    value (N, S, M, D), S = sum of H*W over the levels; sampling_locations (N, Q, M, L, P, 2), last axis (x,
    y), 0 = left or top edge of the map and 1 = right or bottom edge; attention_weights (N, Q, M, L, P), or
    logits of a softmax over all L*P with `softmax`. Returns (N, Q, M*D). Samples outside a map are 0. Source:
    Deformable DETR, arXiv 2010.04159, section 4.1.
    """
    batch, _, heads, width = value_NSMD.shape
    queries, points = sampling_locations.shape[1], sampling_locations.shape[4]
    if softmax:
        attention_weights = attention_weights.flatten(-2).softmax(-1).view_as(attention_weights)
    result = value_NSMD.new_zeros(batch, heads, queries, width)
    start = 0
    for level, (height, columns) in enumerate(spatial_shapes):
        map_NMKD = value_NSMD[:, start : start + height * columns].transpose(1, 2)
        start += height * columns
        if height * columns == 0:
            continue
        location = sampling_locations[:, :, :, level].permute(0, 2, 1, 3, 4)  # N M Q P 2
        x = location[..., 0] * columns - 0.5
        y = location[..., 1] * height - 0.5
        inside = (x > -1) & (y > -1) & (x < columns) & (y < height)
        x, y = torch.where(inside, x, 0.0), torch.where(inside, y, 0.0)
        x0, y0 = x.detach().floor(), y.detach().floor()
        sample = 0.0
        for down in (0, 1):
            for right in (0, 1):
                row, column = y0 + down, x0 + right
                share = (1 - (y - row).abs()) * (1 - (x - column).abs())
                exists = inside & (row >= 0) & (row < height) & (column >= 0) & (column < columns)
                flat = (row.clamp(0, height - 1) * columns + column.clamp(0, columns - 1)).long()
                corner = map_NMKD.gather(2, flat.flatten(2)[..., None].expand(-1, -1, -1, width))
                corner = corner.view(batch, heads, queries, points, width)
                sample = sample + corner * torch.where(exists, share, 0.0)[..., None]
        weight = attention_weights[:, :, :, level].transpose(1, 2)
        result = result + (sample * weight[..., None]).sum(3)
    return result.transpose(1, 2).flatten(2)


def product_key_topk(query_THK: Tensor, keys: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k best of all n*n sums of a first-half and a second-half score, by looking at every one of them.

    query (T, H, K); keys (H, 2, n, K/2). Returns scores and slot indices (T, H, k), best first; slot = i*n +
    j.
    Source: Large Memory Layers with Product Keys, arXiv 1907.05242, section 3.2.
    """
    first, second = query_THK.chunk(2, dim=-1)
    scores1 = torch.einsum("thd,hnd->thn", first, keys[:, 0])
    scores2 = torch.einsum("thd,hnd->thn", second, keys[:, 1])
    every = (scores1[..., :, None] + scores2[..., None, :]).flatten(-2)
    scores, indices = every.topk(k, dim=-1)
    return scores, indices


def embedding_bag(indices: Tensor, weight: Tensor, per_sample_weights: Tensor) -> Tensor:
    """sum_j per_sample_weights[b, j] * weight[indices[b, j]]: (B, bag), (K, D), (B, bag) -> (B, D)."""
    return (weight[indices] * per_sample_weights[..., None]).sum(1)


def product_key_lookup(query_THK: Tensor, keys: Tensor, values: Tensor, k: int) -> Tensor:
    """Softmax over the k best scores of each head, summed rows of all heads: (T, V). Source: arXiv
    1907.05242, section 3.1."""
    scores, indices = product_key_topk(query_THK, keys, k)
    return embedding_bag(indices.flatten(1), values, scores.softmax(-1).flatten(1))


def info_nce(
    query: Tensor,
    keys: Tensor,
    scale: Tensor | float,
    *,
    positives: Tensor | None = None,
    ids: tuple[Tensor, Tensor] | None = None,
    soft_targets: Tensor | None = None,
) -> Tensor:
    """Cross-entropy of scale * query . keys against one positive, all equal ids, or given targets; one loss
    per query (n,)."""
    logits = scale * (query @ keys.T)
    if ids is not None:
        target = (ids[0][:, None] == ids[1][None, :]).to(logits.dtype)
        target = target / target.sum(1, keepdim=True).clamp(min=1)
    elif soft_targets is not None:
        target = soft_targets
    else:
        rows = torch.arange(len(query), device=query.device) if positives is None else positives
        target = F.one_hot(rows, len(keys)).to(logits.dtype)
    return -(target * logits.log_softmax(1)).sum(1)


def clip_loss(
    image: Tensor,
    text: Tensor,
    logit_scale: Tensor | float,
    *,
    labels_offset: int = 0,
    ids: Tensor | None = None,
) -> Tensor:
    """Mean over both directions of the cross-entropy, each averaged over its rows. Source: CLIP, arXiv
    2103.00020, figure 3."""
    if ids is not None:
        both = (
            info_nce(image, text, logit_scale, ids=(ids, ids)),
            info_nce(text, image, logit_scale, ids=(ids, ids)),
        )
    else:
        own = text[labels_offset : labels_offset + len(image)]
        positives = torch.arange(len(image), device=image.device)
        both = (
            info_nce(image, text, logit_scale, positives=positives + labels_offset),
            info_nce(own, image, logit_scale, positives=positives),
        )
    return (both[0].mean() + both[1].mean()) / 2


def siglip_loss(
    image: Tensor,
    text: Tensor,
    logit_scale: Tensor | float,
    logit_bias: Tensor | float,
    *,
    negative_only: bool = False,
) -> Tensor:
    """-(1/n) sum_ij log sigmoid(z_ij (scale * image_i . text_j + bias)), z = 1 on pairs and -1 elsewhere.
    Source: arXiv 2303.15343."""
    logits = logit_scale * (image @ text.T) + logit_bias
    sign = -torch.ones_like(logits)
    if not negative_only:
        sign = sign + 2 * torch.eye(*logits.shape, dtype=logits.dtype, device=logits.device)
    return -F.logsigmoid(sign * logits).sum() / len(image)


def attention(
    query: Tensor, key: Tensor, value: Tensor, *, mask: Tensor | None = None, bias: Tensor | None = None
) -> Tensor:
    """softmax(query . key / sqrt(D) + bias) . value over (B, H, Q|K, D); mask True = attend; a row without
    any key gives 0."""
    logits = query @ key.transpose(-1, -2) / math.sqrt(query.shape[-1])
    if bias is not None:
        logits = logits + bias
    if mask is None:
        return logits.softmax(-1) @ value
    some = mask.any(-1, keepdim=True)
    logits = logits.masked_fill(~mask & some, -math.inf)
    return (logits.softmax(-1) * some) @ value


def take_tokens(x: Tensor, ids: Tensor) -> Tensor:
    """x (N, L, D), ids (N, K) -> (N, K, D)."""
    return x.gather(1, ids[..., None].expand(-1, -1, x.shape[-1]))


def restore_tokens(kept: Tensor, ids_restore: Tensor, mask_token: Tensor) -> Tensor:
    """Puts kept tokens back to their places and the mask token everywhere else: (N, K, D), (N, L), (D) -> (N,
    L, D)."""
    missing = ids_restore.shape[1] - kept.shape[1]
    filled = torch.cat([kept, mask_token.reshape(1, 1, -1).expand(len(kept), missing, -1)], dim=1)
    return take_tokens(filled, ids_restore)
