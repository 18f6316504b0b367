"""The attention front end against golden numbers and the plain definition."""

import os
import subprocess
import sys

import pytest
import torch
from vlp_ops import attention, attention_backend, masked_attention, reference

QKV = ("query", "key", "value")


def arguments(dtype=torch.float64, *, device="cpu", batch=2, heads=3, queries=5, keys=7, width=8):
    generator = torch.Generator().manual_seed(0)
    shapes = ((batch, heads, queries, width), (batch, heads, keys, width), (batch, heads, keys, width))
    made = (torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes)
    return [tensor.to(device, dtype).requires_grad_() for tensor in made]


def masks_of(inputs, device):
    """The options of `attention` for the mask that a golden case holds, whatever its name says about the
    system."""
    options = {}
    for name, tensor in inputs.items():
        tensor = tensor.to(device)
        if name == "encoder_attention_mask":
            options["mask"] = tensor.bool()
        elif name in ("key_mask", "attn_mask"):
            options["mask"] = tensor
        elif name == "masked_out":
            options |= {"mask": ~tensor, "empty_rows": "all"}
        elif name in ("cu_seqlens", "bias"):
            options[name] = tensor
    return options


@pytest.mark.golden(
    "ops", lambda case: {*QKV, "grad_output"} <= case.tensor_names("inputs") and "H" in case.config
)
def test_case(case, dtype, device, leaf, close):
    inputs, outputs, grads = case.tensors("inputs"), case.tensors("outputs"), case.tensors("grads")
    leaves = {name: leaf(inputs[name], dtype) for name in grads}
    options = masks_of(inputs, device) | {name: tensor for name, tensor in leaves.items() if name == "bias"}
    out = attention(*(leaves[name] for name in QKV), **options)
    close.forward(out, outputs["output"])
    out.backward(inputs["grad_output"].to(out))
    for name, tensor in leaves.items():
        close.gradient(tensor.grad, grads[name], name)


@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("form", ["padding", "rows", "full", "lengths", "none"])
def test_equals_reference(form, with_bias, device, close):
    leaves = arguments(device=device)
    generator = torch.Generator().manual_seed(1)
    mask, options = None, {}
    if form in ("padding", "lengths"):
        lengths = torch.tensor([4, 7], device=device)
        mask = (torch.arange(7, device=device) < lengths[:, None])[:, None, None]
        options = {"mask": mask[:, 0, 0]} if form == "padding" else {"key_lengths": lengths}
    elif form == "rows":
        mask = (torch.rand(2, 1, 5, 7, generator=generator) < 0.5).to(device)
        mask[0, 0, 2] = False
        options = {"mask": mask[:, 0]}
    elif form == "full":
        mask = (torch.rand(2, 3, 5, 7, generator=generator) < 0.5).to(device)
        mask[1, 2] = False
        options = {"mask": mask}
    bias = None
    if with_bias:
        bias = torch.randn(3, 5, 7, generator=generator, dtype=torch.float64).to(device).requires_grad_()
        options["bias"] = bias
        leaves.append(bias)
    out = attention(*leaves[:3], **options)
    expected = reference.attention(*leaves[:3], mask=mask, bias=bias)
    close.forward(out, expected.detach())
    upstream = torch.randn_like(out)
    wanted = torch.autograd.grad(expected, leaves, upstream)
    for grad, want in zip(torch.autograd.grad(out, leaves, upstream), wanted, strict=True):
        close.gradient(grad, want, form)


@pytest.mark.parametrize("none", ["keys", "queries", "samples", "width"])
def test_nothing_to_attend_to_keeps_the_graph(none, device):
    """Under DDP a rank without keys would otherwise wait for gradients that never come."""
    sizes = {"keys": {"keys": 0}, "queries": {"queries": 0}, "samples": {"batch": 0}, "width": {"width": 0}}
    query, key, value = arguments(device=device, **sizes[none])
    bias = torch.randn(3, query.shape[2], key.shape[2], dtype=torch.float64, device=device).requires_grad_()
    with torch.no_grad():
        # Not a number in what nobody reads must not come out.
        value.fill_(torch.nan)
    out = attention(query, key, value, bias=bias)
    assert out.shape == (*query.shape[:3], value.shape[3]) and (out == 0).all()
    out.sum().backward()
    for tensor in (query, key, value, bias):
        assert tensor.grad.shape == tensor.shape and (tensor.grad == 0).all()
    with torch.autocast(device.type, torch.bfloat16):
        assert attention(query.float(), key.float(), value.float()).shape == out.shape


