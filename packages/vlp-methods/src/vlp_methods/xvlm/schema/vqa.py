"""Recipe of X-VLM visual question answering. Imports no torch."""

from dataclasses import dataclass, field

from vlp_methods.engine.options import Training
from vlp_methods.parts import checks, options, sections


@dataclass(frozen=True, kw_only=True)
class Vqa(Training):
    """X-VLM visual question answering."""

    model: options.TaskModel
    """The model."""
    data: sections.VqaData
    """The data."""
    answers: options.RankedAnswers | options.WrittenAnswers = field(default_factory=options.RankedAnswers)
    """How questions are answered in evaluations."""

    def __post_init__(self) -> None:
        super().__post_init__()
        checks.fits(self.model, self.data)
        checks.selects(self.evaluate, split="val", present=self.data.val is not None)
        checks.ranks_candidates(self.data, self.answers)
