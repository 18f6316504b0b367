"""The sentences of the entailment lists, which a model of a few layers can learn to judge from the image.

Each sentence that is true of one image of a split is false of another one, so its words alone do not tell
entailment from contradiction. Neutral ones speak of what no image shows.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from vlp_data.shapes import facts
from vlp_data.shapes.dice import Dice
from vlp_data.shapes.facts import look
from vlp_data.shapes.language import NUMBERS, a, noun
from vlp_data.shapes.paint import BACKGROUNDS
from vlp_data.shapes.scene import ENTAILMENT, Layout

SENTENCES = 2
"""Sentences per scene; each gives one row of entailment and one of contradiction."""
IMAGES_TRIED = 40
"""Images that are tried for a sentence, which needs one image that it is true of and one that it is not."""


@dataclass(frozen=True, kw_only=True)
class Statement:
    """A sentence about an image and what makes it true."""

    text: str
    holds: Callable[[Layout], bool]


def statement(layout: Layout, dice: Dice) -> Statement:
    """A sentence whose words come from an image. Most ask for one property."""
    thing = dice.choice(layout.things)
    wanted = dice.weighted(
        ((look(thing, "color"), 3), (look(thing, "kind"), 2), (look(thing, "color", "kind"), 1))
    )
    ground = dice.choice((layout.background.kind, dice.choice(BACKGROUNDS)))
    amount = len(layout.things)

    def shows(one: Layout) -> bool:
        return facts.count(one.things, wanted) > 0

    described = "a gradient" if ground == "gradient" else ground
    said = (
        (f"There is {a(noun(wanted))}.", shows, 4),
        (f"There is no {noun(wanted)}.", lambda one: not shows(one), 2),
        (f"The background is {described}.", lambda one: one.background.kind == ground, 3),
        (f"There are exactly {NUMBERS[amount]} shapes.", lambda one: len(one.things) == amount, 1),
    )
    return dice.weighted(tuple((Statement(text=text, holds=holds), weight) for text, holds, weight in said))


def entailment_rows(
    records: Sequence[dict[str, Any]], indices: range, layouts: Mapping[int, Layout]
) -> list[dict[str, Any]]:
    """Rows of the scenes `indices`, which `records` are: {image, sentence, label, kwords}, the three labels
    equally often. A split of one scene has neutral rows alone."""
    of_index = {record["index"]: record for record in records}
    rows = []
    for record in records:
        index = record["index"]
        dice = Dice(record["seed"], index, ENTAILMENT)
        made = [
            (record, row["sentence"], "neutral") for row in record["entailment"] if row["label"] == "neutral"
        ]
        for _ in range(SENTENCES):
            said = statement(layouts[index], dice)
            found: dict[bool, int] = {}
            for other in (index, *(dice.choice(indices) for _ in range(IMAGES_TRIED))):
                found.setdefault(said.holds(layouts[other]), other)
            if len(found) == 2:
                made += [
                    (of_index[found[truth]], said.text, "entailment" if truth else "contradiction")
                    for truth in (True, False)
                ]
        rows += [
            {"image": shown["image"], "sentence": text, "label": label, "kwords": shown["concepts"]}
            for shown, text, label in dice.shuffled(made)
        ]
    return rows
