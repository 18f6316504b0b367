"""What a recipe says of the evaluations of its task. Imports no torch."""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, kw_only=True)
class RetrievalTest:
    """How retrieval is measured."""

    rerank: int = 128
    """Candidates of each query that the fusion encoder scores; 0 ranks by similarity alone."""
    image_batch: int = 64
    """Images encoded together."""
    pair_batch: int = 256
    """Pairs the fusion encoder scores together."""
    figures: int = 4
    """Queries of each direction in the image retrieval.png; 0 draws none."""


@dataclass(frozen=True, kw_only=True)
class RowTest:
    """How a benchmark of rows is taken."""

    image_batch: int = 32
    """Rows taken together."""
    figures: int = 4
    """Rows in the image of the benchmark; 0 draws none."""


@dataclass(frozen=True, kw_only=True)
class RankedAnswers(RowTest):
    """Questions are answered by the most probable of given candidates."""

    mode: Literal["rank"] = "rank"
    candidates: int = 128
    """Candidates of each question, by their first word, that are scored in full; never more than there
    are."""
    max_words: int = 50
    """Words kept of a question."""
    pair_batch: int = 1024
    """Candidates scored together."""


@dataclass(frozen=True, kw_only=True)
class WrittenAnswers(RowTest):
    """Questions are answered by beam search."""

    mode: Literal["generate"] = "generate"
    beams: int = 3
    """Open answers per question."""
    max_tokens: int = 10
    """Longest answer, [CLS] included."""
    max_words: int = 50
    """Words kept of a question."""


@dataclass(frozen=True, kw_only=True)
class LabelTest(RowTest):
    """How sentences are judged."""


@dataclass(frozen=True, kw_only=True)
class HeatTest(RowTest):
    """How heat maps choose among detections."""

    mode: Literal["itm", "itc"] = "itm"
    """Heat of the match logit, by attention of the text to the image, or of the similarity of both, by
    attention in a ViT."""
    layer: int = 9
    """Layer, counted from 0, whose attention is looked at (`block_num`): of the text encoder, or with itc of
    the ViT."""


@dataclass(frozen=True, kw_only=True)
class BoxTest(RowTest):
    """How predicted boxes are measured."""


@dataclass(frozen=True, kw_only=True)
class CaptionTest(RowTest):
    """How captions are written and measured."""

    beams: int = 3
    """Open captions per image."""
    max_tokens: int = 20
    """Longest caption, prompt included."""
    min_tokens: int = 5
    """Shortest caption, prompt included."""
    length_penalty: float = 1.0
    """Exponent of the length that sums of log-probabilities are divided by."""
