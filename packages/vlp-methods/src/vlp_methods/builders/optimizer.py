"""From the optimizer and schedule sections of a recipe to an optimizer and a learning rate."""

import math
from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import nn
from torch.optim import Optimizer
from vlp_core import schedule
from vlp_core.optim import AdamW, ParameterRule, parameter_groups

from vlp_methods.engine.options import EpochSchedule, OptimizerOptions, Training


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
