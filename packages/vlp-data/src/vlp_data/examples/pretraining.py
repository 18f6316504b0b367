"""Pre-training: images with a masked caption, and regions with masked texts."""

import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from vlp_data.batch import ImageTextBatch, RegionBatch
from vlp_data.concept_text import collate_concepts, sample_concepts
from vlp_data.errors import BadSample
from vlp_data.examples.base import Skipped, drawn_text, opened, skipped, views
from vlp_data.options import ConceptOptions, ImageOptions, Masking, MaskingOptions, RegionOptions, TextOptions
from vlp_data.regions import RegionExample, collate_regions, sample_regions
from vlp_data.schema import Source
from vlp_data.text import MaskedText, Tokenizer, collate_masked, masked_text


class ImageTextExample(NamedTuple):
    """One image with one caption."""

    key: str
    image: Tensor
    text: MaskedText
    concepts: list[int]


@dataclass(frozen=True, kw_only=True)
class ImageTextExamples:
    """Rows with captions to `ImageTextBatch`; one of several captions is drawn per visit."""

    source: Source
    tokenizer: Tokenizer
    image: ImageOptions = field(default_factory=ImageOptions)
    text: TextOptions = field(default_factory=TextOptions)
    masking: Masking = field(default_factory=MaskingOptions)
    concepts: ConceptOptions | None = None
    """Read the concepts of the images; None leaves them out of the batch."""

    def __len__(self) -> int:
        return len(self.source)

    def example(self, index: int, rng: random.Random) -> ImageTextExample | Skipped:
        """Draws: caption, view of the image, masking, concepts."""
        sample = None
        try:
            sample = self.source[index]
            caption = drawn_text(sample, ("caption",), rng)
            (view,) = views(sample, self.image, (caption,), rng)
            text = masked_text(caption, self.tokenizer, self.text, self.masking, rng)
            concepts = sample_concepts(sample, self.tokenizer, self.concepts, rng)
            return ImageTextExample(sample.key, view, text, concepts)
        except BadSample as error:
            return skipped(error, sample, index)

    def collate(self, examples: Sequence[ImageTextExample], rng: random.Random) -> ImageTextBatch:
        """Stack and pad; draws nothing."""
        texts = collate_masked([e.text for e in examples], self.tokenizer, self.text, self.masking)
        concepts = [example.concepts for example in examples]
        concept_ids, concept_mask = collate_concepts(concepts, self.tokenizer, self.concepts)
        return ImageTextBatch(
            keys=tuple(example.key for example in examples),
            image=torch.stack([example.image for example in examples]),
            **texts._asdict(),
            concept_ids=concept_ids,
            concept_mask=concept_mask,
        )


@dataclass(frozen=True, kw_only=True)
class RegionExamples:
    """Rows with boxes to `RegionBatch`. Of `image` only `size`, `augment`, `truncated` and `max_pixels` have
    a meaning here; the crop and the flip follow `vlp_data.regions` and `RegionOptions`."""

    source: Source
    tokenizer: Tokenizer
    batch_texts: int
    """(region, text) pairs of one rank's batch; always exactly this many."""
    patch_size: int
    """Side in pixels of the square that one image token stands for (the encoder's total stride)."""
    image: ImageOptions = field(default_factory=ImageOptions)
    text: TextOptions = field(default_factory=TextOptions)
    masking: Masking = field(default_factory=MaskingOptions)
    regions: RegionOptions = field(default_factory=RegionOptions)
    concepts: ConceptOptions | None = None
    """Read the concepts of the images; None leaves them out of the batch."""

    def __post_init__(self) -> None:
        if self.batch_texts <= 0:
            raise ValueError(f"batch_texts={self.batch_texts} must be positive")
        if self.patch_size <= 0 or self.image.size % self.patch_size:
            raise ValueError(
                f"image size {self.image.size} must be a multiple of patch_size={self.patch_size}"
            )

    def __len__(self) -> int:
        return len(self.source)

    def example(self, index: int, rng: random.Random) -> RegionExample | Skipped:
        """Draws as `sample_regions`, then concepts."""
        sample = None
        try:
            sample = self.source[index]
            example = sample_regions(
                sample,
                opened(sample, self.image),
                self.tokenizer,
                rng,
                size=self.image.size,
                text=self.text,
                masking=self.masking,
                regions=self.regions,
                augment=self.image.augment,
            )
            return example._replace(concepts=sample_concepts(sample, self.tokenizer, self.concepts, rng))
        except BadSample as error:
            return skipped(error, sample, index)

    def collate(self, examples: Sequence[RegionExample], rng: random.Random) -> RegionBatch:
        """Draws which pairs are kept or repeated."""
        return collate_regions(
            examples,
            self.tokenizer,
            rng,
            size=self.image.size,
            text=self.text,
            masking=self.masking,
            batch_texts=self.batch_texts,
            patch_size=self.patch_size,
            concepts=self.concepts,
        )
