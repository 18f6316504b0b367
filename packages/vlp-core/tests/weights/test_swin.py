"""Swin checkpoints of Microsoft's, timm's and X-VLM's layout."""

import json
import math

import pytest
import torch
from torch.testing import assert_close
from vlp_core.vision import SwinTransformer
from vlp_core.vision.positions import resize_swin_table
from vlp_core.weights import CheckpointError
from vlp_core.weights.swin import load_swin, swin_adapter, timm_swin_adapter

PREFIX = "vision_encoder."


def make(*, seed: int = 0, **changes) -> SwinTransformer:
    torch.manual_seed(seed)
    return SwinTransformer(
        **{"image_size": 64, "window": 4, "width": 8, "depths": (2, 2), "heads": (2, 4)} | changes
    )


def adapter_of(model: SwinTransformer, **prefixes: str):
    return swin_adapter(depths=model.depths, window=model.window, image_size=model.image_size, **prefixes)


@pytest.mark.parametrize("image_size", [64, 32])
def test_both_directions_are_the_identity(image_size):
    model = make(image_size=image_size)
    for adapter in (
        adapter_of(model, source_prefix=PREFIX, prefix="vision."),
        timm_swin_adapter(stages=2, prefix="vision."),
    ):
        ours = {f"vision.{name}": tensor for name, tensor in model.state_dict().items()}
        source = adapter.to_source(ours)
        back = adapter.to_ours(source)
        assert set(back) == set(ours)
        assert all(torch.equal(back[name], ours[name]) for name in ours)
        again = adapter.to_source(back)
        assert set(again) == set(source)
        assert all(torch.equal(again[name], source[name]) for name in source)


def test_masks_are_written_for_shifted_blocks_only():
    names = {
        name
        for name in adapter_of(make(image_size=32)).to_source(make(image_size=32).state_dict())
        if "attn_mask" in name
    }
    assert names == {"layers.0.blocks.1.attn_mask"}  # the second stage is one window


@pytest.mark.parametrize("layout", ["microsoft", "timm"])
def test_load_swin_tells_the_layouts_apart_and_leaves_the_classifier(layout):
    trained, model = make(), make(seed=1)
    adapter = adapter_of(trained) if layout == "microsoft" else timm_swin_adapter(stages=2)
    head = "head.weight" if layout == "microsoft" else "head.fc.weight"
    report = load_swin(model, adapter.to_source(trained.state_dict()) | {head: torch.zeros(9, 16)})
    assert report.unexpected == (head,)
    assert all(torch.equal(a, b) for a, b in zip(trained.parameters(), model.parameters(), strict=True))


def test_weights_of_timm_load():
    from timm.models.swin_transformer import SwinTransformer as Timm

    theirs = Timm(
        img_size=64, window_size=4, embed_dim=8, depths=(2, 2), num_heads=(2, 4), drop_path_rate=0.0
    ).eval()
    model = make(seed=1, drop_path=0.0).eval()
    load_swin(model, theirs.state_dict())
    image = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert_close(model(image)[:, 1:], theirs.forward_features(image).flatten(1, 2), rtol=1e-4, atol=1e-5)


def test_tables_of_another_window_are_resized_and_buffers_ignored():
    trained, model = make(), make(seed=1, image_size=128, window=8)
    report = load_swin(model, adapter_of(trained).to_source(trained.state_dict()))
    assert set(report.resized) == {
        f"stages.{i}.blocks.{j}.attention.bias_table" for i in (0, 1) for j in (0, 1)
    }
    mine, table = (
        model.stages[0].blocks[1].attention.bias_table,
        trained.stages[0].blocks[1].attention.bias_table,
    )
    assert_close(mine.detach(), resize_swin_table(table, 8))


def test_another_number_of_heads_is_refused_not_resized():
    trained, model = make(), make(image_size=128, window=8, heads=(4, 4))
    with pytest.raises(
        CheckpointError,
        match=r"stages\.0\.blocks\.0\.attention\.bias_table does not fit: it has shape \[49, 2\]",
    ):
        load_swin(model, adapter_of(trained).to_source(trained.state_dict()))


def test_another_depth_is_refused_by_group():
    trained, model = make(), make(depths=(2, 4))
    with pytest.raises(CheckpointError, match=r"26 missing: stages\.1 \(26, such as stages\.1\.blocks\.2"):
        load_swin(model, adapter_of(trained).to_source(trained.state_dict()))


def official_swins(case) -> dict[str, dict[str, list[int]]]:
    content = json.loads(case.path.read_text()) if case.path.suffix == ".json" else None
    if not isinstance(content, dict):
        return {}
    return {
        name: keys
        for name, keys in content.items()
        if isinstance(keys, dict)
        and any(isinstance(key, str) and "relative_position_bias_table" in key for key in keys)
    }


@pytest.mark.golden("xvlm", official_swins)
def test_names_and_shapes_of_full_size_checkpoints(case):
    for checkpoint, keys in official_swins(case).items():
        shapes = {key: tuple(shape) for key, shape in keys.items() if key.startswith(PREFIX)}
        tables = sorted(
            (int(key.split(".")[2]), int(key.split(".")[4]), shape)
            for key, shape in shapes.items()
            if key.endswith("bias_table")
        )
        stages = tables[-1][0] + 1
        window = (math.isqrt(tables[0][2][0]) + 1) // 2
        # A stage of W windows has 4 * 2^stage * window * sqrt(W) pixels; where none is shifted, the first
        # stage is one window.
        sizes = {
            4 * 2 ** int(key.split(".")[2]) * window * math.isqrt(shape[0])
            for key, shape in shapes.items()
            if key.endswith("attn_mask")
        }
        with torch.device("meta"):
            model = SwinTransformer(
                image_size=max(sizes, default=4 * window),
                window=window,
                width=shapes[f"{PREFIX}patch_embed.proj.weight"][0],
                depths=[sum(stage == i for stage, _, _ in tables) for i in range(stages)],
                heads=[next(shape[1] for stage, _, shape in tables if stage == i) for i in range(stages)],
            )
        written = adapter_of(model, source_prefix=PREFIX).to_source(model.state_dict())
        assert {key: tuple(tensor.shape) for key, tensor in written.items()} == shapes, checkpoint
