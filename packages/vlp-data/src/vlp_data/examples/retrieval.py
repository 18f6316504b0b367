"""Retrieval and weakly supervised grounding: images with a text, and which texts belong to the same image."""

import hashlib
import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from vlp_data.batch import RetrievalBatch
from vlp_data.concept_text import collate_concepts, sample_concepts
from vlp_data.errors import BadSample
from vlp_data.examples.base import Skipped, drawn_text, skipped, views
from vlp_data.options import ConceptOptions, ImageOptions, TextOptions
from vlp_data.schema import Sample, Source
from vlp_data.text import Tokenizer, collate_ids, text_ids


class RetrievalExample(NamedTuple):
    """One image with one text."""

    key: str
    image: Tensor
    ids: list[int]
    image_id: int
    concepts: list[int]


@dataclass(frozen=True, kw_only=True)
class RetrievalExamples:
    """Rows with captions or referring expressions to `RetrievalBatch`; one of several is drawn per visit."""

    source: Source
    tokenizer: Tokenizer
    image: ImageOptions = field(default_factory=ImageOptions)
    text: TextOptions = field(default_factory=TextOptions)
    concepts: ConceptOptions | None = None
    """Read the concepts of the images; None leaves them out of the batch."""

    def __len__(self) -> int:
        return len(self.source)

    def example(self, index: int, rng: random.Random) -> RetrievalExample | Skipped:
        """Draws: text, view of the image, concepts."""
        sample = None
        try:
            sample = self.source[index]
            text = drawn_text(sample, ("caption", "expression"), rng)
            (view,) = views(sample, self.image, (text,), rng)
            ids = text_ids(text, self.tokenizer, self.text)
            concepts = sample_concepts(sample, self.tokenizer, self.concepts, rng)
            return RetrievalExample(sample.key, view, ids, image_number(sample), concepts)
        except BadSample as error:
            return skipped(error, sample, index)

    def collate(self, examples: Sequence[RetrievalExample], rng: random.Random) -> RetrievalBatch:
        """Stack and pad; draws nothing."""
        ids, mask = collate_ids([example.ids for example in examples], self.tokenizer, self.text)
        concepts = [example.concepts for example in examples]
        concept_ids, concept_mask = collate_concepts(concepts, self.tokenizer, self.concepts)
        return RetrievalBatch(
            keys=tuple(example.key for example in examples),
            image=torch.stack([example.image for example in examples]),
            text_ids=ids,
            attention_mask=mask,
            image_ids=torch.tensor([example.image_id for example in examples]),
            concept_ids=concept_ids,
            concept_mask=concept_mask,
        )


def image_number(sample: Sample) -> int:
    """A number that two samples share if they show the same image: a hash of the `image_id` that a task list
    states, else of the path, the id or, for lack of all, the sample's key. The same in every process and on
    every machine."""
    image = sample.images[0]
    stated = sample.meta.get("image_id")
    identity = next(str(name) for name in (stated, image.path, image.id, sample.key) if name is not None)
    return int.from_bytes(hashlib.blake2b(identity.encode(), digest_size=8).digest(), "big") >> 1
