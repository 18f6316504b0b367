"""RandAugment of the ALBEF family: OpenCV operations on uint8 RGB images at one fixed level.

Source: X-VLM dataset/randaugment.py, specification 4.1. One difference on purpose: Sharpness clips to 0..255
where the reference wraps around (specification 8.31). AutoContrast keeps a fault of the reference (see
`_stretch_table`), because its pixels are pinned.

H height   W width
"""

import random
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import cv2
import numpy as np
from numpy.typing import ArrayLike, NDArray

Pixels = NDArray[np.uint8]

IMAGE_OPERATIONS = (
    "Identity",
    "AutoContrast",
    "Equalize",
    "Brightness",
    "Sharpness",
    "ShearX",
    "ShearY",
    "TranslateX",
    "TranslateY",
    "Rotate",
)
"""For whole images."""
BOX_OPERATIONS = ("Identity", "AutoContrast", "Equalize", "Brightness", "Sharpness")
"""For images with boxes: those that move no pixel."""

LEVEL = 7
"""Of 10; every recipe of the family uses it."""
_FILL = (128, 128, 128)
_SIGNED = {"ShearX", "ShearY", "TranslateX", "TranslateY", "Rotate"}


class Step(NamedTuple):
    """One operation; `sign` is +1 or -1 for those that have a direction, else 0."""

    operation: str
    sign: int = 0


def draw(operations: Sequence[str], count: int, rng: random.Random) -> list[Step]:
    """Which operations to apply: `count` names with replacement, each kept with probability 1/2, then a sign
    for those that need one."""
    names = [operations[int(rng.random() * len(operations))] for _ in range(count)]
    steps = []
    for name in names:
        if rng.random() > 0.5:
            continue
        steps.append(Step(name, sign(name, rng.random()) if name in _SIGNED else 0))
    return steps


def sign(operation: str, uniform: float) -> int:
    """Direction for a uniform draw: shear and translate turn negative above 0.5, Rotate below."""
    if operation == "Rotate":
        return -1 if uniform < 0.5 else 1
    return -1 if uniform > 0.5 else 1


def apply(image_HW3: Pixels, steps: Sequence[Step], *, level: int = LEVEL) -> Pixels:
    """Apply operations in order; same size, the input is left alone. Raises ValueError for an unknown
    operation."""
    for step in steps:
        image_HW3 = _apply_one(image_HW3, step, level)
    return image_HW3


def _apply_one(image: Pixels, step: Step, level: int) -> Pixels:
    factor = level / 10 * 1.8 + 0.1
    shear = float(np.float32(level / 10 * 0.3))  # single precision, as the reference's matrix
    match step.operation:
        case "Identity":
            return image
        case "AutoContrast":
            return _per_channel(image, _stretch_table)
        case "Equalize":
            return _per_channel(image, _equalize_table)
        case "Brightness":
            return _to_bytes(np.arange(256) * factor)[image]
        case "Contrast":
            # The weights are those of BGR, though the image is RGB: kept, as in the reference.
            mean = float(image.mean(axis=(0, 1)) @ np.array([0.114, 0.587, 0.299]))
            return _to_bytes((np.arange(256) - mean) * factor + mean)[image]
        case "Color":
            return _saturate(image, factor)
        case "Sharpness":
            return _sharpen(image, factor)
        case "Solarize":
            values = np.arange(256)
            return np.where(values < int(level / 10 * 256), values, 255 - values).astype(np.uint8)[image]
        case "Posterize":
            return image & np.uint8(0xFF00 >> int(level / 10 * 4) & 0xFF)
        case "ShearX":
            return _warp(image, [[1, step.sign * shear, 0], [0, 1, 0]])
        case "ShearY":
            return _warp(image, [[1, 0, 0], [step.sign * shear, 1, 0]])
        case "TranslateX":
            return _warp(image, [[1, 0, -step.sign * level], [0, 1, 0]])
        case "TranslateY":
            return _warp(image, [[1, 0, 0], [0, 1, -step.sign * level]])
        case "Rotate":
            height, width = image.shape[:2]
            return _warp(
                image, cv2.getRotationMatrix2D((width / 2, height / 2), step.sign * level / 10 * 30, 1)
            )
        case _:
            raise ValueError(f"unknown operation {step.operation!r}")


def _to_bytes(values: NDArray[Any]) -> Pixels:
    return values.clip(0, 255).astype(np.uint8)


def _per_channel(image: Pixels, table: Callable[[NDArray[np.integer]], Pixels]) -> Pixels:
    tables = [table(np.bincount(image[..., c].ravel(), minlength=256)) for c in range(3)]
    return np.stack([tables[c][image[..., c]] for c in range(3)], axis=-1)


def _stretch_table(histogram: NDArray[np.integer]) -> Pixels:
    used = np.flatnonzero(histogram)
    low, high = int(used[0]), int(used[-1])
    if low == high:
        return np.arange(256, dtype=np.uint8)
    # Kept from the reference: the darkest value is negated as uint8, so the table begins at 256 - low instead
    # of -low, and a channel whose darkest value is not 0 turns white.
    return _to_bytes((np.arange(256) + -low % 256) * (255 / (high - low)))


def _equalize_table(histogram: NDArray[np.integer]) -> Pixels:
    used = histogram[histogram != 0]
    step = int(used[:-1].sum()) // 255
    if step == 0:
        return np.arange(256, dtype=np.uint8)
    below = np.cumsum(histogram) - histogram
    return _to_bytes((below + step // 2) // step)


def _saturate(image: Pixels, factor: float) -> Pixels:
    grey = np.array([0.114, 0.587, 0.299], dtype=np.float32)[:, None]
    matrix = (np.eye(3, dtype=np.float32) - grey) * np.float32(factor) + grey
    return _to_bytes(image.astype(np.float32) @ matrix)


def _sharpen(image: Pixels, factor: float) -> Pixels:
    kernel = np.ones((3, 3), dtype=np.float32)
    kernel[1, 1] = 5
    inner = (slice(1, -1), slice(1, -1))
    blurred = cv2.filter2D(image, -1, kernel / 13)[inner].astype(np.float32)
    result = image.copy()
    result[inner] = _to_bytes(blurred + factor * (image[inner].astype(np.float32) - blurred))
    return result


def _warp(image: Pixels, matrix: ArrayLike) -> Pixels:
    """Affine warp with the fixed-point coordinates of OpenCV 4 (5 bits of fraction), which OpenCV 5 computes
    in another way."""
    height, width = image.shape[:2]
    (a, b, c), (d, e, f) = np.asarray(matrix, dtype=np.float64)
    scale = 1 / (a * e - b * d)
    a, b, d, e = e * scale, -b * scale, -d * scale, a * scale
    columns, rows = np.arange(width), np.arange(height)[:, None]
    # 10 bits of fraction, rounded per term; + 16 rounds to the nearest of the 5 bits that are kept.
    x = _fixed(b * rows - (a * c + b * f)) + 16 + _fixed(a * columns) >> 5
    y = _fixed(e * rows - (d * c + e * f)) + 16 + _fixed(d * columns) >> 5
    return np.asarray(
        cv2.remap(
            image,
            np.stack([x >> 5, y >> 5], axis=-1).astype(np.int16),
            ((y & 31) * 32 + (x & 31)).astype(np.uint16),
            cv2.INTER_LINEAR,
            borderMode=cv2.BORDER_CONSTANT,
            borderValue=_FILL,
        ),
        dtype=np.uint8,
    )


def _fixed(values: NDArray[np.float64]) -> NDArray[np.int64]:
    return np.rint(values * 1024).astype(np.int64)
