"""Recipes of X-VLM for NLVR2: domain pre-training, then fine-tuning. Imports no torch."""

from dataclasses import dataclass, field

from vlp_methods.engine.options import Training
from vlp_methods.parts import checks, options, sections


@dataclass(frozen=True, kw_only=True)
class NlvrDomain(Training):
    """Domain pre-training for NLVR2: which of two images does a caption describe, or neither."""

    model: options.ContrastModel
    """The model."""
    data: sections.CaptionedData
    """The data."""

    def __post_init__(self) -> None:
        super().__post_init__()
        checks.fits(self.model, self.data)


@dataclass(frozen=True, kw_only=True)
class Nlvr(Training):
    """Fine-tuning on NLVR2."""

    model: options.TaskModel
    """The model."""
    data: sections.SentenceData
    """The data."""
    labels: options.LabelTest = field(default_factory=options.LabelTest)
    """How sentences are judged in evaluations."""

    def __post_init__(self) -> None:
        super().__post_init__()
        checks.fits(self.model, self.data)
        checks.selects(self.evaluate, split="val", present=self.data.val is not None)
