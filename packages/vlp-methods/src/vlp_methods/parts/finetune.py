"""What the tasks after pre-training have in common, whatever the method: a model derived from that of
pre-training, started from a checkpoint."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from torch import nn
from torch.optim import Optimizer
from vlp_core import models
from vlp_core.models import Method, Stage
from vlp_data.text import Tokenizer

from vlp_methods.engine.job import Job, Stream
from vlp_methods.engine.options import Training
from vlp_methods.parts import evaluation
from vlp_methods.parts.assembly import encoder_arguments, exporter, learning_rate
from vlp_methods.parts.data import ALWAYS
from vlp_methods.parts.options import ContrastModel, Data, TaskModel


class Started(NamedTuple):
    """A task's model; `name` and `arguments` make it again (`vlp_core.models.create`)."""

    model: Any
    name: str
    arguments: Mapping[str, Any]


def make(stage: Stage, options: TaskModel, tokenizer: Tokenizer, method: Method) -> Started:
    """The model of a stage with its initial values; `start` or `vlp_core.models.start_from` fill it."""
    pretrained = encoder_arguments(options, tokenizer)
    if isinstance(options, ContrastModel):
        pretrained["embed_width"] = options.embed_width
    arguments = models.task_arguments(pretrained, stage, method)
    name = models.model_name(stage, method)
    return Started(models.create(name, **arguments), name, arguments)


def start(stage: Stage, options: TaskModel, tokenizer: Tokenizer, method: Method) -> Started:
    """The model of a stage, filled from `options.weights` as the reference's `load_pretrained` of that stage
    does."""
    started = make(stage, options, tokenizer, method)
    if options.weights.model:
        models.start_from(started.model, options.weights.model)
    return started


def job(
    recipe: Training,
    data: Data,
    started: Started,
    task: nn.Module,
    streams: Callable[[], Mapping[str, Stream]],
    optimizer: Optimizer,
    *,
    measure: evaluation.Measure | None = None,
    val: Any | None = None,
    test: Any | None = None,
    select: str = "val",
    momentum: Mapping[str, nn.Module] | None = None,
    **settings: Any,
) -> Job:
    """A task with one stream: `measure` is taken on `val` while training, and on `test` of the selected
    model.

    `select`: the split that `val` is called in names of numbers. `momentum`, `settings`: what else the export
        holds, see `exporter`.
    """
    return Job(
        task=task,
        streams=streams,
        mixing=ALWAYS,
        optimizer=optimizer,
        learning_rate=learning_rate(recipe),
        evaluate=evaluation.while_training(measure, select, val),
        export=exporter(
            started.model,
            name=started.name,
            arguments=started.arguments,
            data=data,
            momentum=momentum,
            **settings,
        ),
        test=evaluation.of_export(measure, "test", test),
    )
