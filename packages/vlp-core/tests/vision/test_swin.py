"""Swin against timm's implementation, and what must hold for windows, regions and stochastic depth."""

import copy

import pytest
import torch
from torch.testing import assert_close
from torch.utils.checkpoint import checkpoint
from vlp_core.vision import SwinTransformer
from vlp_core.vision import swin as module
from vlp_core.vision.layers import drop_path
from vlp_core.vision.swin import PATCH, attend_windows, merge_order, shift_mask, token_order
from vlp_core.weights.swin import relative_position_index, timm_swin_adapter

SIZES = {
    "shifted": {"image_size": 64, "window": 4, "width": 8, "depths": (2, 3, 2), "heads": (2, 4, 8)},
    "one-window": {"image_size": 32, "window": 8, "width": 8, "depths": (2, 2), "heads": (1, 2)},
    "odd-window": {"image_size": 72, "window": 3, "width": 8, "depths": (2, 2), "heads": (2, 2)},
}


def make(size: str = "shifted", **changes) -> SwinTransformer:
    torch.manual_seed(0)
    model = SwinTransformer(**SIZES[size] | {"drop_path": 0.0} | changes)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if not name.endswith("norm.weight"):
                parameter.normal_(std=0.5 if "bias" in name else parameter[0].numel() ** -0.5)
    return model


def images(model: SwinTransformer, count: int = 2) -> torch.Tensor:
    return torch.randn(
        count, 3, model.image_size, model.image_size, generator=torch.Generator().manual_seed(1)
    )


@pytest.mark.parametrize("size", SIZES)
def test_features_and_gradients_equal_timm(size):
    from timm.models.swin_transformer import SwinTransformer as Timm

    options = SIZES[size]
    theirs = Timm(
        img_size=options["image_size"],
        window_size=options["window"],
        embed_dim=options["width"],
        depths=options["depths"],
        num_heads=options["heads"],
        drop_path_rate=0.0,
        num_classes=0,
        global_pool="",
    )
    mine = make(size)
    adapter = timm_swin_adapter(stages=len(mine.depths))
    theirs.load_state_dict(adapter.to_source(mine.state_dict()))
    image = images(mine)
    weight = torch.randn(mine.tokens - 1, mine.width, generator=torch.Generator().manual_seed(2))
    expected = theirs(image).flatten(1, 2)
    found = mine(image)
    assert_close(found[:, 1:], expected, rtol=1e-4, atol=1e-5)
    assert_close(found[:, 0], expected.mean(1), rtol=1e-4, atol=1e-5)
    with torch.no_grad():
        assert_close(mine(image), found.detach(), rtol=1e-4, atol=1e-5)
    (expected * weight).sum().backward()
    (found[:, 1:] * weight).sum().backward()
    gradients = adapter.to_source({name: p.grad for name, p in mine.named_parameters()}, gradients=True)
    expected_gradients = {name: p.grad for name, p in theirs.named_parameters()}
    assert set(gradients) == set(expected_gradients)
    for name, gradient in expected_gradients.items():
        torch.testing.assert_close(
            gradients[name], gradient, rtol=1e-3, atol=1e-4 * float(gradient.norm()) + 1e-6, msg=name
        )


def test_bias_is_that_of_the_published_index():
    attention = make().stages[0].blocks[0].attention
    looked_up = attention.bias_table[relative_position_index(4).flatten()].view(16, 16, -1).permute(2, 0, 1)
    assert torch.equal(attention.bias(), looked_up)


def test_written_out_attention_equals_the_fused_one():
    make_one = torch.Generator().manual_seed(0)
    q, k, v = torch.randn(3, 2, 4, 3, 9, 8, generator=make_one)
    bias = torch.randn(3, 9, 9, generator=make_one)
    for bias_WHTT in (bias[None], bias + shift_mask(6, 3, 1)[:, None]):
        fused = attend_windows(q, k, v, bias_WHTT)
        written = attend_windows(q, k, v, bias_WHTT.clone().requires_grad_())
        assert_close(written.detach(), fused, rtol=1e-4, atol=1e-5)
        expected = ((q / 8**0.5) @ k.transpose(-1, -2) + bias_WHTT).softmax(-1) @ v
        assert_close(fused, expected, rtol=1e-4, atol=1e-5)


