"""The CUDA kernels, operator by operator, against the PyTorch implementation: all dtypes, odd sizes, ties,
NaN, views.

Runs on a GPU, and on the CPU where test_cuda_sources.py has put the emulated CUDA sources behind the
operators.
"""

import itertools
import os

import pytest
import torch
from vlp_ops import contrastive, memory, tokens

EMULATED = bool(os.environ.get("VLP_OPS_TEST_LIBRARY"))
if not EMULATED and not torch.cuda.is_available():
    pytest.skip("no CUDA device, and no emulated CUDA kernels", allow_module_level=True)

OPS = torch.ops.vlp_ops
TOLERANCE = {torch.float64: 1e-11, torch.float32: 2e-5, torch.bfloat16: 1e-2, torch.float16: 2e-3}
KINDS = list(TOLERANCE)


@pytest.fixture(autouse=True)
def _only_where_kernels_are(device):
    if device.type == "cpu" and not EMULATED:
        pytest.skip("no CUDA kernel serves CPU tensors here")
    torch.manual_seed(0)


def assert_same(actual, expected, kind, what):
    assert actual.dtype == expected.dtype and actual.shape == expected.shape, what
    assert actual.is_contiguous(), what
    if actual.numel():
        actual, expected = actual.double(), expected.double()
        assert torch.equal(actual.isinf(), expected.isinf()) and not actual.isnan().any(), what
        finite = ~expected.isinf()
        error = (actual - expected)[finite].abs().max() if finite.any() else torch.zeros(())
        limit = TOLERANCE[kind] * max(1e-6, expected[finite].abs().max().item() if finite.any() else 0.0)
        assert error <= limit, f"{what}: {error:.1e}"


# ---- top-k -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("rows", "n1", "n2", "k"),
    [
        (7, 5, 5, 3),
        (5, 300, 77, 8),
        (9, 1024, 1024, 32),
        (3, 64, 64, 64),
        (3, 999, 1000, 1),
        (2, 400, 300, 150),  # in device memory
        (0, 9, 9, 2),
    ],
)
def test_topk(kind, rows, n1, n2, k, device):
    scores1, scores2 = (torch.randn(rows, n, device=device).to(kind) for n in (n1, n2))
    scores, indices = OPS.product_key_topk(scores1, scores2, k)
    want, _ = memory._topk(scores1, scores2, k)
    assert torch.equal(scores, want)
    assert (indices >= 0).all() and (indices < n1 * n2).all()
    precise = torch.float64 if kind == torch.float64 else torch.float32
    sums = scores1.to(precise).gather(1, indices // n2) + scores2.to(precise).gather(1, indices % n2)
    assert torch.equal(sums.to(kind), scores)
    assert all(len(set(row.tolist())) == k for row in indices)


@pytest.mark.parametrize("order", ["sorted", "reversed", "equal"])
def test_topk_of_any_order(order, device):
    """Sorted upwards each score beats all before it; equal scores come by ascending slot."""
    scores = torch.arange(500.0, device=device).repeat(2, 1)
    scores = {"sorted": scores, "reversed": scores.flip(1), "equal": torch.zeros_like(scores)}[order]
    found, indices = OPS.product_key_topk(scores, scores, 40)
    assert torch.equal(found, memory._topk(scores, scores, 40)[0])
    if order == "equal":
        assert torch.equal(indices, torch.arange(40, device=device).repeat(2, 1))


def test_topk_order_of_equal_scores(device):
    scores1, scores2 = torch.zeros(2, 400, device=device), torch.zeros(2, 400, device=device)
    scores1[:, 300] = 1.0
    scores, indices = OPS.product_key_topk(scores1, scores2, 4)
    assert scores.tolist() == [[1.0] * 4] * 2
    assert indices.tolist() == [[300 * 400 + j for j in range(4)]] * 2


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_topk_with_special_scores(value, device):
    scores1, scores2 = torch.randn(2, 4, 100, device=device).unbind()
    scores1[0], scores1[1, 7], scores2[2, ::2] = value, value, value
    scores, indices = OPS.product_key_topk(scores1, scores2, 6)
    want, _ = memory._topk(scores1, scores2, 6)
    assert torch.equal(scores.nan_to_num(12345.0), want.nan_to_num(12345.0))
    assert all(len(set(row.tolist())) == 6 for row in indices)
    assert (indices >= 0).all() and (indices < 100 * 100).all()


def test_topk_of_views(device):
    """Rows that do not begin at 16 bytes, and rows that are not next to each other."""
    scores = torch.randn(2, 3, 65, device=device)
    odd = scores.flatten()[1 : 1 + 3 * 64].view(3, 64)
    for one, two in ((odd, odd), (scores[0, :, :64], scores[1, :, 1:])):
        assert torch.equal(OPS.product_key_topk(one, two, 5)[0], memory._topk(one, two, 5)[0])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("rows", "n1", "n2", "k"), [(5, 8, 8, 4), (3, 70, 50, 40), (2, 3, 3, 9), (0, 4, 4, 2)]
)
def test_topk_gradient(kind, rows, n1, n2, k, device):
    grad = torch.randn(rows, k, device=device).to(kind)
    indices = torch.randint(n1 * n2, (rows, k), device=device)
    found = OPS.product_key_topk_backward(grad, indices, n1, n2)
    for half, (one, want) in enumerate(zip(found, memory._topk_backward(grad, indices, n1, n2), strict=True)):
        assert_same(one, want, kind, f"half {half}")
    again = OPS.product_key_topk_backward(grad, indices, n1, n2)
    assert all(torch.equal(one, two) for one, two in zip(found, again, strict=True))


