"""ms_deform_attn and its module against golden numbers, the plain definition, and the contract of an
operator."""

import json
import math
import re

import pytest
import torch
import vlp_ops
from torch import Tensor
from vlp_ops import MSDeformAttn, ms_deform_attn, reference


def exactly(message: str) -> str:
    return f"^{re.escape(message)}$"


SHAPES = [(4, 6), (0, 3), (3, 1)]


def is_operator(case) -> bool:
    return {"value", "sampling_locations", "attention_weights"} <= case.tensor_names("inputs")


def is_module(case) -> bool:
    names = case.tensor_names("inputs") | case.tensor_names("weights")
    return {"input_flatten", "spatial_shapes", "sampling_offsets.weight", "output_proj.bias"} <= names


def arguments(
    dtype=torch.float64,
    *,
    device="cpu",
    batch=2,
    queries=5,
    heads=3,
    width=8,
    points=2,
    shapes=SHAPES,
    spread=1.4,
):
    """Random arguments; about a quarter of the points lie outside, all at least 1e-3 pixels away from a
    kink."""
    generator = torch.Generator().manual_seed(0)
    positions = sum(h * w for h, w in shapes)
    value = torch.randn(batch, positions, heads, width, generator=generator, dtype=torch.float64)
    levels = len(shapes)
    location = torch.rand(batch, queries, heads, levels, points, 2, generator=generator, dtype=torch.float64)
    location = (location - 0.5) * spread + 0.5
    size = torch.tensor([(w, h) for h, w in shapes], dtype=torch.float64)[:, None]
    pixel = location * size - 0.5
    pixel = torch.where((pixel - pixel.round()).abs() < 1e-3, pixel + 0.01, pixel)
    location = torch.where(size > 0, (pixel + 0.5) / size.clamp(min=1), location)
    weight = torch.randn(batch, queries, heads, levels, points, generator=generator, dtype=torch.float64)
    precise = torch.float64 if dtype == torch.float64 else torch.float32
    return (
        value.to(device, dtype).requires_grad_(),
        location.to(device, precise).requires_grad_(),
        weight.to(device, dtype).requires_grad_(),
    )


def call(value, shapes, location, weight, **options):
    return ms_deform_attn(value, shapes, location, weight, **options)


# ---- golden ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["list", "tensor", "device tensor"])
@pytest.mark.golden("ops", is_operator)
def test_operator_case(case, dtype, device, form, leaf, close):
    inputs, outputs, grads = case.tensors("inputs"), case.tensors("outputs"), case.tensors("grads")
    value, location, weight = (
        leaf(inputs[name], dtype) for name in ("value", "sampling_locations", "attention_weights")
    )
    shapes = inputs["spatial_shapes"]
    starts = inputs["level_start_index"]
    if form == "list":
        out = ms_deform_attn(value, [tuple(s) for s in shapes.tolist()], location, weight)
    elif form == "tensor":
        out = ms_deform_attn(value, shapes, location, weight, level_start_index=starts)
    else:
        out = torch.ops.vlp_ops.ms_deform_attn.tensor(
            value, shapes.to(device), starts.to(device), location, weight
        )
    close.forward(out, outputs["output"])
    out.backward(inputs["grad_output"].to(out))
    close.gradient(value.grad, grads["value"], "value")
    close.gradient(weight.grad, grads["attention_weights"], "attention_weights")
    comparable = inputs["loc_grad_comparable"]
    assert torch.isfinite(location.grad).all()
    close.gradient(
        torch.where(comparable, location.grad.cpu(), 0.0),
        torch.where(comparable, grads["sampling_locations"], 0.0),
        "sampling_locations",
    )
    # The gradient of a point that touches no map is exactly zero, not merely small.
    assert (value.grad.cpu()[grads["value"] == 0] == 0).all()
    outside = comparable & (grads["sampling_locations"] == 0)
    assert (location.grad.cpu()[outside] == 0).all()


