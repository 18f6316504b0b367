"""Official X-VLM checkpoints of all stages, in and out.

Seven layouts exist, one for each stage of training, told apart by their names. `FILES` reads and writes them:
`FILES.load` fills a model from a file of its own stage; `FILES.start` starts it from an earlier one, as the
functions `load_pretrained` of the reference do; `FILES.write` makes an official file.

Source: arXiv 2111.08276; X-VLM `models/model_*.py`.
"""

import math
from collections.abc import Mapping
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn

from vlp_core.models.fusion.captioning import CaptionModel
from vlp_core.models.fusion.nlvr import NlvrModel
from vlp_core.models.fusion.official import (
    DECODER,
    EarlierNames,
    OfficialFiles,
    earlier_text,
    head_names,
    infer_shared,
    text_adapter,
)
from vlp_core.models.fusion.vqa import VqaModel
from vlp_core.models.xvlm.model import Xvlm
from vlp_core.vision import ClipVisionTransformer
from vlp_core.weights.adapter import Adapter, Buffer, CheckpointError, Drop, Rename
from vlp_core.weights.bert import language_model_adapter
from vlp_core.weights.clip import BLOCK_RULES
from vlp_core.weights.files import Checkpoint
from vlp_core.weights.shapes import count, heads_of, infer_vit
from vlp_core.weights.vision import VisionEncoder, vision_adapter

VISION = "vision_encoder."

# Stored by the source and computed here; also for another image size, where their number and shape differ.
_BUFFERS = Adapter(
    (
        Drop(f"{VISION}layers.{{i}}.blocks.{{j}}.attn.relative_position_index"),
        Drop(f"{VISION}layers.{{i}}.blocks.{{j}}.attn_mask"),
        Drop(f"{VISION}position_ids"),
    )
)

_HEADS = head_names(
    linear=("vision_proj", "text_proj", "ta_head"), stacked=("itm_head", "bbox_head", "cls_head")
)


def _stage(state: Mapping[str, Tensor], parts: set[str]) -> str | None:
    if "text_decoder" in parts:
        return "vqa" if "text_encoder" in parts else "captioning"
    if "cls_head" in parts:
        return "nlvr"
    if "ta_head" in parts:
        return "nlvr_domain"
    if {"text_encoder.bert", "text_encoder.roberta"} & parts:
        return "pretrain"
    if "itm_head" in parts:
        return "retrieval"
    return "boxes" if "bbox_head" in parts else None


def clip_adapter(*, tokens: int, source_prefix: str = "", prefix: str = "") -> Adapter:
    """X-VLM's names of CLIP's vision tower.

    Args:
        tokens: 1+L of the model, the length of the buffer `position_ids`.
        source_prefix, prefix: Before every name of the source and of ours.
    """
    rules = (
        Rename("class_embedding", "class_token"),
        Rename("patch_embed.weight", "patch.weight"),
        Rename("pos_embed.weight", "positions"),
        Buffer("position_ids", partial(_position_ids, tokens)),
    )
    return Adapter((*rules, *BLOCK_RULES)).prefixed(source=source_prefix, ours=prefix)


def _position_ids(tokens: int) -> Tensor:
    return torch.arange(tokens)[None]


def xvlm_vision_adapter(
    encoder: VisionEncoder, *, source_prefix: str = VISION, prefix: str = "vision."
) -> Adapter:
    """Between the names of an image encoder and those of X-VLM's files, which are its own for CLIP only."""
    if isinstance(encoder, ClipVisionTransformer):
        return clip_adapter(tokens=encoder.tokens, source_prefix=source_prefix, prefix=prefix)
    return vision_adapter(encoder, source_prefix=source_prefix, prefix=prefix)


def xvlm_adapter(model: nn.Module) -> Adapter:
    """Between a model's names and those of the official checkpoints of its stage, buffers and tied names
    included.

    Raises:
        TypeError: A model that X-VLM has no files of.
    """
    match model:
        case Xvlm() | NlvrModel() | VqaModel():
            text = text_adapter(model)
        case CaptionModel():
            text = language_model_adapter(model.text, source_prefix=DECODER, head_prefix="lm_head.")
        case _:
            raise TypeError(f"X-VLM has no layout for {type(model).__name__}")
    heads = Adapter(tuple(rule for name, rule in _HEADS.items() if hasattr(model, name)))
    return xvlm_vision_adapter(model.vision) + text + heads + _BUFFERS


def _earlier(model: nn.Module, found: str) -> EarlierNames:
    head, text = earlier_text(model.text, found)
    return EarlierNames(
        head, xvlm_vision_adapter(model.vision) + text + Adapter(tuple(_HEADS.values())) + _BUFFERS
    )


# Sizes
# ------------------------------------------------------------------------------------------------------------


