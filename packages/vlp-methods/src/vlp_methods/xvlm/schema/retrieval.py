"""Recipe of X-VLM retrieval fine-tuning. Imports no torch."""

from dataclasses import dataclass, field
from typing import Literal

from vlp_methods.engine.options import Training
from vlp_methods.parts import checks, options, sections


@dataclass(frozen=True, kw_only=True)
class Retrieval(Training):
    """X-VLM retrieval fine-tuning."""

    model: options.ContrastModel
    """The model."""
    data: sections.RetrievalData
    """The data."""
    retrieval: options.RetrievalTest = field(default_factory=options.RetrievalTest)
    """How retrieval is measured."""
    select: Literal["val", "test"] = "val"
    """Data of the evaluations during training. "test" selects the model on the test data, as the official
    code does: its numbers compare with the paper's, but are better than what unseen data would give."""
    gather_gradient: Literal["local", "sum"] = "local"
    """Gradient of the contrastive loss through features of other ranks: "local" is the official one, 1/ranks
    of "sum" for the encoders."""

    def __post_init__(self) -> None:
        super().__post_init__()
        checks.fits(self.model, self.data)
        chosen = self.data.val if self.select == "val" else self.data.test
        checks.selects(self.evaluate, split=self.select, present=chosen is not None)
