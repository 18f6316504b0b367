"""Referring expressions: the box that a text means, told by a box head, or chosen among detections by where
the model looks.

`evaluate_grounding`: the model predicts (cx, cy, w, h) of the squashed image, which are fractions of the
stored one too. `evaluate_weak_grounding`: nothing was trained on boxes; the heat of attention
(`vlp_core.explain`) decides among the detections of the image, so accuracy is bounded by them. It is the heat
of the match logit by cross-attention (mode "itm"), or that of the similarity of image and text by a block of
the image encoder ("itc"). A prediction is right if it overlaps the annotated box by at least one half.

Source: RefCOCO+; X-VLM `Grounding_bbox.py`, `Grounding.py`, specification 6.4 and 6.5; ViCHA specification 6.
"""

from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor
from vlp_core.explain import attention_heat, detection_scores, similarity_heat
from vlp_core.images import Images
from vlp_data.errors import DataError
from vlp_data.schema import Sample, Source

from vlp_eval.benchmarks.grounding import GroundingOptions, WeakGroundingOptions
from vlp_eval.benchmarks.options import TextBenchmarkOptions
from vlp_eval.concepts import require_fit
from vlp_eval.inference import (
    EXECUTION,
    Execution,
    ImageBatch,
    device_of,
    evaluate_rows,
    evaluating,
    read,
    require_unique,
    settings_of,
)
from vlp_eval.metrics import grounding as metric
from vlp_eval.report import Scores
from vlp_eval.subject import Subject

By = Literal["boxes", "heat"]
Box = tuple[float, float, float, float]
"""x, y, w, h in pixels of the stored image."""


class _Expression(NamedTuple):
    id: str
    text: str
    split: str
    box: Box
    detections: tuple[Box, ...]


class _Found(NamedTuple):
    box: Box | None
    size: tuple[int, int]


@torch.no_grad()
def evaluate_grounding(
    subject: Subject, source: Source, options: GroundingOptions, execution: Execution = EXECUTION
) -> Scores:
    """The box that the model predicts for every expression.

    Args:
        subject: Its model is a `vlp_eval.protocol.Grounder`. The view must squash the whole image.
        source: Rows of an image with an expression and the box it means (`vlp_data.options.Refer`).
        options: How predicted boxes are measured.
        execution: How the evaluation runs.

    `accuracy` is over all expressions, besides it that of each split (val, testA, testB) where the rows tell
    it. `chance`: the whole image as box.

    Raises:
        DataError: A row without expression, image or box; ValueError: a model without box head, an image that
            cannot be opened, a box that is NaN.
    """
    model = subject.model
    if not hasattr(model, "locate"):
        raise ValueError(
            "the model has no box head (locate); use weak_grounding, or a model trained for boxes"
        )

    def run(
        expressions: Sequence[_Expression], batch: ImageBatch, ids: Tensor, mask: Tensor
    ) -> list[Box | None]:
        index = torch.arange(len(expressions), device=ids.device)
        features = model.encode_image(batch.images)
        text = model.encode_text(ids, mask)
        told = model.locate(features, text, index, index).float().cpu().numpy()
        if np.isnan(told).any():
            raise ValueError("a predicted box is NaN")
        return [_box(box) for box in metric.pixel_boxes(told, [own[0] for own in batch.sizes])]

    return _evaluate("grounding", "boxes", subject, source, options, execution, run)


