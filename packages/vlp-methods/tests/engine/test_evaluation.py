"""A checkpoint comes before its evaluation, so failures, stops and kills there cost nothing."""

import json
import os
import signal
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

OPTIONS = ("steps=12", "save.every=100", "evaluate.every=4", "report.every=1")


def checkpoints(run):
    return [path.name for path in sorted((run / "checkpoints").iterdir())]


def test_a_failed_evaluation_leaves_the_checkpoint_and_is_repeated(toy, tmp_path, monkeypatch, capsys):
    assert toy.train("toy/tiny", *OPTIONS, "--run", tmp_path / "whole") == 0
    capsys.readouterr()
    run = tmp_path / "run"
    broken = ("toy/tiny", *OPTIONS, "faults.evaluation_from=8", "--run", run)
    for _ in range(2):  # the second time nothing but the evaluation is repeated
        assert toy.train(*broken) == 1
        error = capsys.readouterr().err
        assert "RuntimeError: the benchmark is broken" in error
        assert "Traceback" in error
        assert (
            f"The evaluation at step 8 failed; {run}/checkpoints/step-00000008 was written before." in error
        )
        assert checkpoints(run)[-1] == "step-00000008"
    monkeypatch.setenv("TOY_FIXED", "1")
    assert toy.train(*broken) == 0
    assert "resumed at step 8" in capsys.readouterr().out
    assert toy.losses(run) == toy.losses(tmp_path / "whole")


def test_a_number_that_is_not_there_is_one_line_and_keeps_the_checkpoint(toy, tmp_path, capsys):
    run = tmp_path / "run"
    assert toy.train("toy/tiny", *OPTIONS, "evaluate.best=recall", "--run", run) == 2
    error = capsys.readouterr().err
    assert "evaluate.best=recall is not a number of the evaluation; known: output, step, peak\n" in error
    assert "The evaluation at step 4 failed" in error
    assert "Traceback" not in error
    assert toy.train("toy/tiny", *OPTIONS, "evaluate.best=peak", "--run", run) == 0


def test_killed_between_evaluation_and_its_note_evaluates_again(toy, tmp_path):
    run = tmp_path / "run"
    assert toy.train("toy/tiny", *OPTIONS, "--run", run) == 0
    whole = toy.losses(run)
    (run / "checkpoints/step-00000012/after.json").unlink()
    assert toy.train("toy/tiny", *OPTIONS, "--run", run) == 0
    assert toy.losses(run) == whole
    assert [line["step"] for line in toy.reports(run) if "evaluation" in line] == [4, 8, 12]


def evaluating(folder, ranks=1):
    deadline = time.monotonic() + 100
    while time.monotonic() < deadline:
        if all((folder / f"evaluating-{rank}").exists() for rank in range(ranks)):
            return
        time.sleep(0.01)
    raise AssertionError("no evaluation has begun")


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_stop_request_is_obeyed_during_an_evaluation(toy, tmp_path, ranks):
    """On two ranks one of them alone is asked; the evaluation takes minutes, the stop seconds."""
    run = tmp_path / "run"
    words = ("toy/tiny", "steps=4", "dropout=0", "evaluate.every=4", "report.every=4")
    slow = (*words, "faults.slow_evaluation=300", "--nproc", str(ranks), "--run", run)
    process = toy.start(*slow)
    try:
        evaluating(tmp_path, ranks)
        start = time.monotonic()
        if ranks == 1:
            process.send_signal(signal.SIGTERM)
        else:
            children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
            os.kill(int(children[-1]), signal.SIGUSR1)
        output, _ = process.communicate(timeout=60)
    finally:
        process.kill()
        process.wait()
    assert process.returncode == 75, output
    assert time.monotonic() - start < 30
    assert "Traceback" not in output
    assert checkpoints(run) == ["step-00000004"]
    assert not any("evaluation" in line for line in toy.reports(run))
    assert toy.train(*words, "--run", run, "--allow-change", "faults") == 0
    assert [line["step"] for line in toy.reports(run)] == [4, 4]


def test_control_c_says_what_it_does(toy, tmp_path, monkeypatch, capfd):
    monkeypatch.setenv("TOY_STOP_AFTER", "6")
    monkeypatch.setenv("TOY_SIGNAL", "SIGINT")
    assert toy.train("toy/tiny", "--run", tmp_path / "run") == 75
    said = capfd.readouterr().err
    assert "Ctrl-C: stopping after this step, with a checkpoint; the same command continues" in said
    assert "Once more ends at once" in said


# ------------------------------------------------------------------------------------------- early stopping

SCORES = "score=[1, 2, 3, 3.05, 2, 3.05, 3.05, 9]"
EARLY = ("steps=12", "evaluate={every: 1, best: score, patience: 3, least_gain: 0.1}", SCORES)


