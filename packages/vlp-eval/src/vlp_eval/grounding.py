"""Referring expressions: the box that a text means, told by a box head, or chosen among detections by where
the model looks.

With "boxes" the model tells (cx, cy, w, h) of the squashed image, which are fractions of the stored one too.
With "heat" nothing was trained on boxes: the heat of attention (`vlp_core.explain`) decides among the
detections of the image, so accuracy is bounded by them. It is the heat of the match logit by cross-attention
(mode "itm"), or that of the similarity of image and text by a block of the image encoder ("itc"). A
prediction is right if it overlaps the annotated box by at least one half.

Source: RefCOCO+; X-VLM `Grounding_bbox.py`, `Grounding.py`, specification 6.4 and 6.5; ViCHA specification 6.
"""

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any, Literal, NamedTuple, cast

import numpy as np
import torch
from vlp_core.explain import attention_heat, detection_scores, similarity_heat
from vlp_data.errors import DataError
from vlp_data.options import ConceptOptions
from vlp_data.schema import Sample, Source
from vlp_data.text import Tokenizer

from vlp_eval.concepts import ConceptReader, require_fit
from vlp_eval.inference import (
    READING,
    ImageBatch,
    Reading,
    RowOptions,
    View,
    device_of,
    evaluate_rows,
    evaluating,
    read,
    require_unique,
)
from vlp_eval.metrics import grounding as metric
from vlp_eval.protocol import Grounder, HeatMapper
from vlp_eval.report import Scores

By = Literal["boxes", "heat"]
Mode = Literal["itm", "itc"]
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
    model: Grounder | HeatMapper,
    source: Source,
    tokenizer: Tokenizer,
    options: RowOptions,
    *,
    reading: Reading = READING,
    by: By = "boxes",
    mode: Mode = "itm",
    layer: int | None = None,
    alpha: float = 0.5,
) -> Scores:
    """The box of every expression of a source.

    Args:
        model: With a box head (`locate`), or for "heat" one with a match head ("itm"), or with projections
            and a ViT ("itc").
        source: Rows of an image with an expression and the box it means (`vlp_data.options.Refer`); regions
            after it are detections.
        tokenizer: The model's.
        options: How rows are read; the view must squash the whole image, as `vlp_data.transforms.eval_view`
            does. ViCHA pads concepts to `max_tokens` here.
        reading: How expressions become ids.
        by: What decides, see above.
        mode: "heat": whose heat it is.
        layer: "heat": layer whose attention is read, of the text encoder ("itm": X-VLM 9, ALBEF and ViCHA 8)
            or of the image encoder ("itc"), counted over all its layers.
        alpha: "heat": a detection's heat is divided by its area to this power.

    A detection counts only if its heat is above 0, as in the reference; without one there is no box, which is
    wrong (the reference takes the box of the sample before). `accuracy` is over all expressions, besides it
    that of each split (val, testA, testB) where the rows tell it. `chance`: the whole image as box, or a
    detection drawn at random.

    Raises:
        DataError: A row without expression, image or box; ValueError: settings that cannot take effect, an
            image that cannot be opened.
    """
    _check(model, by, mode, layer)
    require_fit(model, options.concepts)
    expressions = read(source, _expression, options)
    require_unique((one.id for one in expressions), "expression")

    def run(rows: Sequence[int], images: ImageBatch) -> list[_Found]:
        device = images.image.device
        ids, mask = reading.encode(tokenizer, [expressions[row].text for row in rows], device)
        sizes = [own[0] for own in images.sizes]
        image = images.image.squeeze(1)
        if by == "boxes":
            index = torch.arange(len(rows), device=device)
            grounder = cast(Grounder, model)
            features = grounder.encode_image(image, *images.given)
            text = grounder.encode_text(ids, mask)
            told = grounder.locate(features, text, index, index).float().cpu().numpy()
            if np.isnan(told).any():
                raise ValueError("a predicted box is NaN")
            boxes = metric.pixel_boxes(told, sizes)
            return [_Found(_box(box), size) for box, size in zip(boxes, sizes, strict=True)]
        heat = _heat(model, image, ids, mask, mode, cast(int, layer), images.given).mean.cpu()
        return [
            _Found(_chosen(one, expressions[row].detections, size, alpha), size)
            for row, one, size in zip(rows, heat, sizes, strict=True)
        ]

    found = evaluate_rows(
        model, source, len(expressions), run, options, tokenizer=tokenizer, what="expressions"
    )
    settings = {"by": by, **asdict(reading), **options.settings()}
    if by == "heat":
        settings |= {"mode": mode, "layer": layer, "alpha": alpha}
    return _scores(expressions, found, by, settings)