# ---- tokens ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("index", [torch.int64, torch.int32])
@pytest.mark.parametrize(
    ("batch", "length", "kept", "width"),
    [(2, 9, 4, 24), (3, 70, 41, 8), (2, 5, 5, 7), (2, 6, 0, 8), (1, 40, 11, 300), (0, 4, 2, 8), (2, 4, 2, 0)],
)
def test_tokens(kind, index, batch, length, kept, width, device):
    x = torch.randn(batch, length, width, device=device).to(kind)
    restore = torch.rand(batch, length, device=device).argsort(1)
    ids = restore.argsort(1)[:, :kept].to(index)
    restore, token = restore.to(index), torch.randn(width, device=device).to(kind)
    few = OPS.take_tokens(x, ids)
    assert torch.equal(few, tokens._take(x, ids)) and few.is_contiguous()
    assert torch.equal(OPS.restore_tokens(few, restore, token), tokens._restore(few, restore, token))
    many = torch.randint(max(length, 1), (batch, 2 * length), device=device).to(index)
    for chosen in (ids, many):
        grad = torch.randn(batch, chosen.shape[1], width, device=device).to(kind)
        found = OPS.take_tokens_backward(grad, chosen, length)
        assert_same(found, tokens._take_backward(grad, chosen, length), kind, "gradient of x")
    grad = torch.randn_like(x)
    found = OPS.restore_tokens_backward(grad, restore, kept)
    want = tokens._restore_backward(grad, restore, kept)
    assert torch.equal(found[0], want[0])
    assert_same(found[1], want[1], kind, "gradient of the mask token")


def test_tokens_of_views(device):
    x = torch.randn(2, 9, 33, device=device)
    ids = torch.rand(2, 9, device=device).argsort(1)
    for part in (x[..., 1:], x[..., :32], x[:, ::2]):
        chosen = ids[:, ::3] % part.shape[1]
        assert torch.equal(OPS.take_tokens(part, chosen), tokens._take(part, chosen))


# ---- tiles of the contrastive losses -----------------------------------------------------------------------


SHAPES = [(1, 1), (3, 5), (33, 128), (40, 130), (70, 260), (32, 7)]


def choices(rows, width, kind, device):
    """Arguments labels, ids_a, ids_b, soft of the three forms."""
    labels = torch.randperm(max(rows, width), device=device)[:rows] % width
    ids = torch.randint(6, (rows,), device=device), torch.randint(7, (width,), device=device)
    soft = torch.rand(rows, width, device=device, dtype=kind)
    return {"labels": (labels, None, None, None), "ids": (None, *ids, None), "soft": (None, None, None, soft)}


@pytest.mark.parametrize("kind", [torch.float64, torch.float32])
@pytest.mark.parametrize("form", ["labels", "ids", "soft"])
@pytest.mark.parametrize(("rows", "width"), SHAPES)
@pytest.mark.parametrize("scale", [1.0, 100.0])
def test_contrastive_tile(kind, form, rows, width, scale, device):
    products = torch.rand(rows, width, device=device, dtype=kind) * 2 - 1
    scale = torch.tensor(scale, device=device, dtype=kind)
    chosen = choices(rows, width, kind, device)[form]
    for columns in (False, True)[: 1 if form == "soft" else 2]:
        found = OPS.contrastive_tile(products.clone(), scale, *chosen, columns)
        want = contrastive._tile(products.clone(), scale, *chosen, columns)
        for side, one, two in zip(("rows", "columns"), found, want, strict=True):
            if side == "columns" and not columns:
                assert one.numel() == two.numel() == 0
                continue
            axis = 1 if side == "rows" else 0
            for number, (a, b) in enumerate(zip(one, two, strict=True)):
                join = torch.logsumexp if number < 2 else torch.sum
                assert_same(join(a, axis), join(b, axis), kind, f"{side} {number}")


