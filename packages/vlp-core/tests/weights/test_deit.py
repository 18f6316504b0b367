"""DeiT checkpoints, which share their layout with timm and X-VLM."""

import json
import math

import pytest
import torch
from torch.testing import assert_close
from vlp_core.vision import VisionTransformer
from vlp_core.vision.positions import resize_position_table
from vlp_core.weights import CheckpointError, load_vision, vision_adapter
from vlp_core.weights.deit import deit_adapter, load_deit

PREFIX = "vision_encoder."
SIZE = {"image_size": 32, "patch": 8, "width": 24, "depth": 2, "heads": 3, "local_depth": 1}


def make(*, seed: int = 0, **changes) -> VisionTransformer:
    torch.manual_seed(seed)
    return VisionTransformer(**SIZE | changes)


def test_both_directions_are_the_identity():
    ours = {f"vision.{name}": tensor for name, tensor in make().state_dict().items()}
    adapter = deit_adapter(source_prefix=PREFIX, prefix="vision.")
    source = adapter.to_source(ours)
    back = adapter.to_ours(source)
    assert set(back) == set(ours)
    assert all(torch.equal(back[name], ours[name]) for name in ours)
    again = adapter.to_source(back)
    assert set(again) == set(source)
    assert all(torch.equal(again[name], source[name]) for name in source)


def test_weights_of_timm_load_without_the_classifier():
    from timm.models.vision_transformer import VisionTransformer as Timm

    theirs = Timm(img_size=32, patch_size=8, embed_dim=24, depth=2, num_heads=3, num_classes=7).eval()
    model = make(seed=1)
    report = load_deit(model, theirs.state_dict())
    assert set(report.unexpected) == {"head.weight", "head.bias"}
    image = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert_close(model(image), theirs.forward_features(image), rtol=1e-4, atol=1e-5)


def test_positions_of_another_grid_are_resized():
    trained, model = make(), make(seed=1, image_size=48)
    report = load_deit(model, deit_adapter().to_source(trained.state_dict()))
    assert report.resized == ("positions",)
    assert_close(model.positions.detach(), resize_position_table(trained.positions.detach(), 6))


def test_a_distilled_model_is_refused():
    source = deit_adapter().to_source(make().state_dict()) | {"dist_token": torch.zeros(1, 1, 24)}
    with pytest.raises(CheckpointError, match=r"1 unexpected: dist_token"):
        load_deit(make(), source)


def test_encoder_decides_the_adapter_and_other_modules_are_refused():
    model = make(seed=1)
    load_vision(model, vision_adapter(model).to_source(make().state_dict()))
    assert all(torch.equal(a, b) for a, b in zip(make().parameters(), model.parameters(), strict=True))
    for function in (vision_adapter, lambda module: load_vision(module, {})):
        with pytest.raises(TypeError, match="Linear"):
            function(torch.nn.Linear(1, 1))


def official_vits(case) -> dict[str, dict[str, list[int]]]:
    content = json.loads(case.path.read_text()) if case.path.suffix == ".json" else None
    if not isinstance(content, dict):
        return {}
    return {
        name: keys
        for name, keys in content.items()
        if isinstance(keys, dict) and f"{PREFIX}cls_token" in keys
    }


@pytest.mark.golden("xvlm", official_vits)
def test_names_and_shapes_of_full_size_checkpoints(case):
    for checkpoint, keys in official_vits(case).items():
        shapes = {key: tuple(shape) for key, shape in keys.items() if key.startswith(PREFIX)}
        width, _, patch, _ = shapes[f"{PREFIX}patch_embed.proj.weight"]
        with torch.device("meta"):
            model = VisionTransformer(
                image_size=patch * math.isqrt(shapes[f"{PREFIX}pos_embed"][1] - 1),
                patch=patch,
                width=width,
                depth=sum(key.endswith("norm1.bias") for key in shapes),
                heads=1,
                local_depth=0,
                mlp_ratio=shapes[f"{PREFIX}blocks.0.mlp.fc1.bias"][0] / width,
            )
        written = deit_adapter(source_prefix=PREFIX).to_source(model.state_dict())
        assert {key: tuple(tensor.shape) for key, tensor in written.items()} == shapes, checkpoint
