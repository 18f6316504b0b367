"""All texts of a scene, and the JSON record that holds the scene without its pixels."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, cast

import numpy as np

from vlp_data.shapes import concepts, language
from vlp_data.shapes import questions as asking
from vlp_data.shapes.dice import Dice
from vlp_data.shapes.scene import PAIR, TEXT, Layout, Scene


@dataclass(frozen=True, kw_only=True, slots=True)
class Annotations:
    """What is said about one scene; every sentence is true of it, except
    contradictions and neutral ones."""

    captions: tuple[str, str, str, str, str]
    long_caption: str
    phrases: tuple[language.Phrase, ...]
    expressions: tuple[language.Expression, ...]
    questions: tuple[asking.Question, ...]
    hypotheses: tuple[asking.Hypothesis, ...]


def annotate(scene: Scene) -> Annotations:
    """The texts of a scene, a pure function of it."""
    # One stream per kind of text, so that a change to one does not change the others.
    dice = [Dice(scene.seed, scene.index, TEXT, kind) for kind in range(6)]
    return Annotations(
        captions=language.captions(scene, dice[0]),
        long_caption=language.long_caption(scene, dice[1]),
        phrases=language.phrases(scene, dice[2]),
        expressions=language.expressions(scene, dice[3]),
        questions=asking.questions(scene, dice[4]),
        hypotheses=asking.hypotheses(scene, dice[5]),
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class Pair:
    """NLVR2-style: sentences about two scenes, seen side by side."""

    left: int
    right: int
    sentences: tuple[asking.PairSentence, ...]


def pair(seed: int, index: int, indices: range, layouts: Mapping[int, Layout]) -> Pair | None:
    """Scene `index` beside another scene of `indices` (its split); None when there is no other.

    `layouts` holds the layout of every scene of the split.
    """
    if len(indices) < 2:
        return None
    dice = Dice(seed, index, PAIR)
    other = indices[(indices.index(index) + 1 + dice.below(len(indices) - 1)) % len(indices)]
    left, right = (index, other) if dice.chance(50) else (other, index)
    return Pair(left=left, right=right, sentences=asking.pair_sentences(layouts[left], layouts[right], dice))


def image_id(index: int) -> int:
    """COCO id of a scene: its index plus one."""
    return index + 1


def file_name(index: int) -> str:
    """Path of a scene's image, relative to the data folder."""
    return f"images/{image_id(index):012d}.png"


def xywh(box: tuple[int, int, int, int]) -> list[int]:
    left, top, right, bottom = box
    return [left, top, right - left, bottom - top]


def record(scene: Scene, texts: Annotations, split: str) -> dict[str, Any]:
    """The line of `annotations.jsonl` without the pairs: all of a scene as JSON types; boxes are xywh in
    pixels."""
    from pycocotools import mask as coco_mask

    number = image_id(scene.index)
    ground = scene.layout.background
    objects = []
    for thing, mask, whole, box in zip(
        scene.things, scene.masks, scene.whole_masks, scene.boxes, strict=True
    ):
        runs = coco_mask.encode(np.asfortranarray(mask.astype(np.uint8)))
        objects.append(
            {
                "kind": thing.kind,
                "color": thing.color,
                "texture": thing.texture,
                "size": thing.size,
                "bbox": xywh(box),
                "area": int(mask.sum()),
                "whole_area": int(whole.sum()),
                "segmentation": {
                    "size": list(mask.shape),
                    "counts": cast(bytes, runs["counts"]).decode("ascii"),
                },
            }
        )
    return {
        "image_id": number,
        "seed": scene.seed,
        "index": scene.index,
        "split": split,
        "image": file_name(scene.index),
        "width": scene.size,
        "height": scene.size,
        "background": {"kind": ground.kind, "colors": list(ground.colors), "direction": ground.direction},
        "objects": objects,
        "concepts": concepts.chosen(
            objects, ground.kind, seed=scene.seed, index=scene.index, pixels=scene.size**2
        ),
        "captions": list(texts.captions),
        "long_caption": texts.long_caption,
        "phrases": [{"text": p.text, "objects": list(p.numbers), "bbox": xywh(p.box)} for p in texts.phrases],
        "expressions": [
            {"text": e.text, "object": e.number, "bbox": xywh(scene.boxes[e.number]), "by": e.by}
            for e in texts.expressions
        ],
        "questions": [
            {
                "question_id": number * 100 + k,
                "question": q.text,
                "question_type": q.question_type,
                "answer_type": q.answer_type,
                "multiple_choice_answer": q.answer,
                "answers": list(q.answers),
            }
            for k, q in enumerate(texts.questions)
        ],
        "entailment": [{"sentence": h.text, "label": h.label} for h in texts.hypotheses],
    }


def pair_records(pair: Pair | None) -> list[dict[str, Any]]:
    """The "pairs" of a record, with the fields of the NLVR2 lists."""
    if pair is None:
        return []
    images = [file_name(pair.left), file_name(pair.right)]
    return [{"sentence": s.text, "label": str(s.label), "images": images} for s in pair.sentences]
