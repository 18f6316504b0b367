"""CLIP's tower against Hugging Face's implementation, and region mode."""

import pytest
import torch
from torch.testing import assert_close
from vlp_core.vision import ClipVisionTransformer
from vlp_core.vision.clip import clip_vit_base_224
from vlp_core.weights.clip import hf_clip_adapter

SIZE = {"image_size": 32, "patch": 8, "width": 24, "depth": 3, "heads": 3, "hidden": 40, "local_depth": 2}


def make(**changes) -> ClipVisionTransformer:
    torch.manual_seed(0)
    model = ClipVisionTransformer(**SIZE | changes)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if not name.endswith("norm.weight"):
                parameter.normal_(std=0.5 if parameter.ndim == 1 else parameter[0].numel() ** -0.5)
    return model


def images(count: int = 2) -> torch.Tensor:
    return torch.randn(count, 3, 32, 32, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("activation", ["quick_gelu", "gelu"])
def test_features_and_gradients_equal_hugging_face(activation):
    from transformers import CLIPVisionConfig, CLIPVisionModel

    theirs = CLIPVisionModel(
        CLIPVisionConfig(
            hidden_size=24,
            intermediate_size=40,
            num_hidden_layers=3,
            num_attention_heads=3,
            image_size=32,
            patch_size=8,
            hidden_act=activation,
        )
    )
    mine = make(activation=activation)
    nested = next(iter(theirs.state_dict())).startswith("vision_model.")
    adapter = hf_clip_adapter(source_prefix="vision_model." if nested else "")
    theirs.load_state_dict(adapter.to_source(mine.state_dict()), strict=False)
    post = dict(theirs.named_modules())["vision_model.post_layernorm" if nested else "post_layernorm"]
    expected, found = post(theirs(pixel_values=images()).last_hidden_state), mine(images())
    assert_close(found, expected, rtol=1e-4, atol=1e-5)
    weight = torch.randn(mine.tokens, mine.width, generator=torch.Generator().manual_seed(2))
    (expected * weight).sum().backward()
    (found * weight).sum().backward()
    gradients = adapter.to_source({name: p.grad for name, p in mine.named_parameters()}, gradients=True)
    expected_gradients = {name: p.grad for name, p in theirs.named_parameters()}
    assert set(gradients) == set(expected_gradients)
    for name, gradient in expected_gradients.items():
        assert_close(
            gradients[name], gradient, rtol=1e-3, atol=1e-4 * float(gradient.norm()) + 1e-5, msg=name
        )


def test_full_mask_gives_the_image_features():
    model, index = make(), torch.tensor([1, 0, 1])
    found = model.forward_regions(images(), index, torch.ones(3, model.tokens, dtype=torch.long))
    whole = model(images())
    assert_close(found.full_embeds, whole, rtol=1e-4, atol=1e-5)
    assert_close(found.image_embeds, whole[index], rtol=1e-4, atol=1e-5)


def test_mask_restricts_the_last_blocks():
    model, index = make(), torch.tensor([0, 1])
    mask = torch.ones(2, model.tokens, dtype=torch.long)
    mask[0, 9:] = 0
    found, whole = model.forward_regions(images(), index, mask), model(images())
    assert not torch.allclose(found.image_embeds[0], whole[0])
    assert_close(found.image_embeds[1], whole[1], rtol=1e-4, atol=1e-5)


def test_contract_attributes_of_the_base_size():
    with torch.device("meta"):
        model = ClipVisionTransformer(**clip_vit_base_224)
    assert (model.width, model.image_size, model.patch_size, model.tokens) == (768, 224, 16, 197)


def test_init_follows_the_published_rules():
    torch.manual_seed(0)
    model = ClipVisionTransformer(
        image_size=32, patch=8, width=64, depth=2, heads=4, hidden=128, local_depth=1
    )
    stds = {
        "class_token": 64**-0.5,
        "positions": 0.02,
        "patch.weight": 0.02,
        "blocks.1.attention.qkv.weight": 256**-0.5,
        "blocks.1.attention.out.weight": 64**-0.5,
        "blocks.1.mlp.up.weight": 128**-0.5,
        "blocks.1.mlp.down.weight": 256**-0.5,
    }
    parameters = dict(model.named_parameters())
    for name, std in stds.items():
        assert float(parameters[name].detach().std()) == pytest.approx(std, rel=0.3), name
    for name, parameter in parameters.items():
        if name.endswith("norm.weight"):
            assert bool((parameter == 1).all())
        elif name.endswith("bias"):
            assert bool((parameter == 0).all())


def test_images_and_masks_of_another_shape_are_refused():
    model = make()
    with pytest.raises(ValueError, match=r"made for \[N, 3, 32, 32\]"):
        model(torch.zeros(1, 3, 64, 64))
    with pytest.raises(ValueError, match=r"image_attention_mask has shape \[2, 16\], expected \[2, 17\]"):
        model.forward_regions(images(), torch.tensor([0, 1]), torch.ones(2, 16))
    with pytest.raises(ValueError, match="local_depth=4 must lie between 0 and depth=3"):
        make(local_depth=4)
