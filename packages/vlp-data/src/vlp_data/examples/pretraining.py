"""Pre-training: images with a masked caption, and regions with masked texts."""

import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from vlp_data.batch import ImageTextBatch, RegionBatch
from vlp_data.examples.base import Seen, TextExamples, drawn_text, opened, require_squash
from vlp_data.options import IndependentMasking, Masking, MaskingOptions, RegionOptions, Squash
from vlp_data.regions import RegionExample, collate_regions, sample_regions
from vlp_data.text import MaskedText, collate_masked, masked_text


@dataclass(frozen=True, kw_only=True)
class MaskedExamples(TextExamples):
    """Rows whose texts are masked."""

    masking: Masking = field(default_factory=MaskingOptions)
    """What is masked."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.tokenizer.require_mask()
        if not isinstance(self.masking, IndependentMasking) and self.masking.whole_words:
            # Refuses a vocabulary that does not tell where words begin, before the first row is read.
            self.tokenizer.continues([self.tokenizer.cls_id])


class ImageTextExample(NamedTuple):
    """One image with one caption."""

    key: str
    seen: Seen
    text: MaskedText


@dataclass(frozen=True, kw_only=True)
class ImageTextExamples(MaskedExamples):
    """Rows with captions to `ImageTextBatch`; one of several captions is drawn per visit."""

    def example(self, index: int, rng: random.Random) -> ImageTextExample:
        """Draws: caption, view of the image, masking, concepts."""
        sample = self.source[index]
        caption = drawn_text(sample, ("caption",), rng)
        view = self.view(sample, (caption,), rng)
        text = masked_text(caption, self.tokenizer, self.text, self.masking, rng)
        return ImageTextExample(sample.key, Seen(view, self.words(sample, rng)), text)

    def collate(self, examples: Sequence[ImageTextExample], rng: random.Random) -> ImageTextBatch:
        """Stack and pad; draws nothing."""
        texts = collate_masked([e.text for e in examples], self.tokenizer, self.text, self.masking)
        return ImageTextBatch(**self.images(examples), **texts._asdict())


@dataclass(frozen=True, kw_only=True)
class RegionExamples(MaskedExamples):
    """Rows with boxes to `RegionBatch`. Of `image` neither the crop nor the flip has a meaning here; they
    follow `vlp_data.regions` and `RegionOptions`."""

    batch_texts: int
    """(region, text) pairs of one rank's batch; always exactly this many."""
    patch_size: int
    """Side in pixels of the square that one image token stands for (the encoder's total stride)."""
    image: Squash = field(default_factory=Squash)
    """What the model sees of an image."""
    regions: RegionOptions = field(default_factory=RegionOptions)
    """How pairs are drawn from an image."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require_squash(self.image)
        if self.batch_texts <= 0:
            raise ValueError(f"batch_texts={self.batch_texts} must be positive")
        if self.patch_size <= 0 or self.image.size % self.patch_size:
            raise ValueError(
                f"image size {self.image.size} must be a multiple of patch_size={self.patch_size}"
            )

    def example(self, index: int, rng: random.Random) -> RegionExample:
        """Draws as `sample_regions`, then concepts."""
        sample = self.source[index]
        example = sample_regions(
            sample,
            opened(sample, self.image),
            self.tokenizer,
            rng,
            image=self.image,
            text=self.text,
            masking=self.masking,
            regions=self.regions,
        )
        return example._replace(concepts=self.words(sample, rng))

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
