"""What models with two encoders and a fusion encoder do alike: features of images and texts, and pairs of them fused.

`Xvlm` and `Vicha` are made of these. An image stands in a pool with its row; every text row names its image, so that keys and values of an
image are computed once, however many texts look at it.

Source: ALBEF, arXiv 2107.07651 section 3; X-VLM, arXiv 2111.08276 section 3.

Shape letters: B texts of the batch, M images of a pool, S image tokens, D image width, T text tokens, W text width, E shared embedding,
P masked positions, R pairs.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vlp_core.text.bert import Bert
from vlp_core.vision.layers import take_rows


class ImageFeatures(NamedTuple):
    """`embeds` [M, S, D]; `projection` [M, E], length one, or None in a model without the contrast head; `attention_mask` [M, S], 0 for
    tokens that nothing attends to (padding of concepts, where a model hides it), or None."""

    embeds: Tensor
    projection: Tensor | None
    attention_mask: Tensor | None = None


class TextFeatures(NamedTuple):
    """`embeds` [B, T, W] after the text layers, without meaning at padding; `attention_mask` [B, T]; `projection` [B, E] or None, as
    for images."""

    embeds: Tensor
    attention_mask: Tensor
    projection: Tensor | None


def project(embeds: Tensor, projection: nn.Linear) -> Tensor:
    """Token 0 of [M, S, D] (or of [M, D]) in the shared space: [M, E], fp32, length one."""
    first = embeds[:, 0] if embeds.ndim == 3 else embeds
    return F.normalize(projection(first).float(), dim=-1)


def fuse_first(
    fusion: Bert, image: ImageFeatures, text: TextFeatures, image_index_R: Tensor, text_index_R: Tensor
) -> Tensor:
    """Fused state of [CLS] for R pairs (image_index[r], text_index[r]), [R, W]; projects every image of `image`."""
    (first,) = fusion.fuse_and_read(
        take_rows(text.embeds, text_index_R),
        text.attention_mask.index_select(0, text_index_R),
        image.embeds,
        (text_index_R.new_zeros(len(text_index_R), 1),),
        image_mask_MS=image.attention_mask,
        image_index=image_index_R,
    )
    return first.squeeze(1)


def fuse_used(
    fusion: Bert, image: ImageFeatures, text: TextFeatures, image_index_R: Tensor, text_index_R: Tensor
) -> Tensor:
    """As `fuse_first`, projecting only the images that occur; finding them waits for the device."""
    used, image_index = image_index_R.unique(return_inverse=True)
    mask = None if image.attention_mask is None else image.attention_mask.index_select(0, used)
    return fuse_first(
        fusion, ImageFeatures(take_rows(image.embeds, used), None, mask), text, image_index, text_index_R
    )


def fuse_pairs_and_masked(
    fusion: Bert,
    states_2BTW: Tensor,
    attention_mask_BT: Tensor,
    pool_MSD: Tensor,
    text_index_R: Tensor,
    image_index_R: Tensor,
    masked_positions_BP: Tensor,
    *,
    pool_mask_MS: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Fuse R pairs of the batch, and its masked texts with their own images, in one pass.

    Args:
        fusion: The text encoder, whose upper layers fuse.
        states_2BTW: After the text layers: the B texts, then the same texts masked.
        attention_mask_BT: 1 for real tokens.
        pool_MSD: Images; image b belongs to text b.
        text_index_R: Text of each pair, 0..B-1.
        image_index_R: Image of each pair, a row of the pool.
        masked_positions_BP: Positions of the masked texts to read.
        pool_mask_MS: 0 for image tokens that are not visible.

    Returns:
        [CLS] of the pairs [R, W], and the masked positions [B, P, W].
    """
    batch = len(attention_mask_BT)
    rows = torch.arange(batch, device=states_2BTW.device)
    text_index = torch.cat([text_index_R, batch + rows])
    first, masked = fusion.fuse_and_read(
        take_rows(states_2BTW, text_index),
        attention_mask_BT.index_select(0, text_index % batch),
        pool_MSD,
        (text_index_R.new_zeros(len(text_index_R), 1), masked_positions_BP),
        image_mask_MS=pool_mask_MS,
        image_index=torch.cat([image_index_R, rows]),
    )
    return first.squeeze(1), masked
