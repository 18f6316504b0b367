"""Pre-training from published weights."""

from torch import nn
from vlp_core import weights
from vlp_core.concepts import ConceptVision, image_encoder
from vlp_core.weights import bert

from vlp_methods.parts.options import Weights


def initialise(model: nn.Module, start: Weights) -> None:
    """Load the checkpoints of encoders that the recipe of a pre-training starts from; `start.model` is up to
    the method."""
    if start.vision:
        weights.load_vision(image_encoder(model.vision), start.vision)
    if start.text:
        bert.load_published(model, start.text)
        if isinstance(model.vision, ConceptVision):
            bert.load_published_layers(model.vision.concepts.text, start.text)
