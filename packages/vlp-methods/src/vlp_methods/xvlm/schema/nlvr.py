"""Recipes of X-VLM for NLVR2: domain pre-training, then fine-tuning. Imports no torch."""

from dataclasses import dataclass, field

from vlp_data.options import TaskJson

from vlp_methods.engine.options import Training
from vlp_methods.parts import checks, options
from vlp_methods.xvlm.schema.finetune import ContrastModel, Model


@dataclass(frozen=True, kw_only=True)
class DomainData(options.Data):
    """Data. Relative paths of sources and tokenizer start at `root`."""

    train: options.ImageStream
    """Pictures with captions."""


@dataclass(frozen=True, kw_only=True)
class NlvrDomain(Training):
    """Domain pre-training for NLVR2: which of two pictures does a caption describe, or neither."""

    model: ContrastModel
    """The model."""
    data: DomainData
    """The data."""

    def __post_init__(self) -> None:
        super().__post_init__()
        checks.fits(self.model, self.data)


@dataclass(frozen=True, kw_only=True)
class SentenceStream:
    """Sentences about two pictures each."""

    source: TaskJson
    """Where they come from."""
    batch: int = 80
    """Sentences per update, over all ranks."""


@dataclass(frozen=True, kw_only=True)
class Data(options.Data):
    """Data. Relative paths of sources and tokenizer start at `root`."""

    train: SentenceStream
    """Sentences that are true or false of two pictures."""
    val: TaskJson | None = None
    """Sentences judged at the times of `evaluate`; null: never."""
    test: TaskJson | None = None
    """Sentences judged once, by the selected model; null: none."""


@dataclass(frozen=True, kw_only=True)
class Nlvr(Training):
    """Fine-tuning on NLVR2."""

    model: Model
    """The model."""
    data: Data
    """The data."""
    labels: options.LabelTest = field(default_factory=options.LabelTest)
    """How sentences are judged in evaluations."""

    def __post_init__(self) -> None:
        super().__post_init__()
        checks.fits(self.model, self.data)
        checks.selects(self.evaluate, split="val", present=self.data.val is not None)
