"""Every sentence of the world is read back by a grammar of its own and judged against masks and object words.

Nothing of `facts` or `language` is used here: boxes, places, relations and counts are computed again, from
the masks.
"""

import re
from collections.abc import Callable

import numpy as np
import pytest
from vlp_data import shapes

SCENES = [(0, index) for index in range(120)] + [(2**31 + 5, index) for index in range(30)]

NUMBER = {
    word: n
    for n, word in enumerate(
        ["no", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"]
    )
}
NUM = f"(?:{'|'.join(NUMBER)})"
KIND = f"(?:{'|'.join(shapes.KINDS)}|shape)"
COLOR = f"(?:{'|'.join(shapes.COLORS)})"
TEXTURE = f"(?:{'|'.join(shapes.TEXTURES)})"
NOUN = rf"(?:(?:small |medium |large )?(?:{TEXTURE} )?(?:{COLOR} )?{KIND}(?:e?s)?)"
NP = rf"(?:(?:an?|the|{NUM}) {NOUN})"
LIST = rf"{NP}(?:, {NP})*(?: and {NP})?"
GROUND = (
    rf"(?:plain {COLOR} background|noisy {COLOR} background|background fading from {COLOR} to {COLOR}"
    rf"|{COLOR} and {COLOR} (?:striped|checkered) background|{COLOR} background with {COLOR} dots)"
)
RELATION = "(?:to the left of|to the right of|above|below)"
PLACE = (
    "(?:in the top left corner|at the top|in the top right corner|on the left side|in the center"
    "|on the right side|in the bottom left corner|at the bottom|in the bottom right corner)"
)


class NotUnique(Exception):
    """ "the ..." was said of nothing, or of several things."""


class Judge:
    """The truth about one scene."""

    def __init__(self, scene: shapes.Scene) -> None:
        self.things = scene.things
        self.ground = scene.layout.background
        self.masks = scene.masks
        self.whole = scene.whole_masks
        self.size = scene.size
        self.center = []
        for mask in scene.masks:
            ys, xs = np.nonzero(mask)
            self.center.append(
                ((xs.min() + xs.max() + 1) / 2 / scene.size, (ys.min() + ys.max() + 1) / 2 / scene.size)
            )

    def fitting(self, noun: str) -> set[int]:
        """Things that a noun phrase (without article) fits."""
        *words, kind = noun.split()
        kind = kind if kind in shapes.KINDS or kind == "shape" else re.sub("s$", "", kind)
        kind = kind if kind in shapes.KINDS or kind == "shape" else re.sub("e$", "", kind)
        assert kind in shapes.KINDS or kind == "shape", noun
        return {
            i
            for i, thing in enumerate(self.things)
            if kind in ("shape", thing.kind)
            and all(word in (thing.size, thing.texture, thing.color) for word in words)
        }

    def meant(self, phrase: str) -> set[int]:
        """Candidates of a noun phrase with its article; "the" must have exactly one."""
        article, noun = phrase.split(" ", 1)
        found = self.fitting(noun)
        if article == "the" and len(found) != 1:
            raise NotUnique(f"'{phrase}' fits {len(found)} objects")
        return found

    def exists(self, phrases: str) -> bool:
        """All parts of a list are there, "two red stars" at least twice."""
        for phrase in re.findall(NP, phrases):
            article, _ = phrase.split(" ", 1)
            if len(self.meant(phrase)) < NUMBER.get(article, 1):
                return False
        return True

    def exact(self, phrases: str) -> bool:
        """The list is an inventory of all objects by number."""
        parts = re.findall(NP, phrases)
        counts = [(NUMBER.get(part.split()[0], 1), self.fitting(part.split(" ", 1)[1])) for part in parts]
        return all(n == len(found) for n, found in counts) and set.union(*(f for _, f in counts)) == set(
            range(len(self.things))
        )

    def background(self, text: str) -> bool:
        colors = tuple(re.findall(rf"\b{COLOR}\b", text))
        kinds = {
            "nois": "noisy",
            "fad": "gradient",
            "strip": "striped",
            "check": "checkered",
            "dots": "dotted",
            "plain": "plain",
        }
        kind = next(kind for mark, kind in kinds.items() if mark in text)
        return kind == self.ground.kind and colors == self.ground.colors

    def stands(self, first: int, relation: str, second: int) -> bool:
        (ax, ay), (bx, by) = self.center[first], self.center[second]
        dx, dy = bx - ax, by - ay
        ahead, aside = {
            "to the left of": (dx, dy),
            "to the right of": (-dx, dy),
            "above": (dy, dx),
            "below": (-dy, dx),
        }[relation]
        return ahead > 0.11 and ahead > 1.2 * abs(aside)

    def related(self, first: str, relation: str, second: str) -> bool:
        return any(
            self.stands(i, relation, j) for i in self.meant(first) for j in self.meant(second) if i != j
        )

    def covering(self, first: str, second: str) -> bool:
        return any(
            i > j and (self.masks[i] & self.whole[j]).sum() >= 0.07 * self.whole[j].sum()
            for i in self.meant(first)
            for j in self.meant(second)
        )

    def at(self, number: int, place: str) -> bool:
        x, y = self.center[number]
        row = 0 if "top" in place else 2 if "bottom" in place else 1
        column = 0 if "left" in place else 2 if "right" in place else 1
        return (np.digitize(x, (0.4, 0.6)), np.digitize(y, (0.4, 0.6))) == (column, row)

    def placed(self, phrase: str, place: str) -> bool:
        return any(self.at(i, place) for i in self.meant(phrase))

    def share(self, number: str, total: str | None, word: str) -> bool:
        have = len(self.fitting(f"{word} shapes"))
        return have == NUMBER[number] and (total is None or NUMBER[total] == len(self.things))


FORMS: dict[str, Callable[..., bool]] = {
    # Captions
    rf"(?:a picture of )?({LIST}) on an? ({GROUND})": lambda j, x, g: j.exists(x) and j.background(g),
    rf"an? ({GROUND}) with ({LIST}) on it": lambda j, g, x: j.exists(x) and j.background(g),
    rf"({NP}) partly covers ({NP})(?: on an? ({GROUND}))?": lambda j, x, y, g: (
        j.covering(x, y) and (g is None or j.background(g))
    ),
    rf"(?:there is )?({NP}) (?:is )?({RELATION}) ({NP})(?: on an? ({GROUND}))?": lambda j, x, r, y, g: (
        j.related(x, r, y) and (g is None or j.background(g))
    ),
    rf"({RELATION}) ({NP}) there is ({NP})": lambda j, r, y, x: j.related(x, r, y),
    rf"the picture has both ({NP} and {NP})(?: on an? ({GROUND}))?": lambda j, x, g: (
        j.exists(x) and (g is None or j.background(g))
    ),
    rf"({NUM}) shapes on an? ({GROUND}): ({LIST})": lambda j, n, g, x: (
        NUMBER[n] == len(j.things) and j.background(g) and j.exact(x)
    ),
    rf"there are exactly ({NUM}) shapes on an? ({GROUND}), "
    rf"and ({NUM}) of the ({NUM}) shapes (?:is|are) (\w+)": (
        lambda j, n, g, k, m, w: NUMBER[n] == len(j.things) and j.background(g) and j.share(k, m, w)
    ),
    rf"({LIST}), where ({NUM}) of the ({NUM}) shapes (?:is|are) (\w+)": (
        lambda j, x, k, m, w: j.exact(x) and j.share(k, m, w)
    ),
    rf"(the background .*), and ({LIST}) can be seen in front of it": (
        lambda j, g, x: j.background(g) and j.exists(x)
    ),
    rf"an? ({GROUND}) (?:can be seen )?behind ({LIST})": lambda j, g, x: j.background(g) and j.exists(x),
    rf"(?:a picture with )?({NP})(?: ({PLACE})(?: of the picture)?)? (?:and|together with) "
    rf"({NP})(?: ({PLACE})(?: of the picture)?)?": (
        lambda j, x, p, y, q: (
            (p is None and q is not None and j.placed(x, q) and j.placed(y, q))
            or (
                (p is None or j.placed(x, p))
                and (q is None or j.placed(y, q))
                and j.exists(x)
                and j.exists(y)
            )
        )
    ),
    # Long captions
    rf"the picture shows ({NUM}) shapes on an? ({GROUND})": (
        lambda j, n, g: NUMBER[n] == len(j.things) and j.background(g)
    ),
    r"the stripes of the background are (\w+)": (
        lambda j, d: j.ground.kind == "striped" and j.ground.direction == d
    ),
    rf"the background changes from ({COLOR}) to ({COLOR}) (.*)": lambda j, a, b, way: (
        j.ground.kind == "gradient"
        and (a, b) == j.ground.colors
        and way == {"horizontal": "from left to right", "vertical": "from top to bottom"}.get(
            j.ground.direction, "from the top left to the bottom right"
        )
    ),
    rf"there is ({NP}) ({PLACE})": lambda j, x, p: j.placed(x, p),
    rf"({PLACE}) of the picture there is ({NP})": lambda j, p, x: j.placed(x, p),
    rf"the picture also has ({NP})": lambda j, x: j.exists(x),
    rf"({NUM}) of the shapes (?:is|are) (\w+)": lambda j, k, w: j.share(k, None, w),
    # Hypotheses
    rf"there is ({NP})": lambda j, x: j.exists(x),
    rf"there (?:is|are) exactly ({NUM}) ({NOUN})": lambda j, n, x: NUMBER[n] == len(j.fitting(x)),
    r"the background is (?:a )?(\w+)": lambda j, kind: kind == j.ground.kind,
}  # fmt: skip


def holds(judge: Judge, sentence: str) -> bool:
    assert sentence.endswith(".")
    assert sentence[0].isupper()
    text = sentence[0].lower() + sentence[1:-1]
    for form, test in FORMS.items():
        if match := re.fullmatch(form, text):
            return bool(test(judge, *match.groups()))
    raise AssertionError(f"no grammar for: {sentence}")


def resolve(judge: Judge, expression: str) -> set[int]:
    """The things a referring expression can mean."""
    if match := re.fullmatch(rf"the ({NOUN})", expression):
        return judge.fitting(match[1])
    if match := re.fullmatch(rf"the (leftmost|rightmost|highest|lowest) ({NOUN})", expression):
        axis, sign = {"leftmost": (0, 1), "rightmost": (0, -1), "highest": (1, 1), "lowest": (1, -1)}[
            match[1]
        ]
        values = {i: sign * judge.center[i][axis] for i in judge.fitting(match[2])}
        return {i for i, value in values.items() if value < min(values.values()) + 0.07}
    match = re.fullmatch(rf"the ({NOUN}) ({RELATION}) ({NP})", expression)
    assert match, f"no grammar for: {expression}"
    (anchor,) = judge.meant(match[3])
    return {i for i in judge.fitting(match[1]) if i != anchor and judge.stands(i, match[2], anchor)}


@pytest.fixture(scope="module")
def world() -> list[tuple[shapes.Scene, shapes.Annotations, Judge]]:
    scenes = [shapes.draw(seed, index) for seed, index in SCENES]
    scenes += [shapes.draw(3, index, difficulty="easy") for index in range(60)]
    return [(scene, shapes.annotate(scene), Judge(scene)) for scene in scenes]


def test_captions_are_true_and_five_of_them_differ(world) -> None:
    for scene, texts, judge in world:
        assert len(set(texts.captions)) == 5
        for caption in texts.captions:
            assert holds(judge, caption), (scene.index, caption)
            assert len(caption.split()) <= 40, caption


def test_long_captions_are_true_and_name_every_object(world) -> None:
    for scene, texts, judge in world:
        sentences = re.findall(r"[^.]+\.", texts.long_caption)
        assert len(sentences) >= 2 + len(scene.things)
        for sentence in sentences:
            assert holds(judge, sentence.strip()), (scene.index, sentence)
        assert all(f"{thing.color} {thing.kind}" in texts.long_caption for thing in scene.things)


def test_region_phrases_describe_their_box(world) -> None:
    for scene, texts, judge in world:
        assert {number for phrase in texts.phrases for number in phrase.numbers} == set(
            range(len(scene.things))
        )
        for phrase in texts.phrases:
            ys, xs = np.nonzero(scene.masks[list(phrase.numbers)].any(axis=0))
            assert phrase.box == (xs.min(), ys.min(), xs.max() + 1, ys.max() + 1)
            if match := re.fullmatch(rf"(?:an? )?({NOUN})", phrase.text):
                assert phrase.numbers[0] in judge.fitting(match[1])
            elif match := re.fullmatch(rf"an? ({NOUN}) partly covering an? ({NOUN})", phrase.text):
                first, second = phrase.numbers
                assert first in judge.fitting(match[1])
                assert second in judge.fitting(match[2])
                assert first > second
                assert (scene.masks[first] & scene.whole_masks[second]).any()
            else:
                match = re.fullmatch(rf"an? ({NOUN}) ({RELATION}) an? ({NOUN})", phrase.text)
                assert match, phrase.text
                first, second = phrase.numbers
                assert first in judge.fitting(match[1])
                assert second in judge.fitting(match[3])
                assert judge.stands(first, match[2], second)


def test_referring_expressions_fit_exactly_one_object(world) -> None:
    kinds = set()
    for scene, texts, judge in world:
        assert {expression.number for expression in texts.expressions} == set(range(len(scene.things)))
        for expression in texts.expressions:
            kinds.add(expression.by)
            assert resolve(judge, expression.text) == {expression.number}, (scene.index, expression)
    assert kinds == {"looks", "place", "neighbour"}


def test_entailed_sentences_are_true_and_contradictions_false(world) -> None:
    labels = []
    for scene, texts, judge in world:
        for hypothesis in texts.hypotheses:
            labels.append(hypothesis.label)
            if hypothesis.label == "neutral":
                # About a real object, but nothing the grammar of visible things knows.
                (phrase,) = re.findall(rf"the {NOUN}", hypothesis.text.lower())[:1]
                assert len(judge.meant(phrase)) == 1
                with pytest.raises(AssertionError, match="no grammar"):
                    holds(judge, hypothesis.text)
            else:
                assert holds(judge, hypothesis.text) == (hypothesis.label == "entailment"), (
                    scene.index,
                    hypothesis,
                )
    assert min(labels.count(label) for label in ("entailment", "neutral", "contradiction")) > 1.5 * len(world)


PATTERN = {
    "none": "plain",
    "stripes": "striped",
    "dots": "dotted",
    "checks": "checkered",
    "speckles": "speckled",
    "noise": "noisy",
}


def answer_is_right(judge: Judge, question: str, answer: str) -> bool:
    spoken = answer.removeprefix("a ").removeprefix("an ")
    if match := re.fullmatch(rf"What color is the ({NOUN})\?", question):
        (number,) = judge.fitting(match[1])
        return judge.things[number].color == answer
    if match := re.fullmatch(rf"What (?:is|kind of shape is) the ({NOUN})\?", question):
        (number,) = judge.fitting(match[1])
        return judge.things[number].kind == spoken
    if match := re.fullmatch(rf"What pattern is on the ({NOUN})\?", question):
        (number,) = judge.fitting(match[1])
        return judge.things[number].texture == PATTERN.get(answer, answer)
    if match := re.fullmatch(rf"How many ({NOUN}) are (?:there|in the picture)\?", question):
        return len(judge.fitting(match[1])) == (int(answer) if answer.isdigit() else NUMBER[answer])
    if match := re.fullmatch(rf"Where is the ({NOUN})\?", question):
        (number,) = judge.fitting(match[1])
        return judge.at(number, answer)
    if match := re.fullmatch(rf"Is there an? ({NOUN}) in the picture\?", question):
        return (len(judge.fitting(match[1])) > 0) == (answer == "yes")
    if match := re.fullmatch(rf"Is ({NP}) ({RELATION}) ({NP})\?", question):
        return judge.related(*match.groups()) == (answer == "yes")
    if question in ("What color is the background?", "What are the colors of the background?"):
        return sorted(answer.split(" and ")) == sorted(judge.ground.colors)
    if question == "What pattern is on the background?":
        return PATTERN.get(answer, answer) == judge.ground.kind
    match = re.fullmatch(r"Is the background (?:a )?(\w+)\?", question)
    assert match, f"no grammar for: {question}"
    return (match[1] == judge.ground.kind) == (answer == "yes")


def test_all_ten_answers_of_every_question_are_right(world) -> None:
    kinds, yes = set(), []
    for scene, texts, judge in world:
        assert len(texts.questions) >= 6
        for question in texts.questions:
            kinds.add(question.question_type)
            assert len(question.answers) == 10
            assert max(set(question.answers), key=question.answers.count) == question.answer
            for answer in set(question.answers):
                assert answer_is_right(judge, question.text, answer), (scene.index, question)
            if question.answer_type == "yes/no":
                assert set(question.answers) <= {"yes", "no"}
                yes.append(question.answer == "yes")
    assert kinds >= {"what color is the", "how many", "is there a", "is the", "where is the", "what"}
    assert 0.4 < np.mean(yes) < 0.6


def pair_truth(left: Judge, right: Judge, sentence: str) -> bool:
    def of(noun: str) -> tuple[int, int]:
        return len(left.fitting(noun)), len(right.fitting(noun))

    text = sentence.removesuffix(".")
    if match := re.fullmatch(
        rf"There (?:is|are) exactly ({NUM}) ({NOUN}) in the two pictures together", text
    ):
        return sum(of(match[2])) == NUMBER[match[1]]
    if match := re.fullmatch(rf"Both pictures show at least one ({NOUN})", text):
        return all(of(match[1]))
    if match := re.fullmatch(rf"Only one of the pictures shows an? ({NOUN})", text):
        return sorted(map(bool, of(match[1]))) == [False, True]
    if match := re.fullmatch(rf"Neither picture shows an? ({NOUN})", text):
        return not any(of(match[1]))
    if match := re.fullmatch(rf"The (left|right) picture has exactly ({NUM}) ({NOUN})", text):
        return of(match[3])[match[1] == "right"] == NUMBER[match[2]]
    if match := re.fullmatch(rf"The left picture has more ({NOUN}) than the right picture", text):
        one, two = of(match[1])
        return one > two
    if text == "Both pictures have the same number of shapes":
        return len(left.things) == len(right.things)
    if match := re.fullmatch(r"The background of both pictures is (?:a )?(\w+)", text):
        return left.ground.kind == match[1] == right.ground.kind
    match = re.fullmatch(rf"At least one picture shows an? ({NOUN})", text)
    assert match, f"no grammar for: {sentence}"
    return any(of(match[1]))


def test_sentences_about_two_images_have_their_label(world) -> None:
    group = [(scene, judge) for scene, _, judge in world if scene.seed == 0]
    layouts = {scene.index: scene.layout for scene, _ in group}
    labels = []
    for scene, _ in group:
        pair = shapes.pair(0, scene.index, range(len(group)), layouts)
        assert pair is not None
        assert scene.index in (pair.left, pair.right)
        assert pair.left != pair.right
        for sentence in pair.sentences:
            labels.append(sentence.label)
            assert pair_truth(group[pair.left][1], group[pair.right][1], sentence.text) == sentence.label, (
                sentence
            )
    assert 0.4 < np.mean(labels) < 0.6


def test_the_judge_finds_false_sentences_false(world) -> None:
    # Sentences of one scene judged against another: nearly all are false, so the judge does look.
    captions = [(texts.captions, world[(k + 7) % len(world)][2]) for k, (_, texts, _) in enumerate(world)]
    wrong = 0
    for texts, judge in captions:
        for caption in texts:
            try:
                wrong += not holds(judge, caption)
            except NotUnique:
                wrong += 1
    assert wrong > 0.97 * 5 * len(captions)


def test_texts_hold_at_other_image_sizes() -> None:
    for size in (32, 224):
        for index in range(8):
            scene = shapes.draw(3, index, size=size)
            judge, texts = Judge(scene), shapes.annotate(scene)
            assert all(holds(judge, caption) for caption in texts.captions)
            assert all(
                resolve(judge, expression.text) == {expression.number} for expression in texts.expressions
            )
