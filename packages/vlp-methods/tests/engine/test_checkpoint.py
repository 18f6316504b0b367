"""Checkpoints are complete or absent, whatever instant the process dies at."""

from pathlib import Path

import pytest
import torch
from torch import nn
from vlp_methods.engine import checkpoint


class Shared(nn.Module):
    """Tied parameters, a transposed buffer, two buffers in one memory, an integer."""

    def __init__(self):
        super().__init__()
        self.first = nn.Linear(3, 3)
        self.second = nn.Linear(3, 3)
        self.second.weight = self.first.weight
        self.register_buffer("transposed", torch.arange(6.0).reshape(2, 3).T)
        memory = torch.arange(4.0)
        self.register_buffer("low", memory[:2])
        self.register_buffer("high", memory[1:])
        self.register_buffer("count", torch.tensor(3))
        self.register_buffer("empty", torch.zeros(0))


def trained(make=torch.optim.AdamW):
    torch.manual_seed(0)
    task = Shared()
    optimizer = make(
        [{"params": [task.first.bias], "lr": 0.1}, {"params": [task.second.bias, task.first.weight]}], lr=0.2
    )
    for _ in range(3):
        optimizer.zero_grad()
        task.second(task.first(torch.ones(1, 3))).square().sum().backward()
        optimizer.step()
    return task, optimizer


@pytest.mark.parametrize(
    "make", [torch.optim.AdamW, torch.optim.SGD, lambda p, lr: torch.optim.SGD(p, lr=lr, momentum=0.9)]
)
def test_there_and_back(tmp_path, make):
    task, optimizer = trained(make)
    path = checkpoint.save(tmp_path, 7, task, optimizer, {"note": [1.5]})
    other = Shared()
    with torch.no_grad():
        for tensor in other.state_dict().values():
            tensor.zero_()
    fresh = make(
        [{"params": [other.first.bias], "lr": 0.1}, {"params": [other.second.bias, other.first.weight]}],
        lr=0.2,
    )
    state = checkpoint.load(path, other, fresh)
    assert (state["step"], state["note"]) == (7, [1.5])
    for name, tensor in task.state_dict().items():
        assert torch.equal(tensor, other.state_dict()[name]), name
    assert other.first.weight is other.second.weight
    before, after = optimizer.state_dict(), fresh.state_dict()
    assert before["param_groups"] == after["param_groups"]
    assert before["state"].keys() == after["state"].keys()
    for index, slots in before["state"].items():
        for slot, value in slots.items():
            assert torch.equal(torch.as_tensor(value), torch.as_tensor(after["state"][index][slot])), slot


def test_state_follows_the_names_of_parameters_not_their_order(tmp_path):
    task, optimizer = trained()
    path = checkpoint.save(tmp_path, 1, task, optimizer, {})
    other = Shared()
    turned = torch.optim.AdamW([other.first.weight, other.second.bias, other.first.bias])
    checkpoint.load(path, other, turned)
    assert torch.equal(turned.state[other.first.bias]["exp_avg"], optimizer.state[task.first.bias]["exp_avg"])


def test_death_during_a_save_leaves_the_last_checkpoint(tmp_path, monkeypatch):
    task, optimizer = trained()
    good = checkpoint.save(tmp_path, 1, task, optimizer, {})
    for name in ("_write_tensors", "write_json", "sync"):
        with monkeypatch.context() as patch:
            patch.setattr(checkpoint, name, lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
            with pytest.raises(KeyboardInterrupt):
                checkpoint.save(tmp_path, 2, task, optimizer, {})
        assert checkpoint.newest(tmp_path) == good
    checkpoint.sweep(tmp_path)
    assert list(tmp_path.iterdir()) == [good]
    assert checkpoint.newest(checkpoint.save(tmp_path, 2, task, optimizer, {}).parent).name == "step-00000002"


def test_death_during_a_deletion_leaves_whole_checkpoints(tmp_path, monkeypatch):
    task, optimizer = trained()
    for step in (1, 2):
        checkpoint.save(tmp_path, step, task, optimizer, {})
    with monkeypatch.context() as patch:
        patch.setattr(
            checkpoint.shutil,
            "rmtree",
            lambda path, **_: path.exists() and (_ for _ in ()).throw(KeyboardInterrupt),
        )
        with pytest.raises(KeyboardInterrupt):
            checkpoint.tidy(tmp_path, keep=1, keep_every=None)
    assert [path.name for path in checkpoint.complete(tmp_path)] == ["step-00000002"]


def test_which_checkpoints_stay(tmp_path):
    for step in range(1, 11):
        (tmp_path / f"step-{step:08d}").mkdir()
    (tmp_path / "notes").mkdir()
    checkpoint.tidy(tmp_path, keep=2, keep_every=4)
    assert [checkpoint.step_of(path) for path in checkpoint.complete(tmp_path)] == [4, 8, 9, 10]
    assert (tmp_path / "notes").is_dir()


def test_steps_of_nine_digits_are_sorted_by_number(tmp_path):
    for name in ("step-99999999", "step-100000000"):
        (tmp_path / name).mkdir()
    assert checkpoint.newest(tmp_path).name == "step-100000000"


def test_parameters_that_are_not_finite_are_not_written(tmp_path):
    task, optimizer = trained()
    with torch.no_grad():
        task.second.bias[1] = float("inf")
    with pytest.raises(FloatingPointError, match=r"step 3: parameters second\.bias are not finite"):
        checkpoint.save(tmp_path / "new", 3, task, optimizer, {})
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("survives", range(4))
def test_death_during_a_swap_of_folders_leaves_the_old_or_the_new(tmp_path, monkeypatch, survives):
    """`survives` file-system operations happen, then the process dies."""
    final, new = tmp_path / "export", tmp_path / ".export.new"
    for folder, text in ((final, "old"), (new, "new")):
        folder.mkdir()
        (folder / "model").write_text(text)
    count = iter(range(100))

    def dying(function):
        def call(*arguments, **options):
            if next(count) >= survives:
                raise KeyboardInterrupt
            return function(*arguments, **options)

        return call

    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", dying(Path.rename))
        patch.setattr(checkpoint.shutil, "rmtree", dying(checkpoint.shutil.rmtree))
        with pytest.raises(KeyboardInterrupt):
            checkpoint.replace_folder(new, final)
    checkpoint.restore_folder(final)
    assert (final / "model").read_text() == ("new" if survives >= 3 else "old")
    assert list(tmp_path.iterdir()) == [final]


def test_text_is_the_old_or_the_new(tmp_path, monkeypatch):
    file = tmp_path / "recipe.yaml"
    checkpoint.write_text(file, "old")
    monkeypatch.setattr(Path, "replace", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        checkpoint.write_text(file, "new")
    assert file.read_text() == "old"
