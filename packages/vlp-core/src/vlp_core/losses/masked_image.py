"""Masked image modelling: what removed patches look like.

Source: MAE, arXiv 2111.06377 section 3; ViCHA `models/objectives/mae.py`.
"""

import math

import torch.nn.functional as F
from torch import Tensor

from vlp_core.precision import wide


def patch_targets(image_NCHW: Tensor, patch: int) -> Tensor:
    """Pixels of every patch, normalised by its own mean and deviation: [N, 3, R, R] -> [N, L, P*P*3], fp32.

    Order within a patch: row, column, channel. (x - mean) / sqrt(variance + 1e-6), with the unbiased
    variance.

    Raises:
        ValueError: The image is no multiple of the patch: pixels beyond the last one could not be predicted.
    """
    height, width = image_NCHW.shape[2:]
    if height % patch or width % patch:
        raise ValueError(
            f"masked image modelling needs images of whole patches, {height} x {width} is no multiple "
            f"of patch={patch}"
        )
    x = wide(image_NCHW).unflatten(3, (-1, patch)).unflatten(2, (-1, patch))
    x = x.permute(0, 2, 4, 3, 5, 1).flatten(3).flatten(1, 2)
    # A layer norm, but for its variance, which is the biased one: (n - 1) / n of the unbiased one.
    biased = (x.shape[-1] - 1) / x.shape[-1]
    scale = x.new_full(x.shape[-1:], math.sqrt(biased))
    return F.layer_norm(x, x.shape[-1:], scale, eps=1e-6 * biased)


def masked_image_loss(predicted_NLC: Tensor, targets_NLC: Tensor, removed_NL: Tensor) -> Tensor:
    """Mean squared error of each patch, averaged over the removed ones (1 in the mask), in fp32; 0 when none
    was removed."""
    error = F.mse_loss(wide(predicted_NLC), targets_NLC, reduction="none").mean(-1)
    removed = removed_NL.to(error.dtype)
    return (error * removed).sum() / removed.sum().clamp(min=1)
