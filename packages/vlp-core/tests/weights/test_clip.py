"""CLIP vision checkpoints of Hugging Face's and X-VLM's layout."""

import json
import math

import pytest
import torch
from torch.testing import assert_close
from vlp_core.models.xvlm.checkpoints import clip_adapter
from vlp_core.vision import ClipVisionTransformer
from vlp_core.vision.positions import resize_position_table
from vlp_core.weights import CheckpointError
from vlp_core.weights.clip import hf_clip_adapter, load_clip

PREFIX = "vision_encoder."
SIZE = {"image_size": 32, "patch": 8, "width": 24, "depth": 2, "heads": 3, "hidden": 40, "local_depth": 1}


def make(*, seed: int = 0, **changes) -> ClipVisionTransformer:
    torch.manual_seed(seed)
    return ClipVisionTransformer(**SIZE | changes)


def test_both_directions_are_the_identity():
    model = make()
    ours = {f"vision.{name}": tensor for name, tensor in model.state_dict().items()}
    xvlm = clip_adapter(tokens=model.tokens, source_prefix=PREFIX, prefix="vision.")
    for adapter in (xvlm, hf_clip_adapter(source_prefix="vision_model.", prefix="vision.")):
        source = adapter.to_source(ours)
        back = adapter.to_ours(source)
        assert set(back) == set(ours)
        assert all(torch.equal(back[name], ours[name]) for name in ours)
        again = adapter.to_source(back)
        assert set(again) == set(source)
        assert all(torch.equal(again[name], source[name]) for name in source)
    assert torch.equal(xvlm.to_source(ours)[f"{PREFIX}position_ids"], torch.arange(17)[None])


@pytest.mark.parametrize("whole", [True, False], ids=["clip", "tower"])
def test_weights_of_hugging_face_load(whole, recwarn):
    from transformers import CLIPConfig, CLIPModel, CLIPTextConfig, CLIPVisionConfig, CLIPVisionModel

    vision = CLIPVisionConfig(
        hidden_size=24,
        intermediate_size=40,
        num_hidden_layers=2,
        num_attention_heads=3,
        image_size=32,
        patch_size=8,
    )
    text = CLIPTextConfig(
        hidden_size=12,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        vocab_size=9,
        bos_token_id=0,
        eos_token_id=1,
    )
    if whole:
        theirs = CLIPModel(CLIPConfig(vision_config=vision.to_dict(), text_config=text.to_dict()))
        tower = theirs.vision_model
    else:
        theirs = tower = CLIPVisionModel(vision)
    model = make(seed=1)
    report = load_clip(model, theirs.state_dict())
    assert set(report.loaded) == set(model.state_dict())
    image = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        pooled = tower(pixel_values=image).pooler_output
        assert_close(model(image)[:, 0], pooled, rtol=1e-4, atol=1e-5)


def test_older_tower_files_load_with_their_position_ids():
    trained, model = make(), make(seed=1)
    source = hf_clip_adapter(source_prefix="vision_model.").to_source(trained.state_dict())
    load_clip(model, source | {"vision_model.embeddings.position_ids": torch.arange(17)[None]})
    assert all(torch.equal(a, b) for a, b in zip(trained.parameters(), model.parameters(), strict=True))


def test_positions_of_another_grid_are_resized():
    trained, model = make(), make(seed=1, image_size=48)
    report = load_clip(model, hf_clip_adapter().to_source(trained.state_dict()))
    assert report.resized == ("positions",)
    assert_close(model.positions.detach(), resize_position_table(trained.positions.detach(), 6))


def test_another_patch_side_is_refused():
    source = hf_clip_adapter().to_source(make().state_dict())
    with pytest.raises(
        CheckpointError,
        match=r"patch\.weight does not fit: it has shape \[24, 3, 8, 8\], the model needs \[24, 3, 16, 16\]",
    ):
        load_clip(make(patch=16), source)


def test_a_text_model_is_refused():
    with pytest.raises(
        CheckpointError, match=r"nothing in the state dict belongs to this ClipVisionTransformer"
    ):
        load_clip(make(), {"text_model.embeddings.token_embedding.weight": torch.zeros(3, 4)})


def official_clips(case) -> dict[str, dict[str, list[int]]]:
    content = json.loads(case.path.read_text()) if case.path.suffix == ".json" else None
    if not isinstance(content, dict):
        return {}
    return {
        name: keys
        for name, keys in content.items()
        if isinstance(keys, dict) and f"{PREFIX}pre_layrnorm.weight" in keys
    }


@pytest.mark.golden("xvlm", official_clips)
def test_names_and_shapes_of_full_size_checkpoints(case):
    for checkpoint, keys in official_clips(case).items():
        shapes = {key: tuple(shape) for key, shape in keys.items() if key.startswith(PREFIX)}
        width, _, patch, _ = shapes[f"{PREFIX}patch_embed.weight"]
        with torch.device("meta"):
            model = ClipVisionTransformer(
                image_size=patch * math.isqrt(shapes[f"{PREFIX}pos_embed.weight"][0] - 1),
                patch=patch,
                width=width,
                depth=sum(key.endswith("layer_norm1.bias") for key in shapes),
                heads=1,
                local_depth=0,
                hidden=shapes[f"{PREFIX}encoder.layers.0.mlp.fc1.bias"][0],
            )
        written = clip_adapter(tokens=model.tokens, source_prefix=PREFIX).to_source(model.state_dict())
        assert {key: tuple(tensor.shape) for key, tensor in written.items()} == shapes, checkpoint
