"""DeiT against timm's implementation, and what must hold for regions."""

import pytest
import torch
from torch.testing import assert_close
from vlp_core.vision import VisionTransformer
from vlp_core.vision.vit import deit_base_224
from vlp_core.weights.deit import deit_adapter

SIZE = {"image_size": 32, "patch": 8, "width": 24, "depth": 3, "heads": 3, "local_depth": 2}


def make(**changes) -> VisionTransformer:
    torch.manual_seed(0)
    model = VisionTransformer(**SIZE | changes)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if not name.endswith("norm.weight"):
                parameter.normal_(std=0.5 if parameter.ndim == 1 else parameter[0].numel() ** -0.5)
    return model


def images(count: int = 2, seed: int = 1) -> torch.Tensor:
    return torch.randn(count, 3, 32, 32, generator=torch.Generator().manual_seed(seed))


def test_features_and_gradients_equal_timm():
    from timm.models.vision_transformer import VisionTransformer as Timm

    theirs = Timm(
        img_size=32, patch_size=8, embed_dim=24, depth=3, num_heads=3, num_classes=0, global_pool=""
    )
    mine, adapter = make(), deit_adapter()
    theirs.load_state_dict(adapter.to_source(mine.state_dict()))
    expected, found = theirs.forward_features(images()), mine(images())
    assert_close(found, expected, rtol=1e-4, atol=1e-5)
    weight = torch.randn(mine.tokens, mine.width, generator=torch.Generator().manual_seed(2))
    (expected * weight).sum().backward()
    (found * weight).sum().backward()
    gradients = adapter.to_source({name: p.grad for name, p in mine.named_parameters()}, gradients=True)
    expected_gradients = {name: p.grad for name, p in theirs.named_parameters()}
    assert set(gradients) == set(expected_gradients)
    for name, gradient in expected_gradients.items():
        assert_close(
            gradients[name], gradient, rtol=1e-3, atol=1e-4 * float(gradient.norm()) + 1e-6, msg=name
        )


def test_full_mask_gives_the_image_features():
    model, index = make(), torch.tensor([1, 0, 1])
    found = model.forward_regions(images(), index, torch.ones(3, model.tokens, dtype=torch.long))
    whole = model(images())
    assert_close(found.full_embeds, whole, rtol=1e-4, atol=1e-5)
    assert_close(found.image_embeds, whole[index], rtol=1e-4, atol=1e-5)


def test_without_local_blocks_the_mask_changes_nothing():
    model, index = make(local_depth=0), torch.tensor([1, 0])
    mask = torch.ones(2, model.tokens)
    mask[:, 3:] = 0
    assert_close(model.forward_regions(images(), index, mask).image_embeds, model(images())[index])


def test_local_blocks_see_the_region_only():
    """With every block local, pixels outside the region reach neither the class token nor the region's
    patches."""
    model, index = make(local_depth=SIZE["depth"]), torch.tensor([0])
    mask = torch.zeros(1, model.tokens)
    mask[0, [0, 1, 2, 5, 6]] = 1  # upper left 2 x 2 of 4 x 4 patches
    image, changed = images(1), images(1)
    changed[:, :, 16:] = images(1, seed=5)[:, :, 16:]
    changed[:, :, :, 16:] = images(1, seed=5)[:, :, :, 16:]
    inside = mask[0].bool()
    found, other = (model.forward_regions(x, index, mask) for x in (image, changed))
    assert_close(found.image_embeds[:, inside], other.image_embeds[:, inside])
    assert not torch.allclose(found.image_embeds[:, ~inside], other.image_embeds[:, ~inside])
    assert not torch.allclose(found.full_embeds[:, 0], other.full_embeds[:, 0])


def test_texts_of_a_region_batch_are_independent():
    model, index = make(), torch.tensor([1, 0, 1, 1])
    mask = torch.randint(0, 2, (4, model.tokens), generator=torch.Generator().manual_seed(3))
    mask[:, 0] = 1
    order = torch.tensor([2, 3, 0, 1])
    found = model.forward_regions(images(), index, mask).image_embeds
    assert_close(model.forward_regions(images(), index[order], mask[order]).image_embeds, found[order])


def test_bfloat16_autocast_stays_near_in_region_mode():
    model, index = make(), torch.tensor([1, 0])
    mask = torch.ones(2, model.tokens, dtype=torch.long)
    mask[:, 9:] = 0
    exact = model.forward_regions(images(), index, mask).image_embeds
    with torch.autocast("cpu", torch.bfloat16):
        found = model.forward_regions(images(), index, mask).image_embeds
    assert_close(found.float(), exact, rtol=0.1, atol=0.15)


def test_contract_attributes_of_the_base_size():
    with torch.device("meta"):
        model = VisionTransformer(**deit_base_224)
    assert (model.width, model.image_size, model.patch_size, model.tokens) == (768, 224, 16, 197)


@pytest.mark.parametrize(
    ("changes", "std"), [({}, 0.02), ({"initializer_range": 0.1}, 0.1), ({"position_range": 2.0}, 0.02)]
)
def test_init_follows_the_published_rules(changes, std):
    torch.manual_seed(0)
    for name, parameter in VisionTransformer(**SIZE | {"width": 48} | changes).named_parameters():
        if name.startswith("patch."):
            assert parameter.abs().max() <= 1 / (3 * 8 * 8) ** 0.5
        elif name.endswith("norm.weight"):
            assert bool((parameter == 1).all())
        elif name.endswith("bias"):
            assert bool((parameter == 0).all())
        else:
            assert float(parameter.detach().std()) == pytest.approx(
                changes.get("position_range", std) if name == "positions" else std, rel=0.3
            ), name


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"patch": 33}, "image_size=32 has no room for a patch=33"),
        ({"local_depth": 4}, "local_depth=4 must lie between 0 and depth=3"),
        ({"heads": 5}, "width=24 must be a multiple of heads=5"),
    ],
    ids=["patch", "local_depth", "heads"],
)
def test_sizes_that_do_not_fit_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        make(**changes)


def test_images_and_masks_of_another_shape_are_refused():
    model = make()
    with pytest.raises(ValueError, match=r"made for \[N, 3, 32, 32\]"):
        model(torch.zeros(1, 3, 64, 64))
    with pytest.raises(ValueError, match=r"image_attention_mask has shape \[2, 16\], expected \[2, 17\]"):
        model.forward_regions(images(), torch.tensor([0, 1]), torch.ones(2, 16))
