"""Names of DeiT checkpoints, which are timm's ViT and X-VLM's `vision_encoder.`."""

from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from vlp_core.vision.vit import VisionTransformer
from vlp_core.weights.adapter import Adapter, Rename
from vlp_core.weights.loading import LoadReport, load


def deit_adapter(*, source_prefix: str = "", prefix: str = "") -> Adapter:
    """Layout of deit_base_patch16_224, of timm's `vit_*`, and of X-VLM."""
    return Adapter(
        (
            Rename("cls_token", "class_token", leading=2),
            Rename("pos_embed", "positions", leading=1),
            Rename("patch_embed.proj.{p}", "patch.{p}"),
            Rename("blocks.{i}.norm1.{p}", "blocks.{i}.attention_norm.{p}"),
            Rename("blocks.{i}.attn.qkv.{p}", "blocks.{i}.attention.qkv.{p}"),
            Rename("blocks.{i}.attn.proj.{p}", "blocks.{i}.attention.out.{p}"),
            Rename("blocks.{i}.norm2.{p}", "blocks.{i}.mlp_norm.{p}"),
            Rename("blocks.{i}.mlp.fc1.{p}", "blocks.{i}.mlp.up.{p}"),
            Rename("blocks.{i}.mlp.fc2.{p}", "blocks.{i}.mlp.down.{p}"),
            Rename("norm.{p}", "norm.{p}"),
        )
    ).prefixed(source=source_prefix, ours=prefix)


def load_deit(model: VisionTransformer, state: Mapping[str, Tensor] | str | Path) -> LoadReport:
    """Fill the encoder from a DeiT or timm ViT file; the classifier (`head`) is left out.

    Raises `CheckpointError` as `vlp_core.weights.load` does. Positions for another grid are resized.
    """
    return load(model, state, deit_adapter(), allow_unexpected=("head",))
