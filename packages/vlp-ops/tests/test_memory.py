"""Product keys and the embedding bag against golden numbers, brute force, and the contract of an operator."""

import re

import pytest
import torch
import torch.nn.functional as F
from vlp_ops import embedding_bag, product_key_lookup, product_key_topk, reference


def exactly(message: str) -> str:
    return f"^{re.escape(message)}$"


def is_bag(case) -> bool:
    return {"indices", "weight", "per_sample_weights"} <= case.tensor_names("inputs")


def is_topk(case) -> bool:
    return {"query", "keys", "grad_scores"} <= case.tensor_names("inputs")


def is_layer(case) -> bool:
    return "keys" in case.tensor_names("weights") and {"query", "indices"} <= case.tensor_names("outputs")


def bag_arguments(dtype=torch.float64, *, device="cpu", bags=7, bag=5, rows=11, width=12, index=torch.int64):
    generator = torch.Generator().manual_seed(0)
    indices = torch.randint(rows, (bags, bag), generator=generator).to(device, index)
    weight = torch.randn(rows, width, generator=generator, dtype=torch.float64)
    shares = torch.randn(bags, bag, generator=generator, dtype=torch.float64)
    return indices, weight.to(device, dtype).requires_grad_(), shares.to(device, dtype).requires_grad_()


def key_arguments(dtype=torch.float64, *, device="cpu", tokens=6, heads=3, n_keys=10, half=4):
    generator = torch.Generator().manual_seed(0)
    query = torch.randn(tokens, heads, 2 * half, generator=generator, dtype=torch.float64)
    keys = torch.randn(heads, 2, n_keys, half, generator=generator, dtype=torch.float64)
    return query.to(device, dtype).requires_grad_(), keys.to(device, dtype).requires_grad_()


# ---- golden ------------------------------------------------------------------------------------------------


# torch 2.11 says once, of any sparse tensor, that it does not check it.
@pytest.mark.filterwarnings("ignore:Sparse invariant checks are implicitly disabled")
@pytest.mark.parametrize("sparse", [False, True])
@pytest.mark.golden("ops", is_bag)
def test_bag_case(case, dtype, device, sparse, leaf, close):
    inputs, outputs, grads = case.tensors("inputs"), case.tensors("outputs"), case.tensors("grads")
    indices, weight, shares = (
        leaf(inputs[name], dtype) for name in ("indices", "weight", "per_sample_weights")
    )
    out = embedding_bag(indices, weight, shares, sparse_grad=sparse)
    close.forward(out, outputs["output"])
    out.backward(inputs["grad_output"].to(out))
    assert weight.grad.is_sparse == sparse
    dense = weight.grad.to_dense() if sparse else weight.grad
    close.gradient(dense, grads["weight"], "weight")
    close.gradient(shares.grad, grads["per_sample_weights"], "per_sample_weights")
    unused = torch.ones(weight.shape[0], dtype=torch.bool)
    unused[inputs["indices"].flatten()] = False
    assert (dense.cpu()[unused] == 0).all()
    if sparse:
        assert weight.grad._nnz() == int((~unused).sum())


