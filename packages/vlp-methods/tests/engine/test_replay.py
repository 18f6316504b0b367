"""A batch that was not finite is stored, and looked at again."""

import json
from collections import namedtuple
from dataclasses import dataclass

import pytest
import torch
from vlp_methods.engine import replay

Pair = namedtuple("Pair", "left right")


@dataclass
class Held:
    keys: tuple[str, ...]
    pair: Pair
    more: dict
    none: None = None


def test_a_batch_goes_to_disk_and_comes_back(tmp_path):
    from vlp_methods.engine.ranks import Ranks
    from vlp_methods.engine.step import NotFiniteError

    batch = Held(("a", "b"), Pair(torch.arange(3), [torch.ones(2, 2).T, 1.5]), {"mask": torch.tensor([True])})
    error = NotFiniteError("step 3", 3, "images", {0: batch.keys}, (batch, batch))
    replay.keep(tmp_path, error, Ranks("cpu"))
    (one, two) = replay.stored(tmp_path)[0]
    assert one.keys == two.keys == batch.keys
    assert type(one.pair) is Pair
    assert torch.equal(one.pair.left, batch.pair.left)
    assert torch.equal(one.pair.right[0], batch.pair.right[0])
    assert one.pair.right[1] == 1.5
    assert torch.equal(one.more["mask"], batch.more["mask"])
    assert one.none is None


@pytest.mark.parametrize("fault", ["nan_key", "nan_gradient_key"])
def test_the_failed_step_is_repeated_and_named(toy, tmp_path, capsys, fault):
    run = tmp_path / "run"
    words = ("toy/tiny", "save.every=2", f"faults.{fault}=images-5", "--run", run)
    assert toy.train(*words) == 1
    said = capsys.readouterr().err
    known = json.loads((run / "nonfinite.json").read_text())
    assert (known["stream"], known["ranks"]) == ("images", 1)
    before = sorted(path for path in run.rglob("*") if path.is_file())
    assert toy.train("replay", run) == 0
    output = capsys.readouterr().out
    step = known["step"]
    assert said.partition("vlp-train: ")[2].splitlines()[0] in output
    assert f"repeating steps {(step - 1) // 2 * 2 + 1} to {step - 1} on one rank, then step {step}" in output
    assert "rank 0, stream images: " in output
    assert "images-5" in output
    assert "gradients that are not finite: body.0.weight" in output
    # The same losses as in the run itself, to every digit that is shown: the step is the same.
    losses = said.partition("(")[2].partition(", loss")[0]
    assert f"losses: {losses}" in output
    assert sorted(path for path in run.rglob("*") if path.is_file()) == before


def test_a_run_that_was_finite_has_nothing_to_replay(toy, tmp_path, capsys):
    assert toy.train("toy/tiny", "steps=2", "--run", tmp_path / "run") == 0
    assert toy.train("replay", tmp_path / "run") == 2
    assert "no loss or gradient of it was NaN or infinite" in capsys.readouterr().err
    assert toy.train("replay", tmp_path / "elsewhere") == 2


def test_a_repaired_recipe_is_finite(toy, tmp_path, capsys):
    run = tmp_path / "run"
    assert toy.train("toy/tiny", "faults.nan_key=images-5", "--run", run) == 1
    assert toy.train("replay", run, "faults.nan_key=null") == 0
    assert "everything is finite this time" in capsys.readouterr().out


def test_each_rank_stores_its_own_batch(toy, tmp_path):
    run = tmp_path / "run"
    done = toy.call("toy/tiny", "faults.nan_key=images-3", "--nproc", "2", "--run", run)
    assert done.returncode == 1
    (rank,) = replay.stored(run)
    samples = json.loads((run / "nonfinite.json").read_text())["samples"]
    assert list(samples) == [str(rank)]
    again = toy.call("replay", run)
    assert again.returncode == 0, again.stderr
    assert f"rank {rank}, stream images: " in again.stdout
    assert "images-3" in again.stdout
