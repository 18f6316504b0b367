"""How a recipe speaks of a momentum teacher. Imports no torch."""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class _Momentum:
    """A copy of the model that follows it slowly, and what the model takes from it (ViCHA specification 2.5,
    3.6)."""

    momentum: float = 0.995
    """Share of itself that the teacher keeps at every update."""
    alpha: float = 0.4
    """Weight of what the teacher believes in the targets."""
    ramp_steps: int = 0
    """Steps over which alpha rises from 0 in a line (the first epoch where the official configs say
    `warm_up`); 0: it is `alpha` from the start."""

    def __post_init__(self) -> None:
        for name in ("momentum", "alpha"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name}={getattr(self, name)} must lie in 0..1")
        if self.ramp_steps < 0:
            raise ValueError(f"ramp_steps={self.ramp_steps} must not be negative")
        if self.ramp_steps and not self.alpha:
            raise ValueError(f"ramp_steps={self.ramp_steps} has no effect with alpha=0; leave it at 0")


@dataclass(frozen=True, kw_only=True)
class Teacher(_Momentum):
    """A momentum teacher whose answers are learned beside the labels."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.alpha:
            raise ValueError("alpha=0 would run a teacher in vain; teacher=null trains without one")


@dataclass(frozen=True, kw_only=True)
class QueueTeacher(_Momentum):
    """A momentum teacher whose features, of this batch and of earlier ones, are what contrastive losses
    compare with.

    With alpha=0 they still are; nothing else is taken from it then (`distill: False`).
    """

    queue: int = 65536
    """Latest pairs of features, of all ranks, that are kept."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.queue < 1:
            raise ValueError(f"queue={self.queue} must be at least 1")