def test_mixed_dtypes_are_refused(device):
    query, key, value = arguments(torch.float32, device=device)
    with pytest.raises(TypeError, match=r"query is torch.float32 but key is torch.bfloat16"):
        attention(query, key.bfloat16(), value)
    with pytest.raises(TypeError, match=r"query is torch.bfloat16 but value is torch.float32"):
        attention_backend(query.bfloat16(), key.bfloat16(), value)
    with torch.autocast(device.type, torch.bfloat16):
        assert attention(query, key.bfloat16(), value).dtype == torch.bfloat16


@pytest.mark.parametrize("with_bias", [False, True])
def test_empty_rows(with_bias, device):
    query, key, value = arguments(device=device)
    mask = torch.zeros(2, 7, dtype=torch.bool, device=device)
    mask[1] = True
    bias = torch.randn(3, 5, 7, dtype=torch.float64, device=device) if with_bias else None
    zero = attention(query, key, value, mask=mask, bias=bias)
    assert (zero[0] == 0).all()
    grads = torch.autograd.grad(zero.sum(), (query, key, value))
    assert all((grad[0] == 0).all() and torch.isfinite(grad).all() for grad in grads)
    everything = attention(query, key, value, mask=mask, bias=bias, empty_rows="all")
    torch.testing.assert_close(everything, attention(query, key, value, bias=bias))


def test_masks_combine(device):
    query, key, value = arguments(device=device, batch=1, queries=7)
    rows = (torch.rand(1, 7, 7) < 0.7).to(device)
    cu = torch.tensor([0, 3, 3, 6], device=device, dtype=torch.int32)
    out = attention(query, key, value, mask=rows, cu_seqlens=cu, key_lengths=torch.tensor([5], device=device))
    segment = torch.tensor([0, 0, 0, 1, 1, 1, 2], device=device)
    allowed = rows & (segment[:, None] == segment) & (torch.arange(7, device=device) < 5) & (segment < 2)
    torch.testing.assert_close(out, reference.attention(query, key, value, mask=allowed[:, None]))


def test_scale_and_dropout(device):
    query, key, value = arguments(device=device)
    torch.testing.assert_close(
        attention(query, key, value, scale=0.5), reference.attention(query * 0.5 * 8**0.5, key, value)
    )
    dropped = attention(query, key, value, dropout_p=0.9)
    assert not torch.allclose(dropped, attention(query, key, value))


def test_no_queries_and_no_keys(device):
    query, key, value = arguments(device=device, keys=0)
    assert (attention(query, key, value) == 0).all()
    query, key, value = arguments(device=device, queries=0)
    assert attention(query, key, value).shape == (2, 3, 0, 8)


def test_compile(device):
    torch._dynamo.reset()
    compiled = torch.compile(
        lambda q, k, v, mask: attention(q, k, v, mask=mask, empty_rows="all"),
        fullgraph=True,
        backend="aot_eager",
    )
    leaves = arguments(torch.float32, device=device)
    mask = torch.rand(2, 5, 7, device=device) < 0.4
    out, expected = compiled(*leaves, mask), attention(*leaves, mask=mask, empty_rows="all")
    torch.testing.assert_close(out, expected)


def test_padding_mask_is_not_expanded(monkeypatch):
    seen = []

    def record(query, key, value, *, attn_mask, **options):
        seen.append(tuple(attn_mask.shape))
        return query

    monkeypatch.setattr(masked_attention.F, "scaled_dot_product_attention", record)
    query, key, value = arguments()
    attention(query, key, value, mask=torch.ones(2, 7, dtype=torch.bool))
    assert seen == [(2, 1, 1, 7)]


def test_messages():
    query, key, value = arguments()
    with pytest.raises(ValueError, match=r"query must have shape \(B, H, Q, D\), got \(2, 3, 5\)"):
        attention(query[..., 0], key, value)
    with pytest.raises(ValueError, match="do not fit: query"):
        attention(query, key[..., :4], value)
    with pytest.raises(TypeError, match=r"mask must be bool .* additive numbers go to bias"):
        attention(query, key, value, mask=torch.zeros(2, 7))
    with pytest.raises(ValueError, match=r"mask must have shape .* got \(2, 6\)"):
        attention(query, key, value, mask=torch.ones(2, 6, dtype=torch.bool))
    with pytest.raises(ValueError, match=r"bias must have shape \(H, Q, K\) .* got \(2, 5, 7\)"):
        attention(query, key, value, bias=torch.zeros(2, 5, 7))
    with pytest.raises(TypeError, match="a bool mask goes to mask"):
        attention(query, key, value, bias=torch.ones(3, 5, 7, dtype=torch.bool))
    with pytest.raises(ValueError, match="needs packed tokens with B=1 and Q=K"):
        attention(query, key, value, cu_seqlens=torch.tensor([0, 7]))
    with pytest.raises(ValueError, match=r"key_lengths must have shape \(2,\), got \(3,\)"):
        attention(query, key, value, key_lengths=torch.tensor([1, 2, 3]))
    with pytest.raises(ValueError, match="empty_rows must be 'zero' or 'all', got 'none'"):
        attention(query, key, value, empty_rows="none")
    with pytest.raises(ValueError, match="query is on cpu but mask is on meta"):
        attention(query, key, value, mask=torch.ones(2, 7, dtype=torch.bool, device="meta"))


