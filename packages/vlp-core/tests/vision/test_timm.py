"""Backbones of timm against our own with the same weights, and what is refused for which architecture."""

import copy
import subprocess
import sys

import pytest
import torch
from torch import nn
from torch.testing import assert_close
from vlp_core.concepts import ConceptEncoder, ConceptVision
from vlp_core.heads import MaskedImageDecoder
from vlp_core.images import Concepts, Images
from vlp_core.models.vicha.model import Taught, Vicha
from vlp_core.models.xvlm.model import Xvlm
from vlp_core.text.bert import Bert
from vlp_core.vision import SwinTransformer, TimmVision, VisionTransformer, create_vision
from vlp_core.weights.deit import deit_adapter
from vlp_core.weights.swin import timm_swin_adapter
from vlp_core.weights.timm import load_timm

SMALL = {"embed_dim": 24, "depth": 3, "num_heads": 3}
SWIN = {"embed_dim": 8, "depths": [2, 2], "num_heads": [1, 2], "window_size": 4}


def timm_vit(name: str = "vit_tiny_patch16_224", *, image_size: int = 32, **arguments) -> TimmVision:
    torch.manual_seed(0)
    model = TimmVision(
        name=name, image_size=image_size, local_depth=2, arguments={"patch_size": 8, **SMALL, **arguments}
    )
    return randomised(model)


def timm_swin() -> TimmVision:
    torch.manual_seed(0)
    return randomised(TimmVision(name="swin_tiny_patch4_window7_224", image_size=64, arguments=SWIN))


def randomised(model: nn.Module) -> nn.Module:
    """Initial values of 0.02 would hide mistakes."""
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
    return model.eval()


def pair(kind: str) -> tuple[nn.Module, TimmVision]:
    """Our encoder and timm's with the same weights."""
    if kind == "vit":
        ours = randomised(
            VisionTransformer(image_size=32, patch=8, width=24, depth=3, heads=3, local_depth=2)
        )
        theirs, adapter = timm_vit(), deit_adapter()
    else:
        ours = randomised(
            SwinTransformer(image_size=64, window=4, width=8, depths=(2, 2), heads=(1, 2), drop_path=0.0)
        )
        theirs = timm_swin()
        adapter = timm_swin_adapter(stages=2)
    report = load_timm(theirs, adapter.to_source(ours.state_dict()))
    assert not report.missing
    return ours, theirs


def images(model: nn.Module, count: int = 2) -> torch.Tensor:
    shape = (count, 3, model.image_size, model.image_size)
    return torch.randn(shape, generator=torch.Generator().manual_seed(1))


def regions(model: nn.Module) -> tuple[torch.Tensor, torch.Tensor]:
    mask = torch.randint(0, 2, (3, model.tokens), generator=torch.Generator().manual_seed(3))
    mask[:, :2] = 1
    return torch.tensor([1, 0, 1]), mask


@pytest.mark.parametrize("kind", ["vit", "swin"])
def test_images_and_regions_equal_our_own_encoder(kind):
    ours, theirs = pair(kind)
    for name in ("width", "image_size", "patch_size", "tokens", "depth", "keeps_patches", "takes_others"):
        assert getattr(theirs, name) == getattr(ours, name), name
    x, (index, mask) = images(ours), regions(ours)
    assert_close(theirs(x), ours(x), rtol=1e-4, atol=1e-5)
    found, expected = (model.encode_regions(Images(x), index, mask) for model in (theirs, ours))
    assert_close(found.image_embeds, expected.image_embeds, rtol=1e-4, atol=1e-5)
    assert_close(found.full_embeds, expected.full_embeds, rtol=1e-4, atol=1e-5)
    # A region is not the whole image, or the comparison above would hold without any mask.
    assert not torch.allclose(found.image_embeds[:, 0], found.full_embeds[index, 0], atol=1e-2)


def test_every_mode_of_a_plain_vit_equals_our_own():
    ours, theirs = pair("vit")
    x, (index, mask) = images(ours), regions(ours)
    others = torch.randn(2, 4, 24, generator=torch.Generator().manual_seed(4))
    visible = torch.ones(2, theirs.tokens + 4)
    visible[0, 19:] = 0
    ids = torch.tensor([[3, 5, 1], [0, 15, 2]])
    kept = theirs.split_patches(x).gather(1, ids[..., None].expand(-1, -1, 192))
    calls = [
        lambda model: model(x, others, visible=visible),
        lambda model: model.forward_regions(x, index, mask, others).image_embeds,
        lambda model: model.forward_with_summaries(x, count=2).embeds,
        lambda model: model.forward_with_summaries(x, count=2).summaries,
        lambda model: model.forward_with_summaries(x, others, count=1, visible=visible).embeds,
        lambda model: model.forward_kept(kept, ids),
    ]
    for call in calls:
        assert_close(call(theirs), call(ours), rtol=1e-4, atol=1e-5)


