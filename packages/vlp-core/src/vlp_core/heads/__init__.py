"""Heads on top of encoders."""

from vlp_core.heads.masked_image import MaskedImageDecoder
from vlp_core.heads.masked_language import MaskedLanguageHead, language_head
from vlp_core.heads.mlp import ClassHead, class_head, mlp_head, relu_head

__all__ = [
    "ClassHead",
    "MaskedImageDecoder",
    "MaskedLanguageHead",
    "class_head",
    "language_head",
    "mlp_head",
    "relu_head",
]
