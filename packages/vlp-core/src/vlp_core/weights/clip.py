"""Names of CLIP's vision tower in Hugging Face's layout."""

from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from vlp_core.vision.clip import ClipVisionTransformer
from vlp_core.weights.adapter import Adapter, Drop, Fuse, Rename, Rule
from vlp_core.weights.files import read
from vlp_core.weights.loading import LoadReport, load

BLOCK_RULES: tuple[Rule, ...] = (
    # The source's spelling.
    Rename("pre_layrnorm.{p}", "pre_norm.{p}"),
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
"""Names of the blocks and the norms around them; layouts differ in those of the embedding."""


def hf_clip_adapter(*, source_prefix: str = "", prefix: str = "") -> Adapter:
    """Hugging Face's layout; `source_prefix` is "vision_model." in files of a whole CLIP and of older
    versions."""
    rules = (
        Rename("embeddings.class_embedding", "class_token"),
        Rename("embeddings.patch_embedding.weight", "patch.weight"),
        Rename("embeddings.position_embedding.weight", "positions"),
        Drop("embeddings.position_ids"),  # older versions stored this buffer
    )
    return Adapter((*rules, *BLOCK_RULES)).prefixed(source=source_prefix, ours=prefix)


def load_clip(model: ClipVisionTransformer, state: Mapping[str, Tensor] | str | Path) -> LoadReport:
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