def test_order_of_tokens_is_that_of_rolling_and_cutting():
    resolution, window, shift = 12, 4, 2
    image = torch.arange(resolution**2).view(resolution, resolution)
    rolled = torch.roll(image, (-shift, -shift), (0, 1))
    cut = [rolled[y : y + window, x : x + window].flatten() for y in range(0, 12, 4) for x in range(0, 12, 4)]
    assert torch.equal(token_order(resolution, window, shift), torch.cat(cut))


def test_order_of_merging_is_the_published_one():
    image = torch.arange(36).view(6, 6)
    parts = [image[dy::2, dx::2] for dy, dx in ((0, 0), (1, 0), (0, 1), (1, 1))]
    assert torch.equal(merge_order(6, 3), torch.stack(parts, -1).flatten())


def test_shift_mask_separates_what_the_shift_wrapped_round():
    mask = shift_mask(8, 4, 2)
    area = torch.zeros(8, 8, dtype=torch.long)
    area[6:] += 1
    area[:, 6:] += 2
    wrapped = area.flatten()[token_order(8, 4, 0)].view(4, 16)
    assert torch.equal(mask == 0, wrapped[:, :, None] == wrapped[:, None, :])
    assert set(mask.unique().tolist()) == {-100.0, 0.0}
    assert bool((mask[0] == 0).all())


def test_state_holds_parameters_only():
    model = make()
    assert set(model.state_dict()) == {name for name, _ in model.named_parameters()}


def test_contract_attributes():
    model = make()
    assert (model.width, model.image_size, model.patch_size, model.tokens) == (32, 64, 16, 17)
    assert model(images(model)).shape == (2, 17, 32)


# ---- regions


def test_full_mask_gives_the_image_features():
    model = make()
    image, index = images(model), torch.tensor([1, 0, 1])
    found = model.forward_regions(image, index, torch.ones(3, model.tokens, dtype=torch.long))
    whole = model(image)
    assert_close(found.full_embeds, whole)
    assert_close(found.image_embeds, whole[index])


def test_region_of_one_patch_pools_that_patch():
    model = make()
    image, index = images(model), torch.tensor([1, 0])
    mask = torch.zeros(2, model.tokens, dtype=torch.long)
    mask[:, 0] = mask[0, 5] = mask[1, 16] = 1
    found, whole = model.forward_regions(image, index, mask), model(image)
    assert_close(found.image_embeds[:, 0], torch.stack([whole[1, 5], whole[0, 16]]))
    assert_close(found.image_embeds[:, 1:], whole[index][:, 1:])


def test_texts_of_a_region_batch_are_independent():
    model = make()
    image, index = images(model), torch.tensor([1, 0, 1, 1])
    mask = torch.randint(0, 2, (4, model.tokens), generator=torch.Generator().manual_seed(3))
    mask[:, 0] = 1
    order = torch.tensor([2, 3, 0, 1])
    found = model.forward_regions(image, index, mask).image_embeds
    shuffled = model.forward_regions(image, index[order], mask[order]).image_embeds
    assert_close(shuffled, found[order])


# ---- training


def test_drop_path_zeroes_or_scales_whole_samples():
    torch.manual_seed(0)
    x = torch.ones(400, 3, 2)
    dropped = drop_path(x, 0.25, training=True)
    assert torch.equal(dropped, dropped[:, :1, :1].expand_as(dropped))
    assert_close(dropped.unique(), torch.tensor([0.0, 4 / 3]))
    assert abs(float(dropped.mean()) - 1) < 0.1
    assert drop_path(x, 0.25, training=False) is x


