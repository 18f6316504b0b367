"""X-VLM with a backbone of timm: pre-training, regions included, and a task that goes on from its export."""

import json

import pytest
from vlp_core import models

VIT = (
    "model.vision={kind: timm, name: vit_tiny_patch16_224, image_size: 64, local_depth: 1, "
    "arguments: {depth: 2, embed_dim: 32, num_heads: 2}}"
)
CONVOLUTIONS = "model.vision={kind: timm, name: resnet10t, image_size: 64}"


@pytest.mark.parametrize("vision", [VIT, CONVOLUTIONS], ids=["vit", "resnet"])
def test_pretraining_and_a_task_on_a_backbone_of_timm(train, tiny, task, tmp_path, vision):
    run = tmp_path / "run"
    words = (*tiny, vision, "data.view.size=64", "data.regions.share=1.0", "schedule.warmup_steps=0")
    assert train(*words, "steps=2", "--run", run) == 0
    assert "reranked/tr_r1" in json.loads((run / "eval/step-00000002.json").read_text())
    loaded = models.load(run / "export")
    assert loaded.arguments["vision"]["kind"] == "timm"
    small = ("model.embed_width=16", "data.train.batch=6", "data.test=null", vision, "data.view.size=64")
    options = ("evaluate={every: null, best: null}", "data.val=null", "steps=1")
    words = task("xvlm/shapes_retrieval", *small, *options, start=run / "export")
    assert train(*words, "--run", tmp_path / "second") == 0


def test_what_an_architecture_does_not_permit_is_refused_by_name(train, tiny, tmp_path, capsys):
    vision = "model.vision={kind: timm, name: no_such_backbone, image_size: 64}"
    assert train(*tiny, vision, "--run", tmp_path / "run") == 2
    assert "no_such_backbone" in capsys.readouterr().err
