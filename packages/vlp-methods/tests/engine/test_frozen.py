"""What trains, what does not, and where frozen weights are kept."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

SHORT = ("steps=8", "save.every=4", "evaluate.every=null")
BODY = ("freeze=[^body]",)


def tensors(run, name, step=8):
    return load_file(run / f"checkpoints/step-{step:08d}/{name}.safetensors")


@pytest.fixture
def resumes(toy, tmp_path, monkeypatch):
    """`resumes(*words)`: a run that is stopped and continued equals one in one go; returns its folder."""

    def run(*words):
        assert toy.train("toy/tiny", *words, "--run", tmp_path / "whole") == 0
        monkeypatch.setenv("TOY_STOP_AFTER", "5")
        assert toy.train("toy/tiny", *words, "--run", tmp_path / "stopped") == 75
        monkeypatch.delenv("TOY_STOP_AFTER")
        assert toy.train("toy/tiny", *words, "--run", tmp_path / "stopped") == 0
        assert toy.losses(tmp_path / "stopped") == toy.losses(tmp_path / "whole")
        for name in ("model", "optimizer"):
            one, two = (tensors(tmp_path / which, name) for which in ("whole", "stopped"))
            assert one.keys() == two.keys()
            assert all(torch.equal(value, two[key]) for key, value in one.items())
        return tmp_path / "whole"

    return run


def test_frozen_parameters_stay_and_have_no_state(resumes):
    run = resumes(*SHORT, *BODY)
    early, late = tensors(run, "model", 4), tensors(run, "model", 8)
    changed = {name for name in late if not torch.equal(early[name], late[name])}
    assert "head.weight" in changed
    assert not any(name.startswith("body") for name in changed)
    assert any(name.startswith("body") for name in late)  # no file is known to have them
    assert not any("/body" in name for name in tensors(run, "optimizer"))


def test_dry_run_counts_what_trains(toy, capsys):
    assert toy.train("toy/tiny", "--dry-run", *BODY) == 0
    # 6 x 16 + 16 and 16 x 6 + 6 of the body are frozen.
    assert "265 parameters, 44 of them trained" in capsys.readouterr().out


def test_tied_parameters_are_frozen_by_any_of_their_names(toy, tmp_path):
    run = tmp_path / "run"
    assert toy.train("toy/tiny", *SHORT, "freeze=['^tied\\.weight']", "--run", run) == 0
    assert torch.equal(tensors(run, "model", 4)["out.weight"], tensors(run, "model", 8)["out.weight"])


def test_two_ranks_train_what_is_left(toy, tmp_path):
    words = (*SHORT, *BODY, "dropout=0")
    assert toy.train("toy/tiny", *words, "--run", tmp_path / "one") == 0
    done = toy.call("toy/tiny", *words, "--nproc", "2", "--run", tmp_path / "two")
    assert done.returncode == 0, done.stderr
    one, two = (tensors(tmp_path / name, "model") for name in ("one", "two"))
    for name, value in one.items():
        torch.testing.assert_close(two[name], value, rtol=2e-5, atol=1e-6)


def test_frozen_parts_keep_dropout_unless_they_stay_in_eval_mode(toy, tmp_path, resumes):
    """The dropout of the body changes the losses in training mode, and has no effect in evaluation mode."""
    words = (*SHORT, *BODY)
    with_dropout = resumes(*words)
    shutil.move(with_dropout, tmp_path / "with")
    shutil.rmtree(tmp_path / "stopped")
    still = resumes(*words, "eval_mode=[^body$]")
    assert toy.train("toy/tiny", *words, "dropout=0", "--run", tmp_path / "none") == 0
    assert toy.losses(still) == toy.losses(tmp_path / "none") != toy.losses(tmp_path / "with")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("freeze=[bodi]",), "freeze: no parameter of the task matches 'bodi'"),
        (("freeze=['(']",), "freeze: '(' is no regular expression"),
        (("freeze=['']",), "freeze: nothing is left to train"),
        (("eval_mode=[^body$]",), "eval_mode: body is found by '^body$', and its 0.weight trains; freeze it"),
        (("eval_mode=[absent]",), "eval_mode: no module of the task matches 'absent'"),
    ],
)
def test_patterns_that_cannot_mean_it_are_refused(toy, tmp_path, capsys, words, message):
    assert toy.train("toy/tiny", *words, "--run", tmp_path / "run") == 2
    assert message in capsys.readouterr().err


def test_a_trainable_parameter_without_a_group_is_a_named_fault_of_the_code(toy, tmp_path, capsys):
    assert toy.train("toy/tiny", "lost=true", "--run", tmp_path / "run") == 1
    assert "trainable parameters that the optimizer does not have: lost; give them" in capsys.readouterr().err


@pytest.fixture
def source(tmp_path):
    """Weights of the body."""
    torch.manual_seed(7)
    file = tmp_path / "body.safetensors"
    shapes = {"0.weight": (16, 6), "0.bias": (16,), "3.weight": (6, 16), "3.bias": (6,)}
    save_file({name: torch.randn(shape) for name, shape in shapes.items()}, file)
    return file


def test_weights_from_a_file_are_not_written_and_the_file_is_named(toy, resumes, source):
    run = resumes(*SHORT, f"frozen_file={source}")
    assert not any(name.startswith("body") for name in tensors(run, "model"))
    state = json.loads((run / "checkpoints/step-00000008/state.json").read_text())
    assert state["frozen_from"][0]["file"] == str(source)
    assert len(state["frozen_from"][0]["sha256"]) == 64
    assert json.loads((run / "export/frozen.json").read_text()) == state["frozen_from"]
    assert toy.train("export", run, run / "again") == 0


def test_a_checkpoint_without_its_file_is_not_resumed(toy, tmp_path, capsys, source, monkeypatch):
    run = tmp_path / "run"
    words = ("toy/tiny", *SHORT, f"frozen_file={source}", "--run", run)
    assert toy.train(*words) == 0
    changed = {name: value + 1 for name, value in load_file(source).items()}
    kept = source.rename(tmp_path / "kept.safetensors")
    save_file(changed, source)
    more = (*words, "steps=9")
    assert toy.train(*more) == 2
    error = capsys.readouterr().err
    assert f"holds no weights of body.*: they came from {source} with SHA-256" in error
    assert "it is not the same file" in error
    other = ("toy/tiny", *SHORT, "steps=9", "--allow-change", "frozen_file", "--run", run)
    assert toy.train(*other) == 2
    assert "which this recipe does not read" in capsys.readouterr().err
    kept.replace(source)
    assert toy.train(*more, "--allow-change", "frozen_file") == 0


def test_a_checkpoint_of_another_model_is_refused(toy, tmp_path, capsys):
    run = tmp_path / "run"
    assert toy.train("toy/tiny", *SHORT, "--run", run) == 0
    assert toy.train("toy/tiny", *SHORT, "boxes=true", "--allow-change", "boxes", "--run", run) == 2
    assert "it lacks boxes.weight, boxes.bias, and has nothing too many" in capsys.readouterr().err


def test_what_was_trained_may_be_frozen_later(toy, tmp_path):
    run = tmp_path / "run"
    assert toy.train("toy/tiny", *SHORT, "--run", run) == 0
    assert toy.train("toy/tiny", *SHORT, *BODY, "steps=12", "--allow-change", "freeze", "--run", run) == 0
    before, after = tensors(run, "model", 8), tensors(run, "model", 12)
    assert torch.equal(before["body.0.weight"], after["body.0.weight"])
    assert not torch.equal(before["head.weight"], after["head.weight"])