# ---- FlexAttention -----------------------------------------------------------------------------------------

# On the CPU FlexAttention computes without its kernels, and says so.
unfused = pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
MIXED = {
    "device": "cuda",
    "dtypes": {torch.bfloat16},
    "widths": (64, 64),
    "mask_shape": None,
    "empty_rows": "zero",
    "dropout_p": 0.0,
    "wants_gradient": True,
}


def masked(form: str, device) -> tuple[int, dict]:
    """A length of more than one block, and options of `attention` for it."""
    generator = torch.Generator().manual_seed(2)
    bias = torch.randn(3, 300, 300, generator=generator, dtype=torch.float64)
    options = {
        "packed": {"cu_seqlens": [0, 10, 10, 140, 300]},
        "packed with tokens outside": {"cu_seqlens": [5, 128, 256, 290]},
        "one sequence": {"cu_seqlens": [0, 300]},
        "packed with padding": {"cu_seqlens": [0, 100, 300], "key_lengths": [230]},
        "lengths": {"key_lengths": [130, 0]},
        "padding": {"mask": torch.rand(2, 300, generator=generator) < 0.5},
        "padding and lengths": {
            "mask": torch.rand(2, 300, generator=generator) < 0.5,
            "key_lengths": [300, 128],
        },
        "bias": {"bias": bias},
        "bias of keys": {"bias": bias[:1, :1, None]},
        "bias of samples": {"bias": torch.randn(2, 1, 1, 300, generator=generator, dtype=torch.float64)},
        "one number": {"bias": bias[:1, :1, :1]},
        "bias with lengths": {"bias": bias, "key_lengths": [130, 300]},
        "packed bias": {"bias": bias, "cu_seqlens": [0, 100, 300]},
    }[form]
    options = {name: torch.as_tensor(value).to(device) for name, value in options.items()}
    return (1 if "cu_seqlens" in options else 2), options


FORMS = (
    "packed",
    "packed with tokens outside",
    "one sequence",
    "packed with padding",
    "lengths",
    "padding",
    "padding and lengths",
    "bias",
    "bias of keys",
    "bias of samples",
    "one number",
    "bias with lengths",
    "packed bias",
)


@unfused
# PyTorch looks at .grad of everything that a score function captures, also of what is no leaf.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
@pytest.mark.parametrize("form", FORMS)
def test_flex_equals_sdpa(form, device):
    batch, options = masked(form, device)
    kind = torch.float32 if device.type == "cuda" else torch.float64
    leaves = arguments(kind, device=device, batch=batch, queries=300, keys=300, width=16)
    if device.type == "cpu":
        leaves = [tensor.detach() for tensor in leaves]
    options = {name: value.to(kind) if name == "bias" else value for name, value in options.items()}
    if "bias" in options:
        leaves.append(options["bias"].requires_grad_())
    assert attention_backend(*leaves[:3], **options, backend="flex") == "flex"
    out = attention(*leaves[:3], **options, backend="flex")
    expected = attention(*leaves[:3], **options, backend="sdpa")
    tolerance = {"rtol": 1e-3, "atol": 1e-4} if device.type == "cuda" else {"rtol": 1e-9, "atol": 1e-10}
    torch.testing.assert_close(out, expected, **tolerance)
    wanted = [leaf for leaf in leaves if leaf.requires_grad]
    if wanted:
        upstream = torch.randn_like(out)
        for grad, want in zip(
            torch.autograd.grad(out, wanted, upstream),
            torch.autograd.grad(expected, wanted, upstream),
            strict=True,
        ):
            torch.testing.assert_close(grad, want, **tolerance)


