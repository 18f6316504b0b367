"""X-VLM with visual concepts: an option of its recipes, behind a Swin or among the patches of a ViT."""

import json

import pytest
from safetensors.torch import load_file
from vlp_core import models
from vlp_core.recipe import RecipeError
from vlp_methods.engine.entry import load

VIT = "model.vision={kind: vit, image_size: 64, patch: 32, width: 16, depth: 2, heads: 2, local_depth: 1}"
READ = "data.concepts={max_tokens: 40, share: 0.3}"


@pytest.mark.parametrize(
    "options",
    [("model.concepts={layers: 1, place: last}",), (VIT, "model.concepts={layers: 1, place: first}")],
    ids=["swin", "vit"],
)
def test_pretraining_sees_concepts_in_both_streams(train, tiny, tmp_path, options):
    run = tmp_path / "run"
    words = (*tiny, *options, READ, "data.regions.share=1.0", "schedule.warmup_steps=0")
    assert train(*words, "steps=2", "--run", run) == 0
    assert "reranked/tr_r1" in json.loads((run / "eval/step-00000002.json").read_text())
    loaded = models.load(run / "export")
    assert loaded.settings["concepts"]["share"] == 0.3
    # The encoder of the words learns: its weights move from one step to the next.
    assert train(*words, "steps=1", "data.test=null", "--run", tmp_path / "first") == 0
    one, two = (load_file(folder / "export/model.safetensors") for folder in (tmp_path / "first", run))
    name = "vision.concepts.project.weight"
    assert not one[name].equal(two[name])


def test_a_task_goes_on_with_them(train, tiny, task, tmp_path):
    concepts = ("model.concepts={layers: 1, place: last}", READ)
    assert train(*tiny, *concepts, "steps=1", "data.test=null", "--run", tmp_path / "first") == 0
    export = tmp_path / "first" / "export"
    small = ("model.embed_width=16", "data.train.batch=6", "retrieval.rerank=3", "data.test=null")
    options = ("evaluate={every: null, best: null}", "data.val=null", "steps=1", "schedule.warmup_steps=10")
    words = task("xvlm/shapes_retrieval", *small, *concepts, *options, start=export)
    assert train(*words, "--run", tmp_path / "second") == 0
    # The first step of a warm-up has rate 0, so the run ends with the weights it started from.
    before, after = (load_file(tmp_path / run / "export/model.safetensors") for run in ("first", "second"))
    assert any(name.startswith("vision.concepts.") for name in after)
    assert all(before[name].equal(after[name]) for name in after)


def test_swin_has_no_place_among_its_patches():
    swin = "model.vision={kind: swin, image_size: 48}"
    with pytest.raises(RecipeError, match=r"place=first needs model\.vision\.kind=vit"):
        load("xvlm/shapes", [swin, "model.concepts.layers=1", "data.concepts.max_tokens=40"])
