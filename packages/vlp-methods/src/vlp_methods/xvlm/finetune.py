"""What the tasks of X-VLM after pre-training have in common beside `vlp_methods.builders`."""

from torch import nn
from vlp_core.optim import ParameterRule

from vlp_methods.engine.options import Training
from vlp_methods.xvlm.rules import parameter_rules


def rules(recipe: Training, model: nn.Module) -> list[ParameterRule]:
    """Rules of the optimizer's parameter groups; `optimizer.lr_scale` holds for the parts of `model` that
    pre-training has no values for.

    Raises:
        ValueError: There is no such part, so the factor could not take effect.
    """
    scale = recipe.optimizer.lr_scale
    found = parameter_rules(model, fresh_lr_scale=scale, as_released=False)
    if scale != 1 and all(rule.lr_scale is None for rule in found):
        raise ValueError(
            f"optimizer.lr_scale={scale}: no part of the model of task {recipe.task} starts without "
            "pre-trained values; leave it at 1"
        )
    return found
