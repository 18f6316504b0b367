import pytest
import torch
import torch.nn.functional as F
from torch import nn
from vlp_core import models
from vlp_core.explain import attention_heat, detection_scores, similarity_heat
from vlp_core.images import Concepts, Images
from vlp_core.models.vicha import checkpoints as vicha

VISION = {"kind": "vit", "image_size": 48, "patch": 16, "width": 8, "depth": 1, "heads": 2, "local_depth": 0}
TEXT = {
    "vocabulary": 20,
    "width": 16,
    "layers": 4,
    "heads": 2,
    "hidden": 24,
    "positions": 12,
    "fusion_layer": 2,
}


def make() -> nn.Module:
    torch.manual_seed(0)
    model = models.create("xvlm", "retrieval", vision=VISION, text=TEXT, embed_width=6).eval()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3)
    return model


def inputs() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    mask = torch.ones(2, 6, dtype=torch.long)
    mask[1, 4:] = 0
    return (
        torch.randn(2, 10, 8, generator=generator),
        torch.randint(2, 20, (2, 6), generator=generator),
        mask,
    )


@pytest.mark.parametrize("layer", [2, 3])
def test_explicit_weights_give_the_output_of_the_fused_kernel(layer):
    model, (image, *_) = make(), inputs()
    cross = model.text.layers[layer].cross
    x, key_value = torch.randn(2, 6, 16), cross.key_value(image)
    visible = torch.ones(2, 1, 1, 10, dtype=torch.bool)
    visible[0, ..., 5:] = False
    weights = []
    for allowed in (None, visible):

        def watch(found):
            weights.append(found)
            return found

        torch.testing.assert_close(cross.weighted(x, key_value, allowed, watch), cross(x, key_value, allowed))
    torch.testing.assert_close(weights[0].sum(-1), torch.ones(2, 2, 6))
    assert (weights[1][0, ..., 5:] == 0).all()


@pytest.mark.parametrize("layer", [2, 3])
def test_heat_is_the_slope_of_the_match_logit(layer):
    """A*G by definition: nudge one attention weight at a time and look at the logit."""
    model, (image, ids, mask) = make().double(), inputs()
    image = image.double()
    heat = attention_heat(model, image, ids, mask, layer=layer)
    cross, plain = model.text.layers[layer].cross, []
    states = model.text.encode(ids, mask)

    def logit(row: int, change=None) -> torch.Tensor:
        def explicit(x, key_value, allowed, *rest):
            def watch(weights):
                plain.append(weights.detach())
                return weights if change is None else weights + change

            return cross.weighted(x, key_value, allowed, watch)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(cross, "forward", explicit)
            return model.itm_head(model.text.fuse(states, mask, image)[:, 0])[row, 1].detach()

    for row, token, patch_number in ((0, 0, 1), (0, 3, 7), (1, 1, 9), (1, 2, 4)):
        total = 0.0
        for head in range(2):
            change = torch.zeros(2, 2, 6, 10, dtype=torch.float64)
            change[row, head, token, patch_number] = 1e-5
            slope = (logit(row, change) - logit(row, -change)) / 2e-5
            total += plain[-1][row, head, token, patch_number] * slope.clamp(min=0)
        place = divmod(patch_number - 1, 3)
        assert heat.words[row, token][place].item() == pytest.approx(float(total) / 2, rel=1e-3, abs=1e-9)


def test_padding_has_no_heat_but_counts_in_the_mean():
    model, (image, ids, mask) = make(), inputs()
    heat = attention_heat(model, image, ids, mask, layer=3)
    assert heat.words.shape == (2, 6, 3, 3)
    assert (heat.words[1, 4:] == 0).all()
    torch.testing.assert_close(heat.mean[1], heat.words[1, :4].sum(0) / 6)
    alone = attention_heat(model, image[1:], ids[1:], mask[1:], layer=3)
    torch.testing.assert_close(alone.words, heat.words[1:])


def test_misuse_is_refused():
    model, (image, ids, mask) = make(), inputs()
    with pytest.raises(ValueError, match=r"layer=1 has no cross-attention; choose among 2\.\.3"):
        attention_heat(model, image, ids, mask, layer=1)
    with pytest.raises(ValueError, match="9 image tokens are not one and a square"):
        attention_heat(model, image[:, :9], ids, mask, layer=3)
    with pytest.raises(ValueError, match=r"call model\.eval\(\) first"):
        attention_heat(model.train(), image, ids, mask, layer=3)


WITH_CONCEPTS = {"layers": 1, "place": "first"}


def concept_model(visible_padding: bool = True) -> nn.Module:
    torch.manual_seed(0)
    model = models.create(
        "vicha",
        "retrieval",
        vision=VISION | {"depth": 3},
        text=TEXT,
        concepts=WITH_CONCEPTS | {"visible_padding": visible_padding},
        embed_width=6,
    ).eval()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3)
    return model


