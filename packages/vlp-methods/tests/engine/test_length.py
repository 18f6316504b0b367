"""Lengths in steps, epochs and samples."""

import pytest
from vlp_core import recipe as recipes
from vlp_methods.engine.options import Length, SaveOptions


def steps_of(toy, run, *words):
    """Steps at which the toy with these words reported."""
    assert toy.train("toy/tiny", *words, "--run", run) == 0
    return [line["step"] for line in toy.reports(run) if "losses" in line]


@pytest.mark.parametrize(
    ("length", "steps"),
    [
        # 24 samples, batches of 8: three steps are an epoch of images; regions run in half of the steps.
        ("5", 5),
        ("{epochs: 2}", 6),
        ("{epochs: 0.5}", 2),
        ("{samples: 40}", 5),
        ("{samples: 4.1e1}", 6),
        ("{epochs: 2, of: regions}", 12),
    ],
)
def test_length_of_a_run(toy, tmp_path, capsys, length, steps):
    assert steps_of(toy, tmp_path / "run", f"steps={length}")[-1] == steps
    said = capsys.readouterr().out
    assert (f"are {steps} steps" in said) == (length != "5")
    assert f"toy/tiny: {steps} steps" in said


def test_accumulated_batches_count(toy, tmp_path):
    assert steps_of(toy, tmp_path / "run", "steps={epochs: 2}", "accumulate=3")[-1] == 2


def test_everything_that_happens_every_so_often_takes_lengths(toy, tmp_path, capsys):
    run = tmp_path / "run"
    words = (
        "steps={epochs: 4}",
        "save={every: {epochs: 1}, keep: 1, keep_every: {epochs: 2}}",
        "evaluate.every={samples: 32}",
        "report.every={epochs: 2}",
        "schedule.warmup_steps={epochs: 1}",
    )
    assert toy.train("toy/tiny", "--dry-run", *words) == 0
    assert "learning rate by step: 0: 0.00333, 1: 0.00667, 3: 0.01" in capsys.readouterr().out
    assert steps_of(toy, run, *words) == [6, 12]
    assert [line["step"] for line in toy.reports(run) if "evaluation" in line] == [4, 8, 12]
    kept = [path.name for path in sorted((run / "checkpoints").iterdir())]
    assert kept == ["step-00000006", "step-00000012"]
    said = capsys.readouterr().out
    assert "save.every: 1 epochs of images are 3 steps" in said
    assert "evaluate.every: 32 samples of images are 4 steps" in said


def test_a_stopped_run_in_epochs_equals_an_uninterrupted_one(toy, tmp_path, monkeypatch):
    words = ("steps={epochs: 4}", "evaluate.every={epochs: 1}", "schedule.warmup_steps={epochs: 1}")
    assert toy.train("toy/tiny", *words, "--run", tmp_path / "whole") == 0
    monkeypatch.setenv("TOY_STOP_AFTER", "5")
    assert toy.train("toy/tiny", *words, "--run", tmp_path / "stopped") == 75
    monkeypatch.delenv("TOY_STOP_AFTER")
    assert toy.train("toy/tiny", *words, "--run", tmp_path / "stopped") == 0
    assert toy.losses(tmp_path / "stopped") == toy.losses(tmp_path / "whole")
    # In steps it is the same run: nothing but the form of the recipe differs.
    plain = ("steps=12", "evaluate.every=3", "schedule.warmup_steps=3")
    assert toy.train("toy/tiny", *plain, "--run", tmp_path / "plain") == 0
    assert toy.losses(tmp_path / "plain") == toy.losses(tmp_path / "whole")


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("steps={epochs: 1, samples: 3}", "steps: give either epochs or samples"),
        ("steps={epochs: 0}", "steps: give either epochs or samples, more than 0"),
        ("steps={epoch: 1}", "steps.epoch: unknown key; did you mean steps.epochs?"),
        ("steps=0", "steps=0 must be at least 1"),
        ("save.every=0", "save: every=0 must be at least 1"),
        (
            "steps={epochs: 1, of: photos}",
            "steps.of=photos: no such stream; choose among regions, images",
        ),
    ],
)
def test_a_length_that_means_nothing_is_refused(toy, tmp_path, capsys, word, message):
    assert toy.train("toy/tiny", word, "--run", tmp_path / "run") == 2
    assert message in capsys.readouterr().err


def test_a_length_is_written_down_as_it_was_given():
    save = SaveOptions(every=Length(epochs=1.0))
    assert recipes.build(SaveOptions, recipes.dump(save)) == save
