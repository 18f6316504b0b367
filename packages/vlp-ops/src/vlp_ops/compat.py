"""Drop-in replacements for code that calls the published deformable-attention kernels."""

from types import MethodType
from typing import Any

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
        """As `ms_deform_attn`: (N, Q, M*D). im2col_step splits the batch in the published kernels; it never changes a result."""
        del im2col_step
        return ms_deform_attn(
            value,
            value_spatial_shapes,
            sampling_locations,
            attention_weights,
            level_start_index=value_level_start_index,
        )


def _transformers_forward(
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


def patch_transformers(model: Any) -> int:
    """Makes every `MultiScaleDeformableAttention` inside a transformers model call `ms_deform_attn`; returns how many there were.

    Works for Deformable DETR, Grounding DINO, RT-DETR, OmDet-Turbo and others that hold the module; Mask2Former and OneFormer of transformers
    do not (they call a function). ValueError when the model has none, because then nothing would have changed.
    """
    found = [part for part in model.modules() if type(part).__name__ == "MultiScaleDeformableAttention"]
    if not found:
        raise ValueError(
            f"patch_transformers: {type(model).__name__} has no MultiScaleDeformableAttention module"
        )
    for part in found:
        part.forward = MethodType(_transformers_forward, part)
    return len(found)
