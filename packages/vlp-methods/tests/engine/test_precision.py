"""bf16, fp16 with loss scaling, clipping, and the seeds of every step."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file


def dtypes(run, step):
    return {
        t.dtype
        for t in load_file(run / f"checkpoints/step-{step:08d}/model.safetensors").values()
        if t.is_floating_point()
    }


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_half_precision_trains_and_keeps_fp32_parameters(toy, tmp_path, precision):
    options = ("steps=30", "dropout=0", "report.every=30", "schedule.warmup_steps=0")
    assert toy.train("toy/tiny", *options, "--run", tmp_path / "full") == 0
    assert toy.train("toy/tiny", *options, f"precision={precision}", "--run", tmp_path / "half") == 0
    assert dtypes(tmp_path / "half", 30) == {torch.float32}
    full, half = (toy.reports(tmp_path / name)[0]["losses"]["images/fit"] for name in ("full", "half"))
    assert half == pytest.approx(full, rel=0.05)
    assert half != full


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_half_precision_resumes_to_the_bit(toy, tmp_path, monkeypatch, precision):
    # A growth interval of 3 makes the loss scale move within the run, so it must be restored.
    scale = ("loss_scale.initial=1024", "loss_scale.growth_steps=3") if precision == "fp16" else ()
    options = (f"precision={precision}", *scale)
    assert toy.train("toy/tiny", *options, "--run", tmp_path / "whole") == 0
    monkeypatch.setenv("TOY_STOP_AFTER", "7")
    assert toy.train("toy/tiny", *options, "--run", tmp_path / "stopped") == 75
    monkeypatch.delenv("TOY_STOP_AFTER")
    state = json.loads((tmp_path / "stopped/checkpoints/step-00000007/state.json").read_text())
    assert (state["loss_scale"].get("scale", 0) > 1024) == (precision == "fp16")
    assert toy.train("toy/tiny", *options, "--run", tmp_path / "stopped") == 0
    assert toy.losses(tmp_path / "stopped") == toy.losses(tmp_path / "whole")


def test_overflow_of_fp16_gradients_is_skipped_and_the_scale_halves(toy, tmp_path):
    run = tmp_path / "run"
    assert toy.train("toy/tiny", "precision=fp16", "loss_scale.initial=1e9", "--run", run) == 0
    state = json.loads((run / "checkpoints/step-00000012/state.json").read_text())
    assert state["loss_scale"]["scale"] < 1e9
    reports = [line["losses"] for line in toy.reports(run) if "losses" in line]
    assert any(
        "images/grad_norm" not in losses for losses in reports
    )  # a norm that is not finite is not reported
    assert "images/grad_norm" in reports[-1]


def test_overflow_without_end_stops_the_run(toy, tmp_path, capsys):
    run = tmp_path / "run"
    assert (
        toy.train(
            "toy/tiny",
            "precision=fp16",
            "loss_scale.initial=1e38",
            "steps=200",
            "report.every=200",
            "--run",
            run,
        )
        == 1
    )
    assert "grad_norm not finite in 100 updates in a row" in capsys.readouterr().err


def test_clipping_bounds_the_update_but_reports_the_norm(toy, tmp_path):
    options = (
        "steps=1",
        "optimizer.variant=torch",
        "optimizer.eps=1e3",
        "regions=0",
        "schedule.warmup_steps=0",
        "optimizer.weight_decay=0",
    )
    moved = {}
    for name, clip in (("free", "null"), ("clipped", "1e-3")):
        run = tmp_path / name
        assert toy.train("toy/tiny", *options, f"clip_norm={clip}", "--run", run) == 0
        moved[name] = toy.reports(run)[0]["losses"]["images/grad_norm"]
        moments = load_file(run / "checkpoints/step-00000001/optimizer.safetensors")
        squares = sum((t / 0.1).square().sum() for key, t in moments.items() if key.startswith("exp_avg/"))
        moved[f"{name} gradient"] = float(squares.sqrt())
    assert moved["free"] == moved["clipped"] == pytest.approx(moved["free gradient"], rel=1e-4)
    assert moved["clipped gradient"] <= 1e-3


def test_seeds_differ_by_step_stream_and_rank():
    from vlp_methods.engine.step import seed_for

    seeds = {
        seed_for(seed, step, stream, rank)
        for seed in (0, 1)
        for step in range(50)
        for stream in (0, 1)
        for rank in (0, 1)
    }
    assert len(seeds) == 2 * 50 * 2 * 2
    assert all(0 <= seed < 1 << 64 for seed in seeds)
    assert seed_for(0, 7, 1, 1) == seed_for(0, 7, 1, 1)


def test_another_seed_is_another_run(toy, tmp_path):
    for seed in (0, 1):
        assert toy.train("toy/tiny", f"seed={seed}", "--run", tmp_path / str(seed)) == 0
    assert toy.losses(tmp_path / "0") != toy.losses(tmp_path / "1")


@pytest.mark.skipif(
    not any(map(shutil.which, ("c++", "g++", "clang++"))), reason="torch.compile needs a C++ compiler"
)
def test_compiled_task_trains_and_its_checkpoint_fits_the_plain_one(toy, tmp_path, monkeypatch):
    options = ("dropout=0", "steps=6", "save.every=3")
    assert toy.train("toy/tiny", *options, "--run", tmp_path / "plain") == 0
    monkeypatch.setenv("TOY_STOP_AFTER", "3")
    assert toy.train("toy/tiny", *options, "compile=true", "--run", tmp_path / "compiled") == 75
    monkeypatch.delenv("TOY_STOP_AFTER")
    assert toy.train("toy/tiny", *options, "--run", tmp_path / "compiled") == 0
    for plain, compiled in zip(
        toy.reports(tmp_path / "plain"), toy.reports(tmp_path / "compiled"), strict=True
    ):
        assert plain.get("losses", {}) == pytest.approx(compiled.get("losses", {}), rel=1e-4)
