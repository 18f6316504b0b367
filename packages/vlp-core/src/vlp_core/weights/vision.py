"""Adapter and loader of a vision encoder, by its class."""

from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from vlp_core.vision.clip import ClipVisionTransformer
from vlp_core.vision.swin import SwinTransformer
from vlp_core.vision.vit import VisionTransformer
from vlp_core.weights.adapter import Adapter
from vlp_core.weights.clip import clip_adapter, load_clip
from vlp_core.weights.deit import deit_adapter, load_deit
from vlp_core.weights.loading import Loaded
from vlp_core.weights.swin import load_swin, swin_adapter

VisionEncoder = SwinTransformer | ClipVisionTransformer | VisionTransformer


def xvlm_vision_adapter(encoder: VisionEncoder, *, source_prefix: str = "", prefix: str = "") -> Adapter:
    """The adapter between this encoder's names and those X-VLM's checkpoints use below "vision_encoder."."""
    match encoder:
        case SwinTransformer():
            return swin_adapter(
                depths=encoder.depths,
                window=encoder.window,
                image_size=encoder.image_size,
                source_prefix=source_prefix,
                prefix=prefix,
            )
        case ClipVisionTransformer():
            return clip_adapter(tokens=encoder.tokens, source_prefix=source_prefix, prefix=prefix)
        case VisionTransformer():
            return deit_adapter(source_prefix=source_prefix, prefix=prefix)
    raise TypeError(f"X-VLM has no vision encoder {type(encoder).__name__}")


def load_vision(encoder: VisionEncoder, state: Mapping[str, Tensor] | str | Path) -> Loaded:
    """Fill an encoder from its pre-trained weights: Microsoft's or timm's Swin, Hugging Face's CLIP, DeiT.

    Classifiers, text towers and projections are left out; position tables are resized. Raises
    `CheckpointError`.
    """
    match encoder:
        case SwinTransformer():
            return load_swin(encoder, state)
        case ClipVisionTransformer():
            return load_clip(encoder, state)
        case VisionTransformer():
            return load_deit(encoder, state)
    raise TypeError(f"no layout of pre-trained weights is known for {type(encoder).__name__}")
