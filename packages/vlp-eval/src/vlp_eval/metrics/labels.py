"""Accuracy of one label per sample (SNLI-VE, NLVR2), and consistency over the image pairs of a sentence
(NLVR2).

Source: lil-lab/nlvr `nlvr2/eval/metrics.py`; SNLI-VE has no official evaluator, accuracy on the original
labels is what papers report.
"""

from collections.abc import Hashable, Mapping
from typing import NamedTuple, TypeVar

from vlp_eval.metrics import same_ids

Id = TypeVar("Id", bound=Hashable)


class LabelAccuracy(NamedTuple):
    """`accuracy` in percent, `correct` of `total`, and the same for the samples of each true label."""

    accuracy: float
    correct: int
    total: int
    labels: dict


def accuracy(predictions: Mapping[Id, Hashable], truth: Mapping[Id, Hashable]) -> LabelAccuracy:
    """Share of samples whose label is right. Raises ValueError when the ids differ."""
    same_ids(predictions, truth, "predictions", "labelled samples")
    rows: dict[Hashable, list[bool]] = {}
    for one, label in truth.items():
        rows.setdefault(label, []).append(predictions[one] == label)
    correct = sum(sum(right) for right in rows.values())
    each = {label: 100 * sum(right) / len(right) for label, right in rows.items()}
    return LabelAccuracy(100 * correct / len(truth), correct, len(truth), each)


def consistency(predictions: Mapping[str, Hashable], truth: Mapping[str, Hashable]) -> LabelAccuracy:
    """Share of sentences all of whose image pairs are right, by NLVR2 identifiers (split-set-pair-sentence);
    `total` counts sentences.

    Only predictions of a whole split make it meaningful. Raises ValueError when the ids differ or are no
    identifiers.
    """
    same_ids(predictions, truth, "predictions", "labelled samples")
    right: dict[str, bool] = {}
    for one, label in truth.items():
        sentence = sentence_of(one)
        right[sentence] = right.get(sentence, True) and predictions[one] == label
    correct = sum(right.values())
    return LabelAccuracy(100 * correct / len(right), correct, len(right), {})


def sentence_of(identifier: str) -> str:
    """The sentence that an NLVR2 identifier (dev-850-0-1: split, set, pair, sentence) is about."""
    parts = identifier.split("-")
    if len(parts) != 4:
        raise ValueError(
            f"{identifier!r} is no NLVR2 identifier (split-set-pair-sentence, such as dev-850-0-1)"
        )
    split, group, _, sentence = parts
    return f"{split}-{group}-{sentence}"
