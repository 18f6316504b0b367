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
            f"the {what} is {width} wide, no multiple of {head_width}, so its number of attention heads "
            "cannot be told from the checkpoint; give `arguments`"
        )
    return width // head_width


def count(state: Iterable[str], pattern: str) -> int:
    """One more than the largest number that `pattern` captures in names; 0 where it captures none."""
    compiled = re.compile(pattern)
    return 1 + max((int(found[1]) for key in state if (found := compiled.match(key))), default=-1)


def infer_vit(state: Mapping[str, Tensor], base: str, head_width: int) -> dict[str, Any]:
    """Arguments of a `VisionTransformer` from DeiT's names below the prefix `base`, with `kind`; the image
    size is that of whole patches.

    Raises:
        CheckpointError: See `heads_of`.
    """
    patch = state[f"{base}patch_embed.proj.weight"]
    width, side = len(patch), patch.shape[-1]
    return {
        "kind": "vit",
        "image_size": side * math.isqrt(state[f"{base}pos_embed"].shape[1] - 1),
        "patch": side,
        "width": width,
        "depth": count(state, rf"{re.escape(base)}blocks\.(\d+)\."),
        "heads": heads_of(width, head_width, "image encoder"),
        "mlp_ratio": len(state[f"{base}blocks.0.mlp.fc1.weight"]) / width,
    }


def infer_text(state: Mapping[str, Tensor], base: str, head_width: int) -> dict[str, Any]:
    """Arguments of a `Bert` with fusion layers from the names of BERT or RoBERTa below the prefix `base`.

    Raises:
        CheckpointError: See `heads_of`.
    """
    kind = "roberta" if f"{base}lm_head.bias" in state else "bert"
    for inner in ("bert.", "roberta."):
        if f"{base}{inner}embeddings.word_embeddings.weight" in state:
            kind, base = inner.rstrip("."), base + inner
            break
    words = state[f"{base}embeddings.word_embeddings.weight"]
    types = len(state[f"{base}embeddings.token_type_embeddings.weight"])
    # Some files of RoBERTa do not say their kind; BERT has two token types.
    if types == 1:
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
