"""Stages of training that families of fusion models share: models of NLVR2, entailment, answers and captions,
and how their arguments follow from those of pre-training.

`vlp_core.models.fusion.conversion` says what becomes of the tensors.
"""

from collections.abc import Mapping
from functools import partial
from typing import Any

from vlp_core.heads import ClassHead
from vlp_core.models.family import Stage
from vlp_core.models.fusion.captioning import CaptionModel
from vlp_core.models.fusion.encoders import create_encoders
from vlp_core.models.fusion.entailment import EntailmentModel
from vlp_core.models.fusion.nlvr import NlvrModel
from vlp_core.models.fusion.vqa import VqaModel
from vlp_core.text.bert import Bert

LAYOUT = "fusion"
"""The layout (`vlp_core.models.family`) of these families."""

STARTS: dict[str, tuple[str, ...]] = {
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

NLVR_SHARING = {"layers_per_image_projection": 2}
"""Two fusion layers, one for each image, share their keys and values."""


def shared_stages(*, class_head: ClassHead) -> tuple[Stage, ...]:
    """The stages beyond pre-training, retrieval and boxes.

    Args:
        class_head: Classifier of NLVR2 and entailment; an argument `head` of their models chooses another.
    """
    return (
        Stage(
            name="nlvr_domain",
            create=create_nlvr_domain,
            starts_from=STARTS["nlvr_domain"],
            derive=_derive_nlvr_domain,
        ),
        Stage(
            name="nlvr",
            create=partial(create_nlvr, head=class_head),
            starts_from=STARTS["nlvr"],
            abilities=("nlvr",),
            derive=_derive_nlvr,
        ),
        Stage(
            name="entailment",
            create=partial(create_entailment, head=class_head),
            starts_from=STARTS["entailment"],
            abilities=("entailment",),
            derive=encoders_of,
        ),
        Stage(
            name="vqa", create=create_vqa, starts_from=STARTS["vqa"], abilities=("vqa",), derive=_derive_vqa
        ),
        Stage(
            name="captioning",
            create=create_captioning,
            starts_from=STARTS["captioning"],
            abilities=("captioning",),
            derive=encoders_of,
        ),
    )


# Models
# ------------------------------------------------------------------------------------------------------------


def create_nlvr_domain(
    *,
    vision: Mapping[str, Any],
    text: Mapping[str, Any],
    concepts: Mapping[str, Any] | None = None,
    embed_width: int = 256,
) -> NlvrModel:
    """The model of the domain stage of NLVR2; the encoders as in `create_encoders`."""
    encoders = create_encoders(vision, {**NLVR_SHARING, **text}, concepts)
    return NlvrModel(**encoders, stage="domain", embed_width=embed_width)


def create_nlvr(
    *,
    vision: Mapping[str, Any],
    text: Mapping[str, Any],
    concepts: Mapping[str, Any] | None = None,
    head: ClassHead,
) -> NlvrModel:
    """The model of NLVR2; the encoders as in `create_encoders`."""
    encoders = create_encoders(vision, {**NLVR_SHARING, **text}, concepts)
    return NlvrModel(**encoders, stage="fine_tune", head=head)


def create_entailment(
    *,
    vision: Mapping[str, Any],
    text: Mapping[str, Any],
    concepts: Mapping[str, Any] | None = None,
    classes: int = 3,
    head: ClassHead,
) -> EntailmentModel:
    """The model of entailment; the encoders as in `create_encoders`."""
    return EntailmentModel(**create_encoders(vision, text, concepts), classes=classes, head=head)


def create_vqa(
    *,
    vision: Mapping[str, Any],
    text: Mapping[str, Any],
    decoder: Mapping[str, Any],
    concepts: Mapping[str, Any] | None = None,
) -> VqaModel:
    """The model that answers questions; the encoders as in `create_encoders`.

    `decoder`: arguments of its `Bert`; `image_width` (the width of `text`) and `fusion_layer` (0) are filled
    in.
    """
    encoders = create_encoders(vision, text, concepts)
    shape: dict[str, Any] = {"image_width": encoders["text"].width, "fusion_layer": 0, **decoder}
    return VqaModel(**encoders, decoder=Bert(**shape))


def create_captioning(
    *, vision: Mapping[str, Any], text: Mapping[str, Any], concepts: Mapping[str, Any] | None = None
) -> CaptionModel:
    """The model that writes captions; the encoders as in `create_encoders`."""
    return CaptionModel(**create_encoders(vision, text, concepts))


# Arguments
# ------------------------------------------------------------------------------------------------------------


def encoders_of(pretrained: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of a pre-training model that are those of its encoders."""
    found = {"vision": dict(pretrained["vision"]), "text": dict(pretrained["text"])}
    if pretrained.get("concepts") is not None:
        found["concepts"] = dict(pretrained["concepts"])
    return found


def contrast_of(pretrained: Mapping[str, Any]) -> dict[str, Any]:
    """As `encoders_of`, with the width of the shared space where it is told."""
    width = {"embed_width": pretrained["embed_width"]} if "embed_width" in pretrained else {}
    return encoders_of(pretrained) | width


def _fusion_layers(pretrained: Mapping[str, Any]) -> int:
    return pretrained["text"]["layers"] - pretrained["text"]["fusion_layer"]


def _derive_nlvr(pretrained: Mapping[str, Any]) -> dict[str, Any]:
    """A fusion layer for each of the two images."""
    found = encoders_of(pretrained)
    found["text"]["layers"] += _fusion_layers(pretrained)
    return found


def _derive_nlvr_domain(pretrained: Mapping[str, Any]) -> dict[str, Any]:
    return contrast_of(pretrained) | {"text": _derive_nlvr(pretrained)["text"]}


def _derive_vqa(pretrained: Mapping[str, Any]) -> dict[str, Any]:
    found = encoders_of(pretrained)
    decoder = {**found["text"], "layers": _fusion_layers(pretrained), "fusion_layer": 0}
    return found | {"decoder": decoder}
