import pytest
import torch
from torch import nn
from vlp_core import models
from vlp_core.explain import attention_heat, detection_scores

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
    model = models.create("xvlm", vision=VISION, text=TEXT, embed_width=6, heads=["contrast", "match"]).eval()
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


def test_borders_are_cut_to_whole_pixels_inside_the_picture():
    heat = torch.rand(5, 5, generator=torch.Generator().manual_seed(0))
    full = torch.nn.functional.interpolate(heat[None, None], size=(9, 14), mode="bicubic")[0, 0]
    boxes = [[1.9, 2.2, 5.3, 3.9], [0.0, 0.0, 14.0, 9.0], [10.5, 6.5, 30.0, 30.0]]
    expected = [
        full[2:6, 1:7].sum() / (5.3 * 3.9) ** 0.5,
        full.sum() / (14 * 9) ** 0.5,
        full[6:, 10:].sum() / 30.0,
    ]
    torch.testing.assert_close(detection_scores(heat, torch.tensor(boxes), (14, 9)), torch.stack(expected))
