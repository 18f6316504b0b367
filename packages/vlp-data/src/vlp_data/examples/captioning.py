"""Captioning: with a caption to be written, or with references that a reward compares with.

Source: X-VLM specification 4.7 (dataset/captioning_dataset.py).
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from vlp_data.batch import CaptionBatch, CaptionReferencesBatch
from vlp_data.concept_text import collate_concepts, sample_concepts
from vlp_data.errors import BadSample
from vlp_data.examples.base import Skipped, drawn_text, skipped, views
from vlp_data.options import ConceptOptions, ImageOptions, TextOptions
from vlp_data.schema import Source
from vlp_data.text import Tokenizer, collate_ids, text_ids

IGNORED = -100
"""Label of what is not to be predicted."""


def prompt_ids(tokenizer: Tokenizer, prompt: str) -> list[int]:
    """[CLS] and the tokens of the prompt, what a caption begins with."""
    return [tokenizer.cls_id, *tokenizer.token_ids(prompt.rstrip(" "))]


class CaptionExample(NamedTuple):
    """One image with one caption."""

    key: str
    image: Tensor
    ids: list[int]
    concepts: list[int]


@dataclass(frozen=True, kw_only=True)
class CaptionExamples:
    """Rows with captions to `CaptionBatch`; one of several captions is drawn per visit."""

    source: Source
    tokenizer: Tokenizer
    prompt: str = ""
    """Words every caption begins with, with the blank after them: "a picture of " in fine-tuning, none in the
    domain stage."""
    image: ImageOptions = field(default_factory=ImageOptions)
    text: TextOptions = field(default_factory=lambda: TextOptions(separator=True))
    concepts: ConceptOptions | None = None
    """Read the concepts of the images; None leaves them out of the batch."""

    def __post_init__(self) -> None:
        if not self.text.separator:
            raise ValueError("separator=false: a model learns from the separator where captions end")
        start = len(prompt_ids(self.tokenizer, self.prompt))
        if self.text.max_tokens < start + 2:
            raise ValueError(
                f"max_tokens={self.text.max_tokens} leaves no room for a word after the {start} tokens of the prompt"
            )

    def __len__(self) -> int:
        return len(self.source)

    def example(self, index: int, rng: random.Random) -> CaptionExample | Skipped:
        """Draws: caption, view of the image, concepts."""
        sample = None
        try:
            sample = self.source[index]
            caption = drawn_text(sample, ("caption",), rng)
            (view,) = views(sample, self.image, (caption,), rng)
            ids = text_ids(caption, self.tokenizer, self.text, prompt=self.prompt)
            concepts = sample_concepts(sample, self.tokenizer, self.concepts, rng)
            return CaptionExample(sample.key, view, ids, concepts)
        except BadSample as error:
            return skipped(error, sample, index)

    def collate(self, examples: Sequence[CaptionExample], rng: random.Random) -> CaptionBatch:
        """Stack and pad; draws nothing."""
        ids, mask = collate_ids([example.ids for example in examples], self.tokenizer, self.text)
        labels = ids.masked_fill(mask == 0, IGNORED)
        labels[:, : len(prompt_ids(self.tokenizer, self.prompt))] = IGNORED
        concepts = [example.concepts for example in examples]
        concept_ids, concept_mask = collate_concepts(concepts, self.tokenizer, self.concepts)
        return CaptionBatch(
            keys=tuple(example.key for example in examples),
            image=torch.stack([example.image for example in examples]),
            text_ids=ids,
            attention_mask=mask,
            labels=labels,
            concept_ids=concept_ids,
            concept_mask=concept_mask,
        )


class CaptionReferencesExample(NamedTuple):
    """One image with several captions."""

    key: str
    image: Tensor
    references: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class CaptionReferencesExamples:
    """Rows that hold all captions of an image to `CaptionReferencesBatch` (`TaskJson.group_captions` joins
    rows of one caption each)."""

    source: Source
    references: int = 5
    """Captions drawn per image; all of them where there are fewer."""
    image: ImageOptions = field(default_factory=ImageOptions)

    def __post_init__(self) -> None:
        if self.references <= 0:
            raise ValueError(f"references={self.references} must be positive")

    def __len__(self) -> int:
        return len(self.source)

    def example(self, index: int, rng: random.Random) -> CaptionReferencesExample | Skipped:
        """Draws: captions, view of the image."""
        sample = None
        try:
            sample = self.source[index]
            captions = [text.text for text in sample.texts if text.role == "caption"]
            if not captions:
                raise BadSample("no caption", sample.key, "the row has no caption")
            drawn = tuple(rng.sample(captions, min(self.references, len(captions))))
            (view,) = views(sample, self.image, drawn, rng)
            return CaptionReferencesExample(sample.key, view, drawn)
        except BadSample as error:
            return skipped(error, sample, index)

    def collate(
        self, examples: Sequence[CaptionReferencesExample], rng: random.Random
    ) -> CaptionReferencesBatch:
        """Stack; draws nothing."""
        return CaptionReferencesBatch(
            keys=tuple(example.key for example in examples),
            image=torch.stack([example.image for example in examples]),
            references=tuple(example.references for example in examples),
        )
