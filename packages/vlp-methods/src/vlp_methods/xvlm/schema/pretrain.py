"""Recipe of X-VLM pre-training. Imports no torch."""

from dataclasses import dataclass, field
from typing import Literal

from vlp_data.options import ImageTextSource, MaskingOptions

from vlp_methods.engine.options import Training
from vlp_methods.parts import checks, options


@dataclass(frozen=True, kw_only=True)
class Model(options.Encoders):
    """The model."""

    embed_width: int = 256
    """Width of the shared space of images and texts."""
    temperature: float = 0.07
    """Initial temperature of the contrastive loss; trained, kept in 0.001..0.5."""
    weights: options.Weights = field(default_factory=options.Weights)
    """Where to start from."""


@dataclass(frozen=True, kw_only=True)
class RegionStream(options.RegionStream):
    """Regions and objects with their texts; one update in a share of the steps, before that of the images."""

    share: float = 0.5
    """Probability that a step has such an update (`iter_perc` of the official configs)."""

    def __post_init__(self) -> None:
        if not 0 < self.share <= 1:
            raise ValueError(f"share={self.share} must lie in (0, 1]; regions=null trains without regions")


@dataclass(frozen=True, kw_only=True)
class Data(options.Data):
    """Data. Relative paths of sources and tokenizer start at `root`."""

    images: options.ImageStream
    """Images with captions."""
    regions: RegionStream | None = None
    """Regions with texts; null trains without them."""
    test: ImageTextSource | None = None
    """Images and captions for the retrieval test; null: no test."""
    masking: MaskingOptions = field(default_factory=MaskingOptions)
    """What is masked."""


@dataclass(frozen=True, kw_only=True)
class Pretrain(Training):
    """X-VLM pre-training."""

    model: Model = field(default_factory=Model)
    """The model."""
    data: Data
    """The data."""
    retrieval: options.RetrievalTest = field(default_factory=options.RetrievalTest)
    """The test of `data.test` at the times of `evaluate`."""
    gather_gradient: Literal["local", "sum"] = "local"
    """Gradient of the contrastive loss through features of other ranks: "local" is the official one, 1/ranks
    of "sum" for the encoders."""

    def __post_init__(self) -> None:
        super().__post_init__()
        checks.fits(self.model, self.data)
        if self.evaluate.every is not None and self.data.test is None:
            raise ValueError("evaluate.every needs data.test")
