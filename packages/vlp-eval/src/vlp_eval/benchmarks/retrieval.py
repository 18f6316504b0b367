"""Options of image-text retrieval. Imports no torch."""

from dataclasses import dataclass
from typing import Literal

from vlp_eval.benchmarks.options import TextBenchmarkOptions, at_least


@dataclass(frozen=True, kw_only=True)
class RetrievalOptions(TextBenchmarkOptions):
    """How image-text retrieval is measured, in both directions."""

    image_batch: int = 64
    """Images encoded together."""
    first_captions: int | None = None
    """Captions of each image that count, in order of the file; null takes all."""
    repeated_captions: bool = True
    """Keep equal captions of one image; false keeps the first, as ViLT and VLC evaluate."""
    rerank: int | None = None
    """Candidates of each query, by similarity, that the fusion encoder scores; 0 ranks by similarity alone.
    null: 128 for a model with encoders of both kinds, 0 for one without fusion encoder. A model that has
    nothing but a fusion encoder scores all pairs and refuses a number here."""
    ties: Literal["pessimistic", "index"] = "pessimistic"
    """Equal scores: wrong candidates count as better, or the order of the file decides."""
    fold_size: int | None = None
    """Report the mean over folds of so many images too (COCO 1k: 1000); null: no folds."""
    text_batch: int = 256
    """Texts encoded together."""
    pair_batch: int = 256
    """Pairs the fusion encoder scores together."""

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least(self, 1, "text_batch", "pair_batch")
        at_least(self, 1, "first_captions", "fold_size", null=True)
        at_least(self, 0, "rerank", null=True)
