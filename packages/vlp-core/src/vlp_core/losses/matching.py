"""Image-text matching with hard negatives drawn from the batch."""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from vlp_core.precision import wide


class Negatives(NamedTuple):
    """`image[b]` is the negative image of text b, `text[b]` the negative text of image b; rows of the local
    batch, [B] each."""

    image: Tensor
    text: Tensor


def negative_weights(
    image_BE: Tensor,
    text_BE: Tensor,
    *,
    temperature: Tensor | float,
    ids_B: Tensor | None = None,
    image_keys_BE: Tensor | None = None,
    text_keys_BE: Tensor | None = None,
    floor: float = 1e-5,
) -> tuple[Tensor, Tensor]:
    """Weights for drawing negatives; no gradient, fp32.

    softmax(similarity / temperature) + `floor` over the batch, then 0 for the pair itself, or with `ids_B`
    for every pair of equal ids. A row without any candidate (all ids equal) falls back to equal weights over
    all other rows.

    Args:
        image_BE: Features of the images.
        text_BE: Features of the texts.
        temperature: Divisor of the similarities.
        ids_B: Identity of each pair.
        image_keys_BE: Features that stand for the images where texts look for one (a teacher's, in ALBEF);
            None: `image`.
        text_keys_BE: Likewise where images look for a text.
        floor: Added to every weight; 0 in ALBEF and ViCHA.

    Returns:
        (over images for each text, over texts for each image), [B, B] each.

    Raises:
        ValueError: A batch of one pair has no negatives.

    Source: ALBEF, arXiv 2107.07651 section 3.2; X-VLM `models/xvlm.py` get_matching_loss.
    """
    batch = image_BE.shape[0]
    if batch < 2:
        raise ValueError(
            f"image-text matching needs at least 2 pairs per rank to draw negatives, got {batch}"
        )
    with torch.no_grad(), torch.autocast(image_BE.device.type, enabled=False):
        image_keys = image_BE if image_keys_BE is None else image_keys_BE
        text_keys = text_BE if text_keys_BE is None else text_keys_BE
        of_images = image_BE.float() @ text_keys.float().t() / temperature
        of_texts = text_BE.float() @ image_keys.float().t() / temperature
        itself = torch.eye(batch, dtype=torch.bool, device=of_images.device)
        same = itself if ids_B is None else ids_B[:, None] == ids_B[None, :]

        def weights(logits: Tensor) -> Tensor:
            # NaN features must show up in the loss, where the engine looks for them, not as an assertion of
            # the drawing kernel.
            drawn = (logits.softmax(1) + floor).nan_to_num(0.0).masked_fill(same, 0.0)
            return torch.where(drawn.sum(1, keepdim=True) > 0, drawn, (~itself).float())

        return weights(of_texts), weights(of_images)


def sample_negatives(
    image_weights_BB: Tensor, text_weights_BB: Tensor, *, generator: torch.Generator | None = None
) -> Negatives:
    """One negative per row of each weight matrix: first all images, then all texts, one draw each and no host
    synchronisation."""
    image = torch.multinomial(image_weights_BB, 1, generator=generator).squeeze(1)
    text = torch.multinomial(text_weights_BB, 1, generator=generator).squeeze(1)
    return Negatives(image, text)


def matching_loss(logits_R2: Tensor, positives: int) -> Tensor:
    """Mean cross entropy of match logits in fp32: the first `positives` rows match (class 1), all other rows
    do not (class 0)."""
    target = (torch.arange(logits_R2.shape[0], device=logits_R2.device) < positives).long()
    return F.cross_entropy(wide(logits_R2), target)
