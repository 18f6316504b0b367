"""Recipe of ViCHA retrieval fine-tuning. Imports no torch."""

from dataclasses import dataclass, field
from typing import Literal

from vlp_methods.engine.options import Training
from vlp_methods.parts import checks, options, sections
from vlp_methods.parts.teacher import QueueTeacher
from vlp_methods.vicha.schema import rates


@dataclass(frozen=True, kw_only=True)
class Retrieval(Training):
    """ViCHA retrieval fine-tuning."""

    model: options.ContrastModel
    """The model."""
    data: sections.RetrievalData
    """The data."""
    teacher: QueueTeacher = field(default_factory=QueueTeacher)
    """Momentum teacher and queue."""
    retrieval: options.RetrievalTest = field(default_factory=options.RetrievalTest)
    """How retrieval is measured."""
    select: Literal["val", "test"] = "val"
    """Data of the evaluations during training. "test" selects the model on the test data."""

    def __post_init__(self) -> None:
        super().__post_init__()
        checks.fits(self.model, self.data)
        checks.holds(self.teacher, self.data.train.batch)
        rates.one_rate(self)
        chosen = self.data.val if self.select == "val" else self.data.test
        checks.selects(self.evaluate, split=self.select, present=chosen is not None)
