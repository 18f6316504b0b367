import pytest
import torch
from vlp_core.images import Concepts, Images


def images(count: int = 4, *, length: int = 3, side: int = 8) -> Images:
    generator = torch.Generator().manual_seed(count)
    ids = torch.randint(1, 9, (count, length), generator=generator)
    return Images(
        torch.randn(count, 3, side, side, generator=generator),
        padding=torch.rand(count, side, side, generator=generator) < 0.5,
        concepts=Concepts(ids, torch.ones_like(ids)),
        beside={"size": torch.arange(2 * count).view(count, 2)},
    )


def tensors(found: Images) -> list[torch.Tensor]:
    return [found.pixels, found.padding, *found.concepts, found.beside["size"]]


def same(first: Images, second: Images) -> bool:
    return all(torch.equal(a, b) for a, b in zip(tensors(first), tensors(second), strict=True))


def test_every_tensor_is_taken_moved_and_copied():
    whole = images()
    assert len(whole) == 4
    assert whole.device == whole.pixels.device
    index = torch.tensor([2, 0, 2])
    for found, expected in zip(tensors(whole.rows(index)), tensors(whole), strict=True):
        assert torch.equal(found, expected[index])
    assert same(whole.rows(slice(1, 3)), whole.rows(torch.tensor([1, 2])))
    assert all(tensor.device.type == "meta" for tensor in tensors(whole.to("meta")))
    whole.pixels.requires_grad_()
    assert not whole.detach().pixels.requires_grad
    assert same(whole.detach(), whole)


@pytest.mark.parametrize("sizes", [1, 2, 3, 9, [1, 3], [0, 4], [2, 1, 1]])
def test_groups_are_parted_and_joined(sizes):
    whole = images()
    groups = whole.split(sizes)
    expected = whole.pixels.split(sizes)
    assert [len(group) for group in groups] == [len(part) for part in expected]
    assert same(Images.cat(groups), whole)


def test_what_does_not_fit_together_is_refused():
    with pytest.raises(ValueError, match=r"4 images cannot be split into groups of 2 \+ 1"):
        images().split([2, 1])
    with pytest.raises(ValueError, match="cannot be split into groups of 0"):
        images().split(0)
    with pytest.raises(ValueError, match="4 images came with concepts of 3"):
        Images(images().pixels, concepts=images(3).concepts)
    with pytest.raises(ValueError, match=r"4 images came with beside\['size'\] of 3"):
        Images(images().pixels, beside={"size": torch.zeros(3)})
    with pytest.raises(ValueError, match="no images were given to join"):
        Images.cat([])
    with pytest.raises(ValueError, match=r"differ in the shape of concepts: \[3\] and \[5\] for each image"):
        Images.cat([images(), images(length=5)])
    with pytest.raises(ValueError, match=r"differ in the shape of padding: \[4, 4\] and \[8, 8\]"):
        Images.cat([images(), images(side=4)])
    with pytest.raises(ValueError, match="only some of the images to join have padding"):
        Images.cat([images(), Images(images().pixels, None, images().concepts, images().beside)])


def test_fields_that_cannot_take_effect_are_refused():
    plain = Images(images().pixels)
    plain.refuse("padding", "concepts", "beside", by="Someone")
    messages = {
        "padding": "Someone takes images that fill their batch; leave `padding` out",
        "concepts": "Someone sees no visual concepts; leave `concepts` out",
        "beside": "Someone reads nothing beside the pixels; leave size out of `beside`",
    }
    for field, message in messages.items():
        with pytest.raises(ValueError, match=message):
            images().refuse(field, by="Someone")
        given = Images(plain.pixels, **{field: getattr(images(), field)})
        given.refuse(*(messages.keys() - {field}), by="Someone")
