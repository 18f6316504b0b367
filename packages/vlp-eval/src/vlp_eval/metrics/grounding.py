"""Referring expressions: overlap of boxes, and accuracy per split.

Boxes are (x, y, w, h) in pixels of the original image, as COCO and RefCOCO+ have them. A prediction is right
if its overlap with the annotated box is at least one half. Source: REFER and X-VLM (`dataset/utils.py`:
`computeIoU`, `grounding_eval`, `grounding_eval_bbox`).

Letters: B boxes.
"""

from collections.abc import Hashable, Mapping
from typing import Literal, TypeVar

import numpy as np
from numpy.typing import ArrayLike, NDArray

from vlp_eval.metrics import same_ids
from vlp_eval.metrics.labels import LabelAccuracy

Id = TypeVar("Id", bound=Hashable)
Rule = Literal["continuous", "inclusive"]

RIGHT = 0.5
"""Overlap from which a box counts as right, this value included."""


def iou(first_B4: ArrayLike, second_B4: ArrayLike, *, rule: Rule = "continuous") -> NDArray[np.float64]:
    """Intersection over union of boxes (x, y, w, h), row by row: [B] float64; 0 where the union is empty.

    "inclusive" is the published evaluator's formula, which counts pixels: the same number unless the overlap
    is at most one pixel wide or high, where it gives 0. No box that people annotate is decided differently by
    it.
    """
    if rule not in ("continuous", "inclusive"):
        raise ValueError(f"rule={rule!r} is not known; choose continuous or inclusive")
    a, b = (_boxes(boxes) for boxes in (first_B4, second_B4))
    if a.shape != b.shape:
        raise ValueError(f"{len(a)} boxes cannot be compared with {len(b)} row by row")
    sides = np.minimum(a[:, :2] + a[:, 2:], b[:, :2] + b[:, 2:]) - np.maximum(a[:, :2], b[:, :2])
    least = 1.0 if rule == "inclusive" else 0.0
    overlap = np.where((sides > least).all(1), sides.prod(1), 0.0)
    union = a[:, 2:].prod(1) + b[:, 2:].prod(1) - overlap
    return np.divide(overlap, union, out=np.zeros(len(a)), where=union > 0)


def pixel_boxes(boxes_B4: ArrayLike, sizes_B2: ArrayLike) -> NDArray[np.float64]:
    """Predictions (cx, cy, w, h) as fractions of the image to (x, y, w, h) in pixels of images of (width,
    height): [B,4]."""
    boxes, sizes = np.asarray(boxes_B4, dtype=np.float64), np.asarray(sizes_B2, dtype=np.float64)
    scaled = boxes * np.concatenate([sizes, sizes], axis=1)
    scaled[:, :2] -= scaled[:, 2:] / 2
    return scaled


def accuracy(
    predictions: Mapping[Id, ArrayLike | None],
    truth: Mapping[Id, ArrayLike],
    splits: Mapping[Id, str] | None = None,
    *,
    rule: Rule = "continuous",
) -> dict[str, LabelAccuracy]:
    """Share of expressions whose box is right, for each split (one split "all" where `splits` is None): in
    order of the truth.

    A prediction of None (no detection to choose from) is wrong. Raises ValueError when the ids differ.
    """
    same_ids(predictions, truth, "predictions", "annotated expressions")
    right = is_right(predictions, truth, rule=rule)
    rows: dict[str, list[bool]] = {}
    for one, value in right.items():
        rows.setdefault("all" if splits is None else splits[one], []).append(value)
    return {
        split: LabelAccuracy(100 * sum(row) / len(row), sum(row), len(row), {}) for split, row in rows.items()
    }


def is_right(
    predictions: Mapping[Id, ArrayLike | None], truth: Mapping[Id, ArrayLike], *, rule: Rule = "continuous"
) -> dict[Id, bool]:
    """For each expression whether its box is right."""
    found: dict[Id, bool] = {}
    for one, box in truth.items():
        guess = predictions[one]
        found[one] = guess is not None and bool(
            iou(np.asarray(guess)[None], np.asarray(box)[None], rule=rule)[0] >= RIGHT
        )
    return found


def best_detection(scores_K: ArrayLike) -> int | None:
    """The detection with the highest score, the first of equal ones; None when there is no detection.

    The published evaluators take only scores above 0 and fall back on the box of the sample before; here the
    best one counts whatever its sign.
    """
    scores = np.asarray(scores_K, dtype=np.float64)
    if not scores.size:
        return None
    if np.isnan(scores).any():
        raise ValueError("a score of a detection is NaN")
    return int(scores.argmax())


def _boxes(boxes: ArrayLike) -> NDArray[np.float64]:
    array = np.asarray(boxes, dtype=np.float64)
    if array.ndim != 2 or array.shape[1] != 4:
        raise ValueError(f"boxes must be rows of (x, y, w, h), not an array of shape {array.shape}")
    if not np.isfinite(array).all() or (array[:, 2:] < 0).any():
        bad = array[~np.isfinite(array).all(1) | (array[:, 2:] < 0).any(1)][0]
        raise ValueError(f"box {bad.tolist()}: x, y, w, h must be finite, w and h not negative")
    return array
