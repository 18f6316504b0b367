"""From the other sections of a recipe to arguments of a model, an optimizer, a learning rate, an export folder."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from torch import nn
from vlp_core import models, schedule
from vlp_core.optim import AdamW, ParameterRule, parameter_groups
from vlp_core.recipe import dump
from vlp_data.text import Tokenizer

from vlp_methods.engine.options import OptimizerOptions, Training
from vlp_methods.parts.options import Data, Encoders


def encoder_arguments(model: Encoders, tokenizer: Tokenizer) -> dict[str, Any]:
    """`vision` and `text` of `vlp_core.models.create`."""
    text = {**dump(model.text), "vocabulary": tokenizer.vocabulary, "pad_id": tokenizer.pad_id}
    return {"vision": dump(model.vision), "text": text}


def adamw(model: nn.Module, options: OptimizerOptions, rules: Sequence[ParameterRule]) -> AdamW:
    """The optimizer of a recipe over all trainable parameters of `model`."""
    groups = parameter_groups(model, lr=options.lr, weight_decay=options.weight_decay, rules=rules)
    return AdamW(groups, betas=options.betas, eps=options.eps)


def learning_rate(recipe: Training) -> Callable[[int], float]:
    """Factor on the peak learning rates at a step."""
    return schedule.named(recipe.schedule.kind, warmup=recipe.schedule.warmup_steps, total_steps=recipe.steps)


def exporter(
    model: nn.Module, *, name: str, arguments: Mapping[str, Any], data: Data, **settings: Any
) -> Callable[[Path], None]:
    """Writes an export folder: weights, how to build the model, vocabulary, how texts were made.

    `name` and `arguments` are those of `vlp_core.models.create`; `settings` are further keys of config.json.
    """
    text = {
        "kind": data.tokenizer.kind,
        "files": [Path(file).name for file in data.tokenizer.files],
        "max_tokens": data.text.max_tokens,
        "max_words": data.text.max_words,
        "separator": data.text.separator,
    }
    return partial(
        models.save,
        model=model,
        name=name,
        arguments=arguments,
        settings={"image_size": data.view.size, "text": text, **settings},
        text_files=data.tokenizer.files,
    )
