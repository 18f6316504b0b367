"""From the model section of a recipe to a model, with the values that it starts from."""

from typing import Any, NamedTuple

from torch import nn
from vlp_core import models, weights
from vlp_core.concepts import ConceptVision, image_encoder
from vlp_core.recipe import dump
from vlp_core.weights import bert
from vlp_data.text import Tokenizer

from vlp_methods.sections.models import ContrastModel, Encoders, TaskModel, Weights


class Made(NamedTuple):
    """A model, and what makes it again: `vlp_core.models.create(family, stage, **arguments)`."""

    model: Any
    family: str
    stage: str
    arguments: dict[str, Any]


def make(family: str, stage: str, arguments: dict[str, Any]) -> Made:
    """A model with its initial values."""
    return Made(models.create(family, stage, **arguments), family, stage, arguments)


def encoder_arguments(model: Encoders, tokenizer: Tokenizer) -> dict[str, Any]:
    """Arguments of `vlp_core.models.create` for the encoders: `vision`, `text` and, where there are any,
    `concepts`."""
    text = {**dump(model.text), "vocabulary": tokenizer.vocabulary, "pad_id": tokenizer.pad_id}
    concepts = {} if model.concepts is None else {"concepts": dump(model.concepts)}
    return {"vision": dump(model.vision), "text": text, **concepts}


def derived_arguments(family: str, stage: str, model: TaskModel, tokenizer: Tokenizer) -> dict[str, Any]:
    """Arguments of `vlp_core.models.create` for the model of a stage after pre-training."""
    pretrained = encoder_arguments(model, tokenizer)
    if isinstance(model, ContrastModel):
        pretrained["embed_width"] = model.embed_width
    return models.derive(family, stage, pretrained)


def load_encoders(model: nn.Module, start: Weights) -> None:
    """Fill the encoders of a pre-training model from published files; `start.model` is not looked at."""
    if start.vision:
        weights.load_vision(image_encoder(model.vision), start.vision)
    if start.text:
        bert.load_published(model, start.text)
        if isinstance(model.vision, ConceptVision):
            bert.load_published_layers(model.vision.concepts.text, start.text)
