"""Scenes: objects on a background, drawn from (seed, index) alone."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from vlp_data.shapes import paint
from vlp_data.shapes.dice import Dice
from vlp_data.shapes.figures import KINDS, SAMPLES, SPAN, TILTS, rasterise

SIZES = ("small", "medium", "large")
RADII = {"small": (310, 380), "medium": (540, 630), "large": (840, 960)}
"""Radius of each size in canvas units (4096 per side); the gaps keep the words apart."""

SMALLEST_PICTURE, LARGEST_PICTURE = 32, 2048

# Purposes of the random streams of one scene.
LAYOUT, PAINT, TEXT, PAIR = range(4)


@dataclass(frozen=True, kw_only=True, slots=True)
class Thing:
    """One object of a scene.

    `kind`, `color`, `texture` and `size` are words of `KINDS`, `COLORS`, `TEXTURES`, `SIZES`; `x`, `y`,
    `radius` are in canvas units (4096 per side, y down); `turn` in 1/256 turn; `direction` is that of its
    stripes; `tones` the RGB colours it is painted with.
    """

    kind: str
    color: str
    texture: str
    size: str
    x: int
    y: int
    radius: int
    turn: int
    direction: str
    tones: paint.Tones


@dataclass(frozen=True, kw_only=True, slots=True)
class Background:
    """`kind` of `BACKGROUNDS`, one or two colour words, their RGB values, direction of stripes or gradient."""

    kind: str
    colors: tuple[str, ...]
    rgb: tuple[paint.Rgb, ...]
    direction: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Layout:
    """What a scene holds, without pixels. Things are in painter's order: later ones lie in front."""

    background: Background
    things: tuple[Thing, ...]


@dataclass(frozen=True, kw_only=True, eq=False, slots=True)
class Scene:
    """A drawn scene.

    Attributes:
        seed, index: where it comes from.
        layout: background and things.
        image: [size, size, 3] uint8 RGB.
        masks: [things, size, size] bool, the visible part of each thing; they do not overlap.
        whole_masks: [things, size, size] bool, each thing as if it were alone.
        boxes: xyxy in pixels with exclusive ends, one per thing: the extent of its visible mask.
    """

    seed: int
    index: int
    layout: Layout
    image: NDArray[np.uint8]
    masks: NDArray[np.bool_]
    whole_masks: NDArray[np.bool_]
    boxes: tuple[tuple[int, int, int, int], ...]

    @property
    def size(self) -> int:
        """Side of the picture in pixels."""
        return self.image.shape[0]

    @property
    def things(self) -> tuple[Thing, ...]:
        return self.layout.things


def draw(seed: int, index: int, *, size: int = 96) -> Scene:
    """Draw scene `index` of the world `seed`.

    The result is the same bit for bit on every machine: only integer arithmetic and the raw words of a
    pinned bit generator are used.

    Args:
        seed: the world, 0 to 2**32 - 1.
        index: the scene, 0 to 2**32 - 1.
        size: side of the picture in pixels, 32 to 2048.

    Raises:
        ValueError: an argument is out of its range.
    """
    check_arguments(seed=seed, size=size)
    if not 0 <= index < 1 << 32:
        raise ValueError(f"index={index} must be between 0 and 2**32 - 1")
    for attempt in range(1000):
        layout = _arrange(Dice(seed, index, LAYOUT, attempt))
        if layout is None:
            continue
        scene = _paint(seed, index, layout, size)
        if scene is not None:
            return scene
    raise AssertionError(f"scene {index} of seed {seed} has no layout in 1000 attempts")


def check_arguments(*, seed: int, size: int) -> None:
    """Raise ValueError where `seed` or `size` is out of range."""
    if not 0 <= seed < 1 << 32:
        raise ValueError(f"seed={seed} must be between 0 and 2**32 - 1")
    if not SMALLEST_PICTURE <= size <= LARGEST_PICTURE:
        raise ValueError(f"size={size} must be between {SMALLEST_PICTURE} and {LARGEST_PICTURE} pixels")


