"""Losses as pure functions of tensors; gathering across ranks happens outside (`vlp_core.distributed`)."""

from vlp_core.losses.boxes import (
    BoxLosses,
    box_giou,
    box_iou,
    box_losses,
    cxcywh_to_xyxy,
    pixel_iou,
    xyxy_to_cxcywh,
)
from vlp_core.losses.contrastive import ContrastiveLoss, info_nce
from vlp_core.losses.masked_language import masked_language_loss
from vlp_core.losses.matching import Negatives, matching_loss, negative_weights, sample_negatives

__all__ = [
    "BoxLosses",
    "ContrastiveLoss",
    "Negatives",
    "box_giou",
    "box_iou",
    "box_losses",
    "cxcywh_to_xyxy",
    "info_nce",
    "masked_language_loss",
    "matching_loss",
    "negative_weights",
    "pixel_iou",
    "sample_negatives",
    "xyxy_to_cxcywh",
]
