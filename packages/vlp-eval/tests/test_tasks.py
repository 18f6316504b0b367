"""Answers, statements, boxes and captions: tiny models of the real classes, and toys whose answers are known,
on one rank and on two."""

import csv
import json
import os
import subprocess
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.distributed as dist
from PIL import Image
from torch import nn
from vlp_core import models
from vlp_core.explain import HeatMaps
from vlp_core.images import Images
from vlp_core.vision.encoder import ImageStates
from vlp_data import shapes
from vlp_data.errors import DataError
from vlp_data.options import ConceptOptions, Refer, TaskJson
from vlp_data.sources.task_json import ENTAILMENT_LABELS
from vlp_data.text import Reading, Tokenizer
from vlp_data.views import Squash, evaluation
from vlp_eval import (
    Execution,
    Scores,
    Subject,
    evaluate_captioning,
    evaluate_entailment,
    evaluate_grounding,
    evaluate_nlvr,
    evaluate_vqa,
    evaluate_weak_grounding,
    figures,
    grounding,
    predictions,
)
from vlp_eval.benchmarks.captioning import CaptioningFiles, CaptioningOptions
from vlp_eval.benchmarks.grounding import GroundingOptions, WeakGroundingOptions
from vlp_eval.benchmarks.statements import EntailmentOptions, NlvrOptions
from vlp_eval.benchmarks.vqa import VqaFiles, VqaOptions
from vlp_eval.captioning import Captioned, open_captions
from vlp_eval.cli import main
from vlp_eval.vqa import Questions, open_questions

VIEW = evaluation(Squash(size=64))


def subject(model, tokenizer, concepts=None, **settings):
    return Subject(
        model=model,
        view=VIEW,
        tokenizer=tokenizer,
        reading=Reading(),
        concepts=concepts,
        settings=settings,
    )


def vision(image_size=64):
    return {
        "kind": "swin",
        "image_size": image_size,
        "window": 2,
        "width": 8,
        "depths": [1, 1, 2, 1],
        "heads": [1, 2, 4, 8],
    }


def text(vocabulary, layers=4):
    return {
        "kind": "bert",
        "vocabulary": vocabulary,
        "width": 32,
        "layers": layers,
        "heads": 4,
        "hidden": 64,
        "positions": 60,
        "fusion_layer": 2,
    }


@pytest.fixture(scope="session")
def world(tmp_path_factory):
    return shapes.ensure(tmp_path_factory.mktemp("shapes") / "world", images=40, seed=0, size=48)


@pytest.fixture(scope="session")
def tokenizer(world):
    return Tokenizer.wordpiece(world / "vocab.txt")


@pytest.fixture(scope="session")
def exports(world, tokenizer, tmp_path_factory):
    """Export folders of tiny models with random weights, by name."""
    words = tokenizer.vocabulary
    arguments = {
        "vqa": {
            "vision": vision(),
            "text": text(words),
            "decoder": {key: value for key, value in text(words, 2).items() if key != "fusion_layer"},
        },
        "nlvr": {"vision": vision(), "text": text(words, 6)},
        "retrieval": {"vision": vision(), "text": text(words)},
        "boxes": {"vision": vision(), "text": text(words)},
        "captioning": {"vision": vision(), "text": text(words)},
        "entailment": {"vision": vision(), "text": text(words), "concepts": {"layers": 1, "place": "last"}},
        "seeing_nlvr": {
            "vision": vision(),
            "text": text(words, 6),
            "concepts": {"layers": 1, "place": "last"},
        },
        "seeing": {
            "vision": {
                "kind": "vit",
                "image_size": 64,
                "patch": 20,
                "width": 16,
                "depth": 2,
                "heads": 2,
                "local_depth": 0,
            },
            "text": text(words),
            "concepts": {"layers": 1},
        },
        "seeing_vqa": {
            "vision": vision(),
            "text": text(words),
            "decoder": {key: value for key, value in text(words, 2).items() if key != "fusion_layer"},
            "concepts": {"layers": 1, "place": "last"},
        },
    }
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("exports")
    for name, own in arguments.items():
        stage = {"seeing": "retrieval"}.get(name, name.removeprefix("seeing_"))
        family = "vicha" if "concepts" in own else "xvlm"
        concepts = {"concepts": {"max_tokens": 9, "share": 0.3}} if "concepts" in own else {}
        models.save(
            folder / name,
            models.create(family, stage, **own),
            family=family,
            stage=stage,
            arguments=own,
            view={"kind": "squash", "size": 64},
            reading={
                "tokenizer": {"kind": "wordpiece", "files": ["vocab.txt"]},
                "max_tokens": 40,
                "max_words": 30,
            },
            settings=concepts,
            text_files=[world / "vocab.txt"],
        )
    return folder


def task_json(world, name):
    return TaskJson(files=(f"{world}/{name}.json",), root=str(world)).open()


def refer_files(world):
    folder = world / "refcoco"
    return {
        "files": (f"{world}/refcoco_test.json",),
        "refs": str(folder / "refs.json"),
        "instances": str(folder / "instances.json"),
        "detections": str(folder / "dets.json"),
        "root": str(world),
    }


def refer(world, **options):
    return Refer(**refer_files(world), **options).open()


# ---------------------------------------------------------------------------------------------- toys


