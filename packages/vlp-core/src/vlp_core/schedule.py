"""Learning-rate schedules as pure functions of the step; they return a factor on the base rate."""

import math
from collections.abc import Callable
from functools import partial
from typing import Literal

Edge = Literal["first", "before"]


def share_of(steps: int | float, total_steps: int) -> int:
    """A number of steps as it is; a float is a fraction of `total_steps`, cut to whole steps."""
    return int(steps * total_steps) if isinstance(steps, float) else steps


def _warming(step: int, warm: int, start: float, edge: Edge) -> float:
    """Factor within a warm-up of `warm` steps."""
    done = step if edge == "first" else step + 1
    return start + (1 - start) * (done / max(1, warm))


def linear(
    step: int,
    *,
    warmup: int | float,
    total_steps: int,
    start: float = 0.0,
    edge: Edge = "first",
    floor: float = 0.0,
) -> float:
    """Up over the warm-up, then in a line from 1 to `floor` at `total_steps`, for step 0, 1, ...

    Args:
        step: Update, counted from 0.
        warmup: Steps, or a float in 0..1 as a fraction of `total_steps`.
        total_steps: Updates of the whole run.
        start: Factor at the start of the warm-up.
        edge: Which step has the factor `start`: the "first", or the one "before" it, so that the last step of
            the warm-up has factor 1.
        floor: Factor at `total_steps` and after.

    Source: X-VLM `scheduler.py`.
    """
    warm = share_of(warmup, total_steps)
    if step < warm:
        return _warming(step, warm, start, edge)
    return floor + (1 - floor) * max(0.0, (total_steps - step) / max(1, total_steps - warm))


def cosine(
    step: int,
    *,
    warmup: int | float,
    total_steps: int,
    start: float = 0.0,
    edge: Edge = "first",
    floor: float = 0.0,
) -> float:
    """Up over the warm-up, then half a cosine from 1 to `floor` at `total_steps`, step by step; arguments as
    `linear`.

    Source: MAE `util/lr_sched.py`; open_clip `scheduler.py` with edge "before".
    """
    warm = share_of(warmup, total_steps)
    if step < warm:
        return _warming(step, warm, start, edge)
    progress = min(1.0, (step - warm) / max(1, total_steps - warm))
    return floor + (1 - floor) * (1 + math.cos(math.pi * progress)) / 2


def polynomial(
    step: int,
    *,
    warmup: int | float,
    total_steps: int,
    start: float = 0.0,
    edge: Edge = "first",
    floor: float = 0.0,
    power: float = 1.0,
) -> float:
    """Up over the warm-up, then floor + (1 - floor) (1 - share of the steps left behind)^power; arguments as
    `linear`.

    Source: `get_polynomial_decay_schedule_with_warmup` of transformers, as ViLT and VLC use it.
    """
    warm = share_of(warmup, total_steps)
    if step < warm:
        return _warming(step, warm, start, edge)
    progress = min(1.0, (step - warm) / max(1, total_steps - warm))
    return floor + (1 - floor) * (1 - progress) ** power


def constant(
    step: int,
    *,
    warmup: int | float,
    total_steps: int,
    start: float = 0.0,
    edge: Edge = "first",
    cooldown: int | float = 0,
    floor: float = 0.0,
    power: float = 1.0,
) -> float:
    """Up over the warm-up, then 1, and over the last `cooldown` steps (or this fraction of all steps) down to
    `floor` as `polynomial`; other arguments as `linear`.

    Source: open_clip `scheduler.py`, `const_lr_cooldown`.
    """
    warm, cool = share_of(warmup, total_steps), share_of(cooldown, total_steps)
    if step < warm:
        return _warming(step, warm, start, edge)
    done = step - (total_steps - cool)
    if cool == 0 or done < 0:
        return 1.0
    return floor + (1 - floor) * (1 - min(1.0, done / cool)) ** power


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
            f"steps_per_epoch={steps_per_epoch} and epochs={epochs} must be at least 1, "
            f"warmup={warmup} and step={step} at least 0"
        )
    epoch, update = divmod(step, steps_per_epoch)
    if epoch:
        return floor + (1 - floor) * (1 + math.cos(math.pi * min(epoch, epochs) / epochs)) / 2
    done = max(update - 1, 0) // 100
    return 1.0 if done >= warmup else start + done * (1 - start) / warmup


def named(
    kind: Literal["linear", "cosine", "polynomial", "constant"],
    *,
    warmup: int | float,
    total_steps: int,
    **shape: float | Edge,
) -> Callable[[int], float]:
    """The schedule of that name as a function of the step alone; `shape` holds what else it takes.

    Raises `ValueError` for a name that is not known.
    """
    schedules: dict[str, Callable[..., float]] = {
        "linear": linear,
        "cosine": cosine,
        "polynomial": polynomial,
        "constant": constant,
    }
    if kind not in schedules:
        raise ValueError(f"schedule {kind!r} is not known; choose among {', '.join(schedules)}")
    return partial(schedules[kind], warmup=warmup, total_steps=total_steps, **shape)
