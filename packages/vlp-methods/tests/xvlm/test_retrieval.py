"""X-VLM retrieval fine-tuning through `vlp-train`."""

import json

import pytest
import torch
from safetensors.torch import load_file
from vlp_core import models
from vlp_core.recipe import RecipeError
from vlp_methods.engine.entry import load

SMALL = ("model.embed_width=16", "data.train.batch=6", "retrieval.rerank=3", "retrieval.figures=1")


@pytest.fixture
def retrieval(task):
    return task("xvlm/shapes_retrieval", *SMALL)


def test_run_selects_on_validation_and_reports_test_of_the_selected_model(train, retrieval, tmp_path):
    run = tmp_path / "run"
    assert train(*retrieval, "steps=3", "evaluate.every=1", "--run", run) == 0
    steps = [json.loads((run / f"eval/step-0000000{step}.json").read_text()) for step in (1, 2, 3)]
    values = [numbers["val/reranked/r_mean"] for numbers in steps]
    best = json.loads((run / "best.json").read_text())
    assert best["name"] == "val/reranked/r_mean"
    assert best["step"] == 1 + values.index(max(values))
    test = json.loads((run / "eval/test-00000003.json").read_text())
    details = json.loads((run / "eval/test-00000003/retrieval.json").read_text())
    assert test["test/reranked/r_mean"] == details["results"]["reranked"]["r_mean"]
    assert details["counts"]["images"] == 6  # validation has 4
    assert models.load(run / "export-best").stage == "retrieval"


def test_selecting_on_test_data_is_an_option(train, retrieval, tmp_path):
    run = tmp_path / "run"
    assert (
        train(*retrieval, "steps=1", "select=test", "evaluate.best=test/reranked/r_mean", "--run", run) == 0
    )
    assert json.loads((run / "best.json").read_text())["name"] == "test/reranked/r_mean"
    details = json.loads((run / "eval/step-00000001/retrieval.json").read_text())
    assert details["counts"]["images"] == 6


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("data.val=null", r"there is no data\.val to evaluate on"),
        ("evaluate.best=test/reranked/r_mean", r"must be a number of the val data"),
    ],
)
def test_selection_that_cannot_work_is_refused(override, message):
    with pytest.raises(RecipeError, match=message):
        load("xvlm/shapes_retrieval", ["model.weights.model=x", override])


def test_starts_from_the_pretrained_weights(train, retrieval, pretrained, tmp_path):
    options = ("steps=1", "evaluate={every: null, best: null}", "data.test=null", "schedule.warmup_steps=10")
    assert train(*retrieval, *options, "--run", tmp_path / "run") == 0
    # The first step of a warm-up has rate 0, so the run ends with the weights it started from.
    before, after = (
        load_file(folder / "model.safetensors") for folder in (pretrained, tmp_path / "run/export")
    )
    assert set(before) - set(after) == {
        name for name in before if name.startswith(("mlm_head.", "bbox_head."))
    }
    assert all(torch.equal(before[name], after[name]) for name in after)


def test_learning_rate_factor_without_a_part_is_refused(train, retrieval, tmp_path, capsys):
    assert train(*retrieval, "optimizer.lr_scale=2", "--run", tmp_path / "run") == 2
    assert "optimizer.lr_scale=2.0: no part of the model" in capsys.readouterr().err


def test_stopped_and_resumed_equals_uninterrupted(train, retrieval, tmp_path, losses):
    options = (*retrieval, "save.every=2", "evaluate.every=2", "schedule={kind: constant, warmup_steps: 0}")
    assert train(*options, "steps=4", "--run", tmp_path / "whole") == 0
    assert train(*options, "steps=2", "--run", tmp_path / "parts") == 0
    assert train(*options, "steps=4", "--run", tmp_path / "parts") == 0
    assert losses(tmp_path / "parts") == losses(tmp_path / "whole")


def test_two_ranks_have_the_contrastive_loss_of_one(train, retrieval, tmp_path, losses):
    """Pairs of one image on two ranks are positives of each other, so the loss does not depend on how the
    batch is divided."""
    options = (
        *retrieval,
        "steps=1",
        "model.vision.drop_path=0.0",
        "model.text.dropout=0.0",
        "model.text.attention_dropout=0.0",
        "data.train.source={format: karpathy, annotations: dataset_karpathy.json, images: '', split: val}",
        "data.train.batch=8",
        "data.max_bad_fraction=0",
    )
    assert train(*options, "--run", tmp_path / "one") == 0
    assert train(*options, "--nproc", 2, "--run", tmp_path / "two") == 0
    one, two = (dict(losses(tmp_path / name)[0][1]) for name in ("one", "two"))
    assert float.fromhex(one["itc"]) == pytest.approx(float.fromhex(two["itc"]), rel=1e-5)
