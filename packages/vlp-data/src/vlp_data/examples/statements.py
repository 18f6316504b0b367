"""Sentences to be judged: about two images (NLVR2), or about one (visual entailment).

Source: X-VLM specification 4.5 (dataset/nlvr_dataset.py); ViCHA dataset/ve_dataset.py.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch

from vlp_data.batch import EntailmentBatch, NlvrBatch
from vlp_data.concept_text import collate_concepts
from vlp_data.errors import BadSample
from vlp_data.examples.base import Seen, TextExamples, drawn_text
from vlp_data.schema import Sample


def _label(sample: Sample) -> int:
    if sample.target is None or sample.target.label is None:
        raise BadSample("no label", sample.key, "the row has no label to learn")
    return sample.target.label


class NlvrExample(NamedTuple):
    """One sentence with its two images and its label."""

    key: str
    sides: tuple[Seen, Seen]
    ids: list[int]
    label: int


@dataclass(frozen=True, kw_only=True)
class NlvrExamples(TextExamples):
    """Sentences about two images to `NlvrBatch`; the views of the two images are drawn independently."""

    def example(self, index: int, rng: random.Random) -> NlvrExample:
        """Draws: view of the first image, view of the second, concepts of the first, concepts of the
        second."""
        sample = self.source[index]
        label, text = _label(sample), drawn_text(sample, ("sentence",), rng)
        left, right = (self.view(sample, (text,), rng, number=side) for side in (0, 1))
        ids = self.ids(text)
        first, second = (self.words(sample, rng, number=side) for side in (0, 1))
        return NlvrExample(sample.key, (Seen(left, first), Seen(right, second)), ids, label)

    def collate(self, examples: Sequence[NlvrExample], rng: random.Random) -> NlvrBatch:
        """Stack and pad; draws nothing."""
        ids, mask = self.pad([example.ids for example in examples])
        sides = [[example.sides[side] for example in examples] for side in (0, 1)]
        image, padding = self.stack([seen.image for side in sides for seen in side])
        # Padded by themselves: the reference encodes the two sides apart, and the model sees padding.
        first, second = (
            collate_concepts([seen.concepts for seen in side], self.tokenizer, self.concepts)
            for side in sides
        )
        return NlvrBatch(
            keys=tuple(example.key for example in examples),
            image=image,
            padding=padding,
            concepts=first,
            second_concepts=second,
            text_ids=ids,
            attention_mask=mask,
            labels=torch.tensor([example.label for example in examples]),
        )


class EntailmentExample(NamedTuple):
    """One image with a hypothesis and its label."""

    key: str
    seen: Seen
    ids: list[int]
    label: int


@dataclass(frozen=True, kw_only=True)
class EntailmentExamples(TextExamples):
    """Images with a hypothesis to `EntailmentBatch`."""

    def example(self, index: int, rng: random.Random) -> EntailmentExample:
        """Draws: view of the image, concepts."""
        sample = self.source[index]
        label, text = _label(sample), drawn_text(sample, ("hypothesis",), rng)
        view, ids = self.view(sample, (text,), rng), self.ids(text)
        return EntailmentExample(sample.key, Seen(view, self.words(sample, rng)), ids, label)

    def collate(self, examples: Sequence[EntailmentExample], rng: random.Random) -> EntailmentBatch:
        """Stack and pad; draws nothing."""
        ids, mask = self.pad([example.ids for example in examples])
        return EntailmentBatch(
            **self.images(examples),
            text_ids=ids,
            attention_mask=mask,
            labels=torch.tensor([example.label for example in examples]),
        )
