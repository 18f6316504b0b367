"""Recipe of ViCHA for RefCOCO+, weakly supervised. Imports no torch."""

from dataclasses import dataclass, field
from typing import ClassVar

from vlp_eval.benchmarks.grounding import WeakGroundingOptions

from vlp_methods.sections import checks
from vlp_methods.sections.expressions import ExpressionData
from vlp_methods.sections.models import ContrastModel
from vlp_methods.sections.teacher import QueueTeacher
from vlp_methods.sections.training import FineTuning
from vlp_methods.vicha.schema.rates import OneRate


@dataclass(frozen=True, kw_only=True)
class WeakGrounding(OneRate, FineTuning):
    """Weakly supervised grounding: trained as retrieval; heat maps choose among detections."""

    free: ClassVar[tuple[str, ...]] = (*FineTuning.free, "heat")

    model: ContrastModel
    """The model."""
    data: ExpressionData
    """The data."""
    teacher: QueueTeacher = field(default_factory=QueueTeacher)
    """Momentum teacher and queue."""
    heat: WeakGroundingOptions = field(default_factory=lambda: WeakGroundingOptions(layer=9))
    """How expressions are located in evaluations."""

    def __post_init__(self) -> None:
        super().__post_init__()
        checks.holds(self.teacher, self.data.train.batch)
        checks.looks_at(self.model, self.heat)
