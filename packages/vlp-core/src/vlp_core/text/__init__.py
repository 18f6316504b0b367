"""Text encoders."""

from vlp_core.text.bert import Bert

__all__ = ["Bert"]