class Toy(nn.Module):
    """Sees which row a batch holds by the mean of its images; answers what it was told for that image."""

    def __init__(self, known):
        super().__init__()
        self.place = nn.Parameter(torch.zeros(1))
        self.dropout = nn.Dropout()
        self.known, self.seen = known, []

    def look(self, images):
        assert isinstance(images, Images) and not self.dropout.training
        keys = [key_of(one) for one in images.pixels]
        self.seen += keys
        return torch.tensor([self.known[key] for key in keys], dtype=torch.float64)


def key_of(view):
    return round(float(view.double().mean()), 6)


def keys_of(source, number=0):
    return [key_of(VIEW(opened(source[row], number))) for row in range(len(source))]


def opened(sample, number=0):
    return Image.open(sample.images[number].path).convert("RGB")


class Answers(Toy):
    """Chooses or writes the answer with the number that it knows for an image."""

    def ask(self, images, ids, mask):
        return self.look(images)[:, None, None]

    def rank_answers(self, states, mask, ids, candidate_mask, k, *, pairs):
        first = states[:, 0].long()
        return SimpleNamespace(indices=torch.cat([first, first], 1), scores=torch.ones(len(first), 2))

    def generate_answers(self, states, mask, *, start_id, end_id, pad_id, beams, max_tokens):
        number = states[:, 0].long()
        ids = torch.cat([torch.full_like(number, start_id), number, torch.full_like(number, end_id)], 1)
        return SimpleNamespace(ids=ids)


class OwnAnswers(Toy):
    """Has a class for each of its answers."""

    def __init__(self, known, answers):
        super().__init__(known)
        self.answers, self.ids = answers, []

    def classify_answers(self, images, ids, mask):
        self.ids += [row[keep == 1].tolist() for row, keep in zip(ids, mask, strict=True)]
        return nn.functional.one_hot(self.look(images).long(), len(self.answers)).float()


class Pairs(Toy):
    def __call__(self, groups, first, second, ids, mask):
        assert [len(images) for images in groups] == [len(ids)] * 2
        assert torch.equal(torch.cat([first, second]), torch.arange(2 * len(ids)))
        truth = self.look(groups[0]).long()
        self.look(groups[1])
        return nn.functional.one_hot(truth, 2).float()


class Single(Toy):
    def __call__(self, images, ids, mask):
        return nn.functional.one_hot(self.look(images).long(), 3).float()


class Boxes(Toy):
    def encode_image(self, images):
        return self.look(images)

    def encode_text(self, ids, mask):
        return None

    def locate(self, image, text, image_index, text_index):
        assert torch.equal(image_index, text_index)
        return torch.stack([torch.full((4,), 0.5), torch.tensor([0.25, 0.25, 0.5, 0.5])])[image.long()]


class Captions(Toy):
    def __init__(self, known):
        super().__init__(known)
        self.vision = SimpleNamespace(encode=lambda images: ImageStates(self.look(images)))

    def generate(
        self, embeds, prompt, *, beams, max_tokens, min_tokens, length_penalty, end_id, pad_id, image_mask_BL
    ):
        word = embeds.long()[:, None]
        return SimpleNamespace(ids=torch.cat([prompt, word, torch.full_like(word, end_id)], 1))


def vqa_toy(world, wrong=()):
    """Answers every question of an image with the most frequent answer to the image's last question, `wrong`
    images with another."""
    source = task_json(world, "vqa_val")
    answers = json.loads((world / "answer_list.json").read_text())
    known = {}
    for row, key in enumerate(keys_of(source)):
        best = max(source[row].target.answers, key=lambda pair: pair[1])[0]
        known[key] = answers.index(best)
    return source, answers, known


def test_chosen_answers_are_those_of_the_model_and_are_judged(world, tokenizer):
    source, answers, known = vqa_toy(world)
    model = Answers(known).train()
    data = Questions(source=source, answers=answers)
    options = VqaOptions(image_batch=7, candidates=2)
    scores = evaluate_vqa(subject(model, tokenizer), data, options)
    assert model.training and model.dropout.training
    assert sorted(model.seen) == sorted(keys_of(source))
    samples = scores.samples["questions"]
    assert [one["id"] for one in samples] == [source[row].texts[0].id for row in range(len(source))]
    for one, key in zip(samples, keys_of(source), strict=True):
        assert one["answer"] == answers[known[key]]
    mean = sum(one["accuracy"] for one in samples) / len(samples)
    assert scores.metrics["accuracy"] == pytest.approx(mean, abs=0.01)
    assert 0 < scores.chance["accuracy"] < 100 and 0 < mean < 100
    assert "chosen" in scores.table() and json.loads(scores.json())["results"]["chosen"] == scores.metrics


def test_answers_by_type_need_the_annotations_of_vqa(world, tokenizer):
    source, answers, known = vqa_toy(world)
    rows = json.loads((world / "vqa_annotations_val.json").read_text())["annotations"]
    annotations = {one["question_id"]: one for one in rows}

    def run(annotations=None):
        data = Questions(source=source, answers=answers, annotations=annotations)
        return evaluate_vqa(subject(Answers(known), tokenizer), data, VqaOptions(candidates=1))

    found, plain = run(annotations), run()
    assert found.metrics["accuracy"] == plain.metrics["accuracy"]
    assert {"yes/no", "number", "other"} == set(found.metrics) - {"accuracy"}
    with pytest.raises(ValueError, match="questions have no annotation, the first is"):
        run(dict(list(annotations.items())[1:]))


