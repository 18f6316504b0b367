"""Learning-rate schedules as pure functions of the step; they return a factor on the base rate."""

import math
from collections.abc import Callable
from functools import partial
from typing import Literal


def warmup_steps(warmup: int | float, total_steps: int) -> int:
    """A number of steps as it is; a float is a fraction of `total_steps`, cut to whole steps."""
    return int(warmup * total_steps) if isinstance(warmup, float) else warmup


def linear(step: int, *, warmup: int | float, total_steps: int) -> float:
    """0 -> 1 over the warm-up, then 1 -> 0 at `total_steps`, for step 0, 1, ...; the first step has factor 0
    when there is a warm-up.

    `warmup`: steps, or a float in 0..1 as a fraction of `total_steps`. Source: X-VLM `scheduler.py`.
    """
    warm = warmup_steps(warmup, total_steps)
    if step < warm:
        return step / max(1, warm)
    return max(0.0, (total_steps - step) / max(1, total_steps - warm))


def cosine(step: int, *, warmup: int | float, total_steps: int, floor: float = 0.0) -> float:
    """0 -> 1 linearly over the warm-up, then half a cosine from 1 to `floor` at `total_steps`."""
    warm = warmup_steps(warmup, total_steps)
    if step < warm:
        return step / max(1, warm)
    progress = min(1.0, (step - warm) / max(1, total_steps - warm))
    return floor + (1 - floor) * (1 + math.cos(math.pi * progress)) / 2


def constant(step: int, *, warmup: int | float, total_steps: int) -> float:
    """0 -> 1 linearly over the warm-up, then 1."""
    warm = warmup_steps(warmup, total_steps)
    return step / warm if step < warm else 1.0


def epoch_cosine(
    step: int, *, steps_per_epoch: int, epochs: int, warmup: int, start: float, floor: float
) -> float:
    """ALBEF's and ViCHA's: a staircase in epoch 0, then half a cosine that stays constant within each epoch.

    In epoch 0 the factor begins at `start` and rises to 1 in `warmup` equal steps, one after each 100 updates
    (the first when update 100 is done, so it counts from update 101 on). An epoch of fewer updates cuts the
    warm-up off. In epoch e >= 1 it is floor + (1 - floor) (1 + cos(pi e / epochs)) / 2; `floor` itself is
    reached only after the last epoch.

    Args:
        step: Update, counted from 0.
        steps_per_epoch: Updates in an epoch.
        epochs: Epochs of the whole run.
        warmup: Steps of the staircase (the configs call it warmup_epochs); 0 begins at 1.
        start: First factor (warmup_lr / lr).
        floor: Factor after the last epoch (min_lr / lr).

    Raises:
        ValueError: Numbers of updates or epochs below 1, or a negative step or warm-up.

    Source: ALBEF `scheduler/cosine_lr.py` and the loops of ViCHA's `Pretrain.py`.
    """
    if steps_per_epoch < 1 or epochs < 1 or warmup < 0 or step < 0:
        raise ValueError(
            f"steps_per_epoch={steps_per_epoch} and epochs={epochs} must be at least 1, warmup={warmup} "
            f"and step={step} at least 0"
        )
    epoch, update = divmod(step, steps_per_epoch)
    if epoch:
        return floor + (1 - floor) * (1 + math.cos(math.pi * min(epoch, epochs) / epochs)) / 2
    done = max(update - 1, 0) // 100
    return 1.0 if done >= warmup else start + done * (1 - start) / warmup


def named(
    kind: Literal["linear", "cosine", "constant"], *, warmup: int | float, total_steps: int
) -> Callable[[int], float]:
    """The schedule of that name as a function of the step alone. Raises `ValueError` for a name that is not
    known."""
    schedules = {"linear": linear, "cosine": cosine, "constant": constant}
    if kind not in schedules:
        raise ValueError(f"schedule {kind!r} is not known; choose among {', '.join(schedules)}")
    return partial(schedules[kind], warmup=warmup, total_steps=total_steps)
