"""Captioning: with a caption to be written, or with references that a reward compares with.

Source: X-VLM specification 4.7 (dataset/captioning_dataset.py).
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from torch import Tensor

from vlp_data.batch import CaptionBatch, CaptionReferencesBatch
from vlp_data.errors import BadSample
from vlp_data.examples.base import ImageExamples, Seen, TextExamples, drawn_text
from vlp_data.options import TextOptions
from vlp_data.text import Tokenizer

IGNORED = -100
"""Label of what is not to be predicted."""


def prompt_ids(tokenizer: Tokenizer, prompt: str) -> list[int]:
    """The start token and the tokens of the prompt, what a caption begins with."""
    return [tokenizer.cls_id, *tokenizer.token_ids(prompt.rstrip(" "))]


class CaptionExample(NamedTuple):
    """One image with one caption."""

    key: str
    seen: Seen
    ids: list[int]


@dataclass(frozen=True, kw_only=True)
class CaptionExamples(TextExamples):
    """Rows with captions to `CaptionBatch`; one of several captions is drawn per visit."""

    prompt: str = ""
    """Words every caption begins with, with the blank after them: "a picture of " in fine-tuning, none in the
    domain stage."""
    text: TextOptions = field(default_factory=lambda: TextOptions(separator=True))
    """How captions become ids."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.text.separator:
            raise ValueError("separator=false: a model learns from the separator where captions end")
        start = len(prompt_ids(self.tokenizer, self.prompt))
        if self.text.max_tokens < start + 2:
            raise ValueError(
                f"max_tokens={self.text.max_tokens} leaves no room for a word after the {start} tokens "
                "of the prompt"
            )

    def example(self, index: int, rng: random.Random) -> CaptionExample:
        """Draws: caption, view of the image, concepts."""
        sample = self.source[index]
        caption = drawn_text(sample, ("caption",), rng)
        view, ids = self.view(sample, (caption,), rng), self.ids(caption, prompt=self.prompt)
        return CaptionExample(sample.key, Seen(view, self.words(sample, rng)), ids)

    def collate(self, examples: Sequence[CaptionExample], rng: random.Random) -> CaptionBatch:
        """Stack and pad; draws nothing."""
        ids, mask = self.pad([example.ids for example in examples])
        labels = ids.masked_fill(mask == 0, IGNORED)
        labels[:, : len(prompt_ids(self.tokenizer, self.prompt))] = IGNORED
        return CaptionBatch(**self.images(examples), text_ids=ids, attention_mask=mask, labels=labels)


class CaptionReferencesExample(NamedTuple):
    """One image with several captions."""

    key: str
    image: Tensor
    references: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class CaptionReferencesExamples(ImageExamples):
    """Rows that hold all captions of an image to `CaptionReferencesBatch` (`TaskJson.group_captions` joins
    rows of one caption each)."""

    references: int = 5
    """Captions drawn per image; all of them where there are fewer."""

    def __post_init__(self) -> None:
        if self.references <= 0:
            raise ValueError(f"references={self.references} must be positive")

    def example(self, index: int, rng: random.Random) -> CaptionReferencesExample:
        """Draws: captions, view of the image."""
        sample = self.source[index]
        captions = [text.text for text in sample.texts if text.role == "caption"]
        if not captions:
            raise BadSample("no caption", sample.key, "the row has no caption")
        drawn = tuple(rng.sample(captions, min(self.references, len(captions))))
        return CaptionReferencesExample(sample.key, self.view(sample, drawn, rng), drawn)

    def collate(
        self, examples: Sequence[CaptionReferencesExample], rng: random.Random
    ) -> CaptionReferencesBatch:
        """Stack; draws nothing."""
        image, padding = self.stack([example.image for example in examples])
        return CaptionReferencesBatch(
            keys=tuple(example.key for example in examples),
            image=image,
            padding=padding,
            references=tuple(example.references for example in examples),
        )
