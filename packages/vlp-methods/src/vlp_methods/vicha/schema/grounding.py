"""Recipe of ViCHA for RefCOCO+, weakly supervised. Imports no torch."""

from dataclasses import dataclass, field

from vlp_methods.engine.options import Training
from vlp_methods.parts import checks, options, sections
from vlp_methods.parts.teacher import QueueTeacher
from vlp_methods.vicha.schema import rates


@dataclass(frozen=True, kw_only=True)
class WeakGrounding(Training):
    """Weakly supervised grounding: trained as retrieval; heat maps choose among detections."""

    model: options.ContrastModel
    """The model."""
    data: sections.ExpressionData
    """The data."""
    teacher: QueueTeacher = field(default_factory=QueueTeacher)
    """Momentum teacher and queue."""
    heat: options.HeatTest = field(default_factory=options.HeatTest)
    """How expressions are located in evaluations."""

    def __post_init__(self) -> None:
        super().__post_init__()
        checks.fits(self.model, self.data)
        checks.holds(self.teacher, self.data.train.batch)
        rates.one_rate(self)
        checks.selects(self.evaluate, split="val", present=self.data.val is not None)
        checks.looks_at(self.model, self.heat)