def test_a_run_without_improvement_ends_early_with_the_best_model(toy, tmp_path, capsys):
    run = tmp_path / "run"
    assert toy.train("toy/tiny", *EARLY, "tested=true", "--run", run) == 0
    assert (
        "stopped early at step 6: score has not improved by 0.1 in 3 evaluations (best 3)"
        in capsys.readouterr().out
    )
    assert json.loads((run / "best.json").read_text()) == {"name": "score", "value": 3.05, "step": 4}
    assert json.loads((run / "eval/test-00000006.json").read_text()).keys() == {"test/updates"}
    assert (run / "export").is_dir()
    before = toy.losses(run)
    assert toy.train("toy/tiny", *EARLY, "tested=true", "--run", run) == 0  # and stays ended
    assert toy.losses(run) == before
    # More patience continues it.
    assert toy.train("toy/tiny", *EARLY, "evaluate.patience=4", "tested=true", "--run", run) == 0
    assert [line["step"] for line in toy.reports(run) if "evaluation" in line][-2:] == [7, 7]


def test_lower_may_be_better(toy, tmp_path):
    run = tmp_path / "run"
    words = (
        "steps=12",
        "evaluate={every: 1, best: score, better: lower, patience: 2}",
        "score=[3, 2, 2, 2, 1]",
    )
    assert toy.train("toy/tiny", *words, "--run", run) == 0
    assert [line["step"] for line in toy.reports(run) if "evaluation" in line][-1] == 4


def test_patience_survives_a_restart(toy, tmp_path, monkeypatch):
    assert toy.train("toy/tiny", *EARLY, "--run", tmp_path / "whole") == 0
    for step in range(1, 6):
        run = tmp_path / f"stopped-{step}"
        monkeypatch.setenv("TOY_STOP_AFTER", str(step))
        assert toy.train("toy/tiny", *EARLY, "--run", run) == 75
        monkeypatch.delenv("TOY_STOP_AFTER")
        assert toy.train("toy/tiny", *EARLY, "--run", run) == 0
        assert toy.losses(run) == toy.losses(tmp_path / "whole"), step


@pytest.mark.parametrize(
    ("evaluate", "message"),
    [
        ("{every: 1, patience: 2}", "patience needs best"),
        ("{best: score, patience: 2}", "patience needs best (the number to watch) and every"),
        ("{every: 1, best: score, least_gain: 1}", "least_gain belongs to patience"),
    ],
)
def test_patience_needs_something_to_watch(toy, tmp_path, capsys, evaluate, message):
    assert toy.train("toy/tiny", f"evaluate={evaluate}", "--run", tmp_path / "run") == 2
    assert message in capsys.readouterr().err


# --------------------------------------------------------------------------------------- averaged weights

AVERAGE = ("average={decay: 0.9, warmup: false}", "steps=12", "evaluate.every=4", "dropout=0")


def test_averaged_weights_are_saved_evaluated_and_exported(toy, tmp_path):
    """Training is what it is without them; the average is recomputed here from all checkpoints."""
    from toy_method.build import Task
    from vlp_methods.engine import entry

    run, plain = tmp_path / "run", tmp_path / "plain"
    words = (*AVERAGE, "regions=0", "save={every: 1, keep: 100}")
    assert toy.train("toy/tiny", *words, "--run", run) == 0
    assert toy.train("toy/tiny", *words, "average=null", "--run", plain) == 0

    def of(step, name):
        return load_file(run / f"checkpoints/step-{step:08d}/{name}.safetensors")

    torch.manual_seed(0)
    expected = Task(entry.load("toy/tiny", ("dropout=0",)).settings).out.weight.detach()
    for step in range(1, 13):
        expected = 0.9 * expected + 0.1 * of(step, "model")["out.weight"]
        torch.testing.assert_close(of(step, "average")["out.weight"], expected)
    assert of(12, "average").keys() == {
        name for name in of(12, "model") if name.split(".")[0] in ("body", "head", "out", "tied")
    } - {"tied.weight"}
    exported = load_file(run / "export/model.safetensors")["out.weight"]
    assert torch.equal(exported, of(12, "average")["out.weight"])
    assert toy.train("export", run, tmp_path / "again") == 0
    assert torch.equal(load_file(tmp_path / "again/model.safetensors")["out.weight"], exported)
    trained, scores = (toy.losses(folder) for folder in (run, plain))
    assert [line for line in trained if line[2]] == [line for line in scores if line[2]]
    assert [line for line in trained if not line[2]] != [line for line in scores if not line[2]]
    weights = load_file(plain / "checkpoints/step-00000012/model.safetensors")
    assert torch.equal(of(12, "model")["out.weight"], weights["out.weight"])


def test_averaged_weights_resume_to_the_bit(toy, tmp_path, monkeypatch):
    words = (*AVERAGE, "average={decay: 0.9}", "dropout=0.2")
    assert toy.train("toy/tiny", *words, "--run", tmp_path / "whole") == 0
    monkeypatch.setenv("TOY_STOP_AFTER", "6")
    assert toy.train("toy/tiny", *words, "--run", tmp_path / "stopped") == 75
    monkeypatch.delenv("TOY_STOP_AFTER")
    assert toy.train("toy/tiny", *words, "--run", tmp_path / "stopped") == 0
    assert toy.losses(tmp_path / "stopped") == toy.losses(tmp_path / "whole")
    for name in ("model", "average"):
        file = f"checkpoints/step-00000012/{name}.safetensors"
        assert (tmp_path / "stopped" / file).read_bytes() == (tmp_path / "whole" / file).read_bytes()
