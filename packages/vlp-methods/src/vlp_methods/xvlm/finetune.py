"""What the tasks of X-VLM have in common: a model derived from that of pre-training, started from a checkpoint."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from torch import nn
from vlp_core import models
from vlp_core.models import Stage
from vlp_core.models.xvlm_rules import parameter_rules
from vlp_core.optim import AdamW
from vlp_data.text import Tokenizer

from vlp_methods.engine.job import Job, Stream
from vlp_methods.engine.options import Training
from vlp_methods.parts import evaluation
from vlp_methods.parts.assembly import adamw, encoder_arguments, exporter, learning_rate
from vlp_methods.parts.data import ALWAYS
from vlp_methods.parts.options import Data
from vlp_methods.xvlm.schema.finetune import ContrastModel, Model


class Started(NamedTuple):
    """A task's model with the weights it starts from; `name` and `arguments` make it again (`vlp_core.models.create`)."""

    model: Any
    name: str
    arguments: Mapping[str, Any]


def start(stage: Stage, options: Model, tokenizer: Tokenizer) -> Started:
    """The model of a stage, filled from `options.weights` as the reference's `load_pretrained` of that stage does."""
    pretrained = encoder_arguments(options, tokenizer)
    if isinstance(options, ContrastModel):
        pretrained["embed_width"] = options.embed_width
    arguments = models.task_arguments(pretrained, stage)
    name = models.model_name(stage)
    model = models.create(name, **arguments)
    if options.weights.model:
        models.start_from(model, options.weights.model)
    return Started(model, name, arguments)


def optimizer(recipe: Training, model: nn.Module) -> AdamW:
    """The optimizer of a recipe; `optimizer.lr_scale` holds for the parts of `model` that pre-training has no values for.

    Raises:
        ValueError: There is no such part, so the factor could not take effect.
    """
    scale = recipe.optimizer.lr_scale
    rules = parameter_rules(model, fresh_lr_scale=scale, as_released=False)
    if scale != 1 and all(rule.lr_scale is None for rule in rules):
        raise ValueError(
            f"optimizer.lr_scale={scale}: no part of the model of task {recipe.task} starts without pre-trained values; leave it at 1"
        )
    return adamw(model, recipe.optimizer, rules)


def job(
    recipe: Training,
    data: Data,
    started: Started,
    task: nn.Module,
    streams: Callable[[], Mapping[str, Stream]],
    *,
    measure: evaluation.Measure | None = None,
    val: Any | None = None,
    test: Any | None = None,
    select: str = "val",
    **settings: Any,
) -> Job:
    """A task with one stream: `measure` is taken on `val` while training, and on `test` of the selected model.

    `select`: the split that `val` is called in names of numbers. `settings`: further keys of the export's config.json.
    """
    return Job(
        task=task,
        streams=streams,
        mixing=ALWAYS,
        optimizer=optimizer(recipe, started.model),
        learning_rate=learning_rate(recipe),
        evaluate=evaluation.while_training(measure, select, val),
        export=exporter(started.model, name=started.name, arguments=started.arguments, data=data, **settings),
        test=evaluation.of_export(measure, "test", test),
    )
