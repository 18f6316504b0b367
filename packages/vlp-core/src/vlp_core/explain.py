"""Where a text looks in an image: gradient-weighted cross-attention (Grad-CAM), and detections chosen by it.

Works for any model whose `text` is a `Bert` with fusion layers and whose `itm_head` tells whether text and image match.

Source: arXiv 2107.07651 section 6.4; X-VLM `Grounding.py`, after Grad-CAM, arXiv 1610.02391.

Shape letters: B texts, S image tokens (1 + P * P), D image width, T text tokens, P patches per side, K detections.
"""

import math
from typing import NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vlp_core.text import decoding
from vlp_core.text.bert import Bert, self_mask


class HeatMaps(NamedTuple):
    """`words` [B, T, P, P], one map per token, 0 for padding; `mean` [B, P, P] over all T places, padding included."""

    words: Tensor
    mean: Tensor


class Matching(Protocol):
    """A fusion model with a matching head; class 1 is a match."""

    training: bool
    text: Bert
    itm_head: nn.Module


def attention_heat(
    model: Matching, image_embeds_BSD: Tensor, ids_BT: Tensor, attention_mask_BT: Tensor, *, layer: int
) -> HeatMaps:
    """Heat of each word of text b over image b.

    A are the cross-attention weights of one layer, G the gradient of the match logit with respect to them. The heat is the mean over
    heads of A * max(G, 0) at the patches; token 0 of the image is left out.

    Args:
        model: In evaluation mode; its parameters get no gradient. May be called under `torch.inference_mode`.
        image_embeds_BSD: Token 0 is the whole image, the others are a square of patches, row by row.
        ids_BT: Token ids.
        attention_mask_BT: 1 for real tokens.
        layer: Number of the layer, counted over all layers of `model.text` (the reference's `block_num`; 9 of 12 in its recipe).

    Raises:
        ValueError: A model in training mode, a layer without cross-attention, or patches that are no square.
    """
    text = model.text
    if model.training:
        raise ValueError("heat maps need the model in evaluation mode: call model.eval() first")
    if not text.fusion_layer <= layer < len(text.layers):
        raise ValueError(
            f"layer={layer} has no cross-attention; choose among {text.fusion_layer}..{len(text.layers) - 1}"
        )
    side = math.isqrt(image_embeds_BSD.shape[1] - 1)
    if side * side != image_embeds_BSD.shape[1] - 1:
        raise ValueError(
            f"{image_embeds_BSD.shape[1]} image tokens are not one and a square of patches; heat maps need all patches"
        )
    watched: list[Tensor] = []

    def watch(weights: Tensor) -> Tensor:
        # Nothing below this layer needs a gradient.
        watched.append(weights.detach().requires_grad_())
        return watched[0]

    # Tensors made under inference mode cannot take part in a backward pass; copies can.
    with torch.inference_mode(False), torch.enable_grad():
        image, ids, mask = (x.detach().clone() for x in (image_embeds_BSD, ids_BT, attention_mask_BT))
        with torch.no_grad():
            x = text.encode(ids, mask)
            image_keys = decoding.start(text, image).images
        seen = self_mask(mask, tokens=ids.shape[1], causal=False, device=ids.device)
        fusion = enumerate(text.layers[text.fusion_layer :], start=text.fusion_layer)
        for (number, part), key_value in zip(fusion, image_keys, strict=True):
            with torch.set_grad_enabled(number >= layer):
                x = part.attention_norm(x + part.attention(x, seen, None))
                crossed = (
                    part.cross.weighted(x, key_value, None, watch)
                    if number == layer
                    else part.cross(x, key_value, None)
                )
                x = part.feed_forward(part.cross_norm(x + crossed))
        match = model.itm_head(x[:, 0])[:, 1]
        (gradient,) = torch.autograd.grad(match.float().sum(), watched)
    heat = (watched[0].detach() * gradient.clamp(min=0))[..., 1:].unflatten(-1, (side, side))
    words = heat.mean(1) * attention_mask_BT[..., None, None]
    return HeatMaps(words.float(), words.float().mean(1))


def detection_scores(
    heat_PP: Tensor, boxes_K4: Tensor, size: tuple[int, int], *, alpha: float = 0.5
) -> Tensor:
    """How much of a heat map lies in each detection, [K].

    The map is resized to the picture (bicubic) and summed inside the box, whose borders are cut to whole pixels; the sum is divided
    by (width * height) ** alpha.

    Args:
        heat_PP: Heat over the patches of the whole picture.
        boxes_K4: (left, top, width, height) in pixels of the picture.
        size: (width, height) of the picture, as it was before resizing for the model.
        alpha: 0: large boxes win; 1: the mean heat counts.
    """
    width, height = size
    with torch.autocast(heat_PP.device.type, enabled=False):
        heat = F.interpolate(
            heat_PP[None, None].float(), size=(height, width), mode="bicubic", align_corners=False
        )[0, 0]
        # Sums from the corner: a box is four look-ups, and the number of boxes costs no kernel calls.
        corner = F.pad(heat.double().cumsum(0).cumsum(1), (1, 0, 1, 0))
        boxes = boxes_K4.to(heat.device, torch.float64)
        left, top = (boxes[:, i].long().clamp(0, (width, height)[i]) for i in (0, 1))
        right, bottom = ((boxes[:, i] + boxes[:, i + 2]).long().clamp(0, (width, height)[i]) for i in (0, 1))
        inside = corner[bottom, right] - corner[top, right] - corner[bottom, left] + corner[top, left]
        return (inside / (boxes[:, 2] * boxes[:, 3]) ** alpha).float()
