"""Every evaluation on a few real annotations, with models too small to know anything: formats, ids and files
are what is tested."""

import json

import pytest
import torch
from PIL import Image
from vlp_core import models
from vlp_data.options import CocoCaptions, Refer, TaskJson
from vlp_data.text import Reading, Tokenizer
from vlp_data.views import Squash, evaluation
from vlp_eval import (
    Subject,
    evaluate_captioning,
    evaluate_grounding,
    evaluate_nlvr,
    evaluate_vqa,
    evaluate_weak_grounding,
    predictions,
)
from vlp_eval.benchmarks.captioning import CaptioningOptions
from vlp_eval.benchmarks.grounding import GroundingOptions, WeakGroundingOptions
from vlp_eval.benchmarks.statements import NlvrOptions
from vlp_eval.benchmarks.vqa import VqaOptions
from vlp_eval.captioning import Captioned
from vlp_eval.vqa import Questions, read_annotations, read_answers

VIEW = evaluation(Squash(size=64))


@pytest.fixture(scope="module")
def tokenizer(shared_data):
    return Tokenizer.wordpiece(shared_data / "bert-base-uncased" / "vocab.txt")


@pytest.fixture(scope="module")
def make(tokenizer):
    """A tiny model with the real vocabulary."""

    def make(stage, layers=4, **arguments):
        torch.manual_seed(0)
        shape = {"kind": "swin", "image_size": 64, "window": 2, "width": 8}
        text = {
            "vocabulary": tokenizer.vocabulary,
            "width": 16,
            "layers": layers,
            "heads": 2,
            "hidden": 32,
            "fusion_layer": 2,
        }
        if stage == "vqa":
            arguments["decoder"] = {k: v for k, v in {**text, "layers": 1}.items() if k != "fusion_layer"}
        vision = {**shape, "depths": [1, 1, 1, 1], "heads": [1, 2, 4, 8]}
        return models.create("xvlm", stage, vision=vision, text=text, **arguments)

    return make


def subject(model, tokenizer):
    return Subject(model=model, view=VIEW, tokenizer=tokenizer, reading=Reading())


def stand_ins(folder, names, size=(64, 48)):
    """Images of one colour where the real ones may not be passed on."""
    for number, name in enumerate(names):
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", size, (number % 256, 80, 160)).save(path, format="JPEG")


@pytest.mark.parametrize("chosen", [True, False])
def test_questions(chosen, shared_data, tokenizer, make, tmp_path):
    lists = shared_data / "formats" / "albef_json"
    source = TaskJson(files=(str(lists / "vqa_test.json"),), root=str(shared_data / "coco-mini")).open()
    annotations = read_annotations(str(shared_data / "coco-mini" / "annotations" / "vqa_annotations.json"))
    candidates = read_answers(str(lists / "answer_list.json"))
    scores = evaluate_vqa(
        subject(make("vqa"), tokenizer),
        Questions(source=source, answers=candidates if chosen else None, annotations=annotations),
        VqaOptions(candidates=5) if chosen else VqaOptions(mode="generate"),
    )
    rows = json.loads((lists / "vqa_test.json").read_text())
    sent = json.loads(predictions.answers(scores, tmp_path).read_text())
    assert [one["question_id"] for one in sent] == [row["question_id"] for row in rows]
    if chosen:
        assert {one["answer"] for one in sent} <= set(candidates)
    types = {annotations[row["question_id"]]["answer_type"] for row in rows}
    assert set(scores.metrics) == {"accuracy", *types}


def test_training_questions_bring_their_answers(shared_data, tokenizer, make):
    file = shared_data / "formats" / "albef_json" / "vqa_train.json"
    source = TaskJson(files=(str(file),), root=str(shared_data / "coco-mini")).open()
    data = Questions(source=source, answers=["wood", "yes"])
    scores = evaluate_vqa(subject(make("vqa"), tokenizer), data, VqaOptions())
    assert all(len(one["answers"]) == 10 for one in scores.samples["questions"])


def test_sentences_about_two_images(shared_data, tokenizer, make, tmp_path):
    file = shared_data / "formats" / "albef_json" / "nlvr_dev.json"
    rows = json.loads(file.read_text())
    stand_ins(tmp_path, sorted({name for row in rows for name in row["images"]}))
    source = TaskJson(files=(str(file),), root=str(tmp_path)).open()
    scores = evaluate_nlvr(subject(make("nlvr", layers=6), tokenizer), source, NlvrOptions())
    assert [one["label"] for one in scores.samples["statements"]] == [row["label"] for row in rows]
    assert "consistency" not in scores.metrics  # these lists carry no identifiers, and the report says so
    assert any("no consistency" in note for note in scores.notes)


@pytest.mark.parametrize("by", ["boxes", "heat"])
def test_referring_expressions(by, shared_data, tokenizer, make, tmp_path):
    folder = shared_data / "refcocoplus-sample"
    rows = json.loads((folder / "refcoco+_test.json").read_text())
    known = json.loads((folder / "refcoco+" / "instances.json").read_text())
    sizes = {f"train2014/{one['file_name']}": (one["width"], one["height"]) for one in known["images"]}
    for name in {row["image"] for row in rows}:
        stand_ins(tmp_path, [name], sizes[name])
    boxes: dict[str, list] = {}
    for one in known["annotations"]:
        boxes.setdefault(str(one["image_id"]), []).append([*one["bbox"], 0.9])
    (tmp_path / "dets.json").write_text(json.dumps(boxes))
    source = Refer(
        files=(str(folder / "refcoco+_test.json"),),
        refs=str(folder / "refcoco+" / "refs(unc).p"),
        instances=str(folder / "refcoco+" / "instances.json"),
        detections=str(tmp_path / "dets.json"),
        root=str(tmp_path),
    ).open()
    model = make("boxes" if by == "boxes" else "retrieval")
    own = subject(model, tokenizer)
    if by == "boxes":
        scores = evaluate_grounding(own, source, GroundingOptions())
    else:
        scores = evaluate_weak_grounding(own, source, WeakGroundingOptions(layer=2))
    assert scores.counts["expressions"] == len(rows)
    assert set(scores.metrics) == {"accuracy", "testB"}
    if by == "heat":
        given = [one["predicted"] for one in scores.samples["expressions"]]
        flat = [box[:4] for own in boxes.values() for box in own]
        assert all(any(box == pytest.approx(other) for other in flat) for box in given)


def test_captions(shared_data, tokenizer, make, tmp_path):
    folder = shared_data / "coco-mini"
    source = CocoCaptions(
        annotations=str(folder / "annotations" / "captions.json"), images=str(folder / "images")
    ).open()
    scores = evaluate_captioning(
        subject(make("captioning"), tokenizer),
        Captioned(source=source),
        CaptioningOptions(limit=6, max_tokens=10, beams=2),
    )
    known = {
        one["id"] for one in json.loads((folder / "annotations" / "captions.json").read_text())["images"]
    }
    sent = json.loads(predictions.captions(scores, tmp_path).read_text())
    assert len(sent) == 6 and {one["image_id"] for one in sent} <= known
    assert scores.counts["references"] >= 30
