"""Questions with answers, entailment triples and sentences about two images."""

from collections.abc import Callable
from dataclasses import dataclass

from vlp_data.shapes import facts
from vlp_data.shapes.dice import Dice
from vlp_data.shapes.facts import OPPOSITE, Look, look
from vlp_data.shapes.language import NUMBERS, RELATIONS, a, full, named, noun, sentence, the
from vlp_data.shapes.paint import BACKGROUNDS, TEXTURES
from vlp_data.shapes.scene import Layout, Scene, Thing

PATTERNS = {
    "plain": "none",
    "striped": "stripes",
    "dotted": "dots",
    "checkered": "checks",
    "speckled": "speckles",
}
GROUNDS = {**PATTERNS, "noisy": "noise", "gradient": "gradient"}


@dataclass(frozen=True, kw_only=True, slots=True)
class Question:
    """A question with ten answers, as in VQA v2: all are right, and most of them are `answer`."""

    text: str
    answer: str
    answers: tuple[str, ...]
    question_type: str
    answer_type: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Hypothesis:
    """A sentence with its SNLI-VE label towards the image: "entailment", "neutral" or "contradiction"."""

    text: str
    label: str


@dataclass(frozen=True, kw_only=True, slots=True)
class PairSentence:
    """A sentence about a left and a right image, and whether it is true."""

    text: str
    label: bool


def _question(text: str, answer: str, kind: str, *, other: tuple[str, int] | None = None) -> Question:
    """`other` = (an equally right answer, how many of the ten give it)."""
    spare, times = other or (answer, 0)
    answers = (answer,) * (10 - times) + (spare,) * times
    answer_type = "yes/no" if answer in ("yes", "no") else "number" if answer.isdigit() else "other"
    return Question(text=text, answer=answer, answers=answers, question_type=kind, answer_type=answer_type)


def questions(scene: Scene, dice: Dice) -> tuple[Question, ...]:
    """Up to eleven questions: colour, kind, pattern, count, place, existence, relation, background.

    "yes" is right as often as "no".
    """
    makers = (
        _color,
        _what,
        _pattern,
        _count,
        _count,
        _where,
        _exists,
        _exists,
        _related,
        _ground_color,
        _ground_pattern,
    )
    asked = [question for maker in makers if (question := maker(scene, dice))]
    return tuple({question.text: question for question in asked}.values())


def _without(scene: Scene, dice: Dice, missing: str) -> tuple[Thing, Look] | None:
    """A thing and words that single it out without naming one of its properties."""
    options = [
        (thing, wanted)
        for number, thing in enumerate(scene.things)
        for wanted in facts.unique_looks(scene.things, number)
        if getattr(wanted, missing) is None and wanted != Look()
    ]
    usual = [option for option in options if facts.is_usual(option[1])]
    return dice.choice(usual or options) if options else None


def _color(scene: Scene, dice: Dice) -> Question | None:
    picked = _without(scene, dice, "color")
    return picked and _question(f"What color is the {noun(picked[1])}?", picked[0].color, "what color is the")


def _what(scene: Scene, dice: Dice) -> Question | None:
    picked = _without(scene, dice, "kind")
    if picked is None:
        return None
    thing, wanted = picked
    text = dice.choice((f"What is the {noun(wanted)}?", f"What kind of shape is the {noun(wanted)}?"))
    return _question(
        text,
        thing.kind,
        "what kind of" if "kind" in text else "what is the",
        other=(a(thing.kind), dice.below(3)),
    )


def _pattern(scene: Scene, dice: Dice) -> Question | None:
    picked = _without(scene, dice, "texture")
    if picked is None:
        return None
    thing, wanted = picked
    other = (thing.texture, dice.below(4)) if thing.texture != "plain" else None
    return _question(f"What pattern is on the {noun(wanted)}?", PATTERNS[thing.texture], "what", other=other)


def _count(scene: Scene, dice: Dice) -> Question:
    thing = dice.choice(scene.things)
    wanted = dice.choice(
        (
            Look(),
            look(thing, "kind"),
            look(thing, "color"),
            Look(kind=dice.choice(scene.layout.kinds)),
            look(thing, "size"),
        )
    )
    amount = facts.count(scene.things, wanted)
    text = f"How many {noun(wanted, 2)} are {dice.choice(('there', 'in the picture'))}?"
    other = (NUMBERS[amount], dice.below(4)) if amount else None
    return _question(text, str(amount), "how many", other=other)


