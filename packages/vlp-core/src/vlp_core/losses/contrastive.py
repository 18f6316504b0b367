"""Contrastive losses between two sets of features."""

from typing import NamedTuple

import torch
import vlp_ops
from torch import Tensor

from vlp_core.precision import wide


class ContrastiveLoss(NamedTuple):
    """Mean of both directions, and each direction."""

    loss: Tensor
    image_to_text: Tensor
    text_to_image: Tensor


def info_nce(
    image_BE: Tensor,
    text_BE: Tensor,
    all_image_GE: Tensor,
    all_text_GE: Tensor,
    *,
    temperature: Tensor | float,
    first: int = 0,
    ids_B: Tensor | None = None,
    all_ids_G: Tensor | None = None,
) -> ContrastiveLoss:
    """Image-text contrastive loss over gathered negatives, in fp32.

    mean over b of  -sum_j P[b, j] log softmax(image_b . all_text / temperature)[j]

    from image to text, averaged with the same from text to image. P[b] is 1 at `first + b`, or with ids
    spread evenly over every j with `all_ids[j] == ids[b]`.
    Gradients flow into all four feature sets; what reaches other ranks is decided by the gather, not here.
    With `image` = `all_image` and `text` = `all_text` every rank computes the loss of the whole batch, which
    is X-VLM's form.

    Args:
        image_BE: Normalised features of this rank's rows.
        text_BE: Likewise, row b belongs to image b.
        all_image_GE: Features of all ranks.
        all_text_GE: Features of all ranks.
        temperature: Divisor of the cosine similarities.
        first: Row of `all_*` that holds this rank's row 0.
        ids_B: Identity of each row (for example the image's number): equal ids are positives of each other.
        all_ids_G: Identities of all ranks; required with `ids_B`.

    Source: CLIP, arXiv 2103.00020 figure 3; X-VLM section 3.2, `models/xvlm.py` get_contrastive_loss.
    """
    if (ids_B is None) != (all_ids_G is None):
        raise ValueError("info_nce needs ids_B and all_ids_G together")
    pairs = torch.arange(first, first + len(image_BE), device=image_BE.device) if ids_B is None else None
    ids = None if ids_B is None or all_ids_G is None else (ids_B, all_ids_G)
    with torch.autocast(image_BE.device.type, enabled=False):
        image, text, all_image, all_text = map(wide, (image_BE, text_BE, all_image_GE, all_text_GE))
        image_to_text = vlp_ops.info_nce(image, all_text, 1 / temperature, positives=pairs, ids=ids).mean()
        text_to_image = vlp_ops.info_nce(text, all_image, 1 / temperature, positives=pairs, ids=ids).mean()
    return ContrastiveLoss((image_to_text + text_to_image) / 2, image_to_text, text_to_image)
