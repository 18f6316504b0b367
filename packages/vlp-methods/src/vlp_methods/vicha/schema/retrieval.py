"""Recipe of ViCHA retrieval fine-tuning. Imports no torch."""

from dataclasses import dataclass, field
from typing import ClassVar

from vlp_eval.benchmarks.retrieval import RetrievalOptions

from vlp_methods.sections import checks
from vlp_methods.sections.captions import RetrievalData
from vlp_methods.sections.models import ContrastModel
from vlp_methods.sections.teacher import QueueTeacher
from vlp_methods.sections.training import FineTuning
from vlp_methods.vicha.schema.rates import OneRate


@dataclass(frozen=True, kw_only=True)
class Retrieval(OneRate, FineTuning):
    """ViCHA retrieval fine-tuning."""

    free: ClassVar[tuple[str, ...]] = (*FineTuning.free, "retrieval")

    model: ContrastModel
    """The model."""
    data: RetrievalData
    """The data."""
    teacher: QueueTeacher = field(default_factory=QueueTeacher)
    """Momentum teacher and queue."""
    retrieval: RetrievalOptions = field(default_factory=RetrievalOptions)
    """How retrieval is measured."""

    def __post_init__(self) -> None:
        super().__post_init__()
        checks.holds(self.teacher, self.data.train.batch)
