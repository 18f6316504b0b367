"""Visual question answering with an answer decoder.

Source: X-VLM specification 4.4 (dataset/vqa_dataset.py).
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from vlp_data.batch import VqaBatch
from vlp_data.concept_text import collate_concepts, sample_concepts
from vlp_data.errors import BadSample
from vlp_data.examples.base import Skipped, drawn_text, skipped, views
from vlp_data.options import ConceptOptions, ImageOptions, TextOptions
from vlp_data.schema import Source
from vlp_data.text import Encoded, Tokenizer, collate_ids, pre_question, text_ids


def answer_ids(tokenizer: Tokenizer, answers: Sequence[str]) -> Encoded:
    """Answers for the decoder, [CLS] tokens [SEP], neither cleaned nor cut, padded to the longest: ids and
    mask [A, L] int64."""
    return tokenizer.encode(answers, separator=True)


class VqaExample(NamedTuple):
    """One image with a question and its distinct answers."""

    key: str
    image: Tensor
    ids: list[int]
    answers: tuple[tuple[str, float], ...]
    concepts: list[int]


@dataclass(frozen=True, kw_only=True)
class VqaExamples:
    """Questions with answers to `VqaBatch`. `image.careful_flip` minds the question and all of its
    answers."""

    source: Source
    tokenizer: Tokenizer
    image: ImageOptions = field(default_factory=ImageOptions)
    text: TextOptions = field(default_factory=TextOptions)
    """Of the questions."""
    concepts: ConceptOptions | None = None
    """Read the concepts of the images; None leaves them out of the batch."""

    def __len__(self) -> int:
        return len(self.source)

    def example(self, index: int, rng: random.Random) -> VqaExample | Skipped:
        """Draws: view of the image, concepts."""
        sample = None
        try:
            sample = self.source[index]
            answers = sample.target.answers if sample.target is not None else ()
            if not answers:
                raise BadSample("no answer", sample.key, "the row has no answer to learn")
            question = drawn_text(sample, ("question",), rng)
            (view,) = views(sample, self.image, (question, *(text for text, _ in answers)), rng)
            ids = text_ids(question, self.tokenizer, self.text, clean=pre_question)
            concepts = sample_concepts(sample, self.tokenizer, self.concepts, rng)
            return VqaExample(sample.key, view, ids, answers, concepts)
        except BadSample as error:
            return skipped(error, sample, index)

    def collate(self, examples: Sequence[VqaExample], rng: random.Random) -> VqaBatch:
        """Stack and pad; draws nothing."""
        question, mask = collate_ids([example.ids for example in examples], self.tokenizer, self.text)
        answers = [(row, *answer) for row, example in enumerate(examples) for answer in example.answers]
        ids, answer_mask = answer_ids(self.tokenizer, [text for _, text, _ in answers])
        concepts = [example.concepts for example in examples]
        concept_ids, concept_mask = collate_concepts(concepts, self.tokenizer, self.concepts)
        return VqaBatch(
            keys=tuple(example.key for example in examples),
            image=torch.stack([example.image for example in examples]),
            question_ids=question,
            question_mask=mask,
            answer_ids=ids,
            answer_mask=answer_mask,
            answer_weights=torch.tensor([weight for _, _, weight in answers], dtype=torch.float32),
            question_index=torch.tensor([row for row, _, _ in answers]),
            concept_ids=concept_ids,
            concept_mask=concept_mask,
        )
