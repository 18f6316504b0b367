"""Recipes of X-VLM for RefCOCO+: weakly supervised, and with boxes after a domain stage. Imports no torch."""

from dataclasses import dataclass, field
from typing import ClassVar

from vlp_data.options import ExpressionBoxSource
from vlp_eval.benchmarks.grounding import GroundingOptions, WeakGroundingOptions

from vlp_methods.sections import checks
from vlp_methods.sections.captions import RegionStream
from vlp_methods.sections.data import Data, MeasuredData
from vlp_methods.sections.expressions import ExpressionData
from vlp_methods.sections.models import ContrastModel, TaskModel
from vlp_methods.sections.training import FineTuning, StartedTraining
from vlp_methods.xvlm.schema.contrast import Contrast


@dataclass(frozen=True, kw_only=True)
class WeakGrounding(Contrast, FineTuning):
    """Weakly supervised grounding: trained as retrieval; heat maps choose among detections."""

    free: ClassVar[tuple[str, ...]] = (*FineTuning.free, "heat")

    model: ContrastModel
    """The model."""
    data: ExpressionData
    """The data."""
    heat: WeakGroundingOptions = field(default_factory=lambda: WeakGroundingOptions(layer=9))
    """How expressions are located in evaluations."""

    def __post_init__(self) -> None:
        super().__post_init__()
        checks.looks_at(self.model, self.heat)


@dataclass(frozen=True, kw_only=True)
class BoxesDomainData(Data):
    """Data. Relative paths of sources and tokenizer start at `root`."""

    train: RegionStream
    """Regions with texts."""


@dataclass(frozen=True, kw_only=True)
class BoxesDomain(StartedTraining):
    """Domain pre-training for boxes: regression alone, on regions and objects."""

    model: TaskModel
    """The model."""
    data: BoxesDomainData
    """The data."""

    def __post_init__(self) -> None:
        super().__post_init__()
        checks.squashes(self.data.view, "regions")


@dataclass(frozen=True, kw_only=True)
class BoxStream:
    """Images with referring expressions and the boxes they mean."""

    source: ExpressionBoxSource
    """Where they come from."""
    batch: int = 160
    """Expressions per update, over all ranks."""


@dataclass(frozen=True, kw_only=True)
class BoxesData(MeasuredData):
    """Data. Relative paths of sources and tokenizer start at `root`."""

    train: BoxStream
    """Expressions with boxes."""
    val: ExpressionBoxSource | None = None
    """Expressions with boxes, located at the times of `evaluate`; null: never."""
    test: ExpressionBoxSource | None = None
    """Expressions with boxes, located once, by the selected model; null: none."""


@dataclass(frozen=True, kw_only=True)
class Boxes(FineTuning):
    """Grounding with boxes."""

    free: ClassVar[tuple[str, ...]] = (*FineTuning.free, "boxes")

    model: TaskModel
    """The model."""
    data: BoxesData
    """The data."""
    boxes: GroundingOptions = field(default_factory=GroundingOptions)
    """How expressions are located in evaluations."""

    def __post_init__(self) -> None:
        super().__post_init__()
        checks.squashes(self.data.view, "boxes")
