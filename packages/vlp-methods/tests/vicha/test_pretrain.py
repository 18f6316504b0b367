"""ViCHA pre-training through `vlp-train`: data, objective, teacher, queue, engine, retrieval test and export
together."""

import itertools
import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from vlp_core import models
from vlp_core.recipe import RecipeError
from vlp_methods.builders.teacher import Momentum
from vlp_methods.engine.entry import load
from vlp_methods.sections.teacher import QueueTeacher

WITHOUT = {
    "concepts": ("model.concepts=null", "data.concepts=null"),
    "hierarchy": ("model.hierarchy=null",),
    "masked_image": ("model.masked_image=null",),
}
LOSSES = {"itc", "itm", "mlm", "hidden", "mim"}
ALBEF = tuple(option for options in WITHOUT.values() for option in options)


def checkpoint(run: Path, step: int) -> dict[str, Tensor]:
    return load_file(run / "checkpoints" / f"step-{step:08d}" / "model.safetensors")


def reported(run: Path) -> set[str]:
    line = json.loads((run / "metrics.jsonl").read_text().splitlines()[0])
    return set(line["losses"]) - {"loss", "grad_norm"}


def test_run_ends_with_retrieval_image_and_a_model_that_loads(train, tiny, tmp_path):
    run = tmp_path / "run"
    assert train(*tiny, "steps=3", "--run", run) == 0
    assert reported(run) == LOSSES
    scores = json.loads((run / "eval" / "step-00000003.json").read_text())
    assert {"dual/tr_r1", "dual/ir_r1", "reranked/tr_r1", "reranked/ir_r1"} <= set(scores)
    assert (run / "eval" / "step-00000003" / "retrieval.png").stat().st_size > 1000
    loaded = models.load(run / "export")
    assert (loaded.family, loaded.stage) == ("vicha", "pretrain")
    assert (loaded.view["kind"], loaded.view["size"]) == ("squash", 64)
    assert loaded.settings["concepts"]["max_tokens"] == 40
    weights = checkpoint(run, 3)
    for name, tensor in loaded.model.state_dict().items():
        assert torch.equal(tensor, weights[f"model.{name}"]), name


@pytest.mark.parametrize("left_out", [*WITHOUT, "all"])
def test_every_addition_can_be_left_out(train, tiny, tmp_path, left_out):
    """And the model is then without its parts, so that nothing is trained in vain."""
    options = ALBEF if left_out == "all" else WITHOUT[left_out]
    run = tmp_path / "run"
    assert train(*tiny, *options, "steps=1", "data.test=null", "--run", run) == 0
    gone = {"hierarchy": {"hidden"}, "masked_image": {"mim"}, "all": {"hidden", "mim"}}.get(left_out, set())
    assert reported(run) == LOSSES - gone
    names = set(load_file(run / "export" / "model.safetensors"))
    parts = {
        "concepts": "vision.concepts.",
        "hierarchy": "vision_proj_hidden.",
        "masked_image": "masked_image.",
    }
    for addition, part in parts.items():
        assert any(name.startswith(part) for name in names) == (left_out not in (addition, "all")), addition


@pytest.mark.parametrize(
    "options",
    [
        ("model.masked_image.by=fusion",),
        ("model.masked_image.by=both",),
        ("model.concepts.layers=0",),
        ("model.concepts.place=last",),
        ("model.concepts.visible_padding=false",),
        ("model.hierarchy={levels: 2, weights: [1.0, 0.5], targets: as_released}",),
        ("data.masking={kind: spans, max_masks: 4}",),
        ("precision=bf16",),
    ],
)
def test_every_switch_trains_and_gives_a_gradient_to_all_that_is_trained(train, tiny, tmp_path, options):
    """On two ranks, where DDP stops the run at a parameter without gradient."""
    words = (*tiny, *options, "steps=2", "data.test=null", "schedule.warmup_steps=0")
    assert train(*words, "--nproc", 2, "--run", tmp_path / "run") == 0
    assert reported(tmp_path / "run") == LOSSES


