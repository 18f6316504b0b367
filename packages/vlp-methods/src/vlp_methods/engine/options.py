"""Options that every recipe has, whatever its method. Imports no torch.

A method's schema is a frozen keyword-only dataclass that extends `Training` by its own sections (`model`,
`data`, loss weights).
"""

import re
from dataclasses import dataclass, field
from typing import ClassVar, Literal


@dataclass(frozen=True, kw_only=True)
class Length:
    """A number of steps in another unit: `{epochs: 3}` or `{samples: 1e6}`. What it comes to is said at the
    start of a run."""

    epochs: float | None = None
    """Passes over the stream."""
    samples: int | None = None
    """Samples of the stream, over all ranks."""
    of: str | None = None
    """Stream that is counted; null: the first that every step trains on, or the first of all."""

    def __post_init__(self) -> None:
        given = [value for value in (self.epochs, self.samples) if value is not None]
        if len(given) != 1 or not given[0] > 0:
            raise ValueError("give either epochs or samples, more than 0; a plain integer counts steps")


def _at_least_one(**lengths: int | Length | None) -> None:
    for name, value in lengths.items():
        if isinstance(value, int) and value < 1:
            raise ValueError(f"{name}={value} must be at least 1")


@dataclass(frozen=True, kw_only=True)
class RuleOptions:
    """What holds for some parameters. The first rule that says something about a parameter counts; rules of
    a recipe come before those of its method."""

    pattern: str = ""
    """Regular expression, searched in names of parameters; empty: all."""
    below_axes: int | None = None
    """Only parameters with fewer axes than this: 2 takes biases, norms and single numbers, and leaves
    matrices."""
    decay: bool | None = None
    """Whether weight decay applies; null leaves it to other rules."""
    lr_scale: float | None = None
    """Factor on the learning rate; null leaves it to other rules."""
    schedule: str | None = None
    """Name in `schedules` of the learning-rate schedule; null leaves it to other rules, in the end to
    `schedule`."""

    def __post_init__(self) -> None:
        if self.decay is None and self.lr_scale is None and self.schedule is None:
            raise ValueError("a rule says something: decay, lr_scale or schedule")
        if self.lr_scale is not None and self.lr_scale < 0:
            raise ValueError(f"lr_scale={self.lr_scale} must not be negative")
        _expressions("pattern", (self.pattern,))


@dataclass(frozen=True, kw_only=True)
class LayerDecayOptions:
    """Lower layers learn slower: block i of n has the factor rate^(n - i), what lies before the blocks
    rate^(n + 1), everything else 1 (BEiT, MAE, VLC)."""

    rate: float
    """Factor from one block to the next below."""
    blocks: str
    """Regular expression that finds a block's number in the name of a parameter, such as
    `vision\\.blocks\\.(\\d+)\\.`."""
    first: tuple[str, ...] = ()
    """Regular expressions on names of parameters before the first block, such as patch and position
    embeddings."""

    def __post_init__(self) -> None:
        if not 0 < self.rate <= 1:
            raise ValueError(f"rate={self.rate} must be in (0, 1]")
        _expressions("blocks", (self.blocks,))
        _expressions("first", self.first)
        if re.compile(self.blocks).groups != 1:
            raise ValueError(f"blocks={self.blocks!r} must have one group, that of the number: (\\d+)")


def _expressions(name: str, patterns: tuple[str, ...]) -> None:
    for pattern in patterns:
        try:
            re.compile(pattern)
        except re.error as error:
            raise ValueError(f"{name}: {pattern!r} is no regular expression: {error}") from None


