"""Views of an image, with the reference's pixels: Pillow bicubic resize, OpenCV RandAugment, CLIP
normalisation.

Source: X-VLM specification 4.1 (dataset/__init__.py). Every draw comes from the generator that is passed in.

R side of the square output
"""

import math
import random
from typing import Literal

import numpy as np
import torch
from PIL import Image as Pillow
from torch import Tensor

from vlp_data import randaugment

MEAN = (0.48145466, 0.4578275, 0.40821073)
"""Per RGB channel, of values in 0..1 (CLIP's)."""
STD = (0.26862954, 0.26130258, 0.27577711)

_MEAN = torch.tensor(MEAN)[:, None, None]
_STD = torch.tensor(STD)[:, None, None]


def normalise(image: Pillow.Image | np.ndarray) -> Tensor:
    """RGB pixels (uint8) to a float32 tensor [3, H, W] with CLIP's mean and deviation."""
    pixels = torch.from_numpy(np.array(image, dtype=np.uint8)).permute(2, 0, 1)
    return pixels.to(torch.float32).div_(255).sub_(_MEAN).div_(_STD).contiguous()


def denormalise(image_3RR: Tensor) -> np.ndarray:
    """The inverse, uint8 [H, W, 3], for showing what a model saw."""
    pixels = image_3RR.detach().float().cpu() * _STD + _MEAN
    return pixels.mul(255).round().clamp(0, 255).to(torch.uint8).permute(1, 2, 0).numpy()


def resize(image: Pillow.Image, size: int) -> Pillow.Image:
    """Squash to size x size, bicubic (the aspect is not kept)."""
    return image.resize((size, size), Pillow.Resampling.BICUBIC)


def flip(image: Pillow.Image) -> Pillow.Image:
    """Mirror left and right."""
    return image.transpose(Pillow.Transpose.FLIP_LEFT_RIGHT)


def random_crop_box(
    width: int,
    height: int,
    rng: random.Random,
    *,
    min_scale: float,
    max_scale: float = 1.0,
    ratio: float = 4 / 3,
) -> tuple[int, int, int, int]:
    """A crop (x0, y0, x1, y1) of a random share of the area and a random aspect between 1/ratio and ratio.

    As torchvision's RandomResizedCrop: ten attempts, then the largest centred crop with an allowed aspect.
    """
    for _ in range(10):
        area = width * height * rng.uniform(min_scale, max_scale)
        aspect = math.exp(rng.uniform(-math.log(ratio), math.log(ratio)))
        w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < w <= width and 0 < h <= height:
            y, x = rng.randint(0, height - h), rng.randint(0, width - w)
            return x, y, x + w, y + h
    w, h = width, height
    if width / height > ratio:
        w = max(1, round(height * ratio))
    elif width / height < 1 / ratio:
        h = max(1, round(width * ratio))
    x, y = (width - w) // 2, (height - h) // 2
    return x, y, x + w, y + h


def augmented(image: Pillow.Image, operations: tuple[str, ...], rng: random.Random) -> Tensor:
    """Two drawn RandAugment operations, then `normalise`."""
    return normalise(randaugment.apply(np.asarray(image), randaugment.draw(operations, 2, rng)))


def train_view(
    image: Pillow.Image,
    rng: random.Random,
    *,
    size: int,
    view: Literal["random_resized_crop", "resize"] = "random_resized_crop",
    min_scale: float = 0.2,
    flip_probability: float = 0.5,
    augment: bool = True,
) -> Tensor:
    """Random crop (or all of the image) resized to size x size, mirrored with `flip_probability`, two
    RandAugment operations; float32 [3, size, size].

    `min_scale` 0.2 is `pretrain_transform`, 0.5 `train_transform`; with `flip_probability=0`
    `train_transform_wohflip`; `view="resize"` is that of weakly supervised grounding.
    """
    if view == "random_resized_crop":
        image = image.crop(random_crop_box(*image.size, rng, min_scale=min_scale))
    image = resize(image, size)
    if rng.random() < flip_probability:
        image = flip(image)
    return augmented(image, randaugment.IMAGE_OPERATIONS, rng) if augment else normalise(image)


def eval_view(image: Pillow.Image, *, size: int) -> Tensor:
    """The whole image squashed to size x size; float32 [3, size, size]."""
    return normalise(resize(image, size))
