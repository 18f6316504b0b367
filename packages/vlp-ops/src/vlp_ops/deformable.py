"""Multi-scale deformable attention: the operator and the attention module around it.

Differs from the published kernels: works on any device and for any Q, M, D, L, P, batch; half and bfloat16
values are accumulated in float32; points outside every map have gradients that are exactly 0; an empty level
(H or W = 0) contributes nothing.
Source: Deformable DETR, arXiv 2010.04159; the module is the one of Mask2Former's pixel decoder and of ViSFT.

N batch   S positions of all levels   M heads   D width per head   Q queries   L levels   P points
"""

import math
import warnings
from collections.abc import Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from vlp_ops import _library
from vlp_ops._checks import accumulate_dtype, check_device, check_dim, check_float, check_shape

OP = "ms_deform_attn"


def ms_deform_attn(
    value: Tensor,
    spatial_shapes: Sequence[tuple[int, int]] | Tensor,
    sampling_locations: Tensor,
    attention_weights: Tensor,
    *,
    level_start_index: Tensor | None = None,
    softmax: bool = False,
    deterministic: bool | None = None,
) -> Tensor:
    """Weighted sum of bilinear samples from several maps, for each query and head: (N, Q, M*D).

    value: (N, S, M, D), float32, float64, float16 or bfloat16; the result has its dtype.
    spatial_shapes: (H, W) of each level, as a list or a tensor (L, 2). A list or CPU tensor is validated and
        costs no transfer; a tensor on the GPU is used there without waiting for it, and then S is not checked
        unless VLP_OPS_VALIDATE=1.
    sampling_locations: (N, Q, M, L, P, 2) as (x, y); 0 and 1 are the edges of the map. float32 (float64 with
        float64 values); half types are converted with a warning, because bfloat16 places a point on a
        128-pixel map only to half a pixel.
    attention_weights: (N, Q, M, L, P) in the dtype of value or float32, used as given.
    level_start_index: (L,) first position of each level in S; needed by reference code only, it follows from
        the shapes.
    softmax: attention_weights are logits, and the softmax over all L*P is taken here.
    deterministic: the gradient of value does not depend on the order of threads. None: what
        torch.are_deterministic_algorithms_enabled() says.
    Raises ValueError for shapes and devices, TypeError for dtypes. Once differentiable;
    `reference.ms_deform_attn` is so more often.
    """
    sampling_locations, attention_weights = _check_tensors(value, sampling_locations, attention_weights)
    if deterministic is None:
        deterministic = torch.are_deterministic_algorithms_enabled()
    _library.note_backend(value)
    on_host = not isinstance(spatial_shapes, Tensor) or (
        spatial_shapes.device.type == "cpu"
        and not torch.compiler.is_compiling()
        and not _library.is_fake(spatial_shapes)
    )
    if on_host or _library.validates(value):
        shapes = _host_shapes(value, spatial_shapes, sampling_locations, level_start_index)
        if on_host:
            return torch.ops.vlp_ops.ms_deform_attn(
                value, shapes, sampling_locations, attention_weights, softmax, deterministic
            )
    assert isinstance(spatial_shapes, Tensor), "shapes that are no tensor were handled on the host"
    check_shape(OP, "spatial_shapes", spatial_shapes, (sampling_locations.shape[3], 2))
    spatial_shapes = spatial_shapes.to(value.device, torch.int64)
    if level_start_index is None:
        areas = spatial_shapes.prod(1)
        level_start_index = areas.cumsum(0) - areas
    check_shape(OP, "level_start_index", level_start_index, (sampling_locations.shape[3],))
    level_start_index = level_start_index.to(value.device, torch.int64)
    return torch.ops.vlp_ops.ms_deform_attn.tensor(
        value,
        spatial_shapes,
        level_start_index,
        sampling_locations,
        attention_weights,
        softmax,
        deterministic,
    )


