"""Features of the three encoders, and resized tables, equal those of the reference."""

import pytest
import torch
from torch.testing import assert_close
from vlp_core.models.xvlm.checkpoints import xvlm_vision_adapter
from vlp_core.vision import ClipVisionTransformer, SwinTransformer, VisionTransformer
from vlp_core.vision.positions import resize_position_table, resize_swin_table
from vlp_core.weights import load

PREFIX = "vision_encoder."


def has_features(case) -> bool:
    return (
        "vision_config" in case.config
        and {"image"} <= case.tensor_names("inputs")
        and "image_embeds" in case.tensor_names("outputs")
    )


def encoder(config: dict, state: dict) -> torch.nn.Module:
    """The encoder of an official config; sizes that the config leaves out are read off the tensors."""
    vision = config["vision_config"]
    if "window_size" in vision:
        return SwinTransformer(
            image_size=vision["image_res"],
            window=vision["window_size"],
            width=vision["embed_dim"],
            depths=vision["depths"],
            heads=vision["num_heads"],
        )
    if "num_hidden_layers" in vision:
        return ClipVisionTransformer(
            image_size=vision["image_res"],
            patch=vision["patch_size"],
            width=vision["vision_width"],
            depth=vision["num_hidden_layers"],
            heads=vision["num_attention_heads"],
            hidden=vision["intermediate_size"],
            activation=vision["hidden_act"],
            local_depth=vision["local_attn_depth"],
        )
    hidden = len(state[f"{PREFIX}blocks.0.mlp.fc1.weight"])
    return VisionTransformer(
        image_size=vision["image_res"],
        patch=vision["patch_size"],
        width=vision["embed_dim"],
        depth=vision["depth"],
        heads=vision["num_heads"],
        local_depth=vision["local_attn_depth"],
        mlp_ratio=hidden / vision["embed_dim"],
    )


def loaded(case) -> torch.nn.Module:
    state = case.tensors("weights")
    model = encoder(case.config, state)
    official = {name: tensor for name, tensor in state.items() if name.startswith(PREFIX)}
    load(model, official, xvlm_vision_adapter(model, source_prefix=PREFIX, prefix=""), resize=False)
    return model.eval()


@pytest.mark.golden("xvlm", has_features)
@pytest.mark.parametrize("gradient", [False, True], ids=["fused", "training"])
def test_features_equal_the_reference(case, gradient):
    model, inputs, expected = loaded(case), case.tensors("inputs"), case.tensors("outputs")
    with torch.set_grad_enabled(gradient):
        if "image_atts" not in inputs:
            assert_close(model(inputs["image"]), expected["image_embeds"], rtol=1e-4, atol=1e-5)
            return
        index = inputs["idx_to_group_img"]
        found = model.forward_regions(inputs["image"], index, inputs["image_atts"])
        assert_close(found.image_embeds, expected["image_embeds"], rtol=1e-4, atol=1e-5)
        assert_close(found.full_embeds[index], expected["image_embeds_fullatts"], rtol=1e-4, atol=1e-5)
        assert_close(found.full_embeds, model(inputs["image"]), rtol=1e-4, atol=1e-5)


@pytest.mark.golden(
    "xvlm", lambda case: any(name.startswith(PREFIX) for name in case.tensor_names("weights"))
)
def test_names_and_buffers_of_a_checkpoint_come_back(case):
    state = {name: t for name, t in case.tensors("weights").items() if name.startswith(PREFIX)}
    model = encoder(case.config, state)
    adapter = xvlm_vision_adapter(model, source_prefix=PREFIX, prefix="vision.")
    ours = adapter.to_ours(state)
    assert set(ours) == {f"vision.{name}" for name in model.state_dict()}
    back = adapter.to_source(ours)
    assert set(back) == set(state)
    for name, tensor in state.items():
        assert back[name].dtype == tensor.dtype
        assert torch.equal(back[name], tensor), name


@pytest.mark.golden(
    "xvlm", lambda case: any(name.startswith(("rel_", "vit_")) for name in case.tensor_names("outputs"))
)
def test_resized_tables_equal_the_reference(case):
    inputs, expected = case.tensors("inputs"), case.tensors("outputs")
    for name, table in inputs.items():
        kind, _, _, target = name.split("_")
        if kind == "rel":
            found = resize_swin_table(table, int(target))
        else:
            found = resize_position_table(table[0], int(target))[None]
        assert_close(found, expected[name], rtol=1e-4, atol=1e-5)


@pytest.mark.golden("xvlm", lambda case: "target_window_size" in case.config)
def test_tables_resized_at_loading_equal_the_reference(case):
    state = {name: t for name, t in case.tensors("weights").items() if name.startswith(PREFIX)}
    config = case.config
    vision = config["vision_config"] | {
        "window_size": config["target_window_size"],
        "image_res": config["target_image_res"],
    }
    model = encoder({"vision_config": vision}, state)
    adapter = xvlm_vision_adapter(model, source_prefix=PREFIX, prefix="")
    report = load(model, state, adapter)
    expected = adapter.to_ours(case.tensors("outputs"))
    assert expected
    mine = model.state_dict()
    for name, table in expected.items():
        assert_close(mine[name], table, rtol=1e-4, atol=1e-5)
    assert set(report.resized) == set(expected)
