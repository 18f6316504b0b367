"""Shared parts against their plain formulas."""

import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close
from vlp_core.vision.layers import Block, FeedForward, PatchEmbedding, SelfAttention, quick_gelu, take_rows


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("bias", [True, False])
def test_patch_embedding_equals_the_convolution(bias):
    patch = PatchEmbedding(patch=4, width=10, bias=bias).double()
    image = random(2, 3, 12, 8)
    expected = F.conv2d(image, patch.weight, patch.bias, stride=4).permute(0, 2, 3, 1)
    assert_close(patch(image), expected)


def test_patch_embedding_is_initialised_as_a_convolution():
    torch.manual_seed(0)
    mine, theirs = PatchEmbedding(patch=16, width=64, bias=True), torch.nn.Conv2d(3, 64, 16, 16)
    for ours, reference in ((mine.weight, theirs.weight), (mine.bias, theirs.bias)):
        assert ours.abs().max() <= 1 / 768**0.5
        assert_close(ours.std(), reference.std(), rtol=0.2, atol=0)


def test_quick_gelu_equals_its_formula():
    x = random(50) * 4
    assert_close(quick_gelu(x), x * torch.sigmoid(1.702 * x))


def test_take_rows_equals_indexing_with_gradient():
    x, index, weight = (
        random(4, 3, 5).requires_grad_(),
        torch.tensor([2, 0, 2, 2, 3]),
        random(5, 3, 5, seed=1),
    )
    taken = take_rows(x, index)
    assert torch.equal(taken, x[index])
    (mine,) = torch.autograd.grad((taken * weight).sum(), x)
    (expected,) = torch.autograd.grad((x[index] * weight).sum(), x)
    assert_close(mine, expected)


def test_attention_equals_the_written_out_formula():
    attention = SelfAttention(width=12, heads=3).double()
    x, bias = random(2, 5, 12), random(2, 1, 1, 5, seed=1) * 10
    q, k, v = (t.view(2, 5, 3, 4).transpose(1, 2) for t in attention.qkv(x).chunk(3, dim=-1))
    weights = (q @ k.transpose(2, 3) / 2 + bias).softmax(-1)
    assert_close(attention(x, bias), attention.out((weights @ v).transpose(1, 2).reshape(2, 5, 12)))


def test_masked_keys_have_no_influence():
    block = Block(width=8, heads=2, hidden=16, activation="gelu", eps=1e-6).double()
    x, other = random(1, 4, 8), random(1, 4, 8, seed=1)
    changed = torch.cat([x[:, :3], other[:, 3:]], dim=1)
    bias = torch.tensor([0.0, 0.0, 0.0, -10000.0], dtype=torch.float64).view(1, 1, 1, 4)
    assert torch.equal(block(x, bias)[:, :3], block(changed, bias)[:, :3])
    assert not torch.equal(block(x)[:, :3], block(changed)[:, :3])


def test_heads_must_divide_the_width():
    with pytest.raises(ValueError, match="width=10 must be a multiple of heads=3"):
        SelfAttention(width=10, heads=3)


@pytest.mark.parametrize("shape", [(6, 4), (2, 3, 4)])
def test_an_activation_that_is_made_again_gives_the_same_gradients(shape):
    torch.manual_seed(0)
    layer = FeedForward(width=4, hidden=8, recompute=True).double()
    gradients, calls = {}, {}
    for recompute in (False, True):
        made = []
        layer.recompute = recompute
        layer.activation = lambda x, made=made: (made.append(x.shape), F.gelu(x))[1]
        x = random(*shape).requires_grad_()
        layer(x).square().sum().backward()
        gradients[recompute] = [x.grad, *(parameter.grad for parameter in layer.parameters())]
        calls[recompute] = len(made)
        layer.zero_grad()
    assert calls == {False: 1, True: 2}
    assert_close(gradients[True], gradients[False], rtol=0, atol=0)
