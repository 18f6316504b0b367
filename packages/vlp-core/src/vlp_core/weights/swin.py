"""Names of Swin checkpoints: Microsoft's files (and X-VLM's `vision_encoder.`), and timm's layout since
0.9."""

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from vlp_core.vision.swin import PATCH, SwinTransformer, shift_mask
from vlp_core.weights.adapter import Adapter, Buffer, Drop, Rename, Rule
from vlp_core.weights.files import read
from vlp_core.weights.loading import LoadReport, load

_SHARED: tuple[Rule, ...] = (
    Rename("patch_embed.proj.{p}", "patch.{p}"),
    Rename("patch_embed.norm.{p}", "patch_norm.{p}"),
    Rename("layers.{i}.blocks.{j}.norm1.{p}", "stages.{i}.blocks.{j}.attention_norm.{p}"),
    Rename(
        "layers.{i}.blocks.{j}.attn.relative_position_bias_table",
        "stages.{i}.blocks.{j}.attention.bias_table",
    ),
    Rename("layers.{i}.blocks.{j}.attn.qkv.{p}", "stages.{i}.blocks.{j}.attention.qkv.{p}"),
    Rename("layers.{i}.blocks.{j}.attn.proj.{p}", "stages.{i}.blocks.{j}.attention.out.{p}"),
    Rename("layers.{i}.blocks.{j}.norm2.{p}", "stages.{i}.blocks.{j}.mlp_norm.{p}"),
    Rename("layers.{i}.blocks.{j}.mlp.fc1.{p}", "stages.{i}.blocks.{j}.mlp.up.{p}"),
    Rename("layers.{i}.blocks.{j}.mlp.fc2.{p}", "stages.{i}.blocks.{j}.mlp.down.{p}"),
    Rename("norm.{p}", "norm.{p}"),
)


def swin_adapter(
    *, depths: Sequence[int], window: int, image_size: int, source_prefix: str = "", prefix: str = ""
) -> Adapter:
    """Microsoft's layout, e.g. swin_base_patch4_window7_224_22k.pth, which X-VLM keeps under
    "vision_encoder.".

    `depths`, `window`, `image_size`: of the model; they decide which buffers (relative_position_index,
    attn_mask) are written and of what size. `source_prefix`, `prefix`: before every name of the source and of
    ours.
    """
    rules = [
        Rename("layers.{i}.downsample.norm.{p}", "stages.{i}.merge.norm.{p}"),
        Rename("layers.{i}.downsample.reduction.{p}", "stages.{i}.merge.linear.{p}"),
    ]
    buffers: list[Rule] = []
    for i, depth in enumerate(depths):
        resolution = image_size // PATCH // 2**i
        side = min(window, resolution)
        for j in range(depth):
            block = f"layers.{i}.blocks.{j}"
            buffers.append(
                Buffer(f"{block}.attn.relative_position_index", partial(relative_position_index, side))
            )
            if j % 2 and side < resolution:
                buffers.append(Buffer(f"{block}.attn_mask", partial(shift_mask, resolution, side, side // 2)))
    return Adapter((*_SHARED, *rules, *buffers)).prefixed(source=source_prefix, ours=prefix)


def timm_swin_adapter(*, stages: int, source_prefix: str = "", prefix: str = "") -> Adapter:
    """timm's layout since 0.9: merging stands at the start of the next stage, and buffers are not stored."""
    merging = [
        rule
        for i in range(stages - 1)
        for rule in (
            Rename(f"layers.{i + 1}.downsample.norm.{{p}}", f"stages.{i}.merge.norm.{{p}}"),
            Rename(f"layers.{i + 1}.downsample.reduction.{{p}}", f"stages.{i}.merge.linear.{{p}}"),
        )
    ]
    stored_by_first_releases = (
        Drop("layers.{i}.blocks.{j}.attn.relative_position_index"),
        Drop("layers.{i}.blocks.{j}.attn_mask"),
    )
    return Adapter((*_SHARED, *merging, *stored_by_first_releases)).prefixed(
        source=source_prefix, ours=prefix
    )


def load_swin(model: SwinTransformer, state: Mapping[str, Tensor] | str | Path) -> LoadReport:
    """Fill a Swin from Microsoft's or timm's layout, told apart by the place of merging; the classifier
    (`head`) is left out.

    Raises `CheckpointError` as `vlp_core.weights.load` does. Tables for another window are resized.
    """
    tensors = read(state) if isinstance(state, str | Path) else state
    stages = len(model.depths)
    if any(key.startswith(f"layers.{stages - 1}.downsample.") for key in tensors):
        adapter = timm_swin_adapter(stages=stages)
    else:
        adapter = swin_adapter(depths=model.depths, window=model.window, image_size=model.image_size)
    name = str(state) if isinstance(state, str | Path) else None
    return load(model, tensors, adapter, allow_unexpected=("head",), name=name)


def relative_position_index(window: int) -> Tensor:
    """[T, T] int64, T = window^2: row of the bias table for every query and key of a window."""
    side = 2 * window - 1
    steps = torch.arange(window)
    place = (steps[:, None] * side + steps).flatten()
    return place[:, None] - place[None, :] + (window - 1) * (side + 1)
