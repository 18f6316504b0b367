"""Where a text looks in an image: gradient-weighted attention (Grad-CAM), and detections chosen by it.

    attention_heat    the match logit, by one layer's cross-attention from text to image: a map for each word
    similarity_heat   the similarity of image and text, by one image block's attention from the class
                      token: one map for the whole text

Works for any model whose `text` is a `Bert` with fusion layers and whose `itm_head` tells whether text and
image match; for similarity, any with projections into a shared space and a ViT. Attention weights are
computed explicitly where they are looked at only, and kept nowhere.

Source: arXiv 2107.07651 section 6.4; X-VLM and ViCHA `Grounding.py`, after Grad-CAM, arXiv 1610.02391.

Shape letters: B texts, S image tokens (1 + P * P, and concepts behind them), D image width, T text tokens, P
patches per side, H heads, K detections.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vlp_core.concepts import image_encoder
from vlp_core.images import Images
from vlp_core.text import decoding
from vlp_core.text.bert import Bert, self_mask
from vlp_core.vision.encoder import ImageEncoder
from vlp_core.vision.layers import SelfAttention


class HeatMaps(NamedTuple):
    """`words` [B, T, P, P], one map per token, 0 for padding; `mean` [B, P, P] over all T places, padding
    included."""

    words: Tensor
    mean: Tensor


class Matching(Protocol):
    """A fusion model with a matching head; class 1 is a match."""

    training: bool
    text: Bert
    itm_head: nn.Module


class Aligning(Protocol):
    """A model that projects images and texts into a shared space (`Xvlm`, `Vicha`)."""

    training: bool
    vision: ImageEncoder
    temperature: Tensor

    def encode_image(self, images: Images, /) -> Any:
        """`projection` [B, E]."""
        ...

    def encode_text(self, ids: Tensor, attention_mask: Tensor, /) -> Any:
        """`projection` [B, E]."""
        ...


def attention_heat(
    model: Matching,
    image_embeds_BSD: Tensor,
    ids_BT: Tensor,
    attention_mask_BT: Tensor,
    *,
    layer: int,
    tokens: int | None = None,
    image_mask_BS: Tensor | None = None,
) -> HeatMaps:
    """Heat of each word of text b over image b.

    A are the cross-attention weights of one layer, G the gradient of the match logit with respect to them.
    The heat is the mean over heads of A * max(G, 0) at the patches; token 0 of the image is left out, and
    what stands behind the patches.

    Args:
        model: In evaluation mode; its parameters get no gradient. May be called under `torch.inference_mode`.
        image_embeds_BSD: Token 0 is the whole image, the next are a square of patches, row by row; then
            concepts.
        ids_BT: Token ids.
        attention_mask_BT: 1 for real tokens.
        layer: Number of the layer, counted over all layers of `model.text` (the reference's `block_num`; 9 of
            12 in X-VLM's recipe, 8 in ViCHA's).
        tokens: How many of the image tokens are token 0 and patches (`model.vision.tokens`); None: all.
        image_mask_BS: 1 for image tokens that are visible (`ImageFeatures.attention_mask`); None: all are.

    Raises:
        ValueError: A model in training mode, a layer without cross-attention, or patches that are no square.
    """
    text = model.text
    _require_evaluation(model)
    if not text.fusion_layer <= layer < len(text.layers):
        raise ValueError(
            f"layer={layer} has no cross-attention; choose among {text.fusion_layer}..{len(text.layers) - 1}"
        )
    side = _side(image_embeds_BSD.shape[1], tokens)
    watched: list[Tensor] = []

    def watch(weights: Tensor) -> Tensor:
        # Nothing below this layer needs a gradient.
        watched.append(weights.detach().requires_grad_())
        return watched[0]

    # Tensors made under inference mode cannot take part in a backward pass; copies can.
    with torch.inference_mode(False), torch.enable_grad():
        image, ids, mask = (x.detach().clone() for x in (image_embeds_BSD, ids_BT, attention_mask_BT))
        visible = None if image_mask_BS is None else image_mask_BS.detach().clone()
        with torch.no_grad():
            x = text.encode(ids, mask)
            cache = decoding.start(text, image, visible)
        seen = self_mask(mask, tokens=ids.shape[1], causal=False, device=ids.device)
        fusion = enumerate(text.layers[text.fusion_layer :], start=text.fusion_layer)
        for (number, part), key_value in zip(fusion, cache.images, strict=True):
            with torch.set_grad_enabled(number >= layer):
                x = part.attention_norm(x + part.attention(x, seen, None))
                crossed = (
                    part.cross.weighted(x, key_value, cache.image_mask, watch)
                    if number == layer
                    else part.cross(x, key_value, cache.image_mask)
                )
                x = part.feed_forward(part.cross_norm(x + crossed))
        match = model.itm_head(x[:, 0])[:, 1]
        (gradient,) = torch.autograd.grad(match.float().sum(), watched)
    heat = _patches(watched[0].detach() * gradient.clamp(min=0), side)
    words = heat.mean(1) * attention_mask_BT[..., None, None]
    return HeatMaps(words.float(), words.float().mean(1))


def similarity_heat(
    model: Aligning,
    images: Images,
    ids_BT: Tensor,
    attention_mask_BT: Tensor,
    *,
    block: int,
) -> Tensor:
    """Heat [B, P, P] of text b as a whole over image b.

    A are the attention weights of one block of the image encoder, G the gradient of the similarity (over the
    temperature) of image and text with respect to them. The heat is the mean over heads of A * max(G, 0) in
    the row of the class token, at the patches.

    Args:
        model: In evaluation mode; its parameters get no gradient. May be called under `torch.inference_mode`.
        images: B images as the model takes them.
        ids_BT, attention_mask_BT: Texts; 1 for real tokens.
        block: Number of the image encoder's block (the reference's `block_num`; ViCHA's recipe has 8 of 12).

    Raises:
        ValueError: A model in training mode, an image encoder without such a block.
    """
    _require_evaluation(model)
    encoder = image_encoder(model.vision)
    attentions = [module for module in encoder.modules() if isinstance(module, SelfAttention)]
    if not attentions:
        raise ValueError(
            f"{encoder.called} shows no attention of a class token to all patches; heat of similarity needs "
            "our own ViT (vision kind vit or clip)"
        )
    if not 0 <= block < len(attentions):
        raise ValueError(f"block={block} is none of the image encoder; choose among 0..{len(attentions) - 1}")
    watched: list[Tensor] = []

    def watch(weights: Tensor) -> Tensor:
        watched.append(weights.detach().requires_grad_())
        return watched[0]

    # Tensors made under inference mode cannot take part in a backward pass; copies can.
    with torch.inference_mode(False), torch.no_grad():
        ids, mask = ids_BT.detach().clone(), attention_mask_BT.detach().clone()
        copies = images.map(lambda tensor: tensor.detach().clone())
        text = model.encode_text(ids, mask).projection
        with _explicit(attentions[block], watch):
            image = model.encode_image(copies).projection
        with torch.enable_grad():
            score = (image * text).sum() / model.temperature.detach()
            (gradient,) = torch.autograd.grad(score, watched)
    heat = watched[0].detach() * gradient.clamp(min=0)
    tokens = encoder.tokens
    return _patches(heat[:, :, 0], _side(tokens, None)).float().mean(1)


@contextmanager
def _explicit(attention: SelfAttention, watch: Any) -> Iterator[None]:
    """Meanwhile `attention` computes its weights explicitly and shows them to `watch`, and gradients flow
    from there on."""

    def replace(
        module: SelfAttention, given: tuple[Any, ...], named: dict[str, Any], output: Tensor
    ) -> Tensor:
        # On until the caller's no_grad ends: nothing below this block needs a gradient.
        torch.set_grad_enabled(True)
        return module.weighted(*given, **named, watch=watch)

    handle = attention.register_forward_hook(replace, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


def _require_evaluation(model: Any) -> None:
    if model.training:
        raise ValueError("heat maps need the model in evaluation mode: call model.eval() first")


def _side(found: int, tokens: int | None) -> int:
    """Patches per side of `found` image tokens of which the first `tokens` are the whole image and its
    patches."""
    if tokens is not None and tokens > found:
        raise ValueError(f"tokens={tokens}, but there are {found} image tokens")
    count = found if tokens is None else tokens
    side = math.isqrt(count - 1)
    if side * side != count - 1:
        raise ValueError(
            f"{count} image tokens are not one and a square of patches; heat maps need all patches"
            + (", and tokens= where others stand behind them" if tokens is None else "")
        )
    return side


def _patches(heat: Tensor, side: int) -> Tensor:
    """[..., S] -> [..., P, P], the patches without token 0 and what stands behind them."""
    return heat[..., 1 : 1 + side * side].unflatten(-1, (side, side))


def detection_scores(
    heat_PP: Tensor, boxes_K4: Tensor, size: tuple[int, int], *, alpha: float = 0.5
) -> Tensor:
    """How much of a heat map lies in each detection, [K].

    The map is resized to the image (bicubic) and summed inside the box, whose borders are cut to whole
    pixels; the sum is divided by (width * height) ** alpha.

    Args:
        heat_PP: Heat over the patches of the whole image.
        boxes_K4: (left, top, width, height) in pixels of the image.
        size: (width, height) of the image, as it was before resizing for the model.
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