@torch.no_grad()
def evaluate_weak_grounding(
    subject: Subject, source: Source, options: WeakGroundingOptions, execution: Execution = EXECUTION
) -> Scores:
    """The detection that the heat of attention chooses for every expression.

    Args:
        subject: Its model is a `vlp_eval.protocol.HeatMapper` (mode "itm"), or has projections and a ViT
            ("itc"). The view must squash the whole image.
        source: Rows of an image with an expression and the box it means (`vlp_data.options.Refer`); regions
            after it are detections.
        options: Whose heat decides.
        execution: How the evaluation runs.

    A detection counts only if its heat is above 0, as in the reference; without one there is no box, which is
    wrong (the reference takes the box of the sample before). Numbers as in `evaluate_grounding`; `chance`: a
    detection drawn at random.

    Raises:
        DataError: A row without expression, image or box, or no row with detections; ValueError: a model
            without what the mode needs, an image that cannot be opened.
    """
    needed = {"itm": "itm_head", "itc": "vision_proj"}[options.mode]
    if not hasattr(subject.model, needed):
        raise ValueError(
            f"mode={options.mode}: the model has no {needed}; use another mode, the benchmark grounding, or "
            "a model trained for it"
        )

    def run(
        expressions: Sequence[_Expression], batch: ImageBatch, ids: Tensor, mask: Tensor
    ) -> list[Box | None]:
        heat = _heat(subject.model, batch.images, ids, mask, options).mean.cpu()
        return [
            _chosen(one, expression.detections, own[0], options.alpha)
            for expression, one, own in zip(expressions, heat, batch.sizes, strict=True)
        ]

    return _evaluate("weak_grounding", "heat", subject, source, options, execution, run)


Locate = Callable[[Sequence[_Expression], ImageBatch, Tensor, Tensor], list[Box | None]]
"""From expressions, their images, ids and mask to a box for each."""


def _evaluate(
    benchmark: str,
    by: By,
    subject: Subject,
    source: Source,
    options: TextBenchmarkOptions,
    execution: Execution,
    locate: Locate,
) -> Scores:
    require_fit(subject.model, subject.concepts)
    tokenizer, reading = subject.text()[0], subject.reads(options)
    expressions = read(source, _expression, options.limit, subject.concepts)
    require_unique((one.id for one in expressions), "expression")
    if by == "heat" and not any(one.detections for one in expressions):
        raise DataError(
            "no expression has detections to choose from; give data.detections=dets.json, the boxes of each "
            "image"
        )

    def run(rows: Sequence[int], batch: ImageBatch) -> list[_Found]:
        own = [expressions[row] for row in rows]
        ids, mask = reading.encode(tokenizer, [one.text for one in own], batch.images.device)
        boxes = locate(own, batch, ids, mask)
        return [_Found(box, sizes[0]) for box, sizes in zip(boxes, batch.sizes, strict=True)]

    found = evaluate_rows(subject, source, len(expressions), run, options, execution, what="expressions")
    settings = settings_of(subject, execution, reading)
    if isinstance(options, WeakGroundingOptions):
        settings |= {"mode": options.mode, "layer": options.layer, "alpha": options.alpha}
    return _scores(benchmark, expressions, found, by, settings)


@torch.no_grad()
def word_heat(
    subject: Subject, image: Any, text: str, words: Sequence[str] = (), *, options: WeakGroundingOptions
) -> list[tuple[str, np.ndarray]]:
    """Where the model looks in an image for each word of a text: (word, heat [P,P] float32) in order, pieces
    of a word averaged.

    The mean over all tokens, of which `evaluate_weak_grounding` takes the best detection, comes first as "all
    words"; with mode "itc" it is all there is. `words` are the concepts of the image.
    """
    tokenizer = subject.text()[0]
    device = device_of(subject.model)
    ids, mask = subject.reads(options).encode(tokenizer, [text], device)
    reader = subject.concept_reader()
    concepts = None if reader is None else reader.collate([reader.ids(words)])
    images = Images(subject.view(image)[None], concepts=concepts).to(device)
    with evaluating(subject.model):
        heat = _heat(subject.model, images, ids, mask, options)
    found = [("all words", heat.mean[0].cpu().numpy())]
    if heat.words is None:
        return found
    tokens = ids[0].tolist()
    places: list[list[int]] = []
    for place, goes_on in enumerate(tokenizer.continues(tokens)):
        if tokens[place] in (tokenizer.cls_id, tokenizer.end):
            continue
        if goes_on and places:
            places[-1].append(place)
        else:
            places.append([place])
    maps = heat.words[0].cpu().numpy()
    return found + [(tokenizer.decode([tokens[n] for n in own]).strip(), maps[own].mean(0)) for own in places]


class _Heat(NamedTuple):
    """`mean` [B,P,P], and `words` [B,T,P,P] where each token has a map of its own."""

    mean: Tensor
    words: Tensor | None


