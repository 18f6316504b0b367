"""Options that every recipe has, whatever its method. Imports no torch.

A method's schema is a frozen keyword-only dataclass that extends `Training` by its own sections (`model`,
`data`, loss weights).
"""

from dataclasses import dataclass, field
from typing import ClassVar, Literal


@dataclass(frozen=True, kw_only=True)
class OptimizerOptions:
    """AdamW."""

    variant: Literal["transformers", "torch"] = "transformers"
    """Whose: that of transformers before 5.0 (X-VLM), or `torch.optim.AdamW` (ALBEF, ViCHA), which adds eps
    to the corrected root and decays before the update."""
    lr: float
    """Peak learning rate."""
    weight_decay: float = 0.01
    """Decoupled weight decay."""
    betas: tuple[float, float] = (0.9, 0.999)
    """Decay of the running mean and the running square of the gradient."""
    eps: float = 1e-8
    """Added to the root of the running square."""
    lr_scale: float = 1.0
    """Factor on lr for newly initialised parts; the method says which."""

    def __post_init__(self) -> None:
        if not self.lr > 0:
            raise ValueError(f"lr={self.lr} must be positive")
        if not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError(f"betas={list(self.betas)} must be in [0, 1)")


@dataclass(frozen=True, kw_only=True)
class ScheduleOptions:
    """Learning rate as a function of the step: linear warm-up from 0, then `kind` over the remaining
    steps."""

    kind: Literal["linear", "cosine", "constant"] = "linear"
    """Shape after the warm-up: down to 0 in a line, in half a cosine, or not at all."""
    warmup_steps: int | float = 0
    """Steps of warm-up; a float such as 0.1 is a fraction of all steps."""

    def __post_init__(self) -> None:
        if isinstance(self.warmup_steps, float) and not 0 <= self.warmup_steps < 1:
            raise ValueError(
                f"warmup_steps={self.warmup_steps} is a float, so a fraction in [0, 1); a count is an integer"
            )
        if self.warmup_steps < 0:
            raise ValueError(f"warmup_steps={self.warmup_steps} must not be negative")

    def warmup(self, steps: int) -> int:
        """Warm-up steps of a run of `steps` (a fraction is truncated, as X-VLM does)."""
        return int(self.warmup_steps * steps) if isinstance(self.warmup_steps, float) else self.warmup_steps


@dataclass(frozen=True, kw_only=True)
class EpochSchedule:
    """Learning rate in epochs, as ALBEF and ViCHA set it: warm-up in stairs of 100 steps within the first
    epoch, then half a cosine that falls once per epoch."""

    kind: Literal["epochs"] = "epochs"
    """Marks this schedule."""
    steps_per_epoch: int
    """Length of an epoch; the last one of a run may be shorter."""
    warmup_steps: int
    """Steps of warm-up, a multiple of 100 (100 * `warmup_epochs` of the official configs); cut off at the end
    of the first epoch."""
    warmup_lr: float
    """Learning rate of the first step."""
    min_lr: float
    """Where the cosine would end after the last epoch."""

    def __post_init__(self) -> None:
        if self.steps_per_epoch < 1:
            raise ValueError(f"steps_per_epoch={self.steps_per_epoch} must be at least 1")
        if self.warmup_steps < 100 or self.warmup_steps % 100:
            raise ValueError(
                f"warmup_steps={self.warmup_steps} must be a multiple of 100: the rate rises once in 100 steps"
            )
        if self.warmup_lr < 0 or self.min_lr < 0:
            raise ValueError(f"warmup_lr={self.warmup_lr} and min_lr={self.min_lr} must not be negative")

    def warmup(self, steps: int) -> int:
        """Warm-up steps of a run of `steps`."""
        return min(self.warmup_steps, self.steps_per_epoch, steps)


@dataclass(frozen=True, kw_only=True)
class SaveOptions:
    """When to write checkpoints and which to keep."""

    every: int = 1000
    """Steps between checkpoints; the last step is always saved."""
    keep: int = 2
    """Newest checkpoints that stay."""
    keep_every: int | None = None
    """Checkpoints at multiples of this many steps stay for good."""

    def __post_init__(self) -> None:
        if self.every < 1 or self.keep < 1 or (self.keep_every is not None and self.keep_every < 1):
            raise ValueError("every, keep and keep_every must be at least 1")


