"""Linear layers: the same as PyTorch's, whichever library makes the product."""

import copy
import pickle
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
import vlp_ops
from torch.utils.flop_counter import FlopCounterMode
from vlp_ops import dense

ROWS, INPUTS, OUTPUTS = 1024, 512, 256
assert 2 * ROWS * INPUTS * OUTPUTS >= dense.LEAST_FLOP


@pytest.fixture
def onednn(monkeypatch: pytest.MonkeyPatch) -> None:
    """The processor counts as one that gains."""
    if not hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        pytest.skip("this build of PyTorch has no oneDNN")
    monkeypatch.setattr(dense, "_gains", lambda: dense.ALL)


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
    close.forward(out, expected, depth=INPUTS)
    upstream = torch.randn(expected.shape, generator=torch.Generator().manual_seed(1))
    leaves = [tensor for tensor in given if tensor is not None]
    for ours, theirs, name in zip(
        torch.autograd.grad(out, leaves, upstream),
        torch.autograd.grad(expected, leaves, upstream),
        ("x", "weight", "bias"),
        strict=False,
    ):
        # x sums over the outputs, weight and bias over the rows.
        close.gradient(ours, theirs, name, depth=OUTPUTS if name == "x" else ROWS)


@pytest.mark.parametrize("depth", [512, 4096, 30000])
def test_the_tolerance_follows_from_the_depth(onednn, close, depth):
    """Against float64, at sizes where one number for all depths was too small; not so wide that an error of
    a single product in a sum would pass."""
    generator = torch.Generator().manual_seed(depth)
    x, weight = (torch.randn(rows, depth, generator=generator) for rows in (160, 96))
    exact = F.linear(x.double(), weight.double())
    for backend in ("torch", "onednn"):
        close.forward(vlp_ops.linear(x, weight, backend=backend), exact, depth=depth)
    with pytest.raises(AssertionError, match="relative error"):
        close.forward(vlp_ops.linear(x, weight) + x[:, :1] * weight[:, 0], exact, depth=depth)


def test_transposed_views_and_frozen_parameters(onednn, close):
    x, weight, bias = arguments(True)
    turned = x.detach().t().contiguous().t().requires_grad_()
    frozen = weight.detach()
    out = vlp_ops.linear(turned, frozen, bias)
    close.forward(out, F.linear(x, weight, bias), depth=INPUTS)
    out.sum().backward()
    close.gradient(turned.grad, frozen.sum(0).expand(ROWS, -1), "x", depth=OUTPUTS)
    assert frozen.grad is None


def test_a_product_without_gradient(onednn, close):
    a, b = torch.randn(ROWS, INPUTS), torch.randn(INPUTS, OUTPUTS)
    close.forward(dense.product(a, b), a @ b, depth=INPUTS)
    close.forward(dense.product(a[:3], b), a[:3] @ b, depth=INPUTS)


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


@pytest.fixture
def processor(monkeypatch: pytest.MonkeyPatch):
    """Makes this process believe in another processor, with no choice by the environment."""
    monkeypatch.delenv("VLP_OPS_LINEAR", raising=False)

    def pretend(maker: str, family: int, capability: str = "AVX512") -> None:
        monkeypatch.setattr(dense, "_processor", lambda: (maker, family))
        monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
        dense._gains.cache_clear()

    yield pretend
    dense._gains.cache_clear()


@pytest.mark.parametrize(
    ("maker", "family", "capability", "gains"),
    [
        ("AuthenticAMD", 26, "AVX512", dense.ALL),
        ("AuthenticAMD", 25, "AVX512", dense.ALL),
        # Zen 3 is of the same family and has no AVX-512; families to come were not measured.
        ("AuthenticAMD", 25, "AVX2", None),
        ("AuthenticAMD", 27, "AVX512", None),
        ("GenuineIntel", 26, "AVX512", None),
        ("", 0, "AVX512", None),
    ],
)
def test_the_family_of_the_processor_decides(processor, maker, family, capability, gains):
    """Not a measurement in the process: two starts of one run could then take different products."""
    processor(maker, family, capability)
    assert dense._gains() == gains
    assert vlp_ops.linear_backend(*arguments(True)) == ("torch" if gains is None else "onednn")
    x, weight, _ = arguments(False)
    columns = x.detach().t().contiguous().t()
    assert vlp_ops.linear_backend(columns, weight) == ("onednn" if gains == dense.ALL else "torch")


def test_the_processor_is_read_as_it_names_itself():
    maker, family = dense._processor()
    assert isinstance(maker, str) and isinstance(family, int)
    named = dict(
        line.replace("\t", "").split(":", 1)
        for line in Path("/proc/cpuinfo").read_text().partition("\n\n")[0].splitlines()
    )
    assert (maker, family) == (named["vendor_id"].strip(), int(named["cpu family"]))