@pytest.mark.parametrize("rows", [1, 2, 5, 300])
@pytest.mark.parametrize(("bags", "bag"), [(1, 1), (8, 4), (33, 1), (16, 40), (7, 61)])
def test_popular_rows(bags, bag, rows, device):
    """Rows with more uses than a warp takes, rows of one use, and every way to meet the ends of a share."""
    generator = torch.Generator().manual_seed(0)
    for width in (8, 12, 150):
        indices = torch.randint(rows, (bags, bag), generator=generator)
        # A row that begins in the middle of the others' uses and goes on for long.
        indices[bags // 2 :, : bag // 2] = rows // 2
        weight = torch.randn(rows, width, generator=generator, dtype=torch.float64).to(device)
        shares = torch.randn(bags, bag, generator=generator, dtype=torch.float64).to(device)
        leaves = weight.requires_grad_(), shares.requires_grad_()
        upstream = torch.randn(bags, width, generator=generator, dtype=torch.float64).to(device)
        found = torch.autograd.grad(embedding_bag(indices.to(device), *leaves), leaves, upstream)
        wanted = torch.autograd.grad(reference.embedding_bag(indices.to(device), *leaves), leaves, upstream)
        for ours, want in zip(found, wanted, strict=True):
            torch.testing.assert_close(ours, want, rtol=1e-10, atol=1e-10)


@pytest.mark.filterwarnings("ignore:Sparse invariant checks are implicitly disabled")
@pytest.mark.parametrize("sparse", [False, True])
def test_a_second_derivative_is_refused(sparse, device):
    """Behind a constant upstream gradient, too: that of the weights depends on the table."""
    indices, weight, shares = bag_arguments(device=device)
    out = embedding_bag(indices, weight, shares, sparse_grad=sparse).sum()
    grads = torch.autograd.grad(out, (weight, shares), create_graph=True)
    for grad in (grads[0].to_dense() if sparse else grads[0], grads[1]):
        with pytest.raises(RuntimeError, match="embedding_bag_backward cannot be differentiated"):
            torch.autograd.grad(grad.square().sum(), (weight, shares), retain_graph=True)


@pytest.mark.golden(
    "memclip", lambda case: is_bag(case) and {"grad_weight", "output"} <= case.tensor_names("outputs")
)
def test_memclip_bag(case, device, close):
    inputs, outputs = case.tensors("inputs"), case.tensors("outputs")
    weight, shares = (inputs[name].to(device).requires_grad_() for name in ("weight", "per_sample_weights"))
    out = embedding_bag(inputs["indices"].to(device), weight, shares)
    assert out.dtype == weight.dtype
    # One rounding to bfloat16 at the end of a float32 sum leaves at most one unit in the last place.
    loose = 4e-3 if weight.dtype == torch.bfloat16 else None
    close.forward(out, outputs["output"], tolerance=loose)
    out.backward(inputs["upstream"].to(device))
    close.gradient(weight.grad, outputs["grad_weight"], "weight", loose)
    close.gradient(shares.grad, outputs["grad_per_sample_weights"], "per_sample_weights", loose)


@pytest.mark.golden("ops", is_topk)
def test_topk_case(case, dtype, device, leaf, close):
    inputs, outputs, grads = case.tensors("inputs"), case.tensors("outputs"), case.tensors("grads")
    heads, k = case.config["heads"], case.config["knn"]
    query, keys = leaf(inputs["query"], dtype), leaf(inputs["keys"], dtype)
    scores, indices = product_key_topk(query, keys, k, n_heads=heads)
    assert torch.equal(indices.flatten(0, 1).cpu(), outputs["indices"])
    close.forward(scores.flatten(0, 1), outputs["scores"])
    close.forward(scores.softmax(-1).flatten(0, 1), outputs["weights"])
    scores.backward(inputs["grad_scores"].view(scores.shape).to(scores))
    close.gradient(query.grad, grads["query"], "query")
    close.gradient(keys.grad, grads["keys"], "keys")


@pytest.mark.golden("ops", lambda case: is_topk(case) and "values" in case.tensor_names("inputs"))
def test_lookup_case(case, dtype, device, leaf, close):
    inputs, outputs, grads = case.tensors("inputs"), case.tensors("outputs"), case.tensors("grads")
    tensors = {name: leaf(inputs[name], dtype) for name in ("query", "keys", "values")}
    out = product_key_lookup(*tensors.values(), case.config["knn"], n_heads=case.config["heads"])
    close.forward(out, outputs["output"])
    out.backward(inputs["grad_output"].to(out))
    for name, tensor in tensors.items():
        close.gradient(tensor.grad, grads[f"lookup.{name}"], name)


@pytest.mark.golden("memclip", is_layer)
def test_memory_layer(case, device, close):
    """The operators inside the reference memory layer, from its query on; its projections are plain Linear
    layers."""
    config, weights, inputs = case.config, case.tensors("weights"), case.tensors("inputs")
    outputs, grads = case.tensors("outputs"), case.tensors("grads_full")
    parameters = {name: tensor.to(device).requires_grad_() for name, tensor in weights.items()}

    def linear(name, x):
        return F.linear(x, parameters[f"{name}.weight"], parameters[f"{name}.bias"])

    x = inputs["x"].to(device).requires_grad_()
    flat = x.flatten(0, 1)
    tokens, heads, k = flat.shape[0], config["mem_heads"], config["mem_knn"]
    query = linear("query_proj.query_mlps.0", flat).view(tokens, heads, -1)
    scores, indices = product_key_topk(query, parameters["keys"], k)
    close.forward(scores, outputs["scores"], "scores", 2e-5)
    assert torch.equal(indices.cpu(), outputs["indices"])
    close.forward(scores.softmax(-1), outputs["weights"], "weights", 2e-5)
    if config["peer_variant"]:
        return
    bag = product_key_lookup(query, parameters["keys"], parameters["values.weight"], k)
    assert bag.dtype == weights["values.weight"].dtype
    half = bag.dtype == torch.bfloat16
    close.forward(bag, outputs["bag"], "bag", 4e-3 if half else 2e-5)
    out = bag.to(x.dtype)
    if config["swilu_projection"]:
        out = out * F.silu(linear("swilu_projection", flat))
    if "value_proj.weight" in weights:
        out = linear("value_proj", out)
    if config["mem_gated"]:
        out = out * torch.sigmoid(linear("gating", flat))
    out = out.view(*x.shape[:2], -1)
    close.forward(out, outputs["output"], "layer", 4e-3 if half else 2e-5)
    (out * inputs["upstream"].to(device)).sum().backward()
    close.gradient(x.grad, outputs["grad_input"], "input", 1e-2 if half else 5e-5)
    for name, tensor in parameters.items():
        close.gradient(tensor.grad, grads[name], name, 1e-2 if half else 5e-5)


# ---- against the plain definition --------------------------------------------------------------------------


@pytest.mark.parametrize(("n_keys", "k"), [(1, 1), (10, 1), (10, 7), (10, 10), (33, 32), (70, 64)])
def test_topk_equals_brute_force(n_keys, k, device, close):
    query, keys = key_arguments(n_keys=n_keys, device=device)
    scores, indices = product_key_topk(query, keys, k)
    expected, slots = reference.product_key_topk(query, keys, k)
    close.forward(scores, expected.detach())
    assert torch.equal(indices, slots)
    upstream = torch.randn_like(scores)
    grads = torch.autograd.grad(scores, (query, keys), upstream)
    wanted = torch.autograd.grad(expected, (query, keys), upstream)
    for grad, want, name in zip(grads, wanted, ("query", "keys"), strict=True):
        close.gradient(grad, want, name)


def test_topk_accepts_every_form(device):
    query, keys = key_arguments(device=device)
    expected = product_key_topk(query, keys, 4)
    for form in (keys, keys.reshape(-1, 4)):
        for rows in (query, query.reshape(-1, 8)):
            scores, indices = product_key_topk(rows, form, 4, n_heads=3)
            assert torch.equal(scores, expected[0]) and torch.equal(indices, expected[1])


def test_topk_of_equal_scores(device):
    """Every choice among equal scores is right, but the scores are not negotiable and no slot may come
    twice."""
    query = torch.ones(3, 2, 4, device=device)
    keys = torch.ones(2, 2, 5, 2, device=device)
    keys[:, :, 2] = 3.0
    scores, indices = product_key_topk(query, keys, 4)
    assert (scores == torch.tensor([12.0, 8.0, 8.0, 8.0], device=device)).all()
    assert (indices[..., 0] == 2 * 5 + 2).all()
    assert all(len(set(row.tolist())) == 4 for row in indices.flatten(0, 1))


def test_topk_with_nan_and_infinity(device):
    query, keys = (tensor.detach() for tensor in key_arguments(device=device))
    query[0, 0, 0] = float("nan")
    keys[1, 0, 3] = -float("inf")
    scores, indices = product_key_topk(query, keys, 4)
    assert scores[0, 0].isnan().all()
    assert (indices >= 0).all() and (indices < 100).all()
    assert not scores[1:, 2].isnan().any()


@pytest.mark.parametrize("index", [torch.int64, torch.int32])
@pytest.mark.parametrize("width", [1, 7, 8, 31, 64, 257])
def test_bag_equals_reference(index, width, device, close):
    indices, weight, shares = bag_arguments(width=width, index=index, device=device)
    out = embedding_bag(indices, weight, shares)
    expected = reference.embedding_bag(indices, weight, shares)
    close.forward(out, expected.detach())
    upstream = torch.randn_like(out)
    for sparse in (False, True):
        grads = torch.autograd.grad(
            embedding_bag(indices, weight, shares, sparse_grad=sparse), (weight, shares), upstream
        )
        wanted = torch.autograd.grad(expected, (weight, shares), upstream, retain_graph=True)
        close.gradient(grads[0].to_dense(), wanted[0], "weight")
        close.gradient(grads[1], wanted[1], "per_sample_weights")


def test_bag_in_chunks(monkeypatch, close):
    """The PyTorch implementation works through large bags in parts."""
    import vlp_ops.memory

    monkeypatch.setattr(vlp_ops.memory, "CHUNK", 100)
    indices, weight, shares = (tensor.detach() for tensor in bag_arguments(torch.bfloat16, bags=50))
    exact = reference.embedding_bag(indices, weight.double(), shares.double())
    close.forward(vlp_ops.memory._bag(indices, weight, shares), exact, tolerance=4e-3)
    grads = vlp_ops.memory._bag_backward(exact, indices, weight.double(), shares.double(), [True, True])
    leaves = weight.double().requires_grad_(), shares.double().requires_grad_()
    wanted = torch.autograd.grad(reference.embedding_bag(indices, *leaves), leaves, exact)
    for grad, want in zip(grads, wanted, strict=True):
        close.gradient(grad, want, "chunked")


@pytest.mark.parametrize("sizes", [{"bags": 0}, {"bag": 0}, {"width": 0}])
def test_empty_bags(sizes, device):
    indices, weight, shares = bag_arguments(device=device, **sizes)
    for sparse in (False, True):
        out = embedding_bag(indices, weight, shares, sparse_grad=sparse)
        assert out.shape == (indices.shape[0], weight.shape[1]) and (out == 0).all()
        grads = torch.autograd.grad(out.sum(), (weight, shares))
        assert grads[0].shape == weight.shape and grads[1].shape == shares.shape
        assert (grads[0].to_dense() == 0).all()


def test_no_tokens(device):
    query, keys = key_arguments(tokens=0, device=device)
    scores, indices = product_key_topk(query, keys, 4)
    assert scores.shape == indices.shape == (0, 3, 4)
    out = product_key_lookup(query, keys, torch.randn(100, 5, dtype=query.dtype, device=device), 4)
    assert out.shape == (0, 5)


def test_frozen_parts(device):
    indices, weight, shares = bag_arguments(device=device)
    embedding_bag(indices, weight.detach(), shares).sum().backward()
    assert weight.grad is None and shares.grad is not None
    frozen = shares.detach()
    embedding_bag(indices, weight, frozen).sum().backward()
    assert weight.grad is not None


def test_half_table_accumulates_in_float32(device):
    """256 ones of 1/256 are 1; in bfloat16 the sum would stop growing half-way."""
    weight = torch.ones(4, 16, dtype=torch.bfloat16, device=device).requires_grad_()
    indices = torch.zeros(2, 1024, dtype=torch.int64, device=device)
    shares = torch.full((2, 1024), 2.0**-10, dtype=torch.bfloat16, device=device)
    out = embedding_bag(indices, weight, shares)
    assert (out == 1).all()
    out.sum().backward()
    assert (weight.grad[0] == 2).all() and (weight.grad[1:] == 0).all()


def test_bag_gradcheck(device):
    indices, weight, shares = bag_arguments(device=device)
    assert torch.autograd.gradcheck(lambda w, s: embedding_bag(indices, w, s), (weight, shares))


def test_topk_gradcheck(device):
    query, keys = key_arguments(device=device, tokens=2)
    assert torch.autograd.gradcheck(lambda q, k: product_key_topk(q, k, 3)[0], (query, keys))
    values = torch.randn(100, 3, dtype=torch.float64, device=device, requires_grad=True)
    assert torch.autograd.gradcheck(lambda q, k, v: product_key_lookup(q, k, v, 3), (query, keys, values))


# ---- PyTorch's contract ------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")
@pytest.mark.parametrize("kind", [torch.float64, torch.float32, torch.bfloat16])
def test_opcheck(kind, device):
    operators = torch.ops.vlp_ops
    indices, weight, shares = bag_arguments(kind, device=device)
    torch.library.opcheck(operators.embedding_bag.default, (indices, weight, shares))
    grad = torch.randn(7, 12, device=device, dtype=kind)
    plain = (indices, weight.detach(), shares.detach())
    for mask in ([True, True], [True, False], [False, True]):
        torch.library.opcheck(operators.embedding_bag_backward.default, (grad, *plain, mask))
    scores = torch.randn(2, 9, 12, device=device).to(kind).unbind()
    torch.library.opcheck(operators.product_key_topk.default, (*(s.requires_grad_() for s in scores), 4))
    chosen = torch.randint(144, (9, 4), device=device)
    torch.library.opcheck(
        operators.product_key_topk_backward.default,
        (torch.randn(9, 4, device=device).to(kind), chosen, 12, 12),
    )


def test_compile(device):
    torch._dynamo.reset()
    values = torch.randn(100, 6, device=device)
    compiled = torch.compile(
        lambda q, k: product_key_lookup(q, k, values, 4), fullgraph=True, dynamic=True, backend="aot_eager"
    )
    for tokens in (6, 9):
        tensors = key_arguments(torch.float32, device=device, tokens=tokens)
        out, expected = compiled(*tensors), product_key_lookup(*tensors, values, 4)
        torch.testing.assert_close(out, expected)
        for a, b in zip(
            torch.autograd.grad(out.sum(), tensors), torch.autograd.grad(expected.sum(), tensors), strict=True
        ):
            torch.testing.assert_close(a, b)


def test_autocast_keeps_the_softmax_precise(device):
    query, keys = (tensor.detach().float() for tensor in key_arguments(device=device))
    values = torch.randn(100, 6, device=device)
    with torch.autocast(device.type, dtype=torch.bfloat16):
        out = product_key_lookup(query, keys, values, 4)
    assert out.dtype == torch.float32
    torch.testing.assert_close(out, product_key_lookup(query, keys, values, 4), rtol=0.05, atol=0.05)


# ---- messages ----------------------------------------------------------------------------------------------


def test_messages_of_topk():
    query, keys = key_arguments(n_keys=32)
    with pytest.raises(
        ValueError, match=exactly("product_key_topk: k=64 exceeds the number of keys per half (32)")
    ):
        product_key_topk(query, keys, 64)
    with pytest.raises(ValueError, match="k must be at least 1, got 0"):
        product_key_topk(query, keys, 0)
    with pytest.raises(ValueError, match="n_heads is needed"):
        product_key_topk(query.flatten(0, 1), keys.flatten(0, 2), 4)
    with pytest.raises(ValueError, match=r"keys must have shape .* with H=3, K=8, got \(3, 2, 32, 3\)"):
        product_key_topk(query, keys[..., :3], 4)
    with pytest.raises(ValueError, match=r"query must have shape .* with H=3 and an even K, got \(6, 3, 7\)"):
        product_key_topk(query[..., :7], keys, 4)
    with pytest.raises(ValueError, match=r"values must have n\*n=1024 rows for n=32 keys per half, got 100"):
        product_key_lookup(query, keys, torch.zeros(100, 4), 4)
    with pytest.raises(TypeError, match=r"unsupported dtype torch.int64 for query"):
        product_key_topk(query.long(), keys, 4)


def test_messages_of_bag():
    indices, weight, shares = bag_arguments(rows=64)
    indices[3, 2] = 70
    with pytest.raises(
        ValueError, match=exactly("embedding_bag: index 70 is out of range for a table of 64 rows")
    ):
        embedding_bag(indices, weight, shares)
    indices[3, 2] = -1
    with pytest.raises(ValueError, match="index -1 is out of range"):
        embedding_bag(indices, weight, shares)
    with pytest.raises(ValueError, match=r"per_sample_weights must have shape \(7, 5\), got \(7, 4\)"):
        embedding_bag(indices, weight, shares[:, :4])
    with pytest.raises(TypeError, match=r"unsupported dtype torch.float64 for indices; use int64 or int32"):
        embedding_bag(indices.double(), weight, shares)
    with pytest.raises(
        TypeError, match=r"per_sample_weights must be torch.float64 or torch.float64, got torch.float16"
    ):
        embedding_bag(indices, weight, shares.half())
    with pytest.raises(ValueError, match="weight is on meta but indices is on cpu"):
        embedding_bag(indices, weight.to("meta"), shares)
