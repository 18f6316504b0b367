"""Options of visual question answering. Imports no torch."""

from dataclasses import dataclass
from typing import Literal

from vlp_core.recipe import PathText

from vlp_eval.benchmarks.options import TextBenchmarkOptions, at_least, without_effect


@dataclass(frozen=True, kw_only=True)
class VqaFiles:
    """What belongs to questions beside their rows."""

    answers: PathText = ""
    """answer_list.json, the answers to choose from (mode=rank)."""
    annotations: PathText = ""
    """Annotations of VQA v2 (v2_mscoco_val2014_annotations.json), for accuracies per answer type; "" takes
    the answers of the rows."""


@dataclass(frozen=True, kw_only=True)
class VqaOptions(TextBenchmarkOptions):
    """How questions about images are answered and judged."""

    mode: Literal["rank", "generate", "classes"] = "rank"
    """rank: the most probable answer of a list. generate: the answer that beam search writes. classes: the
    most probable of the answer classes that the model was trained with."""
    candidates: int | None = None
    """mode=rank: answers, of those whose first word is most probable, that are scored in full; never more
    than there are. null: 128."""
    pair_batch: int | None = None
    """mode=rank: answers scored together. null: 1024."""
    beams: int | None = None
    """mode=generate: open answers per question. null: 3."""
    answer_tokens: int | None = None
    """mode=generate: longest answer in tokens, the start token included. null: 10."""
    rule: Literal["official", "albef"] = "official"
    """How answers are compared: as the challenge does, or as the copy in ALBEF, X-VLM and ViCHA (for their
    logs)."""
    clean: Literal["caption", "question", "none"] | None = None
    """Clean questions as the ALBEF family does questions or captions (lower case, no punctuation, first
    max_words words), or take them as they are; null: as the model was trained, where cleaned captions mean
    cleaned questions."""
    max_words: int | None = None
    """Words kept of a question by the clean-up; null: 50, as the published evaluations."""
    max_tokens: int | Literal["all"] | None = "all"
    """Tokens kept of a question; all keeps all, null: as the model was trained."""

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least(self, 1, "candidates", "pair_batch", "beams", null=True)
        at_least(self, 2, "answer_tokens", null=True)
        if self.mode != "rank":
            without_effect(self, ("candidates", "pair_batch"), f"mode={self.mode}")
        if self.mode != "generate":
            without_effect(self, ("beams", "answer_tokens"), f"mode={self.mode}")