def _heat(model: Any, images: Images, ids: Tensor, mask: Tensor, options: WeakGroundingOptions) -> _Heat:
    if options.mode == "itc":
        return _Heat(similarity_heat(model, images, ids, mask, block=options.layer), None)
    features = model.encode_image(images)
    heat = attention_heat(
        model,
        features.embeds,
        ids,
        mask,
        layer=options.layer,
        tokens=model.vision.tokens if images.concepts is not None else None,
        image_mask_BS=getattr(features, "attention_mask", None),
    )
    return _Heat(heat.mean, heat.words)


def _expression(sample: Sample) -> _Expression:
    texts = [text.text for text in sample.texts if text.role == "expression"]
    place = None if sample.target is None else sample.target.box
    if len(texts) != 1 or len(sample.images) != 1 or place is None:
        raise DataError(
            f"{sample.key}: grounding needs rows of one image with one expression and its box; "
            "data.format=refer joins lists with REFER's files"
        )
    boxes = [_xywh(region.box) for region in sample.regions]
    detections = tuple(box for number, box in enumerate(boxes) if number != place)
    return _Expression(sample.key, texts[0], str(sample.meta.get("split") or "all"), boxes[place], detections)


def _xywh(box: tuple[float, float, float, float]) -> Box:
    x0, y0, x1, y1 = box
    return x0, y0, x1 - x0, y1 - y0


def _box(box: Any) -> Box:
    x, y, w, h = (float(value) for value in box)
    return x, y, w, h


def _chosen(heat: Tensor, detections: tuple[Box, ...], size: tuple[int, int], alpha: float) -> Box | None:
    if not detections:
        return None
    scores = detection_scores(heat, torch.tensor(detections), size, alpha=alpha)
    best = metric.best_detection(scores.numpy())
    return None if best is None else detections[best]


def _scores(
    benchmark: str,
    expressions: Sequence[_Expression],
    found: Sequence[_Found],
    by: By,
    settings: dict[str, Any],
) -> Scores:
    truth = {one.id: one.box for one in expressions}
    predictions = {one.id: given.box for one, given in zip(expressions, found, strict=True)}
    splits = {one.id: one.split for one in expressions}
    right = metric.is_right(predictions, truth)
    blind = [_blind(one, given.size, by) for one, given in zip(expressions, found, strict=True)]
    names = list(dict.fromkeys(splits.values()))
    groups = {"accuracy": list(truth)} | (
        {name: [one for one in truth if splits[one] == name] for name in names} if names != ["all"] else {}
    )
    place = {one.id: row for row, one in enumerate(expressions)}
    notes = []
    if by == "heat" and (bare := sum(not one.detections for one in expressions)):
        notes.append(f"{bare} expressions have no detection to choose from and count as wrong")
    return Scores(
        benchmark=benchmark,
        settings={
            **settings,
            "chance": "the whole image as box" if by == "boxes" else "a detection drawn at random",
        },
        counts={"expressions": len(truth)},
        results={by: {name: 100 * sum(right[one] for one in ids) / len(ids) for name, ids in groups.items()}},
        hits={by: {name: sum(right[one] for one in ids) for name, ids in groups.items()}},
        chance={name: 100 * sum(blind[place[one]] for one in ids) / len(ids) for name, ids in groups.items()},
        samples={
            "expressions": [
                {
                    "id": one.id,
                    "text": one.text,
                    "split": one.split,
                    "box": list(one.box),
                    "predicted": None if given.box is None else list(given.box),
                    "right": right[one.id],
                }
                for one, given in zip(expressions, found, strict=True)
            ]
        },
        notes=tuple(notes),
    )


def _blind(one: _Expression, size: tuple[int, int], by: By) -> float:
    """Share of right boxes without a look at the image."""
    width, height = size
    guesses: Sequence[Box] = [(0.0, 0.0, width, height)] if by == "boxes" else one.detections
    if not guesses:
        return 0.0
    overlap = metric.iou(guesses, [one.box] * len(guesses))
    return float((overlap >= metric.RIGHT).mean())
