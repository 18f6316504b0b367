"""The files of the fine-tuning tasks of a `shapes` folder, in the layouts of X-VLM, ALBEF, VQA v2 and REFER.

What a file asks is chosen so that a model of a few layers learns it: labels are balanced, no answer needs
more than the image shows, and a caption tells an image's objects in an order that can be seen. The harder
sentences are in `annotations.jsonl`. Sources of the layouts: X-VLM specification 5.5; visualqa.org (VQA v2
files); REFER (lichengunc/refer).
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from vlp_data.shapes import facts
from vlp_data.shapes.dice import Dice
from vlp_data.shapes.entailment import entailment_rows
from vlp_data.shapes.facts import look
from vlp_data.shapes.language import a, background, inventory, joined, noun, sentence
from vlp_data.shapes.layouts import (
    Record,
    annotation_id,
    category_id,
    coco_captions,
    coco_instances,
    retrieval,
    write_json,
)
from vlp_data.shapes.paint import BACKGROUNDS
from vlp_data.shapes.questions import PATTERNS
from vlp_data.shapes.scene import TASK, Layout

SENTENCES = 4
"""NLVR2-style sentences per scene; each is said of two pairs of images, true of one of them."""
PAIRS_TRIED = 40
"""Pairs that are tried for a sentence, which needs one pair that it is true of and one that it is not."""
DISTRACTORS = 3
"""Detections of an image that fit no object."""
DETECTIONS, STATEMENTS = range(2)
"""Streams of random numbers of one scene."""


def write_tasks(
    folder: Path, records: Sequence[Record], layouts: Mapping[int, Layout], ranges: Mapping[str, range]
) -> None:
    """Write the files of all tasks into an existing folder. `layouts` by scene index; `ranges`: the scenes of
    train, val and test."""
    parts = {split: [record for record in records if record["split"] == split] for split in ranges}
    answers = {text for r in parts["train"] for q in _asked(r) for text in q["answers"]}
    write_json(folder / "answer_list.json", sorted(answers))
    write_json(folder / "vg_qa.json", [row for record in parts["train"] for row in _patterns(record)])
    (folder / "refcoco").mkdir()
    write_json(folder / "refcoco" / "refs.json", [ref for record in records for ref in _refs(record)])
    write_json(folder / "refcoco" / "instances.json", coco_instances(records))
    write_json(
        folder / "refcoco" / "dets.json", {str(record["image_id"]): detections(record) for record in records}
    )
    for split, part in parts.items():
        dev = {"val": "dev"}.get(split, split)
        vqa = [row for record in part for row in _vqa(record, answered=split != "test")]
        write_json(folder / f"vqa_{split}.json", vqa)
        write_json(folder / f"vqa_questions_{split}.json", _vqa_questions(part, split))
        write_json(folder / f"vqa_annotations_{split}.json", _vqa_annotations(part, split))
        write_json(folder / f"nlvr_{dev}.json", _nlvr(part, ranges[split], layouts, dev))
        write_json(folder / f"ve_{dev}.json", entailment_rows(part, ranges[split], layouts))
        write_json(folder / f"refcoco_{split}.json", [row for record in part for row in _expressions(record)])
        told = [{**record, "captions": captions(record, layouts[record["index"]])} for record in part]
        write_json(folder / f"captions_{split}.json", retrieval(told, grouped=split != "train"))
        if split != "train":
            write_json(folder / f"captions_{split}_gt.json", coco_captions(told))


# ---- VQA ---------------------------------------------------------------------------------------------------


def _asked(record: Record) -> list[Record]:
    """The questions of a scene but for those with two colours as answer: 132 answers, each of which is hardly
    ever right."""
    return [q for q in record["questions"] if q["question_type"] != "what are the"]


def _vqa(record: Record, *, answered: bool) -> list[Record]:
    return [
        {
            "question_id": q["question_id"],
            "question": q["question"],
            **({"answer": q["answers"]} if answered else {}),
            "image": record["image"],
            "dataset": "vqa",
            "kwords": record["concepts"],
        }
        for q in _asked(record)
    ]


def _patterns(record: Record) -> list[Record]:
    """Questions with one answer, as Visual Genome has them: the patterns of objects that are alone of their
    kind."""
    kinds = [thing["kind"] for thing in record["objects"]]
    return [
        {
            "question_id": record["image_id"] * 100 + 50 + number,
            "question": f"What pattern is on the {thing['kind']}?",
            "answer": PATTERNS[thing["texture"]],
            "image": record["image"],
            "dataset": "vg",
            "kwords": record["concepts"],
        }
        for number, thing in enumerate(record["objects"])
        if kinds.count(thing["kind"]) == 1
    ]


def _head(split: str) -> Record:
    return {
        "info": {"description": "vlp shapes: procedurally drawn scenes", "version": "1.0", "year": 2026},
        "data_type": "shapes",
        "data_subtype": split,
        "license": {"name": "CC0 1.0", "url": "https://creativecommons.org/publicdomain/zero/1.0/"},
    }


def _vqa_questions(records: Sequence[Record], split: str) -> Record:
    questions = [
        {"image_id": r["image_id"], "question": q["question"], "question_id": q["question_id"]}
        for r in records
        for q in _asked(r)
    ]
    return {**_head(split), "task_type": "Open-Ended", "questions": questions}


def _vqa_annotations(records: Sequence[Record], split: str) -> Record:
    annotations = [
        {
            "question_id": q["question_id"],
            "image_id": r["image_id"],
            "question_type": q["question_type"],
            "answer_type": q["answer_type"],
            "multiple_choice_answer": q["multiple_choice_answer"],
            "answers": [
                {"answer": text, "answer_confidence": "yes", "answer_id": number}
                for number, text in enumerate(q["answers"], start=1)
            ],
        }
        for r in records
        for q in _asked(r)
    ]
    return {**_head(split), "annotations": annotations}


# ---- NLVR2 -------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Statement:
    """A sentence about a left and a right image and what makes it true."""

    text: str
    holds: Callable[[Layout, Layout], bool]


def statement(layout: Layout, dice: Dice) -> Statement:
    """A sentence about two images whose words come from one of them. Most ask for one property, whichever
    image has it."""
    thing = dice.choice(layout.things)
    wanted = dice.weighted(
        ((look(thing, "color"), 3), (look(thing, "kind"), 1), (look(thing, "color", "kind"), 1))
    )
    ground = dice.choice(BACKGROUNDS)
    side = dice.choice((0, 1))
    name = ("left", "right")[side]

    def shows(one: Layout) -> bool:
        return facts.count(one.things, wanted) > 0

    def has_ground(one: Layout) -> bool:
        return one.background.kind == ground

    described = "a gradient" if ground == "gradient" else ground
    said = (
        (f"At least one picture shows {a(noun(wanted))}.", lambda *both: any(map(shows, both)), 4),
        (f"At least one picture has a {ground} background.", lambda *both: any(map(has_ground, both)), 4),
        (f"Neither picture shows {a(noun(wanted))}.", lambda *both: not any(map(shows, both)), 2),
        (f"Both pictures show at least one {noun(wanted)}.", lambda *both: all(map(shows, both)), 1),
        (f"The {name} picture shows {a(noun(wanted))}.", lambda *both: shows(both[side]), 2),
        (f"The background of the {name} picture is {described}.", lambda *both: has_ground(both[side]), 3),
        (
            "The left picture has more shapes than the right picture.",
            lambda left, right: len(left.things) > len(right.things),
            1,
        ),
    )
    return dice.weighted(tuple((Statement(text=text, holds=holds), weight) for text, holds, weight in said))


def _nlvr(
    records: Sequence[Record], indices: range, layouts: Mapping[int, Layout], split: str
) -> list[Record]:
    """Every sentence twice, with a pair that it is true of and one that it is not, so that the words alone
    tell nothing about the label."""
    scenes = {record["index"]: record for record in records}
    rows = []
    for record in records if len(indices) > 1 else ():
        index = record["index"]
        dice = Dice(record["seed"], index, TASK, STATEMENTS)
        for number in range(SENTENCES):
            said = statement(layouts[index], dice)
            found: dict[bool, tuple[int, int]] = {}
            for _ in range(PAIRS_TRIED):
                left, right = _pair(index if dice.chance(50) else dice.choice(indices), indices, dice)
                found.setdefault(said.holds(layouts[left], layouts[right]), (left, right))
            if len(found) < 2:
                continue
            rows += [
                {
                    "sentence": said.text,
                    "label": str(label),
                    "images": [scenes[each]["image"] for each in found[label]],
                    "identifier": f"{split}-{index}-{place}-{number}",
                    "kwords1": scenes[found[label][0]]["concepts"],
                    "kwords2": scenes[found[label][1]]["concepts"],
                }
                for place, label in enumerate(dice.shuffled((True, False)))
            ]
    return rows


def _pair(index: int, indices: range, dice: Dice) -> tuple[int, int]:
    """Scene `index` and another one, in either order."""
    other = indices[(indices.index(index) + 1 + dice.below(len(indices) - 1)) % len(indices)]
    return (index, other) if dice.chance(50) else (other, index)


# ---- RefCOCO+ ----------------------------------------------------------------------------------------------


def _sayings(record: Record) -> dict[int, list[str]]:
    """Expressions of each object by looks alone: RefCOCO+ allows no words for places."""
    said: dict[int, list[str]] = {}
    for expression in record["expressions"]:
        if expression["by"] == "looks":
            said.setdefault(expression["object"], []).append(expression["text"])
    return said


def _refs(record: Record) -> list[Record]:
    split = record["split"]
    if split == "test":
        split = "testA" if record["index"] % 2 == 0 else "testB"
    refs = []
    for number, texts in _sayings(record).items():
        identifier = annotation_id(record, number)
        sentences = [
            {
                "tokens": text.split(),
                "raw": text,
                "sent_id": identifier * 10 + place,
                "sent": text,
            }
            for place, text in enumerate(texts)
        ]
        refs.append(
            {
                "ref_id": identifier,
                "ann_id": identifier,
                "image_id": record["image_id"],
                "file_name": record["image"],
                "category_id": category_id(record["objects"][number]["kind"]),
                "split": split,
                "sent_ids": [each["sent_id"] for each in sentences],
                "sentences": sentences,
            }
        )
    return refs


def _expressions(record: Record) -> list[Record]:
    return [
        {
            "image": record["image"],
            "text": text,
            "ref_id": annotation_id(record, number),
            "kwords": record["concepts"],
        }
        for number, texts in _sayings(record).items()
        for text in texts
    ]


def detections(record: Record) -> list[list[int]]:
    """What a detector would find, as xywh: every object, each edge off by at most a tenth of the box, and
    boxes that fit no object."""
    dice = Dice(record["seed"], record["index"], TASK, DETECTIONS)
    side = record["width"]
    objects = [thing["bbox"] for thing in record["objects"]]
    found = [_shifted(box, side, dice) for box in objects]
    while len(found) < len(objects) + DISTRACTORS:
        w, h = dice.between(side // 8, side // 3), dice.between(side // 8, side // 3)
        box = [dice.below(side - w + 1), dice.below(side - h + 1), w, h]
        if not any(_fit(box, other) for other in objects):
            found.append(box)
    return dice.shuffled(found)


def _shifted(box: list[int], side: int, dice: Dice) -> list[int]:
    x, y, w, h = box
    left, right = (edge + dice.between(-(w // 10), w // 10) for edge in (x, x + w))
    top, bottom = (edge + dice.between(-(h // 10), h // 10) for edge in (y, y + h))
    left, top, right, bottom = max(left, 0), max(top, 0), min(right, side), min(bottom, side)
    return [left, top, right - left, bottom - top]


def _fit(one: list[int], other: list[int]) -> bool:
    """Whether two boxes share more than 3/10 of their union."""
    (x, y, w, h), (x2, y2, w2, h2) = one, other
    common = max(0, min(x + w, x2 + w2) - max(x, x2)) * max(0, min(y + h, y2 + h2) - max(y, y2))
    return 10 * common > 3 * (w * h + w2 * h2 - common)


# ---- captions ----------------------------------------------------------------------------------------------


def captions(record: Record, layout: Layout) -> list[str]:
    """Five captions of one kind: the objects, largest visible part first, and the background."""
    areas = [thing["area"] for thing in record["objects"]]
    order = sorted(range(len(areas)), key=lambda number: -areas[number])
    things = [layout.things[number] for number in order]
    brief = joined(inventory(things, "color", "kind"))
    full = joined(inventory(things, "texture", "color", "kind"))
    largest = joined(inventory(things[:2], "color", "kind"))
    ground = a(background(layout.background))
    told = (
        f"{brief} on {ground}",
        f"{full} on {ground}",
        brief,
        f"{largest} on {ground}",
        f"{ground} with {brief} on it",
    )
    return [sentence(text) for text in told]
