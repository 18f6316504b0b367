"""From a checked recipe to a job that can train, and whose fault it is when that fails."""

import contextlib
import dataclasses
import logging
import math
import re
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import nn
from vlp_core.recipe import RecipeError
from vlp_core.weights import CheckpointError
from vlp_data.errors import DataError

from vlp_methods.engine.entry import Recipe, UserError, attribute
from vlp_methods.engine.job import Job, Stream
from vlp_methods.engine.options import Length, Training
from vlp_methods.engine.ranks import Ranks

log = logging.getLogger(__name__)

USER_ERRORS = (
    UserError,
    RecipeError,
    DataError,
    CheckpointError,
    FileNotFoundError,
    NotADirectoryError,
    IsADirectoryError,
    PermissionError,
)
"""Faults of recipe, files and data: one message, exit code 2. Everything else is a crash and shows its
traceback."""


@contextlib.contextmanager
def building() -> Iterator[None]:
    """While a job is made from a recipe, `ValueError` is a fault of the recipe: `UserError` instead.

    Later it is a fault of the code, which must show where it is.
    """
    try:
        yield
    except USER_ERRORS:
        raise
    except ValueError as error:
        raise UserError(str(error)) from error


def build(recipe: Recipe, ranks: Ranks) -> Job:
    """The job of a recipe, on this rank's device, with what the recipe freezes frozen."""
    torch.manual_seed(recipe.settings.seed)
    settings: Training = recipe.settings
    with building():
        job: Job = attribute(recipe.entry.build)(settings)
        job = freeze(job, settings)
    check_groups(job)
    if job.evaluate is None and (settings.evaluate.every is not None or settings.evaluate.best is not None):
        raise UserError("evaluate: this task has no evaluation; leave evaluate.every and evaluate.best null")
    if job.export is None and settings.evaluate.best is not None:
        raise UserError(
            "evaluate.best: this task exports nothing, so there is no best model to keep; leave it null"
        )
    job.task.to(ranks.device)
    return job


def freeze(job: Job, recipe: Training) -> Job:
    """The job without gradient and optimizer state for what `recipe.freeze` names, and with the modules of
    `recipe.eval_mode` among its own.

    Raises:
        ValueError: A pattern finds nothing, nothing is left to train, or a module that is to stay in
            evaluation mode trains.
    """
    for pattern in recipe.freeze:
        # A tied parameter has several names; any of them will do.
        found = [
            p for name, p in job.task.named_parameters(remove_duplicate=False) if re.search(pattern, name)
        ]
        if not found:
            raise ValueError(f"freeze: no parameter of the task matches {pattern!r}")
        for parameter in found:
            parameter.requires_grad_(False)
    if recipe.freeze:
        _prune(job)
    still: list[nn.Module] = []
    for pattern in recipe.eval_mode:
        modules = [(name, m) for name, m in job.task.named_modules() if name and re.search(pattern, name)]
        if not modules:
            raise ValueError(f"eval_mode: no module of the task matches {pattern!r}")
        for name, module in modules:
            if training := [key for key, p in module.named_parameters() if p.requires_grad]:
                raise ValueError(
                    f"eval_mode: {name} is found by {pattern!r}, and its {training[0]} trains; freeze it, "
                    "or leave the module out"
                )
            still.append(module)
    return dataclasses.replace(job, eval_mode=(*job.eval_mode, *still)) if still else job


def _prune(job: Job) -> None:
    """Take frozen parameters out of the optimizer."""
    groups = job.optimizer.param_groups
    for group in groups:
        keep = [index for index, p in enumerate(group["params"]) if p.requires_grad]
        for key in ("params", "names"):
            if key in group:
                group[key] = [group[key][index] for index in keep]
    job.optimizer.param_groups = [group for group in groups if group["params"]]
    if not job.optimizer.param_groups:
        raise ValueError("freeze: nothing is left to train")


def check_groups(job: Job) -> None:
    """Raise `ValueError`, a fault of the method, for a trainable parameter that no group of the optimizer
    has: it would never move, and nobody would know."""
    grouped = {id(p) for group in job.optimizer.param_groups for p in group["params"]}
    lost = [name for name, p in job.task.named_parameters() if p.requires_grad and id(p) not in grouped]
    if lost:
        more = f" and {len(lost) - 5} more" if len(lost) > 5 else ""
        raise ValueError(
            f"trainable parameters that the optimizer does not have: {', '.join(lost[:5])}{more}; "
            "give them to it, or freeze them"
        )


def open_streams(job: Job) -> Mapping[str, Stream]:
    """The data of a job."""
    with building():
        streams = job.streams()
    assert set(streams) == {name for name, _ in job.mixing.streams}, "streams are those of the mixing"
    return streams


def settle(recipe: Training, job: Job, streams: Mapping[str, Stream]) -> Training:
    """The recipe with everything that depends on the data as a number: lengths as steps, the learning rate by
    the size of an update. Says what they come to.

    Raises:
        UserError: A length counts a stream that is not there or never runs.
    """
    said: list[str] = []

    def steps_of(length: Length, key: str) -> int:
        name, each = _per_step(length.of, recipe, job, streams, key)
        samples = length.samples if length.epochs is None else length.epochs * streams[name].length
        assert samples is not None
        steps = max(1, math.ceil(samples / each - 1e-9))
        text = f"{length.samples} samples" if length.epochs is None else f"{length.epochs:g} epochs"
        said.append(f"{key}: {text} of {name} are {steps} steps")
        return steps

    def walk(value: Any, key: str) -> Any:
        if isinstance(value, Length):
            return steps_of(value, key)
        if isinstance(value, dict):
            return {name: walk(item, f"{key}.{name}") for name, item in value.items()}
        if not dataclasses.is_dataclass(value) or isinstance(value, type):
            return value
        fields = {f.name: getattr(value, f.name) for f in dataclasses.fields(value) if f.init}
        found = {name: walk(item, f"{key}.{name}" if key else name) for name, item in fields.items()}
        changed = {name: item for name, item in found.items() if item is not fields[name]}
        return dataclasses.replace(value, **changed) if changed else value

    with building():
        settled: Training = walk(recipe, "")
    options = recipe.optimizer
    if options.lr_samples is not None:
        _, each = _per_step(None, recipe, job, streams, "optimizer.lr_samples", share=False)
        ratio = each / options.lr_samples
        for group in job.optimizer.param_groups:
            group["lr"] *= ratio
        lr = options.lr * ratio
        said.append(f"optimizer.lr: {options.lr:g} * {each:g} samples / {options.lr_samples} is {lr:.6g}")
        settled = dataclasses.replace(settled, optimizer=dataclasses.replace(options, lr=lr, lr_samples=None))
    for line in said:
        log.info("%s", line)
    return settled


def _per_step(
    of: str | None,
    recipe: Training,
    job: Job,
    streams: Mapping[str, Stream],
    key: str,
    *,
    share: bool = True,
) -> tuple[str, float]:
    """The stream that is counted, and its samples per step on average (per update without `share`)."""
    shares = job.mixing.shares()
    name = of or next((name for name, part in shares.items() if part == 1), next(iter(shares)))
    if name not in shares or not shares[name] > 0:
        known = ", ".join(name for name, part in shares.items() if part > 0)
        raise UserError(f"{key}.of={name}: no such stream; choose among {known}")
    each = streams[name].global_batch * recipe.accumulate
    return name, each * (shares[name] if share else 1.0)