def concept_inputs() -> tuple[Images, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    _, ids, mask = inputs()
    seen = torch.ones(2, 5, dtype=torch.long)
    seen[0, 3:] = 0
    concepts = Concepts(torch.randint(2, 20, (2, 5), generator=generator), seen)
    return Images(torch.randn(2, 3, 48, 48, generator=generator), concepts=concepts), ids, mask


def test_tokens_behind_the_patches_take_attention_but_have_no_heat():
    model, (images, ids, mask) = concept_model(), concept_inputs()
    image = model.encode_image(images).embeds
    assert image.shape[1] == 1 + 9 + 5 and model.vision.tokens == 10
    heat = attention_heat(model, image, ids, mask, layer=3, tokens=10)
    assert heat.words.shape == (2, 6, 3, 3)
    without = attention_heat(model, image[:, :10], ids, mask, layer=3)
    assert not torch.allclose(heat.mean, without.mean)
    hidden = torch.zeros(2, 15)
    hidden[:, :10] = 1
    masked = attention_heat(model, image, ids, mask, layer=3, tokens=10, image_mask_BS=hidden)
    torch.testing.assert_close(masked.words, without.words)
    with pytest.raises(ValueError, match="15 image tokens are not one and a square of patches"):
        attention_heat(model, image, ids, mask, layer=3)
    with pytest.raises(ValueError, match="tokens=17, but there are 15"):
        attention_heat(model, image, ids, mask, layer=3, tokens=17)


@pytest.mark.parametrize("visible_padding", [True, False])
@pytest.mark.parametrize("block", [1, 2])
def test_heat_of_similarity_is_its_slope(block, visible_padding):
    """A*G by definition: nudge one attention weight at a time and look at the similarity."""
    model, (images, ids, mask) = concept_model(visible_padding).double(), concept_inputs()
    images = Images(images.pixels.double(), concepts=images.concepts)
    heat = similarity_heat(model, images, ids, mask, block=block)
    assert heat.shape == (2, 3, 3)
    attention, plain = model.vision.encoder.blocks[block].attention, []

    def similarity(row: int, change=None) -> torch.Tensor:
        def explicit(x, bias=None):
            def watch(weights):
                plain.append(weights.detach())
                return weights if change is None else weights + change

            return attention.weighted(x, bias, watch=watch)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(attention, "forward", explicit)
            image = model.encode_image(images).embeds
        text = model.encode_text(ids, mask).embeds
        # The model's own projections are rounded to fp32, too coarse for a slope.
        left, right = (
            F.normalize(to(x[:, 0]), dim=-1)
            for to, x in ((model.vision_proj, image), (model.text_proj, text))
        )
        return ((left * right).sum(-1) / model.temperature)[row].detach()

    for row, patch_number in ((0, 1), (0, 7), (1, 9), (1, 4)):
        total = 0.0
        for head in range(2):
            change = torch.zeros(2, 2, 15, 15, dtype=torch.float64)
            change[row, head, 0, patch_number] = 1e-5
            slope = (similarity(row, change) - similarity(row, -change)) / 2e-5
            total += plain[-1][row, head, 0, patch_number] * slope.clamp(min=0)
        place = divmod(patch_number - 1, 3)
        assert heat[row][place].item() == pytest.approx(float(total) / 2, rel=1e-3, abs=1e-9)
    assert (heat > 0).any()


@pytest.mark.parametrize("visible", [None, "some"])
def test_explicit_weights_of_an_image_block_give_its_output(visible):
    attention = concept_model().vision.encoder.blocks[0].attention
    x = torch.randn(2, 15, 8, generator=torch.Generator().manual_seed(3))
    bias = None
    if visible:
        bias = torch.zeros(2, 1, 1, 15)
        bias[..., 12:] = -10000.0
    seen = []

    def watch(weights):
        seen.append(weights)
        return weights

    torch.testing.assert_close(attention.weighted(x, bias, watch=watch), attention(x, bias))
    torch.testing.assert_close(seen[0].sum(-1), torch.ones(2, 2, 15))


def test_heat_of_similarity_leaves_the_model_as_it_was():
    model, (images, ids, mask) = concept_model(), concept_inputs()
    before = model.encode_image(images).projection
    grown = torch.is_grad_enabled()
    with torch.inference_mode():
        first = similarity_heat(model, images, ids, mask, block=1)
        assert not torch.is_grad_enabled()
    assert torch.is_grad_enabled() == grown
    again = similarity_heat(model, images, ids, mask, block=1)
    torch.testing.assert_close(first, again)
    assert all(parameter.grad is None for parameter in model.parameters())
    assert all(not module._forward_hooks for module in model.modules())
    torch.testing.assert_close(model.encode_image(images).projection, before)


def test_heat_of_similarity_needs_a_vit_and_a_block_of_it():
    model, (images, ids, mask) = concept_model(), concept_inputs()
    with pytest.raises(ValueError, match=r"block=3 is none of the image encoder; choose among 0\.\.2"):
        similarity_heat(model, images, ids, mask, block=3)
    with pytest.raises(ValueError, match=r"call model\.eval\(\) first"):
        similarity_heat(model.train(), images, ids, mask, block=1)
    swin = {"kind": "swin", "image_size": 64, "window": 2, "width": 8, "depths": [1, 1], "heads": [1, 2]}
    other = models.create("xvlm", "retrieval", vision=swin, text=TEXT, embed_width=6).eval()
    with pytest.raises(
        ValueError, match="SwinTransformer shows no attention of a class token to all patches"
    ):
        similarity_heat(other, Images(torch.zeros(1, 3, 64, 64)), ids[:1], mask[:1], block=0)


def has_heat(case):
    return {"gradcam_itc", "gradcam_itm", "gradcam_itm_per_token"} <= case.tensor_names("outputs")


def reference_model(case):
    """A model with the weights of a case; the momentum copies and queues are left out."""
    config, bert = case.config, case.config["bert"]
    text = {
        "vocabulary": bert["vocab_size"],
        "width": bert["hidden_size"],
        "layers": bert["num_hidden_layers"],
        "heads": bert["num_attention_heads"],
        "hidden": bert["intermediate_size"],
        "positions": bert["max_position_embeddings"],
        "fusion_layer": bert["fusion_layer"],
    }
    vision = {
        "kind": "vit",
        "image_size": config["image_res"],
        "patch": config["patch_size"],
        "width": config["vision_width"],
        "depth": config["vit_depth"],
        "heads": config["vit_heads"],
        "local_depth": 0,
    }
    model = models.create(
        "vicha",
        "retrieval",
        vision=vision,
        text=text,
        concepts={"layers": config["num_hidden_layers_kw"]},
        embed_width=config["embed_dim"],
    )
    own = vicha.split(case.tensors("weights")).model
    model.load_state_dict(vicha.vicha_adapter(model).to_ours(own))
    return model.eval()


@pytest.mark.golden("vicha", has_heat)
def test_heat_of_both_kinds_equals_vicha(case):
    model, inputs, outputs = reference_model(case), case.tensors("inputs"), case.tensors("outputs")
    images = Images(inputs["image"], concepts=Concepts(inputs["kw_ids"], inputs["kw_mask"]))
    ids, mask = inputs["text_ids"], inputs["text_mask"]
    with torch.no_grad():
        image = model.encode_image(images)
    heat = attention_heat(
        model, image.embeds, ids, mask, layer=case.config["block_num_itm"], tokens=model.vision.tokens
    )
    torch.testing.assert_close(heat.mean, outputs["gradcam_itm"], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(heat.words, outputs["gradcam_itm_per_token"], rtol=1e-4, atol=1e-5)
    similar = similarity_heat(model, images, ids, mask, block=case.config["block_num_itc"])
    torch.testing.assert_close(similar, outputs["gradcam_itc"], rtol=1e-4, atol=1e-5)


def test_the_box_around_the_heat_wins():
    heat = torch.zeros(4, 4)
    heat[1, 2] = 1.0
    boxes = torch.tensor(
        [
            [0.0, 0.0, 40.0, 30.0],
            [100.0, 30.0, 50.0, 30.0],
            [0.0, 0.0, 200.0, 120.0],
            [70.0, 10.0, 110.0, 80.0],
        ]
    )
    scores = detection_scores(heat, boxes, (200, 120))
    assert scores.argmax() == 1
    assert detection_scores(heat, boxes, (200, 120), alpha=0.0).argmax() == 3
    assert scores[0] <= 0


def test_borders_are_cut_to_whole_pixels_inside_the_image():
    heat = torch.rand(5, 5, generator=torch.Generator().manual_seed(0))
    full = torch.nn.functional.interpolate(heat[None, None], size=(9, 14), mode="bicubic")[0, 0]
    boxes = [[1.9, 2.2, 5.3, 3.9], [0.0, 0.0, 14.0, 9.0], [10.5, 6.5, 30.0, 30.0]]
    expected = [
        full[2:6, 1:7].sum() / (5.3 * 3.9) ** 0.5,
        full.sum() / (14 * 9) ** 0.5,
        full[6:, 10:].sum() / 30.0,
    ]
    torch.testing.assert_close(detection_scores(heat, torch.tensor(boxes), (14, 9)), torch.stack(expected))
