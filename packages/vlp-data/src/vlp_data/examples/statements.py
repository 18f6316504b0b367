"""Sentences to be judged: about two images (NLVR2), or about one (visual entailment).

Source: X-VLM specification 4.5 (dataset/nlvr_dataset.py); ViCHA dataset/ve_dataset.py.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from vlp_data.batch import EntailmentBatch, NlvrBatch
from vlp_data.concept_text import collate_concepts, sample_concepts
from vlp_data.errors import BadSample
from vlp_data.examples.base import Skipped, drawn_text, skipped, views
from vlp_data.options import ConceptOptions, ImageOptions, TextOptions
from vlp_data.schema import Role, Source
from vlp_data.text import Tokenizer, collate_ids, text_ids


class StatementExample(NamedTuple):
    """One sentence with its images and its label."""

    key: str
    images: list[Tensor]
    ids: list[int]
    label: int
    concepts: list[list[int]]
    """Of each image."""


@dataclass(frozen=True, kw_only=True)
class NlvrExamples:
    """Sentences about two images to `NlvrBatch`; the views of the two images are drawn independently."""

    source: Source
    tokenizer: Tokenizer
    image: ImageOptions = field(default_factory=ImageOptions)
    text: TextOptions = field(default_factory=TextOptions)
    concepts: ConceptOptions | None = None
    """Read the concepts of the images; None leaves them out of the batch."""

    def __len__(self) -> int:
        return len(self.source)

    def example(self, index: int, rng: random.Random) -> StatementExample | Skipped:
        """Draws: view of the first image, view of the second, concepts of the first, concepts of the
        second."""
        return _example(self, index, rng, role="sentence", count=2)

    def collate(self, examples: Sequence[StatementExample], rng: random.Random) -> NlvrBatch:
        """Stack and pad; draws nothing."""
        ids, mask = collate_ids([example.ids for example in examples], self.tokenizer, self.text)
        sides = [[example.concepts[side] for example in examples] for side in (0, 1)]
        concept_ids, concept_mask = collate_concepts(sides[0], self.tokenizer, self.concepts)
        # Padded by themselves: the reference encodes the two sides apart, and the model sees padding.
        second_ids, second_mask = collate_concepts(sides[1], self.tokenizer, self.concepts)
        return NlvrBatch(
            keys=tuple(example.key for example in examples),
            image=torch.stack([example.images[side] for side in (0, 1) for example in examples]),
            text_ids=ids,
            attention_mask=mask,
            labels=torch.tensor([example.label for example in examples]),
            concept_ids=concept_ids,
            concept_mask=concept_mask,
            second_concept_ids=second_ids,
            second_concept_mask=second_mask,
        )


@dataclass(frozen=True, kw_only=True)
class EntailmentExamples:
    """Images with a hypothesis to `EntailmentBatch`."""

    source: Source
    tokenizer: Tokenizer
    image: ImageOptions = field(default_factory=ImageOptions)
    text: TextOptions = field(default_factory=TextOptions)
    concepts: ConceptOptions | None = None
    """Read the concepts of the images; None leaves them out of the batch."""

    def __len__(self) -> int:
        return len(self.source)

    def example(self, index: int, rng: random.Random) -> StatementExample | Skipped:
        """Draws: view of the image, concepts."""
        return _example(self, index, rng, role="hypothesis", count=1)

    def collate(self, examples: Sequence[StatementExample], rng: random.Random) -> EntailmentBatch:
        """Stack and pad; draws nothing."""
        ids, mask = collate_ids([example.ids for example in examples], self.tokenizer, self.text)
        concepts = [example.concepts[0] for example in examples]
        concept_ids, concept_mask = collate_concepts(concepts, self.tokenizer, self.concepts)
        return EntailmentBatch(
            keys=tuple(example.key for example in examples),
            image=torch.stack([example.images[0] for example in examples]),
            text_ids=ids,
            attention_mask=mask,
            labels=torch.tensor([example.label for example in examples]),
            concept_ids=concept_ids,
            concept_mask=concept_mask,
        )


def _example(
    options: NlvrExamples | EntailmentExamples, index: int, rng: random.Random, *, role: Role, count: int
) -> StatementExample | Skipped:
    sample = None
    try:
        sample = options.source[index]
        if sample.target is None or sample.target.label is None:
            raise BadSample("no label", sample.key, "the row has no label to learn")
        text = drawn_text(sample, (role,), rng)
        images = views(sample, options.image, (text,), rng, count=count)
        ids = text_ids(text, options.tokenizer, options.text)
        concepts = [
            sample_concepts(sample, options.tokenizer, options.concepts, rng, image=number)
            for number in range(count)
        ]
        return StatementExample(sample.key, images, ids, sample.target.label, concepts)
    except BadSample as error:
        return skipped(error, sample, index)
