"""Words for what a scene holds: noun phrases, captions, region phrases and referring expressions."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from vlp_data.shapes import facts
from vlp_data.shapes.dice import Dice
from vlp_data.shapes.facts import Look, Relation, look
from vlp_data.shapes.scene import Background, Scene, Thing

NUMBERS = ("no", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
RELATIONS: dict[Relation, str] = {
    "left": "to the left of",
    "right": "to the right of",
    "above": "above",
    "below": "below",
}
EXTREMES: dict[Relation, str] = {
    "left": "leftmost",
    "right": "rightmost",
    "above": "highest",
    "below": "lowest",
}
PLACES = {
    ("top", "left"): "in the top left corner",
    ("top", "middle"): "at the top",
    ("top", "right"): "in the top right corner",
    ("middle", "left"): "on the left side",
    ("middle", "middle"): "in the center",
    ("middle", "right"): "on the right side",
    ("bottom", "left"): "in the bottom left corner",
    ("bottom", "middle"): "at the bottom",
    ("bottom", "right"): "in the bottom right corner",
}
"""Phrase of each (row, column) of `facts.place`."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Phrase:
    """`text` describes the things `numbers`, which together fill `box` (xyxy, pixels, exclusive ends)."""

    text: str
    numbers: tuple[int, ...]
    box: tuple[int, int, int, int]


@dataclass(frozen=True, kw_only=True, slots=True)
class Expression:
    """`text` fits thing `number` and no other; "looks", "place" or a "neighbour" single it out (`by`)."""

    text: str
    number: int
    by: str


def plural(kind: str) -> str:
    return kind + "es" if kind.endswith("s") else kind + "s"


def noun(wanted: Look, amount: int = 1) -> str:
    """ "large striped red star", "shapes": the words of a look without an article."""
    kind = wanted.kind or "shape"
    words = (wanted.size, wanted.texture, wanted.color, kind if amount == 1 else plural(kind))
    return " ".join(word for word in words if word)


def a(phrase: str) -> str:
    """The phrase with "a" or "an"."""
    return ("an " if phrase[0] in "aeiou" else "a ") + phrase


def counted(wanted: Look, amount: int) -> str:
    """ "a red star", "two red stars"."""
    return a(noun(wanted)) if amount == 1 else f"{NUMBERS[amount]} {noun(wanted, amount)}"


def joined(parts: Sequence[str]) -> str:
    """ "x", "x and y", "x, y and z"."""
    return parts[0] if len(parts) == 1 else ", ".join(parts[:-1]) + " and " + parts[-1]


def sentence(text: str) -> str:
    return text[0].upper() + text[1:] + "."


def full(thing: Thing) -> Look:
    """All properties of a thing that are worth saying: "medium" and "plain" are left out."""
    names = [
        name for name, usual in (("size", "medium"), ("texture", "plain"), ("color", None), ("kind", None))
        if getattr(thing, name) != usual
    ]  # fmt: skip
    return look(thing, *names)


def named(things: Sequence[Thing], number: int) -> Look:
    """The shortest look with at least colour and kind that fits this thing only."""
    return next(wanted for wanted in facts.unique_looks(things, number) if wanted.kind and wanted.color)


def the(things: Sequence[Thing], number: int) -> str:
    return "the " + noun(named(things, number))


def background(ground: Background) -> str:
    """ "blue and white striped background" and the like, without an article."""
    first, second = ground.colors[0], ground.colors[-1]
    return {
        "plain": f"plain {first} background",
        "noisy": f"noisy {first} background",
        "gradient": f"background fading from {first} to {second}",
        "striped": f"{first} and {second} striped background",
        "checkered": f"{first} and {second} checkered background",
        "dotted": f"{first} background with {second} dots",
    }[ground.kind]


def inventory(things: Sequence[Thing], *names: str) -> list[str]:
    """Counted groups of the things that look alike in the named properties; "plain", "medium" are left
    out."""
    groups = Counter(
        Look(
            **{
                name: getattr(thing, name)
                for name in names
                if getattr(thing, name) not in ("plain", "medium")
            }
        )
        for thing in things
    )
    return [counted(wanted, amount) for wanted, amount in groups.items()]


def captions(scene: Scene, dice: Dice) -> tuple[str, str, str, str, str]:
    """Five captions: everything by name, a relation, counts, the background, and objects that stand out."""
    return (
        _everything(scene, dice),
        _relation(scene, dice),
        _counts(scene, dice),
        _background(scene, dice),
        _salient(scene, dice),
    )


def _everything(scene: Scene, dice: Dice) -> str:
    things = dice.shuffled(scene.things)
    parts = joined(inventory(things, *dice.choice((("color", "kind"), ("texture", "color", "kind")))))
    ground = a(background(scene.layout.background))
    return sentence(
        dice.choice(
            (f"{parts} on {ground}", f"a picture of {parts} on {ground}", f"{ground} with {parts} on it")
        )
    )