def test_bfloat16_autocast_stays_near_in_region_mode():
    model = timm_vit()
    index, mask = regions(model)
    exact = model.forward_regions(images(model), index, mask).image_embeds
    with torch.autocast("cpu", torch.bfloat16):
        found = model.forward_regions(images(model), index, mask).image_embeds
    assert_close(found.float(), exact, rtol=0.1, atol=0.3)


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("vit_small_patch14_reg4_dinov2", {}),
        ("vit_base_patch16_gap_224", {}),
        ("vit_base_patch16_siglip_224", {}),
        ("vit_base_patch16_clip_224", {}),
    ],
)
def test_other_plain_vits_see_regions_and_hide_registers(name, arguments):
    """Without class token the first token is the mean of the (region's) patches."""
    model = timm_vit(name, **arguments)
    x, index = images(model), torch.tensor([1, 0])
    whole = model(x)
    assert whole.shape == (2, 17, 24)
    everything = torch.ones(2, model.tokens)
    assert_close(model.forward_regions(x, index, everything).image_embeds, whole[index], rtol=1e-4, atol=1e-5)
    mask = everything.clone()
    mask[:, 9:] = 0
    part = model.forward_regions(x, index, mask).image_embeds
    assert not torch.allclose(part[:, 0], whole[index, 0], atol=1e-3)
    if not model.depth:
        assert_close(whole[:, 0], whole[:, 1:].mean(1))
        assert_close(part[:, 0], part[:, 1:9].mean(1))
    kept = model.forward_kept(model.split_patches(x)[:, :5], torch.arange(5).expand(2, -1))
    assert kept.shape == (2, 6, 24)


@pytest.mark.parametrize(
    ("name", "size", "arguments"),
    [
        ("resnet10t", 64, {}),
        ("convnext_atto", 64, {"depths": [1, 1, 1, 1], "dims": [8, 8, 8, 16]}),
        ("mobilenetv3_small_050", 64, {}),
    ],
)
def test_maps_of_features_are_rows_of_patches_with_their_mean_in_front(name, size, arguments):
    torch.manual_seed(0)
    model = create_vision("timm", name=name, image_size=size, arguments=arguments).eval()
    x, (index, mask) = images(model), regions(model)
    found = model(x)
    assert found.shape == (2, model.tokens, model.width)
    assert (model.tokens - 1) * model.patch_size**2 == size**2
    assert_close(found[:, 0], found[:, 1:].mean(1))
    features = model.body.forward_head(model.body.forward_features(x), pre_logits=True)
    assert_close(found[:, 1:], features.flatten(2).transpose(1, 2))
    region = model.forward_regions(x, index, mask).image_embeds
    assert torch.equal(region[:, 1:], found[index, 1:])
    weights = mask[:, 1:, None].float()
    assert_close(region[:, 0], (region[:, 1:] * weights).sum(1) / weights.sum(1))
    model.train()
    model(x).square().sum().backward()
    assert not [key for key, p in model.named_parameters() if p.grad is None], "DDP waits for a gradient"


@pytest.mark.parametrize("name", ["beit_base_patch16_224", "eva02_tiny_patch14_224", "cait_xxs24_224"])
def test_modes_that_an_architecture_lacks_are_refused_by_name(name):
    size = 28 if "14" in name else 32
    model = TimmVision(
        name=name, image_size=size, arguments={"embed_dim": 24, "depth": 1, "num_heads": 2}
    ).eval()
    x, (index, mask) = images(model), regions(model)
    assert model(x).shape == (2, 5, 24)
    for call, message in (
        (lambda: model.forward_regions(x, index, mask), "has no region mode"),
        (lambda: model.forward_with_summaries(x, count=1), "has no summaries"),
        (lambda: model.forward_kept(x, index), "cannot leave patches out"),
        (lambda: model(x, torch.zeros(2, 1, 24)), "takes no tokens beside its patches"),
    ):
        with pytest.raises(ValueError, match=f"timm's {name} .*{message}"):
            call()
    words = ConceptEncoder(
        text=Bert(vocabulary=9, width=8, layers=1, heads=2, hidden=8, positions=8), width=24
    )
    with pytest.raises(ValueError, match=f"timm's {name} has no place for them; use place=last"):
        ConceptVision(encoder=model, concepts=words)


