"""Names of CLIP's vision tower: Hugging Face's layout, and X-VLM's (`vision_encoder.`)."""

from collections.abc import Mapping
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from vlp_core.vision.clip import ClipVisionTransformer
from vlp_core.weights.adapter import Adapter, Buffer, Drop, Fuse, Rename, Rule
from vlp_core.weights.files import read
from vlp_core.weights.loading import Loaded, load

_SHARED: tuple[Rule, ...] = (
    Rename("pre_layrnorm.{p}", "pre_norm.{p}"),  # the source's spelling
    Rename("encoder.layers.{i}.layer_norm1.{p}", "blocks.{i}.attention_norm.{p}"),
    Fuse(
        (
            "encoder.layers.{i}.self_attn.q_proj.{p}",
            "encoder.layers.{i}.self_attn.k_proj.{p}",
            "encoder.layers.{i}.self_attn.v_proj.{p}",
        ),
        "blocks.{i}.attention.qkv.{p}",
    ),
    Rename("encoder.layers.{i}.self_attn.out_proj.{p}", "blocks.{i}.attention.out.{p}"),
    Rename("encoder.layers.{i}.layer_norm2.{p}", "blocks.{i}.mlp_norm.{p}"),
    Rename("encoder.layers.{i}.mlp.fc1.{p}", "blocks.{i}.mlp.up.{p}"),
    Rename("encoder.layers.{i}.mlp.fc2.{p}", "blocks.{i}.mlp.down.{p}"),
    Rename("post_layernorm.{p}", "norm.{p}"),
)


def clip_adapter(*, tokens: int, source_prefix: str = "", prefix: str = "") -> Adapter:
    """X-VLM's layout. `tokens`: 1+L of the model, the length of the buffer `position_ids`."""
    rules = (
        Rename("class_embedding", "class_token"),
        Rename("patch_embed.weight", "patch.weight"),
        Rename("pos_embed.weight", "positions"),
        Buffer("position_ids", partial(_position_ids, tokens)),
    )
    return Adapter((*rules, *_SHARED)).prefixed(source=source_prefix, ours=prefix)


def hf_clip_adapter(*, source_prefix: str = "", prefix: str = "") -> Adapter:
    """Hugging Face's layout; `source_prefix` is "vision_model." in files of a whole CLIP and of older
    versions."""
    rules = (
        Rename("embeddings.class_embedding", "class_token"),
        Rename("embeddings.patch_embedding.weight", "patch.weight"),
        Rename("embeddings.position_embedding.weight", "positions"),
        Drop("embeddings.position_ids"),  # older versions stored this buffer
    )
    return Adapter((*rules, *_SHARED)).prefixed(source=source_prefix, ours=prefix)


def load_clip(model: ClipVisionTransformer, state: Mapping[str, Tensor] | str | Path) -> Loaded:
    """Fill the encoder from a Hugging Face file (whole CLIP or vision tower); text tower and projections are
    left out.

    Raises `CheckpointError` as `vlp_core.weights.load` does. Positions for another grid are resized.
    """
    tensors = read(state) if isinstance(state, str | Path) else state
    whole = any(key.startswith("vision_model.") for key in tensors)
    rest = ("text_model", "text_projection", "visual_projection", "logit_scale") if whole else ()
    name = str(state) if isinstance(state, str | Path) else None
    adapter = hf_clip_adapter(source_prefix="vision_model." if whole else "")
    return load(model, tensors, adapter, allow_unexpected=rest, name=name)


def _position_ids(tokens: int) -> Tensor:
    return torch.arange(tokens)[None]