def test_never_more_candidates_are_scored_than_there_are(world, tokenizer):
    source, answers, known = vqa_toy(world)
    data = Questions(source=source, answers=answers)
    scores = evaluate_vqa(subject(Answers(known), tokenizer), data, VqaOptions(candidates=9999))
    assert scores.settings["candidates"] == scores.settings["answers"] == len(answers)


def test_answers_of_a_model_with_classes_of_its_own(world, tokenizer):
    source, answers, known = vqa_toy(world)
    model = OwnAnswers(known, answers)
    options = VqaOptions(mode="classes", max_words=3, image_batch=5)
    scores = evaluate_vqa(subject(model, tokenizer), Questions(source=source), options)
    chosen = evaluate_vqa(
        subject(Answers(known), tokenizer), Questions(source=source, answers=answers), VqaOptions()
    )
    assert scores.results["classified"] == chosen.results["chosen"]
    assert scores.samples == chosen.samples and scores.settings["answers"] == len(answers)
    words = [source[row].texts[0].text.lower().rstrip("?").split()[:3] for row in range(len(source))]
    assert [tokenizer.decode(ids).split() for ids in model.ids] == words
    with pytest.raises(ValueError, match="Answers has no answer classes of its own"):
        evaluate_vqa(subject(Answers(known), tokenizer), Questions(source=source), options)


def test_answer_lists_fit_the_mode(world, tmp_path):
    source, listed = task_json(world, "vqa_val"), str(world / "answer_list.json")
    assert len(open_questions(source, VqaFiles(answers=listed), VqaOptions()).answers) > 3
    assert open_questions(source, VqaFiles(), VqaOptions(mode="generate")).answers is None
    with pytest.raises(ValueError, match=r"mode=rank needs answers=answer_list\.json"):
        open_questions(source, VqaFiles(), VqaOptions())
    with pytest.raises(ValueError, match="has no effect with mode=generate"):
        open_questions(source, VqaFiles(answers=listed), VqaOptions(mode="generate"))
    for mode, key in (("rank", "beams"), ("generate", "candidates"), ("classes", "answer_tokens")):
        with pytest.raises(ValueError, match=f"{key}=3 has no effect with mode={mode}"):
            VqaOptions(mode=mode, **{key: 3})


def test_texts_are_read_as_the_options_say_or_else_as_in_training(world, tokenizer):
    trained = Reading(max_words=7, max_tokens=5, separator=True)
    own = replace(subject(Answers({}), tokenizer), reading=trained)
    read = own.reads
    assert read(NlvrOptions()) == trained
    assert read(NlvrOptions(max_words=4, max_tokens=9)) == replace(trained, max_words=4, max_tokens=9)
    assert read(NlvrOptions(max_tokens="all")) == replace(trained, max_tokens=None)
    assert read(NlvrOptions(clean="none")) == replace(trained, clean="none")
    with pytest.raises(ValueError, match="Answers comes without tokenizer and reads no text"):
        replace(own, tokenizer=None, reading=None).reads(NlvrOptions())
    # Questions have rules of their own where texts are cleaned.
    source, answers, known = vqa_toy(world)
    seen = {}
    for name, reading in (("cleaned", trained), ("raw", replace(trained, clean="none"))):
        model = OwnAnswers(known, answers)
        own = replace(subject(model, tokenizer), reading=reading)
        evaluated = evaluate_vqa(own, Questions(source=source), VqaOptions(mode="classes", limit=3))
        seen[name] = [evaluated.settings[key] for key in ("clean", "max_words", "max_tokens", "separator")]
    assert seen["cleaned"] == ["question", 50, None, True] and seen["raw"][0] == "none"


def test_written_answers_are_decoded(world, tokenizer):
    source = task_json(world, "vqa_val")
    word = tokenizer.token_ids("red")[0]
    model = Answers(dict.fromkeys(keys_of(source), word))
    options = VqaOptions(mode="generate", limit=5)
    scores = evaluate_vqa(subject(model, tokenizer), Questions(source=source), options)
    assert [one["answer"] for one in scores.samples["questions"]] == ["red"] * 5
    assert list(scores.results) == ["written"]


def test_questions_without_answers_give_the_file_for_the_server(world, tokenizer, tmp_path):
    _, answers, known = vqa_toy(world)
    rows = json.loads((world / "vqa_val.json").read_text())
    (tmp_path / "bare.json").write_text(
        json.dumps([{k: v for k, v in row.items() if k != "answer"} for row in rows])
    )
    bare = TaskJson(files=(str(tmp_path / "bare.json"),), root=str(world)).open()
    data = Questions(source=bare, answers=answers)
    scores = evaluate_vqa(subject(Answers(known), tokenizer), data, VqaOptions())
    assert scores.metrics == {} and "without answers" in scores.table()
    path = predictions.answers(scores, tmp_path)
    assert path.name == "vqa_result.json"
    sent = json.loads(path.read_text())
    assert [set(one) for one in sent] == [{"question_id", "answer"}] * len(rows)
    assert [one["question_id"] for one in sent] == [row["question_id"] for row in rows]


def test_a_question_id_that_occurs_twice_is_refused(world, tokenizer):
    source = TaskJson(files=(f"{world}/vqa_val.json",) * 2, root=str(world)).open()
    with pytest.raises(DataError, match="occurs 2 times in the source"):
        evaluate_vqa(subject(Answers({}), tokenizer), Questions(source=source, answers=["a"]), VqaOptions())


