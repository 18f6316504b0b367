"""Published weights of an image encoder, by its class."""

from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from vlp_core.vision.clip import ClipVisionTransformer
from vlp_core.vision.swin import SwinTransformer
from vlp_core.vision.timm import TimmVision
from vlp_core.vision.vit import VisionTransformer
from vlp_core.weights.adapter import Adapter
from vlp_core.weights.clip import hf_clip_adapter, load_clip
from vlp_core.weights.deit import deit_adapter, load_deit
from vlp_core.weights.loading import LoadReport
from vlp_core.weights.swin import load_swin, swin_adapter
from vlp_core.weights.timm import load_timm

VisionEncoder = SwinTransformer | ClipVisionTransformer | VisionTransformer


def vision_adapter(encoder: VisionEncoder, *, source_prefix: str = "", prefix: str = "") -> Adapter:
    """Between the names of an encoder and those of its published weights: Microsoft's Swin, the vision tower
    of Hugging Face's CLIP, DeiT.

    Args:
        encoder: Encoder.
        source_prefix, prefix: Before every name of the source and of ours.

    Raises:
        TypeError: An encoder without such a layout.
    """
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
            return hf_clip_adapter(source_prefix=source_prefix, prefix=prefix)
        case VisionTransformer():
            return deit_adapter(source_prefix=source_prefix, prefix=prefix)
    raise TypeError(f"no layout of published weights is known for {type(encoder).__name__}")


def load_vision(encoder: VisionEncoder | TimmVision, state: Mapping[str, Tensor] | str | Path) -> LoadReport:
    """Fill an encoder from its published weights: Microsoft's or timm's Swin, Hugging Face's CLIP, DeiT, or
    timm's own file of a backbone of timm.

    Classifiers, text towers and projections are left out; position tables are resized.

    Raises:
        CheckpointError: See `vlp_core.weights.load`.
        TypeError: An encoder without such a layout.
    """
    match encoder:
        case SwinTransformer():
            return load_swin(encoder, state)
        case ClipVisionTransformer():
            return load_clip(encoder, state)
        case VisionTransformer():
            return load_deit(encoder, state)
        case TimmVision():
            return load_timm(encoder, state)
    raise TypeError(f"no layout of published weights is known for {type(encoder).__name__}")
