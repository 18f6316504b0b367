"""Visual question answering with an answer decoder.

Source: X-VLM specification 4.4 (dataset/vqa_dataset.py).
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch

from vlp_data.batch import VqaBatch
from vlp_data.errors import BadSample
from vlp_data.examples.base import Seen, TextExamples, drawn_text
from vlp_data.text import Encoded, Tokenizer


def answer_ids(tokenizer: Tokenizer, answers: Sequence[str]) -> Encoded:
    """Answers for the decoder, start token, words, end token, neither cleaned nor cut, padded to the longest:
    ids and mask [A, L] int64."""
    return tokenizer.encode(answers, separator=True)


class VqaExample(NamedTuple):
    """One image with a question and its distinct answers."""

    key: str
    seen: Seen
    ids: list[int]
    answers: tuple[tuple[str, float], ...]


@dataclass(frozen=True, kw_only=True)
class VqaExamples(TextExamples):
    """Questions with answers to `VqaBatch`. `text` is how questions are read; `image.careful_flip` minds the
    question and all of its answers."""

    def __post_init__(self) -> None:
        super().__post_init__()
        _ = self.tokenizer.sep_id  # answers end with it

    def example(self, index: int, rng: random.Random) -> VqaExample:
        """Draws: view of the image, concepts."""
        sample = self.source[index]
        answers = sample.target.answers if sample.target is not None else ()
        if not answers:
            raise BadSample("no answer", sample.key, "the row has no answer to learn")
        question = drawn_text(sample, ("question",), rng)
        view = self.view(sample, (question, *(text for text, _ in answers)), rng)
        ids = self.ids(question, clean="question")
        return VqaExample(sample.key, Seen(view, self.words(sample, rng)), ids, answers)

    def collate(self, examples: Sequence[VqaExample], rng: random.Random) -> VqaBatch:
        """Stack and pad; draws nothing."""
        question, mask = self.pad([example.ids for example in examples])
        answers = [(row, *answer) for row, example in enumerate(examples) for answer in example.answers]
        ids, answer_mask = answer_ids(self.tokenizer, [text for _, text, _ in answers])
        return VqaBatch(
            **self.images(examples),
            question_ids=question,
            question_mask=mask,
            answer_ids=ids,
            answer_mask=answer_mask,
            answer_weights=torch.tensor([weight for _, _, weight in answers], dtype=torch.float32),
            question_index=torch.tensor([row for row, _, _ in answers]),
        )
