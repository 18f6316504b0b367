"""The files of tasks in a shapes folder: layouts as readers expect them, and every row judged by the objects
of its images."""

import json
import re
from collections import Counter, defaultdict
from pathlib import Path

import pytest
from vlp_data import shapes
from vlp_data.shapes import tasks
from vlp_data.text import Tokenizer

SIZE, VAL, TEST = 48, 40, 21
DEV = {"train": "train", "val": "dev", "test": "test"}
NUMBER = {"two": 2, "three": 3, "four": 4, "five": 5}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("tasks") / "data"
    return shapes.write(root, images=120, seed=9, size=SIZE, val=VAL, test=TEST)


@pytest.fixture(scope="module")
def scenes(folder: Path) -> dict[str, dict]:
    """Records by image."""
    lines = (folder / "annotations.jsonl").read_text().splitlines()
    return {record["image"]: record for record in map(json.loads, lines)}


def read(path: Path):
    return json.loads(path.read_text())


def of_split(scenes: dict[str, dict], split: str) -> list[dict]:
    return [record for record in scenes.values() if record["split"] == split]


@pytest.mark.parametrize("split", DEV)
def test_questions_agree_in_both_layouts(folder: Path, scenes: dict[str, dict], split: str) -> None:
    rows = read(folder / f"vqa_{split}.json")
    asked = {q["question_id"]: q for record in of_split(scenes, split) for q in record["questions"]}
    assert {row["image"] for row in rows} == {record["image"] for record in of_split(scenes, split)}
    assert len(asked) - len(rows) == sum(" and " in q["multiple_choice_answer"] for q in asked.values())
    for row in rows:
        assert row["question"] == asked[row["question_id"]]["question"] and row["dataset"] == "vqa"
        assert row.get("answer") == (None if split == "test" else asked[row["question_id"]]["answers"])
    questions = read(folder / f"vqa_questions_{split}.json")["questions"]
    assert [(q["question_id"], q["question"]) for q in questions] == [
        (row["question_id"], row["question"]) for row in rows
    ]
    assert [scenes[row["image"]]["image_id"] for row in rows] == [q["image_id"] for q in questions]
    annotations = read(folder / f"vqa_annotations_{split}.json")["annotations"]
    assert [a["question_id"] for a in annotations] == [row["question_id"] for row in rows]
    for annotation in annotations:
        original = asked[annotation["question_id"]]
        assert [each["answer"] for each in annotation["answers"]] == original["answers"]
        assert [each["answer_id"] for each in annotation["answers"]] == list(range(1, 11))
        for key in ("question_type", "answer_type", "multiple_choice_answer"):
            assert annotation[key] == original[key]


def test_yes_is_as_likely_as_no_and_no_answer_leads(folder: Path) -> None:
    answers = Counter(
        a["multiple_choice_answer"] for a in read(folder / "vqa_annotations_train.json")["annotations"]
    )
    assert abs(answers["yes"] / (answers["yes"] + answers["no"]) - 0.5) < 0.1
    assert max(answers.values()) < 0.25 * answers.total()


def test_the_list_of_answers_is_that_of_train(folder: Path) -> None:
    given = {text for row in read(folder / "vqa_train.json") for text in row["answer"]}
    assert read(folder / "answer_list.json") == sorted(given)
    unseen = [row for row in read(folder / "vqa_val.json") if not given & set(row["answer"])]
    assert len(unseen) < 0.02 * len(read(folder / "vqa_val.json"))


def test_questions_of_visual_genome_type_are_right(folder: Path, scenes: dict[str, dict]) -> None:
    rows = read(folder / "vg_qa.json")
    names = {
        "none": "plain",
        "stripes": "striped",
        "dots": "dotted",
        "checks": "checkered",
        "speckles": "speckled",
    }
    for row in rows:
        kind = re.fullmatch(r"What pattern is on the (\w+)\?", row["question"])[1]
        (texture,) = {o["texture"] for o in scenes[row["image"]]["objects"] if o["kind"] == kind}
        assert names[row["answer"]] == texture and row["dataset"] == "vg"
    identifiers = [row["question_id"] for row in rows + read(folder / "vqa_train.json")]
    assert len(set(identifiers)) == len(identifiers)


def holds(sentence: str, left: dict, right: dict) -> bool:
    """Whether a sentence is true of two scenes, judged from their records."""

    def shown(record: dict, noun: str) -> bool:
        words = noun.split()
        return any(
            (words[-1] in ("shape", o["kind"])) and all(w == o["color"] for w in words[:-1])
            for o in record["objects"]
        )

    sides = {"left": left, "right": right}
    if m := re.fullmatch(r"At least one picture shows an? (.+)\.", sentence):
        return shown(left, m[1]) or shown(right, m[1])
    if m := re.fullmatch(r"At least one picture has a (\w+) background\.", sentence):
        return m[1] in (left["background"]["kind"], right["background"]["kind"])
    if m := re.fullmatch(r"Neither picture shows an? (.+)\.", sentence):
        return not (shown(left, m[1]) or shown(right, m[1]))
    if m := re.fullmatch(r"Both pictures show at least one (.+)\.", sentence):
        return shown(left, m[1]) and shown(right, m[1])
    if m := re.fullmatch(r"The (left|right) picture shows an? (.+)\.", sentence):
        return shown(sides[m[1]], m[2])
    if m := re.fullmatch(r"The background of the (left|right) picture is (?:a )?(\w+)\.", sentence):
        return sides[m[1]]["background"]["kind"] == m[2]
    assert sentence == "The left picture has more shapes than the right picture.", sentence
    return len(left["objects"]) > len(right["objects"])