def nlvr_toy(world):
    source = task_json(world, "nlvr_test")
    labels = [source[row].target.label for row in range(len(source))]
    keys, others = keys_of(source), keys_of(source, 1)
    return source, dict.fromkeys(others, 0) | dict(zip(keys, labels, strict=True))


def test_statements_about_two_images(world, tokenizer, tmp_path):
    source, known = nlvr_toy(world)
    scores = evaluate_nlvr(subject(Pairs(known), tokenizer), source, NlvrOptions(image_batch=3))
    samples = scores.samples["statements"]
    expected = [known[key] for key in keys_of(source)]
    assert [one["predicted"] for one in samples] == [("False", "True")[label] for label in expected]
    right = [label == source[row].target.label for row, label in enumerate(expected)]
    assert scores.metrics["accuracy"] == pytest.approx(100 * sum(right) / len(right))
    assert scores.hits["classified"]["accuracy"] == sum(right)
    assert scores.counts["sentences"] < scores.counts["statements"]
    assert scores.metrics["consistency"] <= scores.metrics["accuracy"]
    with predictions.sentence_labels(scores, tmp_path).open(newline="") as stream:
        assert list(csv.reader(stream)) == [[one["id"], one["predicted"]] for one in samples]


def test_hypotheses_about_one_image(world, tokenizer):
    source = task_json(world, "ve_test")
    keys = keys_of(source)
    model = Single(dict.fromkeys(keys, 2))
    scores = evaluate_entailment(subject(model, tokenizer), source, EntailmentOptions())
    truth = [source[row].target.label for row in range(len(source))]
    assert scores.metrics["accuracy"] == pytest.approx(100 * truth.count(2) / len(truth))
    assert scores.metrics["entailment"] == 100 and scores.metrics["neutral"] == 0
    assert scores.chance["accuracy"] >= 100 / 3
    with pytest.raises(DataError, match=r"nlvr needs rows of 2 image\(s\) with one sentence"):
        evaluate_nlvr(subject(Single({}), tokenizer), source, NlvrOptions())


def test_boxes_are_judged_in_pixels_and_by_split(world, tokenizer, tmp_path):
    source = refer(world)
    model = Boxes(dict.fromkeys(keys_of(source), 1))
    scores = evaluate_grounding(subject(model, tokenizer), source, GroundingOptions())
    samples = scores.samples["expressions"]
    for row, one in enumerate(samples):
        width, height = opened(source[row]).size
        assert one["predicted"] == pytest.approx([0, 0, width / 2, height / 2])
        x0, y0, x1, y1 = source[row].regions[0].box
        assert one["box"] == pytest.approx([x0, y0, x1 - x0, y1 - y0])
    assert scores.metrics["accuracy"] == pytest.approx(100 * np.mean([one["right"] for one in samples]))
    assert set(scores.metrics) == {"accuracy", *(one["split"] for one in samples)} > {"accuracy"}
    sent = json.loads(predictions.boxes(scores, tmp_path).read_text())
    assert [one["bbox"] for one in sent] == [one["predicted"] for one in samples]


def test_heat_chooses_among_the_detections(world, tokenizer, monkeypatch):
    source = refer(world)

    class Heat(nn.Module):
        text = itm_head = None

        def encode_image(self, images):
            return SimpleNamespace(embeds=images.pixels)

    def heat_at_the_left(model, embeds, ids, mask, *, layer, tokens, image_mask_BS):
        assert (layer, tokens, image_mask_BS) == (3, None, None)
        maps = torch.zeros(len(ids), 4, 4)
        maps[:, :, 0] = 1
        return HeatMaps(maps[:, None], maps)

    monkeypatch.setattr(grounding, "attention_heat", heat_at_the_left)
    own = subject(Heat(), tokenizer)
    scores = evaluate_weak_grounding(own, source, WeakGroundingOptions(layer=3, alpha=1.0))
    for row, one in enumerate(scores.samples["expressions"]):
        boxes = [list(region.box) for region in source[row].regions[1:]]
        x, y, w, h = one["predicted"]
        assert any(np.allclose([x, y, x + w, y + h], box) for box in boxes)
        # With the mean heat, one that touches the left edge wins.
        assert x <= min(box[0] for box in boxes) + 12
    assert 0 < scores.chance["accuracy"] < 100
    with pytest.raises(ValueError, match="the model has no box head"):
        evaluate_grounding(own, source, GroundingOptions())
    with pytest.raises(ValueError, match="mode=itc: the model has no vision_proj"):
        evaluate_weak_grounding(own, source, WeakGroundingOptions(mode="itc", layer=3))
    bare = Refer(**{**refer_files(world), "detections": ""}).open()
    with pytest.raises(DataError, match=r"give data\.detections=dets\.json"):
        evaluate_weak_grounding(own, bare, WeakGroundingOptions(layer=3))


def test_expressions_without_boxes_are_refused(world, tokenizer):
    with pytest.raises(DataError, match=r"data\.format=refer joins lists"):
        evaluate_grounding(
            subject(Boxes({}), tokenizer), task_json(world, "refcoco_test"), GroundingOptions()
        )


def caption_toy(world, tokenizer):
    source = task_json(world, "captions_test")
    words = [tokenizer.token_ids(word)[0] for word in ("red", "blue", "a")]
    return source, {key: words[n % 3] for n, key in enumerate(keys_of(source))}


