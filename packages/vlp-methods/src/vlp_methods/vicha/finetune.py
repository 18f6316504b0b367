"""What the tasks of ViCHA after pre-training have in common beside `vlp_methods.parts.finetune`."""

from torch import nn
from torch.optim import Optimizer
from vlp_core import models
from vlp_core.models.vicha.rules import parameter_rules
from vlp_core.momentum import FeatureQueue

from vlp_methods.engine.options import Training
from vlp_methods.parts.assembly import adamw
from vlp_methods.parts.momentum import Momentum


def optimizer(recipe: Training, model: nn.Module) -> Optimizer:
    """The optimizer of a recipe."""
    return adamw(model, recipe.optimizer, parameter_rules())


def load(
    model: nn.Module, checkpoint: str, momentum: Momentum | None = None, queue: FeatureQueue | None = None
) -> None:
    """Fill a task's model, and what of a teacher and a queue the checkpoint holds."""
    if checkpoint:
        teacher = None if momentum is None else momentum.teacher
        models.start_from(model, checkpoint, teacher=teacher, queue=queue)
