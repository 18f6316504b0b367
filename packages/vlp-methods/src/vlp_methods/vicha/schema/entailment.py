"""Recipe of ViCHA for SNLI-VE. Imports no torch."""

from dataclasses import dataclass, field

from vlp_methods.engine.options import Training
from vlp_methods.parts import checks, options, sections
from vlp_methods.parts.teacher import Teacher
from vlp_methods.vicha.schema import rates


@dataclass(frozen=True, kw_only=True)
class Entailment(Training):
    """Fine-tuning on SNLI-VE."""

    model: options.TaskModel
    """The model."""
    data: sections.SentenceData
    """The data."""
    teacher: Teacher | None = field(default_factory=Teacher)
    """Momentum teacher; null: none."""
    labels: options.LabelTest = field(default_factory=options.LabelTest)
    """How hypotheses are judged in evaluations."""

    def __post_init__(self) -> None:
        super().__post_init__()
        checks.fits(self.model, self.data)
        rates.one_rate(self)
        checks.selects(self.evaluate, split="val", present=self.data.val is not None)
