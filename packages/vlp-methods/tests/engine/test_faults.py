"""What goes wrong is said in one message with a way out, and never reaches a checkpoint."""

import json
import time

import pytest
import torch
from safetensors.torch import load_file


def poisoned_step(toy, tmp_path, key):
    """The step at which the toy first sees a sample, from the streams themselves."""
    from toy_method.build import Stream
    from toy_method.schema import Fit
    from vlp_core import recipe as recipes
    from vlp_methods.engine import entry
    from vlp_methods.engine.job import Mixing

    recipe: Fit = entry.load("toy/tiny", ("steps=40",)).settings
    assert recipes.dump(recipe)["steps"] == 40
    feeds = {name: iter(Stream(name, recipe)) for name in ("regions", "images")}
    for step in range(40):
        for name in Mixing((("regions", 0.5), ("images", 1.0))).names(recipe.seed, step):
            if key in next(feeds[name]).keys:
                return step + 1
    raise AssertionError(key)


@pytest.mark.parametrize("fault", ["nan_key", "nan_gradient_key"])
@pytest.mark.parametrize("key", ["images-5", "regions-7"])
def test_not_finite_names_step_samples_and_last_good_checkpoint(toy, tmp_path, capsys, fault, key):
    run = tmp_path / "run"
    step = poisoned_step(toy, tmp_path, key)
    assert toy.train("toy/tiny", "save.every=1", f"faults.{fault}={key}", "--run", run) == 1
    error = capsys.readouterr().err
    what = "fit, loss, grad_norm" if fault == "nan_key" else "grad_norm"
    assert f"step {step}, stream {key.split('-')[0]}: {what} not finite" in error
    assert key in error
    assert "Traceback" not in error
    left = [path.name for path in sorted((run / "checkpoints").iterdir())]
    if step > 1:
        assert left[-1] == f"step-{step - 1:08d}"
        assert f"last good checkpoint: {run}/checkpoints/step-{step - 1:08d}" in error
        for file in ("model", "optimizer"):
            assert all(
                t.isfinite().all()
                for t in load_file(run / "checkpoints" / left[-1] / f"{file}.safetensors").values()
            )
    found = json.loads((run / "nonfinite.json").read_text())
    assert found["step"] == step
    assert key in found["samples"]["0"]
    assert max([line["step"] for line in toy.reports(run)], default=0) == step - 1


def test_not_finite_in_the_same_step_as_a_save_is_not_saved(toy, tmp_path, capsys):
    run = tmp_path / "run"
    step = poisoned_step(toy, tmp_path, "images-5")
    assert (
        toy.train(
            "toy/tiny", f"save.every={step}", "report.every=100", "faults.nan_key=images-5", "--run", run
        )
        == 1
    )
    assert "no checkpoint was written before" in capsys.readouterr().err
    assert not (run / "checkpoints").exists()


def test_parameters_that_a_finite_gradient_made_infinite_are_not_saved(toy, tmp_path, capsys):
    assert (
        toy.train(
            "toy/tiny", "optimizer.lr=1e38", "save.every=1", "clip_norm=null", "--run", tmp_path / "run"
        )
        == 1
    )
    assert "not finite; no checkpoint is written" in capsys.readouterr().err
    assert not list((tmp_path / "run").glob("checkpoints/step-*"))


def test_changed_recipe_is_refused_with_the_difference(toy, tmp_path, capsys, monkeypatch):
    run = tmp_path / "run"
    monkeypatch.setenv("TOY_STOP_AFTER", "5")
    assert toy.train("toy/tiny", "--run", run) == 75
    monkeypatch.delenv("TOY_STOP_AFTER")
    changed = ("optimizer.lr=2e-2", "data.batch=4", "steps=20")
    before = (run / "recipe.yaml").read_text()
    assert toy.train("toy/tiny", *changed, "--run", run) == 2
    error = capsys.readouterr().err
    assert "  optimizer.lr: 0.01 -> 0.02\n  data.batch: 8 -> 4\n" in error
    assert "--allow-change optimizer.lr --allow-change data.batch" in error
    assert "steps" not in error  # free to change
    assert (run / "recipe.yaml").read_text() == before
    assert (
        toy.train(
            "toy/tiny", *changed, "--run", run, "--allow-change", "optimizer", "--allow-change", "data.batch"
        )
        == 0
    )
    starts = json.loads((run / "environment.json").read_text())["starts"]
    assert [start["step"] for start in starts] == [0, 5]
    assert starts[1]["changed"] == {"steps": [12, 20], "optimizer.lr": [0.01, 0.02], "data.batch": [8, 4]}
    assert [line["lr"] for line in toy.reports(run) if "lr" in line][-1] == 0.02


def test_recipe_may_change_before_the_first_checkpoint(toy, tmp_path, capsys):
    run = tmp_path / "run"
    assert toy.train("toy/tiny", "faults.missing_file=true", "--run", run) == 2
    assert "images.json not found" in capsys.readouterr().err
    assert toy.train("toy/tiny", "--run", run) == 0