@pytest.mark.parametrize("form", [form for form in FORMS if "bias" not in form and "number" not in form])
def test_blocks_are_those_of_the_mask(form):
    from torch.nn.attention.flex_attention import create_block_mask

    batch, options = masked(form, "cpu")
    query, key, value = arguments(batch=batch, queries=300, keys=300)
    call = masked_attention._checked(
        query,
        key,
        value,
        *(options.get(name) for name in ("mask", "bias", "key_lengths", "cu_seqlens")),
        "zero",
        None,
        0.0,
    )
    blocks = masked_attention._block_mask(call)
    expected = create_block_mask(blocks.mask_mod, batch, None, 300, 300, device="cpu")
    dense = masked_attention._allowed(call).expand(batch, 1, 300, 300)
    # Blocks in which only pairs at the ends of two sequences could meet may be looked at for nothing, none
    # may be left out.
    computed, needed = blocks.to_dense().bool(), expected.to_dense().bool()
    assert (computed | ~needed).all()
    inside = [
        [dense[b, 0, i : i + 128, j : j + 128] for i in (0, 128, 256) for j in (0, 128, 256)]
        for b in range(batch)
    ]
    whole = torch.tensor([[part.shape == (128, 128) and bool(part.all()) for part in row] for row in inside])
    for b in range(batch):
        for i in range(3):
            count = blocks.full_kv_num_blocks.expand(batch, 1, 3)[b, 0, i]
            listed = blocks.full_kv_indices.expand(batch, 1, 3, 3)[b, 0, i, :count].tolist()
            assert listed == [j for j in range(3) if whole[b, 3 * i + j]]


@pytest.mark.parametrize("form", ["packed with padding", "bias with lengths"])
def test_flex_inside_a_compiled_function(form, device):
    torch._dynamo.reset()
    batch, options = masked(form, device)
    leaves = arguments(torch.float32, device=device, batch=batch, queries=300, keys=300, width=16)
    leaves = [tensor.detach() for tensor in leaves]
    options = {name: value.float() if name == "bias" else value for name, value in options.items()}
    compiled = torch.compile(
        lambda q, k, v, o: attention(q, k, v, **o, backend="flex"),
        fullgraph=True,
        # Inductor's CPU template takes block lists only as inputs of a graph.
        backend="inductor" if device.type == "cuda" else "aot_eager",
    )
    expected = attention(*leaves, **options, backend="sdpa")
    torch.testing.assert_close(compiled(*leaves, options), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_compiled_flex():
    """The fused kernel with our blocks, as an eager call takes it on CUDA; here the one for the CPU (a score
    function fails there)."""
    batch, options = masked("packed with padding", "cpu")
    leaves = arguments(torch.float32, batch=batch, queries=300, keys=300, width=16)
    leaves = [tensor.detach() for tensor in leaves]
    query, key, value = leaves
    call = masked_attention._checked(
        query,
        key,
        value,
        *(options.get(name) for name in ("mask", "bias", "key_lengths", "cu_seqlens")),
        "zero",
        None,
        0.0,
    )
    out = masked_attention._compiled_flex()(
        query,
        key,
        value,
        block_mask=masked_attention._block_mask(call),
    )
    torch.testing.assert_close(out, attention(*leaves, **options, backend="sdpa"), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({}, None),
        ({"mask_shape": (2, 1, 1, 7)}, None),
        ({"mask_shape": (2, 1, 5, 7)}, "differs between queries or heads"),
        ({"mask_shape": (2, 3, 1, 7)}, "differs between queries or heads"),
        ({"device": "cpu"}, "no gradient on the CPU"),
        ({"device": "cpu", "wants_gradient": False}, None),
        ({"device": "mps"}, "not used on mps"),
        ({"dtypes": {torch.float32, torch.bfloat16}}, "different dtypes"),
        ({"dtypes": {torch.float64}}, "no float64"),
        ({"widths": (64, 8)}, "at least 16"),
        ({"dropout_p": 0.1}, "no dropout"),
        ({"empty_rows": "all"}, "empty_rows='zero'"),
    ],
)
def test_what_flex_can_serve(change, reason):
    found = masked_attention.why_not_flex(**(MIXED | change))
    assert found is None if reason is None else reason in found


def test_when_flex_pays():
    call = {"device": "cuda", "heads": 64, "pairs": 2048 * 2048, "bytes_per_number": 2}
    options = dict.fromkeys(("packed", "masked", "shared_bias", "bias_gradient"), False)

    def pays(**change):
        return masked_attention.flex_pays(**(call | options | change))

    assert not pays() and not pays(masked=True)
    assert pays(packed=True) and not pays(packed=True, pairs=1000 * 1000)
    assert pays(shared_bias=True, masked=True) and pays(shared_bias=True, bias_gradient=True)
    assert not pays(shared_bias=True) and not pays(bias_gradient=True)
    assert not pays(shared_bias=True, bias_gradient=True, heads=12)
    assert not pays(device="cpu", packed=True, shared_bias=True, bias_gradient=True)