def vision_arguments(
    kind: Literal["swin", "clip", "deit"], config: Mapping[str, Any], *, image_size: int
) -> dict[str, Any]:
    """The official config file of an image encoder (`configs/config_swinB_224.json` ...) as `vision` of
    `vlp_core.models.create`."""
    match kind:
        case "swin":
            return {
                "kind": "swin",
                "image_size": image_size,
                "window": config["window_size"],
                "width": config["embed_dim"],
                "depths": list(config["depths"]),
                "heads": list(config["num_heads"]),
            }
        case "clip":
            return {
                "kind": "clip",
                "image_size": image_size,
                "patch": config["patch_size"],
                "width": config["vision_width"],
                "depth": config["num_hidden_layers"],
                "heads": config["num_attention_heads"],
                "hidden": config["intermediate_size"],
                "activation": config["hidden_act"],
                "local_depth": config["local_attn_depth"],
            }
        case "deit":
            return {
                "kind": "vit",
                "image_size": image_size,
                "patch": config["patch_size"],
                "width": config["embed_dim"],
                "depth": config["depth"],
                "heads": config["num_heads"],
                "local_depth": config["local_attn_depth"],
            }
    raise ValueError(f"vision encoder {kind!r} is not one of X-VLM's; choose swin, clip or deit")


def text_arguments(config: Mapping[str, Any]) -> dict[str, Any]:
    """The official config file of a text encoder (`config_bert.json`, Hugging Face's field names) as `text`
    of `create`."""
    return {
        "kind": config["model_type"],
        "vocabulary": config["vocab_size"],
        "width": config["hidden_size"],
        "layers": config["num_hidden_layers"],
        "heads": config["num_attention_heads"],
        "hidden": config["intermediate_size"],
        "positions": config["max_position_embeddings"],
        "token_types": config["type_vocab_size"],
        "pad_id": config["pad_token_id"],
        "fusion_layer": config["fusion_layer"],
        "dropout": config["hidden_dropout_prob"],
        "attention_dropout": config["attention_probs_dropout_prob"],
        "norm_eps": config["layer_norm_eps"],
    }


def infer_arguments(checkpoint: Checkpoint, *, head_width: int = 64) -> dict[str, Any]:
    """Arguments of `vlp_core.models.create` for an official checkpoint, from the shapes of its tensors and
    the `image_res` beside them.

    `head_width`: channels per attention head, which no shape tells (except Swin's); 64 in every published
        X-VLM.

    Raises:
        CheckpointError: A width that is no multiple of `head_width`, or an image size that nothing tells.
    """
    state = checkpoint.state
    found = FILES.stage(state)
    config = checkpoint.extra.get("config")
    size = config.get("image_res") if isinstance(config, Mapping) else None
    arguments: dict[str, Any] = {
        "vision": _infer_vision(state, size, head_width),
        **infer_shared(state, found, head_width=head_width),
    }
    if found in ("pretrain", "retrieval", "boxes"):
        parts = {"contrast": "temp", "match": "itm_head.0.weight", "boxes": "bbox_head.0.weight"}
        arguments["heads"] = [head for head, key in parts.items() if key in state]
        if found == "pretrain":
            arguments["heads"].append("masked_language")
    return arguments


def _infer_vision(state: Mapping[str, Tensor], size: int | None, head_width: int) -> dict[str, Any]:
    if f"{VISION}cls_token" in state:
        return infer_vit(state, VISION, head_width)
    if f"{VISION}class_embedding" in state:
        return _infer_clip(state, head_width)
    table = "attn.relative_position_bias_table"
    stages = count(state, r"vision_encoder\.layers\.(\d+)\.blocks")
    first = state[f"{VISION}layers.0.blocks.0.{table}"]
    window = (math.isqrt(len(first)) + 1) // 2
    if size is None:
        mask = state.get(f"{VISION}layers.0.blocks.1.attn_mask")
        if mask is None:
            raise CheckpointError(
                "the checkpoint has neither `image_res` in its config nor Swin's masks, so the image size is "
                "unknown; give `arguments`"
            )
        size = 4 * window * math.isqrt(len(mask))
    width = len(state[f"{VISION}patch_embed.proj.weight"])
    return {
        "kind": "swin",
        "image_size": size,
        "window": window,
        "width": width,
        "depths": [count(state, rf"vision_encoder\.layers\.{i}\.blocks\.(\d+)\.") for i in range(stages)],
        "heads": [state[f"{VISION}layers.{i}.blocks.0.{table}"].shape[1] for i in range(stages)],
        "mlp_ratio": len(state[f"{VISION}layers.0.blocks.0.mlp.fc1.weight"]) / width,
    }


def _infer_clip(state: Mapping[str, Tensor], head_width: int) -> dict[str, Any]:
    """The image size is that of whole patches."""
    patch = state[f"{VISION}patch_embed.weight"]
    width, side = len(patch), patch.shape[-1]
    return {
        "kind": "clip",
        "image_size": side * math.isqrt(len(state[f"{VISION}pos_embed.weight"]) - 1),
        "patch": side,
        "width": width,
        "depth": count(state, r"vision_encoder\.encoder\.layers\.(\d+)\."),
        "heads": heads_of(width, head_width, "image encoder"),
        "hidden": len(state[f"{VISION}encoder.layers.0.mlp.fc1.weight"]),
    }


def _no_settings(arguments: Mapping[str, Any]) -> dict[str, Any]:
    return {}


FILES = OfficialFiles(
    family="xvlm",
    title="X-VLM",
    vision=VISION,
    stage_by=_stage,
    adapter=xvlm_adapter,
    earlier=_earlier,
    infer=infer_arguments,
    settings=_no_settings,
    computed=("relative_position_index", "attn_mask", "position_ids"),
)
