"""Recipe of X-VLM retrieval fine-tuning. Imports no torch."""

from dataclasses import dataclass, field
from typing import ClassVar

from vlp_eval.benchmarks.retrieval import RetrievalOptions

from vlp_methods.sections.captions import RetrievalData
from vlp_methods.sections.models import ContrastModel
from vlp_methods.sections.training import FineTuning
from vlp_methods.xvlm.schema.contrast import Contrast


@dataclass(frozen=True, kw_only=True)
class Retrieval(Contrast, FineTuning):
    """X-VLM retrieval fine-tuning."""

    free: ClassVar[tuple[str, ...]] = (*FineTuning.free, "retrieval")

    model: ContrastModel
    """The model."""
    data: RetrievalData
    """The data."""
    retrieval: RetrievalOptions = field(default_factory=RetrievalOptions)
    """How retrieval is measured."""
