"""Referring expressions with the box they mean.

Source: X-VLM specification 4.6 (dataset/grounding_dataset.py).
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from vlp_data import randaugment
from vlp_data.batch import BoxBatch
from vlp_data.concept_text import collate_concepts, sample_concepts
from vlp_data.errors import BadSample
from vlp_data.examples.base import Skipped, drawn_text, flips, opened, skipped
from vlp_data.options import ConceptOptions, ImageOptions, TextOptions
from vlp_data.regions import Box, crop_around, inside, target_box
from vlp_data.schema import Sample, Source
from vlp_data.text import Tokenizer, collate_ids, text_ids
from vlp_data.transforms import augmented, flip, normalise, resize


class BoxExample(NamedTuple):
    """One image with one expression. `box` is cx, cy, w, h in 0..1 of the model's input."""

    key: str
    image: Tensor
    ids: list[int]
    box: Box
    concepts: list[int]


@dataclass(frozen=True, kw_only=True)
class BoxExamples:
    """Expressions with boxes to `BoxBatch`.

    The crop is one that holds the whole box, and the augmentation that of boxes, which moves nothing; so
    `image.view` "resize" keeps the whole image and `image.min_scale` has no meaning here.
    """

    source: Source
    tokenizer: Tokenizer
    image: ImageOptions = field(default_factory=ImageOptions)
    text: TextOptions = field(default_factory=TextOptions)
    concepts: ConceptOptions | None = None
    """Read the concepts of the images; None leaves them out of the batch."""

    def __len__(self) -> int:
        return len(self.source)

    def example(self, index: int, rng: random.Random) -> BoxExample | Skipped:
        """Draws: crop, flip, RandAugment, concepts."""
        sample = None
        try:
            sample = self.source[index]
            x0, y0, x1, y1 = _target(sample)
            expression = drawn_text(sample, ("expression",), rng)
            ids = text_ids(expression, self.tokenizer, self.text)
            decoded = opened(sample, self.image)
            width, height = decoded.size
            box = (max(x0, 0.0), max(y0, 0.0), min(x1, width), min(y1, height))
            # REFER's boxes are rounded to hundredths and may stick out by less than a pixel.
            moved = max(abs(a - b) for a, b in zip(box, (x0, y0, x1, y1), strict=True))
            if moved >= 1 or not inside(box, width, height):
                raise BadSample(
                    "box outside the image",
                    sample.key,
                    f"box {(x0, y0, x1, y1)} (x0, y0, x1, y1) in an image of {width} x {height}",
                )
            x0, y0, x1, y1 = box
            crop = (0, 0, width, height)
            if self.image.view == "random_resized_crop":
                crop = crop_around(box, width, height, rng)
            view = decoded.crop(crop)
            left, right = x0 - crop[0], x1 - crop[0]
            if rng.random() < flips(self.image, (expression,)):
                view, left, right = flip(view), view.width - right, view.width - left
            size = self.image.size
            across, down = size / view.width, size / view.height
            seen = (left * across, (y0 - crop[1]) * down, (right - left) * across, (y1 - y0) * down)
            view = resize(view, size)
            image = (
                augmented(view, randaugment.BOX_OPERATIONS, rng) if self.image.augment else normalise(view)
            )
            concepts = sample_concepts(sample, self.tokenizer, self.concepts, rng)
            return BoxExample(sample.key, image, ids, target_box(seen, size=size), concepts)
        except BadSample as error:
            return skipped(error, sample, index)

    def collate(self, examples: Sequence[BoxExample], rng: random.Random) -> BoxBatch:
        """Stack and pad; draws nothing."""
        ids, mask = collate_ids([example.ids for example in examples], self.tokenizer, self.text)
        concepts = [example.concepts for example in examples]
        concept_ids, concept_mask = collate_concepts(concepts, self.tokenizer, self.concepts)
        return BoxBatch(
            keys=tuple(example.key for example in examples),
            image=torch.stack([example.image for example in examples]),
            text_ids=ids,
            attention_mask=mask,
            target_boxes=torch.tensor([example.box for example in examples], dtype=torch.float32),
            concept_ids=concept_ids,
            concept_mask=concept_mask,
        )


def _target(sample: Sample) -> Box:
    if sample.target is None or sample.target.box is None:
        raise BadSample("no box", sample.key, "the row has no box that the expression refers to")
    return sample.regions[sample.target.box].box
