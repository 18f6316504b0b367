"""The compiled CPU kernels against the PyTorch implementation, one thread and many."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import vlp_ops
from vlp_ops import deformable, memory, tokens

pytestmark = pytest.mark.skipif(
    not vlp_ops.backend_info()["cpu"]["native"],
    reason="no compiled CPU kernels: python -m vlp_ops.build --cpu",
)

OPS = torch.ops.vlp_ops
TOLERANCE = {torch.float64: 1e-11, torch.float32: 2e-5, torch.bfloat16: 2e-2, torch.float16: 3e-3}


@pytest.fixture(params=[1, 3, 16])
def threads(request):
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def assert_same(actual, expected, kind, what):
    assert actual.dtype == expected.dtype and actual.shape == expected.shape, what
    if actual.numel():
        error = (actual.double() - expected.double()).abs().max() / expected.double().abs().max().clamp(
            min=1e-6
        )
        assert error <= TOLERANCE[kind], f"{what}: {error:.1e}"


@pytest.mark.parametrize("kind", list(TOLERANCE))
@pytest.mark.parametrize(
    ("heads", "width", "queries", "shapes"),
    [
        (4, 32, 300, [(9, 11), (4, 5)]),  # rows copied together
        (4, 32, 3, [(9, 11), (4, 5)]),  # read in place
        (1, 8, 700, [(3, 4)]),
        (3, 45, 40, [(1, 7), (5, 1), (0, 2)]),
        (2, 64, 129, [(16, 16)]),
        (2, 7, 5, [(2, 2)]),
    ],
)
def test_deformable(kind, heads, width, queries, shapes, threads):
    torch.manual_seed(0)
    batch, points, levels = 2, 3, len(shapes)
    precise = torch.float64 if kind == torch.float64 else torch.float32
    value = torch.randn(batch, sum(h * w for h, w in shapes), heads, width).to(kind)
    location = (torch.rand(batch, queries, heads, levels, points, 2) * 1.6 - 0.3).to(precise)
    weight = torch.randn(batch, queries, heads, levels, points).to(kind)
    grad = torch.randn(batch, queries, heads * width).to(kind)
    flat = [size for shape in shapes for size in shape]
    for softmax in (False, True):
        out = OPS.ms_deform_attn(value, flat, location, weight, softmax)
        assert_same(out, deformable._forward_list(value, flat, location, weight, softmax), kind, "forward")
        for mask in (
            [True] * 3,
            [True, False, False],
            [False, True, True],
            [False, False, True],
            [True, True, False],
        ):
            found = OPS.ms_deform_attn_backward(grad, value, flat, location, weight, softmax, False, mask)
            want = deformable._backward_list(grad, value, flat, location, weight, softmax, False, mask)
            for name, a, b in zip(("value", "location", "weight"), found, want, strict=True):
                assert_same(a, b, kind, f"gradient of {name} with {mask}")


def test_threads_do_not_change_the_gradient_of_value():
    torch.manual_seed(0)
    value, location = torch.randn(1, 400, 2, 32), torch.rand(1, 900, 2, 1, 4, 2)
    weight, grad = torch.rand(1, 900, 2, 1, 4), torch.randn(1, 900, 64)
    before, found = torch.get_num_threads(), []
    for count in (1, 2, 5, 16):
        torch.set_num_threads(count)
        found.append(
            OPS.ms_deform_attn_backward(grad, value, [20, 20], location, weight, False, True, [True] * 3)
        )
    torch.set_num_threads(before)
    for other in found[1:]:
        torch.testing.assert_close(other, found[0], rtol=1e-5, atol=1e-5)
        repeat = OPS.ms_deform_attn_backward(grad, value, [20, 20], location, weight, False, True, [True] * 3)
        assert all(torch.equal(a, b) for a, b in zip(repeat, found[0], strict=True))


def test_infinite_values_stay_where_they_are():
    """A corner outside a map is read at another place with weight 0; that place is one the point touches
    anyway."""
    value = torch.ones(1, 9, 1, 8)
    value[0, 4] = float("inf")
    location = torch.tensor([[0.0, 0.0], [5.0, 5.0], [1.0, 0.1], [0.5, 0.5]]).view(1, 4, 1, 1, 1, 2)
    out = OPS.ms_deform_attn(value, [3, 3], location, torch.ones(1, 4, 1, 1, 1))[0]
    assert torch.isfinite(out[:3]).all() and not torch.isfinite(out[3]).any()


@pytest.mark.parametrize("kind", list(TOLERANCE))
@pytest.mark.parametrize(
    ("rows", "n", "k"), [(7, 5, 3), (40, 300, 8), (33, 1024, 32), (5, 64, 64), (3, 999, 1), (0, 9, 2)]
)
def test_topk(kind, rows, n, k, threads):
    torch.manual_seed(0)
    scores1, scores2 = torch.randn(2, rows, n).to(kind).unbind()
    scores, indices = OPS.product_key_topk(scores1, scores2, k)
    want, _ = memory._topk(scores1, scores2, k)
    assert torch.equal(scores, want)
    assert (indices >= 0).all() and (indices < n * n).all()
    precise = torch.float64 if kind == torch.float64 else torch.float32
    sums = scores1.to(precise).gather(1, indices // n) + scores2.to(precise).gather(1, indices % n)
    assert torch.equal(sums.to(kind), scores)
    assert all(len(set(row.tolist())) == k for row in indices)


def test_topk_order_of_equal_scores():
    """Ascending slots among equal scores, wherever in the row they are."""
    scores1 = torch.zeros(2, 400)
    scores1[:, 300] = 1.0
    scores2 = torch.zeros(2, 400)
    scores, indices = OPS.product_key_topk(scores1, scores2, 4)
    assert indices.tolist() == [[300 * 400, 300 * 400 + 1, 300 * 400 + 2, 300 * 400 + 3]] * 2
    assert (scores == 1).all()


def test_topk_with_nan_everywhere():
    for n in (6, 700):
        scores = torch.full((2, n), float("nan"))
        found, indices = OPS.product_key_topk(scores, scores, 5)
        assert found.isnan().all() and all(len(set(row.tolist())) == 5 for row in indices)
        few = torch.randn(2, n)
        few[:, n // 2] = float("nan")
        found, indices = OPS.product_key_topk(few, torch.zeros(2, n), 5)
        assert found.isnan().all() and (indices // n == n // 2).all()


@pytest.mark.parametrize("kind", list(TOLERANCE))
@pytest.mark.parametrize("index", [torch.int64, torch.int32])
@pytest.mark.parametrize(
    ("bags", "bag", "rows", "width"), [(50, 8, 64, 48), (9, 3, 1000, 5), (300, 4, 3, 16), (1, 1, 1, 1)]
)
def test_bag_backward(kind, index, bags, bag, rows, width, threads):
    torch.manual_seed(0)
    indices = torch.randint(rows, (bags, bag)).to(index)
    weight, grad = torch.randn(rows, width).to(kind), torch.randn(bags, width).to(kind)
    for shares in (
        torch.randn(bags, bag).to(kind),
        torch.randn(bags, bag).to(torch.float64 if kind == torch.float64 else torch.float32),
    ):
        for mask in ([True, True], [True, False], [False, True]):
            found = OPS.embedding_bag_backward(grad, indices, weight, shares, mask)
            want = memory._bag_backward(grad, indices, weight, shares, mask)
            for name, a, b in zip(("weight", "shares"), found, want, strict=True):
                assert_same(a, b, kind, f"{name} with {mask}")


def test_bag_backward_checks_indices():
    indices = torch.tensor([[0, 5]])
    with pytest.raises(RuntimeError, match="index 5 is out of range for a table of 5 rows"):
        OPS.embedding_bag_backward(
            torch.zeros(1, 2), indices, torch.zeros(5, 2), torch.zeros(1, 2), [True, True]
        )


@pytest.mark.parametrize("kind", list(TOLERANCE))
@pytest.mark.parametrize("index", [torch.int64, torch.int32])
@pytest.mark.parametrize(
    ("batch", "length", "count", "width"),
    [
        (3, 19, 7, 45),  # rows that end inside a line of the cache
        # In float32 enough to be written past the caches, and 9 * 49 rows are no multiple of 4.
        (9, 196, 49, 768),
        (40, 197, 49, 1000),
        (2, 5, 1, 1),
        (1, 3, 3, 64),
    ],
)
def test_tokens(kind, index, batch, length, count, width, threads):
    torch.manual_seed(0)
    x, token = torch.randn(batch, length, width).to(kind), torch.randn(width).to(kind)
    order = torch.rand(batch, length).argsort(1)
    twice = torch.randint(length, (batch, count + 2))
    for ids in (order[:, :count].to(index), twice.to(index)):
        out = OPS.take_tokens(x, ids)
        assert torch.equal(out, tokens._take(x, ids))
        found = OPS.take_tokens_backward(out, ids, length)
        assert_same(found, tokens._take_backward(out, ids, length), kind, "gradient")
    kept = x[:, :count].contiguous()
    out = OPS.restore_tokens(kept, order.to(index), token)
    assert torch.equal(out, tokens._restore(kept, order, token))


@pytest.mark.parametrize("offset", [0, 1])
def test_tokens_that_start_anywhere(offset):
    """A view into a larger tensor need not begin at a whole 16 bytes."""
    memory_of_x = torch.randn(9 * 196 * 768 + offset)
    x = memory_of_x[offset:].view(9, 196, 768)
    ids = torch.rand(9, 196).argsort(1)[:, :49]
    assert torch.equal(OPS.take_tokens(x, ids), tokens._take(x, ids))
    # Neither x nor ids has to be contiguous.
    assert torch.equal(OPS.take_tokens(x[..., ::2], ids), tokens._take(x[..., ::2], ids))


@pytest.mark.parametrize("bad", [-1, 5])
def test_tokens_check_indices(bad):
    x, ids = torch.zeros(1, 5, 2), torch.tensor([[0, bad]])
    message = f"index {bad} is out of range for 5 tokens"
    with pytest.raises(RuntimeError, match=message):
        OPS.take_tokens(x, ids)
    with pytest.raises(RuntimeError, match=message):
        OPS.take_tokens_backward(torch.zeros(1, 2, 2), ids, 5)
    # The public function says so with its own type of error.
    with pytest.raises(ValueError, match=f"^take_tokens: {message}$"):
        vlp_ops.take_tokens(x, ids)
    with pytest.raises(RuntimeError, match="index -1 is out of range"):
        OPS.restore_tokens(x, torch.tensor([[0, 1, 2, 3, -1]]), torch.zeros(2))


def test_direct_calls_are_checked():
    value, location, weight = (
        torch.zeros(1, 4, 1, 2),
        torch.zeros(1, 1, 1, 1, 1, 2),
        torch.zeros(1, 1, 1, 1, 1),
    )
    with pytest.raises(RuntimeError, match="reach beyond the positions of value"):
        OPS.ms_deform_attn(value, [2, 3], location, weight)
    with pytest.raises(RuntimeError, match="must be float32"):
        OPS.ms_deform_attn(value, [2, 2], location.double(), weight)
    with pytest.raises(RuntimeError, match="exceeds the number of keys per half"):
        OPS.product_key_topk(torch.zeros(1, 3), torch.zeros(1, 3), 4)


def test_loading_leaves_denormals_alone():
    assert torch.tensor([1e-42]).mul(1.0).item() != 0.0


@pytest.mark.parametrize("module", ["deformable", "memory", "tokens", "every_operator"])
def test_the_whole_suite_without_native_kernels(module, request):
    """The same tests serve the PyTorch implementation."""
    folder = Path(__file__).parent
    golden = request.config.getoption("--golden")
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "pytest",
            "-q",
            "--tb=short",
            "--show-capture=no",
            str(folder / f"test_{module}.py"),
        ]
        + (["--golden", str(golden)] if golden else []),
        env=os.environ | {"VLP_OPS_DISABLE_NATIVE": "1"},
        cwd=request.config.rootpath,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-3000:]
    assert " passed" in done.stdout
