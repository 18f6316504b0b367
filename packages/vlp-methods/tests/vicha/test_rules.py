"""Groups of parameters of ViCHA."""

import json
from collections.abc import Iterable

import pytest
from vlp_core import models
from vlp_core.models.vicha import checkpoints as vicha
from vlp_core.optim import parameter_groups
from vlp_methods.vicha.rules import parameter_rules

NAMES = (*(f"visual_encoder.blocks.{block}." for block in range(6)), "kw_encoder.encoder.layer.0.")
"""Official names that show depths: of image encoder and concepts."""
TASKS = ("pretrain", "retrieval", "vqa", "entailment", "nlvr_domain", "nlvr")


def full_depth(keys: Iterable[str]) -> dict:
    """Arguments of a narrow pre-training model with the layers that official names have."""
    return {
        "vision": {
            "kind": "vit",
            "image_size": 32,
            "patch": 8,
            "width": 8,
            "depth": vicha.count(keys, r"visual_encoder\.blocks\.(\d+)\."),
            "heads": 2,
            "local_depth": 0,
        },
        "text": {
            "vocabulary": 9,
            "width": 8,
            "layers": 12,
            "heads": 2,
            "hidden": 8,
            "positions": 9,
            "fusion_layer": 6,
        },
        "concepts": {"layers": vicha.count(keys, r"kw_encoder\.encoder\.layer\.(\d+)\.")},
        "masked_image": {"width": 16, "heads": 2},
        "embed_width": 6,
        "heads": ["contrast", "match", "masked_language", "hidden"],
    }


@pytest.mark.golden("vicha", lambda case: case.path.is_file() and case.path.stem == "param_groups")
def test_every_parameter_of_pretraining_decays_as_in_the_reference(case):
    expected = json.loads(case.path.read_text())["pretrain"]
    names = [*expected["weight_decay_in_order"], *expected["no_weight_decay_in_order"]]
    model = models.create("vicha", "pretrain", **full_depth(names))
    groups = parameter_groups(model, lr=1.0, weight_decay=0.02, rules=parameter_rules())
    found = {}
    for group in groups:
        members = dict(zip(group["names"], group["params"], strict=True))
        source = vicha.vicha_adapter(model).to_source(members, gradients=True)
        found |= dict.fromkeys(source, group["weight_decay"])
    assert found == {
        **dict.fromkeys(expected["weight_decay_in_order"], 0.02),
        **dict.fromkeys(expected["no_weight_decay_in_order"], 0.0),
    }


def test_vectors_decay_only_where_the_reference_has_a_table():
    for stage in TASKS:
        model = models.create("vicha", stage, **models.derive("vicha", stage, full_depth(NAMES)))
        (decayed,) = [
            group["names"]
            for group in parameter_groups(model, lr=1.0, weight_decay=0.02, rules=parameter_rules())
            if group["weight_decay"]
        ]
        parameters = dict(model.named_parameters())
        vectors = {name.split(".")[-1] for name in decayed if parameters[name].ndim == 1}
        assert vectors <= {"class_token", "mask_token"}
        assert all(parameters[name].ndim == 1 for name in parameters.keys() - set(decayed))
