"""From the other sections of a recipe to arguments of a model, an optimizer, a learning rate, an export
folder."""

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer
from vlp_core import models, schedule
from vlp_core.optim import AdamW, ParameterRule, parameter_groups
from vlp_core.recipe import dump
from vlp_data.text import Tokenizer

from vlp_methods.engine.options import EpochSchedule, OptimizerOptions, Training
from vlp_methods.parts.options import Data, Encoders


def encoder_arguments(model: Encoders, tokenizer: Tokenizer) -> dict[str, Any]:
    """`vision`, `text` and, where there are any, `concepts` of `vlp_core.models.create`."""
    text = {**dump(model.text), "vocabulary": tokenizer.vocabulary, "pad_id": tokenizer.pad_id}
    concepts = {} if model.concepts is None else {"concepts": dump(model.concepts)}
    return {"vision": dump(model.vision), "text": text, **concepts}


def adamw(model: nn.Module, options: OptimizerOptions, rules: Sequence[ParameterRule]) -> Optimizer:
    """The optimizer of a recipe over all trainable parameters of `model`, with updates in one fused
    kernel."""
    groups = parameter_groups(model, lr=options.lr, weight_decay=options.weight_decay, rules=rules)
    if options.variant == "torch":
        return torch.optim.AdamW(groups, betas=options.betas, eps=options.eps, fused=True)
    return AdamW(groups, betas=options.betas, eps=options.eps)


def learning_rate(recipe: Training) -> Callable[[int], float]:
    """Factor on the peak learning rates at a step."""
    options = recipe.schedule
    if isinstance(options, EpochSchedule):
        return partial(
            schedule.epoch_cosine,
            steps_per_epoch=options.steps_per_epoch,
            epochs=math.ceil(recipe.steps / options.steps_per_epoch),
            warmup=options.warmup_steps // 100,
            start=options.warmup_lr / recipe.optimizer.lr,
            floor=options.min_lr / recipe.optimizer.lr,
        )
    return schedule.named(options.kind, warmup=options.warmup_steps, total_steps=recipe.steps)


def exporter(
    model: nn.Module,
    *,
    name: str,
    arguments: Mapping[str, Any],
    data: Data,
    momentum: Mapping[str, nn.Module] | None = None,
    **settings: Any,
) -> Callable[[Path], None]:
    """Writes an export folder: weights, how to build the model, vocabulary, how texts and concepts were made.

    `name` and `arguments` are those of `vlp_core.models.create`; `momentum` holds what a later stage goes on
    with beside the model, "teacher" and "queue"; `settings` are further keys of config.json.
    """
    text = {
        "kind": data.tokenizer.kind,
        "files": [Path(file).name for file in data.tokenizer.files],
        "max_tokens": data.text.max_tokens,
        "max_words": data.text.max_words,
        "separator": data.text.separator,
    }
    concepts = {} if data.concepts is None else {"concepts": dump(data.concepts)}
    return partial(
        models.save,
        model=model,
        name=name,
        arguments=arguments,
        settings={"image_size": data.view.size, "text": text, **concepts, **settings},
        text_files=data.tokenizer.files,
        momentum=momentum,
    )