def _where(scene: Scene, dice: Dice) -> Question | None:
    placed = [number for number in range(len(scene.things)) if facts.place(scene, number)]
    if not placed:
        return None
    number = dice.choice(placed)
    row, column = facts.place(scene, number)  # type: ignore[misc]  # only called where there is a place
    if row == column:
        answer, other = "center", "middle"
    elif "middle" in (row, column):
        answer = column if row == "middle" else row
        other = f"{'on' if answer in ('left', 'right') else 'at'} the {answer}"
    else:
        answer, other = f"{row} {column}", f"{row} {column} corner"
    wanted = facts.unique_looks(scene.things, number)[0]
    return _question(f"Where is the {noun(wanted)}?", answer, "where is the", other=(other, dice.below(4)))


def _exists(scene: Scene, dice: Dice) -> Question:
    wanted, true = _claimed_look(scene.layout, dice, dice.chance(50))
    return _question(f"Is there {a(noun(wanted))} in the picture?", "yes" if true else "no", "is there a")


def _related(scene: Scene, dice: Dice) -> Question | None:
    claim = _claimed_relation(scene, dice, dice.chance(50))
    if claim is None:
        return None
    first, where, second, true = claim
    return _question(f"Is {first} {where} {second}?", "yes" if true else "no", "is the")


def _ground_color(scene: Scene, dice: Dice) -> Question:
    ground = scene.layout.background
    if len(ground.colors) == 1:
        return _question("What color is the background?", ground.colors[0], "what color is the")
    one, two = ground.colors
    return _question(
        "What are the colors of the background?",
        f"{one} and {two}",
        "what are the",
        other=(f"{two} and {one}", dice.below(5)),
    )


def _ground_pattern(scene: Scene, dice: Dice) -> Question:
    ground = scene.layout.background
    if dice.chance(50):
        return _question("What pattern is on the background?", GROUNDS[ground.kind], "what")
    asked = (
        ground.kind if dice.chance(50) else dice.choice([kind for kind in BACKGROUNDS if kind != ground.kind])
    )
    words = "a gradient" if asked == "gradient" else asked
    return _question(f"Is the background {words}?", "yes" if asked == ground.kind else "no", "is the")


def _claimed_look(layout: Layout, dice: Dice, true: bool) -> tuple[Look, bool]:
    """A look that something has, or (one property of a real thing exchanged) that nothing has."""
    thing = dice.choice(layout.things)
    base = dice.choice((look(thing, "color", "kind"), full(thing)))
    if true:
        return base, True
    wrong = [Look(base.size, base.texture, color, base.kind) for color in layout.colors]
    wrong += [Look(base.size, base.texture, base.color, kind) for kind in layout.kinds]
    return dice.choice([wanted for wanted in wrong if facts.count(layout.things, wanted) == 0]), False


def _claimed_relation(scene: Scene, dice: Dice, true: bool) -> tuple[str, str, str, bool] | None:
    """("the red star", "to the left of", "the ring", true): a clear relation, or its opposite."""
    pairs = facts.related_pairs(scene)
    if not pairs:
        return None
    first, second, side = dice.choice(pairs)
    words = RELATIONS[side if true else OPPOSITE[side]]
    return the(scene.things, first), words, the(scene.things, second), true


def hypotheses(scene: Scene, dice: Dice) -> tuple[Hypothesis, ...]:
    """Two sentences of each label; neutral ones speak of what no image shows, such as wishes and owners."""
    made = [
        Hypothesis(text=text, label=label)
        for label, true in (("entailment", True), ("contradiction", False))
        for _ in range(2)
        if (text := _statement(scene, dice, true))
    ]
    made += [Hypothesis(text=_neutral(scene, dice), label="neutral") for _ in range(2)]
    return tuple({hypothesis.text: hypothesis for hypothesis in made}.values())


def _statement(scene: Scene, dice: Dice, true: bool) -> str:
    makers: tuple[Callable[[Scene, Dice, bool], str | None], ...] = (
        _says_look,
        _says_count,
        _says_relation,
        _says_ground,
    )
    return next(text for _ in range(100) if (text := dice.choice(makers)(scene, dice, true)))