def _arrange(dice: Dice) -> Layout | None:
    background = _background(dice)
    count = dice.weighted(((2, 2), (3, 4), (4, 3), (5, 2)))
    things: list[Thing] = []
    for _ in range(count):
        thing = _thing(dice, things, background)
        if thing is None:
            return None
        things.append(thing)
    return Layout(background=background, things=tuple(things))


def _background(dice: Dice) -> Background:
    kind = dice.choice(paint.BACKGROUNDS)
    colors = tuple(dice.sample(paint.COLORS, 1 if kind in ("plain", "noisy") else 2))
    # Softer than the objects, which should stand out.
    rgb = tuple(paint.mix(paint.varied(color, dice, 8), (128, 128, 128), 22) for color in colors)
    direction = dice.choice(paint.DIRECTIONS) if kind in ("gradient", "striped") else ""
    return Background(kind=kind, colors=colors, rgb=rgb, direction=direction)


def _thing(dice: Dice, others: list[Thing], background: Background) -> Thing | None:
    # Repeated kinds and colours make counting and referring worth the trouble.
    kind = dice.choice(others).kind if others and dice.chance(35) else dice.choice(KINDS)
    colors = [color for color in paint.COLORS if color not in background.colors]
    color = dice.choice(others).color if others and dice.chance(20) else dice.choice(colors)
    texture = "plain" if dice.chance(45) else dice.choice(paint.TEXTURES[1:])
    size = dice.weighted((("small", 3), ("medium", 4), ("large", 3)))
    # Two objects that no words of their looks can tell apart could not be referred to.
    if any((kind, color, texture, size) == (o.kind, o.color, o.texture, o.size) for o in others):
        return None
    radius = dice.between(*RADII[size])
    turn = dice.choice(TILTS[kind]) + dice.between(-10, 10)
    for _ in range(20):
        x, y = _place(dice, others, radius)
        inside = all(radius + 40 <= value <= SPAN - radius - 40 for value in (x, y))
        apart = all((x - o.x) ** 2 + (y - o.y) ** 2 >= ((radius + o.radius) * 62 // 100) ** 2 for o in others)
        if inside and apart:
            return Thing(
                kind=kind,
                color=color,
                texture=texture,
                size=size,
                x=x,
                y=y,
                radius=radius,
                turn=turn % 256,
                direction=dice.choice(paint.DIRECTIONS),
                tones=paint.tones(color, dice),
            )
    return None


def _place(dice: Dice, others: list[Thing], radius: int) -> tuple[int, int]:
    if others and dice.chance(30):
        # Beside another object, so near that they overlap.
        other = dice.choice(others)
        reach = (radius + other.radius) * 95 // 100
        return other.x + dice.between(-reach, reach), other.y + dice.between(-reach, reach)
    return dice.below(SPAN), dice.below(SPAN)


def _paint(seed: int, index: int, layout: Layout, size: int) -> Scene | None:
    dice = Dice(seed, index, PAINT)
    ground = layout.background
    picture = paint.paint_background(
        size, kind=ground.kind, colors=ground.rgb, direction=ground.direction, dice=dice
    )
    owner = np.full((size, size), -1)
    whole_masks = []
    half = SAMPLES**2 // 2
    for number, thing in enumerate(layout.things):
        inside = rasterise(thing.kind, x=thing.x, y=thing.y, radius=thing.radius, turn=thing.turn, size=size)
        covered = paint.paint_object(
            picture, inside, texture=thing.texture, colors=thing.tones, direction=thing.direction, dice=dice
        )
        whole_masks.append(covered >= half)
        owner[covered >= half] = number
    masks = owner == np.arange(len(layout.things))[:, None, None]
    for visible, whole in zip(masks, whole_masks, strict=True):
        # Most of an object must be seen, or its kind could not be told.
        if visible.sum() * 100 < whole.sum() * 60:
            return None
    boxes = tuple(_extent(mask) for mask in masks)
    return Scene(
        seed=seed,
        index=index,
        layout=layout,
        image=picture.astype(np.uint8),
        masks=masks,
        whole_masks=np.stack(whole_masks),
        boxes=boxes,
    )


def _extent(mask: NDArray[np.bool_]) -> tuple[int, int, int, int]:
    rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    return int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1