@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16])
@pytest.mark.golden("ops", lambda case: is_operator(case) and case.config.get("rounded_to") == "bfloat16")
def test_half_case(case, half, device, close):
    inputs, outputs, grads = case.tensors("inputs"), case.tensors("outputs"), case.tensors("grads")
    value = inputs["value"].to(device, half).requires_grad_()
    weight = inputs["attention_weights"].to(device, half).requires_grad_()
    location = inputs["sampling_locations"].to(device).requires_grad_()
    out = ms_deform_attn(value, inputs["spatial_shapes"], location, weight)
    forward, gradient = (8e-3, 2e-2) if half == torch.bfloat16 else (1e-3, 3e-3)
    assert out.dtype == half
    close.forward(out, outputs["output"], tolerance=forward)
    out.backward(inputs["grad_output"].to(out))
    assert value.grad.dtype == half and weight.grad.dtype == half and location.grad.dtype == torch.float32
    close.gradient(value.grad, grads["value"], "value", gradient)
    close.gradient(weight.grad, grads["attention_weights"], "attention_weights", gradient)


@pytest.mark.golden("visft", is_operator)
def test_visft_operator(case, device, close):
    inputs, outputs = case.tensors("inputs"), case.tensors("outputs")
    names = ("value", "sampling_locations", "attention_weights")
    value, location, weight = (inputs[name].to(device).requires_grad_() for name in names)
    out = vlp_ops.compat.MSDeformAttnFunction.apply(
        value,
        inputs["spatial_shapes"],
        inputs["level_start_index"],
        location,
        weight,
        case.config["im2col_step"],
    )
    close.forward(out, outputs["output"])
    out.backward(inputs["grad_output"].to(device))
    for name, tensor in zip(names, (value, location, weight), strict=True):
        close.gradient(tensor.grad, outputs[f"grad_{name}"], name)


def module_of(config: dict, weights: dict[str, Tensor], dtype: torch.dtype, device) -> MSDeformAttn:
    heads, points, levels = (
        config.get(f"n_{name}", config.get(name)) for name in ("heads", "points", "levels")
    )
    module = MSDeformAttn(config["d_model"], levels, heads, points)
    module.load_state_dict(weights)
    return module.to(device, dtype)


@pytest.mark.golden("ops", is_module)
def test_module_case(case, dtype, device, leaf, close):
    inputs, outputs, grads = case.tensors("inputs"), case.tensors("outputs"), case.tensors("grads")
    module = module_of(case.config, case.tensors("weights"), dtype, device)
    tensors = {name: leaf(inputs[name], dtype) for name in ("query", "reference_points", "input_flatten")}
    mask = inputs.get("input_padding_mask")
    out = module(
        *tensors.values(),
        inputs["spatial_shapes"],
        inputs["level_start_index"],
        mask if mask is None else mask.to(device),
    )
    # Two more matrix products than the operator alone.
    close.forward(out, outputs["output"], tolerance=None if dtype == torch.float64 else 1e-5)
    out.backward(inputs["grad_output"].to(out))
    for name, tensor in (tensors | dict(module.named_parameters())).items():
        close.gradient(tensor.grad, grads[name], name, None if dtype == torch.float64 else 2e-5)


@pytest.mark.golden("visft", is_module)
def test_visft_module(case, device, close):
    inputs, outputs = case.tensors("inputs"), case.tensors("outputs")
    module = module_of(case.config, case.tensors("weights"), torch.float64, device)
    query, flat = (inputs[name].to(device).requires_grad_() for name in ("query", "input_flatten"))
    total = torch.zeros((), dtype=torch.float64, device=device)
    for corners in (2, 4):
        for masked in ("", "_masked"):
            out = module(
                query,
                inputs[f"reference_points_{corners}"].to(device),
                flat,
                inputs["spatial_shapes"],
                inputs["level_start_index"],
                inputs["padding_mask"].to(device) if masked else None,
            )
            close.forward(out, outputs[f"output_{corners}{masked}"])
            total = total + (out * inputs["probe"].to(device)).sum()
    close.forward(total, outputs["total"])
    total.backward()
    close.gradient(query.grad, outputs["grad_query"], "query")
    close.gradient(flat.grad, outputs["grad_input_flatten"], "input_flatten")
    for name, norm in case.json("grads").items():
        assert module.get_parameter(name).grad.norm().item() == pytest.approx(norm, rel=1e-9)


