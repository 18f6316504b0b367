"""Vision encoders with one contract: `forward(image) -> [N, 1+L, D]` and `forward_regions(...) ->
VisionRegions`."""

from vlp_core.vision.clip import ClipVisionTransformer
from vlp_core.vision.layers import VisionRegions
from vlp_core.vision.positions import resize_position_table, resize_swin_table, sincos_table
from vlp_core.vision.swin import SwinTransformer
from vlp_core.vision.vit import VisionTransformer

__all__ = [
    "ClipVisionTransformer",
    "SwinTransformer",
    "VisionRegions",
    "VisionTransformer",
    "resize_position_table",
    "resize_swin_table",
    "sincos_table",
]
