"""Region sampling and collation of X-VLM: one random crop per image, several (region, text) pairs from it.

Source: X-VLM specification 5.3 (dataset/pretrain_dataset.py, RegionTextJsonDataset), reproduced draw by draw.

B pairs   N images   P patches of an image (S x S, S = size / patch)
"""

import math
import random
from collections.abc import Sequence
from typing import NamedTuple

import torch
from PIL import Image as Pillow
from torch import Tensor

from vlp_data import randaugment
from vlp_data.batch import RegionBatch
from vlp_data.boxes import fault, fitted
from vlp_data.concept_text import collate_concepts
from vlp_data.errors import BadSample, DataError, Skipped
from vlp_data.options import ConceptOptions, Masking, RegionOptions, Squash, TextOptions
from vlp_data.schema import Region, Sample, Text
from vlp_data.text import MaskedText, Tokenizer, collate_masked, masked_text, names_a_side
from vlp_data.transforms import flip, resize

Box = tuple[float, float, float, float]


class Pair(NamedTuple):
    """One text with what it is about. `box` is x, y, w, h in pixels of the model's input, None for the whole
    image."""

    text: MaskedText
    box: Box | None


class RegionExample(NamedTuple):
    """What one line gives: its crop as the model sees it, and pairs."""

    key: str
    image: Tensor
    pairs: tuple[Pair, ...]
    crop: tuple[int, int, int, int]
    """x0, y0, x1, y1 of the crop in the stored image."""
    flipped: bool
    concepts: Sequence[int] = ()
    """Ids of the image's concepts; `vlp_data.examples.RegionExamples` adds them."""
    unusable: tuple[Skipped, ...] = ()
    """Boxes that no pair can be made of, with their cause; the loader counts and names them."""


def pick(texts: Sequence[Text], rng: random.Random) -> str:
    """One of several alternatives. Nothing is drawn for a text that the source gives as a plain string, as in
    the reference."""
    if len(texts) > 1 or texts[0].listed:
        return rng.choice(texts).text
    return texts[0].text


def pick_attribute(attributes: str | tuple[str, ...], rng: random.Random) -> str:
    """One of several alternatives; nothing is drawn for a plain string."""
    return attributes if isinstance(attributes, str) else rng.choice(attributes)


def inside(box: Box, width: int, height: int) -> bool:
    """Whether a box (x0, y0, x1, y1) has an area and lies in an image."""
    x0, y0, x1, y1 = box
    return 0 <= x0 < x1 <= width and 0 <= y0 < y1 <= height


def crop_around(box: Box, width: int, height: int, rng: random.Random) -> tuple[int, int, int, int]:
    """A random crop (x0, y0, x1, y1), in whole pixels, that holds all of a box; every corner is uniform.
    Draws x0, y0, x1, y1."""
    x0, y0 = rng.randint(0, math.floor(box[0])), rng.randint(0, math.floor(box[1]))
    x1 = rng.randint(min(math.ceil(box[2]), width), width)
    y1 = rng.randint(min(math.ceil(box[3]), height), height)
    return x0, y0, x1, y1


class _Candidates(NamedTuple):
    """What pairs may be made of, and the boxes that none can be made of."""

    regions: list[tuple[Region, Box]]
    unusable: tuple[Skipped, ...]


def _candidates(sample: Sample, options: RegionOptions, width: int, height: int) -> _Candidates:
    """The boxes with a text. Raises BadSample when no pair can be made of any.

    With a crop around a box and `outside_boxes` "skip" those that cannot be used stay among the candidates,
    as in the reference: the line is skipped when one of them is drawn.
    """
    clip, anchored = options.outside_boxes == "clip", options.crop == "around_box"
    kept: list[tuple[Region, Box]] = []
    unusable: list[Skipped] = []
    usable = 0
    for number, region in enumerate(sample.regions):
        if not region.texts:
            continue
        cause, box = fault(region.box, width, height), region.box
        if not cause and clip:
            x0, y0, x1, y1 = box
            box = max(x0, 0), max(y0, 0), min(x1, width), min(y1, height)
        elif not cause and not anchored and not inside(box, width, height):
            cause = "box outside the image"
        if cause:
            detail = f"box {number}, {box} (x0, y0, x1, y1), in an image of {width} x {height}"
            unusable.append(Skipped(cause, sample.key, detail))
        else:
            usable += 1
        if not cause or (anchored and not clip):
            kept.append((region, box))
    if not usable and unusable and not (anchored and not clip):
        raise BadSample(*unusable[0])
    if not kept:
        raise BadSample("no regions", sample.key, f"none of {len(sample.regions)} boxes has a text")
    return _Candidates(kept, tuple(unusable))


