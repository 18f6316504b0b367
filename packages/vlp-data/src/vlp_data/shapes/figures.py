"""The outlines of the kinds of objects, and their rasterisation in integers.

Everything is integer arithmetic, because the last bit of a float sine, and the fill rule of a drawing
library, differ between processors and versions. Outlines live in a unit circle of radius `ONE`; y points
down, as in images.
"""

import math
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

ONE = 1 << 16
"""Radius of the unit circle in which outlines are given."""

TURN = 256
"""Angles are given in 1/256 of a full turn, clockwise on the image."""

SPAN = 4096
"""Side of the image in canvas units: the unit of all places and radii of a scene."""

SAMPLES = 4
"""Samples per pixel and direction; 16 levels of coverage."""

# Rounding to 1/65536 removes the differences of mathematical libraries: no value lies within 1e-6 of a tie
# (tested).
COS = tuple(round(math.cos(2 * math.pi * step / TURN) * ONE) for step in range(TURN))
SIN = tuple(COS[(step - TURN // 4) % TURN] for step in range(TURN))

Contour = list[tuple[int, int]]


def _cos(step: int) -> int:
    return COS[step % TURN]


def _sin(step: int) -> int:
    return SIN[step % TURN]


def _arc(radius: int, steps: range, *, center: int = 0) -> Contour:
    """Points of a circle (radius and x of its center in 1/100 of the unit) at the given angles."""
    return [(center * ONE // 100 + radius * _cos(k) // 100, radius * _sin(k) // 100) for k in steps]


def _points(*percent: tuple[int, int]) -> list[Contour]:
    return [[(x * ONE // 100, y * ONE // 100) for x, y in percent]]


def _circle() -> list[Contour]:
    return [_arc(100, range(0, TURN, 4))]


def _ring() -> list[Contour]:
    return [_arc(100, range(0, TURN, 4)), _arc(48, range(0, TURN, 4))]


def _star() -> list[Contour]:
    # 5 tips; 256 is no multiple of 10, so the angles are rounded to the table's steps.
    return [
        [
            _arc(100 if tip % 2 == 0 else 42, range(k, k + 1))[0]
            for tip in range(10)
            for k in [192 + tip * TURN // 10]
        ]
    ]


def _flower() -> list[Contour]:
    # Six round petals.
    radii = [(52 * ONE + 48 * abs(_cos(3 * k))) // 100 for k in range(0, TURN, 2)]
    return [[(r * _cos(k) // ONE, r * _sin(k) // ONE) for r, k in zip(radii, range(0, TURN, 2), strict=True)]]


def _heart() -> list[Contour]:
    # The usual heart curve: x = 16 sin^3, y = 13 cos - 5 cos 2 - 2 cos 3 - cos 4, scaled into the unit
    # circle.
    points = []
    for k in range(0, TURN, 4):
        x = 16 * _sin(k) ** 3 // ONE**2
        y = 13 * _cos(k) - 5 * _cos(2 * k) - 2 * _cos(3 * k) - _cos(4 * k)
        points.append((x // 17, -(y + 2 * ONE) // 17))
    return [points]


def _moon() -> list[Contour]:
    # A circle less a circle of radius 0.8 around (0.45, 0): they meet at 51 degrees of the first and 77 of
    # the second.
    outer = _arc(100, range(37, 220, 3))
    inner = _arc(80, range(201, 54, -3), center=45)
    # Moved to the right, so that the box of the crescent is nearly centred.
    return [[(x + 19 * ONE // 100, y) for x, y in outer + inner]]


OUTLINES: dict[str, Callable[[], list[Contour]]] = {
    "circle": _circle,
    "square": lambda: _points((-86, -86), (86, -86), (86, 86), (-86, 86)),
    "triangle": lambda: _points((0, -98), (98, 78), (-98, 78)),
    "star": _star,
    "ring": _ring,
    "cross": lambda: _points(
        (-33, -98),
        (33, -98),
        (33, -33),
        (98, -33),
        (98, 33),
        (33, 33),
        (33, 98),
        (-33, 98),
        (-33, 33),
        (-98, 33),
        (-98, -33),
        (-33, -33),
    ),
    "heart": _heart,
    "diamond": lambda: _points((0, -105), (64, 0), (0, 105), (-64, 0)),
    "moon": _moon,
    "arrow": lambda: _points((0, -100), (80, -10), (32, -10), (32, 98), (-32, 98), (-32, -10), (-80, -10)),
    "flower": _flower,
    "house": lambda: _points((0, -98), (96, -16), (70, -16), (70, 90), (-70, 90), (-70, -16), (-96, -16)),
}
"""Outline of each kind: closed contours, filled by the even-odd rule."""

KINDS = tuple(OUTLINES)
_CONTOURS = {kind: outline() for kind, outline in OUTLINES.items()}

TILTS = {kind: (0, 64, 128, 192) if kind == "arrow" else (0,) for kind in KINDS}
"""Base angles of a kind in 1/256 turn; a scene adds a small tilt, too small to make a square a diamond."""


def rasterise(kind: str, *, x: int, y: int, radius: int, turn: int, size: int) -> NDArray[np.bool_]:
    """Which sample points of an image lie inside an object.

    Args:
        kind: one of `KINDS`.
        x, y, radius: place in canvas units (`SPAN` per side).
        turn: rotation in 1/256 turn.
        size: side of the image in pixels.

    Returns:
        [size * SAMPLES, size * SAMPLES] booleans; a sample point is the centre of its cell.
    """
    # In units of 1 / (2 * side) of a canvas unit every vertex and every sample centre is an integer.
    side = size * SAMPLES
    cos, sin = _cos(turn), _sin(turn)
    starts, ends = [], []
    for contour in _CONTOURS[kind]:
        points = []
        for u, v in contour:
            right, down = (u * cos - v * sin) >> 16, (u * sin + v * cos) >> 16
            points.append(
                ((x * ONE + radius * right) * 2 * side >> 16, (y * ONE + radius * down) * 2 * side >> 16)
            )
        starts += points
        ends += points[1:] + points[:1]
    start_E2, end_E2 = np.array(starts, dtype=np.int64), np.array(ends, dtype=np.int64)
    falls = start_E2[:, 1] > end_E2[:, 1]
    low_E2, high_E2 = np.where(falls[:, None], end_E2, start_E2), np.where(falls[:, None], start_E2, end_E2)

    first = max(0, int(low_E2[:, 1].min()) // (2 * SPAN) - 1)
    last = min(side, int(high_E2[:, 1].max()) // (2 * SPAN) + 2)
    row_R = (2 * np.arange(first, last, dtype=np.int64) + 1) * SPAN
    edge, row = np.nonzero((low_E2[:, 1, None] <= row_R) & (row_R < high_E2[:, 1, None]))
    rise = high_E2[edge, 1] - low_E2[edge, 1]
    run = high_E2[edge, 0] - low_E2[edge, 0]
    crossing = low_E2[edge, 0] * rise + (row_R[row] - low_E2[edge, 1]) * run
    # The first sample to the right of the crossing: smallest j with (2j + 1) * SPAN * rise > crossing.
    column = np.clip((crossing // (SPAN * rise) + 1) // 2, 0, side)
    toggles = np.bincount(row * (side + 1) + column, minlength=(last - first) * (side + 1)).reshape(
        -1, side + 1
    )
    inside = np.zeros((side, side), dtype=np.bool_)
    inside[first:last] = np.cumsum(toggles, axis=1)[:, :side] & 1
    return inside


def coverage(inside: NDArray[np.bool_]) -> NDArray[np.uint8]:
    """Set samples of each pixel, 0 to SAMPLES ** 2: [H * SAMPLES, W * SAMPLES] to [H, W]."""
    # Sums of slices: eight times as fast as a reshape and a reduction over short axes.
    cells = inside.view(np.uint8)
    rows = sum((cells[k::SAMPLES] for k in range(1, SAMPLES)), cells[::SAMPLES])
    return sum((rows[:, k::SAMPLES] for k in range(1, SAMPLES)), rows[:, ::SAMPLES])
