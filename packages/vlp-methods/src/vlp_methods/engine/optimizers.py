"""From the sections of a recipe to an optimizer and its learning rates."""

import math
from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import nn
from torch.optim import Optimizer
from vlp_core import optim, schedule
from vlp_core.optim import ParameterRule, layer_rules, parameter_groups

from vlp_methods.engine.job import Job
from vlp_methods.engine.options import (
    EpochSchedule,
    OptimizerOptions,
    ScheduleOptions,
    Training,
    in_steps,
)


def make_optimizer(
    model: nn.Module, options: OptimizerOptions, rules: Sequence[ParameterRule] = ()
) -> Optimizer:
    """The optimizer of a recipe over all trainable parameters of `model`.

    `rules` are the method's own. Those of the recipe come first, then its layer decay: the first that says
    something about a parameter counts.

    Raises:
        ValueError: A rule or pattern finds nothing, or there is nothing to train.
    """
    own = [
        ParameterRule(
            pattern=rule.pattern,
            below_axes=rule.below_axes,
            decay=rule.decay,
            lr_scale=rule.lr_scale,
            schedule=rule.schedule,
        )
        for rule in options.rules
    ]
    for layers in options.layer_decay:
        own += layer_rules(model, rate=layers.rate, blocks=layers.blocks, first=layers.first)
    groups = parameter_groups(model, lr=options.lr, weight_decay=options.weight_decay, rules=[*own, *rules])
    if options.variant == "transformers":
        return optim.AdamW(groups, betas=options.betas, eps=options.eps)
    if options.variant == "torch":
        return torch.optim.AdamW(groups, betas=options.betas, eps=options.eps, fused=True)
    if options.variant == "sgd":
        return torch.optim.SGD(groups, momentum=options.momentum or 0.0, nesterov=bool(options.nesterov))
    if options.variant == "adafactor":
        return torch.optim.Adafactor(groups)
    return optim.MuonAndAdamW(
        groups,
        betas=options.betas,
        eps=options.eps,
        momentum=0.95 if options.momentum is None else options.momentum,
        nesterov=options.nesterov is not False,
        not_muon=options.not_muon,
    )


def factor(options: ScheduleOptions | EpochSchedule, *, steps: int, lr: float) -> Callable[[int], float]:
    """A schedule as factor on the peak rates at a step, for a run of `steps` with the peak rate `lr`."""
    if isinstance(options, EpochSchedule):
        return partial(
            schedule.epoch_cosine,
            steps_per_epoch=in_steps(options.steps_per_epoch),
            epochs=math.ceil(steps / in_steps(options.steps_per_epoch)),
            warmup=options.warmup_steps // 100,
            start=options.warmup_lr / lr,
            floor=options.min_lr / lr,
        )
    shape: dict[str, float | schedule.Edge] = {}
    if options.warmup_lr:
        shape["start"] = options.warmup_lr / lr
    if options.warmup_edge != "first":
        shape["edge"] = options.warmup_edge
    if options.min_lr:
        shape["floor"] = options.min_lr / lr
    if options.power != 1:
        shape["power"] = options.power
    if options.cooldown_steps:
        shape["cooldown"] = options.cooldown(steps)
    return schedule.named(options.kind, warmup=options.warmup(steps), total_steps=steps, **shape)


def learning_rate(recipe: Training) -> Callable[[int], float]:
    """Factor on the peak learning rates at a step of a recipe whose length is a number of steps."""
    return factor(recipe.schedule, steps=in_steps(recipe.steps), lr=recipe.optimizer.lr)


class Rates:
    """The learning rates of all groups of an optimizer, a pure function of the step."""

    def __init__(self, job: Job, recipe: Training) -> None:
        # Not the groups themselves: an optimizer that loads its state has new ones.
        self.optimizer = job.optimizer
        groups = job.optimizer.param_groups
        self.peaks = [group["lr"] for group in groups]
        usual = job.learning_rate or learning_rate(recipe)
        named = {
            name: factor(options, steps=in_steps(recipe.steps), lr=recipe.optimizer.lr)
            for name, options in recipe.schedules.items()
        }
        self.factors = [named.get(group.get("schedule"), usual) for group in groups]

    def at(self, step: int) -> list[float]:
        """The rate of each group at a step, counted from 0."""
        return [peak * factor(step) for peak, factor in zip(self.peaks, self.factors, strict=True)]

    def set(self, step: int) -> None:
        """Give all groups the rate of a step."""
        for group, rate in zip(self.optimizer.param_groups, self.at(step), strict=True):
            group["lr"] = rate