def sample_regions(
    sample: Sample,
    decoded: Pillow.Image,
    tokenizer: Tokenizer,
    rng: random.Random,
    *,
    image: Squash,
    text: TextOptions,
    masking: Masking,
    regions: RegionOptions,
) -> RegionExample:
    """Crop around a random box, and the texts of the boxes that are visible in the crop.

    `decoded` is the decoded image of `sample`; where the sample states another size, boxes are scaled
    (`vlp_data.boxes.fitted`). The box the crop is drawn around need not be among the pairs.
    Draws, in order: anchor box and crop corners x0, y0, x1, y1 (unless there is no crop); flip; RandAugment
    (if `image.augment`); then per pair the text, its attribute, its masking, with one shuffle of the
    boxes after the caption of the whole image. Raises BadSample: "no regions", "empty text", "image of
    another size", and for boxes the causes of `vlp_data.boxes.fault`.
    """
    width, height = decoded.size
    sample = fitted(sample, decoded)
    candidates, unusable = _candidates(sample, regions, width, height)
    crop = (0, 0, width, height)
    if regions.crop == "around_box":
        _, anchor = rng.choice(candidates)
        cause = fault(anchor, width, height)
        if cause or not inside(anchor, width, height):
            raise BadSample(
                cause or "box outside the image",
                sample.key,
                f"box {anchor} (x0, y0, x1, y1) in an image of {width} x {height}",
            )
        crop = crop_around(anchor, width, height, rng)
    crop_x0, crop_y0, crop_x1, crop_y1 = crop

    flipped = rng.random() < 0.5
    if regions.careful_flip != "off":
        whole_word = regions.careful_flip == "word"
        flipped = flipped and not any(
            names_a_side(t.text, whole_word=whole_word) for t in sample.texts if t.role != "concept"
        )
    view = resize(flip(decoded.crop(crop)) if flipped else decoded.crop(crop), image.size)
    pixels = image.finish(view, rng, randaugment.BOX_OPERATIONS)

    pairs: list[Pair] = []
    captions = [t for t in sample.texts if t.role == "caption"]
    if captions:
        pairs.append(Pair(masked_text(pick(captions, rng), tokenizer, text, masking, rng), None))
    for region, box in rng.sample(candidates, len(candidates)):
        if len(pairs) >= regions.max_regions:
            break
        visible = _visible(box, crop, regions.min_visible)
        if visible is None:
            continue
        x, y, w, h = visible
        crop_width, crop_height = crop_x1 - crop_x0, crop_y1 - crop_y0
        if flipped:
            x = crop_width - x - w
        x_scale, y_scale = image.size / crop_width, image.size / crop_height
        words = pick([sample.texts[number] for number in region.texts], rng)
        if region.attributes:
            words = f"{pick_attribute(region.attributes, rng)} {words}"
        scaled = (x_scale * x, y_scale * y, x_scale * w, y_scale * h)
        pairs.append(Pair(masked_text(words, tokenizer, text, masking, rng), scaled))
    return RegionExample(sample.key, pixels, tuple(pairs), crop, flipped, unusable=unusable)