@pytest.mark.parametrize("split", DEV)
def test_sentences_about_pairs_are_judged_rightly(folder: Path, scenes: dict[str, dict], split: str) -> None:
    rows = read(folder / f"nlvr_{DEV[split]}.json")
    assert len(rows) > 6 * len(of_split(scenes, split))
    for row in rows:
        left, right = (scenes[image] for image in row["images"])
        assert left["split"] == right["split"] == split and left is not right
        assert str(holds(row["sentence"], left, right)) == row["label"], row
        assert row["identifier"].startswith(f"{DEV[split]}-")
    assert len({row["identifier"] for row in rows}) == len(rows)


def test_every_sentence_is_true_once_and_false_once(folder: Path) -> None:
    groups = defaultdict(list)
    rows = read(folder / "nlvr_train.json")
    for row in rows:
        split, scene, _, number = row["identifier"].split("-")
        groups[split, scene, number].append(row)
    for group in groups.values():
        assert len({row["sentence"] for row in group}) == 1
        assert sorted(row["label"] for row in group) == ["False", "True"]
    first = Counter(row["label"] for row in rows if row["identifier"].split("-")[2] == "0")
    assert abs(first["True"] / first.total() - 0.5) < 0.1  # the place of a row tells nothing either


def test_a_split_of_one_scene_has_no_pairs(tmp_path: Path) -> None:
    root = shapes.write(tmp_path / "data", images=3, size=32)
    assert [read(root / f"nlvr_{split}.json") for split in DEV.values()] == [[], [], []]
    for split in DEV.values():  # and no sentence that is true of one scene and false of another
        assert {row["label"] for row in read(root / f"ve_{split}.json")} == {"neutral"}


def is_entailed(sentence: str, record: dict) -> bool:
    """Whether a sentence is true of a scene, judged from its record."""

    def shown(noun: str) -> bool:
        words = noun.split()
        return any(
            words[-1] in ("shape", o["kind"]) and all(w == o["color"] for w in words[:-1])
            for o in record["objects"]
        )

    if m := re.fullmatch(r"There is no (.+)\.", sentence):
        return not shown(m[1])
    if m := re.fullmatch(r"There is an? (.+)\.", sentence):
        return shown(m[1])
    if m := re.fullmatch(r"The background is (?:a )?(\w+)\.", sentence):
        return record["background"]["kind"] == m[1]
    m = re.fullmatch(r"There are exactly (\w+) shapes\.", sentence)
    assert m, sentence
    return len(record["objects"]) == NUMBER[m[1]]


@pytest.mark.parametrize("split", DEV)
def test_hypotheses_are_judged_rightly(folder: Path, scenes: dict[str, dict], split: str) -> None:
    rows = read(folder / f"ve_{DEV[split]}.json")
    seen = set()
    for row in rows:
        record = scenes[row["image"]]
        assert record["split"] == split
        if row["label"] == "neutral":
            # One of the scene's own, about what no image shows (tests/shapes/test_truth.py).
            assert {"sentence": row["sentence"], "label": "neutral"} in record["entailment"]
        else:
            assert is_entailed(row["sentence"], record) == (row["label"] == "entailment"), row
            seen.add(" ".join(row["sentence"].split()[:3]))
    assert seen == {"There is a", "There is an", "There is no", "The background is", "There are exactly"}
    labels = Counter(row["label"] for row in rows)
    assert len(labels) == 3 and max(labels.values()) < 0.37 * len(rows)


@pytest.mark.parametrize("split", DEV)
def test_every_hypothesis_is_entailed_as_often_as_contradicted(folder: Path, split: str) -> None:
    labels = defaultdict(Counter)
    for row in read(folder / f"ve_{DEV[split]}.json"):
        labels[row["sentence"]][row["label"]] += 1
    for sentence, counts in labels.items():
        assert counts["entailment"] == counts["contradiction"], sentence
        assert counts["neutral"] == 0 or len(counts) == 1


def union_share(one: list[int], other: list[int]) -> float:
    (x, y, w, h), (x2, y2, w2, h2) = one, other
    common = max(0, min(x + w, x2 + w2) - max(x, x2)) * max(0, min(y + h, y2 + h2) - max(y, y2))
    return common / (w * h + w2 * h2 - common)


