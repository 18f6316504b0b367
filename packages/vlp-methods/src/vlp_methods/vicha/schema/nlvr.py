"""Recipes of ViCHA for NLVR2: text assignment, then fine-tuning. Imports no torch."""

from dataclasses import dataclass, field
from typing import ClassVar, Literal

from vlp_eval.benchmarks.statements import NlvrOptions

from vlp_methods.sections.captions import CaptionedData
from vlp_methods.sections.models import ContrastModel, TaskModel
from vlp_methods.sections.statements import SentenceData
from vlp_methods.sections.teacher import Teacher
from vlp_methods.sections.training import FineTuning, StartedTraining
from vlp_methods.vicha.schema.rates import OneRate


@dataclass(frozen=True, kw_only=True)
class NlvrDomain(OneRate, StartedTraining):
    """Text assignment: which of two images does a caption describe, or neither."""

    model: ContrastModel
    """The model."""
    data: CaptionedData
    """The data."""


@dataclass(frozen=True, kw_only=True)
class NlvrTeacher(Teacher):
    """Momentum teacher of NLVR2."""

    kind: Literal["loaded", "as_released"] = "loaded"
    """"loaded": the teacher starts as the model does and looks at the images by its own image encoder.
    "as_released": as in the official code, it starts from random values and looks by the model's image
    encoder, beside which it has concepts of its own."""


@dataclass(frozen=True, kw_only=True)
class Nlvr(OneRate, FineTuning):
    """Fine-tuning on NLVR2."""

    free: ClassVar[tuple[str, ...]] = (*FineTuning.free, "labels")

    model: TaskModel
    """The model."""
    data: SentenceData
    """The data."""
    teacher: NlvrTeacher | None = field(default_factory=NlvrTeacher)
    """Momentum teacher; null: none."""
    labels: NlvrOptions = field(default_factory=NlvrOptions)
    """How sentences are judged in evaluations."""
