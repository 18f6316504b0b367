"""Text encoders: `Bert` with fusion layers, and any of transformers for models with two encoders."""

from vlp_core.text.bert import Bert
from vlp_core.text.create import create_text
from vlp_core.text.transformers import TransformersText

__all__ = ["Bert", "TransformersText", "create_text"]
