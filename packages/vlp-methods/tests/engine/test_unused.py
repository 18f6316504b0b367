"""Streams that use a part of the parameters."""

import json

import pytest
import torch
from safetensors.torch import load_file

BOXES = ("boxes=true", "steps=8", "dropout=0", "save.every=1", "save.keep=100", "evaluate.every=null")


def head(run, step):
    return load_file(run / f"checkpoints/step-{step:08d}/model.safetensors")["boxes.weight"]


def test_updates_of_a_stream_leave_alone_what_it_does_not_use(toy, tmp_path):
    """No decay, no moment, no counted update: an image batch changes nothing of the box head."""
    from vlp_methods.engine.job import Mixing

    run = tmp_path / "run"
    assert toy.train("toy/tiny", *BOXES, "--run", run) == 0
    mixing = Mixing((("regions", 0.5), ("images", 1.0)))
    with_regions = [step for step in range(8) if "regions" in mixing.names(0, step)]
    assert 0 < len(with_regions) < 8
    for step in range(1, 8):
        assert torch.equal(head(run, step), head(run, step + 1)) == (step not in with_regions), step
    moments = load_file(run / "checkpoints/step-00000008/optimizer.safetensors")
    counts = {"step/boxes.weight": len(with_regions), "step/head.weight": 8 + len(with_regions)}
    assert {name: int(moments[name]) for name in counts} == counts


def test_two_ranks_pass_over_it_as_one_rank_does(toy, tmp_path):
    assert toy.train("toy/tiny", *BOXES, "--run", tmp_path / "one") == 0
    done = toy.call("toy/tiny", *BOXES, "data.batch=8", "--nproc", "2", "--run", tmp_path / "two")
    assert done.returncode == 0, done.stderr
    assert torch.allclose(head(tmp_path / "one", 8), head(tmp_path / "two", 8), rtol=2e-5, atol=1e-6)


def test_resumed_run_equals_an_uninterrupted_one(toy, tmp_path, monkeypatch):
    assert toy.train("toy/tiny", *BOXES, "--run", tmp_path / "whole") == 0
    monkeypatch.setenv("TOY_STOP_AFTER", "3")
    assert toy.train("toy/tiny", *BOXES, "--run", tmp_path / "stopped") == 75
    monkeypatch.delenv("TOY_STOP_AFTER")
    assert toy.train("toy/tiny", *BOXES, "--run", tmp_path / "stopped") == 0
    assert toy.losses(tmp_path / "stopped") == toy.losses(tmp_path / "whole")
    assert json.loads((tmp_path / "stopped/environment.json").read_text())["starts"][1]["step"] == 3


def test_a_stream_that_is_not_there_is_refused():
    from vlp_methods.engine.job import Job, Mixing

    task = torch.nn.Linear(1, 1)
    with pytest.raises(ValueError, match=r"unused: \['image'\] are not streams; known: images"):
        Job(
            task=task,
            streams=dict,
            mixing=Mixing((("images", 1.0),)),
            optimizer=torch.optim.SGD(task.parameters()),
            learning_rate=lambda step: 1.0,
            unused={"image": tuple(task.parameters())},
        )
