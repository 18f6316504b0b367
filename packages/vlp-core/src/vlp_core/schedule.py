"""Learning-rate schedules as pure functions of the step; they return a factor on the base rate."""

import math
from collections.abc import Callable
from functools import partial
from typing import Literal


def warmup_steps(warmup: int | float, total_steps: int) -> int:
    """A number of steps as it is; a float is a fraction of `total_steps`, cut to whole steps."""
    return int(warmup * total_steps) if isinstance(warmup, float) else warmup


def linear(step: int, *, warmup: int | float, total_steps: int) -> float:
    """0 -> 1 over the warm-up, then 1 -> 0 at `total_steps`, for step 0, 1, ...; the first step has factor 0 when there is a warm-up.

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


def named(
    kind: Literal["linear", "cosine", "constant"], *, warmup: int | float, total_steps: int
) -> Callable[[int], float]:
    """The schedule of that name as a function of the step alone. Raises `ValueError` for a name that is not known."""
    schedules = {"linear": linear, "cosine": cosine, "constant": constant}
    if kind not in schedules:
        raise ValueError(f"schedule {kind!r} is not known; choose among {', '.join(schedules)}")
    return partial(schedules[kind], warmup=warmup, total_steps=total_steps)
