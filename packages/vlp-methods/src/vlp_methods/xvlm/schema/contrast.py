"""What recipes of X-VLM with a contrastive loss have in common. Imports no torch."""

from dataclasses import dataclass
from typing import Literal

from vlp_methods.engine.options import Training


@dataclass(frozen=True, kw_only=True)
class Contrast(Training):
    """Options of the contrastive loss."""

    gather_gradient: Literal["local", "sum"] = "local"
    """Gradient of the contrastive loss through features of other ranks: "local" is the official one, 1/ranks
    of "sum" for the encoders."""
