"""Recipe of X-VLM pre-training. Imports no torch."""

from dataclasses import dataclass, field
from typing import ClassVar

from vlp_data.options import ImageTextSource, MaskingOptions
from vlp_eval.benchmarks.retrieval import RetrievalOptions

from vlp_methods.sections import checks
from vlp_methods.sections.captions import ImageStream, RegionStream
from vlp_methods.sections.data import TestedData
from vlp_methods.sections.models import Encoders, Weights
from vlp_methods.xvlm.schema.contrast import Contrast


@dataclass(frozen=True, kw_only=True)
class Model(Encoders):
    """The model."""

    embed_width: int = 256
    """Width of the shared space of images and texts."""
    temperature: float = 0.07
    """Initial temperature of the contrastive loss; trained, kept in 0.001..0.5."""
    weights: Weights = field(default_factory=Weights)
    """Where to start from."""


@dataclass(frozen=True, kw_only=True)
class RegionUpdates(RegionStream):
    """Regions and objects with their texts; one update in a share of the steps, before that of the images."""

    share: float = 0.5
    """Probability that a step has such an update (`iter_perc` of the official configs)."""

    def __post_init__(self) -> None:
        if not 0 < self.share <= 1:
            raise ValueError(f"share={self.share} must lie in (0, 1]; regions=null trains without regions")


@dataclass(frozen=True, kw_only=True)
class Data(TestedData):
    """Data. Relative paths of sources and tokenizer start at `root`."""

    images: ImageStream
    """Images with captions."""
    regions: RegionUpdates | None = None
    """Regions with texts; null trains without them."""
    test: ImageTextSource | None = None
    """Images and captions for the retrieval test; null: no test."""
    masking: MaskingOptions = field(default_factory=MaskingOptions)
    """What is masked."""


@dataclass(frozen=True, kw_only=True)
class Pretrain(Contrast):
    """X-VLM pre-training."""

    free: ClassVar[tuple[str, ...]] = (*Contrast.free, "retrieval")

    model: Model = field(default_factory=Model)
    """The model."""
    data: Data
    """The data."""
    retrieval: RetrievalOptions = field(default_factory=RetrievalOptions)
    """The test of `data.test` at the times of `evaluate`."""

    def __post_init__(self) -> None:
        super().__post_init__()
        checks.fits(self.model, self.data)
        if self.data.regions is not None:
            checks.squashes(self.data.view, "regions")
        if self.evaluate.every is not None and self.data.test is None:
            raise ValueError("evaluate.every needs data.test")
