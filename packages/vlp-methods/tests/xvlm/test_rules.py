"""Groups of parameters of every official recipe of X-VLM."""

import json
import re

import pytest
import torch
from vlp_core import models
from vlp_core.models.xvlm import checkpoints as xvlm
from vlp_core.optim import parameter_groups
from vlp_core.weights import Checkpoint
from vlp_methods.xvlm.rules import parameter_rules


def meta_model(state: dict[str, torch.Tensor]) -> torch.nn.Module:
    """The model that a state of official names belongs to, without memory; numbers of heads do not show in
    shapes."""
    arguments = xvlm.infer_arguments(Checkpoint(state, {}), head_width=1)
    with torch.device("meta"):
        return models.create("xvlm", xvlm.FILES.stage(state), **arguments)


def count(names, pattern: str) -> int:
    return 1 + max((int(found[1]) for n in names if (found := re.match(pattern, n))), default=-1)


def small_arguments(names) -> dict:
    """Arguments of a model with these official parameter names; widths are made up, Swin's unlike the text's
    as in the releases."""
    if any(".relative_position_bias_table" in n for n in names):
        stages = count(names, r"vision_encoder\.layers\.(\d+)\.")
        depths = [count(names, rf"vision_encoder\.layers\.{i}\.blocks\.(\d+)\.") for i in range(stages)]
        vision = {
            "kind": "swin",
            "image_size": 4 * 2 ** (stages - 1),
            "window": 1,
            "width": 2,
            "depths": depths,
            "heads": [1] * stages,
        }
    else:
        clip = "vision_encoder.class_embedding" in names
        depth = count(names, r"vision_encoder\.(?:encoder\.layers|blocks)\.(\d+)\.")
        vision = {"image_size": 4, "patch": 4, "width": 4, "depth": depth, "heads": 1, "local_depth": 0}
        vision |= {"kind": "clip", "hidden": 4} if clip else {"kind": "vit"}
    found = xvlm.FILES.stage(dict.fromkeys(names, torch.empty(0)))
    roberta = any(".roberta." in n for n in names)

    def text(prefix: str) -> dict:
        layers = count(names, rf"{prefix}\.(?:bert\.|roberta\.)?encoder\.layer\.(\d+)\.")
        crossing = [int(f[1]) for n in names if (f := re.match(rf"{prefix}\..*layer\.(\d+)\.crossatt", n))]
        return {
            "kind": "roberta" if roberta else "bert",
            "vocabulary": 5,
            "width": 4,
            "layers": layers,
            "heads": 1,
            "hidden": 4,
            "positions": 5,
            "fusion_layer": min(crossing),
        }

    arguments = {"vision": vision, "text": text("text_decoder" if found == "captioning" else "text_encoder")}
    if found == "vqa":
        arguments["decoder"] = text("text_decoder")
    if found in ("pretrain", "retrieval", "boxes"):
        heads = {"contrast": "temp", "match": "itm_head.0.weight", "boxes": "bbox_head.0.weight"}
        arguments["heads"] = [head for head, key in heads.items() if key in names]
        arguments["heads"] += ["masked_language"] if found == "pretrain" else []
    return {"found": found, "arguments": arguments}


@pytest.mark.golden("xvlm", lambda case: case.has("param_groups.json"))
def test_every_parameter_is_in_the_group_of_the_reference(case):
    layouts = case.path.parent / "official_keys.json"
    shapes = json.loads(layouts.read_text()) if layouts.is_file() else {}
    for name, recipe in case.json("param_groups").items():
        expected = {key: recipe["groups"][group] for key, group in recipe["params"].items()}
        small = small_arguments(set(expected))
        model = models.create("xvlm", small["found"], **small["arguments"])
        optimizer = recipe["optimizer"]
        groups = parameter_groups(
            model,
            lr=optimizer["lr"],
            weight_decay=optimizer["weight_decay"],
            rules=parameter_rules(
                model,
                fresh_lr_scale=optimizer["lr_mult"],
                as_released=recipe["optimizer_built_on_ddp_wrapped_model"],
            ),
        )
        ours = {
            member: torch.full_like(parameter, number)
            for number, group in enumerate(groups)
            for member, parameter in zip(group["names"], group["params"], strict=True)
        }
        source = xvlm.xvlm_adapter(model).to_source(ours, gradients=True)
        found = {}
        for key, numbers in source.items():
            (number,) = numbers.unique().tolist()
            group = groups[int(number)]
            found[key] = {"weight_decay": group["weight_decay"], "lr": pytest.approx(group["lr"])}
        assert found == expected, name
        if name in shapes:
            full = meta_model({key: torch.empty(s, device="meta") for key, s in shapes[name].items()})
            assert sum(p.numel() for p in full.parameters()) == recipe["n_parameters"], name