def test_fresh_needs_an_empty_folder(toy, tmp_path, capsys):
    run = tmp_path / "run"
    assert toy.train("toy/tiny", "--fresh", "--run", run) == 0
    assert toy.train("toy/tiny", "--fresh", "--run", run) == 2
    assert "--fresh does not resume" in capsys.readouterr().err


def test_folder_of_something_else_is_left_alone(toy, tmp_path, capsys):
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos/cat.jpg").write_text("")
    assert toy.train("toy/tiny", "--run", tmp_path / "photos") == 2
    assert "is not a run" in capsys.readouterr().err
    assert [path.name for path in (tmp_path / "photos").iterdir()] == ["cat.jpg"]


def test_run_folder_in_use_is_refused(toy, tmp_path, capsys):
    run = tmp_path / "run"
    process = toy.start("toy/tiny", "steps=100000", "faults.sleep=0.01", "--run", run)
    deadline = time.monotonic() + 60
    while not toy.reports(run) and time.monotonic() < deadline:
        time.sleep(0.01)
    try:
        assert toy.train("toy/tiny", "steps=100000", "faults.sleep=0.01", "--run", run) == 2
        assert "in use by another vlp-train" in capsys.readouterr().err
    finally:
        process.kill()
        process.communicate()


def test_crash_shows_its_traceback_and_exits_1(toy, tmp_path, capsys):
    assert toy.train("toy/tiny", "faults.crash=true", "--run", tmp_path / "run") == 1
    error = capsys.readouterr().err
    assert "Traceback" in error
    assert "RuntimeError: a bug" in error
    assert "RuntimeError: a bug" in (tmp_path / "run/log.txt").read_text()


def test_value_error_is_the_fault_of_the_recipe_while_building_and_of_the_code_later(toy, tmp_path, capsys):
    assert toy.train("toy/tiny", "faults.bad_value=true", "--run", tmp_path / "a") == 2
    assert capsys.readouterr().err == "vlp-train: width=7 must be even\n"
    assert toy.train("toy/tiny", "faults.bad_value=true", "--dry-run") == 2
    assert capsys.readouterr().err == "vlp-train: width=7 must be even\n"
    assert toy.train("toy/tiny", "faults.wrong_step=images-5", "--run", tmp_path / "b") == 1
    error = capsys.readouterr().err
    assert "Traceback" in error
    assert "in forward\n" in error
    assert "ValueError: shapes do not fit" in error


def test_debug_shows_the_traceback_of_a_user_error(toy, tmp_path, capsys):
    try:
        assert toy.train("toy/tiny", "faults.missing_file=true", "--debug", "--run", tmp_path / "run") == 2
        assert "Traceback" in capsys.readouterr().err
    finally:
        torch.use_deterministic_algorithms(False)
        torch.autograd.set_detect_anomaly(False)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        (
            "evaluate.best=recall",
            "evaluate.best=recall is not a number of the evaluation; known: output, step, peak",
        ),
        ("data.batch=0.5", "data.batch: expected int, got 0.5"),
        ("loss_scale.initial=8", "loss_scale: only precision=fp16 scales the loss"),
    ],
)
def test_setting_without_effect_is_an_error(toy, tmp_path, capsys, override, message):
    assert toy.train("toy/tiny", override, "--run", tmp_path / "run") == 2
    assert message in capsys.readouterr().err


def test_best_model_is_kept(toy, tmp_path):
    run = tmp_path / "run"
    assert toy.train("toy/tiny", "evaluate.every=3", "evaluate.best=peak", "--run", run) == 0
    assert json.loads((run / "best.json").read_text()) == {"name": "peak", "value": 0.0, "step": 6}
    best, last = (
        json.loads((run / name / "config.json").read_text())["updates"] for name in ("export-best", "export")
    )
    assert best < last
    assert (
        toy.train(
            "toy/tiny",
            "evaluate.every=3",
            "evaluate.best=step",
            "evaluate.better=lower",
            "--run",
            tmp_path / "b",
        )
        == 0
    )
    assert json.loads((tmp_path / "b/best.json").read_text())["step"] == 3
    assert json.loads((tmp_path / "b/eval/step-00000009.json").read_text())["step"] == 9


def test_test_data_sees_the_selected_model_once(toy, tmp_path):
    best = ("toy/tiny", "tested=true", "evaluate.every=3", "evaluate.best=peak", "--run", tmp_path / "best")
    assert toy.train(*best) == 0
    assert toy.train("toy/tiny", "tested=true", "--run", tmp_path / "last") == 0
    results = {name: tmp_path / name / "eval/test-00000012.json" for name in ("best", "last")}
    selected = json.loads((tmp_path / "best/export-best/config.json").read_text())["updates"]
    last = json.loads((tmp_path / "last/export/config.json").read_text())["updates"]
    assert json.loads(results["best"].read_text()) == {"test/updates": selected}
    assert json.loads(results["last"].read_text()) == {"test/updates": last}
    assert selected < last
    written = results["best"].stat().st_mtime_ns
    assert toy.train(*best) == 0
    assert results["best"].stat().st_mtime_ns == written
    results["best"].unlink()  # as if the run had been killed in the test
    assert toy.train(*best) == 0
    assert json.loads(results["best"].read_text()) == {"test/updates": selected}
