"""Linear layers: the same as PyTorch's, whichever library makes the product."""

import pytest
import torch
import torch.nn.functional as F
import vlp_ops
from vlp_ops import dense

ROWS, INPUTS, OUTPUTS = 1024, 512, 256
assert 2 * ROWS * INPUTS * OUTPUTS >= dense.LEAST_FLOP


@pytest.fixture
def onednn(monkeypatch: pytest.MonkeyPatch) -> None:
    """The processor counts as one that gains."""
    if not hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        pytest.skip("this build of PyTorch has no oneDNN")
    monkeypatch.setattr(dense, "_processor_gains", lambda: True)


def arguments(bias: bool, shape: tuple[int, ...] = (ROWS,)) -> list[torch.Tensor | None]:
    rng = torch.Generator().manual_seed(0)
    x, weight, b = (
        torch.randn(*size, generator=rng) for size in ((*shape, INPUTS), (OUTPUTS, INPUTS), (OUTPUTS,))
    )
    return [x.requires_grad_(), weight.requires_grad_(), b.requires_grad_() if bias else None]


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(ROWS,), (4, ROWS // 4), (2, 2, ROWS // 4)])
def test_values_and_gradients_are_those_of_pytorch(onednn, close, bias, shape):
    given = arguments(bias, shape)
    assert vlp_ops.linear_backend(*given) == "onednn"
    out, expected = vlp_ops.linear(*given), F.linear(*given)
    close.forward(out, expected)
    upstream = torch.randn(expected.shape, generator=torch.Generator().manual_seed(1))
    leaves = [tensor for tensor in given if tensor is not None]
    for ours, theirs, name in zip(
        torch.autograd.grad(out, leaves, upstream),
        torch.autograd.grad(expected, leaves, upstream),
        ("x", "weight", "bias"),
        strict=False,
    ):
        close.gradient(ours, theirs, name)


def test_transposed_views_and_frozen_parameters(onednn, close):
    x, weight, bias = arguments(True)
    turned = x.detach().t().contiguous().t().requires_grad_()
    frozen = weight.detach()
    out = vlp_ops.linear(turned, frozen, bias)
    close.forward(out, F.linear(x, weight, bias))
    out.sum().backward()
    close.gradient(turned.grad, frozen.sum(0).expand(ROWS, -1), "x")
    assert frozen.grad is None


def test_a_product_without_gradient(onednn, close):
    a, b = torch.randn(ROWS, INPUTS), torch.randn(INPUTS, OUTPUTS)
    close.forward(dense.product(a, b), a @ b)
    close.forward(dense.product(a[:3], b), a[:3] @ b)


def test_what_stays_with_pytorch(onednn):
    x, weight, bias = arguments(True)
    assert vlp_ops.linear_backend(x[:100], weight, bias) == "torch"
    assert vlp_ops.linear_backend(x.double(), weight.double(), bias.double()) == "torch"
    with torch.autocast("cpu", torch.bfloat16):
        assert vlp_ops.linear_backend(x, weight, bias) == "torch"
        assert vlp_ops.linear(x, weight, bias).dtype == torch.bfloat16
    previous = torch._C._get_mkldnn_enabled()
    try:
        torch._C._set_mkldnn_enabled(False)
        assert vlp_ops.linear_backend(x, weight, bias) == "torch"
    finally:
        torch._C._set_mkldnn_enabled(previous)
    found = torch.func.vmap(lambda row: vlp_ops.linear(row, weight, bias))(x.detach()[:, None])
    torch.testing.assert_close(found[:, 0], F.linear(x, weight, bias))


def test_another_processor_stays_with_pytorch(monkeypatch):
    monkeypatch.setattr(dense, "_processor_gains", lambda: False)
    assert vlp_ops.linear_backend(*arguments(True)) == "torch"


@pytest.mark.parametrize(("size", "length"), [((3, 4), 5), ((), 5)])
def test_errors_are_those_of_pytorch(size, length):
    with pytest.raises(RuntimeError):
        vlp_ops.linear(torch.zeros(size), torch.zeros(2, length))


def test_the_module_starts_as_pytorchs(onednn):
    torch.manual_seed(0)
    ours = vlp_ops.Linear(INPUTS, OUTPUTS)
    torch.manual_seed(0)
    theirs = torch.nn.Linear(INPUTS, OUTPUTS)
    for name, value in theirs.state_dict().items():
        torch.testing.assert_close(ours.state_dict()[name], value, rtol=0, atol=0)
    x = torch.randn(ROWS, INPUTS)
    torch.testing.assert_close(ours(x), theirs(x))


def test_the_same_bits_again(onednn):
    """A resumed run repeats its numbers, so the product of a shape may not depend on what came before it."""
    x, weight, bias = arguments(True)
    first = vlp_ops.linear(x, weight, bias)
    for rows in range(ROWS - 5, ROWS):
        vlp_ops.linear(x[:rows], weight, bias)
    torch.testing.assert_close(vlp_ops.linear(x, weight, bias), first, rtol=0, atol=0)


@pytest.mark.slow
def test_a_compiled_model_is_one_graph(onednn):
    torch.manual_seed(0)
    layer = vlp_ops.Linear(INPUTS, OUTPUTS)
    x = torch.randn(ROWS, INPUTS)
    torch.testing.assert_close(torch.compile(layer, fullgraph=True)(x), layer(x))
