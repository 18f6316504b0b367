"""Local files of timm into `TimmVision`."""

import pytest
import timm
import torch
from safetensors.torch import save_file
from torch import nn
from torch.testing import assert_close
from vlp_core import weights
from vlp_core.vision import TimmVision
from vlp_core.weights import CheckpointError
from vlp_core.weights.timm import load_timm

SMALL = {"embed_dim": 24, "depth": 2, "num_heads": 3}
SWIN = {"embed_dim": 8, "depths": [1, 1], "num_heads": [1, 2]}


def theirs(name: str, size: int, **arguments) -> nn.Module:
    torch.manual_seed(1)
    return timm.create_model(name, pretrained=False, img_size=size, **arguments).eval()


def image(size: int) -> torch.Tensor:
    return torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "vit_small_patch14_reg4_dinov2"])
def test_a_file_with_its_classifier_loads(name, tmp_path):
    source = theirs(name, 32, patch_size=8, **SMALL, num_classes=7)
    save_file(source.state_dict(), tmp_path / "model.safetensors")
    model = TimmVision(name=name, image_size=32, local_depth=1, arguments={"patch_size": 8, **SMALL}).eval()
    report = load_timm(model, tmp_path / "model.safetensors")
    assert set(report.unexpected) == {"body.head.weight", "body.head.bias"}
    assert not report.missing
    assert not report.resized
    features = source.forward_features(image(32))
    first = source.num_prefix_tokens
    assert_close(model(image(32))[:, 0], features[:, 0])
    assert_close(model(image(32))[:, 1:], features[:, first:])


def test_a_norm_behind_pooling_becomes_that_of_all_tokens():
    source = theirs("vit_tiny_patch16_224", 32, **SMALL, global_pool="avg")
    model = TimmVision(name="vit_tiny_patch16_224", image_size=32, local_depth=1, arguments=SMALL).eval()
    nn.init.normal_(source.fc_norm.weight)
    load_timm(model, source.state_dict())
    expected = source.fc_norm(source.forward_features(image(32)))
    assert_close(model(image(32)), expected)


def test_tables_of_another_size_are_resized_by_file_and_by_export():
    """A file of timm, and our own names when training goes on at another size."""
    sizes = ((32, 48, "vit_tiny_patch16_224", {"patch_size": 8, **SMALL}, "body.pos_embed"),)
    for small, large, name, arguments, table in sizes:
        trained = TimmVision(name=name, image_size=small, local_depth=1, arguments=arguments)
        loaded, started = (
            TimmVision(name=name, image_size=large, local_depth=1, arguments=arguments) for _ in range(2)
        )
        file = {key.removeprefix("body."): x for key, x in trained.state_dict().items()}
        assert load_timm(loaded, file).resized == (table,)
        assert weights.load(started, trained.state_dict()).resized == (table,)
        for key, x in started.state_dict().items():
            assert torch.equal(x, loaded.state_dict()[key])
        assert started.state_dict()[table].shape == (1, 37, 24)
        assert torch.equal(started.state_dict()[table][:, 0], trained.state_dict()[table][:, 0])


def test_bias_tables_of_another_window_are_resized():
    first, second = (
        TimmVision(
            name="swin_tiny_patch4_window7_224", image_size=size, arguments={**SWIN, "window_size": window}
        )
        for size, window in ((64, 4), (96, 6))
    )
    tables = {f"body.layers.{stage}.blocks.0.attn.relative_position_bias_table" for stage in (0, 1)}
    assert set(weights.load(second, first.state_dict()).resized) == tables
    assert all(second.state_dict()[key].shape[0] == 121 for key in tables)


def test_files_that_do_not_fit_are_refused():
    model = TimmVision(name="vit_tiny_patch16_224", image_size=32, local_depth=1, arguments=SMALL)
    state = theirs("vit_tiny_patch16_224", 32, **SMALL).state_dict()
    with pytest.raises(CheckpointError, match=r"12 missing: body\.blocks"):
        load_timm(model, {key: x for key, x in state.items() if not key.startswith("blocks.1")})
    with pytest.raises(CheckpointError, match=r"nothing in the state dict belongs to this TimmVision"):
        load_timm(model, {"encoder.layer.0": torch.zeros(1)})
    wide = theirs("vit_tiny_patch16_224", 32, **{**SMALL, "embed_dim": 48}).state_dict()
    with pytest.raises(CheckpointError, match=r"body\.cls_token does not fit"):
        load_timm(model, wide)
    with pytest.raises(CheckpointError, match="does not fit"):
        load_timm(model, state | {"pos_embed": torch.zeros(1, 9, 24)})