def test_teacher_follows_and_queue_takes_the_batch(train, tiny, tmp_path):
    """Each update moves the teacher once, before it teaches, and puts one batch of all ranks into the
    queue."""
    options = (
        "data.test=null",
        "save.every=1",
        "save.keep=9",
        "schedule.warmup_steps=0",
        "teacher.momentum=0.5",
    )
    run = tmp_path / "run"
    assert train(*tiny, *options, "steps=3", "--run", run) == 0
    states = [checkpoint(run, step) for step in (1, 2, 3)]
    for before, after in itertools.pairwise(states):
        for name in before:
            if name.startswith("momentum.teacher."):
                student = before[name.replace("momentum.teacher.", "model.", 1)]
                torch.testing.assert_close(after[name], torch.lerp(before[name], student, 0.5))
    assert [state["queue.pointer"].item() for state in states] == [8, 16, 24]
    assert torch.equal(states[1]["queue.image"][:8], states[0]["queue.image"][:8])
    assert not torch.equal(states[1]["queue.image"][8:16], states[0]["queue.image"][8:16])
    assert not any(
        "itm_head" in name or "hidden" in name for name in states[0] if name.startswith("momentum.")
    )


def test_accumulated_batches_move_the_teacher_once(train, tiny, tmp_path):
    options = (
        "data.test=null",
        "save.every=1",
        "schedule.warmup_steps=0",
        "teacher.momentum=0.5",
        "accumulate=2",
    )
    run = tmp_path / "run"
    assert train(*tiny, *options, "steps=2", "--run", run) == 0
    before, after = checkpoint(run, 1), checkpoint(run, 2)
    name = "text_proj.weight"
    expected = torch.lerp(before[f"momentum.teacher.{name}"], before[f"model.{name}"], 0.5)
    torch.testing.assert_close(after[f"momentum.teacher.{name}"], expected)
    assert after["queue.pointer"].item() == 32 % 32
    assert before["queue.pointer"].item() == 16


def test_alpha_rises_over_the_ramp():
    model = torch.nn.Linear(1, 1)
    momentum = Momentum(model, QueueTeacher(alpha=0.4, ramp_steps=4))
    alphas = []
    for step in range(6):
        momentum.before_forward(model, step)
        alphas.append(momentum.alpha)
    assert alphas == pytest.approx([0.0, 0.1, 0.2, 0.3, 0.4, 0.4])
    plain = Momentum(model, QueueTeacher(alpha=0.4))
    plain.before_forward(model, 0)
    assert plain.alpha == 0.4


