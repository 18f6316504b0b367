"""A run that ends anywhere, in any way, and is started again computes what an uninterrupted run computes, to
the last bit."""

import json
import random
import signal
import time

import pytest
from vlp_core import recipe as recipes

OPTIONS = ("steps=12", "save.every=4", "evaluate.every=3", "report.every=1")


@pytest.fixture
def whole(toy, tmp_path):
    """The uninterrupted run."""
    assert toy.train("toy/tiny", *OPTIONS, "--run", tmp_path / "whole") == 0
    return toy.losses(tmp_path / "whole")


@pytest.mark.parametrize("variant", ["transformers", "torch"])
def test_stopped_at_any_step_and_resumed_equals_uninterrupted(toy, tmp_path, monkeypatch, variant):
    options = (*OPTIONS, f"optimizer.variant={variant}")
    assert toy.train("toy/tiny", *options, "--run", tmp_path / "whole") == 0
    whole = toy.losses(tmp_path / "whole")
    for step in range(1, 13):
        run = tmp_path / f"stopped-{step}"
        monkeypatch.setenv("TOY_STOP_AFTER", str(step))
        assert toy.train("toy/tiny", *options, "--run", run) == 75
        assert [path.name for path in sorted((run / "checkpoints").iterdir())][-1] == f"step-{step:08d}"
        monkeypatch.delenv("TOY_STOP_AFTER")
        assert toy.train("toy/tiny", *options, "--run", run) == 0
        # An evaluation that was due at the stop is made up for after the restart, so only the order of lines
        # may differ.
        assert sorted(toy.losses(run), key=str) == sorted(whole, key=str), step


def test_stop_between_reports_keeps_the_means(toy, tmp_path, monkeypatch):
    options = ("steps=12", "report.every=5", "save.every=100")
    assert toy.train("toy/tiny", *options, "--run", tmp_path / "whole") == 0
    monkeypatch.setenv("TOY_STOP_AFTER", "8")
    assert toy.train("toy/tiny", *options, "--run", tmp_path / "stopped") == 75
    monkeypatch.delenv("TOY_STOP_AFTER")
    assert toy.train("toy/tiny", *options, "--run", tmp_path / "stopped") == 0
    assert toy.losses(tmp_path / "stopped") == toy.losses(tmp_path / "whole")
    assert [line["step"] for line in toy.reports(tmp_path / "whole")] == [5, 10, 12, 12]


def test_killed_at_random_moments_and_resumed_equals_uninterrupted(toy, tmp_path):
    options = ("steps=40", "save.every=1", "evaluate.every=7", "report.every=1", "faults.sleep=0.02")
    assert toy.train("toy/tiny", *options, "--run", tmp_path / "whole") == 0
    run = tmp_path / "killed"
    rng = random.Random()
    kills = 0
    for wanted in sorted(rng.sample(range(2, 36), 2)):
        process = toy.start("toy/tiny", *options, "--run", run)
        deadline = time.monotonic() + 60
        while len(toy.reports(run)) < wanted and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.002)
        time.sleep(rng.random() * 0.05)  # anywhere in a step, a save or an evaluation
        if process.poll() is None:
            process.send_signal(signal.SIGKILL)
            kills += 1
        process.communicate()
    assert kills == 2
    done = toy.call("toy/tiny", *options, "--run", run)
    assert done.returncode == 0, done.stderr
    assert toy.losses(run) == toy.losses(tmp_path / "whole")
    whole = (tmp_path / "whole/checkpoints/step-00000040/model.safetensors").read_bytes()
    assert (run / "checkpoints/step-00000040/model.safetensors").read_bytes() == whole


@pytest.mark.parametrize("name", ["SIGTERM", "SIGUSR1", "SIGINT"])
def test_signal_saves_and_exits_75(toy, tmp_path, monkeypatch, capsys, name):
    monkeypatch.setenv("TOY_STOP_AFTER", "6")
    monkeypatch.setenv("TOY_SIGNAL", name)
    handler = signal.getsignal(signal.Signals[name])
    run = tmp_path / "run"
    assert toy.train("toy/tiny", "save.every=100", "--run", run) == 75
    assert [path.name for path in (run / "checkpoints").iterdir()] == ["step-00000006"]
    assert f"stopped by {name} at step 6; the same command continues" in capsys.readouterr().out
    assert signal.getsignal(signal.Signals[name]) == handler


def test_a_run_of_the_version_before_continues_to_the_bit(toy, tmp_path, monkeypatch, whole):
    """Then a checkpoint was written after the evaluation of its step, and knew less; recipes had fewer
    keys."""
    run = tmp_path / "before"
    monkeypatch.setenv("TOY_STOP_AFTER", "6")
    assert toy.train("toy/tiny", *OPTIONS, "--run", run) == 75
    monkeypatch.delenv("TOY_STOP_AFTER")
    newest = run / "checkpoints/step-00000006"
    state = json.loads((newest / "state.json").read_text())
    assert {"patience", "averaged"} <= state.keys()
    known = {key: value for key, value in state.items() if key not in ("patience", "averaged")}
    (newest / "state.json").write_text(json.dumps(known))
    recorded = recipes.read(run / "recipe.yaml")
    for key in ("schedules", "freeze", "eval_mode", "average"):
        del recorded[key]
    for section, keys in {
        "optimizer": ("lr_samples", "momentum", "nesterov", "not_muon", "rules", "layer_decay"),
        "schedule": ("warmup_lr", "min_lr", "power", "cooldown_steps"),
        "report": ("csv", "trackio", "name", "notes", "tags"),
        "evaluate": ("patience", "least_gain"),
    }.items():
        for key in keys:
            del recorded[section][key]
    (run / "recipe.yaml").write_text(json.dumps(recorded))  # JSON is YAML
    assert toy.train("toy/tiny", *OPTIONS, "--run", run) == 0
    assert sorted(toy.losses(run), key=str) == sorted(whole, key=str)


def test_second_start_of_a_finished_run_changes_nothing(toy, tmp_path, whole):
    assert toy.train("toy/tiny", *OPTIONS, "--run", tmp_path / "whole") == 0
    assert toy.losses(tmp_path / "whole") == whole


def test_more_steps_continue_a_finished_run(toy, tmp_path):
    constant = ("schedule.warmup_steps=0", "evaluate.every=4")
    assert toy.train("toy/tiny", "steps=12", *constant, "--run", tmp_path / "long") == 0
    assert toy.train("toy/tiny", "steps=8", *constant, "--run", tmp_path / "short") == 0
    assert toy.train("toy/tiny", "steps=12", *constant, "--run", tmp_path / "short") == 0
    assert toy.losses(tmp_path / "short") == toy.losses(tmp_path / "long")


def test_run_folder_is_found_again_by_the_same_command(toy, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("TOY_STOP_AFTER", "7")
    assert toy.train("toy/tiny") == 75
    monkeypatch.delenv("TOY_STOP_AFTER")
    assert toy.train("toy/tiny", "report.every=3") == 0  # a run-time key does not make it another run
    assert "resumed at step 7" in capsys.readouterr().out
    assert toy.train("toy/tiny", "seed=1") == 0
    assert len(list((tmp_path / "runs").iterdir())) == 2