def test_captions_are_cut_after_the_prompt_and_judged(world, tokenizer, tmp_path):
    source, known = caption_toy(world, tokenizer)
    own = subject(Captions(known), tokenizer)
    options = CaptioningOptions(prompt="a picture of ")
    scores = evaluate_captioning(own, Captioned(source=source), options)
    sent = json.loads(predictions.captions(scores, tmp_path).read_text())
    expected = [tokenizer.decode([known[key]]) for key in keys_of(source)]
    assert [one["caption"] for one in sent] == expected
    gt = json.loads((world / "captions_test_gt.json").read_text())
    assert [one["image_id"] for one in sent] == [one["id"] for one in gt["images"]]
    files = CaptioningFiles(references=str(world / "captions_test_gt.json"))
    again = evaluate_captioning(own, open_captions(source, files, options), CaptioningOptions())
    assert again.results == scores.results
    assert 0 < scores.metrics["bleu_1"] < 100 and scores.counts["references"] > scores.counts["images"]
    assert any("meteor and spice" in note for note in scores.notes)
    with pytest.raises(ValueError, match="images have no references, the first is"):
        evaluate_captioning(own, Captioned(source=source, references={1: ["a"]}), options)


def test_the_prompt_is_the_models_unless_the_options_have_one(world, tokenizer):
    source, known = caption_toy(world, tokenizer)
    own = subject(Captions(known), tokenizer, prompt="an image of ")
    for given, used in ((None, "an image of "), ("", "")):
        options = CaptioningOptions(prompt=given, limit=2)
        assert evaluate_captioning(own, Captioned(source=source), options).settings["prompt"] == used


def test_rows_of_one_image_are_one_caption(world, tokenizer):
    source = task_json(world, "shapes_train")
    model = Captions(dict.fromkeys(keys_of(source), tokenizer.token_ids("red")[0]))
    options = CaptioningOptions(limit=7)
    scores = evaluate_captioning(subject(model, tokenizer), Captioned(source=source), options)
    assert len(model.seen) == scores.counts["images"] < 7
    assert scores.counts["references"] == 7


# ---------------------------------------------------------------------------------------------- concepts


class Seeing(Toy):
    """Keeps what it is told of each image: the words of its concepts, and how many tokens they are padded
    to."""

    def __init__(self, known, tokenizer):
        super().__init__(known)
        self.vision = nn.Module()
        self.vision.concepts = nn.Identity()
        self.tokenizer, self.words, self.padded = tokenizer, [], set()

    def take(self, images):
        for one, ids, mask in zip(images.pixels, *images.concepts, strict=True):
            assert ids[0] == self.tokenizer.cls_id and not ids[mask == 0].any()
            self.words.append((key_of(one), self.tokenizer.decode(ids[mask == 1].tolist())))
        self.padded.add(images.concepts.ids.shape[1])

    def look(self, images):
        self.take(images)
        return super().look(images)


class SeeingAnswers(Seeing, Answers):
    pass


class SeeingPairs(Seeing, Pairs):
    pass


class SeeingSingle(Seeing, Single):
    pass


class SeeingCaptions(Seeing, Toy):
    generate = Captions.generate

    def __init__(self, known, tokenizer):
        super().__init__(known, tokenizer)
        self.vision.encode = lambda images: ImageStates(self.look(images))


SEEN = {"vqa": "vqa_val", "nlvr": "nlvr_test", "entailment": "ve_test", "captioning": "captions_test"}


def with_concepts(world, folder, name):
    """The list with words attached to its images: number n of a list has n % 4 + 1 of them; and these words
    by row."""
    rows = json.loads((world / f"{name}.json").read_text())
    colours, things = ["red", "blue", "green", "a"], ["circle", "square", "red", "blue"]
    words = []
    for number, row in enumerate(rows):
        first, second = colours[: number % 4 + 1], things[: (number + 1) % 4 + 1]
        if "images" in row:
            row["kwords1"], row["kwords2"] = first, second
        else:
            row["kwords"] = first
        words.append((first, second))
    (folder / f"{name}.json").write_text(json.dumps(rows))
    return TaskJson(files=(str(folder / f"{name}.json"),), root=str(world)), words


def without_concepts(world, folder, name):
    """The list without words attached to its images."""
    rows = json.loads((world / f"{name}.json").read_text())
    bare = [{key: value for key, value in row.items() if key != "kwords"} for row in rows]
    assert bare != rows
    (folder / f"bare_{name}.json").write_text(json.dumps(bare))
    return f"{folder}/bare_{name}.json"


def seeing(task, source, tokenizer):
    """A toy that sees concepts, and its evaluation: run(model, source, concepts, **options, workers=)."""
    known = dict.fromkeys(keys_of(source), 1)
    if task == "nlvr":
        known |= dict.fromkeys(keys_of(source, 1), 0)
    model, evaluate, make, wrap = {
        "vqa": (SeeingAnswers, evaluate_vqa, VqaOptions, partial(Questions, answers=["a", "b"])),
        "nlvr": (SeeingPairs, evaluate_nlvr, NlvrOptions, None),
        "entailment": (SeeingSingle, evaluate_entailment, EntailmentOptions, None),
        "captioning": (SeeingCaptions, evaluate_captioning, CaptioningOptions, Captioned),
    }[task]

    def run(model, source, concepts, *, workers=0, **options):
        data = source if wrap is None else wrap(source=source)
        own = subject(model, tokenizer, concepts)
        return evaluate(own, data, make(**options), Execution(workers=workers))

    return model(known, tokenizer), run


