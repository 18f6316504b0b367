"""Export folders that earlier versions wrote, each kind with a config.json as it was."""

import json

import pytest
import torch
from vlp_core import models
from vlp_core.weights import CheckpointError, write

VISION = {
    "kind": "vit",
    "image_size": 32,
    "patch": 16,
    "width": 8,
    "depth": 3,
    "heads": 2,
    "local_depth": 0,
}
TEXT = {
    "kind": "bert",
    "vocabulary": 9,
    "width": 8,
    "layers": 3,
    "heads": 2,
    "hidden": 8,
    "positions": 9,
    "fusion_layer": 2,
}
DECODER = {**TEXT, "layers": 1, "fusion_layer": 0}
DOUBLED = {**TEXT, "layers": 4}
BOTH = {"vision": VISION, "text": TEXT}
CONCEPTS = {"layers": 1, "place": "first", "visible_padding": True}
MASKED = {"by": "decoder", "ratio": 0.75, "width": 16, "depth": 1, "heads": 2}
ALL = ["contrast", "match", "masked_language", "hidden"]

EXPORTS = {
    "xvlm pretrain": ("xvlm", {**BOTH, "embed_width": 6, "temperature": 0.07}),
    "xvlm retrieval": ("xvlm", {**BOTH, "embed_width": 6, "heads": ["contrast", "match"]}),
    "xvlm boxes": ("xvlm", {**BOTH, "heads": ["boxes"]}),
    "xvlm nlvr_domain": (
        "nlvr",
        {"vision": VISION, "text": DOUBLED, "stage": "domain", "head": "mlp", "embed_width": 6},
    ),
    "xvlm nlvr": ("nlvr", {"vision": VISION, "text": DOUBLED, "stage": "fine_tune", "head": "mlp"}),
    "xvlm nlvr by defaults": ("nlvr", {"vision": VISION, "text": DOUBLED, "embed_width": 6}),
    "xvlm entailment": ("entailment", {**BOTH, "head": "mlp"}),
    "xvlm vqa": ("vqa", {**BOTH, "decoder": DECODER}),
    "xvlm captioning": ("captioning", BOTH),
    "vicha pretrain": (
        "vicha",
        {**BOTH, "concepts": CONCEPTS, "embed_width": 6, "heads": ALL, "levels": 2, "masked_image": MASKED},
    ),
    "vicha pretrain by defaults": ("vicha", {**BOTH, "embed_width": 6, "levels": 2}),
    "vicha retrieval": ("vicha", {**BOTH, "concepts": CONCEPTS, "heads": ["contrast", "match"]}),
    "vicha nlvr_domain": (
        "nlvr",
        {**BOTH, "text": DOUBLED, "concepts": CONCEPTS, "stage": "domain", "head": "relu", "embed_width": 6},
    ),
    "vicha nlvr": (
        "nlvr",
        {**BOTH, "text": DOUBLED, "concepts": CONCEPTS, "stage": "fine_tune", "head": "relu"},
    ),
    "vicha entailment": ("entailment", {**BOTH, "concepts": CONCEPTS, "head": "relu", "classes": 4}),
    "vicha entailment by defaults": ("entailment", BOTH),
    "vicha vqa": ("vqa", {**BOTH, "concepts": CONCEPTS, "decoder": DECODER}),
    "vicha captioning": ("captioning", {**BOTH, "concepts": CONCEPTS}),
}


def names(model: torch.nn.Module) -> set[str]:
    return {key.split(".")[0] for key in model.state_dict()}


PARTS = {
    "xvlm pretrain": {"temperature", "vision_proj", "text_proj", "itm_head", "mlm_head", "bbox_head"},
    "xvlm retrieval": {"temperature", "vision_proj", "text_proj", "itm_head"},
    "xvlm boxes": {"bbox_head"},
    "nlvr_domain": {"vision_proj", "ta_head"},
    "nlvr": {"cls_head"},
    "entailment": {"cls_head"},
    "vqa": {"decoder", "lm_head"},
    "captioning": {"lm_head"},
    "vicha pretrain": {"temperature", "vision_proj", "text_proj", "itm_head", "mlm_head"}
    | {"vision_proj_hidden", "text_proj_hidden"},
    "vicha retrieval": {"temperature", "vision_proj", "text_proj", "itm_head"},
}
"""Parts beside the encoders that the version of then gave a model of a stage."""


@pytest.mark.parametrize("kind", EXPORTS)
def test_an_earlier_export_opens_as_what_it_was(kind, tmp_path):
    family, stage = kind.split()[:2]
    model, arguments = EXPORTS[kind]
    text = {"kind": "bert", "files": ["vocab.txt"], "max_tokens": 40, "max_words": 30, "separator": False}
    config = {
        "model": model,
        "arguments": arguments,
        "image_size": 32,
        "text": text,
        "concepts": {"pad": "max"},
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    found = models.describe(tmp_path)
    assert (found.family, found.stage) == (family, stage)
    assert found.view == {"kind": "squash", "size": 32}
    assert found.reading == {
        "tokenizer": {"kind": "wordpiece", "files": [str(tmp_path / "vocab.txt")]},
        "vocabulary": 9,
        "max_tokens": 40,
        "max_words": 30,
        "separator": False,
        "clean": "question" if stage == "vqa" else "caption",
    }
    assert found.settings == {"concepts": {"pad": "max"}}
    torch.manual_seed(0)
    written = models.create(found.family, found.stage, **found.arguments)
    expected = PARTS.get(f"{family} {stage}") or PARTS[stage]
    if kind == "vicha pretrain":
        expected = expected | {"masked_image"}
    assert names(written) == expected | {"vision", "text"}
    if "cls_head" in expected:
        middle = {"mlp": "LayerNorm", "relu": "ReLU"}["mlp" if family == "xvlm" else "relu"]
        assert type(written.cls_head[1]).__name__ == middle
        assert written.cls_head[-1].out_features == {"nlvr": 2}.get(stage, arguments.get("classes", 3))
    write(tmp_path / "model.safetensors", written.state_dict())
    loaded = models.load(tmp_path)
    state = loaded.model.state_dict()
    assert all(torch.equal(x, state[key]) for key, x in written.state_dict().items())
    assert state.keys() == written.state_dict().keys()
    again = models.create(family, stage, **found.arguments)
    models.start_from(again, tmp_path, family=family, stage=stage)
    assert all(torch.equal(x, state[key]) for key, x in again.state_dict().items())


def test_settings_that_an_earlier_export_lacks_come_from_its_arguments(tmp_path):
    roberta = {**BOTH, "text": {**TEXT, "kind": "roberta"}}
    (tmp_path / "config.json").write_text(json.dumps({"model": "captioning", "arguments": roberta}))
    found = models.describe(tmp_path)
    assert found.view == {"kind": "squash", "size": 32}
    assert found.reading["tokenizer"] == {"kind": "roberta", "files": []}
    assert found.settings == {}


def test_an_earlier_model_of_nobody_is_refused(tmp_path):
    config = {"model": "nlvr", "arguments": {**BOTH, "head": "linear"}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(
        CheckpointError, match="an earlier version, and its model 'nlvr' belongs to no installed"
    ):
        models.load(tmp_path)
