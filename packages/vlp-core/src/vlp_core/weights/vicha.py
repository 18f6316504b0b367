"""Official ViCHA checkpoints, in and out. ALBEF's have the same layout without concepts, hierarchy and masked images.

A file holds up to three things under one roof: a model, its momentum teacher (the same names with `_m` behind the first part), and a queue.
`split` tells them apart.

Source: arXiv 2208.13628; ViCHA `models/model_*_kw_img.py`; ALBEF, arXiv 2107.07651.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import NamedTuple

from torch import Tensor, nn

from vlp_core.concepts import ConceptVision, image_encoder
from vlp_core.heads import MaskedImageDecoder
from vlp_core.text.bert import Bert
from vlp_core.weights.adapter import Adapter, Buffer, Drop, Fuse, Rename, Rule, Tied
from vlp_core.weights.bert import encoder_adapter, language_model_adapter
from vlp_core.weights.deit import deit_adapter
from vlp_core.weights.vision import xvlm_vision_adapter

_QUEUE = {"image_queue": "image", "text_queue": "text", "queue_ptr": "pointer", "idx_queue": "ids"}
"""Names of a queue in the source, and in `vlp_core.momentum.FeatureQueue`, whose features are rows instead of columns."""

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


class Parts(NamedTuple):
    """The parts of a checkpoint: model and teacher under the source's names of a model, the queue under ours; empty where it has none."""

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
    state = dict(parts.model)
    for name, tensor in parts.teacher.items():
        first, dot, rest = name.partition(".")
        state[f"{first}_m{dot}{rest}"] = tensor
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


def vicha_adapter(model: nn.Module) -> Adapter:
    """Between the names of a model (or of its teacher) and those of official checkpoints of its task; `split` comes first."""
    encoder, concepts = image_encoder(model.vision), isinstance(model.vision, ConceptVision)
    adapter = xvlm_vision_adapter(
        encoder, source_prefix="visual_encoder.", prefix="vision.encoder." if concepts else "vision."
    )
    if concepts:
        adapter += concept_adapter(model.vision.concepts.text) + Adapter(
            (Rename("kw_proj.{p}", "vision.concepts.project.{p}"),)
        )
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
    return adapter + Adapter(tuple(rule for name, rule in _HEADS.items() if hasattr(model, name)))


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
    """Names of the concepts' BERT: no level `bert.`, and no level `embeddings.` where there is only an embedding."""
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