def _relation(scene: Scene, dice: Dice) -> str:
    things = scene.things
    pairs, fronts = facts.related_pairs(scene), facts.overlaps(scene)
    ground = dice.choice(("", "", f" on {a(background(scene.layout.background))}"))
    if fronts and (not pairs or dice.chance(30)):
        front, back = dice.choice(fronts)
        return sentence(f"{the(things, front)} partly covers {the(things, back)}{ground}")
    if not pairs:
        return sentence(
            f"the picture has both {a(noun(full(things[0])))} and {a(noun(full(things[1])))}{ground}"
        )
    first, second, side = dice.choice(pairs)
    where = RELATIONS[side]
    return sentence(
        dice.choice(
            (
                f"{the(things, first)} is {where} {the(things, second)}{ground}",
                f"{a(noun(full(things[first])))} {where} {a(noun(full(things[second])))}{ground}",
                f"there is {a(noun(full(things[first])))} {where} {the(things, second)}{ground}",
            )
        )
    )


def _counts(scene: Scene, dice: Dice) -> str:
    things = dice.shuffled(scene.things)
    kinds = joined(inventory(things, "kind"))
    shared = dice.choice(things)
    wanted = (
        Look(color=shared.color)
        if shared.texture == "plain" or dice.chance(60)
        else Look(texture=shared.texture)
    )
    amount = facts.count(things, wanted)
    word = wanted.color or wanted.texture
    share = f"{NUMBERS[amount]} of the {NUMBERS[len(things)]} shapes {'is' if amount == 1 else 'are'} {word}"
    ground = a(background(scene.layout.background))
    total = f"{NUMBERS[len(things)]} shapes"
    return sentence(
        dice.choice(
            (
                f"{total} on {ground}: {kinds}",
                f"there are exactly {total} on {ground}, and {share}",
                f"{kinds}, where {share}",
            )
        )
    )


def _background(scene: Scene, dice: Dice) -> str:
    ground = scene.layout.background
    shown = [a(noun(look(thing, "color", "kind"))) for thing in dice.sample(scene.things, 2)]
    # Two objects of one look, such as a small and a large red star.
    pair = joined(shown) if shown[0] != shown[1] else "two " + plural(shown[0].split(" ", 1)[1])
    first, second = ground.colors[0], ground.colors[-1]
    described = {
        "plain": f"the background is plain {first}",
        "noisy": f"the background is {first} and noisy",
        "gradient": f"the background fades from {first} to {second}",
        "striped": f"the background has {first} and {second} stripes",
        "checkered": f"the background is checkered in {first} and {second}",
        "dotted": f"the background is {first} with {second} dots",
    }[ground.kind]
    return sentence(
        dice.choice(
            (
                f"{described}, and {pair} can be seen in front of it",
                f"{a(background(ground))} can be seen behind {pair}",
                f"{a(background(ground))} behind {pair}",
            )
        )
    )


def _salient(scene: Scene, dice: Dice) -> str:
    things = scene.things
    placed = {i: PLACES[where] for i in range(len(things)) if (where := facts.place(scene, i))}
    order = dice.shuffled(range(len(things)))
    # Objects with a clear place first, larger ones before smaller ones.
    order.sort(key=lambda i: (i not in placed, -things[i].radius))
    first, second = order[:2]
    if first in placed and placed[first] == placed.get(second):
        both = joined([a(noun(full(things[i]))) for i in (first, second)])
        return sentence(f"{both} {placed[first]}{dice.choice(('', ' of the picture'))}")
    parts = [
        a(noun(full(things[i])))
        + (f" {placed[i]}{dice.choice(('', ' of the picture'))}" if i in placed else "")
        for i in (first, second)
    ]
    return sentence(
        dice.choice(
            (joined(parts), f"{parts[0]} together with {parts[1]}", f"a picture with {joined(parts)}")
        )
    )


