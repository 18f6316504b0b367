"""The encoders on a GPU (other attention kernels) against the CPU."""

import pytest
import torch
from torch import nn
from torch.testing import assert_close
from vlp_core.vision import ClipVisionTransformer, SwinTransformer, VisionTransformer

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]

ENCODERS = {
    "swin": lambda: SwinTransformer(
        image_size=112, window=7, width=32, depths=(2, 2), heads=(1, 2), drop_path=0.0
    ),
    "clip": lambda: ClipVisionTransformer(
        image_size=64, patch=16, width=64, depth=3, heads=2, hidden=128, local_depth=2
    ),
    "vit": lambda: VisionTransformer(image_size=64, patch=16, width=64, depth=3, heads=2, local_depth=2),
}


def run(model: nn.Module, device: str) -> tuple[torch.Tensor, list[torch.Tensor]]:
    generator = torch.Generator().manual_seed(0)
    image = torch.randn(2, 3, model.image_size, model.image_size, generator=generator).to(device)
    mask = torch.randint(0, 2, (3, model.tokens), generator=generator).to(device)
    mask[:, :2] = 1
    found = model.forward_regions(image, torch.tensor([1, 0, 1], device=device), mask)
    weight = torch.randn(found.image_embeds.shape, generator=generator).to(device)
    loss = (found.image_embeds * weight).sum() + found.full_embeds.square().sum()
    return found.image_embeds.detach().float().cpu(), [
        g.cpu() for g in torch.autograd.grad(loss, list(model.parameters()))
    ]


@pytest.mark.parametrize("kind", ENCODERS)
def test_features_and_gradients_equal_the_cpu(kind):
    torch.manual_seed(0)
    model = ENCODERS[kind]()
    expected, expected_gradients = run(model, "cpu")
    found, gradients = run(model.cuda(), "cuda")
    assert_close(found, expected, rtol=1e-3, atol=1e-4)
    for mine, theirs in zip(gradients, expected_gradients, strict=True):
        assert float((mine - theirs).norm()) <= 1e-3 * float(theirs.norm()) + 1e-4


@pytest.mark.parametrize("kind", ENCODERS)
def test_bfloat16_stays_near(kind):
    torch.manual_seed(0)
    model = ENCODERS[kind]().cuda()
    expected, _ = run(model, "cuda")
    with torch.autocast("cuda", torch.bfloat16):
        found, gradients = run(model, "cuda")
    assert_close(found, expected, rtol=0.1, atol=0.15)
    assert all(bool(gradient.isfinite().all()) for gradient in gradients)
