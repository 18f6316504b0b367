"""The keys that all trainings after pre-training have. Imports no torch."""

from dataclasses import dataclass
from typing import Literal

from vlp_methods.engine.options import Training
from vlp_methods.sections import checks
from vlp_methods.sections.data import Data, MeasuredData
from vlp_methods.sections.models import TaskModel


@dataclass(frozen=True, kw_only=True)
class StartedTraining(Training):
    """A training whose model starts from that of an earlier stage; by itself one that is not measured (domain
    stages)."""

    model: TaskModel
    """The model."""
    data: Data
    """The data."""

    def __post_init__(self) -> None:
        super().__post_init__()
        checks.fits(self.model, self.data)


@dataclass(frozen=True, kw_only=True)
class FineTuning(StartedTraining):
    """A training on a benchmark, measured on `data.val` while it runs and on `data.test` at the end."""

    data: MeasuredData
    """The data."""
    select: Literal["val", "test"] = "val"
    """Data of the evaluations during training. "test" selects the model on the test data: its numbers compare
    with those of papers whose code does so, but are better than what unseen data would give."""

    def __post_init__(self) -> None:
        super().__post_init__()
        watched = self.data.val if self.select == "val" else self.data.test
        checks.selects(self.evaluate, split=self.select, present=watched is not None)