def _visible(box: Box, crop: tuple[int, int, int, int], least: float) -> Box | None:
    """The part of a box inside a crop as x, y, w, h from the crop's corner; None if that part is not more
    than `least` of the box."""
    x0, y0 = max(box[0], crop[0]), max(box[1], crop[1])
    x1, y1 = min(box[2], crop[2]), min(box[3], crop[3])
    if x1 <= x0 or y1 <= y0:
        return None
    if (x1 - x0) * (y1 - y0) / ((box[2] - box[0]) * (box[3] - box[1])) <= least:
        return None
    return x0 - crop[0], y0 - crop[1], x1 - x0, y1 - y0


def patch_mask(box: Box | None, *, size: int, patch_size: int) -> Tensor:
    """Which tokens a box covers: int64 [1 + P], entry 0 (pooled token) and every patch the box touches are 1;
    all ones for None.

    `box` is x, y, w, h in pixels of the input. At least one patch is on.
    """
    side = size // patch_size
    if box is None:
        return torch.ones(1 + side * side, dtype=torch.int64)
    x, y, w, h = box
    left = min(math.floor(x / patch_size), side - 1)
    right = max(left + 1, min(math.ceil((x + w) / patch_size), side))
    top = min(math.floor(y / patch_size), side - 1)
    bottom = max(top + 1, min(math.ceil((y + h) / patch_size), side))
    mask = torch.zeros(side, side, dtype=torch.int64)
    mask[top:bottom, left:right] = 1
    return torch.cat([torch.ones(1, dtype=torch.int64), mask.flatten()])


def target_box(box: Box | None, *, size: int) -> Box:
    """cx, cy, w, h in 0..1 of the input; the whole image for None."""
    if box is None:
        return 0.5, 0.5, 1.0, 1.0
    x, y, w, h = box
    return (x + w / 2) / size, (y + h / 2) / size, w / size, h / size


def choose_pairs(count: int, wanted: int, rng: random.Random) -> list[int]:
    """Exactly `wanted` of `count` pairs: a sample without replacement, or all and a sample of them again, or
    the list repeated.

    A fixed number, because the gather over ranks needs equal batches.
    """
    if count == 0:
        raise ValueError("no pair to choose from")
    everything = list(range(count))
    if count >= wanted:
        return rng.sample(everything, wanted)
    if wanted - count <= count:
        return everything + rng.sample(everything, wanted - count)
    return (everything * math.ceil(wanted / count))[:wanted]


def collate_regions(
    examples: Sequence[RegionExample],
    tokenizer: Tokenizer,
    rng: random.Random,
    *,
    size: int,
    text: TextOptions,
    masking: Masking,
    batch_texts: int,
    patch_size: int,
    concepts: ConceptOptions | None = None,
) -> RegionBatch:
    """One batch with exactly `batch_texts` pairs. Images without a pair are left out; other images stay even
    if none of their pairs is chosen. Raises DataError when there is no pair at all."""
    keys = [example.key for example in examples]
    examples = [example for example in examples if example.pairs]
    if not examples:
        raise DataError(
            f"no (region, text) pair in {', '.join(keys)}: no box is visible enough, and there are no "
            "captions; lower min_visible or raise the batch"
        )
    pairs = [(number, pair) for number, example in enumerate(examples) for pair in example.pairs]
    kept = [pairs[i] for i in choose_pairs(len(pairs), batch_texts, rng)]
    fields = collate_masked([pair.text for _, pair in kept], tokenizer, text, masking)
    return RegionBatch(
        keys=tuple(examples[number].key for number, _ in kept),
        image=torch.stack([example.image for example in examples]),
        image_index=torch.tensor([number for number, _ in kept]),
        image_attention_mask=torch.stack(
            [patch_mask(pair.box, size=size, patch_size=patch_size) for _, pair in kept]
        ),
        **fields._asdict(),
        target_boxes=torch.tensor([target_box(pair.box, size=size) for _, pair in kept], dtype=torch.float32),
        is_image=torch.tensor([int(pair.box is None) for _, pair in kept]),
        padded_pairs=max(0, batch_texts - len(pairs)),
        concepts=collate_concepts([example.concepts for example in examples], tokenizer, concepts),
    )
