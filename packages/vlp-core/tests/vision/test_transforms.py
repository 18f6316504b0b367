"""Encoders under export with a free batch size, under `torch.func`, and made on the meta device."""

import copy

import pytest
import torch
from torch.testing import assert_close
from vlp_core.vision import ClipVisionTransformer, ImageEncoder, SwinTransformer, VisionTransformer

SIZES = {"image_size": 32, "patch": 8, "width": 16, "depth": 2, "heads": 2, "local_depth": 1}
# PyTorch says that it calls its fused attention once for each.
pytestmark = pytest.mark.filterwarnings("ignore:There is a performance drop")
ENCODERS = {
    "vit": lambda: VisionTransformer(**SIZES),
    "clip": lambda: ClipVisionTransformer(**SIZES, hidden=32),
    "swin": lambda: SwinTransformer(
        image_size=64, window=4, width=8, depths=(2, 3, 2), heads=(2, 4, 8), drop_path=0.0
    ),
}


@pytest.fixture(params=ENCODERS)
def encoder(request) -> ImageEncoder:
    torch.manual_seed(0)
    return ENCODERS[request.param]()


def images(encoder: ImageEncoder, count: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(count, 3, encoder.image_size, encoder.image_size, generator=generator)


@pytest.mark.parametrize("train", [False, True])
def test_export_with_a_free_batch_size(encoder, train):
    encoder.train(train)
    batch = torch.export.Dim("batch", min=1, max=64)
    exported = torch.export.export(encoder, (images(encoder, 3),), dynamic_shapes=({0: batch},))
    for count in (1, 2, 5):
        image = images(encoder, count)
        assert_close(exported.module()(image), encoder(image), rtol=1e-4, atol=1e-5)


def test_gradients_of_torch_func_are_those_of_autograd(encoder):
    image = images(encoder, 2)
    parameters = {name: value.detach() for name, value in encoder.named_parameters()}

    def loss(parameters, image):
        return torch.func.functional_call(encoder, parameters, (image,)).square().mean()

    found = torch.func.grad(loss)(parameters, image)
    expected = torch.autograd.grad(encoder(image).square().mean(), list(encoder.parameters()))
    for (name, ours), want in zip(found.items(), expected, strict=True):
        assert_close(ours, want, rtol=1e-4, atol=1e-6, msg=lambda text, name=name: f"{name}: {text}")
    # A gradient for each image.
    each = torch.vmap(torch.func.grad(loss), in_dims=(None, 0))(parameters, image[:, None])
    alone = torch.func.grad(loss)(parameters, image[1:])
    for name, want in alone.items():
        assert_close(each[name][1], want, rtol=1e-4, atol=1e-6)


def test_vmap_and_jacrev(encoder):
    image = images(encoder, 4)
    found = torch.vmap(encoder)(image.view(2, 2, *image.shape[1:]))
    assert_close(found.flatten(0, 1), encoder(image), rtol=1e-4, atol=1e-5)

    def few(brightness):
        return encoder(image[:1] * brightness)[0, :2, :3]

    brightness = torch.tensor(1.5)
    jacobian = torch.func.jacrev(few)(brightness)
    step = 1e-2
    expected = (few(brightness + step) - few(brightness - step)) / (2 * step)
    assert_close(jacobian, expected, rtol=0.02, atol=2e-3)


@pytest.mark.parametrize("how", ["to_empty", "assign"])
def test_made_on_the_meta_device_and_filled(encoder, how, request):
    """Tables that are no part of the state are made again."""
    name = request.node.callspec.params["encoder"]
    with torch.device("meta"):
        empty = ENCODERS[name]()
    if how == "to_empty":
        empty.to_empty(device="cpu")
        empty.load_state_dict(encoder.state_dict())
    else:
        empty.load_state_dict(encoder.state_dict(), assign=True)
    image = images(encoder, 2)
    for made in (empty, copy.deepcopy(empty)):
        assert_close(made.eval()(image), encoder.eval()(image), rtol=0, atol=0)
    assert empty.state_dict().keys() == encoder.state_dict().keys()
