"""Text encoders by kind, from what JSON can hold."""

from typing import Any

from vlp_core.text.bert import Bert
from vlp_core.text.transformers import TransformersText


def create_text(kind: str = "bert", **arguments: Any) -> Bert | TransformersText:
    """Make a text encoder, for a model with two encoders.

    Args:
        kind: "bert" or "roberta" (`vlp_core.text.Bert`, fresh weights), or "transformers" (any text encoder
            of transformers, which has to be installed).
        arguments: Those of the encoder's class.

    Raises:
        ValueError: An unknown kind, or arguments that do not fit together.
        TypeError: An argument that the encoder does not take.
        ImportError: Kind "transformers" without transformers.
    """
    match kind:
        case "bert" | "roberta":
            return Bert(kind=kind, **arguments)
        case "transformers":
            return TransformersText(**arguments)
    raise ValueError(f"text kind {kind!r} is not known; choose bert, roberta or transformers")
