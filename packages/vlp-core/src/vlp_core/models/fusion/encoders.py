"""The encoders of a model: made from arguments that JSON can hold, and checked against each other."""

from collections.abc import Mapping
from typing import Any, TypedDict

from vlp_core.concepts import ConceptEncoder, ConceptVision
from vlp_core.text.bert import Bert
from vlp_core.vision import ImageEncoder, create_vision


class Encoders(TypedDict):
    """What every fusion model is made of."""

    vision: ImageEncoder
    text: Bert


def create_encoders(
    vision: Mapping[str, Any], text: Mapping[str, Any], concepts: Mapping[str, Any] | None = None
) -> Encoders:
    """Image and text encoder with initial values, as keyword arguments of a model.

    Args:
        vision: `kind` and the arguments of that encoder, see `vlp_core.vision.create_vision`.
        text: Arguments of `Bert`; `image_width` is filled in.
        concepts: Makes the image encoder see visual concepts: `layers` of their own BERT, which is like the
            lowest layers of `text`, and the options of `vlp_core.concepts.ConceptVision` (`place`,
            `visible_padding`). None: images alone.

    Raises:
        ValueError: A kind that is not known, sizes that do not fit.
        TypeError: An argument that an encoder does not take.
    """
    image = create_vision(**vision)
    if concepts is not None:
        image = _with_concepts(image, text, **concepts)
    fusion: dict[str, Any] = {"image_width": image.width, **text}
    return {"vision": image, "text": Bert(**fusion)}


def _with_concepts(
    image: ImageEncoder, text: Mapping[str, Any], *, layers: int, **options: Any
) -> ConceptVision:
    shape: dict[str, Any] = {key: value for key, value in text.items() if key != "fusion_layer"}
    shape["layers"] = layers
    words = ConceptEncoder(text=Bert(**shape), width=image.width)
    return ConceptVision(encoder=image, concepts=words, **options)


def require_fit(vision: ImageEncoder | Bert, text: Bert) -> None:
    """Refuse a text encoder whose cross-attention expects another width than the image encoder gives.

    Raises:
        ValueError: With both widths.
    """
    if text.image_width != vision.width:
        raise ValueError(
            f"the text encoder's image_width={text.image_width} does not fit the image encoder's width "
            f"{vision.width}"
        )
