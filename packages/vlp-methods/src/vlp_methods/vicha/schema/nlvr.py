"""Recipes of ViCHA for NLVR2: text assignment, then fine-tuning. Imports no torch."""

from dataclasses import dataclass, field
from typing import Literal

from vlp_methods.engine.options import Training
from vlp_methods.parts import checks, options, sections
from vlp_methods.parts.teacher import Teacher
from vlp_methods.vicha.schema import rates


@dataclass(frozen=True, kw_only=True)
class NlvrDomain(Training):
    """Text assignment: which of two images does a caption describe, or neither."""

    model: options.ContrastModel
    """The model."""
    data: sections.CaptionedData
    """The data."""

    def __post_init__(self) -> None:
        super().__post_init__()
        checks.fits(self.model, self.data)
        rates.one_rate(self)


@dataclass(frozen=True, kw_only=True)
class NlvrTeacher(Teacher):
    """Momentum teacher of NLVR2."""

    kind: Literal["loaded", "as_released"] = "loaded"
    """"loaded": the teacher starts as the model does and looks at the images by its own image encoder.
    "as_released": as in the official code, it starts from random values and looks by the model's image encoder,
    beside which it has concepts of its own."""


@dataclass(frozen=True, kw_only=True)
class Nlvr(Training):
    """Fine-tuning on NLVR2."""

    model: options.TaskModel
    """The model."""
    data: sections.SentenceData
    """The data."""
    teacher: NlvrTeacher | None = field(default_factory=NlvrTeacher)
    """Momentum teacher; null: none."""
    labels: options.LabelTest = field(default_factory=options.LabelTest)
    """How sentences are judged in evaluations."""

    def __post_init__(self) -> None:
        super().__post_init__()
        checks.fits(self.model, self.data)
        rates.one_rate(self)
        checks.selects(self.evaluate, split="val", present=self.data.val is not None)