@dataclass(frozen=True, kw_only=True)
class OptimizerOptions:
    """Optimizer, learning rate, and what differs between parameters."""

    variant: Literal["transformers", "torch", "sgd", "adafactor", "muon"] = "transformers"
    """AdamW of transformers before 5.0 (X-VLM, VLC, ViSFT), or `torch.optim.AdamW` (ALBEF, ViCHA), which adds
    eps to the corrected root and decays before the update; torch's SGD, Adafactor or Muon (matrices by Muon,
    everything else by torch's AdamW)."""
    lr: float
    """Peak learning rate."""
    lr_samples: int | None = None
    """Samples per update that `lr` is meant for: the rate is lr * (samples of an update) / this, where
    samples count over all ranks and accumulated batches (MAE: 256). null: `lr` is the rate."""
    weight_decay: float = 0.01
    """Decoupled weight decay (sgd: added to the gradient)."""
    betas: tuple[float, float] = (0.9, 0.999)
    """Decay of the running mean and the running square of the gradient; not of sgd and adafactor."""
    eps: float = 1e-8
    """Added to the root of the running square; not of sgd and adafactor."""
    momentum: float | None = None
    """Decay of the running gradient of sgd (null: 0) and muon (null: 0.95); the others have none."""
    nesterov: bool | None = None
    """Nesterov momentum of sgd (null: false) and muon (null: true); the others have none."""
    not_muon: tuple[str, ...] = ()
    """Regular expressions on names of matrices that muon leaves to AdamW, such as embeddings and heads."""
    lr_scale: float = 1.0
    """Factor on lr for newly initialised parts; the method says which."""
    rules: tuple[RuleOptions, ...] = ()
    """What holds for some parameters, before the method's own rules."""
    layer_decay: tuple[LayerDecayOptions, ...] = ()
    """Learning rates that fall from layer to layer, one item per encoder; after `rules`, before the method's
    own."""

    def __post_init__(self) -> None:
        if not self.lr > 0:
            raise ValueError(f"lr={self.lr} must be positive")
        _at_least_one(lr_samples=self.lr_samples)
        if not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError(f"betas={list(self.betas)} must be in [0, 1)")
        adam = self.variant in ("transformers", "torch", "muon")
        turning = self.variant in ("sgd", "muon")
        for name, default, used in (
            ("betas", (0.9, 0.999), adam),
            ("eps", 1e-8, adam),
            ("momentum", None, turning),
            ("nesterov", None, turning),
            ("not_muon", (), self.variant == "muon"),
        ):
            if not used and getattr(self, name) != default:
                raise ValueError(f"{name}: variant={self.variant} has no such option; leave it out")
        if self.momentum is not None and not 0 <= self.momentum < 1:
            raise ValueError(f"momentum={self.momentum} must be in [0, 1)")
        if self.variant == "sgd" and self.nesterov and not self.momentum:
            raise ValueError("nesterov=true needs a momentum")
        _expressions("not_muon", self.not_muon)


@dataclass(frozen=True, kw_only=True)
class ScheduleOptions:
    """Learning rate as a function of the step: linear warm-up, then `kind` over the remaining steps."""

    kind: Literal["linear", "cosine", "polynomial", "constant"] = "linear"
    """Shape after the warm-up: down to `min_lr` in a line, in half a cosine or with a power, or not at
    all."""
    warmup_steps: int | float | Length = 0
    """Steps of warm-up; a float such as 0.1 is a fraction of all steps."""
    warmup_lr: float = 0.0
    """Where the warm-up starts."""
    warmup_edge: Literal["first", "before"] = "first"
    """Which step has `warmup_lr`: the first one, whose update changes nothing where that is 0 (X-VLM, VLC,
    ViSFT, MAE), or the one before it, so that the last step of the warm-up has the peak (open_clip)."""
    min_lr: float = 0.0
    """Where the rate ends, for parameters of the peak rate `optimizer.lr`; others end at the same share of
    theirs. For a constant rate: where the cool-down ends."""
    power: float = 1.0
    """Power of kind=polynomial and of the cool-down."""
    cooldown_steps: int | float | Length = 0
    """Last steps of kind=constant, in which the rate falls to `min_lr`; a float is a fraction of all
    steps."""

    def __post_init__(self) -> None:
        for name in ("warmup_steps", "cooldown_steps"):
            value = getattr(self, name)
            if isinstance(value, float) and not 0 <= value < 1:
                raise ValueError(f"{name}={value} is a float, so a fraction in [0, 1); a count is an integer")
            if not isinstance(value, Length) and value < 0:
                raise ValueError(f"{name}={value} must not be negative")
        if self.min_lr < 0 or self.warmup_lr < 0 or not self.power > 0:
            raise ValueError(
                f"min_lr={self.min_lr} and warmup_lr={self.warmup_lr} must not be negative, "
                f"power={self.power} must be positive"
            )
        cools = self.cooldown_steps != 0
        if cools and self.kind != "constant":
            raise ValueError(
                f"cooldown_steps: kind={self.kind} falls by itself; only a constant rate cools down"
            )
        if self.min_lr and self.kind == "constant" and not cools:
            raise ValueError("min_lr: a constant rate does not fall; give cooldown_steps, or leave it out")
        if self.power != 1 and not (self.kind == "polynomial" or cools):
            raise ValueError("power: only kind=polynomial and a cool-down have one; leave it out")
        if self.warmup_steps == 0 and self.warmup_lr:
            raise ValueError("warmup_lr: there is no warm-up; give warmup_steps, or leave it out")

    def warmup(self, steps: int) -> int:
        """Warm-up steps of a run of `steps` (a fraction is truncated, as X-VLM does)."""
        return _steps(self.warmup_steps, steps)

    def cooldown(self, steps: int) -> int:
        """Steps of the cool-down of a run of `steps`."""
        return _steps(self.cooldown_steps, steps)


