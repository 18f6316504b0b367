"""Words for what an image shows, ranked: a stand-in for the choice that a CLIP makes (`vlp-data concepts`,
ViCHA specification 5.5).

The words are those the world's captions are made of, alone or two together ("star", "red star", "striped
star", "dotted background"). The ranking is as imperfect as a CLIP's: what is seen comes mostly first, large
things before small ones, and words that fit a part of the image follow, first among them those that mix up
what is seen ("red star" where a star and something red are). It goes by objects and background alone, never
by captions.
"""

from collections.abc import Iterator, Sequence
from functools import cache
from typing import Any

from vlp_data.shapes.dice import Dice
from vlp_data.shapes.figures import KINDS
from vlp_data.shapes.paint import BACKGROUNDS, COLORS, TEXTURES
from vlp_data.shapes.scene import CONCEPT

CHOSEN = 15
"""Words per image, as ViCHA takes them."""
SEEN, MIXED, PART, ABSENT = 100, 50, 25, 0
"""How well a word fits: the image shows it; it shows both parts, but of different things; it shows one part;
it shows none."""
NOISE = 81
"""Two random numbers below this are added to each fit. Then nine of ten of the first three words are true,
and the fifteen hold five of six of the true ones (`tests/shapes/test_concepts.py`)."""


@cache
def vocabulary() -> tuple[str, ...]:
    """All words to choose from."""
    return (
        *KINDS,
        *(f"{color} {kind}" for color in COLORS for kind in KINDS),
        *(f"{texture} {kind}" for texture in TEXTURES if texture != "plain" for kind in KINDS),
        *(f"{ground} background" for ground in BACKGROUNDS),
    )


def chosen(
    objects: Sequence[dict[str, Any]], background: str, *, seed: int, index: int, pixels: int
) -> list[str]:
    """The words of an image of `pixels` pixels, best first.

    Args:
        objects: of its record, with `kind`, `color`, `texture` and `area`.
        background: kind of its background.
    """
    words = vocabulary()
    drawn = [int(word) * NOISE >> 64 for word in Dice(seed, index, CONCEPT).words(2 * len(words))]
    fits = _fits(objects, background, pixels)
    scores = [fit + sum(pair) for fit, *pair in zip(fits, drawn[::2], drawn[1::2], strict=True)]
    ranked = sorted(range(len(words)), key=lambda place: -scores[place])
    return [words[place] for place in ranked[:CHOSEN]]


def _fits(objects: Sequence[dict[str, Any]], background: str, pixels: int) -> Iterator[int]:
    """How well each word of the vocabulary fits; up to a fifth more where the thing that it names is
    large."""
    largest: dict[str, int] = {f"{background} background": 0}
    looks, kinds = set(), {each["kind"] for each in objects}
    for each in objects:
        kind = each["kind"]
        looks |= {each["color"], each["texture"]}
        for word in (kind, f"{each['color']} {kind}", f"{each['texture']} {kind}"):
            largest[word] = max(largest.get(word, 0), each["area"])
    by_shown = (ABSENT, PART, MIXED)
    for word in vocabulary():
        if word in largest:
            yield SEEN + min(20, 100 * largest[word] // pixels)
        else:
            look, _, kind = word.rpartition(" ")
            yield ABSENT if kind == "background" else by_shown[(kind in kinds) + (look in looks)]
