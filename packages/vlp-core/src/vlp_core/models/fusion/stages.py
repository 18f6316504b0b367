"""From one stage of training to the next: which model can start from which, and what becomes of each tensor.

    from            to                what happens
    pretrain        retrieval, boxes  text encoder without its language head; heads kept
    pretrain        entailment        text encoder without its language head; class head fresh
    pretrain        nlvr, nlvr_domain each fusion layer is copied to two; class head fresh
    nlvr_domain     nlvr              as it is; class head fresh
    pretrain        vqa               encoder as for retrieval; fusion layers, embeddings and language head become the decoder, whose
                                      cross-attention keys and values stay fresh unless image and text width
                                      are equal
    pretrain        captioning        the whole text encoder becomes the decoder
    any             the same          as it is (domain stage to fine-tuning, one data set to another)

A momentum teacher goes the way of its model; a queue goes on as it is. Tensors have our names here;
`vlp_core.models.xvlm.checkpoints` and `vlp_core.models.vicha.checkpoints` bring official files to them.

Source: arXiv 2111.08276, `load_pretrained` in X-VLM `models/model_*.py`; arXiv 2208.13628, ViCHA `VQA.py`,
`VE.py`, `NLVR.py` and so on.
"""

import logging
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

from torch import Tensor, nn

from vlp_core.heads import ClassHead
from vlp_core.models.fusion.captioning import CaptionModel
from vlp_core.models.fusion.entailment import EntailmentModel
from vlp_core.models.fusion.nlvr import NlvrModel
from vlp_core.models.fusion.vqa import VqaModel
from vlp_core.models.vicha.model import Vicha
from vlp_core.models.xvlm.model import Xvlm
from vlp_core.momentum import FeatureQueue
from vlp_core.weights import loading
from vlp_core.weights.adapter import Adapter, CheckpointError, groups
from vlp_core.weights.loading import Loaded

log = logging.getLogger(__name__)

Method = Literal["xvlm", "vicha"]
Stage = Literal["pretrain", "retrieval", "boxes", "nlvr_domain", "nlvr", "entailment", "vqa", "captioning"]
Task = Literal["retrieval", "weak_grounding", "boxes", "nlvr", "entailment", "vqa", "captioning"]

STARTS: dict[Stage, tuple[Stage, ...]] = {
    "pretrain": ("pretrain",),
    "retrieval": ("pretrain", "retrieval"),
    "boxes": ("pretrain", "boxes"),
    "nlvr_domain": ("pretrain", "nlvr_domain"),
    "nlvr": ("pretrain", "nlvr_domain", "nlvr"),
    "entailment": ("pretrain", "entailment"),
    "vqa": ("pretrain", "vqa"),
    "captioning": ("pretrain", "captioning"),
}
"""Stages that a model of a stage can start from."""

SERVES: dict[Task, tuple[Stage, ...]] = {
    "retrieval": ("retrieval", "pretrain"),
    "weak_grounding": ("retrieval", "pretrain"),
    "boxes": ("boxes", "pretrain"),
    "nlvr": ("nlvr",),
    "entailment": ("entailment",),
    "vqa": ("vqa",),
    "captioning": ("captioning",),
}
"""Stages whose models can be evaluated on a task: those with trained values for all that it needs."""


@dataclass(frozen=True, kw_only=True)
class _Way:
    """What differs between the methods.

    heads: Of the stages whose model is that of the method itself.
    class_head: Classifier of NLVR2 and entailment.
    recipes: Recipe that trains what a task needs and pre-training lacks.
    """

    heads: dict[Stage, tuple[str, ...]]
    class_head: ClassHead
    recipes: dict[Task, str]


METHODS: dict[Method, _Way] = {
    "xvlm": _Way(
        heads={"retrieval": ("contrast", "match"), "boxes": ("boxes",)},
        class_head="mlp",
        recipes={"nlvr": "xvlm/nlvr", "vqa": "xvlm/vqa", "captioning": "xvlm/captioning"},
    ),
    "vicha": _Way(
        heads={"retrieval": ("contrast", "match")},
        class_head="relu",
        recipes={"nlvr": "vicha/nlvr", "entailment": "vicha/entailment", "vqa": "vicha/vqa"},
    ),
}