def in_steps(value: int | Length) -> int:
    """A length of a settled recipe (`vlp_methods.engine.build.settle`), which is a number of steps."""
    assert isinstance(value, int), "lengths are turned into steps before training"
    return value


def _steps(value: int | float | Length, steps: int) -> int:
    return int(value * steps) if isinstance(value, float) else in_steps(value)


@dataclass(frozen=True, kw_only=True)
class EpochSchedule:
    """Learning rate in epochs, as ALBEF and ViCHA set it: warm-up in stairs of 100 steps within the first
    epoch, then half a cosine that falls once per epoch."""

    kind: Literal["epochs"] = "epochs"
    """Marks this schedule."""
    steps_per_epoch: int | Length
    """Length of an epoch, or `{epochs: 1}`; the last one of a run may be shorter."""
    warmup_steps: int
    """Steps of warm-up, a multiple of 100 (100 * `warmup_epochs` of the official configs); cut off at the end
    of the first epoch."""
    warmup_lr: float
    """Learning rate of the first step."""
    min_lr: float
    """Where the cosine would end after the last epoch."""

    def __post_init__(self) -> None:
        _at_least_one(steps_per_epoch=self.steps_per_epoch)
        if self.warmup_steps < 100 or self.warmup_steps % 100:
            raise ValueError(
                f"warmup_steps={self.warmup_steps} must be a multiple of 100: the rate rises once in 100 "
                "steps"
            )
        if self.warmup_lr < 0 or self.min_lr < 0:
            raise ValueError(f"warmup_lr={self.warmup_lr} and min_lr={self.min_lr} must not be negative")

    def warmup(self, steps: int) -> int:
        """Warm-up steps of a run of `steps`."""
        return min(self.warmup_steps, in_steps(self.steps_per_epoch), steps)


@dataclass(frozen=True, kw_only=True)
class AverageOptions:
    """Exponential moving average (EMA) of the weights that train. Where it is on, evaluations and exports
    take the averaged weights; training goes on with its own."""

    decay: float = 0.9999
    """Share of the old average that an update leaves."""
    warmup: bool = True
    """Use min(decay, (1 + n) / (10 + n)) at the n-th update, counted from 1, so that the first weights are
    soon forgotten."""

    def __post_init__(self) -> None:
        if not 0 <= self.decay < 1:
            raise ValueError(f"decay={self.decay} must be in [0, 1)")


@dataclass(frozen=True, kw_only=True)
class SaveOptions:
    """When to write checkpoints and which to keep. One is also written before each evaluation, so that a
    failure there costs nothing."""

    every: int | Length = 1000
    """Steps between checkpoints; the last step is always saved."""
    keep: int = 2
    """Newest checkpoints that stay."""
    keep_every: int | Length | None = None
    """Checkpoints at multiples of this many steps stay for good."""

    def __post_init__(self) -> None:
        _at_least_one(every=self.every, keep=self.keep, keep_every=self.keep_every)


@dataclass(frozen=True, kw_only=True)
class ReportOptions:
    """When and where to report losses and rates. RUN/metrics.jsonl has everything; any of the others may be
    added."""

    every: int | Length = 50
    """Steps between reports; a report shows means over these steps."""
    csv: bool = False
    """Also write RUN/metrics.csv with the columns step, name, value."""
    tensorboard: bool = False
    """Also write TensorBoard events into RUN/tensorboard (needs the extra vlp-methods[tensorboard])."""
    wandb: str | None = None
    """Also send to this Weights & Biases project (needs the extra vlp-methods[wandb])."""
    trackio: str | None = None
    """Also send to this trackio project (needs the library trackio, which asks for an older Pillow
    than our pins hold; so it is no extra)."""
    name: str | None = None
    """What wandb and trackio call the run; null: the name of its folder."""
    notes: str | None = None
    """A longer description of the run for wandb."""
    tags: tuple[str, ...] = ()
    """Tags of the run for wandb."""

    def __post_init__(self) -> None:
        _at_least_one(every=self.every)
        if (self.notes is not None or self.tags) and self.wandb is None:
            raise ValueError("notes and tags go to wandb alone; give wandb=PROJECT, or leave them out")
        if self.name is not None and self.wandb is None and self.trackio is None:
            raise ValueError("name goes to wandb and trackio; give one of them, or leave it out")


