"""From one stage of training to the next: what becomes of each tensor.

    from            to                what happens
    pretrain        retrieval, boxes  text encoder without its language head; heads kept
    pretrain        entailment        text encoder without its language head; class head fresh
    pretrain        nlvr, nlvr_domain each fusion layer is copied to two; class head fresh
    nlvr_domain     nlvr              as it is; class head fresh
    pretrain        vqa               encoder as for retrieval; fusion layers, embeddings and language head
                                      become the decoder, whose cross-attention keys and values stay fresh
                                      unless image and text width are equal
    pretrain        captioning        the whole text encoder becomes the decoder
    any             the same          as it is (domain stage to fine-tuning, one data set to another)

A momentum teacher goes the way of its model; a queue goes on as it is. Tensors have our names here;
`vlp_core.models.fusion.official` brings official files to them.

Source: arXiv 2111.08276, `load_pretrained` in X-VLM `models/model_*.py`; arXiv 2208.13628, ViCHA `VQA.py`,
`VE.py`, `NLVR.py` and so on.
"""

import logging
import re
from collections.abc import Callable, Mapping
from functools import partial

from torch import Tensor, nn

from vlp_core.models.family import Description
from vlp_core.models.fusion.captioning import CaptionModel
from vlp_core.models.fusion.entailment import EntailmentModel
from vlp_core.models.fusion.nlvr import NlvrModel
from vlp_core.models.fusion.vqa import VqaModel
from vlp_core.weights import loading
from vlp_core.weights.adapter import CheckpointError, groups
from vlp_core.weights.loading import LoadReport

log = logging.getLogger(__name__)

ENCODERS = ("vision", "text")
"""Parts of which a later stage needs every tensor. What else an earlier stage has are heads, and a later one
may do without."""


def start(
    model: nn.Module, state: Mapping[str, Tensor], *, stage: str, found: Description, name: str
) -> LoadReport:
    """Start a model from the tensors of an export; `vlp_core.models.family.Family.start` of fusion families.

    Raises:
        CheckpointError: Another kind of text encoder; see also `convert`.
    """
    kind = found.arguments["text"].get("kind", "bert")
    if kind != model.text.kind:
        raise CheckpointError(
            f"{name} was trained with {kind}, the text encoder of this model is {model.text.kind}"
        )
    return convert(model, state, stage=stage, found=found.stage, name=name)


def convert(
    model: nn.Module, state: Mapping[str, Tensor], *, stage: str, found: str, name: str
) -> LoadReport:
    """Bring the tensors of stage `found` to a model of `stage`; see the module for what becomes of what.

    Args:
        model: A model of a fusion family; position tables are resized to it.
        state: Tensors of the checkpoint, under our names.
        stage: Stage of the model.
        found: Stage of the checkpoint, one that `stage` starts from.
        name: What messages call the checkpoint.

    Returns:
        What was loaded and resized, what stays fresh (`missing`), and what of the checkpoint is not used
        (`unexpected`).

    Raises:
        CheckpointError: Names beyond the table's are missing or left over; shapes do not fit.
    """
    fresh = () if found == stage else _fresh(model)
    targets = _targets(model) if found == "pretrain" and stage != "pretrain" else _itself
    expected = model.state_dict()
    placed: dict[str, Tensor] = {}
    unused: list[str] = []
    for key, tensor in state.items():
        places = [target for target in targets(key) if target in expected and not _within(target, fresh)]
        placed |= dict.fromkeys(places, tensor)
        if not places:
            unused.append(key)
    if left := [key for key in unused if found == stage or _within(key, ENCODERS)]:
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


def _fresh(model: nn.Module) -> tuple[str, ...]:
    """Parts of a model that no earlier stage has values for."""
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
    doubled = first + copies * (layer[0] - first)
    # The copies share one key/value projection, held by the first of them.
    number = 1 if layer[1].startswith("cross.key_value.") else copies
    return tuple(f"text.layers.{doubled + copy}.{layer[1]}" for copy in range(number))


def _vqa_targets(first: int, name: str) -> tuple[str, ...]:
    if name.startswith("mlm_head."):
        return ("lm_head." + name.removeprefix("mlm_head."),)
    layer = _layer(name)
    if layer is None:
        return (name, re.sub(r"^text\.", "decoder.", name)) if name.startswith("text.") else (name,)
    return (name,) if layer[0] < first else (name, f"decoder.layers.{layer[0] - first}.{layer[1]}")
