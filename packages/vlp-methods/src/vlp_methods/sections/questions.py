"""Data sections of visual question answering. Imports no torch."""

from dataclasses import dataclass

from vlp_core.recipe import PathText
from vlp_data.options import QuestionSource
from vlp_eval.benchmarks.vqa import VqaFiles

from vlp_methods.sections.data import MeasuredData, SourceOptions


@dataclass(frozen=True, kw_only=True)
class QuestionSet:
    """Questions to be answered."""

    source: QuestionSource
    """Where they come from."""
    annotations: PathText = ""
    """What people answered, an annotations file of VQA v2; "" where the questions' rows say so, or nobody
    does."""


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
