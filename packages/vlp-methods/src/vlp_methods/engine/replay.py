"""The batch of a loss or gradient that was not finite: stored when it happens, looked at again later.

    RUN/nonfinite.json       step, stream, message, samples of each rank
        nonfinite/           rank-0.json and rank-0.safetensors: the batches of each rank that had it

`replay` repeats the steps from the newest checkpoint before it on one rank, then takes the stored batches,
and says where values stop being finite.
"""

import contextlib
import dataclasses
import json
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from vlp_core.recipe import nearest

from vlp_methods.engine import checkpoint
from vlp_methods.engine.build import build, open_streams, settle
from vlp_methods.engine.entry import Recipe, UserError, attribute
from vlp_methods.engine.loop import TrainState
from vlp_methods.engine.ranks import Ranks
from vlp_methods.engine.step import NotFiniteError, Updater, seed_for

log = logging.getLogger(__name__)


def keep(run: Path, error: NotFiniteError, ranks: Ranks) -> None:
    """Store the batches of this rank, if it is one of those at fault, and what is known (on rank 0)."""
    if ranks.main:
        checkpoint.write_json(
            run / "nonfinite.json",
            {
                "step": error.step,
                "stream": error.stream,
                "message": str(error),
                "ranks": ranks.world,
                "samples": error.samples,
            },
        )
    if ranks.rank not in error.samples:
        return
    tensors: dict[str, Tensor] = {}
    try:
        batches = [_pack(batch, tensors) for batch in error.batches]
    except TypeError as problem:
        log.warning("the batch cannot be stored: %s", problem)
        return
    folder = run / "nonfinite"
    folder.mkdir(exist_ok=True)
    save_file(tensors, folder / f"rank-{ranks.rank}.safetensors")
    checkpoint.write_json(folder / f"rank-{ranks.rank}.json", {"step": error.step, "batches": batches})


def _pack(value: Any, tensors: dict[str, Tensor]) -> Any:
    """A batch as JSON, with its tensors in `tensors`. Raises TypeError for what batches do not hold."""
    if isinstance(value, Tensor):
        name = str(len(tensors))
        tensors[name] = value.detach().cpu().clone(memory_format=torch.contiguous_format)
        return {"tensor": name}
    if value is None or isinstance(value, bool | int | float | str):
        return {"value": value}
    if isinstance(value, dict):
        return {"dict": {key: _pack(item, tensors) for key, item in value.items()}}
    kind = f"{type(value).__module__}:{type(value).__qualname__}"
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = {f.name: getattr(value, f.name) for f in dataclasses.fields(value) if f.init}
        return {"class": kind, "fields": {name: _pack(item, tensors) for name, item in fields.items()}}
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return {"class": kind, "fields": {n: _pack(getattr(value, n), tensors) for n in value._fields}}
    if isinstance(value, tuple | list):
        return {type(value).__name__: [_pack(item, tensors) for item in value]}
    raise TypeError(f"{kind} in a batch is neither tensor nor plain data")


def _unpack(packed: dict[str, Any], tensors: dict[str, Tensor]) -> Any:
    if "tensor" in packed:
        return tensors[packed["tensor"]]
    if "value" in packed:
        return packed["value"]
    if "dict" in packed:
        return {key: _unpack(item, tensors) for key, item in packed["dict"].items()}
    if "class" in packed:
        fields = {name: _unpack(item, tensors) for name, item in packed["fields"].items()}
        return attribute(packed["class"])(**fields)
    if "tuple" in packed:
        return tuple(_unpack(item, tensors) for item in packed["tuple"])
    return [_unpack(item, tensors) for item in packed["list"]]


def stored(run: Path) -> dict[int, list[Any]]:
    """The stored batches of a run, by rank."""
    found: dict[int, list[Any]] = {}
    for file in sorted((run / "nonfinite").glob("rank-*.json")):
        tensors = load_file(file.with_suffix(".safetensors"))
        packed = json.loads(file.read_text())["batches"]
        found[int(file.stem.removeprefix("rank-"))] = [_unpack(batch, tensors) for batch in packed]
    return found


