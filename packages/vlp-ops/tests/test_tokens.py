"""Token keep and restore against golden numbers, the plain definition, and the contract of an operator."""

import re

import pytest
import torch
from vlp_ops import random_masking, reference, restore_tokens, take_tokens


def exactly(message: str) -> str:
    return f"^{re.escape(message)}$"


def arguments(dtype=torch.float64, *, device="cpu", batch=3, length=7, count=3, width=5):
    generator = torch.Generator().manual_seed(0)
    x = (
        torch.randn(batch, length, width, generator=generator, dtype=torch.float64)
        .to(device, dtype)
        .requires_grad_()
    )
    token = torch.randn(width, generator=generator, dtype=torch.float64).to(device, dtype).requires_grad_()
    order = torch.rand(batch, length, generator=generator).argsort(1)
    return x, order[:, :count].to(device), order.argsort(1).to(device), token


@pytest.mark.golden("ops", lambda case: {"noise", "grad_kept", "mask_token"} <= case.tensor_names("inputs"))
def test_case(case, dtype, device, leaf, close):
    inputs, outputs, grads = case.tensors("inputs"), case.tensors("outputs"), case.tensors("grads")
    x, token = leaf(inputs["x"], dtype), leaf(inputs["mask_token"], dtype)
    kept, mask, ids_restore, ids_keep = random_masking(
        x, case.config["mask_ratio"], noise=inputs["noise"].to(device)
    )
    close.forward(kept, outputs["kept"])
    for name, tensor in (("mask", mask), ("ids_restore", ids_restore), ("ids_keep", ids_keep)):
        assert torch.equal(tensor.cpu(), outputs[name]), name
    restored = restore_tokens(kept, ids_restore, token)
    close.forward(restored, outputs["restored"])
    (grad,) = torch.autograd.grad(kept, x, inputs["grad_kept"].to(kept), retain_graph=True)
    close.gradient(grad, grads["kept.x"], "kept.x")
    restored.backward(inputs["grad_restored"].to(restored))
    close.gradient(x.grad, grads["restored.x"], "restored.x")
    close.gradient(token.grad, grads["restored.mask_token"], "mask_token")