@torch.no_grad()
def word_heat(
    model: HeatMapper,
    tokenizer: Tokenizer,
    image: Any,
    text: str,
    words: Sequence[str] = (),
    *,
    view: View,
    layer: int,
    mode: Mode = "itm",
    reading: Reading = READING,
    concepts: ConceptOptions | None = None,
) -> list[tuple[str, np.ndarray]]:
    """Where the model looks in an image for each word of a text: (word, heat [P,P] float32) in order, pieces
    of a word averaged.

    The mean over all tokens, of which `evaluate_grounding` takes the best detection, comes first as "all
    words"; with mode "itc" it is all there is. `words` are the concepts of the image. Other arguments as
    there.
    """
    require_fit(model, concepts)
    device = device_of(model)
    ids, mask = reading.encode(tokenizer, [text], device)
    given = ()
    if concepts is not None:
        reader = ConceptReader(tokenizer, concepts)
        read_words = reader.collate([reader.ids(words)])
        given = (read_words._make(x.to(device) for x in read_words),)
    with evaluating(model):
        heat = _heat(model, view(image)[None].to(device), ids, mask, mode, layer, given)
    found = [("all words", heat.mean[0].cpu().numpy())]
    if heat.words is None:
        return found
    tokens = ids[0].tolist()
    places: list[list[int]] = []
    for place, goes_on in enumerate(tokenizer.continues(tokens)):
        if tokens[place] in (tokenizer.cls_id, tokenizer.sep_id):
            continue
        if goes_on and places:
            places[-1].append(place)
        else:
            places.append([place])
    maps = heat.words[0].cpu().numpy()
    return found + [(tokenizer.decode([tokens[n] for n in own]).strip(), maps[own].mean(0)) for own in places]


class _Heat(NamedTuple):
    """`mean` [B,P,P], and `words` [B,T,P,P] where each token has a map of its own."""

    mean: torch.Tensor
    words: torch.Tensor | None


def _heat(
    model: Any,
    image: torch.Tensor,
    ids: torch.Tensor,
    mask: torch.Tensor,
    mode: Mode,
    layer: int,
    given: tuple[Any, ...],
) -> _Heat:
    if mode == "itc":
        return _Heat(
            similarity_heat(model, image, ids, mask, block=layer, concepts=given[0] if given else None), None
        )
    features = model.encode_image(image, *given)
    heat = attention_heat(
        model,
        features.embeds,
        ids,
        mask,
        layer=layer,
        tokens=model.vision.tokens if given else None,
        image_mask_BS=getattr(features, "attention_mask", None),
    )
    return _Heat(heat.mean, heat.words)


def _check(model: Any, by: By, mode: Mode, layer: int | None) -> None:
    if by not in ("boxes", "heat"):
        raise ValueError(f"by={by!r} is not known; choose boxes or heat")
    if mode not in ("itm", "itc"):
        raise ValueError(f"mode={mode!r} is not known; choose itm or itc")
    if by == "boxes" and (layer is not None or mode != "itm"):
        raise ValueError(f"layer={layer} and mode={mode} have no effect with by=boxes; leave them out")
    if by == "heat" and layer is None:
        raise ValueError(
            "by=heat needs the layer whose attention is read (X-VLM takes 9 of its 12, ALBEF and ViCHA 8)"
        )
    needed = "locate" if by == "boxes" else "itm_head" if mode == "itm" else "vision_proj"
    if not hasattr(model, needed):
        other = "by=heat" if by == "boxes" else "by=boxes"
        raise ValueError(f"by={by}: the model has no {needed}; use {other}, or a model trained for it")


def _expression(sample: Sample) -> _Expression:
    texts = [text.text for text in sample.texts if text.role == "expression"]
    place = None if sample.target is None else sample.target.box
    if len(texts) != 1 or len(sample.images) != 1 or place is None:
        raise DataError(
            f"{sample.key}: grounding needs rows of one image with one expression and its box; data.format=refer joins lists with REFER's files"
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


def _chosen(
    heat: torch.Tensor, detections: tuple[Box, ...], size: tuple[int, int], alpha: float
) -> Box | None:
    if not detections:
        return None
    scores = detection_scores(heat, torch.tensor(detections), size, alpha=alpha)
    best = metric.best_detection(scores.numpy())
    return None if best is None else detections[best]


def _scores(
    expressions: Sequence[_Expression], found: Sequence[_Found], by: By, settings: dict[str, Any]
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
        benchmark="grounding",
        settings={
            **settings,
            "chance": "the whole image as box" if by == "boxes" else "a detection drawn at random",
        },
        counts={"expressions": len(truth)},
        stages={by: {name: 100 * sum(right[one] for one in ids) / len(ids) for name, ids in groups.items()}},
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
