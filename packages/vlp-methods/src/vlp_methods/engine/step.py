"""One update of one stream, and how its numbers travel to the host without stopping the device."""

import math
from collections import deque
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from vlp_core.momentum import WeightAverage

from vlp_methods.engine.gradients import InOne, InParts, summed
from vlp_methods.engine.job import Job
from vlp_methods.engine.optimizers import Rates
from vlp_methods.engine.options import Training
from vlp_methods.engine.ranks import Ranks
from vlp_methods.engine.wrap import wrap

AUTOCAST = {"bf16": torch.bfloat16, "fp16": torch.float16}
NORM = "grad_norm"


OVERFLOWS = 100
"""fp16 updates in a row that may be skipped before the run stops: by then the loss scale has long passed the
smallest useful one."""


class NotFiniteError(FloatingPointError):
    """A loss or gradient is NaN or infinite: the message names step, stream and losses.

    Attributes: `step` counts finished steps, this one included; `stream`; `samples`, the samples of each
    rank; `batches`, those of this rank, where the data gave them out.
    """

    def __init__(
        self,
        message: str,
        step: int,
        stream: str,
        samples: dict[int, tuple[str, ...]],
        batches: tuple[Any, ...],
    ) -> None:
        super().__init__(message)
        self.step, self.stream = step, stream
        self.samples = samples
        self.batches = batches


class Numbers(NamedTuple):
    """What one update leaves for the report: scalars on the device, by name, and what they come from."""

    stream: str
    values: dict[str, Tensor]
    keys: tuple[str, ...]
    batches: tuple[Any, ...]
    """As the data gave them out: on the host, so that they take no memory of the device."""


class Packet(NamedTuple):
    """Numbers of one update on the host, means over ranks."""

    step: int
    stream: str
    values: dict[str, float]
    stop: bool
    """Whether any rank had been asked to stop."""


def seed_for(seed: int, step: int, stream: int, rank: int) -> int:
    """A 64-bit seed that differs for every step, stream and rank (the mixing function of splitmix64, applied
    to each part)."""
    mask = (1 << 64) - 1
    mixed = 0
    for part in (seed, step, stream, rank):
        mixed = (mixed + part + 0x9E3779B97F4A7C15) & mask
        mixed = ((mixed ^ (mixed >> 30)) * 0xBF58476D1CE4E5B9) & mask
        mixed = ((mixed ^ (mixed >> 27)) * 0x94D049BB133111EB) & mask
        mixed ^= mixed >> 31
    return mixed


def widest(device: torch.device) -> torch.dtype:
    """The dtype for sums of reported numbers; the GPU of a Mac has no double precision."""
    return torch.float32 if device.type == "mps" else torch.float64


def _hook(task: nn.Module, name: str) -> Callable[[int], None]:
    """The optional method `name` of a task."""
    found: Callable[[int], None] = getattr(task, name) if hasattr(task, name) else lambda step: None
    return found


def average_of(task: nn.Module, recipe: Training) -> WeightAverage:
    """The moving average that a recipe asks for, over what trains; without one, an average of nothing."""
    options = recipe.average
    if options is None:
        return WeightAverage({})
    trained = {name: p for name, p in task.named_parameters() if p.requires_grad}
    return WeightAverage(trained, decay=options.decay, warmup=options.warmup)


class Updater:
    """Forward, backward, clip and update: called once per stream that runs at a step."""

    def __init__(self, job: Job, recipe: Training, ranks: Ranks) -> None:
        self.job, self.recipe, self.ranks = job, recipe, ranks
        self.streams = [name for name, _ in job.mixing.streams]
        self.rates = Rates(job, recipe)
        self.parameters = [p for group in job.optimizer.param_groups for p in group["params"]]
        self.before_forward = _hook(job.task, "before_forward")
        self.after_update = _hook(job.task, "after_update")
        if recipe.compile:
            job.task.compile()  # in place: names in the state dict stay
        self.module = wrap(job.task, ranks)
        self.unused = {
            name: [p for p in parameters if p.requires_grad] for name, parameters in job.unused.items()
        }
        self.average = average_of(job.task, recipe)
        self.scaler = torch.amp.GradScaler(
            ranks.device.type,
            init_scale=recipe.loss_scale.initial,
            growth_interval=recipe.loss_scale.growth_steps,
            enabled=recipe.precision == "fp16",
        )
        how: Any = {
            "device": ranks.device,
            "autocast": partial(
                torch.autocast,
                ranks.device.type,
                AUTOCAST.get(recipe.precision),
                recipe.precision in AUTOCAST,
            ),
            "scale": self.scaler.scale,
        }
        self.gradients: InOne | InParts = (
            InOne(self.module, **how) if recipe.parts == 1 else InParts(self.module, recipe.parts, **how)
        )

    def set_rates(self, step: int) -> None:
        """Give all groups the learning rate of a step, counted from 0."""
        self.rates.set(step)

    @property
    def lr(self) -> float:
        """Learning rate of the first group."""
        rate: float = self.job.optimizer.param_groups[0]["lr"]
        return rate

    def __call__(self, stream: str, feed: Iterator[Any], step: int) -> Numbers:
        """One update from `accumulate` batches of `feed`. Gradients are means over batches and ranks."""
        recipe, count = self.recipe, self.recipe.accumulate
        unused = self.unused.get(stream, [])
        wide = widest(self.ranks.device)
        seed = seed_for(recipe.seed, step, self.streams.index(stream), self.ranks.rank)
        torch.manual_seed(seed)
        self.before_forward(step)
        self.job.optimizer.zero_grad(set_to_none=True)
        losses: dict[str, Tensor] = {}
        keys: tuple[str, ...] = ()
        batches: tuple[Any, ...] = ()
        for number in range(count):
            batch = next(feed)
            batches += (batch,)
            keys += batch.keys
            # Gradients travel with the last batch only.
            last = number == count - 1
            terms = self.gradients(
                batch, count=count, last=last, unused=unused, seed=seed_for(seed, number, 0, 0)
            )
            for name, term in {**terms, "loss": summed(terms)}.items():
                losses[name] = losses.get(name, 0) + term.to(wide) / count
        self.scaler.unscale_(self.job.optimizer)
        gradients = [p.grad for p in self.parameters if p.grad is not None]
        losses[NORM] = nn.utils.get_total_norm(gradients)
        if recipe.clip_norm is not None:
            nn.utils.clip_grads_with_norm_(self.parameters, recipe.clip_norm, losses[NORM])
        for parameter in unused:
            parameter.grad = None
        self.scaler.step(self.job.optimizer)
        self.scaler.update()
        self.average.update()
        self.after_update(step)
        return Numbers(stream, losses, keys, batches)


