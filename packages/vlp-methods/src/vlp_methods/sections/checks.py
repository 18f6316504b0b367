"""Rules across the sections of a recipe; each raises `ValueError` with the keys in question. Imports no
torch."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from vlp_data.options import TextOptions, View
    from vlp_eval.benchmarks.grounding import WeakGroundingOptions
    from vlp_eval.benchmarks.vqa import VqaOptions

    from vlp_methods.engine.options import EvaluateOptions
    from vlp_methods.sections.data import Data
    from vlp_methods.sections.models import Encoders
    from vlp_methods.sections.questions import VqaData
    from vlp_methods.sections.teacher import QueueTeacher

PLAIN = ("vit", "timm")
"""Kinds of image encoders that may be a plain ViT."""
ENCODERS = {"wordpiece": "bert", "roberta": "roberta"}
"""Kind of text encoder that a kind of tokenizer was made for; the other kinds go with any."""


def fits(model: "Encoders", data: "Data") -> None:
    """The data must be what the model takes, and must be somewhere."""
    if data.tokenizer is None:
        raise ValueError("data.tokenizer=null: this model reads texts; name the files of its vocabulary")
    made_for = ENCODERS.get(data.tokenizer.kind, model.text.kind)
    if model.text.kind != made_for:
        raise ValueError(
            f"model.text.kind={model.text.kind} does not fit data.tokenizer.kind={data.tokenizer.kind}"
        )
    if data.view.ragged:
        raise ValueError(
            f"data.view.kind={data.view.kind} gives images of several sizes and this model takes squares; "
            "choose squash, centre_crop or imagenet"
        )
    if data.view.size != model.vision.image_size:
        raise ValueError(
            f"data.view.size={data.view.size} must equal model.vision.image_size={model.vision.image_size}"
        )
    if (model.concepts is None) != (data.concepts is None):
        given, missing = ("model", "data") if data.concepts is None else ("data", "model")
        raise ValueError(
            f"{given}.concepts is given and {missing}.concepts is null: a model sees the concepts that its "
            "data holds; give both, or none"
        )
    if model.concepts is not None and model.concepts.place == "first" and model.vision.kind not in PLAIN:
        raise ValueError(
            f"model.concepts.place=first needs model.vision.kind=vit, {model.vision.kind} has no place for "
            "them; choose place=last"
        )
    if not data.root and data.world is None:
        raise ValueError("data.root is required without data.world")


def selects(evaluate: "EvaluateOptions", *, split: str, present: bool) -> None:
    """What is evaluated during training must be there, and the number to watch must be one of it."""
    if not present and (evaluate.every is not None or evaluate.best is not None):
        raise ValueError(
            f"evaluate: there is no data.{split} to evaluate on; leave evaluate.every and evaluate.best null"
        )
    if evaluate.best is not None and not evaluate.best.startswith(f"{split}/"):
        raise ValueError(
            f"evaluate.best={evaluate.best} must be a number of the {split} data, such as {split}/..."
        )


def ranks_candidates(data: "VqaData", answers: "VqaOptions") -> None:
    """Answers are ranked among candidates, or written without."""
    if bool(data.candidates) != (answers.mode == "rank"):
        raise ValueError(
            "data.candidates belongs to answers.mode=rank: give a file of answers, or choose "
            "answers.mode=generate"
        )


def holds(teacher: "QueueTeacher", batch: int) -> None:
    """The queue takes a whole batch at a time."""
    if batch > teacher.queue:
        raise ValueError(
            f"teacher.queue={teacher.queue} must hold a batch of all ranks, data.train.batch={batch}"
        )


def looks_at(model: "Encoders", heat: "WeakGroundingOptions") -> None:
    """The layer of the heat maps must be one that attends to the image."""
    if heat.mode == "itc":
        if model.vision.kind != "vit":
            raise ValueError(
                f"heat.mode=itc needs model.vision.kind=vit, got {model.vision.kind}; choose heat.mode=itm"
            )
        first, end = 0, model.vision.depth
    else:
        first, end = model.text.fusion_layer, model.text.layers
    if not first <= heat.layer < end:
        what = "a block of the ViT" if heat.mode == "itc" else "a fusion layer"
        raise ValueError(f"heat.layer={heat.layer} must be {what}, {first}..{end - 1}")


def ends_texts(text: "TextOptions") -> None:
    """A model that writes must learn where texts end."""
    if not text.separator:
        raise ValueError("data.text.separator=false: a model learns from the separator where texts end")


def squashes(view: "View", what: str) -> None:
    """Boxes follow the crop of this view alone."""
    if view.kind != "squash":
        raise ValueError(f"data.view.kind={view.kind}: {what} need kind=squash, whose crops boxes follow")
