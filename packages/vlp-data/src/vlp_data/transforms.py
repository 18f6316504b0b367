"""Steps that views are made of (`vlp_data.views`), with the references' pixels: resizing by Pillow,
RandAugment by OpenCV. Every draw comes from the generator that is passed in.

H height   W width
"""

import math
import random
from collections.abc import Sequence
from typing import Literal, TypeAlias

import numpy as np
import torch
from PIL import Image as Pillow
from torch import Tensor

from vlp_data import randaugment

Interpolation: TypeAlias = Literal["bicubic", "bilinear"]
_RESAMPLING = {"bicubic": Pillow.Resampling.BICUBIC, "bilinear": Pillow.Resampling.BILINEAR}


def normalise(image: Pillow.Image | np.ndarray, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """RGB pixels (uint8) as a float32 tensor [3, H, W]: divided by 255, less the mean, by the deviation."""
    pixels = torch.from_numpy(np.array(image, dtype=np.uint8)).permute(2, 0, 1)
    return pixels.to(torch.float32).div_(255).sub_(_channels(mean)).div_(_channels(std)).contiguous()


def denormalise(image_3HW: Tensor, mean: Sequence[float], std: Sequence[float]) -> np.ndarray:
    """The inverse, uint8 [H, W, 3], for showing what a model saw."""
    pixels = image_3HW.detach().float().cpu() * _channels(std) + _channels(mean)
    return pixels.mul(255).round().clamp(0, 255).to(torch.uint8).permute(1, 2, 0).numpy()


def _channels(values: Sequence[float]) -> Tensor:
    return torch.tensor(values)[:, None, None]


def resize(image: Pillow.Image, size: int, interpolation: Interpolation = "bicubic") -> Pillow.Image:
    """Squash to size x size (the aspect is not kept)."""
    return image.resize((size, size), _RESAMPLING[interpolation])


def resize_short(image: Pillow.Image, short: int, interpolation: Interpolation) -> Pillow.Image:
    """The short side to `short`, the aspect kept; the other side is rounded down, as torchvision does."""
    if min(image.size) == short:
        return image
    width, height = (
        short if side == min(image.size) else int(short * side / min(image.size)) for side in image.size
    )
    return image.resize((width, height), _RESAMPLING[interpolation])


def centre(image: Pillow.Image, size: int) -> Pillow.Image:
    """The square of this side in the middle, where torchvision puts it: half pixels to the even side. The
    image must be at least as large."""
    x, y = (round((side - size) / 2) for side in image.size)
    return image.crop((x, y, x + size, y + size))


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


def augmented(image: Pillow.Image, operations: tuple[str, ...], rng: random.Random) -> np.ndarray:
    """Two drawn RandAugment operations; uint8 [H, W, 3]."""
    return randaugment.apply(np.asarray(image), randaugment.draw(operations, 2, rng))
