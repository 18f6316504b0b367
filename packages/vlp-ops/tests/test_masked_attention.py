"""The attention front end against golden numbers and the plain definition."""

import pytest
import torch
from vlp_ops import attention, reference

QKV = ("query", "key", "value")


def arguments(dtype=torch.float64, *, device="cpu", batch=2, heads=3, queries=5, keys=7, width=8):
    generator = torch.Generator().manual_seed(0)
    shapes = ((batch, heads, queries, width), (batch, heads, keys, width), (batch, heads, keys, width))
    made = (torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes)
    return [tensor.to(device, dtype).requires_grad_() for tensor in made]


def masks_of(inputs, device):
    """The options of `attention` for the mask that a golden case holds, whatever its name says about the system."""
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
    import vlp_ops.masked_attention

    seen = []

    def record(query, key, value, *, attn_mask, **options):
        seen.append(tuple(attn_mask.shape))
        return query

    monkeypatch.setattr(vlp_ops.masked_attention.F, "scaled_dot_product_attention", record)
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
