"""Official X-VLM checkpoints of all tasks, in and out.

Seven layouts exist, one for each stage of training, told apart by their names (`layout`). `load` fills a
model from a checkpoint of its own stage; `load_pretrained` starts a model from an earlier stage, as the
functions of that name in the reference do (`vlp_core.models.fusion.stages`); `write` makes an official file.

Source: arXiv 2111.08276; X-VLM `models/model_*.py`.
"""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from torch import Tensor, nn

from vlp_core.models.fusion.captioning import CaptionModel
from vlp_core.models.fusion.nlvr import NlvrModel
from vlp_core.models.fusion.stages import STARTS, Stage, require_start, stage_of, start_official
from vlp_core.models.fusion.vqa import VqaModel
from vlp_core.models.xvlm.model import Xvlm
from vlp_core.weights import files, loading
from vlp_core.weights.adapter import Adapter, CheckpointError, Drop, Rename, Tied, groups
from vlp_core.weights.bert import encoder_adapter, head_adapter, language_model_adapter
from vlp_core.weights.files import Checkpoint
from vlp_core.weights.loading import Loaded
from vlp_core.weights.shapes import count, infer_text, infer_vit
from vlp_core.weights.vision import xvlm_vision_adapter

# Stored by the source and computed here; also for another image size, where their number and shape differ.
_BUFFERS = Adapter(
    (
        Drop("vision_encoder.layers.{i}.blocks.{j}.attn.relative_position_index"),
        Drop("vision_encoder.layers.{i}.blocks.{j}.attn_mask"),
        Drop("vision_encoder.position_ids"),
    )
)
_BUFFER_NAMES = ("relative_position_index", "attn_mask", "position_ids")

_HEADS = {
    "temperature": Rename("temp", "temperature"),
    **{name: Rename(f"{name}.{{p}}", f"{name}.{{p}}") for name in ("vision_proj", "text_proj", "ta_head")},
    **{
        name: Rename(f"{name}.{{i}}.{{p}}", f"{name}.{{i}}.{{p}}")
        for name in ("itm_head", "bbox_head", "cls_head")
    },
}


def recognises(state: Mapping[str, Tensor]) -> bool:
    """Whether names look like those of X-VLM, whatever the stage."""
    return any(name.startswith("vision_encoder.") for name in state)


def layout(state: Mapping[str, Tensor]) -> Stage:
    """Which stage of training an official checkpoint belongs to.

    Raises:
        CheckpointError: It is no X-VLM checkpoint.
    """
    has = {".".join(name.split(".")[:2]) for name in state} | {name.split(".")[0] for name in state}
    if recognises(state):
        if "text_decoder" in has:
            return "vqa" if "text_encoder" in has else "captioning"
        if "cls_head" in has:
            return "nlvr"
        if "ta_head" in has:
            return "nlvr_domain"
        if {"text_encoder.bert", "text_encoder.roberta"} & has:
            return "pretrain"
        if "itm_head" in has:
            return "retrieval"
        if "bbox_head" in has:
            return "boxes"
    raise CheckpointError(f"this is no X-VLM checkpoint; it holds {groups(state)}")


def xvlm_adapter(model: nn.Module) -> Adapter:
    """Between a model's names and those of the official checkpoints of its task, buffers and tied names
    included."""
    vision = xvlm_vision_adapter(model.vision, source_prefix="vision_encoder.", prefix="vision.")
    match model:
        case Xvlm() if "masked_language" in model.heads:
            text = language_model_adapter(model.text, source_prefix="text_encoder.")
        case Xvlm() | NlvrModel():
            text = encoder_adapter(model.text, source_prefix="text_encoder.", prefix="text.")
        case VqaModel():
            text = encoder_adapter(
                model.text, source_prefix="text_encoder.", prefix="text."
            ) + language_model_adapter(
                model.decoder, source_prefix="text_decoder.", prefix="decoder.", head_prefix="lm_head."
            )
        case CaptionModel():
            text = language_model_adapter(model.text, source_prefix="text_decoder.", head_prefix="lm_head.")
        case _:
            raise TypeError(f"X-VLM has no layout for {type(model).__name__}")
    heads = Adapter(tuple(rule for name, rule in _HEADS.items() if hasattr(model, name)))
    return vision + text + heads + _BUFFERS


def load(model: nn.Module, source: Mapping[str, Tensor] | str | Path) -> Loaded:
    """Fill a model from an official checkpoint of the same task; position tables for another image size are
    resized.

    Raises:
        CheckpointError: A checkpoint of another stage, with the way out; see also `vlp_core.weights.load`.
    """
    state, name = _open(source)
    found, wanted = layout(state), stage_of(model)
    if found != wanted:
        way = (
            "start training from it with vlp_core.models.start_from, then use the result"
            if found in STARTS[wanted]
            else "nothing can be converted from one to the other"
        )
        raise CheckpointError(
            f"{name} is a {found} checkpoint of X-VLM where a {wanted} one is expected; {way}"
        )
    return loading.load(model, state, xvlm_adapter(model), name=name)