@pytest.mark.parametrize("task", list(SEEN))
def test_each_image_comes_with_its_own_words(task, world, tokenizer, tmp_path):
    options, words = with_concepts(world, tmp_path, SEEN[task])
    source = options.open()
    model, run = seeing(task, source, tokenizer)
    how = ConceptOptions(max_tokens=7, pad="longest")
    scores = run(model, source, how, image_batch=3, workers=1)
    assert scores.settings["concepts"] == {
        "max_tokens": 7,
        "separator": False,
        "pad": "longest",
        "share": None,
    }
    expected = [
        (key, " ".join(own[place]))
        for place in range(2 if task == "nlvr" else 1)
        for key, own in zip(keys_of(source, place), words, strict=True)
    ]
    assert sorted(model.words) == sorted(expected) and model.padded <= set(range(2, 6))


def test_padding_of_concepts_is_of_the_batch_or_of_all(world, tokenizer, tmp_path):
    options, _ = with_concepts(world, tmp_path, "ve_test")
    source = options.open()
    padded = []
    for pad in ("longest", "max"):
        model, run = seeing("entailment", source, tokenizer)
        run(model, source, ConceptOptions(max_tokens=9, pad=pad), image_batch=2)
        padded.append(model.padded)
    assert padded == [{3, 5}, {9}]  # the longest of two rows in turn; all


def test_concepts_and_model_must_fit(world, tokenizer, tmp_path):
    options, _ = with_concepts(world, tmp_path, "ve_test")
    source, how = options.open(), ConceptOptions()
    seeing_model, run = seeing("entailment", source, tokenizer)
    with pytest.raises(ValueError, match="sees the words attached to each image; give concepts"):
        run(seeing_model, source, None)
    with pytest.raises(ValueError, match="has no concept encoder; leave concepts out"):
        run(Single({}), source, how)
    without = TaskJson(files=(without_concepts(world, tmp_path, "ve_test"),), root=str(world)).open()
    with pytest.raises(
        DataError, match=r"has no concepts, which this model reads; .* an evaluation needs every row"
    ):
        run(seeing_model, without, how)
    with pytest.raises(ValueError, match=r"share=0\.3 draws words at random"):
        run(seeing_model, source, replace(how, share=0.3))
    with pytest.raises(ValueError, match="has no concept encoder; leave concepts out"):
        evaluate_grounding(subject(Boxes({}), tokenizer, how), refer(world), GroundingOptions())


def test_a_broken_image_is_named(world, tokenizer, tmp_path):
    rows = json.loads((world / "vqa_val.json").read_text())[:2]
    (tmp_path / "rows.json").write_text(json.dumps([rows[0], {**rows[1], "image": "nowhere.png"}]))
    source = TaskJson(files=(str(tmp_path / "rows.json"),), root=str(world)).open()
    model = Answers(dict.fromkeys(keys_of(task_json(world, "vqa_val")), 0))
    with pytest.raises(ValueError, match=r"nowhere\.png"):
        evaluate_vqa(subject(model, tokenizer), Questions(source=source, answers=["a"]), VqaOptions())


# ---------------------------------------------------------------------------------------------- ranks


class Judging(SeeingSingle):
    """Judges by the number of words that come with an image."""

    def __call__(self, images, ids, mask):
        self.look(images)
        return nn.functional.one_hot(images.concepts.attention_mask.sum(1) % 3, 3).float()


def everything(world, tokenizer, folder):
    """All evaluations on toys, and what the toys saw; `folder` has hypotheses about images with concepts."""
    source, answers, known = vqa_toy(world)
    pairs, true = nlvr_toy(world)
    boxes = refer(world)
    captions, words = caption_toy(world, tokenizer)
    hypotheses = TaskJson(files=(f"{folder}/ve_test.json",), root=str(world)).open()
    questions = Questions(source=source, answers=answers)
    runs = {
        "vqa": (Answers(known), evaluate_vqa, questions, VqaOptions(image_batch=2)),
        "nlvr": (Pairs(true), evaluate_nlvr, pairs, NlvrOptions(image_batch=2)),
        "grounding": (
            Boxes(dict.fromkeys(keys_of(boxes), 0)),
            evaluate_grounding,
            boxes,
            GroundingOptions(image_batch=2),
        ),
        "captioning": (
            Captions(words),
            evaluate_captioning,
            Captioned(source=captions),
            CaptioningOptions(image_batch=2),
        ),
    }
    done = {
        name: (run(subject(model, tokenizer), data, options).json(), model.seen)
        for name, (model, run, data, options) in runs.items()
    }
    model = Judging(dict.fromkeys(keys_of(hypotheses), 0), tokenizer)
    own = subject(model, tokenizer, ConceptOptions(max_tokens=6))
    judged = evaluate_entailment(own, hypotheses, EntailmentOptions(image_batch=2)).json()
    return done | {"entailment": (judged, model.seen)}


def test_two_ranks_give_the_result_of_one_and_see_each_sample_once(world, tokenizer, tmp_path):
    with_concepts(world, tmp_path, "ve_test")
    command = [sys.executable, __file__, str(world), str(tmp_path)]
    ranks = [subprocess.Popen([*command, str(rank), "2"], stderr=subprocess.PIPE) for rank in range(2)]
    errors = [rank.communicate(timeout=240)[1].decode() for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0, 0], errors
    found = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2)]
    for name, (scores, seen) in everything(world, tokenizer, tmp_path).items():
        assert found[0][name][0] == found[1][name][0] == scores
        assert sorted(found[0][name][1] + found[1][name][1]) == sorted(seen)
        assert len(found[0][name][1]) < len(seen)
    # An image that one rank cannot open stops both with its name.
    assert all("nowhere.png" in one["broken"] for one in found)


