"""What all image encoders promise: the same features of `encode` as of `forward`, and refusals in words."""

import pytest
import torch
from vlp_core.concepts import ConceptEncoder, ConceptVision
from vlp_core.images import Concepts, Images
from vlp_core.text.bert import Bert
from vlp_core.vision import (
    ClipVisionTransformer,
    ImageEncoder,
    ImageStates,
    SwinTransformer,
    VisionTransformer,
    encode_groups,
)

VIT = {"image_size": 32, "patch": 8, "width": 16, "depth": 3, "heads": 2, "local_depth": 1}
ENCODERS = {
    "swin": lambda: SwinTransformer(image_size=32, window=2, width=8, depths=[1, 1], heads=[1, 2]),
    "clip": lambda: ClipVisionTransformer(**VIT, hidden=24),
    "vit": lambda: VisionTransformer(**VIT),
}


def encoder(kind: str) -> ImageEncoder:
    torch.manual_seed(0)
    return ENCODERS[kind]().eval()


def pixels(count: int = 2) -> torch.Tensor:
    return torch.randn(count, 3, 32, 32, generator=torch.Generator().manual_seed(1))


def words(count: int, length: int) -> Concepts:
    ids = torch.randint(1, 20, (count, length), generator=torch.Generator().manual_seed(2))
    return Concepts(ids, torch.ones_like(ids))


@pytest.mark.parametrize("kind", ENCODERS)
def test_values_and_tensors_give_the_same(kind):
    model, index = encoder(kind), torch.tensor([1, 0, 1])
    region = torch.ones(3, model.tokens)
    region[:, 5:] = 0
    embeds, mask = model.encode(Images(pixels()))
    assert mask is None
    assert torch.equal(embeds, model(pixels()))
    assert embeds.shape == (2, model.tokens, model.width)
    for found, expected in zip(
        model.encode_regions(Images(pixels()), index, region),
        model.forward_regions(pixels(), index, region),
        strict=True,
    ):
        assert torch.equal(found, expected)
    if model.depth:
        found = model.encode_with_summaries(Images(pixels()), count=2)
        assert torch.equal(found.embeds, embeds)
        assert found.summaries.shape == (2, 2, model.width)


@pytest.mark.parametrize("kind", ENCODERS)
@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"padding": torch.zeros(2, 32, 32, dtype=torch.bool)}, "takes images that fill their batch"),
        ({"concepts": words(2, 3)}, "sees no visual concepts"),
        ({"beside": {"size": torch.ones(2, 2)}}, "reads nothing beside the pixels; leave size out"),
    ],
)
def test_what_an_encoder_cannot_read_is_refused(kind, given, message):
    model, images = encoder(kind), Images(pixels(), **given)
    index, region = torch.tensor([0]), torch.ones(1, model.tokens)
    for call in (
        lambda: model.encode(images),
        lambda: model.encode_regions(images, index, region),
        lambda: model.encode_with_summaries(images, count=1),
    ):
        with pytest.raises(ValueError, match=f"{type(model).__name__} {message}"):
            call()


@pytest.mark.parametrize("kind", ["swin", "clip"])
def test_modes_that_an_architecture_lacks_are_refused_in_words(kind):
    model = encoder(kind)
    assert not model.depth
    assert not model.keeps_patches
    with pytest.raises(ValueError, match=f"{type(model).__name__} has no class token after each of its"):
        model.forward_with_summaries(pixels(), count=1)
    with pytest.raises(ValueError, match=f"{type(model).__name__} cannot leave patches out"):
        model.forward_kept(torch.zeros(1, 2, 192), torch.zeros(1, 2, dtype=torch.long))
    with pytest.raises(ValueError, match="Plain has no region mode"):
        Plain().forward_regions(pixels(), torch.tensor([0]), torch.ones(1, 2))


class Plain(ImageEncoder):
    """An encoder of somebody else: one token, the mean colour; hides what is padding."""

    def __init__(self) -> None:
        super().__init__()
        self.width, self.image_size, self.patch_size, self.tokens = 3, 32, 32, 2

    def encode(self, images: Images) -> ImageStates:
        images.refuse("concepts", "beside", by=self.called)
        colour = images.pixels.mean((2, 3))[:, None].expand(-1, 2, -1)
        mask = None
        if images.padding is not None:
            mask = torch.stack([torch.ones(len(images)), 1 - images.padding.float().mean((1, 2))], 1) > 0
        return ImageStates(colour, mask)


def test_concepts_stand_behind_an_encoder_that_reads_padding():
    model = ConceptVision(
        encoder=Plain(),
        concepts=ConceptEncoder(
            text=Bert(vocabulary=20, width=8, layers=1, heads=2, hidden=8, positions=8), width=3
        ),
        place="last",
    ).eval()
    padding = torch.zeros(2, 32, 32, dtype=torch.bool)
    padding[1] = True
    images = Images(pixels(), padding=padding, concepts=words(2, 3))
    embeds, mask = model.encode(images)
    assert embeds.shape == (2, 5, 3)
    assert mask.tolist() == [[True] * 5, [True, False, True, True, True]]
    model.visible_padding = False
    images.concepts.attention_mask[0, 2] = 0
    assert model.encode(images).mask.tolist() == [[True] * 4 + [False], [True, False, True, True, True]]
    with pytest.raises(ValueError, match="sees visual concepts beside the image"):
        model(pixels())


def test_groups_of_one_layout_are_one_batch_and_others_are_filled_up():
    model = encoder("vit")
    both = Images(pixels(4))
    assert torch.equal(encode_groups(model, both.split(2)).embeds, model(pixels(4)))
    seen = ConceptVision(
        encoder=model,
        concepts=ConceptEncoder(
            text=Bert(vocabulary=20, width=8, layers=1, heads=2, hidden=8, positions=8), width=16
        ),
    ).eval()
    groups = [Images(pixels(2), concepts=words(2, length)) for length in (2, 4)]
    embeds, mask = encode_groups(seen, groups)
    assert embeds.shape == (4, model.tokens + 4, 16)
    assert torch.equal(embeds[:2, :-2], seen.encode(groups[0]).embeds)
    assert torch.equal(embeds[2:], seen.encode(groups[1]).embeds)
    assert not mask[:2, -2:].any()
    assert mask.sum() == mask.numel() - 4
    equal = [Images(pixels(2), concepts=words(2, 3)) for _ in range(2)]
    assert encode_groups(seen, equal).mask is None