def load_pretrained(
    model: nn.Module, source: Mapping[str, Tensor] | str | Path, *, name: str | None = None
) -> Loaded:
    """Start a task's model from an official checkpoint of the same or an earlier stage;
    `vlp_core.models.fusion.stages` says what becomes of what.

    `name`: what messages call the checkpoint; by default its path.

    Returns:
        What was loaded, what stays fresh (`missing`, our names), and what of the checkpoint is not used
        (`unexpected`, its names).

    Raises:
        CheckpointError: The task cannot start from this checkpoint, or names beyond the table's are missing
            or left over.
    """
    state, opened = _open(source)
    name = name or opened
    found, wanted = layout(state), stage_of(model)
    require_start(found, model, name)
    if found == wanted:
        return loading.load(model, state, xvlm_adapter(model), name=name)
    if found == "pretrain" and not any(key.startswith(f"text_encoder.{model.text.kind}.") for key in state):
        raise CheckpointError(
            f"{name} was not pre-trained with {model.text.kind}, the text encoder of this model"
        )
    head, body = _earlier_stage(model, found)
    return start_official(model, found, state, head, body, buffers=_BUFFER_NAMES, name=name)


def _earlier_stage(model: nn.Module, found: Stage) -> tuple[Adapter, Adapter]:
    """Names of the language head and of all else in a checkpoint of another stage, for encoders like those of
    `model`."""
    kind = model.text.kind
    if found == "pretrain":
        prefix = f"text_encoder.{kind}."
        text = encoder_adapter(model.text, source_prefix=prefix, prefix="text.")
        # Pre-training shares no projections, whatever the model does.
        text = Adapter(tuple(rule for rule in text.rules if not isinstance(rule, Tied)))
        head = head_adapter(kind, source_prefix="text_encoder.")
    else:
        text, head = encoder_adapter(model.text, source_prefix="text_encoder.", prefix="text."), Adapter(())
    vision = xvlm_vision_adapter(model.vision, source_prefix="vision_encoder.", prefix="vision.")
    return head, vision + text + Adapter(tuple(_HEADS.values())) + _BUFFERS


def write(path: str | Path, model: nn.Module) -> None:
    """Write a model under the official names of its task, buffers and tied names included; `.safetensors`, or
    {"model": ...} by torch."""
    files.write(path, xvlm_adapter(model).to_source(model.state_dict()))


def _open(source: Mapping[str, Tensor] | str | Path) -> tuple[Mapping[str, Tensor], str]:
    return (files.read(source), str(source)) if isinstance(source, str | Path) else (source, "the state dict")


# Sizes
# ------------------------------------------------------------------------------------------------------------------------


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
    found = layout(state)
    config = checkpoint.extra.get("config")
    size = config.get("image_res") if isinstance(config, Mapping) else None
    arguments: dict[str, Any] = {"vision": _infer_vision(state, size, head_width)}
    encoder = "text_decoder." if found == "captioning" else "text_encoder."
    arguments["text"] = infer_text(state, encoder, head_width)
    match found:
        case "vqa":
            arguments["decoder"] = infer_text(state, "text_decoder.", head_width)
        case "nlvr" | "nlvr_domain":
            arguments["stage"] = "fine_tune" if found == "nlvr" else "domain"
        case "pretrain" | "retrieval" | "boxes":
            parts = {"contrast": "temp", "match": "itm_head.0.weight", "boxes": "bbox_head.0.weight"}
            arguments["heads"] = [head for head, key in parts.items() if key in state]
            if found == "pretrain":
                arguments["heads"].append("masked_language")
    if "vision_proj.weight" in state:
        arguments["embed_width"] = len(state["vision_proj.weight"])
    return arguments


def _infer_vision(state: Mapping[str, Tensor], size: int | None, head_width: int) -> dict[str, Any]:
    base = "vision_encoder."
    if f"{base}cls_token" in state or f"{base}class_embedding" in state:
        return infer_vit(state, base, head_width)
    table = "attn.relative_position_bias_table"
    stages = count(state, r"vision_encoder\.layers\.(\d+)\.blocks")
    first = state[f"{base}layers.0.blocks.0.{table}"]
    window = (math.isqrt(len(first)) + 1) // 2
    if size is None:
        mask = state.get(f"{base}layers.0.blocks.1.attn_mask")
        if mask is None:
            raise CheckpointError(
                "the checkpoint has neither `image_res` in its config nor Swin's masks, so the image size is unknown; "
                "give `arguments`"
            )
        size = 4 * window * math.isqrt(len(mask))
    width = len(state[f"{base}patch_embed.proj.weight"])
    return {
        "kind": "swin",
        "image_size": size,
        "window": window,
        "width": width,
        "depths": [count(state, rf"vision_encoder\.layers\.{i}\.blocks\.(\d+)\.") for i in range(stages)],
        "heads": [state[f"{base}layers.{i}.blocks.0.{table}"].shape[1] for i in range(stages)],
        "mlp_ratio": len(state[f"{base}layers.0.blocks.0.mlp.fc1.weight"]) / width,
    }