def one_rank(world, folder, rank, ranks):
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=ranks)
    tokenizer = Tokenizer.wordpiece(world / "vocab.txt")
    done = everything(world, tokenizer, folder)
    rows = json.loads((world / "vqa_val.json").read_text())[:3]
    own = folder / f"rows{rank}.json"
    own.write_text(json.dumps([*rows[:2], {**rows[2], "image": "nowhere.png"}]))
    model = Answers(dict.fromkeys(keys_of(task_json(world, "vqa_val")), 0))
    source = TaskJson(files=(str(own),), root=str(world)).open()
    try:
        evaluate_vqa(subject(model, tokenizer), Questions(source=source, answers=["a"]), VqaOptions())
    except ValueError as problem:
        done["broken"] = str(problem)
    (folder / f"{rank}.json").write_text(json.dumps(done))
    dist.barrier()
    dist.destroy_process_group()


# ---------------------------------------------------------------------------------------------- real models,
# command line


def refer_words(world):
    return [
        f"data.files=[{world}/refcoco_test.json]",
        f"data.refs={world}/refcoco/refs.json",
        f"data.instances={world}/refcoco/instances.json",
        f"data.detections={world}/refcoco/dets.json",
        f"data.root={world}",
    ]


COMMANDS = {
    "vqa, chosen": (
        "vqa",
        "vqa",
        ["answers=WORLD/answer_list.json", "candidates=4", "annotations=WORLD/vqa_annotations_val.json"],
    ),
    "vqa, written": ("vqa", "vqa", ["mode=generate", "beams=2"]),
    "nlvr": ("nlvr", "nlvr", []),
    "boxes": ("grounding", "boxes", []),
    "heat": ("weak_grounding", "retrieval", ["layer=3"]),
    "captioning": (
        "captioning",
        "captioning",
        ["data.format=task_json", "references=WORLD/captions_test_gt.json"],
    ),
}
FILES = {
    "vqa": "vqa_result.json",
    "nlvr": "nlvr.csv",
    "grounding": "grounding_boxes.json",
    "weak_grounding": "grounding_boxes.json",
    "captioning": "captions.json",
}
LISTS = {"vqa": "vqa_val", "nlvr": "nlvr_test", "captioning": "captions_test"}


