"""Rules across the sections of a recipe; each raises `ValueError` with the keys in question. Imports no torch."""

from vlp_data.options import TextOptions

from vlp_methods.engine.options import EvaluateOptions
from vlp_methods.parts.options import Data, Encoders


def fits(model: Encoders, data: Data) -> None:
    """The data must be what the model takes, and must be somewhere."""
    if model.text.kind != data.tokenizer.kind:
        raise ValueError(
            f"model.text.kind={model.text.kind} does not fit data.tokenizer.kind={data.tokenizer.kind}"
        )
    if data.view.size != model.vision.image_size:
        raise ValueError(
            f"data.view.size={data.view.size} must equal model.vision.image_size={model.vision.image_size}"
        )
    if not data.root and data.world is None:
        raise ValueError("data.root is required without data.world")


def selects(evaluate: EvaluateOptions, *, split: str, present: bool) -> None:
    """What is evaluated during training must be there, and the number to watch must be one of it."""
    if not present and (evaluate.every is not None or evaluate.best is not None):
        raise ValueError(
            f"evaluate: there is no data.{split} to evaluate on; leave evaluate.every and evaluate.best null"
        )
    if evaluate.best is not None and not evaluate.best.startswith(f"{split}/"):
        raise ValueError(
            f"evaluate.best={evaluate.best} must be a number of the {split} data, such as {split}/..."
        )


def ends_texts(text: TextOptions) -> None:
    """A model that writes must learn where texts end."""
    if not text.separator:
        raise ValueError("data.text.separator=false: a model learns from the separator where texts end")
