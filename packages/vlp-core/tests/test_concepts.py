"""Concepts beside the patches of any image encoder; ViCHA's own numbers are in models/test_vicha.py."""

import pytest
import torch
from vlp_core import models
from vlp_core.concepts import ConceptEncoder, ConceptVision, image_encoder
from vlp_core.images import Concepts, Images
from vlp_core.text.bert import Bert
from vlp_core.vision import SwinTransformer, VisionTransformer

TEXT = {"vocabulary": 30, "width": 8, "heads": 2, "hidden": 16, "positions": 12}


def words(count: int = 2, tokens: int = 4) -> Concepts:
    torch.manual_seed(3)
    mask = (torch.arange(tokens) < torch.tensor([[tokens], [2]])[:count]).long()
    return Concepts(torch.randint(5, 30, (count, tokens)) * mask, mask)


def vit() -> VisionTransformer:
    torch.manual_seed(0)
    return VisionTransformer(image_size=16, patch=4, width=8, depth=2, heads=2, local_depth=1)


def with_concepts(encoder, **options) -> ConceptVision:
    torch.manual_seed(1)
    concepts = ConceptEncoder(text=Bert(layers=1, **TEXT), width=encoder.width)
    return ConceptVision(encoder=encoder, concepts=concepts, **options).eval()


def test_concepts_come_after_the_patches_and_change_them_only_where_they_stand_first():
    image = torch.randn(2, 3, 16, 16)
    for place in ("first", "last"):
        vision = with_concepts(vit(), place=place)
        seen = vision.encode(Images(image, concepts=words())).embeds
        assert seen.shape == (2, vision.tokens + 4, 8)
        alone = image_encoder(vision)(image)
        assert torch.allclose(seen[:, : vision.tokens], alone) == (place == "last")


@pytest.mark.parametrize("place", ["first", "last"])
def test_a_region_that_is_the_whole_image_sees_what_the_image_sees(place):
    images = Images(torch.randn(2, 3, 16, 16), concepts=words())
    vision = with_concepts(vit(), place=place)
    index = torch.tensor([1, 0, 1])
    everything = torch.ones(3, vision.tokens, dtype=torch.long)
    regions = vision.encode_regions(images, index, everything)
    whole = vision.encode(images).embeds
    torch.testing.assert_close(regions.full_embeds, whole)
    torch.testing.assert_close(regions.image_embeds, whole[index])
    part = everything.clone()
    part[:, 5:] = 0
    regions = vision.encode_regions(images, index, part)
    assert not torch.allclose(regions.image_embeds[:, 0], whole[index][:, 0])
    with pytest.raises(ValueError, match="not made for regions"):
        with_concepts(vit(), place=place, visible_padding=False).encode_regions(images, index, everything)


def test_an_embedding_alone_encodes_concepts():
    encoder = ConceptEncoder(text=Bert(layers=0, **TEXT), width=6).eval()
    assert encoder(words()).shape == (2, 4, 6)
    with pytest.raises(ValueError, match="attends to no image"):
        ConceptEncoder(text=Bert(layers=2, fusion_layer=1, image_width=8, **TEXT), width=6)


@pytest.mark.parametrize("kind", ["swin", "vit"])
def test_xvlm_trains_on_images_and_regions_with_concepts(kind):
    """Every part of the model learns, also with the windows of Swin, where concepts stand last."""
    torch.manual_seed(0)
    vision = {
        "swin": {
            "kind": "swin",
            "image_size": 32,
            "window": 2,
            "width": 4,
            "depths": [1, 1],
            "heads": [1, 2],
        },
        "vit": {
            "kind": "vit",
            "image_size": 32,
            "patch": 8,
            "width": 8,
            "depth": 2,
            "heads": 2,
            "local_depth": 1,
        },
    }[kind]
    model = models.create(
        "xvlm",
        "pretrain",
        vision=vision,
        text={**TEXT, "layers": 2, "fusion_layer": 1},
        embed_width=4,
        concepts={"layers": 1, "place": "last" if kind == "swin" else "first"},
    )
    images = Images(torch.randn(2, 3, 32, 32), concepts=words())
    ids = torch.randint(5, 30, (2, 6))
    mask, places, labels = torch.ones_like(ids), torch.ones(2, 1, dtype=torch.long), ids[:, 1:2]
    regions = {
        "image_index_B": torch.tensor([0, 1]),
        "image_attention_mask_BL": torch.ones(2, model.vision.tokens, dtype=torch.long),
    }
    for more in ({}, regions):
        model.zero_grad()
        pairs = model.pretrain(images, ids, mask, ids, places, labels, **more)
        pairs.match_logits.square().sum().backward()
        assert model.vision.concepts.project.weight.grad.abs().sum() > 0
        assert pairs.image_embeds.shape[1] == model.vision.tokens + 4


def test_swin_has_no_place_for_concepts_before_its_blocks():
    swin = SwinTransformer(image_size=32, window=2, width=4, depths=[1, 1], heads=[1, 2])
    with pytest.raises(ValueError, match="SwinTransformer has no place for them; use place=last"):
        with_concepts(swin)
