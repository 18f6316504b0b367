"""Drop-in replacements for code that calls the published deformable-attention kernels."""

from collections.abc import Callable, Sequence
from functools import cache
from types import FunctionType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vlp_ops.deformable import ms_deform_attn


class MSDeformAttnFunction:
    """Stands in for the autograd function of the same name in Deformable-DETR, Mask2Former and ViSFT code."""

    @staticmethod
    def apply(
        value: Tensor,
        value_spatial_shapes: Tensor,
        value_level_start_index: Tensor,
        sampling_locations: Tensor,
        attention_weights: Tensor,
        im2col_step: int,
    ) -> Tensor:
        """As `ms_deform_attn`: (N, Q, M*D). im2col_step splits the batch in the published kernels; it never
        changes a result."""
        del im2col_step
        return ms_deform_attn(
            value,
            value_spatial_shapes,
            sampling_locations,
            attention_weights,
            level_start_index=value_level_start_index,
        )


def patch_transformers(model: nn.Module) -> int:
    """Makes every multi-scale deformable attention inside a transformers model call `ms_deform_attn`; returns
    how many there were.

    Three forms occur in transformers 5, and each is recognised by what it calls, not by the name of the
    model: a module `MultiScaleDeformableAttention` (Deformable DETR, Grounding DINO, RT-DETR, OmDet-Turbo,
    LW-DETR, ...); a call of the function `multi_scale_deformable_attention` (Mask2Former, OneFormer);
    a call of `multi_scale_deformable_attention_v2` (RT-DETR v2), or an attribute that holds it (D-FINE,
    DEIMv2), with its own number of points per level. Its "discrete" method rounds locations to whole pixels,
    which is another operator: such modules keep their own code. Only modules of this model change: each gets
    a class of its own below the one that it had, so other models stay as they are. Copies of the model, also
    those of `copy.deepcopy`, `pickle` and `torch.save`, are patched as it is. Patching twice changes nothing
    more. Raises ValueError when the model
    holds none of them, because then nothing would have changed.
    """
    count = sum(_patch(part) for part in model.modules())
    if not count:
        raise ValueError(
            f"patch_transformers: {type(model).__name__} has no multi-scale deformable attention: no module "
            f"MultiScaleDeformableAttention and none that calls {' or '.join(_FUNCTIONS)}"
        )
    return count


def _patch(part: nn.Module) -> bool:
    kind = _original(type(part))
    if kind.__name__ == "MultiScaleDeformableAttention":
        part.__class__ = _patched_class(kind, None)
        return True
    if getattr(part, "method", None) == "discrete" or getattr(part, "decoder_method", None) == "discrete":
        return False
    for name, replacement in _FUNCTIONS.items():
        held = [
            key
            for key, thing in vars(part).items()
            if thing is replacement or getattr(thing, "__name__", None) == name
        ]
        for key in held:
            setattr(part, key, replacement)
        if isinstance(kind.forward, FunctionType) and name in kind.forward.__code__.co_names:
            part.__class__ = _patched_class(kind, name)
            return True
        if held:
            return True
    return False


class _Patched:
    """Mixed into the class of a patched module."""

    kind: type[nn.Module]
    name: str | None

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        # The class exists in this process only: what is stored is how to make it.
        return _patched_module, (self.kind, self.name), self.__getstate__()


def _original(kind: type) -> type:
    return kind.kind if issubclass(kind, _Patched) else kind


@cache
def _patched_class(kind: type, name: str | None) -> type:
    """A class below `kind` whose forward pass calls the operator: name is the function of transformers that
    it called, None where the class itself is that function."""
    forward = _module_forward if name is None else _with_global(kind.forward, name, _FUNCTIONS[name])
    members = {"kind": kind, "name": name, "forward": forward, "__module__": kind.__module__}
    return type(kind.__name__, (_Patched, kind), members)


def _patched_module(kind: type[nn.Module], name: str | None) -> nn.Module:
    """One without contents, which `pickle` and `copy` fill."""
    made: Any = _patched_class(kind, name)
    return made.__new__(made)


def _with_global(function: FunctionType, name: str, thing: Any) -> FunctionType:
    """The same function with one global name bound to something else: its module, which other models share,
    stays as it is."""
    changed = FunctionType(
        function.__code__,
        {**function.__globals__, name: thing},
        function.__name__,
        function.__defaults__,
        function.__closure__,
    )
    changed.__kwdefaults__ = function.__kwdefaults__
    return changed


def _module_forward(
    module: nn.Module,
    value: Tensor,
    value_spatial_shapes: Tensor,
    value_spatial_shapes_list: list[tuple[int, int]],
    level_start_index: Tensor,
    sampling_locations: Tensor,
    attention_weights: Tensor,
    im2col_step: int,
) -> Tensor:
    del value_spatial_shapes, im2col_step
    return ms_deform_attn(
        value,
        value_spatial_shapes_list,
        sampling_locations,
        attention_weights,
        level_start_index=level_start_index,
    )


def _points_of_each_level(
    value: Tensor,
    value_spatial_shapes: Sequence[tuple[int, int]] | Tensor,
    sampling_locations: Tensor,
    attention_weights: Tensor,
    num_points_list: list[int],
    method: str = "default",
) -> Tensor:
    """locations (N, Q, M, sum of points, 2) and weights (N, Q, M, sum of points), level after level."""
    assert method == "default", "modules with the discrete method are left as they are"
    most = max(num_points_list)
    # A level with fewer points gets some far outside its map: they read nothing and no gradient reaches them.
    locations = [
        F.pad(level, (0, 0, 0, most - level.shape[3]), value=-3.0)
        for level in sampling_locations.split(num_points_list, 3)
    ]
    weights = [
        F.pad(level, (0, most - level.shape[3])) for level in attention_weights.split(num_points_list, 3)
    ]
    return ms_deform_attn(value, value_spatial_shapes, torch.stack(locations, 3), torch.stack(weights, 3))


# Functions of transformers and what takes their place.
_FUNCTIONS: dict[str, Callable[..., Tensor]] = {
    "multi_scale_deformable_attention": ms_deform_attn,
    "multi_scale_deformable_attention_v2": _points_of_each_level,
}