@pytest.mark.golden("ops", lambda case: case.path.suffix == ".json" and case.name == "official_keys")
def test_public_parameter_names(case):
    for title, keys in json.loads(case.path.read_text()).items():
        width = keys["value_proj.weight"][0]
        heads = int(title.split(" h")[1].split()[0])
        levels, points = (int(title.split(f" {letter}")[1].split()[0]) for letter in "LP")
        state = MSDeformAttn(width, levels, heads, points).state_dict()
        assert {name: list(tensor.shape) for name, tensor in state.items()} == keys


# ---- against the plain definition --------------------------------------------------------------------------


@pytest.mark.parametrize("softmax", [False, True])
@pytest.mark.parametrize("width", [1, 5, 8, 16, 32, 48, 64, 100])
@pytest.mark.parametrize("points", [1, 3, 4, 9])
def test_equals_reference(softmax, width, points, device, close):
    value, location, weight = arguments(device=device, width=width, points=points)
    out = call(value, SHAPES, location, weight, softmax=softmax)
    expected = reference.ms_deform_attn(value, SHAPES, location, weight, softmax=softmax)
    close.forward(out, expected.detach().cpu() if device.type == "cpu" else expected.detach())
    upstream = torch.randn_like(expected)
    grads = torch.autograd.grad(out, (value, location, weight), upstream)
    wanted = torch.autograd.grad(expected, (value, location, weight), upstream)
    for grad, want, name in zip(grads, wanted, ("value", "location", "weight"), strict=True):
        assert grad.is_contiguous()
        close.gradient(grad, want, name)


@pytest.mark.parametrize("softmax", [False, True])
def test_gradcheck(softmax, device):
    value, location, weight = arguments(device=device, queries=3, width=4)
    assert torch.autograd.gradcheck(
        lambda *tensors: call(tensors[0], SHAPES, *tensors[1:], softmax=softmax), (value, location, weight)
    )


@pytest.mark.parametrize("width", [1, 3, 8, 32])
def test_what_is_infinite_stays_in_its_cells(width, device):
    """A corner outside the map takes part with nothing, and the gradient is the same in any order."""
    shapes = [(3, 4)]
    # Beyond each edge and in two corners, none at the centre of a pixel.
    points = torch.tensor([[-0.02, 0.6], [1.03, 0.4], [0.6, -0.05], [0.4, 1.05], [-0.03, -0.06], [1.05, 1.1]])
    location = points.to(device).view(1, 6, 1, 1, 1, 2)
    weight = torch.ones(1, 6, 1, 1, 1, device=device)
    value = torch.randn(1, 12, 1, width, generator=torch.Generator().manual_seed(0)).to(device)

    def compare(found, want):
        finite = want.isfinite()
        assert torch.equal(found.isfinite(), finite)
        torch.testing.assert_close(found[finite].double(), want[finite], rtol=1e-5, atol=1e-6)

    for place in range(12):
        moved = value.clone()
        moved[0, place] = torch.inf
        out = ms_deform_attn(moved, shapes, location, weight)
        compare(out, reference.ms_deform_attn(moved.double(), shapes, location.double(), weight.double()))
    value.requires_grad_()
    orders = [False]
    if device.type == "cpu" or vlp_ops.backend_info()["cuda"]["native"]:
        orders.append(True)
    for query in range(6):
        upstream = torch.ones(1, 6, width, device=device)
        upstream[0, query] = torch.inf
        exact = value.detach().double().requires_grad_()
        out = reference.ms_deform_attn(exact, shapes, location.double(), weight.double())
        (want,) = torch.autograd.grad(out, exact, upstream.double())
        grads = []
        for deterministic in orders:
            out = ms_deform_attn(value, shapes, location, weight, deterministic=deterministic)
            grads.append(torch.autograd.grad(out, value, upstream)[0])
            compare(grads[-1], want)
        torch.testing.assert_close(grads[0], grads[-1], equal_nan=True)


