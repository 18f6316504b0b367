"""Recipe of ViCHA visual question answering. Imports no torch."""

from dataclasses import dataclass, field
from typing import ClassVar

from vlp_eval.benchmarks.vqa import VqaOptions

from vlp_methods.sections import checks
from vlp_methods.sections.models import TaskModel
from vlp_methods.sections.questions import VqaData
from vlp_methods.sections.teacher import Teacher
from vlp_methods.sections.training import FineTuning
from vlp_methods.vicha.schema.rates import OneRate


@dataclass(frozen=True, kw_only=True)
class Vqa(OneRate, FineTuning):
    """ViCHA visual question answering."""

    free: ClassVar[tuple[str, ...]] = (*FineTuning.free, "answers")

    model: TaskModel
    """The model."""
    data: VqaData
    """The data."""
    teacher: Teacher | None = None
    """Momentum teacher; null: none. The official code runs one, but its answers never reach the loss."""
    answers: VqaOptions = field(default_factory=VqaOptions)
    """How questions are answered in evaluations."""

    def __post_init__(self) -> None:
        super().__post_init__()
        checks.ranks_candidates(self.data, self.answers)
