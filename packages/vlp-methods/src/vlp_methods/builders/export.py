"""The folder that a model is exported to."""

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path

from torch import nn
from vlp_core import models
from vlp_core.recipe import dump

from vlp_methods.builders.model import Made
from vlp_methods.sections.data import Data


def exporter(
    made: Made,
    data: Data,
    *,
    momentum: Mapping[str, nn.Module] | None = None,
    prompt: str | None = None,
) -> Callable[[Path], None]:
    """Writes an export folder: weights, how to make the model, how images, texts and concepts are read.

    Args:
        made: Model.
        data: Data section, paths in full.
        momentum: What a later stage goes on with beside the model, "teacher" and "queue"; None: nothing.
        prompt: Words that captions begin with; None: the model writes none.
    """
    tokenizer = data.tokenizer
    text = (
        None
        if tokenizer is None
        else {
            "kind": tokenizer.kind,
            "files": [Path(file).name for file in tokenizer.files],
            "max_tokens": data.text.max_tokens,
            "max_words": data.text.max_words,
            "separator": data.text.separator,
        }
    )
    settings = {"image_size": data.view.size, "text": text}
    if data.concepts is not None:
        settings["concepts"] = dump(data.concepts)
    if prompt is not None:
        settings["prompt"] = prompt
    return partial(
        models.save,
        model=made.model,
        name=models.model_name(made.stage, made.family),
        arguments=made.arguments,
        settings=settings,
        text_files=() if tokenizer is None else tokenizer.files,
        momentum=momentum,
    )