def test_drop_path_rises_linearly_and_acts_in_training_only():
    model = make(drop_path=0.6)
    rates = [block.drop_path for stage in model.stages for block in stage.blocks]
    assert rates == pytest.approx([0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6])
    image = images(model)
    assert not torch.equal(model.train()(image), model.train()(image))
    assert torch.equal(model.eval()(image), model.eval()(image))
    assert_close(model(image), make()(image))


def test_samples_are_independent():
    model = make()
    image = images(model, 3)
    assert_close(model(image)[1:2], model(image[1:2]), rtol=1e-4, atol=1e-5)


def test_bfloat16_autocast_stays_near():
    model = make()
    image = images(model)
    exact = model(image)
    with torch.autocast("cpu", torch.bfloat16):
        for gradient in (True, False):
            with torch.set_grad_enabled(gradient):
                assert_close(model(image).float(), exact, rtol=0.1, atol=0.15)


def test_blocks_can_be_checkpointed_from_outside():
    plain, saving = make(), make()
    for stage in saving.stages:
        for block in stage.blocks:
            block.forward = lambda *arguments, run=block.forward: checkpoint(
                run, *arguments, use_reentrant=False
            )
    image = images(plain)
    plain(image).square().sum().backward()
    saving(image).square().sum().backward()
    for (name, a), b in zip(plain.named_parameters(), saving.parameters(), strict=True):
        assert_close(a.grad, b.grad, msg=name)


def test_model_can_be_copied_and_made_on_the_meta_device():
    model = make()
    image = images(model)
    assert torch.equal(copy.deepcopy(model)(image), model(image))
    with torch.device("meta"):
        empty = SwinTransformer(**module.swin_base_224)
    assert {tensor.device.type for tensor in (*empty.parameters(), *empty.buffers())} == {"meta"}
    assert (empty.width, empty.patch_size, empty.tokens) == (1024, 32, 50)


def test_init_follows_the_published_rules():
    torch.manual_seed(0)
    model = SwinTransformer(image_size=64, window=4, width=32, depths=(2, 2), heads=(4, 8))
    for name, parameter in model.named_parameters():
        if name.startswith("patch."):
            assert parameter.abs().max() <= 1 / (3 * PATCH * PATCH) ** 0.5
        elif name.endswith("norm.weight"):
            assert bool((parameter == 1).all())
        elif name.endswith("bias"):
            assert bool((parameter == 0).all()), name
        else:
            assert float(parameter.detach().std()) == pytest.approx(0.02, rel=0.15), name


# ---- messages


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"window": 5}, "a stage of 16 x 16 tokens, which windows of 5 do not tile"),
        ({"image_size": 72}, "image_size=72 must be a multiple of 16, the stride of 3 stages"),
        ({"heads": (2, 4)}, "must have one entry per stage"),
        ({"heads": (3, 4, 8)}, "a stage of width 8 cannot have 3 heads"),
    ],
    ids=["window", "image_size", "stages", "heads"],
)
def test_sizes_that_do_not_fit_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        make(**changes)


@pytest.mark.parametrize("shape", [(2, 3, 32, 32), (2, 1, 64, 64), (3, 64, 64)], ids=str)
def test_images_of_another_shape_are_refused(shape):
    with pytest.raises(ValueError, match=r"this encoder was made for \[N, 3, 64, 64\]; resize the images"):
        make()(torch.zeros(shape))


def test_masks_of_another_shape_are_refused():
    model = make()
    image, index = images(model), torch.tensor([0, 1, 1])
    with pytest.raises(ValueError, match=r"image_attention_mask has shape \[3, 16\], expected \[3, 17\]"):
        model.forward_regions(image, index, torch.ones(3, 16))
    with pytest.raises(ValueError, match=r"image_index has shape \[3, 1\]"):
        model.forward_regions(image, index[:, None], torch.ones(3, 17))