@dataclass(frozen=True, kw_only=True)
class EvaluateOptions:
    """When to evaluate, which number decides what is best, and when more training is given up."""

    every: int | Length | None = None
    """Steps between evaluations; null evaluates at the end only."""
    best: str | None = None
    """Number of the evaluation to watch: the model with the best one is exported to RUN/export-best."""
    better: Literal["higher", "lower"] = "higher"
    """Which direction of `best` is better."""
    patience: int | None = None
    """Stop after this many evaluations in a row in which `best` has not improved; null never stops early."""
    least_gain: float = 0.0
    """Smallest improvement of `best` that counts for `patience`; any counts for RUN/export-best."""

    def __post_init__(self) -> None:
        _at_least_one(every=self.every, patience=self.patience)
        if self.patience is not None and (self.best is None or self.every is None):
            raise ValueError("patience needs best (the number to watch) and every (evaluations to count)")
        if self.least_gain and self.patience is None:
            raise ValueError("least_gain belongs to patience; give both, or leave it out")
        if self.least_gain < 0:
            raise ValueError(f"least_gain={self.least_gain} must not be negative")


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
    steps: int | Length
    """Length of the run: steps, `{epochs: 3}` or `{samples: 1e6}`."""
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    """Autocast of the forward pass; parameters and optimizer state stay fp32. fp16 adds loss scaling and one
    wait for the device per step."""
    loss_scale: LossScaleOptions = field(default_factory=LossScaleOptions)
    """Loss scaling of fp16."""
    accumulate: int = 1
    """Batches per update of each stream, averaged; multiplies the effective batch."""
    parts: int = 1
    """Parts that each batch of a rank is computed in, one after the other: the update of the whole batch, its
    contrastive losses and hard negatives included, in about the memory of a part. Encoders run twice."""
    clip_norm: float | None = None
    """Largest global norm of the gradient; null does not clip."""
    optimizer: OptimizerOptions
    """Optimizer."""
    schedule: ScheduleOptions | EpochSchedule = field(default_factory=ScheduleOptions)
    """Learning-rate schedule."""
    schedules: dict[str, ScheduleOptions | EpochSchedule] = field(default_factory=dict)
    """Further schedules by name, for parameters whose rule (`optimizer.rules`) names one."""
    freeze: tuple[str, ...] = ()
    """Regular expressions, searched in names of the task's parameters: those found do not train. They have no
    gradient and no optimizer state."""
    eval_mode: tuple[str, ...] = ()
    """Regular expressions, searched in names of the task's modules: those found, with everything in them,
    stay in evaluation mode while training (no dropout, running statistics kept); frozen parts that are not
    named keep dropout. All their parameters must be frozen."""
    average: AverageOptions | None = None
    """Moving average of the weights for evaluation and export; null: none."""
    save: SaveOptions = field(default_factory=SaveOptions)
    """Checkpoints."""
    report: ReportOptions = field(default_factory=ReportOptions)
    """Reports."""
    evaluate: EvaluateOptions = field(default_factory=EvaluateOptions)
    """Evaluation during training."""
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    """auto takes the NVIDIA or AMD GPU if there is one, else the CPU; mps is the GPU of a Mac."""
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
        _at_least_one(steps=self.steps, accumulate=self.accumulate, parts=self.parts)
        if self.workers < 0:
            raise ValueError("workers must be at least 0")
        _expressions("freeze", self.freeze)
        _expressions("eval_mode", self.eval_mode)
        named = {rule.schedule for rule in self.optimizer.rules} - {None}
        if strange := sorted(named - set(self.schedules), key=str):
            raise ValueError(f"optimizer.rules: schedules has no {', '.join(map(str, strange))}")
        if unused := sorted(set(self.schedules) - named):
            raise ValueError(f"schedules: no rule of optimizer.rules names {', '.join(unused)}")
        if self.precision != "fp16" and self.loss_scale != LossScaleOptions():
            raise ValueError(
                "loss_scale: only precision=fp16 scales the loss; leave it out or set precision=fp16"
            )
        if self.clip_norm is not None and not self.clip_norm > 0:
            raise ValueError(f"clip_norm={self.clip_norm} must be positive, or null for no clipping")
