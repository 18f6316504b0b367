"""Early stopping: when has an evaluation not improved for too long?"""

from collections.abc import Mapping
from typing import Any

from vlp_methods.engine.options import EvaluateOptions


class Patience:
    """Counts evaluations in a row without improvement of `evaluate.best`."""

    def __init__(self, options: EvaluateOptions) -> None:
        self.options = options
        self.best: float | None = None
        """The value that an evaluation has to better."""
        self.failed = 0
        """Evaluations since then."""

    def see(self, scores: Mapping[str, float]) -> None:
        """Take the numbers of an evaluation into account. NaN is no improvement."""
        if self.options.best is None:
            return
        value = scores[self.options.best]
        gain = None
        if self.best is not None:
            gain = value - self.best if self.options.better == "higher" else self.best - value
        if value == value and (gain is None or (gain > 0 and gain >= self.options.least_gain)):
            self.best, self.failed = value, 0
        else:
            self.failed += 1

    @property
    def exhausted(self) -> bool:
        """Whether to stop."""
        return self.options.patience is not None and self.failed >= self.options.patience

    def state_dict(self) -> dict[str, Any]:
        return {"number": [self.options.best, self.options.better], "best": self.best, "failed": self.failed}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        if state["number"] == [self.options.best, self.options.better]:  # else another one is watched now
            self.best, self.failed = state["best"], state["failed"]
