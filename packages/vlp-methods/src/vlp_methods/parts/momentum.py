"""The momentum teacher of a task, and when it moves."""

from collections.abc import Iterable
from typing import Any

from torch import nn
from vlp_core.momentum import follow, teacher_of

from vlp_methods.parts.teacher import QueueTeacher, Teacher


class Momentum(nn.Module):
    """Holds the teacher of a model, so that checkpoints have it, and how much the model takes from it at a
    step.

    `before_forward` is called once per update, whatever the number of batches in it: the teacher moves first
    and teaches then, as in the reference's forward.
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
