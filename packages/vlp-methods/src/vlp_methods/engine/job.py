"""What a method hands to the engine: a task, its data streams, how they mix, an optimizer."""

import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol

import torch
from torch import nn
from torch.optim import Optimizer


class Batch(Protocol):
    """A batch: a dataclass of tensors."""

    keys: tuple[str, ...]
    """Identifiers of its samples, named when a loss is not finite."""

    def to(self, device: Any) -> "Batch":
        """The batch on a device."""
        ...


class Stream(Protocol):
    """An endless source of this rank's batches; `vlp_data.loader.Loader` is one."""

    position: int
    """Samples given out so far, over all ranks."""

    @property
    def length(self) -> int:
        """Samples of one pass."""
        ...

    @property
    def global_batch(self) -> int:
        """Samples of one batch, over all ranks."""
        ...

    def __iter__(self) -> Iterator[Any]: ...

    def state_dict(self) -> dict[str, Any]:
        """JSON-serialisable; position and counters, the same for any number of ranks."""
        ...

    def load_state_dict(self, state: dict[str, Any]) -> None: ...


@dataclass(frozen=True)
class Mixing:
    """Which streams run at a step, in order: a pure function of (seed, step), so all ranks and a resumed run
    agree.

    `Mixing((("regions", 0.5), ("images", 1.0)))` runs regions with probability 0.5, then images always. Every
    stream that runs makes one update of its own. `Mixing.one_of({"caption": 3, "detect": 1})` runs exactly
    one stream per step, at random by these ratios.
    """

    streams: tuple[tuple[str, float], ...]
    rule: Literal["each", "one"] = "each"

    def __post_init__(self) -> None:
        shares = [share for _, share in self.streams]
        if len({name for name, _ in self.streams}) != len(self.streams) or not self.streams:
            raise ValueError(f"streams={self.streams} must be one or more streams with different names")
        if self.rule == "each" and (max(shares) != 1 or min(shares) < 0):
            raise ValueError(
                f"streams={self.streams}: probabilities are in [0, 1] and one of them is 1: every step trains"
            )
        if self.rule == "one" and (min(shares) < 0 or sum(shares) <= 0):
            raise ValueError(f"streams={self.streams}: ratios must not be negative, one must be positive")

    @classmethod
    def one_of(cls, ratios: Mapping[str, float]) -> "Mixing":
        """Exactly one stream per step, drawn by ratio."""
        return cls(tuple(ratios.items()), rule="one")

    def shares(self) -> dict[str, float]:
        """Share of the steps in which each stream runs."""
        total = sum(share for _, share in self.streams) if self.rule == "one" else 1.0
        return {name: share / total for name, share in self.streams}

    def names(self, seed: int, step: int) -> tuple[str, ...]:
        """Streams of a step (counted from 0)."""
        rng = random.Random(f"mixing {seed} {step}")
        if self.rule == "one":
            return (rng.choices([name for name, _ in self.streams], [share for _, share in self.streams])[0],)
        return tuple(name for name, share in self.streams if rng.random() < share)


@dataclass(frozen=True, kw_only=True)
class FrozenFrom:
    """Frozen weights, and the file that the builder of a job has read them from."""

    prefix: str
    """Their names in the task begin with this."""
    file: Path
    """File, or folder of files."""


@dataclass(frozen=True, kw_only=True)
class Job:
    """A task ready to train.

    `task(batch)` returns named scalar losses, already weighted; their sum is minimised. It runs under DDP:
    every trainable parameter takes part in every forward, or is named in `unused`, and buffers are kept equal
    on all ranks by the task itself. A task may have `before_forward(step)` and
    `after_update(step)` (momentum copies, queues, clamps), called around each update with the step counted
    from 0; both run on the bare module. Everything that must survive a restart is a parameter or buffer.
    """

    task: nn.Module
    streams: Callable[[], Mapping[str, Stream]]
    """Opens the data: called once when training starts, so that an export needs no data. Keys are those of
    `mixing`."""
    mixing: Mixing
    optimizer: Optimizer
    """With the peak learning rate of each group as its `lr`."""
    learning_rate: Callable[[int], float] | None = None
    """Factor on the peak learning rates at a step (counted from 0); None: that of `recipe.schedule`. Groups
    of the optimizer with a "schedule" follow that of this name in `recipe.schedules`."""
    unused: Mapping[str, Sequence[nn.Parameter]] = field(default_factory=dict)
    """Parameters that the batches of a stream have no part in: an update of that stream leaves them alone, as
    if they had no gradient (no decay, no moments). Streams that use everything are left out."""
    eval_mode: tuple[nn.Module, ...] = ()
    """Modules that stay in evaluation mode while training, such as a teacher: no dropout, running statistics
    kept."""
    frozen_from: tuple[FrozenFrom, ...] = ()
    """Where frozen weights came from. They are not written into checkpoints; the checksum of the file is."""
    evaluate: Callable[[nn.Module, int, Path], Mapping[str, float]] | None = None
    """`evaluate(task, step, folder)`: numbers by name. Called on every rank in eval mode without gradient;
    what rank 0 returns counts. May write into `folder`, which exists on rank 0."""
    export: Callable[[Path], None] | None = None
    """Writes a folder that `vlp_core.models.load` reads (called on rank 0; the folder exists and is
    empty)."""
    test: Callable[[Path, torch.device, Path], Mapping[str, float]] | None = None
    """`test(export, device, folder)`: numbers by name of the model that `export` wrote: the best one where
    `evaluate.best` selects it, else the last. Called once, after the last step, on every rank without
    gradient; otherwise as `evaluate`. So test data selects nothing."""

    def __post_init__(self) -> None:
        assert self.test is None or self.export is not None, "a test measures an exported model"
        streams = [name for name, _ in self.mixing.streams]
        if strange := set(self.unused) - set(streams):
            raise ValueError(f"unused: {sorted(strange)} are not streams; known: {', '.join(streams)}")

    def training_mode(self) -> None:
        """Put the task into training mode, but for the modules of `eval_mode`."""
        self.task.train()
        for module in self.eval_mode:
            module.eval()
