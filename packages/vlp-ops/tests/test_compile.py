"""Every operator through inductor, forward and backward in one graph: what users' torch.compile takes."""

import pytest
import torch
from vlp_ops import (
    MSDeformAttn,
    attention,
    clip_loss,
    embedding_bag,
    info_nce,
    ms_deform_attn,
    product_key_lookup,
    product_key_topk,
    random_masking,
    restore_tokens,
    siglip_loss,
    take_tokens,
)

pytestmark = pytest.mark.slow
SHAPES = [(5, 4), (2, 3)]


def leaf(*shape: int, positive: bool = False):
    tensor = torch.rand(*shape) if positive else torch.randn(*shape)
    return tensor.requires_grad_()


def deformable():
    arguments = leaf(2, 26, 2, 8), leaf(2, 7, 2, 2, 3, 2, positive=True), leaf(2, 7, 2, 2, 3)
    return lambda v, x, w: ms_deform_attn(v, SHAPES, x, w, softmax=True), arguments


def deformable_by_tensor():
    shapes = torch.tensor(SHAPES)
    arguments = leaf(2, 26, 2, 8), shapes, leaf(2, 7, 2, 2, 3, 2, positive=True), leaf(2, 7, 2, 2, 3)
    return lambda v, s, x, w: ms_deform_attn(v, s, x, w), arguments


def module():
    layer = MSDeformAttn(16, n_levels=2, n_heads=2, n_points=3)
    arguments = leaf(2, 7, 16), leaf(2, 7, 2, 2, positive=True), leaf(2, 26, 16)
    return lambda q, r, x: layer(q, r, x, SHAPES), arguments


def topk():
    return lambda q, k: product_key_topk(q, k, 4)[0], (leaf(6, 2, 10), leaf(2, 2, 9, 5))


def bag():
    indices = torch.randint(0, 11, (5, 4))
    return lambda i, t, w: embedding_bag(i, t, w), (indices, leaf(11, 6), leaf(5, 4))


def lookup():
    return lambda q, k, v: product_key_lookup(q, k, v, 3), (leaf(6, 2, 10), leaf(2, 2, 9, 5), leaf(81, 8))


def clip():
    return lambda i, t, s: clip_loss(i, t, s), (leaf(9, 6), leaf(9, 6), leaf(1))


def clip_by_ids():
    ids = torch.arange(9) // 2
    return lambda i, t, s, ids: clip_loss(i, t, s, ids=ids), (leaf(9, 6), leaf(9, 6), leaf(1), ids)


def contrast():
    return lambda q, k, s, soft: info_nce(q, k, s, soft_targets=soft), (
        leaf(9, 6),
        leaf(12, 6),
        leaf(1),
        torch.rand(9, 12).softmax(1),
    )


def siglip():
    return lambda i, t, s, b: siglip_loss(i, t, s, b), (leaf(9, 6), leaf(9, 6), leaf(1), leaf(1))


def masked():
    lengths = torch.tensor([4, 7])
    options = leaf(2, 3, 5, 8), leaf(2, 3, 7, 8), leaf(2, 3, 7, 8), leaf(3, 5, 7), lengths
    return lambda q, k, v, b, n: attention(q, k, v, bias=b, key_lengths=n), options


def packed():
    cu = torch.tensor([0, 3, 7])
    tensors = leaf(1, 3, 7, 8), leaf(1, 3, 7, 8), leaf(1, 3, 7, 8), cu
    return lambda q, k, v, cu: attention(q, k, v, cu_seqlens=cu), tensors


def tokens():
    def both(x, token, noise):
        kept, mask, ids_restore, ids_keep = random_masking(x, 0.5, noise=noise)
        return restore_tokens(kept, ids_restore, token) * mask[..., None] + take_tokens(x, ids_keep).sum()

    return both, (leaf(3, 8, 5), leaf(1, 1, 5), torch.rand(3, 8))


PROGRAMS = (
    deformable,
    deformable_by_tensor,
    module,
    topk,
    bag,
    lookup,
    clip,
    clip_by_ids,
    contrast,
    siglip,
    masked,
    packed,
    tokens,
)


def run(program, arguments):
    out = program(*arguments)
    wanted = [tensor for tensor in arguments if tensor.requires_grad]
    weights = torch.arange(out.numel(), dtype=out.dtype).view(out.shape).cos()
    return out, torch.autograd.grad((out * weights).sum(), wanted)


@pytest.mark.parametrize("make", PROGRAMS, ids=lambda make: make.__name__)
def test_inductor(make):
    torch._dynamo.reset()
    torch.manual_seed(0)
    program, arguments = make()
    expected, wanted = run(program, arguments)
    out, grads = run(torch.compile(program, fullgraph=True), arguments)
    torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-5)
    for grad, want in zip(grads, wanted, strict=True):
        torch.testing.assert_close(grad, want, rtol=1e-3, atol=1e-5)
