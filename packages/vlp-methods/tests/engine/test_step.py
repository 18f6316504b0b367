"""Reading behind the device: what a GPU run does, shown on the CPU by letting the host read one step late."""

import pytest
from vlp_methods.engine import step


@pytest.fixture
def late(monkeypatch):
    """The host reads the numbers of a step after the next one was started; returns how far behind it was, at
    each read."""
    behind = []

    class Late(step.Wire):
        def __init__(self, *arguments):
            super().__init__(*arguments)
            self.lag = 1

        def receive(self, before=None):
            packets = list(super().receive(before))
            behind.append(len({sent.step for sent in self.sent}))
            return iter(packets)

    monkeypatch.setattr("vlp_methods.engine.loop.Wire", Late)
    return behind


QUIET = ("report.every=100", "save.every=100", "steps=12")


@pytest.mark.parametrize("fault", ["nan_key", "nan_gradient_key"])
def test_failing_step_is_named_and_not_saved_although_the_next_has_started(
    toy, tmp_path, capsys, late, fault
):
    run = tmp_path / "run"
    assert toy.train("toy/tiny", *QUIET, f"faults.{fault}=images-5", "--run", run) == 1
    found = capsys.readouterr().err
    late_step = found.partition(",")[0].removeprefix("vlp-train: step ")
    assert "images-5" in found
    assert not (run / "checkpoints").exists()
    monkeypatch = pytest.MonkeyPatch()
    monkeypatch.setattr("vlp_methods.engine.loop.Wire", step.Wire)
    try:
        assert toy.train("toy/tiny", *QUIET, f"faults.{fault}=images-5", "--run", tmp_path / "prompt") == 1
    finally:
        monkeypatch.undo()
    assert capsys.readouterr().err.startswith(f"vlp-train: step {late_step},")
    assert 1 in late  # it did read late


def test_signal_is_obeyed_one_step_later_and_nothing_changes_by_it(toy, tmp_path, monkeypatch, late):
    assert toy.train("toy/tiny", *QUIET, "--run", tmp_path / "whole") == 0
    monkeypatch.setenv("TOY_STOP_AFTER", "6")
    assert toy.train("toy/tiny", *QUIET, "--run", tmp_path / "stopped") == 75
    monkeypatch.delenv("TOY_STOP_AFTER")
    assert [path.name for path in (tmp_path / "stopped/checkpoints").iterdir()] == ["step-00000007"]
    assert toy.train("toy/tiny", *QUIET, "--run", tmp_path / "stopped") == 0
    assert toy.losses(tmp_path / "stopped") == toy.losses(tmp_path / "whole")


def test_numbers_do_not_depend_on_when_they_are_read(toy, tmp_path, late):
    options = ("report.every=5", "save.every=3", "evaluate.every=4")
    assert toy.train("toy/tiny", *options, "--run", tmp_path / "late") == 0
    monkeypatch = pytest.MonkeyPatch()
    monkeypatch.setattr("vlp_methods.engine.loop.Wire", step.Wire)
    try:
        assert toy.train("toy/tiny", *options, "--run", tmp_path / "prompt") == 0
    finally:
        monkeypatch.undo()
    assert toy.losses(tmp_path / "late") == toy.losses(tmp_path / "prompt")
