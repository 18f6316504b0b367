"""Official ViCHA checkpoints, in and out. ALBEF's have the same layout without concepts, hierarchy and masked
images.

A file holds up to three things under one roof: a model, its momentum teacher (the same names with `_m` behind
the first part), and a queue. `split` tells them apart. Seven layouts exist, one for each stage of training.
`FILES` reads and writes them: `FILES.load` fills a model from a file of its own stage; `FILES.start` starts
it from an earlier one; `FILES.write` makes an official file. All three take teacher and queue along where
they are given.

The released NLVR2 code fills no teacher from a checkpoint: it stays a copy of the fresh model. Leave
`teacher` out of `FILES.start` for that.

Source: arXiv 2208.13628; ViCHA `models/model_*_kw_img.py`; ALBEF, arXiv 2107.07651.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from torch import Tensor, nn

from vlp_core.concepts import ConceptVision, image_encoder
from vlp_core.heads import MaskedImageDecoder
from vlp_core.models.fusion.official import (
    Contents,
    EarlierNames,
    OfficialFiles,
    earlier_text,
    head_names,
    infer_shared,
    text_adapter,
)
from vlp_core.text.bert import Bert
from vlp_core.weights.adapter import Adapter, Buffer, Drop, Fuse, Rename, Rule, Tied
from vlp_core.weights.bert import encoder_adapter
from vlp_core.weights.deit import deit_adapter
from vlp_core.weights.files import Checkpoint
from vlp_core.weights.shapes import count, infer_vit
from vlp_core.weights.vision import vision_adapter

VISION = "visual_encoder."

_QUEUE = {"image_queue": "image", "text_queue": "text", "queue_ptr": "pointer", "idx_queue": "ids"}
"""Names of a queue in the source, and in `vlp_core.momentum.FeatureQueue`, whose features are rows instead of
columns."""

_HEADS = head_names(
    linear=("vision_proj", "text_proj", "itm_head", "ta_head"),
    stacked=("cls_head", "vision_proj_hidden", "text_proj_hidden"),
)

# The domain stage of NLVR2 stores both, and neither computes with them nor trains them; our model lacks them,
# and a file written from it too.
_IDLE = Adapter((Drop("temp"), Drop("text_proj.{p}")))

# Parts of pre-training that no later stage uses.
_MASKED_IMAGE = Adapter(
    tuple(
        Drop(name)
        for name in (
            "mask_token",
            "decoder_pos_embed",
            "decoder_embed.{p}",
            "decoder_norm.{p}",
            "decoder_blocks.{rest...}",
            "mae_proj.{p}",
            "mae_proj_uni.{p}",
        )
    )
)

CONCEPTS = {"max_tokens": 55, "pad": "max", "separator": False}
"""How the published checkpoints read concepts at evaluation (`vlp_data` options): padded to 55 tokens, words
joined by blanks."""


def split(state: Mapping[str, Tensor]) -> Contents:
    """Tell a model, its teacher and its queue apart."""
    contents = Contents({}, {}, {})
    for name, tensor in state.items():
        first, dot, rest = name.partition(".")
        match _QUEUE.get(name):
            case None if first.endswith("_m"):
                contents.teacher[first.removesuffix("_m") + dot + rest] = tensor
            case None:
                contents.model[name] = tensor
            case "pointer":
                contents.queue["pointer"] = tensor.reshape(())
            case "ids":
                contents.queue["ids"] = tensor.reshape(-1)
            case ours:
                contents.queue[ours] = tensor.t()
    return contents


def join(contents: Contents) -> dict[str, Tensor]:
    """The inverse of `split`."""
    state = dict(contents.model) | {_of_teacher(name): tensor for name, tensor in contents.teacher.items()}
    for source, ours in _QUEUE.items():
        match ours, contents.queue.get(ours):
            case _, None:
                pass
            case "pointer", pointer:
                state[source] = pointer.reshape(1)
            case "ids", ids:
                state[source] = ids.reshape(1, -1)
            case _, features:
                state[source] = features.t().contiguous()
    return state


def _of_teacher(name: str) -> str:
    first, dot, rest = name.partition(".")
    return f"{first}_m{dot}{rest}"


def _stage(state: Mapping[str, Tensor], parts: set[str]) -> str | None:
    if "text_decoder" in parts:
        return "vqa"
    if "cls_head" in parts:
        # One layout but for the classes: NLVR2 knows false and true, SNLI-VE has three.
        return "nlvr" if len(state["cls_head.2.weight"]) == 2 else "entailment"
    if "ta_head" in parts:
        return "nlvr_domain"
    if "text_encoder.bert" in parts:
        return "pretrain"
    return "retrieval" if "itm_head" in parts else None


def vicha_adapter(model: nn.Module) -> Adapter:
    """Between the names of a model (or of its teacher) and those of official checkpoints of its stage;
    `split` comes first."""
    adapter = _vision_adapter(model) + text_adapter(model)
    if hasattr(model, "masked_image"):
        adapter += masked_image_adapter(model.masked_image)
    adapter += Adapter(tuple(rule for name, rule in _HEADS.items() if hasattr(model, name)))
    return adapter + _IDLE if hasattr(model, "ta_head") else adapter


def _earlier(model: nn.Module, found: str) -> EarlierNames:
    head, text = earlier_text(model.text, found)
    spare = _MASKED_IMAGE if found == "pretrain" else Adapter(())
    return EarlierNames(head, _vision_adapter(model) + text + Adapter(tuple(_HEADS.values())) + spare)


def infer_arguments(
    checkpoint: Checkpoint, *, head_width: int = 64, decoder_heads: int = 16
) -> dict[str, Any]:
    """Arguments of `vlp_core.models.create` for an official checkpoint, from the shapes of its tensors and
    the config beside them.

    Of the config, `image_res` (an image of 380 pixels leaves no trace in a table of 23 x 23 patches of 16;
    without it the size is that of whole patches) and `mask_ratio` are read.

    Args:
        checkpoint: Checkpoint.
        head_width: Channels per attention head, which no shape tells; 64 in every published ViCHA and ALBEF.
        decoder_heads: Attention heads of the decoder of masked images, likewise.

    Raises:
        CheckpointError: A width that is no multiple of `head_width`.
    """
    state, config = checkpoint.state, checkpoint.extra.get("config")
    config = config if isinstance(config, Mapping) else {}
    found = FILES.stage(state)
    vision = infer_vit(state, VISION, head_width) | {"local_depth": 0}
    size, patch = config.get("image_res"), vision["patch"]
    if isinstance(size, int) and size // patch == vision["image_size"] // patch:
        vision["image_size"] = size
    arguments: dict[str, Any] = {"vision": vision, **infer_shared(state, found, head_width=head_width)}
    if "kw_proj.weight" in state:
        arguments["concepts"] = {"layers": count(state, r"kw_encoder\.encoder\.layer\.(\d+)\.")}
    match found:
        case "entailment":
            arguments["classes"] = len(state["cls_head.2.weight"])
        case "pretrain" | "retrieval":
            arguments["heads"] = ["contrast", "match"]
    if found == "pretrain":
        arguments["heads"].append("masked_language")
        if levels := count(state, r"vision_proj_hidden\.(\d+)\."):
            arguments["heads"].append("hidden")
            arguments["levels"] = levels
        if "mask_token" in state:
            arguments["masked_image"] = _infer_masked_image(state, config, decoder_heads)
    return arguments


def _infer_masked_image(state: Mapping[str, Tensor], config: Mapping[str, Any], heads: int) -> dict[str, Any]:
    found: dict[str, Any] = {"ratio": float(config.get("mask_ratio", 0.75))}
    if "decoder_embed.weight" not in state:
        return found | {"by": "fusion"}
    return found | {
        "by": "both" if "mae_proj_uni.weight" in state else "decoder",
        "width": len(state["decoder_embed.weight"]),
        "depth": count(state, r"decoder_blocks\.(\d+)\."),
        "heads": heads,
    }


def _vision_adapter(model: nn.Module) -> Adapter:
    """Names of the image encoder and, where the model has them, of its concepts."""
    encoder, concepts = image_encoder(model.vision), isinstance(model.vision, ConceptVision)
    adapter = vision_adapter(
        encoder, source_prefix=VISION, prefix="vision.encoder." if concepts else "vision."
    )
    if concepts:
        adapter += concept_adapter(model.vision.concepts.text) + Adapter(
            (Rename("kw_proj.{p}", "vision.concepts.project.{p}"),)
        )
    return adapter


def masked_image_adapter(decoder: MaskedImageDecoder) -> Adapter:
    """Names of masked image modelling, which stand at the top of a checkpoint."""
    rules: list[Rule] = [Rename("mask_token", "mask_token", leading=2)]
    if decoder.by != "fusion":
        rules += [
            Buffer("decoder_pos_embed", lambda: decoder.positions[None]),
            Rename("decoder_embed.{p}", "embed.{p}"),
            *(
                Rename(f"decoder_{rule.source}", rule.ours)
                for rule in deit_adapter().rules
                if isinstance(rule, Rename) and rule.ours.startswith(("blocks.", "norm."))
            ),
            Rename("mae_proj_uni.{p}" if decoder.by == "both" else "mae_proj.{p}", "project.{p}"),
        ]
    if decoder.by != "decoder":
        rules.append(Rename("mae_proj.{p}", "project_fused.{p}"))
    return Adapter(tuple(rules)).prefixed(ours="masked_image.")


def concept_adapter(words: Bert) -> Adapter:
    """Names of the concepts' BERT: no level `bert.`, and no level `embeddings.` where there is only an
    embedding."""
    adapter = encoder_adapter(words)
    if not len(words.layers):
        adapter = Adapter(tuple(_without_level(rule, "embeddings.") for rule in adapter.rules))
    return adapter.prefixed(source="kw_encoder.", ours="vision.concepts.text.")


def _without_level(rule: Rule, level: str) -> Rule:
    match rule:
        case Fuse():
            return replace(rule, sources=tuple(name.removeprefix(level) for name in rule.sources))
        case Tied():
            return replace(rule, source=rule.source.removeprefix(level), of=rule.of.removeprefix(level))
        case Rename() | Buffer() | Drop():
            return replace(rule, source=rule.source.removeprefix(level))


def _settings(arguments: Mapping[str, Any]) -> dict[str, Any]:
    return {} if arguments.get("concepts") is None else {"concepts": dict(CONCEPTS)}


FILES = OfficialFiles(
    family="vicha",
    title="ViCHA or ALBEF",
    vision=VISION,
    stage_by=_stage,
    adapter=vicha_adapter,
    earlier=_earlier,
    infer=infer_arguments,
    settings=_settings,
    computed=("position_ids",),
    split=split,
    join=join,
)