@pytest.mark.parametrize("kind", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("index", [torch.int64, torch.int32])
@pytest.mark.parametrize("width", [1, 5, 8, 64, 100])
def test_equals_reference(kind, index, width, device):
    x, ids, ids_restore, token = arguments(kind, device=device, width=width)
    kept = take_tokens(x, ids.to(index))
    assert torch.equal(kept, reference.take_tokens(x, ids))
    out = restore_tokens(kept, ids_restore.to(index), token)
    expected = reference.restore_tokens(reference.take_tokens(x, ids), ids_restore, token)
    assert torch.equal(out, expected)
    upstream = torch.randn(out.shape, device=device).to(kind)
    grads = torch.autograd.grad(out, (x, token), upstream)
    # In float64, so that the oracle itself is not rounded.
    leaves = x.detach().double().requires_grad_(), token.detach().double().requires_grad_()
    again = reference.restore_tokens(reference.take_tokens(leaves[0], ids), ids_restore, leaves[1])
    wanted = torch.autograd.grad(again, leaves, upstream.double())
    assert torch.equal(grads[0].double(), wanted[0])
    tolerance = {torch.float64: 1e-12, torch.float32: 1e-6, torch.bfloat16: 1e-2, torch.float16: 1e-3}[kind]
    torch.testing.assert_close(grads[1].double(), wanted[1], rtol=tolerance, atol=tolerance)


def test_an_index_may_come_twice(device):
    x, _, _, _ = arguments(device=device)
    ids = torch.tensor([[0, 0, 0, 2], [6, 5, 6, 5], [1, 2, 3, 3]], device=device)
    out = take_tokens(x, ids)
    upstream = torch.randn_like(out)
    (grad,) = torch.autograd.grad(out, x, upstream)
    (want,) = torch.autograd.grad(reference.take_tokens(x, ids), x, upstream)
    torch.testing.assert_close(grad, want)


# PyTorch says that it calls the operator once for each.
@pytest.mark.filterwarnings("ignore:There is a performance drop")
@pytest.mark.parametrize("axes", [(0, 0), (0, None), (None, 0), (2, 1)])
def test_vmap(axes, device):
    """Also of the ids, which are read for their range, with compiled kernels and without."""
    x, ids, ids_restore, token = (tensor.detach() for tensor in arguments(device=device))

    def many(tensor, axis):
        made = torch.stack([tensor, tensor.flip(1), tensor.roll(1, 1), tensor])
        return tensor if axis is None else made.movedim(0, axis)

    xs, many_ids = many(x, axes[0]), many(ids, axes[1])
    for function, first, second in (
        (take_tokens, xs, many_ids),
        (
            lambda kept, order: restore_tokens(kept, order, token),
            many(x[:, :3], axes[0]),
            many(ids_restore, axes[1]),
        ),
    ):
        found = torch.vmap(function, in_dims=axes)(first, second)
        for i in range(4):
            each = (
                tensor if axis is None else tensor.select(axis, i)
                for tensor, axis in zip((first, second), axes, strict=True)
            )
            assert torch.equal(found[i], function(*each))
    if axes[1] is not None and device.type == "cpu":
        wrong = many(ids, axes[1]).clone()
        wrong.select(axes[1], 3)[1, 0] = 7
        with pytest.raises(ValueError, match=exactly("take_tokens: index 7 is out of range for 7 tokens")):
            torch.vmap(take_tokens, in_dims=axes)(xs, wrong)
        twice = many(ids_restore, axes[1]).clone()
        twice.select(axes[1], 3)[1, 0] = twice.select(axes[1], 3)[1, 1]
        with pytest.raises(ValueError, match="must be a permutation"):
            torch.vmap(lambda kept, order: restore_tokens(kept, order, token), in_dims=axes)(
                many(x[:, :3], axes[0]), twice
            )


def test_gradcheck(device):
    x, ids, ids_restore, token = arguments(device=device)
    assert torch.autograd.gradcheck(lambda x: take_tokens(x, ids), (x,))
    kept = x[:, :3].detach().requires_grad_()
    assert torch.autograd.gradcheck(lambda k, t: restore_tokens(k, ids_restore, t), (kept, token))


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")
@pytest.mark.parametrize("kind", [torch.float32, torch.bfloat16])
def test_opcheck(kind, device):
    x, ids, ids_restore, token = arguments(kind, device=device)
    operators = torch.ops.vlp_ops
    kept = x[:, :3].detach().contiguous().requires_grad_()
    torch.library.opcheck(operators.take_tokens.default, (x, ids))
    torch.library.opcheck(operators.take_tokens_backward.default, (kept.detach(), ids, 7))
    torch.library.opcheck(operators.restore_tokens.default, (kept, ids_restore, token))
    torch.library.opcheck(operators.restore_tokens_backward.default, (x.detach(), ids_restore, 3))


def test_compile(device):
    torch._dynamo.reset()

    def masked(x, ids, ids_restore, token):
        return restore_tokens(take_tokens(x, ids), ids_restore, token)

    compiled = torch.compile(masked, fullgraph=True, dynamic=True, backend="aot_eager")
    for length in (7, 9):
        tensors = arguments(torch.float32, device=device, length=length)
        out, expected = compiled(*tensors), masked(*tensors)
        assert torch.equal(out, expected)
        leaves = tensors[0], tensors[3]
        for a, b in zip(
            torch.autograd.grad(out.sum(), leaves), torch.autograd.grad(expected.sum(), leaves), strict=True
        ):
            torch.testing.assert_close(a, b)


@pytest.mark.parametrize("ratio", [0.0, 0.5, 0.75, 1.0])
def test_random_masking(ratio, device):
    x = torch.arange(24.0, device=device).view(2, 12, 1)
    generator = torch.Generator(device).manual_seed(3)
    kept, mask, ids_restore, ids_keep = random_masking(x, ratio, generator=generator)
    count = int(12 * (1 - ratio))
    assert kept.shape == (2, count, 1) and ids_keep.shape == (2, count)
    assert (mask.sum(1) == 12 - count).all()
    assert torch.equal(kept, reference.take_tokens(x, ids_keep))
    restored = restore_tokens(kept, ids_restore, torch.full((1, 1, 1), -1.0, device=device))
    assert torch.equal(restored, torch.where(mask[..., None] == 1, -1.0, x))
    again = random_masking(x, ratio, generator=torch.Generator(device).manual_seed(3))
    assert torch.equal(again[3], ids_keep)


@pytest.mark.parametrize("sizes", [{"batch": 0}, {"count": 0}, {"width": 0}])
def test_empty(sizes, device):
    x, ids, ids_restore, token = arguments(device=device, **sizes)
    kept = take_tokens(x, ids)
    out = restore_tokens(kept, ids_restore, token)
    assert torch.equal(out, reference.restore_tokens(kept, ids_restore, token))
    grads = torch.autograd.grad(out.sum(), (x, token))
    assert grads[0].shape == x.shape and grads[1].shape == token.shape


def test_messages():
    x, ids, ids_restore, token = arguments()
    with pytest.raises(ValueError, match=exactly("take_tokens: index 11 is out of range for 7 tokens")):
        take_tokens(x, ids.clamp(max=0) + 11)
    with pytest.raises(ValueError, match=r"ids must have shape \(N, K\) with N=3, got \(2, 3\)"):
        take_tokens(x, ids[:2])
    with pytest.raises(ValueError, match=r"must be a permutation of 0..L-1"):
        restore_tokens(x[:, :3], torch.zeros_like(ids_restore), token)
    with pytest.raises(ValueError, match="with N=3 and L >= 7, got"):
        restore_tokens(x, ids_restore[:, :4], token)
    with pytest.raises(ValueError, match=r"mask_token must hold D=5 numbers, got shape \(4,\)"):
        restore_tokens(x[:, :3], ids_restore, token[:4])
    with pytest.raises(TypeError, match=r"mask_token must be torch.float64 like kept, got torch.float32"):
        restore_tokens(x[:, :3], ids_restore, token.float())
    with pytest.raises(ValueError, match=r"mask_ratio must lie in \[0, 1\], got 1.5"):
        random_masking(x, 1.5)
    with pytest.raises(ValueError, match="give noise or generator, not both"):
        random_masking(x, 0.5, noise=torch.rand(3, 7), generator=torch.Generator())
    with pytest.raises(ValueError, match=r"noise must have shape \(3, 7\), got \(3, 6\)"):
        random_masking(x, 0.5, noise=torch.rand(3, 6))
    with pytest.raises(TypeError, match=r"unsupported dtype torch.int64 for x"):
        take_tokens(x.long(), ids)
