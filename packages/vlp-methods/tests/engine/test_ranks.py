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


def two(toy, run, *options, stop_after=None):
    """A run on two ranks; `stop_after` signals the last rank alone."""
    if stop_after:
        toy.environment = {**toy.environment, "TOY_STOP_AFTER": str(stop_after)}
    done = toy.call("toy/tiny", *options, "--nproc", "2", "--run", run)
    toy.environment.pop("TOY_STOP_AFTER", None)
    return done


def test_saved_on_two_ranks_continues_on_one_and_all_equals_one_rank(toy, tmp_path, one):
    """Names of the losses include the streams, so this also shows that both ranks mixed streams as one rank
    does."""
    run = tmp_path / "two"
    options = (*COMMON, "data.batch=4", "accumulate=2")
    done = two(toy, run, *options, stop_after=5)
    assert done.returncode == 75, done.stderr
    assert (
        run / "checkpoints/step-00000005"
    ).is_dir()  # one rank was signalled, both stopped at the same step
    assert done.stdout.count("step 5/8") == 1  # rank 0 alone talks
    close(one[:5], toy.losses(run))
    assert toy.train("toy/tiny", *options, "--run", run) == 0
    close(one, toy.losses(run))
    weights = load_file(run / "export/model.safetensors")["out.weight"]
    assert (weights - load_file(tmp_path / "one/export/model.safetensors")["out.weight"]).abs().max() < 1e-5


def test_two_ranks_resume_to_the_bit_with_dropout_of_their_own(toy, tmp_path):
    options = ("steps=8", "dropout=0.5")
    assert two(toy, tmp_path / "whole", *options).returncode == 0
    run = tmp_path / "stopped"
    assert two(toy, run, *options, stop_after=3).returncode == 75
    refused = two(toy, run, *options, "optimizer.lr=1")
    assert refused.returncode == 2
    assert refused.stderr.count("was started with another recipe") == 1
    assert two(toy, run, *options).returncode == 0
    assert toy.losses(run) == toy.losses(tmp_path / "whole")
    # With the dropout of rank 0 on both ranks, this would be the first rank's half of the batch, dropped like
    # one rank's.
    assert toy.train("toy/tiny", *options, "--run", tmp_path / "one") == 0
    assert toy.losses(run) != toy.losses(tmp_path / "one")


EVERYTHING = (
    "steps={epochs: 2}",
    "save.every={samples: 16}",
    "evaluate={every: 2, best: peak, better: lower, patience: 9}",
    "boxes=true",
    "freeze=['^body\\.0']",
    "eval_mode=['^body\\.0$']",
    "average={decay: 0.9}",
    "optimizer={variant: muon, lr: 0.01, lr_samples: 4, rules: [{pattern: ^head, schedule: slow}]}",
    "optimizer.layer_decay=[{rate: 0.5, blocks: 'body\\.(\\d)'}]",
    "schedules={slow: {kind: polynomial, power: 2, warmup_steps: 2, warmup_edge: before}}",
    "schedule={kind: constant, cooldown_steps: 0.5, min_lr: 0.001}",
)


def test_two_ranks_resume_to_the_bit_with_every_option_on(toy, tmp_path):
    assert two(toy, tmp_path / "whole", *EVERYTHING).returncode == 0
    run = tmp_path / "stopped"
    assert two(toy, run, *EVERYTHING, stop_after=3).returncode == 75
    done = two(toy, run, *EVERYTHING)
    assert done.returncode == 0, done.stderr
    assert toy.losses(run) == toy.losses(tmp_path / "whole")
    for name in ("model", "optimizer", "average"):
        file = f"checkpoints/step-00000006/{name}.safetensors"
        assert (run / file).read_bytes() == (tmp_path / "whole" / file).read_bytes()


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
