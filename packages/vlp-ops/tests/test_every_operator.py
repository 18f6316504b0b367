"""Rules that hold for every operator: fake tensors, export, determinism, autocast, sizes beyond 32 bits."""

import os
import re

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from vlp_ops import (
    attention,
    backend_info,
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

SHAPES = [(5, 4), (2, 3)]
IDS = torch.tensor([[3, 0, 1], [2, 2, 0]])
ORDER = torch.tensor([[3, 0, 1, 2], [2, 3, 0, 1]])


def numbers(*shape: int):
    return torch.rand(*shape).requires_grad_()


def masked(x, noise):
    return random_masking(x, 0.5, noise=noise)[0]


# Function of tensors, and what makes them: floats are leaves.
PROGRAMS = {
    "ms_deform_attn": (
        lambda v, x, w: ms_deform_attn(v, SHAPES, x, w, softmax=True),
        lambda: (numbers(2, 26, 2, 8), numbers(2, 7, 2, 2, 3, 2), numbers(2, 7, 2, 2, 3)),
    ),
    "ms_deform_attn by tensor": (
        lambda v, s, f, x, w: ms_deform_attn(v, s, x, w, level_start_index=f),
        lambda: (
            numbers(2, 26, 2, 8),
            torch.tensor(SHAPES),
            torch.tensor([0, 20]),
            numbers(2, 7, 2, 2, 3, 2),
            numbers(2, 7, 2, 2, 3),
        ),
    ),
    "ms_deform_attn with starts": (
        lambda v, f, x, w: ms_deform_attn(v, SHAPES, x, w, level_start_index=f),
        lambda: (
            numbers(2, 26, 2, 8),
            torch.tensor([0, 20]),
            numbers(2, 7, 2, 2, 3, 2),
            numbers(2, 7, 2, 2, 3),
        ),
    ),
    "product_key_topk": (
        lambda q, k: product_key_topk(q, k, 4)[0],
        lambda: (numbers(6, 2, 10), numbers(2, 2, 9, 5)),
    ),
    "embedding_bag": (embedding_bag, lambda: (IDS, numbers(5, 6), numbers(2, 3))),
    "product_key_lookup": (
        lambda q, k, v: product_key_lookup(q, k, v, 3),
        lambda: (numbers(6, 2, 10), numbers(2, 2, 9, 5), numbers(81, 8)),
    ),
    "clip_loss": (clip_loss, lambda: (numbers(9, 6), numbers(9, 6), numbers(1))),
    "clip_loss by ids": (
        lambda i, t, s, ids: clip_loss(i, t, s, ids=ids),
        lambda: (numbers(9, 6), numbers(9, 6), numbers(1), torch.arange(9) // 2),
    ),
    "info_nce": (
        lambda q, k, s, p: info_nce(q, k, s, positives=p),
        lambda: (numbers(4, 6), numbers(9, 6), numbers(1), torch.tensor([3, 8, 0, 0])),
    ),
    "siglip_loss": (siglip_loss, lambda: (numbers(9, 6), numbers(9, 6), numbers(1), numbers(1))),
    "attention": (
        lambda q, k, v, n: attention(q, k, v, key_lengths=n),
        lambda: (numbers(2, 3, 5, 8), numbers(2, 3, 7, 8), numbers(2, 3, 7, 8), torch.tensor([4, 0])),
    ),
    "take_tokens": (take_tokens, lambda: (numbers(2, 4, 6), IDS)),
    "restore_tokens": (restore_tokens, lambda: (numbers(2, 3, 6), ORDER, numbers(1, 1, 6))),
    "random_masking": (masked, lambda: (numbers(2, 4, 6), torch.rand(2, 4))),
}


@pytest.fixture(params=PROGRAMS)
def program(request):
    torch.manual_seed(0)
    function, make = PROGRAMS[request.param]
    return function, make()


def test_fake_tensors(program):
    """Shapes, dtypes and strides without computing: no function reads a value that is not there."""
    function, arguments = program
    expected = function(*arguments)
    with FakeTensorMode() as mode:
        out = function(*(mode.from_tensor(tensor) for tensor in arguments))
    assert (out.shape, out.dtype, out.stride()) == (expected.shape, expected.dtype, expected.stride())


def test_export(program):
    function, arguments = program

    class Model(torch.nn.Module):
        def forward(self, *tensors):
            return function(*tensors)

    arguments = tuple(tensor.detach() for tensor in arguments)
    exported = torch.export.export(Model(), arguments)
    torch.testing.assert_close(exported.module()(*arguments), function(*arguments))


def test_deterministic_algorithms_change_nothing_on_the_cpu(program):
    function, arguments = program
    wanted = [tensor for tensor in arguments if tensor.requires_grad]

    def gradients():
        out = function(*arguments)
        return [out, *torch.autograd.grad(out.square().sum(), wanted)]

    expected = gradients()
    torch.use_deterministic_algorithms(True)
    try:
        found = gradients()
    finally:
        torch.use_deterministic_algorithms(False)
    for tensor, want in zip(found, expected, strict=True):
        torch.testing.assert_close(tensor, want, rtol=0, atol=0)


def test_autocast_gives_gradients_in_the_dtype_of_the_inputs(program):
    function, arguments = program
    expected = function(*arguments)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = function(*arguments)
    # Rounded scores may choose other slots of the memory.
    if function is not PROGRAMS["product_key_lookup"][0]:
        torch.testing.assert_close(out.float(), expected, rtol=0.03, atol=0.03)
    wanted = [tensor for tensor in arguments if tensor.requires_grad]
    for grad, tensor in zip(torch.autograd.grad(out.float().sum(), wanted), wanted, strict=True):
        assert grad.dtype == tensor.dtype and torch.isfinite(grad).all()


def test_a_second_derivative_is_right_or_refused(program):
    """Also behind a constant upstream gradient, where PyTorch would go on in silence."""
    function, arguments = program
    arguments = tuple(
        tensor.detach().double().requires_grad_() if tensor.requires_grad else tensor for tensor in arguments
    )
    leaves = [tensor for tensor in arguments if tensor.requires_grad]
    directions = [torch.randn_like(tensor) for tensor in leaves]
    factor = torch.randn(function(*arguments).shape, dtype=torch.float64)

    def slope(step: float, create_graph: bool = False) -> torch.Tensor:
        """The derivative of sum(factor * out) along the directions, `step` away along them."""
        moved = iter([leaf + step * way for leaf, way in zip(leaves, directions, strict=True)])
        given = [next(moved) if tensor.requires_grad else tensor for tensor in arguments]
        floats = [tensor for tensor in given if tensor.requires_grad]
        out = (factor * function(*given)).sum()
        grads = torch.autograd.grad(out, floats, create_graph=create_graph)
        return sum((grad * way).sum() for grad, way in zip(grads, directions, strict=True))

    h = 1e-6
    expected = (slope(h) - slope(-h)) / (2 * h)
    try:
        first = slope(0.0, create_graph=True)
        grads = torch.autograd.grad(first, leaves, allow_unused=True) if first.requires_grad else []
    except RuntimeError as error:
        refused = "cannot be differentiated|derivative for .* is not implemented"
        if not re.search(refused, str(error)):
            raise
        return
    pairs = zip(grads, directions, strict=False)
    found = sum((grad * way).sum() for grad, way in pairs if grad is not None)
    torch.testing.assert_close(torch.as_tensor(found, dtype=torch.float64), expected, rtol=1e-4, atol=1e-5)


# ---- sizes beyond 32 bits
# --------------------------------------------------------------------------------------------------------


def needs(gigabytes: int):
    """Marks a test of a tensor beyond 32 bits: native kernels and this much free memory."""
    free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 1e9

    def mark(test):
        test = pytest.mark.skipif(free < gigabytes, reason=f"needs {gigabytes} GB of free memory")(test)
        missing = not backend_info()["cpu"]["native"]
        test = pytest.mark.skipif(missing, reason="no compiled CPU kernels: python -m vlp_ops.build --cpu")(
            test
        )
        return pytest.mark.slow(test)

    return mark


@needs(15)
def test_a_value_of_more_than_2_to_31_numbers():
    height, columns, width = 16384, 8200, 16
    value = torch.zeros(1, height * columns, 1, width, dtype=torch.bfloat16)
    assert value.numel() > 2**31
    value[0, -1] = torch.arange(1.0, 1.0 + width)
    # The centre of the last pixel.
    location = torch.tensor([1 - 0.5 / columns, 1 - 0.5 / height]).view(1, 1, 1, 1, 1, 2)
    out = ms_deform_attn(value, [(height, columns)], location, torch.ones(1, 1, 1, 1, 1))
    torch.testing.assert_close(out[0, 0], value[0, -1, 0], rtol=0.02, atol=0)


@needs(6)
def test_a_table_of_more_than_2_to_31_numbers():
    table = torch.zeros(2**21 + 1, 1024, dtype=torch.bfloat16)
    table[-1] = 3.0
    indices = torch.tensor([[2**21, 0], [1, 2**21]])
    out = embedding_bag(indices, table, torch.tensor([[0.5, 1.0], [1.0, 2.0]]))
    assert (out[0] == 1.5).all() and (out[1] == 6.0).all()


@needs(10)
def test_what_32_bits_cannot_count_is_refused():
    value = torch.zeros(1).expand(1, 2**31, 1, 1)
    location, weight = torch.zeros(1, 1, 1, 1, 1, 2), torch.ones(1, 1, 1, 1, 1)
    with pytest.raises(RuntimeError, match=r"value has 2\^31 positions or more"):
        ms_deform_attn(value, [(2**16, 2**15)], location, weight)
