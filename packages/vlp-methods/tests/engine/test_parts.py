"""`parts`: the update of a whole batch in the memory of a part of it."""

import math
from typing import NamedTuple

import pytest
import torch
from torch import Tensor, nn
from vlp_methods.engine.entry import UserError
from vlp_methods.engine.gradients import InParts, pieces, shares
from vlp_methods.engine.wrap import Alone

COMMON = ("contrast=1", "dropout=0", "steps=6", "save.every=100", "boxes=true")
RESUMED = ("contrast=1", "dropout=0.5", "parts=2", "accumulate=2", "steps=6", "save.every=100")


def close(one, two):
    assert len(one) == len(two) > 0
    for (_, left, *_), (_, right, *_) in zip(one, two, strict=True):
        left, right = dict(left), dict(right)
        assert left.keys() == right.keys()
        for name, value in left.items():
            assert math.isclose(
                float.fromhex(value), float.fromhex(right[name]), rel_tol=2e-5, abs_tol=1e-6
            ), name


def test_a_run_in_parts_is_the_run_in_one_and_not_that_of_small_batches(toy, tmp_path):
    assert toy.train("toy/tiny", *COMMON, "--run", tmp_path / "one") == 0
    assert toy.train("toy/tiny", *COMMON, "parts=3", "--run", tmp_path / "parts") == 0
    close(toy.losses(tmp_path / "one"), toy.losses(tmp_path / "parts"))
    small = (*COMMON, "accumulate=2", "data.batch=4")
    assert toy.train("toy/tiny", *small, "--run", tmp_path / "small") == 0
    with pytest.raises(AssertionError):  # accumulation compares the rows of half a batch only
        close(toy.losses(tmp_path / "one"), toy.losses(tmp_path / "small"))


def test_two_ranks_in_parts_are_one_rank_in_one(toy, tmp_path):
    assert toy.train("toy/tiny", *COMMON, "--run", tmp_path / "one") == 0
    done = toy.call("toy/tiny", *COMMON, "parts=2", "--nproc", "2", "--run", tmp_path / "two")
    assert done.returncode == 0, done.stderr
    close(toy.losses(tmp_path / "one"), toy.losses(tmp_path / "two"))


def test_resumed_to_the_bit(toy, tmp_path, monkeypatch):
    assert toy.train("toy/tiny", *RESUMED, "--run", tmp_path / "whole") == 0
    monkeypatch.setenv("TOY_STOP_AFTER", "3")
    assert toy.train("toy/tiny", *RESUMED, "--run", tmp_path / "stopped") == 75
    monkeypatch.delenv("TOY_STOP_AFTER")
    assert toy.train("toy/tiny", *RESUMED, "--run", tmp_path / "stopped") == 0
    same(toy, tmp_path)


def test_two_ranks_resume_to_the_bit(toy, tmp_path):
    words = ("toy/tiny", *RESUMED, "--nproc", "2", "--run")
    assert toy.call(*words, tmp_path / "whole").returncode == 0
    toy.environment = {**toy.environment, "TOY_STOP_AFTER": "3"}
    assert toy.call(*words, tmp_path / "stopped").returncode == 75
    del toy.environment["TOY_STOP_AFTER"]
    assert toy.call(*words, tmp_path / "stopped").returncode == 0
    same(toy, tmp_path)


def same(toy, folder):
    assert toy.losses(folder / "stopped") == toy.losses(folder / "whole")
    last = "checkpoints/step-00000006/model.safetensors"
    assert (folder / "stopped" / last).read_bytes() == (folder / "whole" / last).read_bytes()


def test_more_parts_than_rows_are_refused(toy, tmp_path, capsys):
    assert toy.train("toy/tiny", "parts=9", "--dry-run") == 2
    assert "parts=9: a batch of this rank has 8 rows" in capsys.readouterr().err


class States(NamedTuple):
    features: Tensor
    frozen: Tensor
    nothing: Tensor | None = None


class Contrast(nn.Module):
    """Dropout in the encoder, a learned temperature, a state without gradient."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(5, 8), nn.GELU(), nn.Dropout(0.3), nn.Linear(8, 4))
        self.frozen = nn.Linear(5, 4).requires_grad_(False)
        self.temperature = nn.Parameter(torch.tensor(0.3))
        self.calls = 0

    def encode(self, batch) -> States:
        self.calls += 1
        return States(self.encoder(batch.x), self.frozen(batch.x))

    def objective(self, states, parts):
        logits = states.features @ states.frozen.t() / self.temperature
        yield {"contrast": nn.functional.cross_entropy(logits, torch.arange(len(logits)))}
        for piece in pieces(map(len, parts)):
            yield {"size": piece.share * states.features[piece.rows].square().mean()}

    def forward(self, batch):
        return {}


class Rows(NamedTuple):
    x: Tensor

    def to(self, device):
        return self

    def __len__(self):
        return len(self.x)

    def split(self, parts):
        return [Rows(x) for x in self.x.tensor_split(parts)]


HOW = {
    "device": torch.device("cpu"),
    "autocast": lambda: torch.autocast("cpu", enabled=False),
    "scale": lambda loss: loss,
}


def test_both_passes_of_the_encoders_draw_the_same():
    torch.manual_seed(0)
    task = Contrast().double()
    batch = Rows(torch.randn(7, 5, dtype=torch.float64))
    seen = []
    task.encoder[2].register_forward_hook(lambda module, inputs, output: seen.append(output.detach() == 0))
    losses = InParts(Alone(task), 3, **HOW)(batch, count=1, last=True, unused=(), seed=5)
    assert task.calls == 6
    first, second = torch.cat(seen[:3]), torch.cat(seen[3:])
    assert torch.equal(first, second) and first.any() and not torch.equal(first[:2], first[3:5])

    # The same masks in one pass: the gradient is that of the whole.
    hidden = task.encoder[1](task.encoder[0](batch.x)) * ~first / 0.7
    states = States(task.encoder[3](hidden), task.frozen(batch.x))
    names = [name for name, p in task.named_parameters() if p.requires_grad]
    parameters = [p for p in task.parameters() if p.requires_grad]
    wanted = {}
    for piece in task.objective(states, [batch]):
        wanted |= piece
    gradients = torch.autograd.grad(sum(wanted.values()), parameters)
    for name, parameter, gradient in zip(names, parameters, gradients, strict=True):
        torch.testing.assert_close(parameter.grad, gradient, rtol=1e-10, atol=1e-12, msg=name)
    for name, loss in wanted.items():
        torch.testing.assert_close(losses[name], loss.detach(), rtol=1e-10, atol=1e-12)


def test_a_task_that_cannot_be_divided_is_named():
    with pytest.raises(UserError, match="parts=2: this task compares no rows"):
        InParts(Alone(nn.Linear(2, 2)), 2, **HOW)


def test_the_generator_of_the_update_goes_on_where_it_was():
    """What the objective draws, such as hard negatives, is what it would draw in one."""
    task, batch = Contrast(), Rows(torch.randn(6, 5))
    torch.manual_seed(1)
    InParts(Alone(task), 2, **HOW)(batch, count=1, last=True, unused=(), seed=5)
    after = torch.rand(1)
    torch.manual_seed(1)
    assert torch.equal(after, torch.rand(1))


def test_shares_are_those_of_what_is_counted():
    assert [share.item() for share in shares([torch.tensor(1), torch.tensor(3)])] == [0.25, 0.75]
    assert [share.item() for share in shares([torch.tensor(0), torch.tensor(0)])] == [0, 0]
    assert pieces([2, 3]) == [(0, slice(0, 2), 0.4), (1, slice(2, 5), 0.6)]
