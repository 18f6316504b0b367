"""Options of referring expressions, by predicted boxes and by heat of attention. Imports no torch."""

from dataclasses import dataclass
from typing import Literal

from vlp_eval.benchmarks.options import TextBenchmarkOptions, at_least


@dataclass(frozen=True, kw_only=True)
class GroundingOptions(TextBenchmarkOptions):
    """How predicted boxes are measured."""


@dataclass(frozen=True, kw_only=True)
class WeakGroundingOptions(TextBenchmarkOptions):
    """How heat of attention chooses among the detections of an image."""

    layer: int
    """Layer, counted from 0, whose attention is read: of the text encoder (mode=itm: X-VLM 9 of its 12,
    ALBEF and ViCHA 8), or of the image encoder (mode=itc)."""
    mode: Literal["itm", "itc"] = "itm"
    """Heat of the match logit by cross-attention (itm), or of the similarity of image and text by a ViT's
    attention (itc)."""
    alpha: float = 0.5
    """A detection's heat is divided by its area to this power."""

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least(self, 0, "layer")
