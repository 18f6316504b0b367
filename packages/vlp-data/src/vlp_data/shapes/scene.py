"""Scenes: objects on a background, drawn from (seed, index) alone."""

from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from vlp_data.shapes import paint
from vlp_data.shapes.dice import Dice
from vlp_data.shapes.figures import KINDS, SAMPLES, SPAN, TILTS, coverage, rasterise

SIZES = ("small", "medium", "large")
RADII = {"small": (310, 380), "medium": (540, 630), "large": (840, 960)}
"""Radius of each size in canvas units (4096 per side); the gaps keep the words apart."""

Difficulty = Literal["full", "easy"]
"""Which scenes a world draws; see `draw`."""
DIFFICULTIES: tuple[Difficulty, ...] = ("full", "easy")

EASY_KINDS = ("circle", "square", "triangle", "star", "ring", "cross", "heart", "moon")
EASY_COLORS = ("red", "orange", "yellow", "green", "blue", "purple", "white", "black")
EASY_RADII = {"small": (300, 340), "medium": (440, 490), "large": (600, 640)}
FIELDS = 3
"""An easy scene has so many rows and columns of fields, each for one thing."""

SMALLEST_IMAGE, LARGEST_IMAGE = 32, 2048

JUDGED_PIXELS = 96
"""Size at which a layout is accepted."""

# Purposes of the random streams of one scene.
LAYOUT, PAINT, TEXT, PAIR, TASK, CONCEPT, ENTAILMENT = range(7)


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
    """`kind` of `BACKGROUNDS`, one or two colour words, their RGB values, direction of stripes or
    gradient."""

    kind: str
    colors: tuple[str, ...]
    rgb: tuple[paint.Rgb, ...]
    direction: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Layout:
    """What a scene holds, without pixels. Things are in painter's order: later ones lie in front.

    `kinds` and `colors` are those that things of the world have, for sentences about what is not there.
    """

    background: Background
    things: tuple[Thing, ...]
    kinds: tuple[str, ...] = KINDS
    colors: tuple[str, ...] = paint.COLORS


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
        """Side of the image in pixels."""
        return self.image.shape[0]

    @property
    def things(self) -> tuple[Thing, ...]:
        return self.layout.things


def draw(seed: int, index: int, *, size: int = 96, difficulty: Difficulty = "full") -> Scene:
    """Draw scene `index` of the world `seed`.

    The result is the same bit for bit on every machine: only integer arithmetic and the raw words of a
    pinned bit generator are used.

    The layout does not depend on `size`; sentences are judged on the pixels and may differ between sizes.

    Args:
        seed: the world, 0 to 2**32 - 1.
        index: the scene, 0 to 2**32 - 1.
        size: side of the image in pixels, 32 to 2048.
        difficulty: "full": two to five things of twelve kinds and twelve colours anywhere, partly one before
            the other. "easy", for models that have minutes to learn: two to four things of eight kinds and
            eight colours, each in a field of its own of three by three, before paler backgrounds.

    Raises:
        ValueError: an argument is out of its range.
    """
    check_arguments(seed=seed, size=size, difficulty=difficulty)
    if not 0 <= index < 1 << 32:
        raise ValueError(f"index={index} must be between 0 and 2**32 - 1")
    for attempt in range(1000):
        layout = (_arrange if difficulty == "full" else _arrange_easily)(Dice(seed, index, LAYOUT, attempt))
        if layout is None:
            continue
        # Judged at one size, so that a scene has the same layout at every size.
        stencils = _stencils(layout, JUDGED_PIXELS)
        if _is_seen(stencils):
            return _paint(seed, index, layout, stencils if size == JUDGED_PIXELS else _stencils(layout, size))
    raise AssertionError(f"scene {index} of seed {seed} has no layout in 1000 attempts")


def check_arguments(*, seed: int, size: int, difficulty: str = "full") -> None:
    """Raise ValueError where an argument is out of range."""
    if difficulty not in DIFFICULTIES:
        raise ValueError(f"difficulty={difficulty!r} is not known; choose among {', '.join(DIFFICULTIES)}")
    if not 0 <= seed < 1 << 32:
        raise ValueError(f"seed={seed} must be between 0 and 2**32 - 1")
    if not SMALLEST_IMAGE <= size <= LARGEST_IMAGE:
        raise ValueError(f"size={size} must be between {SMALLEST_IMAGE} and {LARGEST_IMAGE} pixels")


