"""Recipe of ViCHA for SNLI-VE. Imports no torch."""

from dataclasses import dataclass, field
from typing import ClassVar

from vlp_eval.benchmarks.statements import EntailmentOptions

from vlp_methods.sections.models import TaskModel
from vlp_methods.sections.statements import HypothesisData
from vlp_methods.sections.teacher import Teacher
from vlp_methods.sections.training import FineTuning
from vlp_methods.vicha.schema.rates import OneRate


@dataclass(frozen=True, kw_only=True)
class Entailment(OneRate, FineTuning):
    """Fine-tuning on SNLI-VE."""

    free: ClassVar[tuple[str, ...]] = (*FineTuning.free, "labels")

    model: TaskModel
    """The model."""
    data: HypothesisData
    """The data."""
    teacher: Teacher | None = field(default_factory=Teacher)
    """Momentum teacher; null: none."""
    labels: EntailmentOptions = field(default_factory=EntailmentOptions)
    """How hypotheses are judged in evaluations."""
