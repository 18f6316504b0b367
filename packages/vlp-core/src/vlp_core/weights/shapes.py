"""Sizes of encoders from the shapes of their tensors, for checkpoints that say no more."""

import math
import re
from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor

from vlp_core.weights.adapter import CheckpointError


def heads_of(width: int, head_width: int, what: str) -> int:
    """Number of attention heads of so many channels each.

    Raises:
        CheckpointError: `width` is no multiple.
    """
    if width % head_width:
        raise CheckpointError(
            f"the {what} is {width} wide, no multiple of {head_width}, so its number of attention heads cannot be told from the "
            "checkpoint; give `arguments`"
        )
    return width // head_width


def count(state: Iterable[str], pattern: str) -> int:
    """One more than the largest number that `pattern` captures in names; 0 where it captures none."""
    compiled = re.compile(pattern)
    return 1 + max((int(found[1]) for key in state if (found := compiled.match(key))), default=-1)


def infer_vit(state: Mapping[str, Tensor], base: str, head_width: int) -> dict[str, Any]:
    """`vision` of `vlp_core.models.create` for a ViT or CLIP-ViT below the prefix `base`; the image size is
    that of whole patches."""
    clip = f"{base}class_embedding" in state
    patch = state[f"{base}patch_embed.weight" if clip else f"{base}patch_embed.proj.weight"]
    table = state[f"{base}pos_embed.weight"] if clip else state[f"{base}pos_embed"][0]
    width = len(patch)
    layers = "encoder.layers" if clip else "blocks"
    hidden = len(state[f"{base}{layers}.0.mlp.fc1.weight"])
    depth = count(state, rf"{re.escape(base + layers)}\.(\d+)\.")
    return {
        "kind": "clip" if clip else "vit",
        "image_size": patch.shape[-1] * math.isqrt(len(table) - 1),
        "patch": patch.shape[-1],
        "width": width,
        "depth": depth,
        "heads": heads_of(width, head_width, "image encoder"),
        **({"hidden": hidden} if clip else {"mlp_ratio": hidden / width}),
    }


def infer_text(state: Mapping[str, Tensor], base: str, head_width: int) -> dict[str, Any]:
    """`text` of `vlp_core.models.create` for a BERT or RoBERTa with fusion layers below the prefix `base`."""
    kind = "roberta" if f"{base}lm_head.bias" in state else "bert"
    for inner in ("bert.", "roberta."):
        if f"{base}{inner}embeddings.word_embeddings.weight" in state:
            kind, base = inner.rstrip("."), base + inner
            break
    words = state[f"{base}embeddings.word_embeddings.weight"]
    types = len(state[f"{base}embeddings.token_type_embeddings.weight"])
    if types == 1:  # a retrieval file of RoBERTa does not say its kind; BERT has two token types
        kind = "roberta"
    prefix = re.escape(base)
    layers = count(state, rf"{prefix}encoder\.layer\.(\d+)\.")
    crossing = [
        i for i in range(layers) if f"{base}encoder.layer.{i}.crossattention.self.query.weight" in state
    ]
    return {
        "kind": kind,
        "vocabulary": len(words),
        "width": words.shape[1],
        "layers": layers,
        "heads": heads_of(words.shape[1], head_width, "text encoder"),
        "hidden": len(state[f"{base}encoder.layer.0.intermediate.dense.weight"]),
        "positions": len(state[f"{base}embeddings.position_embeddings.weight"]),
        "token_types": types,
        "pad_id": 1 if kind == "roberta" else 0,
        "fusion_layer": crossing[0],
        "norm_eps": 1e-5 if kind == "roberta" else 1e-12,
    }
