"""Recipe of ViCHA pre-training, and with everything null of ALBEF's. Imports no torch."""

from dataclasses import dataclass, field
from typing import ClassVar, Literal

from vlp_data.options import ImageTextSource, IndependentMasking, MaskingOptions
from vlp_eval.benchmarks.retrieval import RetrievalOptions

from vlp_methods.sections import checks
from vlp_methods.sections.captions import ImageStream
from vlp_methods.sections.data import TestedData
from vlp_methods.sections.models import Encoders, Weights
from vlp_methods.sections.teacher import QueueTeacher
from vlp_methods.vicha.schema.rates import OneRate


@dataclass(frozen=True, kw_only=True)
class Hierarchy:
    """Class tokens of lower image blocks meet those of lower text layers (ViCHA specification 3.2)."""

    levels: int = 5
    """Blocks and text layers, counted down from the one below the last (`num_hidden_align`)."""
    weights: tuple[float, ...] = ()
    """Of each level, lowest first (`ita_hidden_weights`); [] is 1 for all."""
    weight: float = 0.1
    """Of their sum (`ita_hidden_weight`)."""
    targets: Literal["own", "as_released"] = "own"
    """Which of the texts of all ranks belongs to an image. "as_released": on ranks above 0 one of rank 0, as
    in the official code."""

    def __post_init__(self) -> None:
        if self.levels < 1:
            raise ValueError(f"levels={self.levels} must be at least 1; hierarchy=null trains without")
        if self.weights and len(self.weights) != self.levels:
            raise ValueError(f"{len(self.weights)} weights for levels={self.levels}; give one for each")
        if min(self.weight, *self.weights, 0.0) < 0:
            raise ValueError("weights of the hierarchy must not be negative")


@dataclass(frozen=True, kw_only=True)
class MaskedImage:
    """Patches of the same images are removed, and the image encoder has to predict them (ViCHA specification
    2.6, 3.5)."""

    by: Literal["decoder", "fusion", "both"] = "decoder"
    """What predicts from the patches that are left: a small ViT (`unimodal_mae`), the fusion layers with the
    text, or each (`uni_cross_modal_mae`)."""
    ratio: float = 0.75
    """Share of the patches that is removed."""
    width: int = 768
    """Width of the decoder; that of image and text encoder for "fusion" and "both"."""
    depth: int = 2
    """Blocks of the decoder."""
    heads: int = 16
    """Attention heads of the decoder."""
    weight: float = 1.0
    """Of this loss (`mae_lambda`)."""

    def __post_init__(self) -> None:
        if not 0 < self.ratio < 1:
            raise ValueError(f"ratio={self.ratio} must lie between 0 and 1; masked_image=null trains without")
        if self.weight < 0:
            raise ValueError(f"weight={self.weight} must not be negative")


@dataclass(frozen=True, kw_only=True)
class Model(Encoders):
    """The model. `concepts`, `hierarchy` and `masked_image` are what ViCHA adds to ALBEF, each by itself."""

    hierarchy: Hierarchy | None = None
    """Contrastive loss at lower layers; null: none."""
    masked_image: MaskedImage | None = None
    """Masked image modelling; null: none."""
    embed_width: int = 256
    """Width of the shared space of images and texts."""
    temperature: float = 0.07
    """Initial temperature of the contrastive losses; trained, kept in 0.001..0.5."""
    weights: Weights = field(default_factory=Weights)
    """Where to start from. `text` fills the first layers of the concepts' BERT, too."""


@dataclass(frozen=True, kw_only=True)
class Data(TestedData):
    """Data. Relative paths of sources and tokenizer start at `root`."""

    train: ImageStream
    """Images with captions."""
    test: ImageTextSource | None = None
    """Images and captions for the retrieval test; null: no test."""
    masking: IndependentMasking | MaskingOptions = field(default_factory=IndependentMasking)
    """What is masked."""


@dataclass(frozen=True, kw_only=True)
class Pretrain(OneRate):
    """ViCHA pre-training."""

    free: ClassVar[tuple[str, ...]] = (*OneRate.free, "retrieval")

    model: Model
    """The model."""
    data: Data
    """The data."""
    teacher: QueueTeacher = field(default_factory=QueueTeacher)
    """Momentum teacher and queue."""
    retrieval: RetrievalOptions = field(default_factory=RetrievalOptions)
    """The test of `data.test` at the times of `evaluate`."""

    def __post_init__(self) -> None:
        super().__post_init__()
        checks.fits(self.model, self.data)
        for name in ("hierarchy", "masked_image"):
            if getattr(self.model, name) is not None and self.model.vision.kind not in checks.PLAIN:
                raise ValueError(
                    f"model.{name} needs model.vision.kind=vit, {self.model.vision.kind} has no blocks of "
                    "one "
                    "width; set it to null"
                )
        if self.evaluate.every is not None and self.data.test is None:
            raise ValueError("evaluate.every needs data.test")
        checks.holds(self.teacher, self.data.train.batch)
