"""What holds for every task after pre-training, whatever the method: it trains, resumes exactly, exports, and
starts from where its recipe says."""

import json

import pytest
import torch
from safetensors.torch import load_file
from vlp_core import models
from vlp_eval.cli import main as evaluate

CONTRAST = ("model.embed_width=16",)
QUEUE = ("teacher.queue=32",)
SMALL = {
    "xvlm/retrieval": (*CONTRAST, "data.train.batch=6", "retrieval.rerank=3"),
    "xvlm/vqa": ("data.train.batch=4", "answers.candidates=4"),
    "xvlm/nlvr_domain": (*CONTRAST, "data.train.batch=6"),
    "xvlm/nlvr": ("data.train.batch=4",),
    "xvlm/refcoco_weak": (*CONTRAST, "data.train.batch=6", "heat.layer=1"),
    "xvlm/refcoco_boxes_domain": ("data.train.texts=8", "data.train.images=4"),
    "xvlm/refcoco_boxes": ("data.train.batch=6",),
    "xvlm/captioning_domain": ("data.train.batch=6",),
    "xvlm/captioning": ("data.train.batch=6", "captions.max_tokens=12"),
    "xvlm/captioning_scst": (
        "data.train.batch=4",
        "reward.samples=2",
        "reward.max_tokens=12",
        "captions.max_tokens=12",
    ),
    "vicha/retrieval": (*CONTRAST, *QUEUE, "data.train.batch=6", "retrieval.rerank=3"),
    "vicha/vqa": ("data.train.batch=4", "answers.candidates=4"),
    "vicha/entailment": ("data.train.batch=4",),
    "vicha/nlvr_domain": (*CONTRAST, "data.train.batch=6"),
    "vicha/nlvr": ("data.train.batch=4",),
    "vicha/grounding": (*CONTRAST, *QUEUE, "data.train.batch=6", "heat.layer=2"),
}
LOSSES = {
    "xvlm/retrieval": {"itc", "itm"},
    "xvlm/vqa": {"answers"},
    "xvlm/nlvr_domain": {"assignment"},
    "xvlm/nlvr": {"labels"},
    "xvlm/refcoco_weak": {"itc", "itm"},
    "xvlm/refcoco_boxes_domain": {"bbox", "giou"},
    "xvlm/refcoco_boxes": {"bbox", "giou"},
    "xvlm/captioning_domain": {"caption"},
    "xvlm/captioning": {"caption"},
    "xvlm/captioning_scst": {"scst"},
    "vicha/retrieval": {"itc", "itm"},
    "vicha/vqa": {"answers"},
    "vicha/entailment": {"labels"},
    "vicha/nlvr_domain": {"assignment"},
    "vicha/nlvr": {"labels"},
    "vicha/grounding": {"itc", "itm"},
}
DOMAIN = {
    "xvlm/nlvr": "xvlm/nlvr_domain",
    "xvlm/refcoco_boxes": "xvlm/refcoco_boxes_domain",
    "xvlm/captioning": "xvlm/captioning_domain",
    "vicha/nlvr": "vicha/nlvr_domain",
}
"""Tasks whose recipe starts from the export of another one."""


def unmeasured(name: str) -> tuple[str, ...]:
    """Options that leave the evaluations out."""
    return (
        ()
        if name.endswith("_domain")
        else ("data.val=null", "data.test=null", "evaluate={every: null, best: null}")
    )


@pytest.fixture
def small(task):
    """`small("METHOD/TASK")`: the words of the shapes recipe of a task, made tiny."""
    return lambda name, *more, **where: task(name.replace("/", "/shapes_"), *SMALL[name], *more, **where)


@pytest.mark.parametrize("name", SMALL)
def test_trains_and_resumes_exactly(train, small, tmp_path, losses, name):
    options = (*small(name, *unmeasured(name)), "save.every=2", "schedule={kind: constant, warmup_steps: 0}")
    assert train(*options, "steps=3", "--run", tmp_path / "whole") == 0
    assert train(*options, "steps=2", "--run", tmp_path / "parts") == 0
    assert train(*options, "steps=3", "--run", tmp_path / "parts") == 0
    assert losses(tmp_path / "parts") == losses(tmp_path / "whole")
    line = json.loads((tmp_path / "whole/metrics.jsonl").read_text().splitlines()[-1])
    assert set(line["losses"]) == {*LOSSES[name], "loss", "grad_norm"}
    first, second = (load_file(tmp_path / run / "export/model.safetensors") for run in ("whole", "parts"))
    assert all(torch.equal(first[key], second[key]) for key in first)
    loaded = models.load(tmp_path / "whole/export")
    assert loaded.view["size"] == 64


