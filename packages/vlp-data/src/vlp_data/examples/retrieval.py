"""Retrieval and weakly supervised grounding: images with a text, and which texts belong to the same image."""

import hashlib
import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch

from vlp_data.batch import RetrievalBatch
from vlp_data.examples.base import Seen, TextExamples, drawn_text
from vlp_data.schema import Sample


class RetrievalExample(NamedTuple):
    """One image with one text."""

    key: str
    seen: Seen
    ids: list[int]
    image_id: int


@dataclass(frozen=True, kw_only=True)
class RetrievalExamples(TextExamples):
    """Rows with captions or referring expressions to `RetrievalBatch`; one of several is drawn per visit."""

    def example(self, index: int, rng: random.Random) -> RetrievalExample:
        """Draws: text, view of the image, concepts."""
        sample = self.source[index]
        text = drawn_text(sample, ("caption", "expression"), rng)
        view, ids = self.view(sample, (text,), rng), self.ids(text)
        return RetrievalExample(sample.key, Seen(view, self.words(sample, rng)), ids, image_number(sample))

    def collate(self, examples: Sequence[RetrievalExample], rng: random.Random) -> RetrievalBatch:
        """Stack and pad; draws nothing."""
        ids, mask = self.pad([example.ids for example in examples])
        return RetrievalBatch(
            **self.images(examples),
            text_ids=ids,
            attention_mask=mask,
            image_ids=torch.tensor([example.image_id for example in examples]),
        )


def image_number(sample: Sample) -> int:
    """A number that two samples share if they show the same image: a hash of the `image_id` that a task list
    states, else of the path, the id or, for lack of all, the sample's key. The same in every process and on
    every machine."""
    image = sample.images[0]
    stated = sample.meta.get("image_id")
    identity = next(str(name) for name in (stated, image.path, image.id, sample.key) if name is not None)
    return (
        int.from_bytes(
            hashlib.blake2b(identity.encode("utf-8", "surrogatepass"), digest_size=8).digest(), "big"
        )
        >> 1
    )
