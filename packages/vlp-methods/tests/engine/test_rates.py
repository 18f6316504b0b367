"""Optimizers, what differs between parameters, and learning rates over time."""

import math

import pytest
import torch
from safetensors.torch import load_file

SHORT = ("steps=8", "dropout=0", "save.every=1", "save.keep=100")


def weights(run, step):
    return load_file(run / f"checkpoints/step-{step:08d}/model.safetensors")


def rates(toy, run):
    return [line["lr"] for line in toy.reports(run) if "lr" in line]


def resumes_to_the_bit(toy, tmp_path, monkeypatch, *words):
    """Stops the toy in the middle, continues, and compares with a run in one go."""
    assert toy.train("toy/tiny", *words, "--run", tmp_path / "whole") == 0
    monkeypatch.setenv("TOY_STOP_AFTER", "5")
    assert toy.train("toy/tiny", *words, "--run", tmp_path / "stopped") == 75
    monkeypatch.delenv("TOY_STOP_AFTER")
    assert toy.train("toy/tiny", *words, "--run", tmp_path / "stopped") == 0
    assert toy.losses(tmp_path / "stopped") == toy.losses(tmp_path / "whole")
    for name in ("model", "optimizer"):
        file = f"checkpoints/step-00000008/{name}.safetensors"
        assert (tmp_path / "stopped" / file).read_bytes() == (tmp_path / "whole" / file).read_bytes()


@pytest.mark.parametrize(
    "optimizer",
    [
        "{variant: sgd, lr: 0.1, momentum: 0.9, nesterov: true}",
        "{variant: sgd, lr: 0.1}",
        "{variant: adafactor, lr: 0.01}",
        "{variant: muon, lr: 0.01, not_muon: [^out]}",
    ],
)
def test_optimizers_train_and_resume_to_the_bit(toy, tmp_path, monkeypatch, optimizer):
    resumes_to_the_bit(toy, tmp_path, monkeypatch, *SHORT, f"optimizer={optimizer}")
    one, last = (weights(tmp_path / "whole", step)["body.0.weight"] for step in (1, 8))
    assert not torch.equal(one, last)


def test_muon_takes_the_matrices(toy, tmp_path):
    run = tmp_path / "run"
    assert (
        toy.train("toy/tiny", *SHORT, "optimizer={variant: muon, lr: 0.01, not_muon: [^out]}", "--run", run)
        == 0
    )
    names = load_file(run / "checkpoints/step-00000008/optimizer.safetensors").keys()
    muon = {name.partition("/")[2] for name in names if name.startswith("momentum_buffer/")}
    assert muon == {"body.0.weight", "body.3.weight", "head.weight"}
    adamw = {name.partition("/")[2] for name in names if name.startswith("exp_avg/")}
    assert adamw == {"body.0.bias", "body.3.bias", "out.weight", "out.bias", "tied.bias"}


@pytest.mark.parametrize(
    ("optimizer", "message"),
    [
        ("{variant: sgd, lr: 0.1, betas: [0.5, 0.5]}", "betas: variant=sgd has no such option"),
        ("{variant: torch, lr: 0.1, momentum: 0.9}", "momentum: variant=torch has no such option"),
        ("{variant: sgd, lr: 0.1, nesterov: true}", "nesterov=true needs a momentum"),
        ("{lr: 0.1, rules: [{pattern: '('}]}", "a rule says something"),
        ("{lr: 0.1, rules: [{pattern: '(', decay: false}]}", "pattern: '(' is no regular expression"),
        ("{lr: 0.1, rules: [{pattern: absent, decay: false}]}", "no trainable parameter matches 'absent'"),
        ("{lr: 0.1, rules: [{lr_scale: 1, schedule: slow}]}", "optimizer.rules: schedules has no slow"),
        ("{lr: 0.1, layer_decay: [{rate: 0.5, blocks: body}]}", "must have one group, that of the number"),
    ],
)
def test_an_option_without_effect_is_refused(toy, tmp_path, capsys, optimizer, message):
    assert toy.train("toy/tiny", f"optimizer={optimizer}", "--run", tmp_path / "run") == 2
    assert message in capsys.readouterr().err