def test_reference_is_differentiable_twice():
    value, location, weight = arguments(queries=2, heads=1, width=2, batch=1)
    assert torch.autograd.gradgradcheck(
        lambda *tensors: reference.ms_deform_attn(tensors[0], SHAPES, *tensors[1:]), (value, location, weight)
    )


def test_second_derivative_is_refused():
    value, location, weight = arguments()
    (grad,) = torch.autograd.grad(call(value, SHAPES, location, weight).sum(), value, create_graph=True)
    with pytest.raises(RuntimeError, match="ms_deform_attn_backward cannot be differentiated"):
        grad.sum().backward()


def test_permuted_queries_permute_outputs(device):
    value, location, weight = arguments(torch.float32, device=device)
    order = torch.tensor([3, 1, 4, 0, 2], device=device)
    assert torch.equal(
        call(value, SHAPES, location[:, order], weight[:, order]),
        call(value, SHAPES, location, weight)[:, order],
    )


def test_doubled_weights_double_the_output(device):
    value, location, weight = arguments(torch.float32, device=device)
    assert torch.equal(call(value, SHAPES, location, 2 * weight), 2 * call(value, SHAPES, location, weight))


def test_points_on_an_empty_level_read_nothing(device):
    value = torch.full((1, 6, 1, 8), math.inf, device=device)
    location = torch.full((1, 1, 1, 2, 1, 2), 0.5, device=device)
    weight = torch.tensor([0.0, 1.0], device=device).view(1, 1, 1, 2, 1)
    location[:, :, :, 0] = 9.0  # beside the only map that holds anything
    for empty in ((0, 0), (0, 5), (5, 0)):
        assert (call(value, [(2, 3), empty], location, weight) == 0).all()


def test_empty_level_changes_nothing(device):
    value, location, weight = arguments(device=device, shapes=[(4, 6), (3, 1)])
    more = [torch.cat([t, t[:, :, :, :1]], dim=3) for t in (location, weight)]
    with_empty = call(value, [(4, 6), (3, 1), (5, 0)], *more)
    assert torch.equal(with_empty, call(value, [(4, 6), (3, 1)], location, weight))


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf, 1e30, -1e6, 3e9])
def test_unbounded_locations_count_as_outside(bad, dtype, device):
    value, location, weight = arguments(dtype, device=device)
    with torch.no_grad():
        location[0, 0, :, :, :, 0] = bad
        location[0, 1, :, :, :, 1] = bad
    out = call(value, SHAPES, location, weight)
    assert (out[0, :2] == 0).all()
    out.sum().backward()
    assert (location.grad[0, :2] == 0).all() and (weight.grad[0, :2] == 0).all()
    assert torch.isfinite(value.grad).all() and torch.isfinite(location.grad).all()
    assert (location.grad[0, 2:] != 0).any()


def test_every_element_is_written(device):
    """Memory that held NaN before is handed to the results, so an element left unwritten shows."""
    value, location, weight = arguments(torch.float32, device=device, queries=64, width=32, spread=4.0)
    for _ in range(5):
        junk = [
            torch.full((tensor.numel(),), math.nan, device=device)
            for tensor in (value, location, weight)
            for _ in "ab"
        ]
        del junk
        out = call(value, SHAPES, location, weight)
        grads = torch.autograd.grad(out.sum(), (value, location, weight))
        assert all(torch.isfinite(tensor).all() for tensor in (out, *grads))