@pytest.mark.parametrize("case", list(COMMANDS))
def test_commands_write_scores_predictions_and_image(case, world, exports, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("WORLD", str(world))
    command, model, words = COMMANDS[case]
    if command.endswith("grounding"):
        data = refer_words(world)
    else:
        data = [f"data.files=[${{env:WORLD}}/{LISTS[command]}.json]", "data.root=${env:WORLD}"]
    words = [word.replace("WORLD", str(world)) for word in words]
    words += [*data, "limit=6", "figures=2", "device=cpu", f"out={tmp_path}"]
    assert main([command, str(exports / model), *words]) == 0, capsys.readouterr().err
    printed = capsys.readouterr().out
    scores = Scores.read((tmp_path / f"{command}.json").read_text())
    assert printed.startswith(scores.table())
    (samples,) = scores.samples.values()
    assert len(samples) == (4 if command == "captioning" else 6)  # the split has four images
    assert (tmp_path / FILES[command]).is_file()
    with Image.open(tmp_path / f"{command}.png") as image:
        assert image.width == figures.WIDTH and len(image.getcolors(1 << 24)) > 50
    assert scores.settings["options"]["limit"] == 6


@pytest.mark.parametrize(
    ("words", "model", "pad"),
    [
        (["retrieval", "data.format=task_json", "rerank=2"], "seeing", "max"),
        (["weak_grounding", "layer=2"], "seeing", "max"),
        (["weak_grounding", "mode=itc", "layer=1"], "seeing", "max"),
        (["vqa", "mode=generate", "beams=1"], "seeing_vqa", "longest"),
        (["nlvr"], "seeing_nlvr", "longest"),
        (["entailment"], "entailment", "longest"),
    ],
)
def test_commands_read_concepts_as_the_checkpoint_says(words, model, pad, world, exports, tmp_path, capsys):
    command, *more = words
    lists = {"retrieval": "captions_test", "weak_grounding": "refcoco_test", **SEEN}
    with_concepts(world, tmp_path, lists[command])
    if command.endswith("grounding"):
        data = [word for word in refer_words(world) if not word.startswith("data.files")]
    else:
        data = [f"data.root={world}"]
    files = f"data.files=[{tmp_path}/{lists[command]}.json]"
    run = [command, str(exports / model), files, *data, *more, "limit=4", "figures=2", "device=cpu"]
    assert main([*run, f"out={tmp_path}/trained"]) == 0, capsys.readouterr().err
    scores = json.loads((tmp_path / "trained" / f"{command}.json").read_text())
    assert scores["settings"]["concepts"] == {
        "max_tokens": 9,
        "separator": False,
        "pad": pad,
        "share": None,  # the draws of training
    }
    assert main([*run, "concepts.max_tokens=3", "concepts.pad=max", f"out={tmp_path}/own"]) == 0
    assert json.loads((tmp_path / "own" / f"{command}.json").read_text())["settings"]["concepts"] == {
        "max_tokens": 3,
        "separator": False,
        "pad": "max",
        "share": None,
    }
    if command == "entailment":
        numbers = Scores.read((tmp_path / "trained" / "entailment.json").read_text()).metrics
        assert set(numbers) <= {"accuracy", "contradiction", "neutral", "entailment"} and len(numbers) > 2
        sent = json.loads((tmp_path / "trained" / "entailment_labels.json").read_text())
        assert {one["label"] for one in sent} <= set(ENTAILMENT_LABELS)
        assert (tmp_path / "trained" / "entailment.png").is_file()
    if command == "weak_grounding":  # images of 64 pixels hold 3 x 3 patches of 20
        source = Refer(**{**refer_files(world), "files": (f"{tmp_path}/refcoco_test.json",)}).open()
        how = ConceptOptions(max_tokens=9, pad="max")
        own = subject(models.load(exports / model).model, Tokenizer.wordpiece(world / "vocab.txt"), how)
        options = WeakGroundingOptions(
            layer=1 if "mode=itc" in more else 2, mode="itc" if "mode=itc" in more else "itm"
        )
        found = grounding.word_heat(
            own, opened(source[0]), "a red circle", ("red", "circle"), options=options
        )
        assert all(heat.shape == (3, 3) for _, heat in found)
        assert [word for word, _ in found][1:] == ([] if "mode=itc" in more else ["a", "red", "circle"])


def test_concepts_of_the_command_line_fit_data_and_model(world, exports, tmp_path, capsys):
    data = ["data.format=task_json", f"data.root={world}", "device=cpu", f"out={tmp_path}", "limit=2"]
    bare = [f"data.files=[{without_concepts(world, tmp_path, 'captions_test')}]", *data]
    assert main(["retrieval", str(exports / "retrieval"), *bare, "concepts.pad=max"]) == 2
    assert "has no concept encoder; leave concepts out" in capsys.readouterr().err
    assert main(["retrieval", str(exports / "seeing"), *bare]) == 2
    assert "the images of the gallery have no concepts" in capsys.readouterr().err
    assert main(["retrieval", str(exports / "seeing"), *bare, "concepts.max_tokens=1"]) == 2
    assert "max_tokens=1 leaves no room for a concept" in capsys.readouterr().err


def test_a_model_of_another_task_is_refused_with_the_way_out(world, exports, tmp_path, capsys):
    words = [f"data.files=[{world}/vqa_val.json]", f"data.root={world}", f"out={tmp_path}", "device=cpu"]
    for model in ("captioning", "retrieval"):
        assert main(["vqa", str(exports / model), *words]) == 2
        said = capsys.readouterr().err
        assert "vqa" in said and "Traceback" not in said
    words = ["data.format=task_json", f"data.files=[{world}/shapes_test.json]", f"data.root={world}"]
    assert main(["retrieval", str(exports / "captioning"), *words, f"out={tmp_path}", "device=cpu"]) == 2
    assert "retrieval" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["vqa", "EXPORT"], "data.files: required"),
        (["weak_grounding", "EXPORT", "DATA"], "layer: required (int)"),
        (["grounding", "EXPORT", "DATA", "by=heat"], "by: unknown key; predicted boxes are this benchmark"),
        (["grounding", "EXPORT", "DATA", "layer=3"], "heat of attention is `vlp-eval weak_grounding` now"),
        (["vqa", "EXPORT", "DATA", "k=3"], "k: unknown key; it is called candidates now"),
        (["vqa", "EXPORT", "DATA", "pairs=3"], "pairs: unknown key; it is called pair_batch now"),
        (["vqa", "EXPORT", "DATA"], "mode=rank needs answers=answer_list.json"),
        (["vqa", "EXPORT", "DATA", "beams=3"], "beams=3 has no effect with mode=rank"),
        (["captioning", "EXPORT", "data.format=task_json", "DATA", "java=[bleu]"], "java"),
        (["vqa", "EXPORT", "DATA", "mode=generate", "answer_tokens=1"], "answer_tokens=1 must be at least 2"),
        (["vqa", "EXPORT", "data.files=[${env:NOT_SET_HERE}/a.json]"], "NOT_SET_HERE is not set"),
        (["vqa", "EXPORT", "DATA", "answers=missing.json"], "missing.json not found"),
        (
            ["captioning", "EXPORT", "data.format=task_json", "DATA", "references=DATA_FILE"],
            "expected a JSON dict",
        ),
    ],
)
def test_mistakes_are_said_in_one_line(words, message, world, exports, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    filled = []
    for word in words:
        if word == "DATA":
            filled += [f"data.files=[{world}/vqa_val.json]", f"data.root={world}"]
        else:
            filled.append(
                word.replace("EXPORT", str(exports / "vqa")).replace("DATA_FILE", f"{world}/vqa_val.json")
            )
    assert main([*filled, "device=cpu"] if len(filled) > 2 else filled) == 2
    said = capsys.readouterr().err
    assert message in said and "Traceback" not in said


def test_words_get_heat_of_their_own_pieces(world, tokenizer, exports):
    own = subject(models.load(exports / "retrieval").model, tokenizer)
    image = Image.open(next((world / "images").rglob("*.png"))).convert("RGB")
    found = grounding.word_heat(own, image, "a red circle", options=WeakGroundingOptions(layer=3))
    assert [word for word, _ in found] == ["all words", "a", "red", "circle"]
    assert all(heat.shape == (2, 2) and (heat >= 0).all() for _, heat in found)


if __name__ == "__main__":
    one_rank(Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4]))
