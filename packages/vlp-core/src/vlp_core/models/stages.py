"""From one stage of training to the next: which model can start from which, and what becomes of each tensor.

    from            to                what happens
    pretrain        retrieval, boxes  text encoder without its language head; heads kept
    pretrain        nlvr, nlvr_domain each fusion layer is copied to two; class head fresh
    nlvr_domain     nlvr              as it is; class head fresh
    pretrain        vqa               encoder as for retrieval; fusion layers, embeddings and language head become the decoder, whose
                                      cross-attention keys and values stay fresh unless image and text width are equal
    pretrain        captioning        the whole text encoder becomes the decoder
    any             the same          as it is (domain stage to fine-tuning, one data set to another)

Tensors have our names here; `vlp_core.weights.xvlm` brings official files to them.
Source: arXiv 2111.08276; `load_pretrained` in X-VLM `models/model_*.py`.
"""

import logging
import re
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, Literal

from torch import Tensor, nn

from vlp_core.models.captioning import CaptionModel
from vlp_core.models.nlvr import NlvrModel
from vlp_core.models.vqa import VqaModel
from vlp_core.models.xvlm import Xvlm
from vlp_core.weights import loading
from vlp_core.weights.adapter import CheckpointError, groups
from vlp_core.weights.loading import Loaded

log = logging.getLogger(__name__)

Stage = Literal["pretrain", "retrieval", "boxes", "nlvr_domain", "nlvr", "vqa", "captioning"]
Task = Literal["retrieval", "weak_grounding", "boxes", "nlvr", "vqa", "captioning"]

STARTS: dict[Stage, tuple[Stage, ...]] = {
    "pretrain": ("pretrain",),
    "retrieval": ("pretrain", "retrieval"),
    "boxes": ("pretrain", "boxes"),
    "nlvr_domain": ("pretrain", "nlvr_domain"),
    "nlvr": ("pretrain", "nlvr_domain", "nlvr"),
    "vqa": ("pretrain", "vqa"),
    "captioning": ("pretrain", "captioning"),
}
"""Stages that a model of a stage can start from."""

SERVES: dict[Task, tuple[Stage, ...]] = {
    "retrieval": ("retrieval", "pretrain"),
    "weak_grounding": ("retrieval", "pretrain"),
    "boxes": ("boxes", "pretrain"),
    "nlvr": ("nlvr",),
    "vqa": ("vqa",),
    "captioning": ("captioning",),
}
"""Stages whose models can be evaluated on a task: those with trained values for all that it needs."""

_RECIPES: dict[Task, str] = {"nlvr": "xvlm/nlvr", "vqa": "xvlm/vqa", "captioning": "xvlm/captioning"}

_HEADS = (
    "temperature",
    "vision_proj",
    "text_proj",
    "itm_head",
    "bbox_head",
    "mlm_head",
    "ta_head",
    "cls_head",
)
"""Parts of an earlier stage that a later one may do without."""


def stage_of(model: nn.Module) -> Stage:
    """The stage that a model is made for.

    Raises:
        TypeError: Not one of the models of `vlp_core.models`.
    """
    match model:
        case VqaModel():
            return "vqa"
        case CaptionModel():
            return "captioning"
        case NlvrModel(stage="domain"):
            return "nlvr_domain"
        case NlvrModel():
            return "nlvr"
        case Xvlm():
            if "masked_language" in model.heads:
                return "pretrain"
            return "retrieval" if "match" in model.heads else "boxes"
    raise TypeError(f"no stage of training is known for {type(model).__name__}")


def model_name(stage: Stage) -> str:
    """The name for `vlp_core.models.create`."""
    return {"nlvr": "nlvr", "nlvr_domain": "nlvr", "vqa": "vqa", "captioning": "captioning"}.get(
        stage, "xvlm"
    )


def task_arguments(pretrained: Mapping[str, Any], stage: Stage) -> dict[str, Any]:
    """Arguments of `vlp_core.models.create` for a model that starts from a pre-training model made with `pretrained`.

    The picture size stays; change `vision` for another one. The name for `create` is `model_name(stage)`.

    Raises:
        ValueError: An unknown stage.
    """
    vision, text = dict(pretrained["vision"]), dict(pretrained["text"])
    fusion_layers = text["layers"] - text["fusion_layer"]
    embed = {"embed_width": pretrained["embed_width"]} if "embed_width" in pretrained else {}
    match stage:
        case "pretrain":
            return dict(pretrained)
        case "retrieval":
            return {"vision": vision, "text": text, **embed, "heads": ["contrast", "match"]}
        case "boxes":
            return {"vision": vision, "text": text, "heads": ["boxes"]}
        case "nlvr" | "nlvr_domain":
            text["layers"] += fusion_layers
            return {
                "vision": vision,
                "text": text,
                "stage": "fine_tune" if stage == "nlvr" else "domain",
                **embed,
            }
        case "vqa":
            decoder = {**text, "layers": fusion_layers, "fusion_layer": 0}
            return {"vision": vision, "text": text, "decoder": decoder}
        case "captioning":
            return {"vision": vision, "text": text}
    raise ValueError(f"stage {stage!r} is not known; choose among {', '.join(STARTS)}")


