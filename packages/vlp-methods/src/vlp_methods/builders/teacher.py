"""The momentum teacher of a task: what it is, when it moves, and the base of tasks that have one."""

from collections.abc import Iterable
from typing import Any

from torch import nn
from vlp_core.momentum import FeatureQueue, follow, teacher_of

from vlp_methods.sections.teacher import QueueTeacher, Teacher


class Momentum(nn.Module):
    """Holds the teacher of a model, so that checkpoints have it, and how much the model takes from it at a
    step.

    `before_forward` is called once per update, whatever the number of batches in it: the teacher moves first
    and teaches then, as in the reference's forward.

    Args:
        model: Model that the teacher is a copy of.
        options: Of the recipe.
        without: Parts of the model that the teacher does not need.
    """

    def __init__(
        self, model: nn.Module, options: Teacher | QueueTeacher, *, without: Iterable[str] = ()
    ) -> None:
        super().__init__()
        self.teacher: Any = teacher_of(model, without=without)
        self.options = options
        self.alpha = 0.0
        """Weight of the teacher at this step: a function of the step, so nothing that a checkpoint needs."""

    def before_forward(self, model: nn.Module, step: int) -> None:
        """Set alpha for a step (counted from 0) and move the teacher towards `model`."""
        rise = min(1.0, step / self.options.ramp_steps) if self.options.ramp_steps else 1.0
        self.alpha = self.options.alpha * rise
        follow(self.teacher, model, self.options.momentum)


def momentum_of(model: nn.Module, options: Teacher | None) -> Momentum | None:
    """The teacher that a recipe asks for, or None."""
    return None if options is None else Momentum(model, options)


class TaughtTask(nn.Module):
    """A task with a model that may have a teacher, and a queue of the teacher's features.

    Args:
        model: Model.
        momentum: Teacher; None: none.
        queue: Queue; None: none.
    """

    def __init__(self, model: Any, momentum: Momentum | None, queue: FeatureQueue | None = None) -> None:
        super().__init__()
        self.model = model
        self.momentum = momentum
        self.queue = queue

    def before_forward(self, step: int) -> None:
        """The engine calls it before each update."""
        if self.momentum is not None:
            self.momentum.before_forward(self.model, step)

    def started_teacher(self) -> nn.Module | None:
        """The teacher that a checkpoint fills; None where there is none, or it keeps its initial values."""
        return None if self.momentum is None else self.momentum.teacher
