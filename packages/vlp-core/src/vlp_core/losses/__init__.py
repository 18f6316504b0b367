"""Losses as pure functions of tensors; gathering across ranks happens outside (`vlp_core.distributed`)."""

from vlp_core.losses.boxes import (
    BoxLosses,
    box_giou,
    box_iou,
    box_losses,
    cxcywh_to_xyxy,
    xyxy_to_cxcywh,
)
from vlp_core.losses.contrastive import ContrastiveLoss, info_nce
from vlp_core.losses.distillation import (
    distilled_cross_entropy,
    distilled_language_loss,
    momentum_targets,
)
from vlp_core.losses.language import answer_loss, language_loss, mean_of_others, self_critical_loss
from vlp_core.losses.masked_image import masked_image_loss, patch_targets
from vlp_core.losses.masked_language import masked_language_loss
from vlp_core.losses.matching import Negatives, matching_loss, negative_weights, sample_negatives

__all__ = [
    "BoxLosses",
    "ContrastiveLoss",
    "Negatives",
    "answer_loss",
    "box_giou",
    "box_iou",
    "box_losses",
    "cxcywh_to_xyxy",
    "distilled_cross_entropy",
    "distilled_language_loss",
    "info_nce",
    "language_loss",
    "masked_image_loss",
    "masked_language_loss",
    "matching_loss",
    "mean_of_others",
    "momentum_targets",
    "negative_weights",
    "patch_targets",
    "sample_negatives",
    "self_critical_loss",
    "xyxy_to_cxcywh",
]
