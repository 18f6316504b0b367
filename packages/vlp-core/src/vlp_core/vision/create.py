"""Image encoders by kind, from what JSON can hold."""

from collections.abc import Callable
from typing import Any

from vlp_core.vision.clip import ClipVisionTransformer
from vlp_core.vision.encoder import ImageEncoder
from vlp_core.vision.swin import SwinTransformer
from vlp_core.vision.timm import TimmVision
from vlp_core.vision.vit import VisionTransformer

KINDS: dict[str, Callable[..., ImageEncoder]] = {
    "swin": SwinTransformer,
    "clip": ClipVisionTransformer,
    "vit": VisionTransformer,
    "timm": TimmVision,
}


def create_vision(kind: str, **arguments: Any) -> ImageEncoder:
    """Make an image encoder with fresh weights.

    Args:
        kind: "swin", "clip", "vit" (our own) or "timm" (any architecture of timm, which has to be installed).
        arguments: Those of the encoder's class.

    Raises:
        ValueError: An unknown kind, or sizes that do not fit.
        TypeError: An argument that the encoder does not take.
        ImportError: Kind "timm" without timm.
    """
    if kind not in KINDS:
        *others, last = KINDS
        raise ValueError(f"vision kind {kind!r} is not known; choose {', '.join(others)} or {last}")
    return KINDS[kind](**arguments)
