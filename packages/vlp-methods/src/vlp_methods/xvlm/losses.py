"""Losses of X-VLM from the output of its model; the one place where its features cross ranks.

Source: arXiv 2111.08276 section 3.2 and 3.3.
"""

from torch import Tensor
from vlp_core.distributed import GatherGradient, gather
from vlp_core.losses import box_losses, info_nce, masked_language_loss, matching_loss
from vlp_core.models.fusion.model import PairStates
from vlp_core.models.xvlm.model import Pairs, Predicted


def contrastive_loss(
    pairs: Pairs | PairStates,
    temperature: Tensor,
    *,
    identities_B: Tensor | None = None,
    gather_gradient: GatherGradient = "local",
) -> Tensor:
    """Contrastive loss of the batch of all ranks, the same number on every rank.

    `identities`: pairs of equal identity, on any rank, are positives of each other (retrieval: the image's
    number); None: only the pair itself (pre-training). `gather_gradient`: see `vlp_ops.gather_features`;
    "local" is the reference's.
    """
    image = gather(pairs.image_projection, gather_gradient)
    text = gather(pairs.text_projection, gather_gradient)
    ids = None if identities_B is None else gather(identities_B, "none")
    return info_nce(image, text, image, text, temperature=temperature, ids_B=ids, all_ids_G=ids).loss


def fusion_losses(
    predicted: Pairs | Predicted,
    *,
    target_boxes_B4: Tensor | None = None,
    is_image_B: Tensor | None = None,
) -> dict[str, Tensor]:
    """`itm`, `mlm`, and for a region batch `bbox` (L1) and `giou`; means over pairs, labels and boxes.

    `is_image`: 1 for pairs whose box is the whole image, which do not count in the box losses; None: all
        count.
    """
    if (predicted.boxes is None) != (target_boxes_B4 is None):
        raise ValueError("target boxes belong to a region batch: give them with image_index, and only then")
    if predicted.token_logits is None or predicted.token_labels is None:
        raise ValueError("no masked texts were given, so there is no token to predict")
    losses = {
        "itm": matching_loss(predicted.match_logits, len(predicted.match_logits) // 3),
        "mlm": masked_language_loss(predicted.token_logits, predicted.token_labels),
    }
    if predicted.boxes is not None and target_boxes_B4 is not None:
        boxes = box_losses(predicted.boxes, target_boxes_B4, is_image_B=is_image_B)
        losses |= {"bbox": boxes.l1, "giou": boxes.giou}
    return losses


def pretrain_losses(
    pairs: Pairs,
    temperature: Tensor,
    *,
    target_boxes_B4: Tensor | None = None,
    is_image_B: Tensor | None = None,
    gather_gradient: GatherGradient = "local",
) -> dict[str, Tensor]:
    """`itc` and those of `fusion_losses`; all have weight 1."""
    return {
        "itc": contrastive_loss(pairs, temperature, gather_gradient=gather_gradient),
        **fusion_losses(pairs, target_boxes_B4=target_boxes_B4, is_image_B=is_image_B),
    }


def retrieval_losses(
    pairs: Pairs,
    temperature: Tensor,
    *,
    identities_B: Tensor | None = None,
    gather_gradient: GatherGradient = "local",
) -> dict[str, Tensor]:
    """`itc` and `itm` of retrieval fine-tuning."""
    return {
        "itc": contrastive_loss(
            pairs, temperature, identities_B=identities_B, gather_gradient=gather_gradient
        ),
        "itm": matching_loss(pairs.match_logits, len(pairs.text_embeds)),
    }