def _says_look(scene: Scene, dice: Dice, true: bool) -> str:
    wanted, _ = _claimed_look(scene.layout, dice, true)
    return sentence(f"there is {a(noun(wanted))}")


def _says_count(scene: Scene, dice: Dice, true: bool) -> str:
    thing = dice.choice(scene.things)
    wanted = dice.choice((Look(), look(thing, "kind"), look(thing, "color")))
    amount = facts.count(scene.things, wanted)
    said = amount if true else dice.choice([n for n in range(1, len(scene.things) + 2) if n != amount])
    return sentence(f"there {'is' if said == 1 else 'are'} exactly {NUMBERS[said]} {noun(wanted, said)}")


def _says_relation(scene: Scene, dice: Dice, true: bool) -> str | None:
    claim = _claimed_relation(scene, dice, true)
    return claim and sentence(f"{claim[0]} is {claim[1]} {claim[2]}")


def _says_ground(scene: Scene, dice: Dice, true: bool) -> str:
    kind = scene.layout.background.kind
    said = kind if true else dice.choice([other for other in BACKGROUNDS if other != kind])
    return sentence(f"the background is {'a gradient' if said == 'gradient' else said}")


NEUTRAL = (
    "{} was painted by a child",
    "{} is the favorite of somebody",
    "{} will be moved tomorrow",
    "{} is made of paper",
    "{} belongs to a teacher",
    "{} was drawn before the other shapes were planned",
    "somebody wants to buy {}",
    "{} is older than a year",
)


def _neutral(scene: Scene, dice: Dice) -> str:
    number = dice.below(len(scene.things))
    return sentence(dice.choice(NEUTRAL).format("the " + noun(named(scene.things, number))))


def pair_sentences(left: Layout, right: Layout, dice: Dice, *, amount: int = 2) -> tuple[PairSentence, ...]:
    """`amount` different NLVR2-style sentences about two images; true and false ones are equally likely."""
    made: dict[str, PairSentence] = {}
    while len(made) < amount:
        wanted = dice.chance(50)
        # Parameters are drawn until the sentence has the wanted truth; every kind of sentence can be either
        # for some of them.
        for _ in range(200):
            text, true = _compare(left, right, dice)
            if true == wanted and text not in made:
                made[text] = PairSentence(text=text, label=true)
                break
        else:
            raise AssertionError("no sentence about this pair")
    return tuple(made.values())


def _compare(left: Layout, right: Layout, dice: Dice) -> tuple[str, bool]:
    here, there = left.things, right.things
    thing = dice.choice(here + there)
    wanted = dice.choice(
        (look(thing, "kind"), look(thing, "color"), look(thing, "color", "kind"), look(thing, "texture"))
    )
    if dice.chance(25):
        wanted = Look(color=dice.choice(left.colors), kind=dice.choice((thing.kind, None)))
    one, two = facts.count(here, wanted), facts.count(there, wanted)
    said = dice.between(1, 4)
    side, amount = dice.choice((("left", one), ("right", two)))
    ground = dice.choice(BACKGROUNDS)
    ground_words = "a gradient" if ground == "gradient" else ground
    texture = dice.choice(TEXTURES[1:])
    is_are = "is" if said == 1 else "are"
    return dice.choice(
        (
            (
                f"There {is_are} exactly {NUMBERS[said]} {noun(wanted, said)} in the two pictures together.",
                one + two == said,
            ),
            (f"Both pictures show at least one {noun(wanted)}.", one > 0 and two > 0),
            (f"Only one of the pictures shows {a(noun(wanted))}.", (one > 0) != (two > 0)),
            (f"Neither picture shows {a(noun(wanted))}.", one + two == 0),
            (f"The {side} picture has exactly {NUMBERS[said]} {noun(wanted, said)}.", amount == said),
            (f"The left picture has more {noun(wanted, 2)} than the right picture.", one > two),
            ("Both pictures have the same number of shapes.", len(here) == len(there)),
            (
                f"The background of both pictures is {ground_words}.",
                left.background.kind == right.background.kind == ground,
            ),
            (
                f"At least one picture shows {a(texture + ' shape')}.",
                facts.count(here + there, Look(texture=texture)) > 0,
            ),
        )
    )
