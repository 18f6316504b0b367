"""Recipes of X-VLM for captions: domain pre-training, fine-tuning, self-critical training. Imports no
torch."""

from dataclasses import dataclass, field
from typing import ClassVar, Literal

from vlp_data.options import ImageTextSource
from vlp_eval.benchmarks.captioning import CaptioningOptions

from vlp_methods.sections import checks
from vlp_methods.sections.captions import CaptionedData, ImageStream
from vlp_methods.sections.data import MeasuredData
from vlp_methods.sections.models import TaskModel
from vlp_methods.sections.training import FineTuning, StartedTraining


@dataclass(frozen=True, kw_only=True)
class CaptioningDomain(StartedTraining):
    """Domain pre-training for captions: the whole text encoder becomes a causal language model."""

    model: TaskModel
    """The model."""
    data: CaptionedData
    """The data."""

    def __post_init__(self) -> None:
        super().__post_init__()
        checks.ends_texts(self.data.text)


@dataclass(frozen=True, kw_only=True)
class PromptedData(MeasuredData):
    """What fine-tuning and self-critical training have in common."""

    prompt: str = "a picture of "
    """Words that every caption begins with, with the blank after them; they are given, not learnt."""
    val: ImageTextSource | None = None
    """Images with captions, described at the times of `evaluate`; null: never."""
    test: ImageTextSource | None = None
    """Images with captions, described once, by the selected model; null: none."""


@dataclass(frozen=True, kw_only=True)
class Data(PromptedData):
    """Data. Relative paths of sources and tokenizer start at `root`."""

    train: ImageStream
    """Images with captions."""


@dataclass(frozen=True, kw_only=True)
class Captioning(FineTuning):
    """Fine-tuning on captions."""

    free: ClassVar[tuple[str, ...]] = (*FineTuning.free, "captions")

    model: TaskModel
    """The model."""
    data: Data
    """The data."""
    smoothing: float = 0.1
    """Label smoothing: mass taken from the gold token."""
    captions: CaptioningOptions = field(default_factory=CaptioningOptions)
    """How captions are written in evaluations."""

    def __post_init__(self) -> None:
        super().__post_init__()
        checks.ends_texts(self.data.text)
        if not 0 <= self.smoothing < 1:
            raise ValueError(f"smoothing={self.smoothing} must lie in [0, 1)")


@dataclass(frozen=True, kw_only=True)
class Reward:
    """How captions are drawn and rewarded."""

    samples: int = 5
    """Captions drawn per image."""
    references: int = 5
    """Captions of people, drawn per image, that a drawn one is compared with."""
    baseline: Literal["greedy", "samples"] = "greedy"
    """Subtracted from the reward: that of the greedy caption, or the mean of the other samples."""
    temperature: float = 1.0
    """Of the distribution that captions are drawn from."""
    max_tokens: int = 20
    """Longest caption, prompt included."""

    def __post_init__(self) -> None:
        if self.samples < (2 if self.baseline == "samples" else 1) or self.references < 1:
            raise ValueError(
                f"samples={self.samples} and references={self.references} must be at least 1; "
                "baseline=samples needs 2 samples"
            )
        if not self.temperature > 0:
            raise ValueError(f"temperature={self.temperature} must be positive")


@dataclass(frozen=True, kw_only=True)
class ReferenceStream:
    """Images with all their captions in one row."""

    source: ImageTextSource
    """Where they come from."""
    batch: int = 64
    """Images per update, over all ranks."""


@dataclass(frozen=True, kw_only=True)
class ScstData(PromptedData):
    """Data. Relative paths of sources and tokenizer start at `root`."""

    train: ReferenceStream
    """Images with all their captions. Document frequencies of the reward are counted over them."""


@dataclass(frozen=True, kw_only=True)
class CaptioningScst(FineTuning):
    """Self-critical training on CIDEr-D."""

    free: ClassVar[tuple[str, ...]] = (*FineTuning.free, "captions")

    model: TaskModel
    """The model."""
    data: ScstData
    """The data."""
    reward: Reward = field(default_factory=Reward)
    """How captions are drawn and rewarded."""
    captions: CaptioningOptions = field(default_factory=CaptioningOptions)
    """How captions are written in evaluations."""

    def __post_init__(self) -> None:
        super().__post_init__()
        checks.ends_texts(self.data.text)
