"""Recipe of X-VLM visual question answering. Imports no torch."""

from dataclasses import dataclass, field

from vlp_core.recipe import PathText
from vlp_data.options import TaskJson

from vlp_methods.engine.options import Training
from vlp_methods.parts import checks, options
from vlp_methods.xvlm.schema.finetune import Model


@dataclass(frozen=True, kw_only=True)
class QuestionStream:
    """Pictures with questions and answers."""

    source: TaskJson
    """Where they come from."""
    batch: int = 192
    """Questions per update, over all ranks."""


@dataclass(frozen=True, kw_only=True)
class Data(options.Data):
    """Data. Relative paths of sources, tokenizer and candidates start at `root`."""

    train: QuestionStream
    """Questions with answers."""
    candidates: PathText = ""
    """JSON list of the answers that evaluations choose among (answer_list.json); needed to rank them."""
    val: options.QuestionSet | None = None
    """Questions with answers, answered at the times of `evaluate`; null: never."""
    test: options.QuestionSet | None = None
    """Questions answered once, with the selected model; null: none. Where nobody's answers are known there is no accuracy, only the file of
    predictions for the challenge's server."""


@dataclass(frozen=True, kw_only=True)
class Vqa(Training):
    """X-VLM visual question answering."""

    model: Model
    """The model."""
    data: Data
    """The data."""
    answers: options.RankedAnswers | options.WrittenAnswers = field(default_factory=options.RankedAnswers)
    """How questions are answered in evaluations."""

    def __post_init__(self) -> None:
        super().__post_init__()
        checks.fits(self.model, self.data)
        checks.selects(self.evaluate, split="val", present=self.data.val is not None)
        if bool(self.data.candidates) != (self.answers.mode == "rank"):
            raise ValueError(
                "data.candidates belongs to answers.mode=rank: give a file of answers, or choose answers.mode=generate"
            )