@dataclass(frozen=True, kw_only=True)
class ReportOptions:
    """When and where to report losses and rates."""

    every: int = 50
    """Steps between reports; a report shows means over these steps."""
    tensorboard: bool = False
    """Also write TensorBoard events into RUN/tensorboard (needs the extra vlp-methods[tensorboard])."""
    wandb: str | None = None
    """Also send to this Weights & Biases project (needs the extra vlp-methods[wandb])."""

    def __post_init__(self) -> None:
        if self.every < 1:
            raise ValueError(f"every={self.every} must be at least 1")


@dataclass(frozen=True, kw_only=True)
class EvaluateOptions:
    """When to evaluate, and which number decides what is best."""

    every: int | None = None
    """Steps between evaluations; null evaluates at the end only."""
    best: str | None = None
    """Number of the evaluation to watch: the model with the best one is exported to RUN/export-best."""
    better: Literal["higher", "lower"] = "higher"
    """Which direction of `best` is better."""

    def __post_init__(self) -> None:
        if self.every is not None and self.every < 1:
            raise ValueError(f"every={self.every} must be at least 1, or null for the end only")


@dataclass(frozen=True, kw_only=True)
class LossScaleOptions:
    """Loss scaling, which precision fp16 needs and the others do not have."""

    initial: float = 65536.0
    """First scale; halved when a gradient overflows (that update is skipped)."""
    growth_steps: int = 2000
    """Updates without overflow after which the scale doubles."""

    def __post_init__(self) -> None:
        if not self.initial > 0 or self.growth_steps < 1:
            raise ValueError(
                f"initial={self.initial} must be positive and growth_steps={self.growth_steps} at least 1"
            )


@dataclass(frozen=True, kw_only=True)
class Training:
    """What the engine reads; every task's recipe has these keys."""

    free: ClassVar[tuple[str, ...]] = (
        "about",
        "steps",
        "save",
        "report",
        "evaluate",
        "device",
        "workers",
        "compile",
    )
    """Keys (with all below them) that a resumed run may change without `--allow-change`."""

    method: str
    """Name of the method, an entry point in group vlp.methods."""
    task: str
    """Task of the method."""
    about: str
    """One line for `vlp-train ls`."""
    seed: int = 0
    """Everything random follows from it: initial weights, data order, augmentation, masking, dropout, mixing
    of streams."""
    steps: int
    """Steps of the run."""
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    """Autocast of the forward pass; parameters and optimizer state stay fp32. fp16 adds loss scaling and one
    wait for the device per step."""
    loss_scale: LossScaleOptions = field(default_factory=LossScaleOptions)
    """Loss scaling of fp16."""
    accumulate: int = 1
    """Batches per update of each stream, averaged; multiplies the effective batch."""
    clip_norm: float | None = None
    """Largest global norm of the gradient; null does not clip."""
    optimizer: OptimizerOptions
    """Optimizer."""
    schedule: ScheduleOptions | EpochSchedule = field(default_factory=ScheduleOptions)
    """Learning-rate schedule."""
    save: SaveOptions = field(default_factory=SaveOptions)
    """Checkpoints."""
    report: ReportOptions = field(default_factory=ReportOptions)
    """Reports."""
    evaluate: EvaluateOptions = field(default_factory=EvaluateOptions)
    """Evaluation during training."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto takes the GPU if there is one."""
    workers: int = 2
    """Loader processes per rank; 0 loads in the training process. Has no influence on the numbers."""
    compile: bool = False
    """torch.compile on the task's forward."""
    tf32: bool = False
    """Allow TF32 in fp32 matrix products and convolutions on GPUs."""
    deterministic: bool = False
    """Deterministic kernels only: bit-for-bit repeatable on GPUs, slower; an operation without such a kernel
    stops the run."""

    def __post_init__(self) -> None:
        if self.steps < 1 or self.accumulate < 1 or self.workers < 0:
            raise ValueError("steps and accumulate must be at least 1, workers at least 0")
        if self.precision != "fp16" and self.loss_scale != LossScaleOptions():
            raise ValueError(
                "loss_scale: only precision=fp16 scales the loss; leave it out or set precision=fp16"
            )
        if self.clip_norm is not None and not self.clip_norm > 0:
            raise ValueError(f"clip_norm={self.clip_norm} must be positive, or null for no clipping")