class _Sent(NamedTuple):
    step: int
    numbers: Numbers
    own: Tensor  # this rank's values, on the device
    host: Tensor  # means over ranks and the stop flag, on the host once `ready`
    ready: torch.cuda.Event | None


class Wire:
    """Numbers on their way from the device to the host.

    Every update is averaged over ranks in one small all-reduce, together with the request to stop, and copied
    to pinned memory behind it; nothing waits. The host reads the numbers of step t after it has queued step
    t+1, so the device always has work, and every rank reads the same numbers at the same point: they agree on
    a stop and on a failure without further talk. Reports, evaluations and checkpoints read everything first:
    nothing is ever saved after an update that has not been checked.
    """

    def __init__(self, ranks: Ranks, precision: str) -> None:
        self.ranks, self.precision = ranks, precision
        self.lag = 1 if ranks.device.type == "cuda" else 0
        """Steps by which the host reads behind the device; a CPU has computed when a call returns."""
        self.sent: deque[_Sent] = deque()
        self.overflows = 0

    def send(self, step: int, numbers: Numbers, stop: bool) -> None:
        """Queue the numbers of an update; `step` counts finished steps, this one included."""
        device = self.ranks.device
        own = torch.stack([value.to(widest(device)) for value in numbers.values.values()])
        total = torch.cat([own, torch.full((1,), float(stop), dtype=own.dtype, device=device)])
        if self.ranks.world > 1:
            dist.all_reduce(total)
        ready = None
        if device.type == "cuda":
            host = torch.empty(total.shape, dtype=total.dtype, pin_memory=True)
            host.copy_(total, non_blocking=True)
            ready = torch.cuda.Event()
            ready.record()
        else:
            host = total
        self.sent.append(_Sent(step, numbers, own, host, ready))

    def receive(self, before: int | None = None) -> Iterator[Packet]:
        """Packets of steps up to `before` (None: all), oldest first; waits for them.

        Raises `NotFiniteError`, on every rank at the same packet, for the first loss or gradient that is NaN
        or infinite. Under fp16 an infinite gradient is the loss scaler's business: that update was skipped.
        """
        while self.sent and (before is None or self.sent[0].step <= before):
            sent = self.sent.popleft()
            if sent.ready is not None:
                sent.ready.synchronize()
            *means, stop = (sent.host / self.ranks.world).tolist()
            values = dict(zip(sent.numbers.values, means, strict=True))
            self._check(sent, values)
            yield Packet(sent.step, sent.numbers.stream, values, stop > 0)

    def _check(self, sent: _Sent, values: dict[str, float]) -> None:
        bad = [name for name, value in values.items() if not math.isfinite(value)]
        if bad == [NORM] and self.precision == "fp16":
            self.overflows += 1
            if self.overflows < OVERFLOWS:
                return
        self.overflows = 0 if not bad else self.overflows
        if not bad:
            return
        own = dict(zip(sent.numbers.values, sent.own.tolist(), strict=True))
        everyone: list[tuple[dict[str, float], tuple[str, ...]]] = [
            (own, sent.numbers.keys)
        ] * self.ranks.world
        if self.ranks.world > 1:
            dist.all_gather_object(everyone, (own, sent.numbers.keys))
        guilty = {
            rank: keys
            for rank, (losses, keys) in enumerate(everyone)
            if any(not math.isfinite(value) for name, value in losses.items() if name != NORM)
        }
        samples = guilty or {rank: keys for rank, (_, keys) in enumerate(everyone)}
        shown = "; ".join(
            f"rank {rank}: {', '.join(keys[:8])}" + (f" and {len(keys) - 8} more" if len(keys) > 8 else "")
            for rank, keys in list(samples.items())[:4]
        )
        losses = ", ".join(f"{name} {value:.6g}" for name, value in values.items())
        times = f" in {self.overflows} updates in a row" if bad == [NORM] and self.precision == "fp16" else ""
        raise NotFiniteError(
            f"step {sent.step}, stream {sent.numbers.stream}: {', '.join(bad)} not finite{times} ({losses}); "
            f"samples of {shown}",
            sent.step,
            sent.numbers.stream,
            samples,
            sent.numbers.batches,
        )
