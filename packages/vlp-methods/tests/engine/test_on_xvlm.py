"""The options of the engine on one of our methods: X-VLM pre-training, as small as a test can bear."""

import pytest
import torch
from safetensors.torch import load_file

OPTIONS = {
    "everything that trains": (
        "freeze=['^model\\.vision\\.', 'text\\.layers\\.0\\.']",
        "eval_mode=['^model\\.vision$']",
        "average={decay: 0.9}",
        (
            "optimizer={variant: muon, lr: 1e-3, lr_samples: 4, not_muon: [mlm, embedding], "
            "rules: [{pattern: itm_head, schedule: own}]}"
        ),
        "schedules={own: {kind: constant, warmup_steps: 1, warmup_edge: before}}",
        "accumulate=2",
    ),
    "lengths": (
        "save.every={samples: 8}",
        "report.every={samples: 8}",
        "optimizer={variant: sgd, lr: 0.01, momentum: 0.9, rules: [{below_axes: 2, decay: false}]}",
        "optimizer.layer_decay=[{rate: 0.5, blocks: 'vision\\.stages\\.(\\d)', first: ['vision\\.patch']}]",
    ),
}


@pytest.mark.parametrize("name", OPTIONS)
def test_stopped_and_continued_equals_one_go(tiny_of, train, losses, tmp_path, name):
    words = (*tiny_of("xvlm"), "data.test=null", "schedule={kind: constant}", *OPTIONS[name])
    assert train(*words, "steps=4", "--run", tmp_path / "whole") == 0
    assert train(*words, "steps=2", "--run", tmp_path / "parts") == 0
    assert train(*words, "steps=4", "--run", tmp_path / "parts") == 0
    assert losses(tmp_path / "parts") == losses(tmp_path / "whole")
    checkpoints = [tmp_path / run / "checkpoints/step-00000004" for run in ("whole", "parts")]
    files = {path.name for path in checkpoints[0].glob("*.safetensors")}
    assert ("average.safetensors" in files) == (name != "lengths")
    for file in files:
        whole, parts = (load_file(path / file) for path in checkpoints)
        assert whole.keys() == parts.keys()
        assert all(torch.equal(whole[key], parts[key]) for key in whole), file


def test_a_frozen_encoder_does_not_move_and_has_no_state(tiny_of, train, tmp_path):
    run = tmp_path / "run"
    words = (*tiny_of("xvlm"), "data.test=null", "steps=2", "save.every=1")
    assert train(*words, "freeze=['^model\\.vision\\.']", "--run", run) == 0
    first, second = (load_file(run / f"checkpoints/step-0000000{step}/model.safetensors") for step in (1, 2))
    changed = {name for name in first if not torch.equal(first[name], second[name])}
    assert changed
    assert not any(name.startswith("model.vision.") for name in changed)
    state = load_file(run / "checkpoints/step-00000002/optimizer.safetensors")
    assert not any("model.vision." in name for name in state)


def test_the_box_head_has_no_part_in_image_batches(tiny_of, train, tmp_path):
    """Without regions nothing trains it, although every parameter of the model has a rule."""
    run = tmp_path / "run"
    words = (*tiny_of("xvlm"), "data.test=null", "data.regions=null", "steps=2", "save.every=1")
    assert train(*words, "--run", run) == 0
    first, second = (load_file(run / f"checkpoints/step-0000000{step}/model.safetensors") for step in (1, 2))
    heads = [name for name in first if "bbox_head" in name]
    assert heads
    assert all(torch.equal(first[name], second[name]) for name in heads)
