"""Colours, textures and backgrounds: everything that turns samples into pixels, in integers."""

from typing import NamedTuple

import cv2
import numpy as np
from numpy.typing import NDArray

from vlp_data.shapes.dice import Dice
from vlp_data.shapes.figures import SAMPLES, coverage

Rgb = tuple[int, int, int]

PALETTE: dict[str, Rgb] = {
    "red": (212, 38, 38),
    "orange": (244, 132, 28),
    "yellow": (246, 214, 48),
    "green": (52, 156, 66),
    "teal": (44, 178, 172),
    "blue": (38, 84, 206),
    "purple": (128, 52, 176),
    "pink": (248, 146, 188),
    "brown": (122, 76, 42),
    "gray": (140, 140, 140),
    "white": (242, 242, 242),
    "black": (28, 28, 28),
}
"""Colour words and their RGB values before the small variation that each object gets."""

COLORS = tuple(PALETTE)
TEXTURES = ("plain", "striped", "dotted", "checkered", "speckled")
BACKGROUNDS = ("plain", "gradient", "striped", "checkered", "dotted", "noisy")
DIRECTIONS = ("horizontal", "vertical", "diagonal")


class Tones(NamedTuple):
    """The three colours of one object."""

    base: Rgb
    accent: Rgb
    outline: Rgb


def mix(first: Rgb, second: Rgb, percent: int) -> Rgb:
    """`percent` of `second` in `first`."""
    red, green, blue = (
        (a * (100 - percent) + b * percent + 50) // 100 for a, b in zip(first, second, strict=True)
    )
    return red, green, blue


def varied(color: str, dice: Dice, spread: int) -> Rgb:
    """The named colour, each channel moved by at most `spread`."""
    red, green, blue = (min(255, max(0, value + dice.between(-spread, spread))) for value in PALETTE[color])
    return red, green, blue


def brightness(color: Rgb) -> int:
    """Luma, 0 to 255."""
    return (299 * color[0] + 587 * color[1] + 114 * color[2]) // 1000


def tones(color: str, dice: Dice) -> Tones:
    """Tones of an object: pattern and outline are shades of its own colour, so that one colour word stays
    true."""
    base = varied(color, dice, 10)
    bright = brightness(base) > 128
    accent = (
        mix(base, (0, 0, 0), 36)
        if bright
        else mix(base, (255, 255, 255), 36 if brightness(base) <= 60 else 52)
    )
    outline = mix(base, (0, 0, 0), 62) if brightness(base) > 60 else mix(base, (255, 255, 255), 45)
    return Tones(base, accent, outline)


Lines = NDArray[np.int32]
"""Rows [H, 1] or columns [1, W] of samples in 1/64 pixel of a 96-pixel image: patterns scale with images."""


