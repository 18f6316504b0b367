"""Recipe of X-VLM retrieval fine-tuning. Imports no torch."""

from dataclasses import dataclass, field

from vlp_methods.sections import data, evaluation, models
from vlp_methods.sections.training import FineTuning
from vlp_methods.xvlm.schema.contrast import Contrast


@dataclass(frozen=True, kw_only=True)
class Retrieval(Contrast, FineTuning):
    """X-VLM retrieval fine-tuning."""

    model: models.ContrastModel
    """The model."""
    data: data.RetrievalData
    """The data."""
    retrieval: evaluation.RetrievalTest = field(default_factory=evaluation.RetrievalTest)
    """How retrieval is measured."""
