"""`--dry-run`: build everything, one update of every stream on one batch, say what there is; write
nothing."""

import dataclasses
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from vlp_methods.engine.build import open_streams, settle
from vlp_methods.engine.entry import Recipe
from vlp_methods.engine.job import Job
from vlp_methods.engine.options import Training, in_steps
from vlp_methods.engine.ranks import Ranks
from vlp_methods.engine.step import Updater


def _shapes(batch: Any) -> list[str]:
    lines = []
    for field in dataclasses.fields(batch):
        value = getattr(batch, field.name)
        if isinstance(value, torch.Tensor):
            lines.append(
                f"  {field.name:24} {str(value.dtype).removeprefix('torch.'):8} {tuple(value.shape)}"
            )
    return lines


def _count(parameters: Iterable[nn.Parameter]) -> str:
    return f"{sum(parameter.numel() for parameter in parameters):13,}"


def _mib(count: float) -> str:
    return f"{count / 2**20:.0f} MiB"


def run(recipe: Recipe, job: Job, ranks: Ranks) -> None:
    """Print what a run would do. All ranks take part, rank 0 prints."""
    settings: Training = recipe.settings
    lines = [f"{recipe.name}: {settings.about}"]
    parameters = list(job.task.parameters())
    trained = [p for p in parameters if p.requires_grad]
    lines += [
        f"  {name:24} {_count(child.parameters())} parameters" for name, child in job.task.named_children()
    ]
    lines.append(
        f"  {'in all':24} {_count(parameters)} parameters, {_count(trained).strip()} of them trained"
    )
    lines += [
        f"  group of {len(group['params'])} tensors: lr {group['lr']:.3g}, "
        f"weight decay {group['weight_decay']:.3g}"
        for group in job.optimizer.param_groups
    ]

    streams = open_streams(job)
    settings = settle(settings, job, streams)
    length = in_steps(settings.steps)
    updater = Updater(job, settings, ranks)
    for name, stream in streams.items():
        feed = iter(stream)
        batch = next(feed)
        lines.append(f"stream {name}, per rank (x {settings.accumulate} per update, x {ranks.world} ranks)")
        lines += _shapes(batch)
        numbers = updater(name, _once(batch, settings.accumulate), 0)
        lines.append("  " + ", ".join(f"{key} {value.item():.4g}" for key, value in numbers.values.items()))
    weights = sum(p.numel() * p.element_size() for p in parameters)
    state = sum(
        v.numel() * v.element_size()
        for s in job.optimizer.state.values()
        for v in s.values()
        if torch.is_tensor(v)
    )
    gradients = sum(p.numel() * p.element_size() for p in trained)
    memory = f"weights {_mib(weights)}, gradients {_mib(gradients)}, optimizer {_mib(state)}"
    if ranks.device.type == "cuda":
        memory += f", peak with activations {_mib(torch.cuda.max_memory_allocated(ranks.device))}"
    else:
        memory += ", activations not measured on the CPU"
    lines.append(f"memory per rank: {memory}")
    steps = sorted({0, 1, settings.schedule.warmup(length), length // 2, length - 1})
    rates = ", ".join(f"{step}: {updater.rates.at(step)[0]:.3g}" for step in steps if step < length)
    lines.append(f"learning rate by step: {rates}")
    first = [" ".join(job.mixing.names(settings.seed, step)) for step in range(min(8, length))]
    lines.append(f"streams of the first steps: {'; '.join(first)}")
    if ranks.main:
        print("\n".join(lines))


def _once(batch: Any, times: int) -> Any:
    return iter([batch] * times)
