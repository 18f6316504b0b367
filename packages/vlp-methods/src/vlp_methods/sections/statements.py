"""Data sections of statements about images: NLVR2 and SNLI-VE. Imports no torch."""

from dataclasses import dataclass

from vlp_data.options import HypothesisSource, SentenceSource

from vlp_methods.sections.data import MeasuredData


@dataclass(frozen=True, kw_only=True)
class SentenceStream:
    """Sentences about two images each."""

    source: SentenceSource
    """Where they come from."""
    batch: int = 80
    """Sentences per update, over all ranks."""


@dataclass(frozen=True, kw_only=True)
class SentenceData(MeasuredData):
    """Data. Relative paths of sources and tokenizer start at `root`."""

    train: SentenceStream
    """Sentences with labels."""
    val: SentenceSource | None = None
    """Sentences judged at the times of `evaluate`; null: never."""
    test: SentenceSource | None = None
    """Sentences judged once, by the selected model; null: none."""


@dataclass(frozen=True, kw_only=True)
class HypothesisStream:
    """Images with a hypothesis each."""

    source: HypothesisSource
    """Where they come from."""
    batch: int = 80
    """Hypotheses per update, over all ranks."""


@dataclass(frozen=True, kw_only=True)
class HypothesisData(MeasuredData):
    """Data. Relative paths of sources and tokenizer start at `root`."""

    train: HypothesisStream
    """Hypotheses with labels."""
    val: HypothesisSource | None = None
    """Hypotheses judged at the times of `evaluate`; null: never."""
    test: HypothesisSource | None = None
    """Hypotheses judged once, by the selected model; null: none."""