def killed(options: tuple[str, ...], run: Path) -> None:
    """A run killed (-9) after its fourth step was saved."""
    process = subprocess.Popen(
        [sys.executable, "-m", "vlp_methods.cli", *options, "--run", str(run)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    deadline = time.monotonic() + 300
    while not (run / "checkpoints" / "step-00000004").is_dir():
        assert process.poll() is None, "it ended before it could be killed"
        assert time.monotonic() < deadline
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()


@pytest.mark.parametrize("ranks", [(), ("--nproc", "2")], ids=["one rank", "two ranks"])
def test_interrupted_and_resumed_equals_uninterrupted(train, tiny, tmp_path, losses, ranks):
    """Student, teacher, queue and optimizer, to the last bit; one rank is killed, two end early.

    The rate is constant: one that falls to 0 would be another one in the run of fewer steps, from its second
    update on.
    """
    options = (
        *tiny,
        *ranks,
        "steps=6",
        "save.every=2",
        "workers=1",
        "data.test=null",
        "teacher.ramp_steps=5",
        "schedule={kind: constant, warmup_steps: 0}",
    )
    assert train(*options, "--run", tmp_path / "whole") == 0
    run = tmp_path / "parts"
    if ranks:
        assert train(*options, "steps=4", "--run", run) == 0
    else:
        killed(options, run)
    assert train(*options, "--run", run) == 0
    assert losses(run) == losses(tmp_path / "whole")
    first, second = checkpoint(run, 6), checkpoint(tmp_path / "whole", 6)
    assert {name.split(".")[0] for name in second} == {"model", "momentum", "queue"}
    assert all(torch.equal(first[name], second[name]) for name in second)


def test_two_ranks_have_equal_queues_and_the_pointer_of_the_global_batch(train, tiny, tmp_path, losses):
    """The queue of rank 0 is saved and holds what both ranks put in."""
    options = (*tiny, "data.test=null", "model.text.dropout=0.0", "model.text.attention_dropout=0.0")
    for name, ranks in (("one", ()), ("two", ("--nproc", 2))):
        assert train(*options, *ranks, "steps=1", "--run", tmp_path / name) == 0
    one, two = (checkpoint(tmp_path / name, 1) for name in ("one", "two"))
    assert two["queue.pointer"].item() == 8
    # Rank r has every second sample, so the rows of the batch are the same in another order.
    for name in ("queue.image", "queue.text"):
        rows = [sorted(map(tuple, state[name][:8].round(decimals=4).tolist())) for state in (one, two)]
        torch.testing.assert_close(torch.tensor(rows[0]), torch.tensor(rows[1]), rtol=1e-3, atol=3e-4)
        assert torch.equal(one[name][8:], two[name][8:])


def test_training_starts_from_an_export_folder(train, tiny, pretrained, tmp_path):
    again = (
        *tiny,
        "data.test=null",
        "steps=1",
        "schedule.warmup_steps=10",
        "teacher.momentum=1.0",
        f"model.weights.model={pretrained}",
    )
    assert train(*again, "seed=7", "--run", tmp_path / "second") == 0
    # The first step of a warm-up has rate 0, so the run ends with the weights it started from.
    first, second = (
        load_file(folder / "model.safetensors") for folder in (pretrained, tmp_path / "second/export")
    )
    assert all(torch.equal(first[name], second[name]) for name in first)
    # Teacher and queue go on, too; with momentum 1 the teacher stays where it is.
    beside, state = load_file(pretrained / "momentum.safetensors"), checkpoint(tmp_path / "second", 1)
    for name, tensor in beside.items():
        if name.startswith("teacher."):
            assert torch.equal(state[f"momentum.{name}"], tensor), name
    assert beside["queue.pointer"].item() == 8
    assert state["queue.pointer"].item() == 16
    assert torch.equal(state["queue.text"][:8], beside["queue.text"][:8])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("model.concepts=null",), r"data\.concepts is given and model\.concepts is null"),
        (("data.concepts=null",), r"model\.concepts is given and data\.concepts is null"),
        (("optimizer.lr_scale=2",), r"optimizer\.lr_scale=2"),
        (("teacher.queue=32",), r"teacher\.queue=32 must hold a batch of all ranks, data\.train\.batch=64"),
        (("teacher.alpha=0",), r"ramp_steps=\d+ has no effect with alpha=0"),
        (("model.hierarchy.weights=[1.0]",), r"1 weights for levels=2"),
        (("model.masked_image.ratio=1",), r"ratio=1.* must lie between 0 and 1"),
        (
            ("model.vision={kind: swin, image_size: 48}", "model.concepts.place=last"),
            (
                r"model\.hierarchy "
                r"needs model\.vision\.kind=vit"
            ),
        ),
        (
            ("model.vision={kind: swin, image_size: 48}",),
            (
                r"model\.concepts\.place=first needs "
                r"model\.vision\.kind=vit"
            ),
        ),
    ],
)
def test_what_cannot_work_is_refused(options, message):
    with pytest.raises(RecipeError, match=message):
        load("vicha/shapes", options)