@pytest.mark.parametrize(("name", "earlier"), DOMAIN.items())
def test_starts_from_its_domain_stage(train, small, tmp_path, name, earlier):
    assert train(*small(earlier), "steps=1", "--run", tmp_path / "domain") == 0
    start = tmp_path / "domain/export"
    options = small(name, *unmeasured(name), start=start)
    assert train(*options, "steps=1", "schedule.warmup_steps=10", "--run", tmp_path / "run") == 0
    # The first step of a warm-up has rate 0, so the run ends with the weights it started from.
    before, after = (load_file(folder / "model.safetensors") for folder in (start, tmp_path / "run/export"))
    assert {key for key in after if key not in before} == (
        {key for key in after if key.startswith("cls_head.")} if name.endswith("/nlvr") else set()
    )
    assert all(torch.equal(before[key], after[key]) for key in after if key in before)


REFER = (
    "data.refs=WORLD/refcoco/refs.json",
    "data.instances=WORLD/refcoco/instances.json",
    "data.detections=WORLD/refcoco/dets.json",
)
WRITE = ("data.format=task_json", "data.files=[WORLD/captions_test.json]", "max_tokens=12")
MEASURED = {
    "xvlm/retrieval": (
        "reranked/r_mean",
        "retrieval",
        ("data.format=task_json", "data.files=[WORLD/shapes_test.json]", "rerank=3"),
    ),
    "xvlm/vqa": (
        "accuracy",
        "vqa",
        (
            "data.files=[WORLD/vqa_test.json]",
            "annotations=WORLD/vqa_annotations_test.json",
            "answers=WORLD/answer_list.json",
            "candidates=4",
        ),
    ),
    "xvlm/nlvr": ("accuracy", "nlvr", ("data.files=[WORLD/nlvr_test.json]",)),
    "xvlm/refcoco_weak": (
        "accuracy",
        "weak_grounding",
        ("data.files=[WORLD/refcoco_test.json]", *REFER, "layer=1"),
    ),
    "xvlm/refcoco_boxes": (
        "accuracy",
        "grounding",
        ("data.files=[WORLD/refcoco_test.json]", *REFER),
    ),
    "xvlm/captioning": ("cider", "captioning", WRITE),
    "xvlm/captioning_scst": ("cider", "captioning", WRITE),
    "vicha/retrieval": (
        "reranked/r_mean",
        "retrieval",
        ("data.format=task_json", "data.files=[WORLD/shapes_test.json]", "rerank=3"),
    ),
    "vicha/vqa": (
        "accuracy",
        "vqa",
        (
            "data.files=[WORLD/vqa_test.json]",
            "annotations=WORLD/vqa_annotations_test.json",
            "answers=WORLD/answer_list.json",
            "candidates=4",
        ),
    ),
    "vicha/entailment": ("accuracy", "entailment", ("data.files=[WORLD/ve_test.json]",)),
    "vicha/nlvr": ("accuracy", "nlvr", ("data.files=[WORLD/nlvr_test.json]",)),
    "vicha/grounding": (
        "accuracy",
        "weak_grounding",
        ("data.files=[WORLD/refcoco_test.json]", *REFER, "layer=2"),
    ),
}
"""Number that selects; the benchmark of `vlp-eval` that gives the same for the exported model, with its
options."""
PREDICTIONS = {
    "vqa": "vqa_result.json",
    "nlvr": "nlvr.csv",
    "grounding": "grounding_boxes.json",
    "weak_grounding": "grounding_boxes.json",
    "captioning": "captions.json",
}


@pytest.mark.parametrize("name", MEASURED)
def test_selects_on_validation_and_measures_the_selected_model_on_test(train, small, world, tmp_path, name):
    number, benchmark, options = MEASURED[name]
    run = tmp_path / "run"
    assert train(*small(name), "steps=2", "evaluate.every=1", "--run", run) == 0
    values = [
        json.loads((run / f"eval/step-0000000{step}.json").read_text())[f"val/{number}"] for step in (1, 2)
    ]
    best = json.loads((run / "best.json").read_text())
    assert (best["name"], best["value"]) == (f"val/{number}", max(values))
    assert best["step"] == 1 + values.index(max(values))

    test = json.loads((run / "eval/test-00000002.json").read_text())
    folder = run / "eval/test-00000002"
    assert (folder / f"{benchmark}.png").is_file()
    words = [option.replace("WORLD", str(world)) for option in options]
    words += [f"data.root={world}", f"out={tmp_path / 'again'}"]
    assert evaluate([benchmark, str(run / "export-best"), *words]) == 0
    again = json.loads((tmp_path / "again" / f"{benchmark}.json").read_text())
    assert again["results"] == json.loads((folder / f"{benchmark}.json").read_text())["results"]
    stage, _, metric = number.rpartition("/")
    assert again["results"][stage or list(again["results"])[-1]][metric] == test[f"test/{number}"]
    if benchmark in PREDICTIONS:
        file = PREDICTIONS[benchmark]
        assert (folder / file).read_text() == (tmp_path / "again" / file).read_text()


@pytest.mark.parametrize("name", SMALL)
def test_dry_run_says_what_would_run(train, small, tmp_path, capsys, name):
    assert train(*small(name), "steps=10", "--run", tmp_path / "run", "--dry-run") == 0
    text = capsys.readouterr().out
    assert "stream train, per rank" in text
    assert all(f"{loss} " in text for loss in LOSSES[name])
    assert not (tmp_path / "run").exists()
