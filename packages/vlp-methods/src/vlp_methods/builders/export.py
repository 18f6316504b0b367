"""The folder that a model is exported to."""

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from torch import nn
from vlp_core import models
from vlp_core.models.export import tokenizer_kind
from vlp_core.recipe import dump

from vlp_methods.builders.model import Made
from vlp_methods.sections.data import Data


def exporter(
    made: Made,
    data: Data,
    *,
    momentum: Mapping[str, nn.Module] | None = None,
    vocabulary: int | None = None,
    prompt: str | None = None,
) -> Callable[[Path], None]:
    """Writes an export folder: weights, how to make the model, how images, texts and concepts are read.

    Args:
        made: Model.
        data: Data section, paths in full.
        momentum: What a later stage goes on with beside the model, "teacher" and "queue"; None: nothing.
        vocabulary: Number of tokens; None: no texts.
        prompt: Words that captions begin with; None: the model writes none.
    """
    settings: dict[str, Any] = {}
    if data.concepts is not None:
        settings["concepts"] = dump(data.concepts)
    if prompt is not None:
        settings["prompt"] = prompt
    return partial(
        models.save,
        model=made.model,
        family=made.family,
        stage=made.stage,
        arguments=made.arguments,
        view={"kind": "squash", "size": data.view.size},
        reading=reading_of(data, vocabulary),
        settings=settings,
        text_files=() if data.tokenizer is None else data.tokenizer.files,
        momentum=momentum,
    )


def reading_of(data: Data, vocabulary: int | None) -> dict[str, Any] | None:
    """How texts become ids, as an export says it; None without texts."""
    if data.tokenizer is None:
        return None
    return {
        "tokenizer": {"kind": tokenizer_kind(data.tokenizer.kind), "files": list(data.tokenizer.files)},
        "max_tokens": data.text.max_tokens,
        "max_words": data.text.max_words,
        "separator": data.text.separator,
        "vocabulary": vocabulary,
    }