@pytest.mark.parametrize("empty", ["batch", "queries", "points", "heads", "width", "levels", "positions"])
def test_empty_inputs(empty, device):
    sizes = {"batch": 2, "queries": 5, "points": 2, "heads": 3, "width": 8}
    shapes = [] if empty == "levels" else [(0, 4), (3, 0)] if empty == "positions" else SHAPES
    if empty in sizes:
        sizes[empty] = 0
    value = torch.randn(
        sizes["batch"], sum(h * w for h, w in shapes), sizes["heads"], sizes["width"], device=device
    )
    location = torch.rand(
        sizes["batch"], sizes["queries"], sizes["heads"], len(shapes), sizes["points"], 2, device=device
    )
    weight = torch.rand(location.shape[:-1], device=device)
    for tensor in (value, location, weight):
        tensor.requires_grad_()
    out = call(value, shapes, location, weight)
    assert out.shape == (sizes["batch"], sizes["queries"], sizes["heads"] * sizes["width"])
    assert (out == 0).all()
    grads = torch.autograd.grad(out.sum(), (value, location, weight))
    for grad, tensor in zip(grads, (value, location, weight), strict=True):
        assert grad.shape == tensor.shape and (grad == 0).all()


def test_non_contiguous_inputs(device):
    value, location, weight = arguments(device=device)
    strided = [
        tensor.detach().transpose(0, -1).contiguous().transpose(0, -1) for tensor in (value, location, weight)
    ]
    assert not any(tensor.is_contiguous() for tensor in strided)
    assert torch.equal(call(strided[0], SHAPES, *strided[1:]), call(value, SHAPES, location, weight))


def test_only_wanted_gradients_are_made(device):
    for wanted in range(3):
        tensors = [t.detach() for t in arguments(device=device)]
        tensors[wanted].requires_grad_()
        full = arguments(device=device)
        call(tensors[0], SHAPES, *tensors[1:]).sum().backward()
        call(full[0], SHAPES, *full[1:]).sum().backward()
        torch.testing.assert_close(tensors[wanted].grad, full[wanted].grad, rtol=0, atol=1e-12)
        assert all(t.grad is None for i, t in enumerate(tensors) if i != wanted)


def test_float32_weights_with_half_values(device, close):
    value, location, weight = arguments(torch.bfloat16, device=device)
    precise = weight.detach().float().requires_grad_()
    out = call(value, SHAPES, location, precise)
    assert out.dtype == torch.bfloat16
    out.sum().backward()
    assert precise.grad.dtype == torch.float32
    close.forward(out, call(value, SHAPES, location, weight).detach().double(), tolerance=8e-3)


@pytest.mark.parametrize("softmax", [False, True])
def test_deterministic_gradient_is_the_same_gradient(softmax, device):
    if device.type == "cuda" and not vlp_ops.backend_info()["cuda"]["native"]:
        pytest.skip("the PyTorch implementation has no deterministic gradient on CUDA")
    results = []
    for deterministic in (False, True):
        tensors = arguments(device=device, queries=40, width=16)
        call(
            tensors[0], SHAPES, *tensors[1:], softmax=softmax, deterministic=deterministic
        ).square().sum().backward()
        results.append([tensor.grad for tensor in tensors])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-11)


def test_repeated_runs_are_equal(device):
    torch.use_deterministic_algorithms(True)
    try:
        runs = []
        for _ in range(3):
            value, location, weight = arguments(torch.float32, device=device, queries=200, width=32)
            if device.type == "cuda" and not vlp_ops.backend_info()["cuda"]["native"]:
                with pytest.raises(RuntimeError, match="does not have a deterministic implementation"):
                    call(value, SHAPES, location, weight).sum().backward()
                return
            call(value, SHAPES, location, weight).sum().backward()
            runs.append((value.grad, location.grad, weight.grad))
        assert all(torch.equal(a, b) for run in runs[1:] for a, b in zip(runs[0], run, strict=True))
    finally:
        torch.use_deterministic_algorithms(False)


