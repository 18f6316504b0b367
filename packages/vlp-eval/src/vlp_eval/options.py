"""Options of the benchmarks, as `vlp-eval BENCHMARK CHECKPOINT key=value` takes them. Imports no torch."""

from dataclasses import dataclass
from typing import Literal

from vlp_core.recipe import PathText
from vlp_data.options import CocoCaptions, ImageTextLines, Karpathy, TaskJson


@dataclass(frozen=True, kw_only=True)
class Retrieval:
    """Image-text retrieval in both directions."""

    data: ImageTextLines | TaskJson | CocoCaptions | Karpathy
    """Pictures with their captions; rows of one picture are taken together."""
    limit: int | None = None
    """First so many pictures only, for a quick look; null takes all."""
    clean: Literal["caption", "none"] = "caption"
    """Clean texts as the ALBEF family does (lower case, no punctuation, first max_words words), or take them as they are."""
    max_words: int | None = None
    """Words kept by the clean-up; null takes the checkpoint's, or 30 where it says nothing."""
    first_captions: int | None = None
    """Captions of each picture that count, in order of the file; null takes all."""
    repeated_captions: bool = True
    """Keep equal captions of one picture; false keeps the first, as ViLT and VLC evaluate."""
    rerank: int = 0
    """Candidates of each query that the fusion encoder scores; 0 ranks by similarity alone. X-VLM: 256 for COCO, 128 for Flickr30k."""
    ties: Literal["pessimistic", "index"] = "pessimistic"
    """Equal scores: wrong candidates count as better, or the order of the file decides."""
    fold_size: int | None = None
    """Also report the mean over folds of so many pictures; "COCO 1k" is 1000."""
    tokenizer: tuple[PathText, ...] = ()
    """vocab.txt, or vocab.json and merges.txt; empty takes the checkpoint's (official checkpoints hold none)."""
    max_tokens: int | None = None
    """Longest text in tokens; null takes the checkpoint's, or 40 where it says nothing."""
    image_batch: int = 32
    """Pictures encoded together."""
    text_batch: int = 256
    """Texts encoded together."""
    pair_batch: int = 256
    """Pairs the fusion encoder scores together."""
    workers: int = 0
    """Processes that decode pictures; 0 decodes in the main process."""
    device: str = "auto"
    """auto (a GPU if there is one), cpu, cuda or cuda:N."""
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    """Precision of the encoders; scores are ranked in fp32."""
    figures: int = 4
    """Queries of each direction in the picture; 0 draws none."""
    out: PathText = "eval"
    """Folder for retrieval.json and retrieval.png; files there are replaced."""

    def __post_init__(self) -> None:
        for name in ("image_batch", "text_batch", "pair_batch"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1")
        for name in ("limit", "max_words", "first_captions", "fold_size", "max_tokens"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1, or null")
        for name in ("rerank", "workers", "figures"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name}={getattr(self, name)} must not be negative")
        if self.clean == "none" and self.max_words is not None:
            raise ValueError(
                f"max_words={self.max_words} has no effect with clean=none; leave one of them out"
            )
        if len(self.tokenizer) > 2:
            raise ValueError("tokenizer takes vocab.txt, or vocab.json and merges.txt")
