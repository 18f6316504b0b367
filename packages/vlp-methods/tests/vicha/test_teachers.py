"""Teachers of ViCHA's tasks: there where a recipe has one, loaded or as in the released code, and part of the
loss."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from vlp_methods.builders.teacher import Momentum
from vlp_methods.sections.teacher import Teacher

SMALL = {
    "vqa": ("data.train.batch=4", "answers.candidates=4"),
    "entailment": ("data.train.batch=4",),
    "nlvr": ("data.train.batch=4",),
}
QUIET = (
    "data.val=null",
    "data.test=null",
    "evaluate={every: null, best: null}",
    "schedule={kind: constant, warmup_steps: 0}",
    "model.text.dropout=0.0",
    "model.text.attention_dropout=0.0",
)


@pytest.fixture
def first_loss(train, task, tmp_path, losses):
    """`first_loss(task, *words)`: the loss of the first step, and the checkpoint after the last one."""

    def run(name: str, *words: str, steps: int = 1) -> tuple[float, dict[str, Tensor]]:
        folder = tmp_path / f"run{len(list(tmp_path.iterdir()))}"
        options = (*task(f"vicha/shapes_{name}", *SMALL[name]), *QUIET, *words, f"steps={steps}")
        assert train(*options, "--run", folder) == 0
        loss = float.fromhex(dict(losses(folder)[0][1])["loss"])
        return loss, load_file(folder / "checkpoints" / f"step-{steps:08d}" / "model.safetensors")

    return run


@pytest.mark.parametrize("name", SMALL)
def test_teacher_is_a_part_of_the_run_only_where_the_recipe_has_one(first_loss, name):
    without, state = first_loss(name, "teacher=null")
    assert not any(key.startswith("momentum.") for key in state)
    kind = "kind: loaded, " if name == "nlvr" else ""
    taught, state = first_loss(name, f"teacher={{{kind}alpha: 0.5, momentum: 0.9}}")
    assert any(key.startswith("momentum.teacher.") for key in state)
    assert taught != without
    if name != "nlvr":  # its class head is fresh, and drawn anew
        ramped, _ = first_loss(name, "teacher={alpha: 0.5, momentum: 0.9, ramp_steps: 10}")
        assert ramped == pytest.approx(without, rel=1e-6)  # alpha is 0 at step 0


def test_questions_have_no_teacher_by_default(first_loss):
    _, state = first_loss("vqa")
    assert {key.partition(".")[0] for key in state} == {"model"}


def test_teacher_of_nlvr_starts_from_the_checkpoint_or_as_released(first_loss, pretrained: Path):
    trained = load_file(pretrained / "momentum.safetensors")["teacher.vision.encoder.positions"]
    for kind, same in (("loaded", True), ("as_released", False)):
        _, state = first_loss("nlvr", f"teacher={{kind: {kind}, momentum: 1.0}}", "seed=7")
        assert torch.equal(state["momentum.teacher.vision.encoder.positions"], trained) == same, kind


def test_teacher_gets_no_gradient_and_moves_once_per_call():
    model = torch.nn.Linear(2, 2)
    momentum = Momentum(model, Teacher(momentum=0.75))
    assert not any(parameter.requires_grad for parameter in momentum.parameters())
    before = momentum.teacher.weight.clone()
    with torch.no_grad():
        model.weight += 1.0
    momentum.before_forward(model, 3)
    torch.testing.assert_close(momentum.teacher.weight, before + 0.25)
