"""Referring expressions with the box they mean.

Source: X-VLM specification 4.6 (dataset/grounding_dataset.py).
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from PIL import Image as Pillow

from vlp_data import randaugment
from vlp_data.batch import BoxBatch
from vlp_data.boxes import fault, fitted
from vlp_data.errors import BadSample
from vlp_data.examples.base import Seen, TextExamples, drawn_text, opened, require_squash
from vlp_data.options import Squash
from vlp_data.regions import Box, crop_around, inside, target_box
from vlp_data.schema import Sample
from vlp_data.transforms import flip, resize


class BoxExample(NamedTuple):
    """One image with one expression. `box` is cx, cy, w, h in 0..1 of the model's input."""

    key: str
    seen: Seen
    ids: list[int]
    box: Box


@dataclass(frozen=True, kw_only=True)
class BoxExamples(TextExamples):
    """Expressions with boxes to `BoxBatch`.

    The crop is one that holds the whole box, and the augmentation that of boxes, which moves nothing; so
    `image.crop` "none" keeps the whole image and `image.min_scale` has no meaning here.
    """

    image: Squash = field(default_factory=Squash)
    """What the model sees of an image."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require_squash(self.image)

    def example(self, index: int, rng: random.Random) -> BoxExample:
        """Draws: crop, flip, RandAugment, concepts."""
        sample = self.source[index]
        _target(sample)
        expression = drawn_text(sample, ("expression",), rng)
        ids = self.ids(expression)
        view = opened(sample, self.image)
        box = _inside(_target(fitted(sample, view)), view, sample.key)
        crop = (0, 0, *view.size)
        if self.image.crop == "random":
            crop = crop_around(box, *view.size, rng)
        view = view.crop(crop)
        left, right = box[0] - crop[0], box[2] - crop[0]
        if self.image.mirrors(rng, (expression,)):
            view, left, right = flip(view), view.width - right, view.width - left
        size = self.image.size
        across, down = size / view.width, size / view.height
        moved = (left * across, (box[1] - crop[1]) * down, (right - left) * across, (box[3] - box[1]) * down)
        pixels = self.image.finish(resize(view, size), rng, randaugment.BOX_OPERATIONS)
        seen = Seen(pixels, self.words(sample, rng))
        return BoxExample(sample.key, seen, ids, target_box(moved, size=size))

    def collate(self, examples: Sequence[BoxExample], rng: random.Random) -> BoxBatch:
        """Stack and pad; draws nothing."""
        ids, mask = self.pad([example.ids for example in examples])
        return BoxBatch(
            **self.images(examples),
            text_ids=ids,
            attention_mask=mask,
            target_boxes=torch.tensor([example.box for example in examples], dtype=torch.float32),
        )


def _target(sample: Sample) -> Box:
    if sample.target is None or sample.target.box is None:
        raise BadSample("no box", sample.key, "the row has no box that the expression refers to")
    return sample.regions[sample.target.box].box


def _inside(stored: Box, image: Pillow.Image, key: str) -> Box:
    """The box clipped to the image. Raises BadSample when it lies outside: REFER's boxes are rounded to
    hundredths and may stick out by less than a pixel."""
    width, height = image.size
    x0, y0, x1, y1 = stored
    box = (max(x0, 0.0), max(y0, 0.0), min(x1, width), min(y1, height))
    moved = max(abs(a - b) for a, b in zip(box, stored, strict=True))
    cause = fault(stored, width, height)
    if cause or moved >= 1 or not inside(box, width, height):
        raise BadSample(
            cause or "box outside the image",
            key,
            f"box {stored} (x0, y0, x1, y1) in an image of {width} x {height}",
        )
    return box
