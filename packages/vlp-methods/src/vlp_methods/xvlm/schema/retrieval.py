"""Recipe of X-VLM retrieval fine-tuning. Imports no torch."""

from dataclasses import dataclass, field
from typing import Literal

from vlp_data.options import ImageTextSource

from vlp_methods.engine.options import Training
from vlp_methods.parts import checks, options
from vlp_methods.xvlm.schema.finetune import ContrastModel


@dataclass(frozen=True, kw_only=True)
class Data(options.Data):
    """Data. Relative paths of sources and tokenizer start at `root`."""

    train: options.ImageStream
    """Pictures with captions."""
    val: ImageTextSource | None = None
    """Retrieval among these is measured at the times of `evaluate`; null: never."""
    test: ImageTextSource | None = None
    """Retrieval among these is measured once, with the selected model; null: not at all."""


@dataclass(frozen=True, kw_only=True)
class Retrieval(Training):
    """X-VLM retrieval fine-tuning."""

    model: ContrastModel
    """The model."""
    data: Data
    """The data."""
    retrieval: options.RetrievalTest = field(default_factory=options.RetrievalTest)
    """How retrieval is measured."""
    select: Literal["val", "test"] = "val"
    """Data of the evaluations during training. "test" selects the model on the test data, as the official code does: its numbers
    compare with the paper's, but are better than what unseen data would give."""
    gather_gradient: Literal["local", "sum"] = "local"
    """Gradient of the contrastive loss through features of other ranks: "local" is the official one, 1/ranks of "sum" for the encoders."""

    def __post_init__(self) -> None:
        super().__post_init__()
        checks.fits(self.model, self.data)
        chosen = self.data.val if self.select == "val" else self.data.test
        checks.selects(self.evaluate, split=self.select, present=chosen is not None)
