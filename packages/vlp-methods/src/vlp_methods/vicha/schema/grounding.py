"""Recipe of ViCHA for RefCOCO+, weakly supervised. Imports no torch."""

from dataclasses import dataclass, field

from vlp_methods.sections import checks, data, evaluation, models
from vlp_methods.sections.teacher import QueueTeacher
from vlp_methods.sections.training import FineTuning
from vlp_methods.vicha.schema.rates import OneRate


@dataclass(frozen=True, kw_only=True)
class WeakGrounding(OneRate, FineTuning):
    """Weakly supervised grounding: trained as retrieval; heat maps choose among detections."""

    model: models.ContrastModel
    """The model."""
    data: data.ExpressionData
    """The data."""
    teacher: QueueTeacher = field(default_factory=QueueTeacher)
    """Momentum teacher and queue."""
    heat: evaluation.HeatTest = field(default_factory=evaluation.HeatTest)
    """How expressions are located in evaluations."""

    def __post_init__(self) -> None:
        super().__post_init__()
        checks.holds(self.teacher, self.data.train.batch)
        checks.looks_at(self.model, self.heat)