def test_rules_of_a_recipe_come_before_those_of_the_method(toy):
    from toy_method.build import build
    from vlp_methods.engine import entry

    def groups(*words):
        job = build(entry.load("toy/tiny", words).settings)
        return {
            name: (group["lr"], group["weight_decay"], group.get("schedule"))
            for group in job.optimizer.param_groups
            for name in group["names"]
        }

    before = groups()
    assert before["head.weight"] == (0.02, 0.01, None)
    assert before["body.0.bias"] == (0.01, 0.0, None)
    after = groups(
        "optimizer.rules=[{pattern: ^head, lr_scale: 0.5}, {below_axes: 2, decay: true}, "
        "{pattern: ^out, schedule: flat}]",
        "schedules={flat: {kind: constant}}",
    )
    assert after["head.weight"] == (0.005, 0.01, None)
    assert after["body.0.bias"] == (0.01, 0.01, None)
    assert after["out.weight"] == (0.01, 0.01, "flat")
    layers = groups("optimizer.layer_decay=[{rate: 0.5, blocks: 'body\\.(\\d+)\\.'}]")
    assert layers["body.3.weight"][0] == 0.005
    assert layers["body.0.weight"][0] == 0.01 * 0.5**4
    assert layers["head.weight"][0] == 0.02


def test_groups_follow_schedules_of_their_own(toy, tmp_path, monkeypatch):
    words = (
        *SHORT,
        "optimizer={variant: sgd, lr: 0.1, weight_decay: 0, rules: [{pattern: ^out, schedule: late}]}",
        "schedules={late: {kind: constant, warmup_steps: 7}}",
        "schedule={kind: constant, warmup_steps: 0}",
    )
    resumes_to_the_bit(toy, tmp_path, monkeypatch, *words)
    # The rate of the first step is 0 for these alone: nothing of theirs has moved.
    assert toy.train("toy/tiny", *words, "steps=1", "seed=0", "--run", tmp_path / "one") == 0
    after = weights(tmp_path / "one", 1)
    from toy_method.build import Task
    from vlp_methods.engine import entry

    torch.manual_seed(0)
    before = Task(entry.load("toy/tiny", ("dropout=0",)).settings).state_dict()
    moved = {
        name
        for name in ("out.weight", "out.bias", "head.weight")
        if not torch.equal(after[name], before[name])
    }
    assert moved == {"head.weight"}


def test_rate_by_the_size_of_an_update(toy, tmp_path, capsys, monkeypatch):
    words = (*SHORT, "optimizer.lr_samples=4", "accumulate=2", "schedule={kind: cosine, min_lr: 0.001}")
    resumes_to_the_bit(toy, tmp_path, monkeypatch, *words)
    assert "optimizer.lr: 0.01 * 16 samples / 4 is 0.04" in capsys.readouterr().out
    found = rates(toy, tmp_path / "whole")
    assert found[0] == 0.04
    assert found[4] == pytest.approx(0.001 + 0.039 * (1 + math.cos(math.pi / 2)) / 2)


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        (
            "{kind: linear, warmup_steps: 2, min_lr: 0.004}",
            [0, 0.005, 0.01, 0.009, 0.008, 0.007, 0.006, 0.005],
        ),
        ("{kind: polynomial, power: 2}", [0.01 * (1 - i / 8) ** 2 for i in range(8)]),
        (
            "{kind: constant, warmup_steps: 2, warmup_edge: before, cooldown_steps: 0.5, min_lr: 0.002}",
            [0.005, 0.01, 0.01, 0.01, 0.01, 0.008, 0.006, 0.004],
        ),
        # 24 samples in batches of 8: three steps an epoch; staircase of 100 steps, cut off by the epoch.
        (
            "{kind: epochs, steps_per_epoch: {epochs: 1}, warmup_steps: 100, warmup_lr: 1e-3, min_lr: 2e-3}",
            [*[0.001] * 3, *[0.008] * 3, *[0.004] * 2],
        ),
        ("{kind: constant, warmup_steps: 4, warmup_lr: 0.002}", [0.002, 0.004, 0.006, 0.008, *[0.01] * 4]),
    ],
)
def test_schedules_of_a_recipe(toy, tmp_path, schedule, expected):
    run = tmp_path / "run"
    assert toy.train("toy/tiny", *SHORT, f"schedule={schedule}", "--run", run) == 0
    assert rates(toy, run) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("schedule", "message"),
    [
        ("{kind: cosine, cooldown_steps: 3}", "only a constant rate cools down"),
        ("{kind: constant, min_lr: 0.1}", "a constant rate does not fall"),
        ("{kind: linear, power: 2}", "only kind=polynomial and a cool-down have one"),
        ("{kind: linear, warmup_lr: 1e-6}", "there is no warm-up"),
    ],
)
def test_a_schedule_with_an_option_of_another_is_refused(toy, tmp_path, capsys, schedule, message):
    assert toy.train("toy/tiny", f"schedule={schedule}", "--run", tmp_path / "run") == 2
    assert message in capsys.readouterr().err
