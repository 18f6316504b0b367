"""What the tasks of X-VLM after pre-training have in common beside `vlp_methods.parts.finetune`."""

from torch import nn
from torch.optim import Optimizer
from vlp_core.models.xvlm.rules import parameter_rules

from vlp_methods.engine.options import Training
from vlp_methods.parts.assembly import adamw


def optimizer(recipe: Training, model: nn.Module) -> Optimizer:
    """The optimizer of a recipe; `optimizer.lr_scale` holds for the parts of `model` that pre-training has no
    values for.

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