# ---- PyTorch's contract ------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")
@pytest.mark.parametrize("kind", [torch.float64, torch.float32, torch.bfloat16])
def test_opcheck(kind, device):
    value, location, weight = arguments(kind, device=device)
    flat = [size for shape in SHAPES for size in shape]
    torch.library.opcheck(torch.ops.vlp_ops.ms_deform_attn.default, (value, flat, location, weight, True))
    shapes = torch.tensor(SHAPES, device=device)
    starts = torch.tensor([0, 24, 24], device=device)
    torch.library.opcheck(torch.ops.vlp_ops.ms_deform_attn.tensor, (value, shapes, starts, location, weight))
    tensors = [tensor.detach() for tensor in (value, location, weight)]
    grad = torch.randn(2, 5, 24, device=device, dtype=kind)
    for mask in ([True, True, True], [False, True, False], [True, False, True]):
        torch.library.opcheck(
            torch.ops.vlp_ops.ms_deform_attn_backward.default,
            (grad, tensors[0], flat, *tensors[1:], False, False, mask),
        )


@pytest.mark.parametrize("as_tensor", [False, True])
def test_compile(as_tensor, device):
    torch._dynamo.reset()
    shapes = torch.tensor(SHAPES, device=device) if as_tensor else SHAPES
    compiled = torch.compile(
        lambda *tensors: call(tensors[0], shapes, *tensors[1:], softmax=True),
        fullgraph=True,
        dynamic=True,
        backend="aot_eager",
    )
    for queries in (5, 7):
        tensors = arguments(torch.float32, device=device, queries=queries)
        out = compiled(*tensors)
        expected = call(tensors[0], SHAPES, *tensors[1:], softmax=True)
        torch.testing.assert_close(out, expected)
        for a, b in zip(
            torch.autograd.grad(out.sum(), tensors), torch.autograd.grad(expected.sum(), tensors), strict=True
        ):
            torch.testing.assert_close(a, b)


def test_compiled_module(device):
    torch._dynamo.reset()
    module = MSDeformAttn(16, 2, 2, 3).to(device)
    flat, query = torch.randn(2, 26, 16, device=device), torch.randn(2, 4, 16, device=device)
    arguments_ = (query, torch.rand(2, 4, 2, 2, device=device), flat, [(4, 5), (2, 3)])
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(*arguments_), module(*arguments_))


def test_export(device):
    class Program(torch.nn.Module):
        def forward(self, *tensors):
            return call(tensors[0], SHAPES, *tensors[1:])

    tensors = tuple(tensor.detach() for tensor in arguments(torch.float32, device=device))
    exported = torch.export.export(Program(), tensors)
    assert any("ms_deform_attn" in str(node.target) for node in exported.graph.nodes)
    torch.testing.assert_close(exported.module()(*tensors), call(tensors[0], SHAPES, *tensors[1:]))


def test_autocast_keeps_positions(device, close):
    module = MSDeformAttn(32, 1, 4, 4).to(device)
    shapes = [(96, 96)]
    query, flat = torch.randn(1, 9, 32, device=device), torch.randn(1, 96 * 96, 32, device=device)
    points = torch.rand(1, 9, 1, 2, device=device)
    expected = module(query, points, flat, shapes)
    with torch.autocast(device.type, dtype=torch.bfloat16):
        out = module(query, points, flat, shapes)
    assert out.dtype == torch.bfloat16
    close.forward(out, expected.detach(), tolerance=2e-2)


# ---- messages ----------------------------------------------------------------------------------------------