def test_a_large_packed_call_on_cuda_takes_flex(monkeypatch):
    """The whole choice, with the device told: nothing is computed."""
    seen = {}
    monkeypatch.setattr(masked_attention, "FLEX_PAIRS", 300 * 300)
    originals = {name: getattr(masked_attention, name) for name in ("why_not_flex", "flex_pays")}

    def on_cuda(name):
        def choose(*, device, **properties):
            seen[name] = properties
            return originals[name](device="cuda", **properties)

        return choose

    for name in originals:
        monkeypatch.setattr(masked_attention, name, on_cuda(name))
    query, key, value = arguments(torch.bfloat16, batch=1, queries=300, keys=300, width=16)
    cu = torch.tensor([0, 100, 300])
    assert attention_backend(query, key, value, cu_seqlens=cu) == "flex"
    assert attention_backend(query, key, value, cu_seqlens=cu, dropout_p=0.1).startswith("sdpa:")
    assert attention_backend(query, key, value, key_lengths=torch.tensor([3])).startswith("sdpa:")
    assert seen["why_not_flex"]["wants_gradient"] and seen["flex_pays"]["heads"] == 3


def test_backend_that_is_taken(device):
    from torch.nn.attention import SDPBackend, sdpa_kernel

    query, key, value = arguments(torch.float32, device=device)
    names = {f"sdpa:{name.lower()}" for name in SDPBackend.__members__}
    assert attention_backend(query, key, value) in names
    with sdpa_kernel(SDPBackend.MATH):
        assert (
            attention_backend(query, key, value, mask=torch.ones(2, 7, device=device).bool()) == "sdpa:math"
        )
    assert attention_backend(query[:, :, :0], key, value) == "empty"


def test_a_backend_that_cannot_serve_is_refused():
    query, key, value = arguments()
    with pytest.raises(
        ValueError, match="FlexAttention cannot serve this call: it has no gradient on the CPU"
    ):
        attention(query, key, value, backend="flex")
    with pytest.raises(ValueError, match="backend must be 'sdpa', 'flex' or None, got 'xformers'"):
        attention_backend(query, key, value, backend="xformers")


# ---- xformers ----------------------------------------------------------------------------------------------


def test_xformers_is_not_imported_for_plain_masks():
    code = (
        "import sys, torch, vlp_ops; x = torch.ones(1, 1, 2, 4); vlp_ops.attention(x, x, x); "
        "assert 'xformers' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], env=os.environ.copy(), check=True)


@pytest.fixture
def attn_bias():
    return pytest.importorskip("xformers.ops.fmha.attn_bias")


@pytest.mark.filterwarnings("ignore")
def test_masks_of_xformers(attn_bias, device):
    query, key, value = arguments(torch.float32, device=device, batch=1, queries=7, width=16)
    blocks = attn_bias.BlockDiagonalMask.from_seqlens([3, 4], device=device)
    cu = torch.tensor([0, 3, 7], device=device)
    wanted = attention(query, key, value, cu_seqlens=cu)
    torch.testing.assert_close(attention(query, key, value, mask=blocks), wanted, rtol=1e-4, atol=1e-5)
    below = torch.ones(1, 7, 7, dtype=torch.bool, device=device).tril()
    out = attention(query, key, value, mask=attn_bias.LowerTriangularMask())
    torch.testing.assert_close(out, attention(query, key, value, mask=below), rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match="a BlockDiagonalMask of xformers does not combine with bias"):
        attention(query, key, value, mask=blocks, cu_seqlens=cu)
    with pytest.raises(ValueError, match="a BlockDiagonalMask of xformers goes without backend"):
        attention(query, key, value, mask=blocks, backend="sdpa")


@pytest.mark.filterwarnings("ignore")
def test_call_of_xformers(attn_bias, monkeypatch):
    """What xformers is given on CUDA, answered here by the plain definition."""
    import xformers.ops

    query, key, value = arguments(queries=7)
    below = attn_bias.LowerTriangularMask()

    def answer(q, k, v, *, attn_bias, p, scale):
        assert attn_bias is below and p == 0.0 and scale == 0.5
        first, second, third = (tensor.transpose(1, 2) for tensor in (q, k, v))
        return reference.attention(first * 0.5 * 8**0.5, second, third).transpose(1, 2)

    monkeypatch.setattr(xformers.ops, "memory_efficient_attention", answer)
    call = masked_attention._checked(query, key, value, below, None, None, None, "zero", 0.5, 0.0)
    torch.testing.assert_close(masked_attention._xformers(call), attention(query, key, value, scale=0.5))
