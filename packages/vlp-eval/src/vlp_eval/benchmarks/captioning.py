"""Options of image captioning. Imports no torch."""

from dataclasses import dataclass
from typing import Literal

from vlp_core.recipe import PathText

from vlp_eval.benchmarks.options import BenchmarkOptions, at_least


@dataclass(frozen=True, kw_only=True)
class CaptioningFiles:
    """What belongs to images beside their rows."""

    references: PathText = ""
    """Captions of people in COCO's format (coco_karpathy_test_gt.json); "" takes those of the rows."""


@dataclass(frozen=True, kw_only=True)
class CaptioningOptions(BenchmarkOptions):
    """How captions are written and measured."""

    prompt: str | None = None
    """What a caption begins with; null takes the model's, or "a picture of " where it says nothing."""
    beams: int = 3
    """Open captions per image."""
    max_tokens: int = 20
    """Longest caption in tokens, the prompt's included."""
    min_tokens: int = 5
    """Shortest caption in tokens, the same way."""
    length_penalty: float = 1.0
    """Exponent of the length by which sums of log-probabilities are divided."""
    java: tuple[Literal["meteor", "spice"], ...] = ()
    """Metrics besides, which need Java and the extra vlp-eval[caption-java]."""

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least(self, 1, "beams", "min_tokens", "max_tokens")