def test_blocks_of_a_timm_without_masks_have_no_region_mode(monkeypatch):
    """As in versions of timm before 1.0.16."""
    from timm.models import vision_transformer

    def old(self, x):
        return x

    monkeypatch.setattr(vision_transformer.Block, "forward", old)
    model = timm_vit()
    with pytest.raises(ValueError, match=r"timm's vit_tiny_patch16_224 has no region mode"):
        model.forward_regions(images(model), *regions(model))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"name": "resnet10"}, r"timm has no model 'resnet10'; did you mean resnet10t"),
        ({"name": "hf-hub:timm/resnet10t"}, r"timm has no model 'hf-hub:timm/resnet10t'"),
        ({"name": "resnet10t", "arguments": {"patch": 3}}, r"timm's resnet10t cannot be made with patch=3: "),
        ({"name": "resnet10t", "arguments": {"img_size": 3}}, r"cannot hold img_size, which image_size and"),
        (
            {"name": "vgg11"},
            r"timm's vgg11 makes features of shape \[1, 1, 1, 4096\] of an image of 32 pixels",
        ),
        (
            {"name": "vit_tiny_patch16_224", "local_depth": 13},
            r"local_depth=13 must lie between 0 and the 12",
        ),
    ],
)
def test_arguments_that_do_not_fit_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        create_vision("timm", image_size=32, **arguments)


def test_images_and_masks_of_another_shape_are_refused():
    model = timm_vit()
    with pytest.raises(ValueError, match=r"made for \[N, 3, 32, 32\]"):
        model(torch.zeros(1, 3, 64, 64))
    with pytest.raises(ValueError, match=r"image_attention_mask has shape \[2, 16\], expected \[2, 17\]"):
        model.forward_regions(images(model), torch.tensor([0, 1]), torch.ones(2, 16))


def test_stochastic_depth_acts_in_training_only():
    model = TimmVision(
        name="vit_tiny_patch16_224", image_size=32, drop_path=0.5, local_depth=1, arguments=SMALL
    )
    x = images(model, 8)
    assert not torch.equal(model.train()(x), model(x))
    assert torch.equal(model.eval()(x), model(x))


def test_a_model_is_copied_and_made_on_the_meta_device():
    with torch.device("meta"):
        empty = TimmVision(name="vit_tiny_patch16_224", image_size=32, local_depth=1, arguments=SMALL)
    assert (empty.tokens, empty.width) == (5, 24)
    model = timm_vit()
    assert torch.equal(copy.deepcopy(model)(images(model)), model(images(model)))


def test_vicha_and_xvlm_train_with_a_backbone_of_timm():
    """Concepts among its patches, hierarchy, masked images and regions: every parameter learns."""
    torch.manual_seed(0)
    text = {"vocabulary": 30, "width": 24, "heads": 2, "hidden": 16, "positions": 12}
    encoder = TimmVision(
        name="vit_tiny_patch16_224", image_size=32, local_depth=1, arguments={"patch_size": 8, **SMALL}
    )
    words = ConceptEncoder(text=Bert(layers=1, **text), width=24)
    vision = ConceptVision(encoder=encoder, concepts=words)
    ids = torch.randint(5, 30, (2, 6))
    images_ = Images(images(encoder), concepts=Concepts(ids[:, :4], torch.ones(2, 4, dtype=torch.long)))
    batch = images_, ids, torch.ones_like(ids), ids, torch.ones(2, 1, dtype=torch.long), ids[:, 1:2]

    def model(kind, **options):
        fusion = Bert(layers=2, fusion_layer=1, image_width=24, **text)
        return kind(vision=vision, text=fusion, embed_width=8, **options)

    masked = MaskedImageDecoder(image_width=24, patch=8, image_size=32, width=8, depth=1, heads=2)
    vicha = model(Vicha, levels=1, masked_image=masked)
    taught = Taught(*torch.nn.functional.normalize(torch.randn(2, 2, 8), dim=2), None)
    found = vicha.pretrain(*batch, taught=taught)
    assert found.hidden_image.shape == (1, 2, 8)
    (found.match_logits.square().sum() + found.patches.predicted.square().sum()).backward()
    assert not [key for key, p in vision.named_parameters() if p.grad is None]
    vision.zero_grad()
    region = {"image_index_B": torch.tensor([0, 1]), "image_attention_mask_BL": torch.ones(2, vision.tokens)}
    model(Xvlm).pretrain(*batch, **region).match_logits.square().sum().backward()
    assert not [key for key, p in vision.named_parameters() if p.grad is None]


def test_timm_is_imported_only_when_one_is_made():
    code = (
        "import sys, vlp_core.vision, vlp_core.models\n"
        "vlp_core.vision.create_vision('vit', image_size=32, patch=8, width=8, depth=4, heads=2)\n"
        "assert 'timm' not in sys.modules\n"
        "sys.modules['timm'] = None\n"
        "try: vlp_core.vision.create_vision('timm', name='resnet10t', image_size=32)\n"
        "except ImportError as error: print(error)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "vision kind timm needs timm: pip install 'vlp-core[timm]'"


def test_kinds_are_known_by_name():
    swin = create_vision("swin", image_size=32, window=2, width=8, depths=[1, 1], heads=[1, 2])
    assert isinstance(swin, SwinTransformer)
    with pytest.raises(ValueError, match="vision kind 'resnet' is not known; choose swin, clip, vit or timm"):
        create_vision("resnet")
    with pytest.raises(TypeError, match="depths"):
        create_vision("vit", depths=3)