_HEADS = (
    "temperature",
    "vision_proj",
    "text_proj",
    "itm_head",
    "bbox_head",
    "mlm_head",
    "ta_head",
    "cls_head",
    "vision_proj_hidden",
    "text_proj_hidden",
    "masked_image",
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
        case EntailmentModel():
            return "entailment"
        case Vicha():
            return "pretrain" if "masked_language" in model.heads else "retrieval"
        case Xvlm():
            if "masked_language" in model.heads:
                return "pretrain"
            return "retrieval" if "match" in model.heads else "boxes"
    raise TypeError(f"no stage of training is known for {type(model).__name__}")


def model_name(stage: Stage, method: Method = "xvlm") -> str:
    """The name for `vlp_core.models.create`."""
    own = ("pretrain", "retrieval", "boxes")
    return method if stage in own else {"nlvr_domain": "nlvr"}.get(stage, stage)


def method_of(name: str, arguments: Mapping[str, Any]) -> Method:
    """The method whose recipes go on from a model made with `create(name, **arguments)`.

    Told by the name, else by the kind of class head; a model that shows neither (answers, captions) counts as
    X-VLM's.
    """
    for method, way in METHODS.items():
        if name == method or (name not in METHODS and arguments.get("head") == way.class_head):
            return method
    return "xvlm"


def task_arguments(pretrained: Mapping[str, Any], stage: Stage, method: Method = "xvlm") -> dict[str, Any]:
    """Arguments of `vlp_core.models.create` for a model that starts from a pre-training model made with
    `pretrained`.

    The image size stays; change `vision` for another one. The name for `create` is `model_name(stage,
    method)`.

    Raises:
        ValueError: An unknown stage, or one that the method has not.
    """
    way = METHODS[method]
    vision, text = dict(pretrained["vision"]), dict(pretrained["text"])
    fusion_layers = text["layers"] - text["fusion_layer"]
    embed = {"embed_width": pretrained["embed_width"]} if "embed_width" in pretrained else {}
    encoders = {"vision": vision, "text": text}
    if pretrained.get("concepts") is not None:
        encoders["concepts"] = dict(pretrained["concepts"])
    match stage:
        case "pretrain":
            return dict(pretrained)
        case "retrieval":
            return {**encoders, **embed, "heads": list(way.heads[stage])}
        case "boxes" if stage in way.heads:
            return {**encoders, "heads": list(way.heads[stage])}
        case "nlvr" | "nlvr_domain":
            text["layers"] += fusion_layers
            return {
                **encoders,
                "stage": "fine_tune" if stage == "nlvr" else "domain",
                "head": way.class_head,
                **embed,
            }
        case "entailment":
            return {**encoders, "head": way.class_head}
        case "vqa":
            decoder = {**text, "layers": fusion_layers, "fusion_layer": 0}
            return {**encoders, "decoder": decoder}
        case "captioning":
            return encoders
    known = [name for name in STARTS if name != "boxes" or name in way.heads]
    raise ValueError(f"stage {stage!r} is not known; choose among {', '.join(known)}")


def require_start(found: Stage, model: nn.Module, name: str) -> None:
    """Refuse to start `model` from a checkpoint `name` of a stage that it cannot follow."""
    wanted = stage_of(model)
    if found not in STARTS[wanted]:
        raise CheckpointError(
            f"{name} is a {found} checkpoint; a {wanted} model starts from {' or '.join(STARTS[wanted])}"
        )


def require_task(found: Stage, task: Task, name: str, method: Method = "xvlm") -> None:
    """Refuse a checkpoint `name` of a stage and method that lacks trained values for a task.

    Raises:
        CheckpointError: With the command that trains them, where there is one.
        ValueError: An unknown task.
    """
    if task not in SERVES:
        raise ValueError(f"task {task!r} is not known; choose among {', '.join(SERVES)}")
    if found in SERVES[task]:
        return
    recipe = METHODS[method].recipes.get(task)
    way = (
        f"train it first, `vlp-train {recipe} model.weights.model={name}`, and evaluate the export of that run"
        if recipe is not None and found in STARTS[SERVES[task][0]]
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
        What was loaded and resized, what stays fresh (`missing`), and what of the checkpoint is not used
        (`unexpected`).

    Raises:
        CheckpointError: The model cannot start from this stage; names beyond the table's are missing or left
            over; shapes do not fit.
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


def start_official(
    model: nn.Module,
    found: Stage,
    state: Mapping[str, Tensor],
    head: Adapter,
    body: Adapter,
    *,
    buffers: tuple[str, ...],
    name: str,
) -> Loaded:
    """As `start`, from a checkpoint under official names of another stage.

    Args:
        model, found, name: As in `start`.
        state: Its tensors under official names.
        head: Names of the language head in such a checkpoint.
        body: Names of all else.
        buffers: Ends of names that stand for nothing trained; they are not reported as unused.

    Returns:
        As `start`, with what is not used (`unexpected`) in official names.

    Raises:
        CheckpointError: As `start`; names that neither `head` nor `body` knows.
    """
    ours, unmatched = (head + body).translate(state)
    if unmatched:
        raise CheckpointError(f"{name} holds {len(unmatched)} unknown tensors: {groups(unmatched)}")
    result = start(model, found, ours, name=name)
    used = {key: tensor.to("meta") for key, tensor in ours.items() if key not in result.unexpected}
    # The head's second name of the word embeddings is used only together with the head.
    taken = (head + body if any(key.startswith("mlm_head.") for key in used) else body).to_source(used)
    return result._replace(
        unexpected=tuple(key for key in state if key not in taken and not key.endswith(buffers))
    )


def copy_to_teacher(model: nn.Module, teacher: nn.Module) -> None:
    """Give a teacher the values of its model, for checkpoints that hold none."""
    values = model.state_dict()
    teacher.load_state_dict({key: values[key] for key in teacher.state_dict()})


def start_queue(queue: FeatureQueue, state: Mapping[str, Tensor], *, name: str) -> Loaded:
    """Go on with the features of a checkpoint's queue. Identities that it lacks stay unknown, so that its
    entries match nothing.

    Raises:
        CheckpointError: A queue of another size.
    """
    size, width = queue.image.shape
    if "image" in state and state["image"].shape != queue.image.shape:
        raise CheckpointError(
            f"the queue of {name} holds {' x '.join(map(str, state['image'].shape))} numbers, that of this run {size} x {width}; "
            "give both one size, or begin with an empty queue"
        )
    spare = ("ids",) if queue.ids is None else ()
    return loading.load(
        queue, state, allow_missing=("ids",), allow_unexpected=spare, name=f"the queue of {name}"
    )


def joined(model: Loaded, **others: Loaded) -> Loaded:
    """Reports of a model and what goes with it as one; our names of the others begin with their keyword."""
    found = {field: list(names) for field, names in model._asdict().items()}
    for part, other in others.items():
        for field, names in other._asdict().items():
            found[field] += names if field == "unexpected" else [f"{part}.{name}" for name in names]
    return Loaded(**{field: tuple(names) for field, names in found.items()})


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
        case EntailmentModel():
            return ("cls_head",)
        case VqaModel() if model.decoder.image_width != model.text.image_width:
            # The decoder attends to text where pre-training attended to images: nothing to copy unless both
            # have one width.
            return tuple(f"decoder.layers.{i}.cross.key_value" for i in range(len(model.decoder.layers)))
    return ()


def _targets(model: nn.Module) -> Callable[[str], tuple[str, ...]]:
    """For a name of the pre-training model the names it gets in `model` (or would get, where `model` has no
    such part)."""
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
