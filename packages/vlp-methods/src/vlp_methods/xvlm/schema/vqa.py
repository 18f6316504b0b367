"""Recipe of X-VLM visual question answering. Imports no torch."""

from dataclasses import dataclass, field
from typing import ClassVar

from vlp_eval.benchmarks.vqa import VqaOptions

from vlp_methods.sections import checks
from vlp_methods.sections.models import TaskModel
from vlp_methods.sections.questions import VqaData
from vlp_methods.sections.training import FineTuning


@dataclass(frozen=True, kw_only=True)
class Vqa(FineTuning):
    """X-VLM visual question answering."""

    free: ClassVar[tuple[str, ...]] = (*FineTuning.free, "answers")

    model: TaskModel
    """The model."""
    data: VqaData
    """The data."""
    answers: VqaOptions = field(default_factory=VqaOptions)
    """How questions are answered in evaluations."""

    def __post_init__(self) -> None:
        super().__post_init__()
        checks.ranks_candidates(self.data, self.answers)