@pytest.mark.parametrize(
    ("kind", "output"),
    [
        (torch.float64, torch.float64),
        (torch.float32, torch.float32),
        (torch.float32, torch.bfloat16),
        (torch.float32, torch.float16),
    ],
)
@pytest.mark.parametrize("form", ["labels", "ids", "soft"])
@pytest.mark.parametrize(("rows", "width"), SHAPES)
def test_contrastive_tile_gradient(kind, output, form, rows, width, device):
    products = torch.rand(rows, width, device=device, dtype=kind) * 2 - 1
    scale = torch.tensor(14.3, device=device, dtype=kind)
    chosen = choices(rows, width, kind, device)[form]
    by_row, by_col = contrastive._tile(products.clone(), scale, *chosen, form != "soft")
    sides = []
    for length, sums, axis in ((rows, by_row, 2), (width, by_col, 1)):
        stats = torch.randn(3, length, device=device, dtype=kind)
        if sums.numel():
            stats[0] = sums[0].logsumexp(axis - 1)
        if form == "labels":
            stats[1:] = 1.0
        elif sums.numel():
            stats[1], stats[2] = sums[1].logsumexp(axis - 1), sums[2].sum(axis - 1)
        grad = torch.rand(length, device=device, dtype=kind) * (stats[2] > 0)
        sides.append((grad, stats, torch.logaddexp(stats[0], stats[1])))
    for columns in (False, True)[: 1 if form == "soft" else 2]:
        arguments = (scale, *chosen, *sides[0], *(sides[1] if columns else (None, None, None)))
        found, want = torch.full((2, rows, width), float("nan"), device=device, dtype=output).unbind()
        OPS.contrastive_tile_gradient(products.clone(), *arguments, found)
        contrastive._tile_gradient(products.clone(), *arguments, want)
        assert_same(found, want, output, "gradient")
        if kind == output:
            used = products.clone()
            OPS.contrastive_tile_gradient(used, *arguments, used)
            assert torch.equal(used, found)


@pytest.mark.parametrize(
    ("kind", "output"),
    [
        (torch.float64, torch.float64),
        (torch.float32, torch.float32),
        (torch.float32, torch.bfloat16),
        (torch.float32, torch.float16),
        (torch.float32, None),
    ],
)
@pytest.mark.parametrize(("rows", "width"), SHAPES)
def test_sigmoid_tile(kind, output, rows, width, device):
    products = torch.rand(rows, width, device=device, dtype=kind) * 2 - 1
    scale, bias = (torch.tensor(x, device=device, dtype=kind) for x in (10.0, -10.0))
    for paired, diagonal in itertools.product((False, True), (0, 2)):
        if paired and diagonal + rows > width:
            continue
        found = want = None
        if output is not None:
            found, want = torch.full((2, rows, width), float("nan"), device=device, dtype=output).unbind()
        sums = OPS.sigmoid_tile(products.clone(), scale, bias, diagonal, paired, found).sum(1)
        expected = contrastive._sigmoid_tile(products.clone(), scale, bias, diagonal, paired, want).sum(1)
        assert_same(sums[:1], expected[:1], kind, "loss")
        if found is not None:
            assert_same(found, want, output, "gradient")
            assert_same(sums[1:], expected[1:], kind, "sum of the gradient")


# ---- all ---------------------------------------------------------------------------------------------------


def test_runs_do_not_differ(device):
    """No sum depends on the order in which threads come; the gradient of ms_deform_attn has a switch for
    it."""
    scores = torch.randn(20, 300, device=device)
    slots = torch.randint(300 * 300, (20, 64), device=device)
    ids = torch.randint(50, (4, 70), device=device)
    table, shares = torch.randn(50, 40, device=device), torch.rand(4, 70, device=device)
    value, location = torch.randn(1, 99, 2, 8, device=device), torch.rand(1, 60, 2, 1, 4, 2, device=device)
    weight = torch.rand(1, 60, 2, 1, 4, device=device)
    labels, scale = torch.arange(20, device=device), torch.ones((), device=device)

    def everything():
        return [
            *OPS.product_key_topk(scores, scores, 32),
            *OPS.product_key_topk_backward(scores[:, :64], slots, 300, 300),
            *OPS.embedding_bag_backward(table[:4], ids, table, shares, [True, True]),
            OPS.take_tokens_backward(table[:35].view(4, 70, 5), ids, 50),
            *OPS.restore_tokens_backward(table[:35].view(4, 70, 5), ids, 30),
            *OPS.contrastive_tile(scores.clone(), scale, labels, None, None, None, True),
            OPS.sigmoid_tile(scores.clone(), scale, scale, 0, True, None),
            *OPS.ms_deform_attn_backward(
                value[:, :60].reshape(1, 60, 16), value, [9, 11], location, weight, True, True, [True] * 3
            ),
        ]

    first = everything()
    for _ in range(3 if device.type == "cpu" else 100):
        assert all(torch.equal(one, two) for one, two in zip(everything(), first, strict=True))