def require_start(found: Stage, model: nn.Module, name: str) -> None:
    """Refuse to start `model` from a checkpoint `name` of a stage that it cannot follow."""
    wanted = stage_of(model)
    if found not in STARTS[wanted]:
        raise CheckpointError(
            f"{name} is a {found} checkpoint; a {wanted} model starts from {' or '.join(STARTS[wanted])}"
        )


def require_task(found: Stage, task: Task, name: str) -> None:
    """Refuse a checkpoint `name` of a stage that lacks trained values for a task.

    Raises:
        CheckpointError: With the command that trains them, where there is one.
        ValueError: An unknown task.
    """
    if task not in SERVES:
        raise ValueError(f"task {task!r} is not known; choose among {', '.join(SERVES)}")
    if found in SERVES[task]:
        return
    trainable = task in _RECIPES and found in STARTS[SERVES[task][0]]
    way = (
        f"train it first, `vlp-train {_RECIPES[task]} model.weights.model={name}`, and evaluate the export of that run"
        if trainable
        else f"give a {' or '.join(SERVES[task])} checkpoint"
    )
    raise CheckpointError(
        f"{name} is a {found} checkpoint, in which what {task} needs was never trained; {way}"
    )


def start(model: nn.Module, found: Stage, state: Mapping[str, Tensor], *, name: str) -> Loaded:
    """Start a model from the tensors of stage `found`; see the module for what becomes of what.

    Args:
        model: Any model of `vlp_core.models`; position tables are resized to it.
        found: Stage of the checkpoint.
        state: Its tensors under our names.
        name: What messages call it.

    Returns:
        What was loaded and resized, what stays fresh (`missing`), and what of the checkpoint is not used (`unexpected`).

    Raises:
        CheckpointError: The model cannot start from this stage; names beyond the table's are missing or left over; shapes do not fit.
    """
    require_start(found, model, name)
    wanted = stage_of(model)
    fresh = _fresh(model, found)
    targets = _targets(model) if found == "pretrain" and wanted != "pretrain" else _itself
    expected = model.state_dict()
    placed: dict[str, Tensor] = {}
    unused: list[str] = []
    for key, tensor in state.items():
        places = [target for target in targets(key) if target in expected and not _within(target, fresh)]
        placed |= dict.fromkeys(places, tensor)
        if not places:
            unused.append(key)
    droppable = () if found == wanted else _HEADS
    if left := [key for key in unused if not _within(key, droppable)]:
        raise CheckpointError(
            f"{name} does not fit this {type(model).__name__}: {len(left)} unexpected: {groups(left)}"
        )
    result = loading.load(model, placed, allow_missing=fresh, name=name)
    log.info(
        "%s: %d tensors loaded; fresh: %s; unused: %s",
        name,
        len(result.loaded),
        groups(result.missing) or "none",
        groups(unused) or "none",
    )
    return result._replace(unexpected=tuple(unused))


def _within(name: str, parts: tuple[str, ...]) -> bool:
    return any(name == part or name.startswith(f"{part}.") for part in parts)


def _itself(name: str) -> tuple[str, ...]:
    return (name,)


def _fresh(model: nn.Module, found: Stage) -> tuple[str, ...]:
    """Parts of the model that stage `found` has no values for."""
    if found == stage_of(model):
        return ()
    match model:
        case NlvrModel():
            return ("ta_head",) if model.stage == "domain" else ("cls_head",)
        case VqaModel() if model.decoder.image_width != model.text.image_width:
            # The decoder attends to text where pre-training attended to images: nothing to copy unless both have one width.
            return tuple(f"decoder.layers.{i}.cross.key_value" for i in range(len(model.decoder.layers)))
    return ()


def _targets(model: nn.Module) -> Callable[[str], tuple[str, ...]]:
    """For a name of the pre-training model the names it gets in `model` (or would get, where `model` has no such part)."""
    match model:
        case CaptionModel():
            return lambda name: (re.sub(r"^mlm_head\.", "lm_head.", name),)
        case NlvrModel():
            return partial(_nlvr_targets, model.text.fusion_layer, model.text.layers_per_image_projection)
        case VqaModel():
            return partial(_vqa_targets, model.text.fusion_layer)
    return _itself


def _layer(name: str) -> tuple[int, str] | None:
    found = re.fullmatch(r"text\.layers\.(\d+)\.(.+)", name)
    return (int(found[1]), found[2]) if found else None


def _nlvr_targets(first: int, copies: int, name: str) -> tuple[str, ...]:
    layer = _layer(name)
    if layer is None or layer[0] < first:
        return (name,)
    start_layer = first + copies * (layer[0] - first)
    # The copies share one key/value projection, held by the first of them.
    number = 1 if layer[1].startswith("cross.key_value.") else copies
    return tuple(f"text.layers.{start_layer + copy}.{layer[1]}" for copy in range(number))


def _vqa_targets(first: int, name: str) -> tuple[str, ...]:
    if name.startswith("mlm_head."):
        return ("lm_head." + name.removeprefix("mlm_head."),)
    layer = _layer(name)
    if layer is None:
        return (name, re.sub(r"^text\.", "decoder.", name)) if name.startswith("text.") else (name,)
    return (name,) if layer[0] < first else (name, f"decoder.layers.{layer[0] - first}.{layer[1]}")
