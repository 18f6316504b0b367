"""Contrastive losses between two sets of features."""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class ContrastiveLoss(NamedTuple):
    """Mean of both directions, each direction, and the logits they came from."""

    loss: Tensor
    image_to_text: Tensor
    text_to_image: Tensor
    image_logits_BG: Tensor


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

    mean over b of  -sum_j P[b, j] log softmax(image_b . all_text / temperature)[j], averaged with the text-to-image direction.
    P[b] is 1 at `first + b`, or with ids spread evenly over every j with `all_ids[j] == ids[b]`.
    Gradients flow into all four feature sets; what reaches other ranks is decided by the gather, not here. With `image` = `all_image`
    and `text` = `all_text` every rank computes the loss of the whole batch, which is X-VLM's form.

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
    with torch.autocast(image_BE.device.type, enabled=False):
        image_logits = image_BE.float() @ all_text_GE.float().t() / temperature
        text_logits = text_BE.float() @ all_image_GE.float().t() / temperature
        if ids_B is None or all_ids_G is None:
            target = torch.arange(first, first + image_BE.shape[0], device=image_BE.device)
        else:
            same = (ids_B[:, None] == all_ids_G[None, :]).float()
            target = same / same.sum(1, keepdim=True)
        image_to_text = F.cross_entropy(image_logits, target)
        text_to_image = F.cross_entropy(text_logits, target)
    return ContrastiveLoss((image_to_text + text_to_image) / 2, image_to_text, text_to_image, image_logits)
