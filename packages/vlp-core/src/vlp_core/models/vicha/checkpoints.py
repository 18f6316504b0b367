"""Official ViCHA checkpoints, in and out. ALBEF's have the same layout without concepts, hierarchy and masked
images.

A file holds up to three things under one roof: a model, its momentum teacher (the same names with `_m` behind
the first part), and a queue. `split` tells them apart. Seven layouts exist, one for each stage of training
(`layout`). `load` fills a model from a checkpoint of its own stage; `load_pretrained` starts it from an
earlier one (`vlp_core.models.fusion.stages`); `write` makes an official file. All three take teacher and queue along
where they are given.

Source: arXiv 2208.13628; ViCHA `models/model_*_kw_img.py`; ALBEF, arXiv 2107.07651.
"""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor, nn

from vlp_core.concepts import ConceptVision, image_encoder
from vlp_core.heads import MaskedImageDecoder
from vlp_core.models.fusion.stages import (
    STARTS,
    Stage,
    copy_to_teacher,
    joined,
    require_start,
    stage_of,
    start_official,
    start_queue,
)
from vlp_core.momentum import FeatureQueue
from vlp_core.text.bert import Bert
from vlp_core.weights import files, loading
from vlp_core.weights.adapter import (
    Adapter,
    Buffer,
    CheckpointError,
    Drop,
    Fuse,
    Rename,
    Rule,
    Tied,
    groups,
)
from vlp_core.weights.bert import encoder_adapter, head_adapter, language_model_adapter
from vlp_core.weights.deit import deit_adapter
from vlp_core.weights.files import Checkpoint
from vlp_core.weights.loading import Loaded
from vlp_core.weights.shapes import count, infer_text, infer_vit
from vlp_core.weights.vision import xvlm_vision_adapter

_QUEUE = {"image_queue": "image", "text_queue": "text", "queue_ptr": "pointer", "idx_queue": "ids"}
"""Names of a queue in the source, and in `vlp_core.momentum.FeatureQueue`, whose features are rows instead of
columns."""

_HEADS = {
    "temperature": Rename("temp", "temperature"),
    **{
        name: Rename(f"{name}.{{p}}", f"{name}.{{p}}")
        for name in ("vision_proj", "text_proj", "itm_head", "ta_head")
    },
    **{
        name: Rename(f"{name}.{{i}}.{{p}}", f"{name}.{{i}}.{{p}}")
        for name in ("cls_head", "vision_proj_hidden", "text_proj_hidden")
    },
}


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


class Parts(NamedTuple):
    """The parts of a checkpoint: model and teacher under the source's names of a model, the queue under ours;
    empty where it has none."""

    model: dict[str, Tensor]
    teacher: dict[str, Tensor]
    queue: dict[str, Tensor]


def split(state: Mapping[str, Tensor]) -> Parts:
    """Tell a model, its teacher and its queue apart."""
    parts = Parts({}, {}, {})
    for name, tensor in state.items():
        first, dot, rest = name.partition(".")
        match _QUEUE.get(name):
            case None if first.endswith("_m"):
                parts.teacher[first.removesuffix("_m") + dot + rest] = tensor
            case None:
                parts.model[name] = tensor
            case "pointer":
                parts.queue["pointer"] = tensor.reshape(())
            case "ids":
                parts.queue["ids"] = tensor.reshape(-1)
            case ours:
                parts.queue[ours] = tensor.t()
    return parts


def join(parts: Parts) -> dict[str, Tensor]:
    """The inverse of `split`."""
    state = dict(parts.model) | {_of_teacher(name): tensor for name, tensor in parts.teacher.items()}
    for source, ours in _QUEUE.items():
        match ours, parts.queue.get(ours):
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


def recognises(state: Mapping[str, Tensor]) -> bool:
    """Whether names look like those of ViCHA or ALBEF, whatever the stage."""
    return any(name.startswith("visual_encoder.") for name in state)


def layout(state: Mapping[str, Tensor]) -> Stage:
    """Which stage of training an official checkpoint belongs to.

    Raises:
        CheckpointError: It is no checkpoint of ViCHA or ALBEF.
    """
    has = {".".join(name.split(".")[:2]) for name in state} | {name.split(".")[0] for name in state}
    if recognises(state):
        if "text_decoder" in has:
            return "vqa"
        if "cls_head" in has:
            # One layout but for the classes: NLVR2 knows false and true, SNLI-VE has three.
            return "nlvr" if len(state["cls_head.2.weight"]) == 2 else "entailment"
        if "ta_head" in has:
            return "nlvr_domain"
        if "text_encoder.bert" in has:
            return "pretrain"
        if "itm_head" in has:
            return "retrieval"
    raise CheckpointError(f"this is no checkpoint of ViCHA or ALBEF; it holds {groups(state)}")


