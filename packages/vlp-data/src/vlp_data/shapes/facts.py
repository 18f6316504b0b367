"""What is true of a scene: which objects a description fits, where they are, how they stand to each other.

Every sentence of the world is built on these functions. Each has a dead zone: where a person could hesitate,
nothing is said and nothing is denied.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import permutations, product
from typing import Literal

from vlp_data.shapes.scene import Scene, Thing

Relation = Literal["left", "right", "above", "below"]
OPPOSITE: dict[Relation, Relation] = {"left": "right", "right": "left", "above": "below", "below": "above"}


@dataclass(frozen=True, slots=True)
class Look:
    """A description by looks; None leaves a property open. `Look()` fits everything."""

    size: str | None = None
    texture: str | None = None
    color: str | None = None
    kind: str | None = None

    def fits(self, thing: Thing) -> bool:
        return (
            self.size in (None, thing.size)
            and self.texture in (None, thing.texture)
            and self.color in (None, thing.color)
            and self.kind in (None, thing.kind)
        )


def look(thing: Thing, *names: str) -> Look:
    """The named properties of a thing ("size", "texture", "color", "kind")."""
    return Look(**{name: getattr(thing, name) for name in names})


def count(things: Sequence[Thing], wanted: Look) -> int:
    """How many things fit."""
    return sum(wanted.fits(thing) for thing in things)


def is_usual(wanted: Look) -> bool:
    """Whether the look does without "medium" and "plain"."""
    return wanted.size != "medium" and wanted.texture != "plain"


def unique_looks(things: Sequence[Thing], number: int) -> list[Look]:
    """All descriptions that fit thing `number` and no other, those with the fewest properties first.

    "medium" and "plain", words that a person would hardly use, come in last, when nothing else helps.
    """
    thing = things[number]
    found = []
    for names in product(*(("", name) for name in ("size", "texture", "color", "kind"))):
        wanted = look(thing, *filter(None, names))
        if count(things, wanted) == 1:
            cost = sum(bool(name) for name in names) + (0 if is_usual(wanted) else 4)
            found.append((cost, wanted))
    return [wanted for _, wanted in sorted(found, key=lambda entry: entry[0])]


def center(scene: Scene, number: int) -> tuple[int, int]:
    """Twice the centre (x, y) of the box of a thing's visible part, in pixels."""
    left, top, right, bottom = scene.boxes[number]
    return left + right, top + bottom


def relation(scene: Scene, first: int, second: int) -> Relation | None:
    """Where thing `first` lies, seen from `second`.

    Box centres must differ by at least 12 % of the side, and along the named axis 1.5 times as much as along
    the other; else None.
    """
    (ax, ay), (bx, by) = center(scene, first), center(scene, second)
    dx, dy = ax - bx, ay - by
    least = 2 * scene.size * 12
    if abs(dx) * 100 >= least and 2 * abs(dx) >= 3 * abs(dy):
        return "left" if dx < 0 else "right"
    if abs(dy) * 100 >= least and 2 * abs(dy) >= 3 * abs(dx):
        return "above" if dy < 0 else "below"
    return None


def covers(scene: Scene, front: int, back: int) -> bool:
    """Whether seen pixels of `front` hide at least 8 % (and 4 pixels) of `back`."""
    hidden = int((scene.masks[front] & scene.whole_masks[back]).sum())
    return hidden >= 4 and hidden * 100 >= 8 * int(scene.whole_masks[back].sum())


def related_pairs(scene: Scene) -> list[tuple[int, int, Relation]]:
    """All ordered pairs with a clear relation: (first, second, where first lies seen from second)."""
    found = []
    for first, second in permutations(range(len(scene.things)), 2):
        side = relation(scene, first, second)
        if side is not None:
            found.append((first, second, side))
    return found


def overlaps(scene: Scene) -> list[tuple[int, int]]:
    """All (front, back) where the front object covers a part of the other."""
    return [(i, j) for i, j in permutations(range(len(scene.things)), 2) if covers(scene, i, j)]


def place(scene: Scene, number: int) -> tuple[str, str] | None:
    """(row, column) of a thing: "top", "middle" or "bottom", and "left", "middle" or "right"; None where it
    is not clear.

    The box centre decides: below 36 % of the side, between 43 % and 57 %, or above 64 %.
    """
    x, y = center(scene, number)
    column = _third(x, scene.size, ("left", "middle", "right"))
    row = _third(y, scene.size, ("top", "middle", "bottom"))
    return (row, column) if row and column else None


def _third(doubled: int, size: int, words: tuple[str, str, str]) -> str | None:
    percent = doubled * 50 / size
    if percent < 36:
        return words[0]
    if percent > 64:
        return words[2]
    return words[1] if 43 <= percent <= 57 else None


def extreme(scene: Scene, numbers: Sequence[int], side: Relation) -> int | None:
    """The thing of `numbers` that lies farthest to one side, by at least 8 % of the image; else None."""
    axis, sign = {"left": (0, 1), "right": (0, -1), "above": (1, 1), "below": (1, -1)}[side]
    order = sorted(numbers, key=lambda number: sign * center(scene, number)[axis])
    gap = sign * (center(scene, order[1])[axis] - center(scene, order[0])[axis])
    return order[0] if gap * 100 >= 2 * 8 * scene.size else None