def replay(recipe: Recipe, run: Path) -> bool:
    """Repeat the failed update of a run on one rank and print where values are not finite; returns whether
    any is.

    Writes nothing. Raises `UserError` for a run without such a failure.
    """
    file = run / "nonfinite.json"
    if not file.is_file():
        raise UserError(f"{run} has no nonfinite.json: no loss or gradient of it was NaN or infinite")
    known = json.loads(file.read_text())
    batches = stored(run)
    if not batches:
        raise UserError(f"{run} holds no stored batch; run it again with this version to get one")
    failed, stream = known["step"] - 1, known["stream"]
    print(known["message"])
    with Ranks(recipe.settings.device) as ranks:
        job = build(recipe, ranks)
        streams = open_streams(job)
        settings = settle(recipe.settings, job, streams)
        updater = Updater(job, settings, ranks)
        if stream not in updater.streams:
            near = nearest(stream, updater.streams)
            raise UserError(
                f"the recipe has no stream {stream} any more" + (f", only {near}" if near else "")
            )
        state = TrainState(settings, streams, updater)
        before = [
            path for path in checkpoint.complete(run / "checkpoints") if checkpoint.step_of(path) <= failed
        ]
        if before:
            state.load(before[-1], job)
        job.training_mode()
        print(f"repeating steps {state.step + 1} to {failed} on one rank, then step {failed + 1}")
        feeds = {name: iter(each) for name, each in streams.items()}
        for step in range(state.step, failed + 1):
            updater.set_rates(step)
            for name in job.mixing.names(settings.seed, step):
                if (step, name) == (failed, stream):
                    break
                updater(name, feeds[name], step)
        found = False
        for rank, held in batches.items():
            for batch in held:
                found |= _look(updater, stream, failed, rank, batch)
    if not found:
        print(
            "everything is finite this time: on several ranks, or on a GPU without deterministic=true, the "
            "repeated steps may differ in the last digits"
        )
    return found


def _look(updater: Updater, stream: str, step: int, rank: int, batch: Any) -> bool:
    """One forward and backward pass of a stored batch, told in lines; returns whether a value was not
    finite."""
    task, recipe = updater.job.task, updater.recipe
    print(f"rank {rank}, stream {stream}: {', '.join(batch.keys)}")
    seed = seed_for(recipe.seed, step, updater.streams.index(stream), rank)
    torch.manual_seed(seed)
    updater.before_forward(step)
    task.zero_grad(set_to_none=True)
    with _watched(task) as bad:
        terms = updater.gradients(batch, count=1, last=True, unused=(), seed=seed_for(seed, 0, 0, 0))
    print("  losses: " + ", ".join(f"{name} {term.item():.6g}" for name, term in terms.items()))
    if bad:
        print(f"  first output that is not finite: {bad[0]}")
    gradients = [
        name
        for name, parameter in task.named_parameters()
        if parameter.grad is not None and not bool(torch.isfinite(parameter.grad).all())
    ]
    if gradients:
        more = f" and {len(gradients) - 8} more" if len(gradients) > 8 else ""
        print(f"  gradients that are not finite: {', '.join(gradients[:8])}{more}")
    losses = not all(bool(torch.isfinite(term)) for term in terms.values())
    return bool(bad or gradients or losses)


@contextlib.contextmanager
def _watched(task: nn.Module) -> Iterator[list[str]]:
    """Names of modules whose outputs are not finite, in the order in which they come."""
    found: list[str] = []

    def check(name: str) -> Any:
        def hook(_: nn.Module, inputs: Any, output: Any) -> None:
            values = output if isinstance(output, tuple | list) else [output]
            tensors = [value for value in values if isinstance(value, Tensor) and value.is_floating_point()]
            if not all(bool(torch.isfinite(value).all()) for value in tensors):
                found.append(name)

        return hook

    handles = [m.register_forward_hook(check(name)) for name, m in task.named_modules() if name]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()
