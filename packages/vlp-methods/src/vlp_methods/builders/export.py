"""The folder that a model is exported to."""

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from torch import nn
from vlp_core import models
from vlp_core.recipe import dump
from vlp_data.text import Reading, Tokenizer

from vlp_methods.builders.model import Made
from vlp_methods.sections.data import Data


def exporter(
    made: Made,
    data: Data,
    *,
    tokenizer: Tokenizer | None = None,
    reading: Reading | None = None,
    momentum: Mapping[str, nn.Module] | None = None,
    prompt: str | None = None,
) -> Callable[[Path], None]:
    """Writes an export folder: weights, how to make the model, how images, texts and concepts are read.

    Args:
        made: Model.
        data: Data section, paths in full.
        tokenizer: Tokenizer; None: the model reads no texts.
        reading: How texts become ids, beside the tokenizer.
        momentum: What a later stage goes on with beside the model, "teacher" and "queue"; None: nothing.
        prompt: Words that captions begin with; None: the model writes none.
    """
    settings: dict[str, Any] = {}
    if data.concepts is not None:
        settings["concepts"] = dump(data.concepts)
    if prompt is not None:
        settings["prompt"] = prompt
    texts = None
    if data.tokenizer is not None and tokenizer is not None and reading is not None:
        texts = {
            "tokenizer": data.tokenizer.config(),
            **reading.config(),
            "vocabulary": tokenizer.vocabulary,
        }
    return partial(
        models.save,
        model=made.model,
        family=made.family,
        stage=made.stage,
        arguments=made.arguments,
        view=data.view.config(),
        reading=texts,
        settings=settings,
        text_files=() if data.tokenizer is None else data.tokenizer.files,
        momentum=momentum,
    )