def _check_tensors(value: Tensor, locations: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """Shapes, devices and dtypes; returns locations and weights in a dtype the kernels take."""
    check_dim(OP, "value", value, "N, S, M, D")
    check_float(OP, "value", value)
    batch, _, heads, _ = value.shape
    levels = weights.shape[3] if weights.dim() == 5 else locations.shape[3] if locations.dim() == 6 else None
    if locations.dim() != 6 or tuple(locations.shape[i] for i in (0, 2, 3, 5)) != (batch, heads, levels, 2):
        expected = f"N={batch}, M={heads}" + (f", L={levels}" if levels is not None else "")
        raise ValueError(
            f"{OP}: sampling_locations must have shape (N, Q, M, L, P, 2) with {expected}, "
            f"got {tuple(locations.shape)}"
        )
    check_shape(OP, "attention_weights", weights, tuple(locations.shape[:5]))
    check_device(OP, "value", value, sampling_locations=locations, attention_weights=weights)
    check_float(OP, "sampling_locations", locations)
    check_float(OP, "attention_weights", weights)
    accumulate = accumulate_dtype(value.dtype)
    if locations.dtype in (torch.float16, torch.bfloat16) and not torch.is_autocast_enabled(
        value.device.type
    ):
        _warn_half_locations()
    if locations.dtype == torch.float64 and accumulate != torch.float64:
        raise TypeError(
            f"{OP}: sampling_locations are torch.float64 but value is {value.dtype}; convert them to float32"
        )
    if weights.dtype not in (value.dtype, accumulate):
        if not torch.is_autocast_enabled(value.device.type):
            raise TypeError(
                f"{OP}: attention_weights must be {value.dtype} or {accumulate}, got {weights.dtype}"
            )
        weights = weights.to(accumulate)
    return locations.to(accumulate), weights


@cache
def _warn_half_locations() -> None:
    if not torch.compiler.is_compiling():
        warnings.warn(
            (
                f"{OP}: sampling_locations in a half type place points only to a fraction of a pixel; "
                "keep them float32"
            ),
            stacklevel=5,
        )


def _host_shapes(
    value: Tensor, shapes: Sequence[tuple[int, int]] | Tensor, locations: Tensor, starts: Tensor | None
) -> list[int]:
    """Checked shapes as the flat list H0, W0, H1, ..."""
    pairs = shapes.tolist() if isinstance(shapes, Tensor) else [tuple(shape) for shape in shapes]
    levels = locations.shape[3]
    if len(pairs) != levels or any(len(pair) != 2 for pair in pairs):
        raise ValueError(f"{OP}: spatial_shapes must hold (H, W) of L={levels} levels, got {pairs}")
    pairs = [(height, width) for height, width in pairs]
    if any(height < 0 or width < 0 for height, width in pairs):
        raise ValueError(f"{OP}: spatial_shapes must not be negative, got {pairs}")
    first, total = [], 0
    for height, width in pairs:
        first.append(total)
        total = total + height * width
    if total != value.shape[1]:
        raise ValueError(
            f"{OP}: spatial_shapes {pairs} cover {total} positions but value has S={value.shape[1]}"
        )
    if starts is not None and not torch.compiler.is_compiling() and not _library.is_fake(starts):
        readable = starts.device.type == "cpu" or _library.validates(value)
        if readable and starts.tolist() != first:
            raise ValueError(
                f"{OP}: level_start_index must be {first} for spatial_shapes {pairs}, got {starts.tolist()}"
            )
    return [size for pair in pairs for size in pair]


# ---- PyTorch implementation: grid_sample per level, 2-3 times faster than gathering corners
# --------------------------------------


def _pairs(shapes: Sequence[int]) -> list[tuple[int, int, int]]:
    """(first position, H, W) of each level."""
    result, start = [], 0
    for height, width in zip(shapes[::2], shapes[1::2], strict=True):
        result.append((start, height, width))
        start += height * width
    return result


def _map(value: Tensor, start: int, height: int, width: int) -> Tensor:
    batch, _, heads, channels = value.shape
    level = value[:, start : start + height * width].permute(0, 2, 3, 1)
    return level.reshape(batch * heads, channels, height, width)


def _grid(location: Tensor, height: int, width: int) -> tuple[Tensor, Tensor]:
    """Grid for grid_sample (N*M, Q, P, 2) and which points touch the map.

    Points outside, NaN among them, are moved to a place that is outside for every size: an unbounded
    coordinate must never be converted to an integer.
    """
    location = location.transpose(1, 2).flatten(0, 1)
    pixel = location * location.new_tensor([width, height]) - 0.5
    inside = ((pixel > -1) & (pixel < pixel.new_tensor([width, height]))).all(-1, keepdim=True)
    return torch.where(inside, 2 * location - 1, -3.0), inside


def _levels(
    value: Tensor, levels: Sequence[tuple[int, int, int]], locations: Tensor, weights: Tensor, softmax: bool
) -> tuple[Tensor, Tensor, list[tuple[int, int, int, int]]]:
    """Value and weights in the accumulation dtype, and the levels that hold at least one position, with their
    number."""
    accumulate = accumulate_dtype(value.dtype)
    weights = weights.to(accumulate)
    if softmax:
        weights = weights.flatten(-2).softmax(-1).view(weights.shape)
    some = [
        (i, *level) for i, level in enumerate(levels) if level[1] * level[2] > 0 and locations.numel() > 0
    ]
    return value.to(accumulate), weights, some if value.numel() > 0 else []


def _forward(
    value: Tensor,
    levels: Sequence[tuple[int, int, int]],
    locations: Tensor,
    weights: Tensor,
    softmax: bool,
) -> Tensor:
    batch, _, heads, channels = value.shape
    queries = locations.shape[1]
    dtype = value.dtype
    value, weights, some = _levels(value, levels, locations, weights, softmax)
    total = value.new_zeros(batch * heads, channels, queries)
    for number, start, height, width in some:
        grid, _ = _grid(locations[:, :, :, number], height, width)
        sample = torch.grid_sampler_2d(_map(value, start, height, width), grid, 0, 0, False)
        weight = weights[:, :, :, number].transpose(1, 2).reshape(batch * heads, 1, queries, -1)
        total += sample.mul_(weight).sum(-1)
    total = total.view(batch, heads, channels, queries).permute(0, 3, 1, 2)
    return total.reshape(batch, queries, heads * channels).to(dtype).contiguous()


def _backward(
    grad: Tensor,
    value: Tensor,
    levels: Sequence[tuple[int, int, int]],
    locations: Tensor,
    weights: Tensor,
    softmax: bool,
    deterministic: bool,
    mask: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    if deterministic and value.is_cuda and mask[0]:
        raise RuntimeError(
            f"{OP}_backward does not have a deterministic implementation without the CUDA kernels of "
            "vlp_ops, but "
            "deterministic=True or torch.use_deterministic_algorithms(True) was asked for"
        )
    batch, _, heads, channels = value.shape
    queries = locations.shape[1]
    source, source_weights = value, weights
    value, weights, some = _levels(value, levels, locations, weights, softmax)
    grad_value = torch.zeros_like(value, memory_format=torch.contiguous_format)
    grad_locations = torch.zeros_like(locations, memory_format=torch.contiguous_format)
    grad_weights = torch.zeros_like(weights, memory_format=torch.contiguous_format)
    grad = grad.to(value.dtype).view(batch, queries, heads, channels).permute(0, 2, 3, 1)
    grad = grad.reshape(batch * heads, channels, queries, 1)
    for number, start, height, width in some:
        grid, inside = _grid(locations[:, :, :, number], height, width)
        level = _map(value, start, height, width)
        points = grid.shape[2]
        if mask[2]:
            sample = torch.grid_sampler_2d(level, grid, 0, 0, False)
            grad_weights[:, :, :, number] = (
                (sample * grad).sum(1).view(batch, heads, queries, points).transpose(1, 2)
            )
        if mask[0] or mask[1]:
            weight = weights[:, :, :, number].transpose(1, 2).reshape(batch * heads, 1, queries, points)
            grad_level, grad_grid = torch.ops.aten.grid_sampler_2d_backward(
                grad * weight, level, grid, 0, 0, False, [mask[0], True]
            )
            # The grid is 2 * location - 1.
            grad_grid = torch.where(inside, 2 * grad_grid, 0.0).view(batch, heads, queries, points, 2)
            grad_locations[:, :, :, number] = grad_grid.transpose(1, 2)
            if mask[0]:
                grad_level = grad_level.view(batch, heads, channels, height * width).permute(0, 3, 1, 2)
                grad_value[:, start : start + height * width] = grad_level
    if softmax:
        grad_weights = weights * (grad_weights - (weights * grad_weights).sum((-2, -1), keepdim=True))
    return (
        grad_value.to(source.dtype) if mask[0] else source.new_empty(0),
        grad_locations if mask[1] else locations.new_empty(0),
        grad_weights.to(source_weights.dtype) if mask[2] else source_weights.new_empty(0),
    )


def _device_levels(spatial_shapes: Tensor, starts: Tensor) -> list[tuple[int, int, int]]:
    """Reads the shapes on the host, which waits for the device: only the PyTorch implementation needs
    that."""
    pairs = zip(starts.tolist(), spatial_shapes.tolist(), strict=True)
    return [(start, height, width) for start, (height, width) in pairs]


def _forward_list(value, shapes, locations, weights, softmax=False, deterministic=False):
    return _forward(value, _pairs(shapes), locations, weights, softmax)


def _forward_tensor(value, spatial_shapes, starts, locations, weights, softmax=False, deterministic=False):
    return _forward(value, _device_levels(spatial_shapes, starts), locations, weights, softmax)


def _backward_list(grad, value, shapes, locations, weights, softmax, deterministic, mask):
    return _backward(grad, value, _pairs(shapes), locations, weights, softmax, deterministic, mask)


def _backward_tensor(grad, value, spatial_shapes, starts, locations, weights, softmax, deterministic, mask):
    levels = _device_levels(spatial_shapes, starts)
    return _backward(grad, value, levels, locations, weights, softmax, deterministic, mask)


# ---- registration ------------------------------------------------------------------------------------------


def _fake(value, shapes, locations, weights, softmax=False, deterministic=False):
    return value.new_empty(value.shape[0], locations.shape[1], value.shape[2] * value.shape[3])


def _fake_tensor(value, spatial_shapes, starts, locations, weights, softmax=False, deterministic=False):
    return _fake(value, None, locations, weights)


def _fake_backward(grad, value, shapes, locations, weights, softmax, deterministic, mask):
    tensors = (value, locations, weights)
    return tuple(t.new_empty(t.shape if needed else (0,)) for t, needed in zip(tensors, mask, strict=True))


def _fake_backward_tensor(
    grad, value, spatial_shapes, starts, locations, weights, softmax, deterministic, mask
):
    return _fake_backward(grad, value, None, locations, weights, softmax, deterministic, mask)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    value, *shapes, locations, weights, softmax, deterministic = inputs
    ctx.flags = (softmax, deterministic)
    ctx.shapes = shapes if not isinstance(shapes[0], Tensor) else None
    ctx.save_for_backward(value, locations, weights, *(shapes if ctx.shapes is None else ()))


def _gradient(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    value, locations, weights, *shapes = ctx.saved_tensors
    skip = 1 if ctx.shapes is not None else 2
    # Arguments left at their defaults are missing from needs_input_grad, so it is read from the front.
    needs = [ctx.needs_input_grad[i] for i in (0, skip + 1, skip + 2)]
    operator = torch.ops.vlp_ops.ms_deform_attn_backward
    arguments = (locations, weights, *ctx.flags, needs)
    if ctx.shapes is not None:
        grads = operator(grad.contiguous(), value, *ctx.shapes, *arguments)
    else:
        grads = operator.tensor(grad.contiguous(), value, *shapes, *arguments)
    first, *rest = (grad if need else None for grad, need in zip(grads, needs, strict=True))
    return first, *[None] * skip, *rest, None, None


_library.register("ms_deform_attn", _forward_list, _fake, backward=_gradient, setup_context=_setup)
_library.register(
    "ms_deform_attn.tensor", _forward_tensor, _fake_tensor, backward=_gradient, setup_context=_setup
)
_library.register("ms_deform_attn_backward", _backward_list, _fake_backward)
_library.register("ms_deform_attn_backward.tensor", _backward_tensor, _fake_backward_tensor)


# ---- module ------------------------------------------------------------------------------------------------


class MSDeformAttn(nn.Module):
    """Multi-scale deformable attention with its projections; parameter names are those of published
    checkpoints.

    Parameters (d = d_model): sampling_offsets (M*L*P*2, d), attention_weights (M*L*P, d), value_proj (d, d),
    output_proj (d, d), each with bias. Initial values: offsets have weight 0 and a bias that points each head
    into another direction, point p at distance p+1; attention weights 0; value and output projections
    Xavier-uniform with bias 0. Source: arXiv 2010.04159, section 4.1 and appendix.
    """

    def __init__(self, d_model: int = 256, n_levels: int = 4, n_heads: int = 8, n_points: int = 4) -> None:
        super().__init__()
        if d_model % n_heads:
            raise ValueError(f"MSDeformAttn: d_model={d_model} must be a multiple of n_heads={n_heads}")
        self.n_levels, self.n_heads, self.n_points = n_levels, n_heads, n_points
        self.sampling_offsets = nn.Linear(d_model, n_heads * n_levels * n_points * 2)
        self.attention_weights = nn.Linear(d_model, n_heads * n_levels * n_points)
        self.value_proj = nn.Linear(d_model, d_model)
        self.output_proj = nn.Linear(d_model, d_model)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        angle = torch.arange(self.n_heads, dtype=torch.float32) * (2 * math.pi / self.n_heads)
        direction = torch.stack([angle.cos(), angle.sin()], -1)
        direction = direction / direction.abs().max(-1, keepdim=True).values
        distance = torch.arange(1, self.n_points + 1, dtype=torch.float32)
        bias = direction[:, None, None, :] * distance[:, None]
        with torch.no_grad():
            self.sampling_offsets.bias.copy_(bias.expand(-1, self.n_levels, -1, -1).flatten())
        nn.init.zeros_(self.sampling_offsets.weight)
        nn.init.zeros_(self.attention_weights.weight)
        nn.init.zeros_(self.attention_weights.bias)
        for projection in (self.value_proj, self.output_proj):
            nn.init.xavier_uniform_(projection.weight)
            nn.init.zeros_(projection.bias)

    def forward(
        self,
        query: Tensor,
        reference_points: Tensor,
        input_flatten: Tensor,
        input_spatial_shapes: Sequence[tuple[int, int]] | Tensor,
        input_level_start_index: Tensor | None = None,
        input_padding_mask: Tensor | None = None,
    ) -> Tensor:
        """Attends from each query to L*P points of each head around its reference point: (N, Q, d).

        query (N, Q, d); reference_points (N, Q, L, 2) as (x, y), or (N, Q, L, 4) as (x, y, w, h), in units of
        the map; input_flatten (N, S, d); input_spatial_shapes and input_level_start_index as in
        `ms_deform_attn`; input_padding_mask (N, S), True = not part of the image, its value is set to 0.
        Raises ValueError when the last axis of reference_points is neither 2 nor 4.
        """
        batch, queries, _ = query.shape
        value = self.value_proj(input_flatten)
        if input_padding_mask is not None:
            value = value.masked_fill(input_padding_mask[..., None], 0.0)
        value = value.view(batch, input_flatten.shape[1], self.n_heads, -1)
        shape = (batch, queries, self.n_heads, self.n_levels, self.n_points)
        # Positions stay float32 under autocast: bfloat16 cannot hold them.
        precise = accumulate_dtype(value.dtype)
        offsets = self.sampling_offsets(query).view(*shape, 2).to(precise)
        logits = self.attention_weights(query).view(shape)
        reference = reference_points[:, :, None, :, None, :].to(precise)
        if reference_points.shape[-1] == 2:
            sizes = torch.as_tensor(input_spatial_shapes, device=query.device)
            locations = reference + offsets / sizes.flip(-1).to(precise)[None, None, None, :, None, :]
        elif reference_points.shape[-1] == 4:
            locations = reference[..., :2] + offsets / self.n_points * reference[..., 2:] * 0.5
        else:
            raise ValueError(
                "MSDeformAttn: reference_points must end in 2 or 4 numbers, "
                f"got shape {tuple(reference_points.shape)}"
            )
        attended = ms_deform_attn(
            value,
            input_spatial_shapes,
            locations,
            logits,
            level_start_index=input_level_start_index,
            softmax=True,
        )
        return self.output_proj(attended)
