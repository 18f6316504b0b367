"""Referring expressions: the box that a text means, told by a box head, or chosen among detections by where the model looks.

With "boxes" the model tells (cx, cy, w, h) of the squashed picture, which are fractions of the stored one too. With "heat" nothing was trained on boxes:
the heat of the cross-attention (`vlp_core.explain`) decides among the detections of the picture, so accuracy is bounded by them.
A prediction is right if it overlaps the annotated box by at least one half.

Source: RefCOCO+; X-VLM `Grounding_bbox.py`, `Grounding.py`, specification 6.4 and 6.5.
"""

from collections.abc import Sequence
from typing import Any, Literal, NamedTuple, cast

import numpy as np
import torch
from vlp_core.explain import attention_heat, detection_scores
from vlp_data.errors import DataError
from vlp_data.schema import Sample, Source
from vlp_data.text import Tokenizer, pre_caption

from vlp_eval.inference import (
    PictureBatch,
    Precision,
    Progress,
    View,
    autocast,
    device_of,
    evaluate_rows,
    evaluating,
    read,
    require_unique,
    speaker,
)
from vlp_eval.metrics import grounding as metric
from vlp_eval.protocol import Grounder, HeatMapper
from vlp_eval.report import Scores

By = Literal["boxes", "heat"]
Box = tuple[float, float, float, float]
"""x, y, w, h in pixels of the stored picture."""


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
    *,
    view: View,
    by: By = "boxes",
    layer: int | None = None,
    alpha: float = 0.5,
    max_words: int = 30,
    max_tokens: int | None = None,
    separator: bool = False,
    limit: int | None = None,
    image_batch: int = 32,
    workers: int = 0,
    device: torch.device | str | None = None,
    precision: Precision = "fp32",
    progress: Progress | None = None,
) -> Scores:
    """The box of every expression of a source.

    Args:
        model: With a box head (`locate`), or for "heat" one whose cross-attention can be read.
        source: Rows of a picture with an expression and the box it means (`vlp_data.options.Refer`); regions after it are detections.
        tokenizer: The model's.
        view: From a picture to the model's input; must squash the whole picture, as `vlp_data.transforms.eval_view` does.
        by: What decides, see above.
        layer: Layer whose cross-attention is read, counted over all layers of the text encoder; needed for "heat" (X-VLM 9, ALBEF 8).
        alpha: "heat": a detection's heat is divided by its area to this power.
        max_words, max_tokens, separator, limit, image_batch, workers, device, precision, progress: As in `evaluate_vqa`.

    `accuracy` is over all expressions, besides it that of each split (val, testA, testB) where the rows tell it. `chance`: the whole picture as box, or a
    detection drawn at random.

    Raises:
        DataError: A row without expression, picture or box; ValueError: settings that cannot take effect, a picture that cannot be opened.
    """
    _check(model, by, layer)
    expressions = read(source, _expression, limit=limit)
    require_unique((one.id for one in expressions), "expression")
    device = device_of(model) if device is None else torch.device(device)

    def run(rows: Sequence[int], pictures: PictureBatch) -> list[_Found]:
        texts = [pre_caption(expressions[row].text, max_words) for row in rows]
        ids, mask = (
            x.to(device) for x in tokenizer.encode(texts, max_tokens=max_tokens, separator=separator)
        )
        sizes = [own[0] for own in pictures.sizes]
        image: Any = model.encode_image(pictures.image.squeeze(1))
        if by == "boxes":
            index = torch.arange(len(rows), device=device)
            grounder = cast(Grounder, model)
            told = grounder.locate(image, grounder.encode_text(ids, mask), index, index).float().cpu().numpy()
            if np.isnan(told).any():
                raise ValueError("a predicted box is NaN")
            boxes = metric.pixel_boxes(told, sizes)
            return [_Found(_box(box), size) for box, size in zip(boxes, sizes, strict=True)]
        looked = attention_heat(cast(HeatMapper, model), image.embeds, ids, mask, layer=cast(int, layer))
        heat = looked.mean.cpu()
        return [
            _Found(_chosen(one, expressions[row].detections, size, alpha), size)
            for row, one, size in zip(rows, heat, sizes, strict=True)
        ]

    with evaluating(model), autocast(device, precision):
        found = evaluate_rows(
            source,
            len(expressions),
            run,
            view=view,
            batch=image_batch,
            workers=workers,
            device=device,
            say=speaker(progress),
            what="expressions",
        )
    settings = {
        "by": by,
        "max_words": max_words,
        "max_tokens": max_tokens,
        "separator": separator,
        "precision": precision,
    }
    if by == "heat":
        settings |= {"layer": layer, "alpha": alpha}
    return _scores(expressions, found, by, settings)


@torch.no_grad()
def word_heat(
    model: HeatMapper,
    tokenizer: Tokenizer,
    picture: Any,
    text: str,
    *,
    view: View,
    layer: int,
    max_words: int = 30,
    max_tokens: int | None = None,
    separator: bool = False,
) -> list[tuple[str, np.ndarray]]:
    """Where the model looks in a picture for each word of a text: (word, heat [P,P] float32) in order, pieces of a word averaged.

    The mean over all tokens, of which `evaluate_grounding` takes the best detection, comes first as "all words". Arguments as there.
    """
    device = device_of(model)
    encoded = tokenizer.encode([pre_caption(text, max_words)], max_tokens=max_tokens, separator=separator)
    ids, mask = (x.to(device) for x in encoded)
    with evaluating(model):
        image = model.encode_image(view(picture)[None].to(device))
        heat = attention_heat(model, image.embeds, ids, mask, layer=layer)
    tokens = ids[0].tolist()
    words: list[list[int]] = []
    for place, goes_on in enumerate(tokenizer.continues(tokens)):
        if tokens[place] in (tokenizer.cls_id, tokenizer.sep_id):
            continue
        if goes_on and words:
            words[-1].append(place)
        else:
            words.append([place])
    maps = heat.words[0].cpu().numpy()
    found = [("all words", heat.mean[0].cpu().numpy())]
    return found + [(tokenizer.decode([tokens[n] for n in own]).strip(), maps[own].mean(0)) for own in words]


def _check(model: Any, by: By, layer: int | None) -> None:
    if by not in ("boxes", "heat"):
        raise ValueError(f"by={by!r} is not known; choose boxes or heat")
    if by == "boxes" and layer is not None:
        raise ValueError(f"layer={layer} has no effect with by=boxes; leave it out")
    if by == "heat" and layer is None:
        raise ValueError("by=heat needs the layer whose cross-attention is read (X-VLM takes 9 of its 12)")
    needed = "locate" if by == "boxes" else "itm_head"
    if not hasattr(model, needed):
        other = "by=heat" if by == "boxes" else "by=boxes"
        raise ValueError(f"by={by}: the model has no {needed}; use {other}, or a model trained for it")


def _expression(sample: Sample) -> _Expression:
    texts = [text.text for text in sample.texts if text.role == "expression"]
    place = None if sample.target is None else sample.target.box
    if len(texts) != 1 or len(sample.images) != 1 or place is None:
        raise DataError(
            f"{sample.key}: grounding needs rows of one picture with one expression and its box; data.format=refer joins lists with REFER's files"
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
            "chance": "the whole picture as box" if by == "boxes" else "a detection drawn at random",
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
    """Share of right boxes without a look at the picture."""
    width, height = size
    guesses: Sequence[Box] = [(0.0, 0.0, width, height)] if by == "boxes" else one.detections
    if not guesses:
        return 0.0
    overlap = metric.iou(guesses, [one.box] * len(guesses))
    return float((overlap >= metric.RIGHT).mean())