def _arrange(dice: Dice) -> Layout | None:
    background = _background(dice, pale=22)
    count = dice.weighted(((2, 2), (3, 4), (4, 3), (5, 2)))
    things: list[Thing] = []
    for _ in range(count):
        thing = _thing(dice, things, background)
        if thing is None:
            return None
        things.append(thing)
    return Layout(background=background, things=tuple(things))


def _arrange_easily(dice: Dice) -> Layout | None:
    """Nothing hides or touches anything, and where a thing is can be said in one word for its row and one for
    its column."""
    background = _background(dice, pale=60)
    colors = [color for color in EASY_COLORS if color not in background.colors]
    things: list[Thing] = []
    for field in dice.sample(range(FIELDS**2), dice.weighted(((2, 4), (3, 4), (4, 2)))):
        kind = dice.choice(things).kind if things and dice.chance(20) else dice.choice(EASY_KINDS)
        color = dice.choice(things).color if things and dice.chance(15) else dice.choice(colors)
        texture = "plain" if dice.chance(60) else dice.choice(paint.TEXTURES[1:])
        size = dice.weighted((("small", 3), ("medium", 4), ("large", 3)))
        if any((kind, color, texture, size) == (o.kind, o.color, o.texture, o.size) for o in things):
            return None
        row, column = divmod(field, FIELDS)
        x, y = ((2 * place + 1) * SPAN // (2 * FIELDS) + dice.between(-40, 40) for place in (column, row))
        things.append(
            Thing(
                kind=kind,
                color=color,
                texture=texture,
                size=size,
                x=x,
                y=y,
                radius=dice.between(*EASY_RADII[size]),
                turn=(dice.choice(TILTS[kind]) + dice.between(-10, 10)) % 256,
                direction=dice.choice(paint.DIRECTIONS),
                tones=paint.tones(color, dice),
            )
        )
    return Layout(background=background, things=tuple(things), kinds=EASY_KINDS, colors=EASY_COLORS)


def _background(dice: Dice, *, pale: int) -> Background:
    kind = dice.choice(paint.BACKGROUNDS)
    colors = tuple(dice.sample(paint.COLORS, 1 if kind in ("plain", "noisy") else 2))
    # Softer than the objects, which should stand out: `pale` percent of gray.
    rgb = tuple(paint.mix(paint.varied(color, dice, 8), (128, 128, 128), pale) for color in colors)
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


def _stencils(layout: Layout, size: int) -> list[NDArray[np.bool_]]:
    """The samples inside each thing."""
    return [rasterise(t.kind, x=t.x, y=t.y, radius=t.radius, turn=t.turn, size=size) for t in layout.things]


def _masks(stencils: list[NDArray[np.bool_]]) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
    """(visible, whole) masks: a pixel belongs to the foremost thing that covers at least half of it."""
    whole = np.stack([coverage(stencil) >= SAMPLES**2 // 2 for stencil in stencils])
    # Counted from the front: the first thing hides all behind it.
    ahead = np.cumsum(whole[::-1], axis=0)[::-1] - whole
    return whole & (ahead == 0), whole


def _is_seen(stencils: list[NDArray[np.bool_]]) -> bool:
    """Whether at least 60 % of every thing is visible, or its kind could not be told."""
    visible, whole = (masks.sum(axis=(1, 2)) for masks in _masks(stencils))
    return bool((visible * 100 >= whole * 60).all())


def _paint(seed: int, index: int, layout: Layout, stencils: list[NDArray[np.bool_]]) -> Scene:
    dice = Dice(seed, index, PAINT)
    ground = layout.background
    size = stencils[0].shape[0] // SAMPLES
    image = paint.paint_background(
        size, kind=ground.kind, colors=ground.rgb, direction=ground.direction, dice=dice
    )
    for thing, inside in zip(layout.things, stencils, strict=True):
        paint.paint_object(
            image, inside, texture=thing.texture, colors=thing.tones, direction=thing.direction, dice=dice
        )
    masks, whole_masks = _masks(stencils)
    return Scene(
        seed=seed,
        index=index,
        layout=layout,
        image=image.astype(np.uint8),
        masks=masks,
        whole_masks=whole_masks,
        boxes=tuple(_extent(mask) for mask in masks),
    )


def _extent(mask: NDArray[np.bool_]) -> tuple[int, int, int, int]:
    rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    return int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1
