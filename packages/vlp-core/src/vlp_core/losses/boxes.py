"""Box geometry and box regression losses. Boxes are [..., 4]; which corner or centre form is in each name."""

from typing import NamedTuple

import torch
from torch import Tensor

from vlp_core.precision import wide


class BoxLosses(NamedTuple):
    """Scalar losses."""

    l1: Tensor
    giou: Tensor


def cxcywh_to_xyxy(boxes: Tensor) -> Tensor:
    """(centre x, centre y, width, height) -> (left, top, right, bottom)."""
    centre, half = boxes[..., :2], boxes[..., 2:] / 2
    return torch.cat([centre - half, centre + half], dim=-1)


def xyxy_to_cxcywh(boxes: Tensor) -> Tensor:
    """(left, top, right, bottom) -> (centre x, centre y, width, height)."""
    low, high = boxes[..., :2], boxes[..., 2:]
    return torch.cat([(low + high) / 2, high - low], dim=-1)


def _areas(a_xyxy: Tensor, b_xyxy: Tensor) -> tuple[Tensor, Tensor]:
    """Areas of intersection and union of boxes at equal places."""
    size = torch.minimum(a_xyxy[..., 2:], b_xyxy[..., 2:]) - torch.maximum(a_xyxy[..., :2], b_xyxy[..., :2])
    both = size.clamp(min=0).prod(-1)
    own = [(boxes[..., 2:] - boxes[..., :2]).prod(-1) for boxes in (a_xyxy, b_xyxy)]
    return both, own[0] + own[1] - both


def box_iou(a_xyxy: Tensor, b_xyxy: Tensor) -> Tensor:
    """Intersection over union of boxes at equal places, [..., 4] and [..., 4] -> [...]."""
    both, either = _areas(a_xyxy, b_xyxy)
    return both / either


def box_giou(a_xyxy: Tensor, b_xyxy: Tensor) -> Tensor:
    """Generalised IoU of boxes at equal places, from -1 to 1: IoU - (hull - union) / hull. Source: arXiv
    1902.09630."""
    both, either = _areas(a_xyxy, b_xyxy)
    hull = (
        torch.maximum(a_xyxy[..., 2:], b_xyxy[..., 2:]) - torch.minimum(a_xyxy[..., :2], b_xyxy[..., :2])
    ).prod(-1)
    return both / either - (hull - either) / hull


def box_losses(predicted_B4: Tensor, target_B4: Tensor, *, is_image_B: Tensor | None = None) -> BoxLosses:
    """L1 and generalised IoU loss of (cx, cy, w, h) boxes in 0..1, in fp32.

    L1: sum over the 4 numbers. GIoU: 1 - GIoU. Both are summed over the pairs with `is_image` 0 and divided
    by their number, at least 1 (the reference divides 0 by 0 when the batch has only whole images); with
    `is_image_B` None all pairs count. If any box is inverted the GIoU loss of the whole batch is 0, as in the
    reference.

    Source: X-VLM section 3.3, `models/xvlm.py` get_bbox_loss.
    """
    with torch.autocast(predicted_B4.device.type, enabled=False):
        predicted = wide(predicted_B4)
        target = target_B4.to(predicted.dtype)
        l1 = (predicted - target).abs().sum(-1)
        a, b = cxcywh_to_xyxy(predicted), cxcywh_to_xyxy(target)
        inverted = (a[:, 2:] < a[:, :2]).any() | (b[:, 2:] < b[:, :2]).any()
        giou = (1 - box_giou(a, b)).masked_fill(inverted, 0.0)
        counts = torch.ones_like(l1) if is_image_B is None else 1 - is_image_B.to(l1.dtype)
        number = counts.sum().clamp(min=1)
        return BoxLosses((l1 * counts).sum() / number, (giou * counts).sum() / number)