def long_caption(scene: Scene, dice: Dice) -> str:
    """Several sentences: the background, every object with its place or a relation, overlaps, and a count."""
    things = scene.things
    ground = scene.layout.background
    direction = {
        "horizontal": ("horizontal", "from left to right"),
        "vertical": ("vertical", "from top to bottom"),
        "diagonal": ("diagonal", "from the top left to the bottom right"),
    }
    lines = [f"the picture shows {NUMBERS[len(things)]} shapes on {a(background(ground))}"]
    if ground.kind == "striped":
        lines.append(f"the stripes of the background are {direction[ground.direction][0]}")
    if ground.kind == "gradient":
        lines.append(
            f"the background changes from {ground.colors[0]} to {ground.colors[1]} "
            f"{direction[ground.direction][1]}"
        )
    told: list[int] = []
    relations = {(first, second): RELATIONS[side] for first, second, side in facts.related_pairs(scene)}
    for number in sorted(
        range(len(things)), key=lambda i: (facts.center(scene, i)[1], facts.center(scene, i)[0])
    ):
        words = noun(full(things[number]))
        where = facts.place(scene, number)
        anchor = next((other for other in reversed(told) if (number, other) in relations), None)
        if where and (anchor is None or dice.chance(60)):
            lines.append(
                dice.choice(
                    (
                        f"there is {a(words)} {PLACES[where]}",
                        f"{PLACES[where]} of the picture there is {a(words)}",
                    )
                )
            )
        elif anchor is not None:
            side = relations[number, anchor]
            lines.append(
                dice.choice(
                    (
                        f"{a(words)} is {side} {the(things, anchor)}",
                        f"{side} {the(things, anchor)} there is {a(words)}",
                    )
                )
            )
        else:
            lines.append(f"the picture also has {a(words)}")
        told.append(number)
    lines += [
        f"{the(things, front)} partly covers {the(things, back)}" for front, back in facts.overlaps(scene)
    ]
    shared = dice.choice(things)
    amount = facts.count(things, Look(color=shared.color))
    lines.append(f"{NUMBERS[amount]} of the shapes {'is' if amount == 1 else 'are'} {shared.color}")
    return " ".join(sentence(line) for line in lines)


def phrases(scene: Scene, dice: Dice) -> tuple[Phrase, ...]:
    """Region phrases: two per object (brief and full), and one for each of at most four related pairs."""
    things = scene.things
    found = []
    for number, thing in enumerate(things):
        brief = dice.choice((look(thing, "kind"), look(thing, "color", "kind")))
        texts = dict.fromkeys((a(noun(full(thing))), noun(brief)))
        found += [Phrase(text=text, numbers=(number,), box=scene.boxes[number]) for text in texts]
    relations = {(i, j): RELATIONS[side] for i, j, side in facts.related_pairs(scene)}
    relations |= dict.fromkeys(facts.overlaps(scene), "partly covering")
    for (i, j), words in dice.sample(list(relations.items()), 4):
        (left, top, right, bottom), (left2, top2, right2, bottom2) = scene.boxes[i], scene.boxes[j]
        box = (min(left, left2), min(top, top2), max(right, right2), max(bottom, bottom2))
        text = (
            f"{a(noun(look(things[i], 'color', 'kind')))} {words} {a(noun(look(things[j], 'color', 'kind')))}"
        )
        found.append(Phrase(text=text, numbers=(i, j), box=box))
    return tuple(found)


def expressions(scene: Scene, dice: Dice) -> tuple[Expression, ...]:
    """For each object one or two expressions by its looks, and by place and neighbour where that is
    unique."""
    things = scene.things
    found = []
    for number in range(len(things)):
        looks = facts.unique_looks(things, number)
        usual = [wanted for wanted in looks if facts.is_usual(wanted)] or looks[:1]
        chosen = dict.fromkeys([usual[0], dice.choice(usual[:4])])
        found += [Expression(text="the " + noun(wanted), number=number, by="looks") for wanted in chosen]
        found += dice.sample(_by_place(scene, number), 1)
        found += dice.sample(_by_neighbour(scene, number), 1)
    return tuple(found)


def _by_place(scene: Scene, number: int) -> list[Expression]:
    thing = scene.things[number]
    found = []
    for wanted in (look(thing, "kind"), look(thing, "color"), look(thing, "color", "kind")):
        group = [i for i, other in enumerate(scene.things) if wanted.fits(other)]
        if len(group) > 1:
            for side, word in EXTREMES.items():
                if facts.extreme(scene, group, side) == number:
                    found.append(Expression(text=f"the {word} {noun(wanted)}", number=number, by="place"))
    return found


def _by_neighbour(scene: Scene, number: int) -> list[Expression]:
    """ "the star to the left of the blue ring", where no other star could be meant."""
    things = scene.things
    found = []
    for anchor in range(len(things)):
        side = facts.relation(scene, number, anchor) if anchor != number else None
        if side is None:
            continue
        for wanted in (
            look(things[number], "kind"),
            look(things[number], "color"),
            look(things[number], "color", "kind"),
        ):
            rivals = [i for i, other in enumerate(things) if i not in (number, anchor) and wanted.fits(other)]
            # A rival must lie clearly elsewhere: in another relation, not in a doubtful one.
            if all(facts.relation(scene, rival, anchor) not in (None, side) for rival in rivals):
                text = f"the {noun(wanted)} {RELATIONS[side]} {the(things, anchor)}"
                found.append(Expression(text=text, number=number, by="neighbour"))
    return found
