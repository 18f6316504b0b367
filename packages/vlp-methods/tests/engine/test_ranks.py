"""Several ranks compute what one computes, and agree on everything."""

import math
import signal
import time

import pytest
from safetensors.torch import load_file

COMMON = ("dropout=0", "steps=8", "save.every=4")


def close(one, two):
    """Reports agree to rounding: the order in which gradients are added up differs."""
    assert [(step, [n for n, _ in numbers], lr, samples) for step, numbers, lr, samples in one] == [
        (step, [n for n, _ in numbers], lr, samples) for step, numbers, lr, samples in two
    ]
    for (_, left, *_), (_, right, *_) in zip(one, two, strict=True):
        for (name, a), (_, b) in zip(left, right, strict=True):
            assert math.isclose(float.fromhex(a), float.fromhex(b), rel_tol=2e-5, abs_tol=1e-6), name


@pytest.fixture
def one(toy, tmp_path):
    """The run on one rank."""
    assert toy.train("toy/tiny", *COMMON, "--run", tmp_path / "one") == 0
    return toy.losses(tmp_path / "one")


def test_two_ranks_equal_one(toy, tmp_path, one):
    done = toy.call("toy/tiny", *COMMON, "--nproc", "2", "--run", tmp_path / "two")
    assert done.returncode == 0, done.stderr
    close(one, toy.losses(tmp_path / "two"))  # names include the streams: both ranks mixed as one rank does
    assert done.stdout.count("step 8/8") == 1  # rank 0 alone talks


def test_saved_on_two_ranks_continues_on_one(toy, tmp_path, one):
    run = tmp_path / "two"
    stopped = {**toy.environment, "TOY_STOP_AFTER": "5"}
    toy.environment = stopped
    done = toy.call("toy/tiny", *COMMON, "--nproc", "2", "--run", run)
    assert done.returncode == 75, (
        done.stderr
    )  # only the last rank was signalled; both stopped at the same step
    assert (run / "checkpoints/step-00000005").is_dir()
    assert toy.train("toy/tiny", *COMMON, "--run", run) == 0
    close(one, toy.losses(run))


def test_dropout_differs_between_ranks_and_repeats_between_runs(toy, tmp_path):
    options = ("steps=4", "dropout=0.5")
    for name in ("a", "b"):
        done = toy.call("toy/tiny", *options, "--nproc", "2", "--run", tmp_path / name)
        assert done.returncode == 0, done.stderr
    assert toy.losses(tmp_path / "a") == toy.losses(tmp_path / "b")
    assert toy.train("toy/tiny", *options, "--run", tmp_path / "one") == 0
    assert toy.losses(tmp_path / "a") != toy.losses(tmp_path / "one")


def test_signal_to_the_launcher_stops_all_ranks(toy, tmp_path):
    run = tmp_path / "run"
    process = toy.start("toy/tiny", "steps=100000", "faults.sleep=0.01", "--nproc", "2", "--run", run)
    deadline = time.monotonic() + 90
    while len(toy.reports(run)) < 3 and time.monotonic() < deadline:
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 75, output
    assert "Traceback" not in output


def test_ranks_stop_and_save_when_the_launcher_is_killed(toy, tmp_path):
    run = tmp_path / "run"
    process = toy.start(
        "toy/tiny", "steps=100000", "faults.sleep=0.01", "save.every=100000", "--nproc", "2", "--run", run
    )
    deadline = time.monotonic() + 90
    while len(toy.reports(run)) < 3 and time.monotonic() < deadline:
        time.sleep(0.01)
    process.kill()
    process.communicate(timeout=60)  # returns when the ranks have closed the pipe, too
    assert list((run / "checkpoints").iterdir())


def test_failure_on_all_ranks_is_told_once(toy, tmp_path):
    done = toy.call("toy/tiny", *COMMON, "faults.nan_key=images-3", "--nproc", "2", "--run", tmp_path / "run")
    assert done.returncode == 1
    assert done.stderr.count("not finite") == 1
    assert "images-3" in done.stderr


def test_nproc_under_a_launcher_is_refused(toy, monkeypatch, capsys):
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert toy.train("toy/tiny", "--nproc", "2") == 2
    assert "already started the ranks" in capsys.readouterr().err


def test_accumulation_equals_the_big_batch(toy, tmp_path):
    assert toy.train("toy/tiny", *COMMON, "data.batch=8", "--run", tmp_path / "big") == 0
    assert toy.train("toy/tiny", *COMMON, "data.batch=4", "accumulate=2", "--run", tmp_path / "small") == 0
    close(toy.losses(tmp_path / "big"), toy.losses(tmp_path / "small"))


def test_accumulation_on_two_ranks_equals_the_big_batch(toy, tmp_path, one):
    options = ("data.batch=4", "accumulate=2")
    done = toy.call("toy/tiny", *COMMON, *options, "--nproc", "2", "--run", tmp_path / "two")
    assert done.returncode == 0, done.stderr
    close(one, toy.losses(tmp_path / "two"))
    weights = load_file(tmp_path / "two/export/model.safetensors")["out.weight"]
    assert (weights - load_file(tmp_path / "one/export/model.safetensors")["out.weight"]).abs().max() < 1e-5
