"""What a recipe says of its data: where it is, how it is read, and the streams of tasks that several methods
have. Imports no torch."""

from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

from vlp_core.recipe import PathText
from vlp_data.options import (
    ConceptOptions,
    ExpressionBoxSource,
    ExpressionSource,
    HypothesisSource,
    ImageTextSource,
    QuestionSource,
    RegionOptions,
    RegionSource,
    SentenceSource,
    Squash,
    TextOptions,
    TokenizerFiles,
    View,
)
from vlp_data.schema import Source
from vlp_eval.benchmarks.vqa import VqaFiles


class SourceOptions(Protocol):
    """Options of a data format."""

    def open(self) -> Source:
        """The rows."""
        ...


@dataclass(frozen=True, kw_only=True)
class ShapesWorld:
    """Images drawn from a seed (`vlp_data.shapes`), made on first use."""

    images: int = 2000
    """Scenes of all splits together."""
    seed: int = 0
    """The world."""
    size: int = 96
    """Side of the images in pixels."""
    val: int | None = None
    """Scenes kept for validation; null: a tenth."""
    test: int | None = None
    """Scenes kept for test; null: a tenth."""
    difficulty: Literal["full", "easy"] = "full"
    """Easy scenes have few things, each in a field of its own, of fewer kinds and colours: for models that
    have minutes to learn."""


@dataclass(frozen=True, kw_only=True)
class ImageStream:
    """Images with captions; one update of every step."""

    source: ImageTextSource
    """Where they come from."""
    batch: int = 1024
    """Images per update, over all ranks."""


@dataclass(frozen=True, kw_only=True)
class RegionStream:
    """Regions and objects with their texts."""

    source: RegionSource
    """Where they come from."""
    texts: int = 1024
    """(region, text) pairs per update, over all ranks; always exactly this many."""
    images: int = 384
    """Images that these pairs are drawn from, over all ranks."""
    options: RegionOptions = field(default_factory=RegionOptions)
    """How regions are drawn from an image."""


@dataclass(frozen=True, kw_only=True)
class Data:
    """Data. Relative paths of sources, tokenizer and other files start at `root`."""

    world: ShapesWorld | None = None
    """Draw the shapes world into `root` if it is not there yet; null for data of your own."""
    root: PathText = ""
    """Folder or fsspec URL; "" with a world: a folder of the user's cache (XDG_CACHE_HOME)."""
    tokenizer: TokenizerFiles | None = None
    """Vocabulary; null: for a method without texts."""
    view: View = field(default_factory=Squash)
    """What the model sees of an image."""
    text: TextOptions = field(default_factory=TextOptions)
    """From text to ids."""
    concepts: ConceptOptions | None = None
    """How the concepts of the images are read, for a model with `model.concepts`; null: not at all."""
    max_bad_fraction: float = 0.01
    """Stop when a larger share of the samples cannot be used."""


@dataclass(frozen=True, kw_only=True)
class TestedData(Data):
    """Data with some to be measured on."""

    test: Any | None = None
    """Data to be measured on; null: there is none."""

    def rows(self, split: str) -> SourceOptions | None:
        """The rows that a split is measured on, None where there are none."""
        found: SourceOptions | None = getattr(self, split)
        return found

    def files(self, split: str) -> Any | None:
        """What belongs to these rows beside them, as the benchmark's class of files; None: nothing."""


@dataclass(frozen=True, kw_only=True)
class MeasuredData(TestedData):
    """Data of a fine-tuning: what it is trained on, and what it is measured on."""

    val: Any | None = None
    """Measured at the times of `evaluate`; null: never."""
    test: Any | None = None
    """Measured once, with the selected model; null: not at all."""


@dataclass(frozen=True, kw_only=True)
class QuestionSet:
    """Questions to be answered."""

    source: QuestionSource
    """Where they come from."""
    annotations: PathText = ""
    """What people answered, an annotations file of VQA v2; "" where the questions' rows say so, or nobody
    does."""


@dataclass(frozen=True, kw_only=True)
class RetrievalData(MeasuredData):
    """Data. Relative paths of sources and tokenizer start at `root`."""

    train: ImageStream
    """Images with captions."""
    val: ImageTextSource | None = None
    """Retrieval among these is measured at the times of `evaluate`; null: never."""
    test: ImageTextSource | None = None
    """Retrieval among these is measured once, with the selected model; null: not at all."""


@dataclass(frozen=True, kw_only=True)
class QuestionStream:
    """Images with questions and answers."""

    source: QuestionSource
    """Where they come from."""
    batch: int = 192
    """Questions per update, over all ranks."""


@dataclass(frozen=True, kw_only=True)
class VqaData(MeasuredData):
    """Data. Relative paths of sources, tokenizer and candidates start at `root`."""

    train: QuestionStream
    """Questions with answers."""
    candidates: PathText = ""
    """JSON list of the answers that evaluations choose among (answer_list.json); needed to rank them."""
    val: QuestionSet | None = None
    """Questions with answers, answered at the times of `evaluate`; null: never."""
    test: QuestionSet | None = None
    """Questions answered once, with the selected model; null: none. Where nobody's answers are known there is
    no accuracy, only the file of predictions for the challenge's server."""

    def rows(self, split: str) -> SourceOptions | None:
        asked: QuestionSet | None = getattr(self, split)
        return None if asked is None else asked.source

    def files(self, split: str) -> VqaFiles:
        return VqaFiles(answers=self.candidates, annotations=getattr(self, split).annotations)


@dataclass(frozen=True, kw_only=True)
class CaptionedData(Data):
    """Data. Relative paths of sources and tokenizer start at `root`."""

    train: ImageStream
    """Images with captions."""


@dataclass(frozen=True, kw_only=True)
class SentenceStream:
    """Sentences about two images each."""

    source: SentenceSource
    """Where they come from."""
    batch: int = 80
    """Sentences per update, over all ranks."""


@dataclass(frozen=True, kw_only=True)
class SentenceData(MeasuredData):
    """Data. Relative paths of sources and tokenizer start at `root`."""

    train: SentenceStream
    """Sentences with labels."""
    val: SentenceSource | None = None
    """Sentences judged at the times of `evaluate`; null: never."""
    test: SentenceSource | None = None
    """Sentences judged once, by the selected model; null: none."""


@dataclass(frozen=True, kw_only=True)
class HypothesisStream:
    """Images with a hypothesis each."""

    source: HypothesisSource
    """Where they come from."""
    batch: int = 80
    """Hypotheses per update, over all ranks."""


@dataclass(frozen=True, kw_only=True)
class HypothesisData(MeasuredData):
    """Data. Relative paths of sources and tokenizer start at `root`."""

    train: HypothesisStream
    """Hypotheses with labels."""
    val: HypothesisSource | None = None
    """Hypotheses judged at the times of `evaluate`; null: never."""
    test: HypothesisSource | None = None
    """Hypotheses judged once, by the selected model; null: none."""


@dataclass(frozen=True, kw_only=True)
class ExpressionStream:
    """Images with referring expressions, without boxes."""

    source: ExpressionSource
    """Where they come from."""
    batch: int = 160
    """Expressions per update, over all ranks."""


@dataclass(frozen=True, kw_only=True)
class ExpressionData(MeasuredData):
    """Data. Relative paths of sources and tokenizer start at `root`."""

    train: ExpressionStream
    """Images with expressions."""
    val: ExpressionBoxSource | None = None
    """Expressions with boxes and detections, located at the times of `evaluate`; null: never."""
    test: ExpressionBoxSource | None = None
    """Expressions with boxes and detections, located once, by the selected model; null: none."""