def vicha_adapter(model: nn.Module) -> Adapter:
    """Between the names of a model (or of its teacher) and those of official checkpoints of its task; `split`
    comes first."""
    adapter = _vision_adapter(model)
    if hasattr(model, "mlm_head"):
        adapter += language_model_adapter(model.text, source_prefix="text_encoder.")
    else:
        adapter += encoder_adapter(model.text, source_prefix="text_encoder.", prefix="text.")
    if hasattr(model, "decoder"):
        adapter += language_model_adapter(
            model.decoder, source_prefix="text_decoder.", prefix="decoder.", head_prefix="lm_head."
        )
    if hasattr(model, "masked_image"):
        adapter += masked_image_adapter(model.masked_image)
    adapter += Adapter(tuple(rule for name, rule in _HEADS.items() if hasattr(model, name)))
    return adapter + _IDLE if hasattr(model, "ta_head") else adapter


def load(
    model: nn.Module,
    source: Mapping[str, Tensor] | str | Path,
    *,
    teacher: nn.Module | None = None,
    queue: FeatureQueue | None = None,
) -> Loaded:
    """Fill a model from an official checkpoint of the same task, and its teacher and queue where they are
    given.

    Position tables for another image size are resized, those of the teacher too.

    Raises:
        CheckpointError: A checkpoint of another stage, or without the teacher or queue that is to be filled,
            with the way out; see also `vlp_core.weights.load`.
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
            f"{name} is a {found} checkpoint of ViCHA where a {wanted} one is expected; {way}"
        )
    parts = split(state)
    for what, part, values in (("teacher", teacher, parts.teacher), ("queue", queue, parts.queue)):
        if part is not None and not values:
            raise CheckpointError(f"{name} holds no {what}; leave {what} out, or use load_pretrained")
    return _same_stage(model, parts, teacher, queue, name)


def load_pretrained(
    model: nn.Module,
    source: Mapping[str, Tensor] | str | Path,
    *,
    teacher: nn.Module | None = None,
    queue: FeatureQueue | None = None,
    name: str | None = None,
) -> Loaded:
    """Start a task's model from an official checkpoint of the same or an earlier stage;
    `vlp_core.models.fusion.stages` says what becomes of what.

    Args:
        model: The model to fill.
        source: Checkpoint.
        teacher: Its momentum teacher, made by `teacher_of` before, so that both have the same fresh values
            where the checkpoint has none. Filled from the checkpoint's teacher; from the model, once that is
            filled, if the checkpoint has no teacher. (The released NLVR2 code fills no teacher at all: it
            stays a copy of the fresh model. Leave `teacher` out for that.)
        queue: Goes on with the checkpoint's features, where it has some; identities it lacks stay unknown.
        name: What messages call the checkpoint; by default its path.

    Returns:
        What was loaded, what stays fresh (`missing`, our names; those of the others begin with "teacher." or
        "queue."), and what of the checkpoint is not used (`unexpected`, its names).

    Raises:
        CheckpointError: The task cannot start from this checkpoint, or names beyond the table's are missing
            or left over.
    """
    state, opened = _open(source)
    name = name or opened
    found, wanted = layout(state), stage_of(model)
    require_start(found, model, name)
    parts = split(state)
    if found == wanted:
        return _same_stage(model, parts, teacher, queue, name)
    head, body = _earlier_stage(model, found)

    def begin(part: nn.Module, values: Mapping[str, Tensor], called: str) -> Loaded:
        return start_official(part, found, values, head, body, buffers=("position_ids",), name=called)

    others: dict[str, Loaded] = {}
    result = begin(model, parts.model, name)
    if teacher is not None and parts.teacher:
        report = begin(teacher, parts.teacher, f"the teacher of {name}")
        others["teacher"] = report._replace(unexpected=tuple(map(_of_teacher, report.unexpected)))
    return _finish(result, others, model, parts, teacher, queue, name)


def _same_stage(
    model: nn.Module, parts: Parts, teacher: nn.Module | None, queue: FeatureQueue | None, name: str
) -> Loaded:
    others: dict[str, Loaded] = {}
    result = loading.load(model, parts.model, vicha_adapter(model), name=name)
    if teacher is not None and parts.teacher:
        others["teacher"] = loading.load(
            teacher, parts.teacher, vicha_adapter(teacher), name=f"the teacher of {name}"
        )
    return _finish(result, others, model, parts, teacher, queue, name)


def _finish(
    result: Loaded,
    others: dict[str, Loaded],
    model: nn.Module,
    parts: Parts,
    teacher: nn.Module | None,
    queue: FeatureQueue | None,
    name: str,
) -> Loaded:
    """The queue, the teacher of a checkpoint without one, and the report of all."""
    if teacher is not None and not parts.teacher:
        copy_to_teacher(model, teacher)
    if queue is not None and parts.queue:
        others["queue"] = start_queue(queue, parts.queue, name=name)
    result = joined(result, **others)
    unused = Parts({}, {} if teacher is not None else parts.teacher, {} if queue is not None else parts.queue)
    return result._replace(
        unexpected=result.unexpected + tuple(key for key in join(unused) if not key.endswith(".position_ids"))
    )


def _earlier_stage(model: nn.Module, found: Stage) -> tuple[Adapter, Adapter]:
    """Names of the language head and of all else in a checkpoint of another stage, for encoders like those of
    `model`."""
    vision, body = _vision_adapter(model), Adapter(tuple(_HEADS.values()))
    if found == "pretrain":
        text = encoder_adapter(model.text, source_prefix="text_encoder.bert.", prefix="text.")
        # Pre-training shares no projections, whatever the model does.
        text = Adapter(tuple(rule for rule in text.rules if not isinstance(rule, Tied)))
        return head_adapter("bert", source_prefix="text_encoder."), vision + text + body + _MASKED_IMAGE
    text = encoder_adapter(model.text, source_prefix="text_encoder.", prefix="text.")
    return Adapter(()), vision + text + body


def write(
    path: str | Path,
    model: nn.Module,
    *,
    teacher: nn.Module | None = None,
    queue: FeatureQueue | None = None,
) -> None:
    """Write a model under the official names of its task, buffers and second names included, with its teacher
    and queue.

    `.safetensors`, or {"model": ...} by torch.
    """
    files.write(
        path,
        join(
            Parts(
                vicha_adapter(model).to_source(model.state_dict()),
                {} if teacher is None else vicha_adapter(teacher).to_source(teacher.state_dict()),
                {} if queue is None else dict(queue.state_dict()),
            )
        ),
    )


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
    found = layout(state)
    vision = infer_vit(state, "visual_encoder.", head_width) | {"local_depth": 0}
    size, patch = config.get("image_res"), vision["patch"]
    if isinstance(size, int) and size // patch == vision["image_size"] // patch:
        vision["image_size"] = size
    arguments: dict[str, Any] = {
        "vision": vision,
        "text": infer_text(state, "text_encoder.", head_width),
    }
    if "kw_proj.weight" in state:
        arguments["concepts"] = {"layers": count(state, r"kw_encoder\.encoder\.layer\.(\d+)\.")}
    match found:
        case "vqa":
            arguments["decoder"] = infer_text(state, "text_decoder.", head_width)
        case "nlvr" | "nlvr_domain":
            arguments |= {"stage": "fine_tune" if found == "nlvr" else "domain", "head": "relu"}
        case "entailment":
            arguments |= {"classes": len(state["cls_head.2.weight"]), "head": "relu"}
        case "pretrain" | "retrieval":
            arguments["heads"] = ["contrast", "match"]
    if found == "pretrain":
        arguments["heads"].append("masked_language")
        if levels := count(state, r"vision_proj_hidden\.(\d+)\."):
            arguments["heads"].append("hidden")
            arguments["levels"] = levels
        if "mask_token" in state:
            arguments["masked_image"] = _infer_masked_image(state, config, decoder_heads)
    if "vision_proj.weight" in state:
        arguments["embed_width"] = len(state["vision_proj.weight"])
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


def _open(source: Mapping[str, Tensor] | str | Path) -> tuple[Mapping[str, Tensor], str]:
    return (files.read(source), str(source)) if isinstance(source, str | Path) else (source, "the state dict")


def _vision_adapter(model: nn.Module) -> Adapter:
    """Names of the image encoder and, where the model has them, of its concepts."""
    encoder, concepts = image_encoder(model.vision), isinstance(model.vision, ConceptVision)
    adapter = xvlm_vision_adapter(
        encoder, source_prefix="visual_encoder.", prefix="vision.encoder." if concepts else "vision."
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
