"""Every task on real annotations in the official layouts, by keys of its shapes recipe alone. Skipped where
the samples are not there."""

import json
import shutil
from pathlib import Path

import pytest
from PIL import Image

RUN = ("data.world=null", "steps=2", "data.max_bad_fraction=0")


@pytest.fixture
def real(task, shared_data):
    """`real(recipe, root, *words)`: a tiny task on files below `root`, with BERT's vocabulary, from initial
    weights."""

    def words(recipe: str, root: Path, *more: str) -> tuple[str, ...]:
        vocabulary = shared_data / "bert-base-uncased" / "vocab.txt"
        common = [
            word for word in task(recipe) if not word.startswith(("data.world", "data.root", "model.weights"))
        ]
        return (
            *common,
            *RUN,
            "model.weights.model=",
            f"data.root={root}",
            f"data.tokenizer.files=[{vocabulary}]",
            *more,
        )

    return words


def report(run: Path, name: str) -> dict:
    return json.loads((run / f"eval/test-00000002/{name}.json").read_text())


@pytest.fixture
def lists(shared_data, tmp_path):
    """The ALBEF-type lists beside the COCO images."""
    root = tmp_path / "data"
    shutil.copytree(shared_data / "formats/albef_json", root)
    (root / "images").symlink_to(shared_data / "coco-mini/images")
    return root


def test_retrieval(train, real, lists, tmp_path):
    options = (
        "data.train.source.files=[coco_train.json]",
        "data.val=null",
        ("evaluate={every: null, best: null}"),
        "data.test.files=[coco_test.json]",
        "data.train.batch=4",
        "model.embed_width=16",
        "retrieval.rerank=3",
    )
    assert train(*real("xvlm/shapes_retrieval", lists, *options), "--run", tmp_path / "run") == 0
    assert report(tmp_path / "run", "retrieval")["counts"]["images"] == 4


def test_vqa_with_visual_genome(train, real, lists, tmp_path):
    options = (
        "data.train.source.files=[vqa_train.json,vg_qa.json]",
        "data.train.batch=5",
        "data.val={source: {files: [vqa_train.json]}}",
        "data.test={source: {files: [vqa_test.json]}}",
        "answers.candidates=4",
        "evaluate.every=null",
    )
    assert train(*real("xvlm/shapes_vqa", lists, *options), "--run", tmp_path / "run") == 0
    asked = {one["question_id"] for one in json.loads((lists / "vqa_test.json").read_text())}
    answered = json.loads((tmp_path / "run/eval/test-00000002/vqa_result.json").read_text())
    assert {one["question_id"] for one in answered} == asked
    candidates = json.loads((lists / "answer_list.json").read_text())
    assert all(one["answer"] in candidates for one in answered)


def test_nlvr(train, real, lists, tmp_path):
    """The images of NLVR2 are not among the samples: others stand in under their names."""
    images = sorted((lists / "images").iterdir())
    for number, name in enumerate(
        {name for one in json.loads((lists / "nlvr_dev.json").read_text()) for name in one["images"]}
    ):
        (lists / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(images[number], lists / name)
    files = "[nlvr_dev.json]"
    options = (
        f"data.train.source.files={files}",
        f"data.val.files={files}",
        f"data.test.files={files}",
        "data.train.batch=4",
        "evaluate.every=null",
    )
    assert train(*real("xvlm/shapes_nlvr", lists, *options), "--run", tmp_path / "run") == 0
    assert len(report(tmp_path / "run", "nlvr")["samples"]["statements"]) == 6


def test_captions(train, real, lists, tmp_path):
    options = (
        "data.train.source.files=[coco_train.json]",
        "data.train.batch=4",
        "data.val.files=[coco_test.json]",
        "data.test.files=[coco_test.json]",
        "evaluate.every=null",
    )
    assert train(*real("xvlm/shapes_captioning", lists, *options), "--run", tmp_path / "run") == 0
    captions = json.loads((tmp_path / "run/eval/test-00000002/captions.json").read_text())
    assert {one["image_id"] for one in captions} == {
        int(Path(one["image"]).stem) for one in json.loads((lists / "coco_test.json").read_text())
    }


def test_self_critical_captions(train, real, lists, tmp_path):
    """Rows of one caption each are joined by image: four images with five captions."""
    options = (
        "data.train.source.files=[coco_train.json]",
        "data.train.batch=2",
        "data.val=null",
        "data.test=null",
        "evaluate={every: null, best: null}",
        "reward.samples=2",
        "reward.max_tokens=8",
    )
    assert train(*real("xvlm/shapes_captioning_scst", lists, *options), "--run", tmp_path / "run") == 0
    last = json.loads((tmp_path / "run/metrics.jsonl").read_text().splitlines()[-1])
    assert last["samples"] == {"train": 4}


@pytest.fixture
def refer(shared_data, tmp_path):
    """The RefCOCO+ sample; its images are not among the samples, grey ones of the stated sizes stand in."""
    root = tmp_path / "refer"
    shutil.copytree(shared_data / "refcocoplus-sample", root)
    sizes = {
        one["file_name"]: (one["width"], one["height"])
        for one in json.loads((root / "refcoco+/instances.json").read_text())["images"]
    }
    for one in json.loads((root / "refcoco+_test.json").read_text()):
        path = root / one["image"]
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", sizes[path.name], "grey").save(path)
    return root


def test_grounding_with_boxes(train, real, refer, tmp_path):
    """The references come from the pickle of REFER, read without executing anything."""
    source = (
        "{format: refer, files: [refcoco+_test.json], refs: refcoco+/refs(unc).p, instances: "
        "refcoco+/instances.json}"
    )
    options = (
        f"data.train.source={source}",
        f"data.val={source}",
        f"data.test={source}",
        "data.train.batch=4",
        "evaluate.every=null",
    )
    assert train(*real("xvlm/shapes_refcoco_boxes", refer, *options), "--run", tmp_path / "run") == 0
    found = report(tmp_path / "run", "grounding")
    assert len(found["samples"]["expressions"]) == 65
    assert "testB" in list(found["results"].values())[-1]


def test_domain_stages_on_lines(train, real, shared_data, tmp_path):
    folder = shared_data / "formats/xvlm_jsonl"
    common = ("model.embed_width=16", "schedule.warmup_steps=0")
    images = (
        "data.train.source.files=[images_rpath]",
        f"data.train.source.root={shared_data / 'coco-mini'}",
        "data.train.batch=4",
    )
    assert train(*real("xvlm/shapes_nlvr_domain", folder, *common, *images), "--run", tmp_path / "nlvr") == 0
    assert train(*real("xvlm/shapes_captioning_domain", folder, *images), "--run", tmp_path / "caption") == 0
    regions = ("data.train.source.files=[regions_binary]", "data.train.texts=6", "data.train.images=3")
    assert (
        train(*real("xvlm/shapes_refcoco_boxes_domain", folder, *regions), "--run", tmp_path / "boxes") == 0
    )