def test_the_environment_and_the_argument_choose(processor, monkeypatch):
    processor("GenuineIntel", 6)
    given = arguments(True)
    assert vlp_ops.linear_backend(*given) == "torch"
    assert vlp_ops.linear_backend(*given, backend="onednn") == "onednn"
    for name in ("onednn", "torch"):
        monkeypatch.setenv("VLP_OPS_LINEAR", name)
        dense._gains.cache_clear()
        assert vlp_ops.linear_backend(*given) == name
    torch.testing.assert_close(
        vlp_ops.linear(*given, backend="torch"), F.linear(*given), rtol=0, atol=0, check_stride=True
    )
    monkeypatch.setenv("VLP_OPS_LINEAR", "mkl")
    dense._gains.cache_clear()
    with pytest.raises(ValueError, match="VLP_OPS_LINEAR must be torch or onednn, or not be set, got 'mkl'"):
        vlp_ops.linear(*given)
    with pytest.raises(ValueError, match="backend must be 'torch', 'onednn' or None, got 'mkl'"):
        vlp_ops.linear(*given, backend="mkl")
    with pytest.raises(ValueError, match="oneDNN cannot serve this call"):
        vlp_ops.linear(given[0].double(), given[1].double(), backend="onednn")


def test_second_derivatives_are_those_of_pytorch(onednn, close):
    """A gradient penalty: the upstream gradient of the first backward pass is a constant."""
    found = {}
    for name, function in (("ours", vlp_ops.linear), ("theirs", F.linear)):
        x, weight, bias = (tensor.detach().requires_grad_() for tensor in arguments(True))
        out = function(x, weight, bias).square().mean() + function(x, weight).mean()
        grads = torch.autograd.grad(out, (x, weight), create_graph=True)
        penalty = sum((grad.square().sum() + grad.sum()) for grad in grads)
        found[name] = torch.autograd.grad(penalty, (x, weight, bias))
    for ours, theirs, name in zip(found["ours"], found["theirs"], ("x", "weight", "bias"), strict=True):
        assert theirs.abs().max() > 0
        close.gradient(ours, theirs, name, depth=ROWS)


# PyTorch's own rules for forward mode are scripts.
@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")
def test_forward_mode_goes_through(onednn, close):
    x, weight, bias = (tensor.detach() for tensor in arguments(True))
    tangent = torch.randn(x.shape, generator=torch.Generator().manual_seed(2))
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(x, tangent)
        found = torch.autograd.forward_ad.unpack_dual(vlp_ops.linear(dual, weight, bias)).tangent
    close.forward(found, F.linear(tangent, weight), depth=INPUTS)
    primal, found = torch.func.jvp(lambda x: vlp_ops.linear(x, weight, bias), (x,), (tangent,))
    close.forward(primal, F.linear(x, weight, bias), depth=INPUTS)
    close.forward(found, F.linear(tangent, weight), depth=INPUTS)


def test_flops_are_counted(onednn):
    layer, x = vlp_ops.Linear(INPUTS, OUTPUTS), torch.randn(ROWS, INPUTS, requires_grad=True)
    with FlopCounterMode(display=False) as counter:
        layer(x).sum().backward()
    assert counter.get_total_flops() == 3 * 2 * ROWS * INPUTS * OUTPUTS
    # The forward pass alone was outside: its backward pass is seen all the same.
    out = layer(x)
    with FlopCounterMode(display=False) as counter:
        out.sum().backward()
    assert counter.get_total_flops() == 2 * 2 * ROWS * INPUTS * OUTPUTS


# torch.ao.quantization says that it will go; until then people use it.
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")
def test_quantize_dynamic_finds_the_layer():
    model = torch.nn.Sequential(vlp_ops.Linear(16, 8), torch.nn.ReLU(), vlp_ops.Linear(8, 4))
    quantized = torch.ao.quantization.quantize_dynamic(model)
    assert [type(part).__module__.split(".")[3:4] for part in quantized[::2]] == [["quantized"]] * 2
    x = torch.randn(3, 16)
    torch.testing.assert_close(quantized(x), model(x), rtol=0.1, atol=0.1)
    # What makes it found changes nothing else.
    assert type(model[0]) is vlp_ops.Linear is not torch.nn.Linear
    assert vlp_ops.Linear not in (torch.nn.ReLU, torch.nn.Module)
    again = pickle.loads(pickle.dumps(copy.deepcopy(model)))
    assert type(again[0]) is vlp_ops.Linear
    torch.testing.assert_close(again(x), model(x), rtol=0, atol=0)


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
