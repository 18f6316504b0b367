r"""Accuracy of open-ended visual question answering with ten annotators.

With c of the other annotators giving the predicted answer, one annotator left out counts min(1, c / 3); the
accuracy of a question is the mean over the annotators. Three of ten who agree are worth 90, not 100.

Two variants, which differ on free answers by several points:

- "official" (default): the evaluator of the VQA challenge. Answers and prediction are normalised only if the
    annotators do not all
  agree; where they do, the prediction must equal their answer to the letter.
- "albef": the copy in ALBEF, X-VLM and ViCHA. The prediction is always normalised, the annotators' answers
    lose punctuation only, and
  neither blanks around them nor line ends are stripped. For comparing with logs of these systems, not for
  publishing.

Sources: GT-Vision-Lab/VQA `vqaEval.py`, ALBEF `vqaTools/vqaEval.py`; ViLT `write_vqa.py` for the soft
    targets.
"""

import re
from collections import Counter
from collections.abc import Hashable, Mapping, Sequence
from typing import Literal, NamedTuple, TypeVar

from vlp_eval.metrics import same_ids

Variant = Literal["official", "albef"]
Id = TypeVar("Id", bound=Hashable)

ENOUGH = 3
"""So many other annotators with the same answer make it fully right."""

PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
_NUMBER_COMMA = re.compile(r"\d,\d")
_FULL_STOP = re.compile(r"\.(?!\d)")
# Full stops that go, at most: the official pattern is applied with a flag in the place of the count, and the
# flag is 32.
_FULL_STOPS = 32

_NUMBERS = {"none": "0"} | {
    word: str(number)
    for number, word in enumerate(
        ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
    )
}
_ARTICLES = frozenset(("a", "an", "the"))

# A word that lacks exactly one of its apostrophes gets it back.
_APOSTROPHES = [
    "ain't",
    "aren't",
    "can't",
    "couldn't",
    "didn't",
    "doesn't",
    "don't",
    "hadn't",
    "hasn't",
    "haven't",
    "isn't",
    "mightn't",
    "mustn't",
    "needn't",
    "oughtn't",
    "shan't",
    "shouldn't",
    "wasn't",
    "weren't",
    "won't",
    "wouldn't",
    "could've",
    "might've",
    "must've",
    "not've",
    "should've",
    "they've",
    "we've",
    "what've",
    "where've",
    "who've",
    "would've",
    "you've",
    "he'd",
    "how'd",
    "it'd",
    "someone'd",
    "something'd",
    "there'd",
    "they'd",
    "where'd",
    "who'd",
    "you'd",
    "how'll",
    "it'll",
    "somebody'll",
    "someone'll",
    "something'll",
    "they'll",
    "what'll",
    "who'll",
    "why'll",
    "you'll",
    "there're",
    "they're",
    "what're",
    "why're",
    "you're",
    "he's",
    "how's",
    "somebody's",
    "someone's",
    "that's",
    "there's",
    "what's",
    "when's",
    "where's",
    "who's",
    "why's",
    "ma'am",
    "o'clock",
    "y'all",
    "'twas",
    "couldn't've",
    "hadn't've",
    "mightn't've",
    "shouldn't've",
    "wouldn't've",
    "he'd've",
    "it'd've",
    "she'd've",
    "somebody'd've",
    "someone'd've",
    "something'd've",
    "there'd've",
    "they'd've",
    "we'd've",
    "who'd've",
    "you'd've",
    "'ow's'at",
    "y'all'll",
    "y'all'd've",
]
_CONTRACTIONS = {
    word[:place] + word[place + 1 :]: word
    for word in _APOSTROPHES
    for place, letter in enumerate(word)
    if letter == "'"
} | {"somebody'd": "somebodyd"}  # odd, and so in the published table


def normalise_answer(text: str) -> str:
    """An answer as the official evaluator compares it: lower case, no punctuation, articles or number words,
    contractions with apostrophe."""
    return _words(_without_punctuation(_one_line(text)))


def answer_accuracy(prediction: str, answers: Sequence[str], *, variant: Variant = "official") -> float:
    """Accuracy of one question in 0..1, not rounded. `answers` are those of all annotators; of a single one
    nothing can agree: 0."""
    if variant not in ("official", "albef"):
        raise ValueError(f"variant={variant!r} is not known; choose official or albef")
    prediction = _one_line(prediction)
    if variant == "official":
        answers = [_one_line(answer) for answer in answers]
    agree = len(set(answers)) == 1
    if variant == "albef" or not agree:
        prediction = _words(_without_punctuation(prediction))
    if not agree:
        answers = [_without_punctuation(answer) for answer in answers]
        if variant == "official":
            answers = [_words(answer) for answer in answers]
    same = [answer == prediction for answer in answers]
    return sum(min(1.0, (sum(same) - own) / ENOUGH) for own in same) / len(same)


class VqaAccuracy(NamedTuple):
    """Accuracies in percent. `questions` holds one per question id, in the order of the annotations; `groups`
    means of each group."""

    overall: float
    questions: dict
    groups: dict[str, dict[str, float]]


def accuracy(
    predictions: Mapping[Id, str],
    answers: Mapping[Id, Sequence[str]],
    *,
    variant: Variant = "official",
    groups: Mapping[str, Mapping[Id, str]] | None = None,
) -> VqaAccuracy:
    """Accuracy over questions, each with a prediction and the answers of its annotators.

    `groups` are partitions to report besides: {"answer_type": {question id: "yes/no"}, ...}. Numbers are
    rounded to two decimals as the official evaluator does; means are taken before rounding.

    Raises ValueError when the ids of predictions and answers differ, naming one.
    """
    same_ids(predictions, answers, "predictions", "annotated questions")
    each = {one: answer_accuracy(predictions[one], given, variant=variant) for one, given in answers.items()}
    parts: dict[str, dict[str, float]] = {}
    for name, labels in (groups or {}).items():
        rows: dict[str, list[float]] = {}
        for one, value in each.items():
            rows.setdefault(labels[one], []).append(value)
        parts[name] = {label: _percent(values) for label, values in sorted(rows.items())}
    questions = {one: round(100 * value, 2) for one, value in each.items()}
    return VqaAccuracy(_percent(list(each.values())), questions, parts)


def soft_targets(answers: Sequence[str]) -> dict[str, float]:
    """What ViLT and VLC train and validate with: each string as given, by how many annotators gave it (0.3,
    0.6, 0.9, then 1)."""
    return {answer: min(1.0, round(0.3 * count, 1)) for answer, count in Counter(answers).items()}


def _percent(values: Sequence[float]) -> float:
    return round(100 * sum(values) / len(values), 2)


def _one_line(text: str) -> str:
    return text.replace("\n", " ").replace("\t", " ").strip()


def _without_punctuation(text: str) -> str:
    # One comma between digits anywhere turns every replacement of the text into a deletion.
    joined = _NUMBER_COMMA.search(text) is not None
    result = text
    for mark in PUNCTUATION:
        if mark in text:
            at_blank = f"{mark} " in text or f" {mark}" in text
            result = result.replace(mark, "" if joined or at_blank else " ")
    return _FULL_STOP.sub("", result, count=_FULL_STOPS)


def _words(text: str) -> str:
    words = (_NUMBERS.get(word, word) for word in text.lower().split())
    return " ".join(_CONTRACTIONS.get(word, word) for word in words if word not in _ARTICLES)
