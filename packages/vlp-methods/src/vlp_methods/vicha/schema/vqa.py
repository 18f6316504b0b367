"""Recipe of ViCHA visual question answering. Imports no torch."""

from dataclasses import dataclass, field

from vlp_methods.engine.options import Training
from vlp_methods.parts import checks, options, sections
from vlp_methods.parts.teacher import Teacher
from vlp_methods.vicha.schema import rates


@dataclass(frozen=True, kw_only=True)
class Vqa(Training):
    """ViCHA visual question answering."""

    model: options.TaskModel
    """The model."""
    data: sections.VqaData
    """The data."""
    teacher: Teacher | None = None
    """Momentum teacher; null: none. The official code runs one, but its answers never reach the loss."""
    answers: options.RankedAnswers | options.WrittenAnswers = field(default_factory=options.RankedAnswers)
    """How questions are answered in evaluations."""

    def __post_init__(self) -> None:
        super().__post_init__()
        checks.fits(self.model, self.data)
        rates.one_rate(self)
        checks.selects(self.evaluate, split="val", present=self.data.val is not None)
        checks.ranks_candidates(self.data, self.answers)
