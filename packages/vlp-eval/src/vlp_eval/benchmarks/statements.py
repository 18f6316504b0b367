"""Options of statements about images: NLVR2 and SNLI-VE. Imports no torch."""

from dataclasses import dataclass

from vlp_eval.benchmarks.options import TextBenchmarkOptions


@dataclass(frozen=True, kw_only=True)
class NlvrOptions(TextBenchmarkOptions):
    """How sentences about two images are judged."""


@dataclass(frozen=True, kw_only=True)
class EntailmentOptions(TextBenchmarkOptions):
    """How hypotheses about an image are judged."""
