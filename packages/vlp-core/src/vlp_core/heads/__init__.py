"""Heads on top of encoders."""

from vlp_core.heads.masked_image import MaskedImageDecoder
from vlp_core.heads.masked_language import MaskedLanguageHead
from vlp_core.heads.mlp import mlp_head

__all__ = ["MaskedImageDecoder", "MaskedLanguageHead", "mlp_head"]
