"""Data sections of tasks that several methods have. Imports no torch."""

from dataclasses import dataclass

from vlp_core.recipe import PathText
from vlp_data.options import ExpressionSource, ImageTextSource, Refer, TaskJson

from vlp_methods.parts.options import Data, ImageStream, QuestionSet


@dataclass(frozen=True, kw_only=True)
class RetrievalData(Data):
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

    source: TaskJson
    """Where they come from."""
    batch: int = 192
    """Questions per update, over all ranks."""


@dataclass(frozen=True, kw_only=True)
class VqaData(Data):
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


@dataclass(frozen=True, kw_only=True)
class CaptionedData(Data):
    """Data. Relative paths of sources and tokenizer start at `root`."""

    train: ImageStream
    """Images with captions."""


@dataclass(frozen=True, kw_only=True)
class SentenceStream:
    """Sentences about images."""

    source: TaskJson
    """Where they come from."""
    batch: int = 80
    """Sentences per update, over all ranks."""


@dataclass(frozen=True, kw_only=True)
class SentenceData(Data):
    """Data. Relative paths of sources and tokenizer start at `root`."""

    train: SentenceStream
    """Sentences with labels."""
    val: TaskJson | None = None
    """Sentences judged at the times of `evaluate`; null: never."""
    test: TaskJson | None = None
    """Sentences judged once, by the selected model; null: none."""


@dataclass(frozen=True, kw_only=True)
class ExpressionStream:
    """Images with referring expressions, without boxes."""

    source: ExpressionSource
    """Where they come from."""
    batch: int = 160
    """Expressions per update, over all ranks."""


@dataclass(frozen=True, kw_only=True)
class ExpressionData(Data):
    """Data. Relative paths of sources and tokenizer start at `root`."""

    train: ExpressionStream
    """Images with expressions."""
    val: Refer | None = None
    """Expressions with boxes and detections, located at the times of `evaluate`; null: never."""
    test: Refer | None = None
    """Expressions with boxes and detections, located once, by the selected model; null: none."""