def sized(
    value=(2, 5440, 8, 4),
    shapes=((64, 64), (32, 32), (16, 16), (8, 8)),
    location=(2, 3, 8, 4, 4, 2),
    weight=None,
):
    weight = location[:-1] if weight is None else weight
    return torch.zeros(value), list(shapes), torch.zeros(location), torch.zeros(weight)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"value": (2, 5440, 256)}, "ms_deform_attn: value must have shape (N, S, M, D), got (2, 5440, 256)"),
        (
            {"shapes": ((64, 64), (32, 32)), "location": (2, 3, 8, 2, 4, 2)},
            "ms_deform_attn: spatial_shapes [(64, 64), (32, 32)] cover 5120 positions but value has S=5440",
        ),
        (
            {"location": (2, 300, 7, 4, 4, 2), "weight": (2, 300, 8, 4, 4)},
            (
                "ms_deform_attn: sampling_locations must have shape (N, Q, M, L, P, 2) with N=2, M=8, L=4, "
                "got (2, 300, 7, 4, 4, 2)"
            ),
        ),
        (
            {"location": (2, 300, 8, 4, 4, 2), "weight": (2, 300, 8, 4, 3)},
            "ms_deform_attn: attention_weights must have shape (2, 300, 8, 4, 4), got (2, 300, 8, 4, 3)",
        ),
        (
            {"shapes": ((64, 64), (32, 32), (16, 16))},
            (
                "ms_deform_attn: spatial_shapes must hold (H, W) of L=4 levels, got [(64, 64), (32, 32), "
                "(16, 16)]"
            ),
        ),
    ],
)
def test_wrong_shapes(change, message):
    with pytest.raises(ValueError, match=exactly(message)):
        ms_deform_attn(*sized(**change))


def test_wrong_dtypes_and_devices():
    value, shapes, location, weight = sized()
    with pytest.raises(
        TypeError,
        match=exactly(
            "ms_deform_attn: unsupported dtype torch.int32 for value; use float32, float64, "
            "float16 or bfloat16"
        ),
    ):
        ms_deform_attn(value.int(), shapes, location, weight)
    with pytest.raises(TypeError, match=r"attention_weights must be torch.float32"):
        ms_deform_attn(value, shapes, location, weight.half())
    with pytest.raises(TypeError, match="convert them to float32"):
        ms_deform_attn(value, shapes, location.double(), weight)
    with pytest.raises(
        ValueError, match=exactly("ms_deform_attn: value is on meta but attention_weights is on cpu")
    ):
        ms_deform_attn(value.to("meta"), shapes, location.to("meta"), weight)
    with pytest.raises(ValueError, match=r"level_start_index must be \[0, 4096, 5120, 5376\]"):
        ms_deform_attn(value, shapes, location, weight, level_start_index=torch.tensor([0, 1, 2, 3]))
    with pytest.raises(ValueError, match="must not be negative"):
        ms_deform_attn(value, [(-64, -64), *shapes[1:]], location, weight)


def test_half_locations_are_converted_with_a_warning(device):
    import vlp_ops.deformable

    vlp_ops.deformable._warn_half_locations.cache_clear()
    value, location, weight = arguments(torch.bfloat16, device=device)
    with pytest.warns(UserWarning, match="keep them float32"):
        call(value, SHAPES, location.detach().bfloat16(), weight)


def test_module_refuses_other_reference_points():
    module = MSDeformAttn(16, 1, 2, 2)
    with pytest.raises(ValueError, match=r"must end in 2 or 4 numbers, got shape \(1, 3, 1, 3\)"):
        module(torch.zeros(1, 3, 16), torch.zeros(1, 3, 1, 3), torch.zeros(1, 4, 16), [(2, 2)])
    with pytest.raises(ValueError, match="must be a multiple of n_heads=3"):
        MSDeformAttn(16, 1, 3)


def test_initial_offsets():
    module = MSDeformAttn(16, 2, 4, 3)
    bias = module.sampling_offsets.bias.view(4, 2, 3, 2)
    expected = torch.tensor([[1.0, 0.0], [0.0, 1.0], [-1.0, 0.0], [0.0, -1.0]])
    for point in range(3):
        torch.testing.assert_close(bias[:, 1, point], expected * (point + 1), atol=1e-6, rtol=0)
    assert (module.sampling_offsets.weight == 0).all() and (module.attention_weights.weight == 0).all()
