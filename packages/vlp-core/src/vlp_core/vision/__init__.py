"""Image encoders with one contract, `ImageEncoder`: `encode(images)`, and where the architecture permits
regions, summaries of lower blocks, and a part of the patches."""

from vlp_core.vision.clip import ClipVisionTransformer
from vlp_core.vision.create import create_vision
from vlp_core.vision.encoder import ImageEncoder, ImageStates, Summarised, encode_groups
from vlp_core.vision.layers import VisionRegions
from vlp_core.vision.positions import resize_position_table, resize_swin_table, sincos_table
from vlp_core.vision.swin import SwinTransformer
from vlp_core.vision.timm import TimmVision
from vlp_core.vision.vit import VisionTransformer

__all__ = [
    "ClipVisionTransformer",
    "ImageEncoder",
    "ImageStates",
    "Summarised",
    "SwinTransformer",
    "TimmVision",
    "VisionRegions",
    "VisionTransformer",
    "create_vision",
    "encode_groups",
    "resize_position_table",
    "resize_swin_table",
    "sincos_table",
]