def test_expressions_refer_by_looks_to_one_object(folder: Path, scenes: dict[str, dict]) -> None:
    instances = read(folder / "refcoco" / "instances.json")
    boxes = {a["id"]: a for a in instances["annotations"]}
    names = {c["id"]: c["name"] for c in instances["categories"]}
    refs = {ref["ref_id"]: ref for ref in read(folder / "refcoco" / "refs.json")}
    assert {ref["split"] for ref in refs.values()} == {"train", "val", "testA", "testB"}
    assert len({s for ref in refs.values() for s in ref["sent_ids"]}) == sum(
        len(ref["sentences"]) for ref in refs.values()
    )
    for split in DEV:
        rows = read(folder / f"refcoco_{split}.json")
        told = defaultdict(list)
        for row in rows:
            told[row["ref_id"]].append(row["text"])
            scene, ref = scenes[row["image"]], refs[row["ref_id"]]
            assert scene["split"] == split and ref["split"].startswith(split)
            *words, kind = row["text"].removeprefix("the ").split()
            fitting = [
                o
                for o in scene["objects"]
                if kind in ("shape", o["kind"])
                and all(word in (o["size"], o["texture"], o["color"]) for word in words)
            ]
            (meant,) = fitting
            annotation = boxes[ref["ann_id"]]
            assert annotation["bbox"] == meant["bbox"] and annotation["image_id"] == scene["image_id"]
            assert names[ref["category_id"]] == meant["kind"] and ref["file_name"] == row["image"]
        assert all(texts == [s["sent"] for s in refs[number]["sentences"]] for number, texts in told.items())
        # Every object is referred to.
        assert len(told) == sum(len(record["objects"]) for record in of_split(scenes, split))


def test_detections_are_the_objects_and_a_few_that_fit_none(folder: Path, scenes: dict[str, dict]) -> None:
    found = read(folder / "refcoco" / "dets.json")
    first = Counter()
    for record in scenes.values():
        boxes, objects = found[str(record["image_id"])], [o["bbox"] for o in record["objects"]]
        assert len(boxes) == len(objects) + tasks.DISTRACTORS
        best = [max(union_share(box, own) for own in objects) for box in boxes]
        assert sum(share <= 0.3 for share in best) == tasks.DISTRACTORS
        for own in objects:
            assert max(union_share(box, own) for box in boxes) > 0.6
        for x, y, w, h in boxes:
            assert 0 <= x < x + w <= SIZE and 0 <= y < y + h <= SIZE
        first[best[0] > 0.3] += 1
    assert len(first) == 2  # not the true ones first


@pytest.mark.parametrize("split", DEV)
def test_captions_tell_the_objects_by_size(folder: Path, scenes: dict[str, dict], split: str) -> None:
    rows = read(folder / f"captions_{split}.json")
    told = defaultdict(list)
    for row in rows:
        told[row["image"]] += row["caption"] if split != "train" else [row["caption"]]
    assert list(told) == [record["image"] for record in of_split(scenes, split)]
    for image, captions in told.items():
        record = scenes[image]
        seen = sorted(record["objects"], key=lambda o: -o["area"])
        assert len(captions) == 5
        named = re.split(", | and ", captions[2].lower().removesuffix("."))
        assert sum(NUMBER.get(name.split()[0], 1) for name in named) == len(seen)
        kinds = [name.split()[-1].rstrip("es") for name in named]  # whatever the number

        order = list(dict.fromkeys((o["color"], o["kind"].rstrip("es")) for o in seen))
        assert kinds == [kind for _, kind in order]
        words = [set(re.findall(r"\w+", caption.lower())) for caption in captions]
        assert all(o["color"] in words[0] and o["color"] in words[1] for o in seen)
        assert all(o["texture"] in words[1] for o in seen if o["texture"] != "plain")
        for number in (0, 1, 3, 4):
            assert "background" in words[number] and set(record["background"]["colors"]) <= words[number]
        assert seen[0]["color"] in words[3] and seen[1]["color"] in words[3]
    if split != "train":
        truth = read(folder / f"captions_{split}_gt.json")
        by_id = defaultdict(list)
        for annotation in truth["annotations"]:
            by_id[annotation["image_id"]].append(annotation["caption"])
        assert {scenes[image]["image_id"]: captions for image, captions in told.items()} == by_id
        assert {i["id"]: i["file_name"] for i in truth["images"]} == {
            scenes[image]["image_id"]: image for image in told
        }
        assert all(int(Path(i["file_name"]).stem) == i["id"] for i in truth["images"])


def test_the_vocabulary_holds_every_word_of_the_tasks(folder: Path) -> None:
    tokenizer = Tokenizer.wordpiece(folder / "vocab.txt")
    texts = set(read(folder / "answer_list.json"))
    for path in folder.glob("*.json"):
        rows = read(path)
        if path.stem.startswith(("vqa_", "vg", "nlvr", "ve", "refcoco", "captions")) and isinstance(
            rows, list
        ):
            for row in rows:
                for key in (
                    "question",
                    "sentence",
                    "text",
                    "answer",
                    "caption",
                    "kwords",
                    "kwords1",
                    "kwords2",
                ):
                    value = row.get(key, [])
                    texts |= {value} if isinstance(value, str) else set(value)
    assert len(texts) > 1000
    unknown = [t for t in texts if any(p == "[UNK]" or p.startswith("##") for p in tokenizer.tokens(t))]
    assert unknown == []
