"""Recipes of X-VLM for RefCOCO+: weakly supervised, and with boxes after a domain stage. Imports no torch."""

from dataclasses import dataclass, field
from typing import Literal

from vlp_data.options import Refer

from vlp_methods.engine.options import Training
from vlp_methods.parts import checks, options, sections


@dataclass(frozen=True, kw_only=True)
class WeakGrounding(Training):
    """Weakly supervised grounding: trained as retrieval; heat maps choose among detections."""

    model: options.ContrastModel
    """The model."""
    data: sections.ExpressionData
    """The data."""
    heat: options.HeatTest = field(default_factory=options.HeatTest)
    """How expressions are located in evaluations."""
    gather_gradient: Literal["local", "sum"] = "local"
    """Gradient of the contrastive loss through features of other ranks: "local" is the official one, 1/ranks
    of "sum" for the encoders."""

    def __post_init__(self) -> None:
        super().__post_init__()
        checks.fits(self.model, self.data)
        checks.selects(self.evaluate, split="val", present=self.data.val is not None)
        checks.looks_at(self.model, self.heat)


@dataclass(frozen=True, kw_only=True)
class BoxesDomainData(options.Data):
    """Data. Relative paths of sources and tokenizer start at `root`."""

    train: options.RegionStream
    """Regions with texts."""


@dataclass(frozen=True, kw_only=True)
class BoxesDomain(Training):
    """Domain pre-training for boxes: regression alone, on regions and objects."""

    model: options.TaskModel
    """The model."""
    data: BoxesDomainData
    """The data."""

    def __post_init__(self) -> None:
        super().__post_init__()
        checks.fits(self.model, self.data)


@dataclass(frozen=True, kw_only=True)
class BoxStream:
    """Images with referring expressions and the boxes they mean."""

    source: Refer
    """Where they come from."""
    batch: int = 160
    """Expressions per update, over all ranks."""


@dataclass(frozen=True, kw_only=True)
class BoxesData(options.Data):
    """Data. Relative paths of sources and tokenizer start at `root`."""

    train: BoxStream
    """Expressions with boxes."""
    val: Refer | None = None
    """Expressions with boxes, located at the times of `evaluate`; null: never."""
    test: Refer | None = None
    """Expressions with boxes, located once, by the selected model; null: none."""


@dataclass(frozen=True, kw_only=True)
class Boxes(Training):
    """Grounding with boxes."""

    model: options.TaskModel
    """The model."""
    data: BoxesData
    """The data."""
    boxes: options.BoxTest = field(default_factory=options.BoxTest)
    """How expressions are located in evaluations."""

    def __post_init__(self) -> None:
        super().__post_init__()
        checks.fits(self.model, self.data)
        checks.selects(self.evaluate, split="val", present=self.data.val is not None)