def _lines(size: int) -> tuple[Lines, Lines]:
    step = (np.arange(size * SAMPLES) * (96 * 64) // (size * SAMPLES)).astype(np.int32)
    return step[:, None], step[None, :]


def _bands(rows: Lines, columns: Lines, period: int, direction: str, shift: int) -> NDArray[np.bool_]:
    """Stripes of equal width."""
    if direction == "diagonal":
        # 181 / 256 is 1 / sqrt(2): diagonal stripes are as wide as the others.
        return ((((rows + columns) * 181 >> 8) + shift) // (period // 2)) % 2 == 1
    along = rows if direction == "horizontal" else columns
    return np.broadcast_to(((along + shift) // (period // 2)) % 2 == 1, (rows.shape[0], columns.shape[1]))


def _checks(rows: Lines, columns: Lines, period: int, shift: int) -> NDArray[np.bool_]:
    return (((rows + shift) // (period // 2)) % 2 == 1) ^ (((columns + shift) // (period // 2)) % 2 == 1)


def _dots(rows: Lines, columns: Lines, period: int, shift: int) -> NDArray[np.bool_]:
    line = (rows + shift) // period
    down = (rows + shift) % period - period // 2
    # Every other line of dots is moved by half a period.
    straight, moved = ((columns + shift + extra) % period - period // 2 for extra in (0, period // 2))
    across = np.where(line % 2 == 1, moved**2, straight**2)
    return down**2 + across < (period * 33 // 100) ** 2


def _speckles(rows: Lines, columns: Lines, dice: Dice) -> NDArray[np.bool_]:
    """Random cells of two pixels of a 96-pixel image; a third of them set."""
    cells = 48
    grains = ((dice.words(cells * cells) >> np.uint64(32)) % np.uint64(100) < np.uint64(34)).reshape(
        cells, cells
    )
    return grains[rows // 128, columns // 128]


def paint_object(
    image: NDArray[np.int32],
    inside: NDArray[np.bool_],
    *,
    texture: str,
    colors: Tones,
    direction: str,
    dice: Dice,
) -> None:
    """Paint one object over `image` ([size, size, 3], changed in place).

    Args:
        image: RGB values 0 to 255.
        inside: samples of the object, from `rasterise`.
        texture: one of `TEXTURES`.
        colors: its tones.
        direction: of the stripes.
        dice: offsets of the pattern.
    """
    size = image.shape[0]
    shift = dice.below(512)
    # Only the pixels that the object touches.
    window = tuple(
        slice(int(hit[0]) // SAMPLES, int(hit[-1]) // SAMPLES + 1)
        for axis in (1, 0)
        for hit in [np.flatnonzero(inside.any(axis=axis))]
    )
    rows_of, columns_of = (slice(part.start * SAMPLES, part.stop * SAMPLES) for part in window)
    rows, columns = _lines(size)
    rows, columns = rows[rows_of], columns[:, columns_of]
    body = inside[rows_of, columns_of]

    width = max(1, (size * SAMPLES) // 110)
    kernel = np.ones((2 * width + 1, 2 * width + 1), np.uint8)
    core = cv2.erode(body.astype(np.uint8), kernel, borderType=cv2.BORDER_CONSTANT, borderValue=0).astype(
        np.bool_
    )
    match texture:
        case "plain":
            pattern = np.zeros_like(body)
        case "striped":
            pattern = _bands(rows, columns, 384, direction, shift)
        case "dotted":
            pattern = _dots(rows, columns, 416, shift)
        case "checkered":
            pattern = _checks(rows, columns, 512, shift)
        case "speckled":
            pattern = _speckles(rows, columns, dice)
        case _:
            raise AssertionError(texture)
    full = SAMPLES**2
    edge, filled, marked = (
        coverage(cells).astype(np.int32) for cells in (body & ~core, core, core & pattern)
    )
    part = image[window]
    part *= (full - edge - filled)[:, :, None]
    for share, color in ((edge, colors.outline), (marked, colors.accent), (filled - marked, colors.base)):
        part += share[:, :, None] * np.array(color, dtype=np.int32)
    part += full // 2
    part //= full


def paint_background(
    size: int, *, kind: str, colors: tuple[Rgb, ...], direction: str, dice: Dice
) -> NDArray[np.int32]:
    """A background: [size, size, 3] RGB values 0 to 255.

    Args:
        size: side in pixels.
        kind: one of `BACKGROUNDS`.
        colors: one colour, or two for gradient, striped, checkered and dotted.
        direction: of stripes, or along which a gradient runs ("vertical" = from top to bottom).
        dice: offsets and noise.
    """
    first = np.array(colors[0], dtype=np.int32)
    second = np.array(colors[-1], dtype=np.int32)
    shift = dice.below(1024)
    if kind == "noisy":
        grain = (dice.words(size * size) >> np.uint64(40)).astype(np.int32).reshape(size, size)
        return np.clip(first + (grain % 81 - 40)[:, :, None], 0, 255)
    if kind == "plain":
        return np.zeros((size, size, 3), np.int32) + first
    if kind == "gradient":
        step = np.arange(size, dtype=np.int32)
        down, right = np.broadcast_arrays(step[:, None], step[None, :])
        way = {"vertical": 2 * down, "horizontal": 2 * right, "diagonal": down + right}[direction][:, :, None]
        end = 2 * (size - 1)
        return (first * (end - way) + second * way + end // 2) // end
    rows, columns = _lines(size)
    match kind:
        case "striped":
            pattern = _bands(rows, columns, 1536, direction, shift)
        case "checkered":
            pattern = _checks(rows, columns, 2048, shift)
        case "dotted":
            pattern = _dots(rows, columns, 1024, shift)
        case _:
            raise AssertionError(kind)
    share = coverage(pattern).astype(np.int32)[:, :, None]
    return (first * (SAMPLES**2 - share) + second * share + SAMPLES**2 // 2) // SAMPLES**2
