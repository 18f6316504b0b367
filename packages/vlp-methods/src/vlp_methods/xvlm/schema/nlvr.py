"""Recipes of X-VLM for NLVR2: domain pre-training, then fine-tuning. Imports no torch."""

from dataclasses import dataclass, field
from typing import ClassVar

from vlp_eval.benchmarks.statements import NlvrOptions

from vlp_methods.sections.captions import CaptionedData
from vlp_methods.sections.models import ContrastModel, TaskModel
from vlp_methods.sections.statements import SentenceData
from vlp_methods.sections.training import FineTuning, StartedTraining


@dataclass(frozen=True, kw_only=True)
class NlvrDomain(StartedTraining):
    """Domain pre-training for NLVR2: which of two images does a caption describe, or neither."""

    model: ContrastModel
    """The model."""
    data: CaptionedData
    """The data."""


@dataclass(frozen=True, kw_only=True)
class Nlvr(FineTuning):
    """Fine-tuning on NLVR2."""

    free: ClassVar[tuple[str, ...]] = (*FineTuning.free, "labels")

    model: TaskModel
    """The model."""
    data: SentenceData
    """The data."""
    labels: NlvrOptions = field(default_factory=NlvrOptions)
    """How sentences are judged in evaluations."""
