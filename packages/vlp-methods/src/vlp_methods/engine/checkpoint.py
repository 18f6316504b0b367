"""Checkpoints of a run: folders of safetensors and JSON that appear whole or not at all.

    checkpoints/step-00001000/  model.safetensors  optimizer.safetensors  state.json
                                average.safetensors    where weights are averaged
                                after.json             what the evaluation at this step has left

A checkpoint is written under a hidden name, flushed to disk and renamed; deleting renames first, too. So
whatever instant the process dies at, every `step-*` folder is complete, and the newest is the one with the
highest number. Nothing is pickled.

Frozen weights whose file is known (`Job.frozen_from`) are not written: state.json has the file and its
checksum instead, and a checkpoint is read only where the job has read them from a file with the same one.
"""

import functools
import hashlib
import json
import os
import re
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.optim import Optimizer
from vlp_core.weights import CheckpointError

from vlp_methods.engine.job import FrozenFrom, Job

AVERAGE = "average.safetensors"
NAME = re.compile(r"step-(\d{8,})\Z")


def sync(path: Path) -> None:
    """Flush a file or folder to disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_text(path: Path, text: str) -> None:
    """Write a file that is either the old or the new one, whenever the process dies."""
    new = path.with_name(f".{path.name}.new")
    new.write_text(text, encoding="utf-8")
    sync(new)
    new.replace(path)
    sync(path.parent)


def write_json(path: Path, value: Any) -> None:
    write_text(path, json.dumps(value, indent=1) + "\n")


def _write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """safetensors refuses memory that two names share: a second name for the same tensor is stored as an
    alias, a partial view as a copy."""
    kept: dict[int, tuple[str, Tensor]] = {}
    plain: dict[str, Tensor] = {}
    aliases: dict[str, str] = {}
    for name, tensor in tensors.items():
        tensor = tensor.detach()
        memory = tensor.untyped_storage().data_ptr()
        if memory and memory in kept:
            first, other = kept[memory]
            if (
                tensor.dtype == other.dtype
                and tensor.shape == other.shape
                and tensor.stride() == other.stride()
                and tensor.data_ptr() == other.data_ptr()
            ):
                aliases[name] = first
            else:
                plain[name] = tensor.cpu().clone(memory_format=torch.contiguous_format)
            continue
        kept[memory] = (name, tensor)
        plain[name] = tensor.cpu().contiguous()
    save_file(plain, path, metadata={"aliases": json.dumps(aliases)})
    sync(path)


def _read_tensors(path: Path) -> dict[str, Tensor]:
    with safe_open(path, framework="pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a mapping)
        aliases = json.loads(file.metadata()["aliases"])
    return tensors | {name: tensors[first] for name, first in aliases.items()}


def _optimizer_names(task: nn.Module, optimizer: Optimizer) -> list[str]:
    """Names of the optimizer's parameters, in the order of its numbering."""
    names = {id(parameter): name for name, parameter in task.named_parameters()}
    return [names[id(parameter)] for group in optimizer.param_groups for parameter in group["params"]]


def checksum(path: Path) -> str:
    """SHA-256 of a file, or of the names and contents of all files in a folder. Raises FileNotFoundError."""
    return _checksum(path, path.stat().st_mtime_ns)


@functools.cache
def _checksum(path: Path, _: int) -> str:
    total = hashlib.sha256()
    for file in sorted(path.rglob("*")) if path.is_dir() else [path]:
        if file.is_file():
            total.update(str(file.relative_to(path)).encode() if path.is_dir() else b"")
            with file.open("rb") as opened:
                total.update(hashlib.file_digest(opened, "sha256").digest())
    return total.hexdigest()


def sources(frozen_from: Sequence[FrozenFrom]) -> list[dict[str, str]]:
    """What state.json and exports say about the files of frozen weights."""
    return [
        {"prefix": each.prefix, "file": str(each.file), "sha256": checksum(each.file)} for each in frozen_from
    ]


def write_export(job: Job, folder: Path) -> None:
    """Let a job fill an export folder; frozen.json in it names the files that frozen weights came from."""
    assert job.export
    job.export(folder)
    if job.frozen_from:
        write_json(folder / "frozen.json", sources(job.frozen_from))


def _left_out(task: nn.Module, prefixes: Sequence[str]) -> set[str]:
    """Names of frozen parameters below some prefixes."""
    return {
        name
        for name, parameter in task.named_parameters(remove_duplicate=False)
        if not parameter.requires_grad and name.startswith(tuple(prefixes))
    }


def save(
    folder: Path,
    step: int,
    task: nn.Module,
    optimizer: Optimizer,
    state: Mapping[str, Any],
    *,
    frozen_from: Sequence[FrozenFrom] = (),
    average: Mapping[str, Tensor] | None = None,
) -> Path:
    """Write `folder/step-<step>` and return it. `state` must be JSON-serialisable; `average` are averaged
    weights by name, if there are any.

    Raises `FloatingPointError` if a parameter is not finite: such a checkpoint could only be resumed into a
    failure.
    """
    broken = [
        name for name, parameter in task.named_parameters() if not bool(torch.isfinite(parameter).all())
    ]
    if broken:
        raise FloatingPointError(
            f"step {step}: parameters {', '.join(broken[:5])} are not finite; no checkpoint is written"
        )
    tensors: dict[str, Tensor] = {}
    numbers: dict[str, Any] = {}
    names = _optimizer_names(task, optimizer)
    for index, slots in optimizer.state_dict()["state"].items():
        for slot, value in slots.items():
            (tensors if isinstance(value, Tensor) else numbers)[f"{slot}/{names[index]}"] = value

    folder.mkdir(parents=True, exist_ok=True)
    final = place(folder, step)
    new = folder / f".{final.name}.new"
    shutil.rmtree(new, ignore_errors=True)
    new.mkdir()
    left_out = _left_out(task, [each.prefix for each in frozen_from])
    weights = {name: tensor for name, tensor in task.state_dict().items() if name not in left_out}
    _write_tensors(new / "model.safetensors", weights)
    if average:
        _write_tensors(new / AVERAGE, average)
    _write_tensors(new / "optimizer.safetensors", tensors)
    known = {"frozen_from": sources(frozen_from)} if frozen_from else {}
    write_json(new / "state.json", {"step": step, "optimizer": numbers, **known, **state})
    sync(new)
    new.rename(final)
    sync(folder)
    return final


def load(
    path: Path, task: nn.Module, optimizer: Optimizer, *, frozen_from: Sequence[FrozenFrom] = ()
) -> dict[str, Any]:
    """Restore task and optimizer in place and return the state that was saved with them. Raises as
    `load_task`."""
    state = load_task(path, task, frozen_from=frozen_from)
    index = {name: i for i, name in enumerate(_optimizer_names(task, optimizer))}
    frozen = {name for name, parameter in task.named_parameters() if not parameter.requires_grad}
    slots: dict[int, dict[str, Any]] = {}
    for key, value in [*_read_tensors(path / "optimizer.safetensors").items(), *state["optimizer"].items()]:
        slot, _, name = key.partition("/")
        if name in frozen:  # it trained before, and does no longer
            continue
        slots.setdefault(index[name], {})[slot] = value
    # The groups stay those of the recipe: their options are settings, not state.
    optimizer.load_state_dict({"state": slots, "param_groups": optimizer.state_dict()["param_groups"]})
    return state


def load_task(path: Path, task: nn.Module, *, frozen_from: Sequence[FrozenFrom] = ()) -> dict[str, Any]:
    """Restore the task alone and return the saved state.

    Raises:
        CheckpointError: Weights that are not in the checkpoint came from a file that the job does not read,
            or that has changed since.
    """
    state: dict[str, Any] = json.loads((path / "state.json").read_text())
    files = {each.prefix: each.file for each in frozen_from}
    outside: list[str] = []
    for known in state.get("frozen_from", []):
        prefix, file = known["prefix"], files.get(known["prefix"])
        where = f"{path} holds no weights of {prefix}*: they came from {known['file']}"
        if file is None:
            raise CheckpointError(f"{where}, which this recipe does not read; give it the same file")
        if not file.exists():
            raise CheckpointError(f"{where}, and {file} is not there; bring it back")
        if checksum(file) != known["sha256"]:
            raise CheckpointError(
                f"{where} with SHA-256 {known['sha256']}, and {file} has another one: it is not the same file"
            )
        outside.append(prefix)
    missing, unexpected = task.load_state_dict(_read_tensors(path / "model.safetensors"), strict=False)
    missing = [name for name in missing if not name.startswith(tuple(outside) or ("\0",))]
    if missing or unexpected:
        raise CheckpointError(
            f"{path} is one of another model: it lacks {_few(missing)}, and has {_few(unexpected)} too many"
        )
    return state


def _few(names: Sequence[str]) -> str:
    more = f" and {len(names) - 5} more" if len(names) > 5 else ""
    return f"{', '.join(names[:5])}{more}" if names else "nothing"


def load_average(path: Path) -> dict[str, Tensor] | None:
    """The averaged weights of a checkpoint, by name, if it has any."""
    file = path / AVERAGE
    return _read_tensors(file) if file.is_file() else None


def write_after(path: Path, state: Mapping[str, Any]) -> None:
    """Add to a checkpoint what the evaluation of its step has left: it is older than the evaluation."""
    write_json(path / "after.json", dict(state))


def read_after(path: Path) -> dict[str, Any]:
    """What `write_after` has added; empty without."""
    file = path / "after.json"
    return json.loads(file.read_text()) if file.is_file() else {}


def place(folder: Path, step: int) -> Path:
    """The folder of a checkpoint."""
    return folder / f"step-{step:08d}"


def step_of(path: Path) -> int:
    match = NAME.match(path.name)
    assert match, path
    return int(match[1])


def complete(folder: Path) -> list[Path]:
    """All checkpoints, oldest first."""
    if not folder.is_dir():
        return []
    return sorted((path for path in folder.iterdir() if NAME.match(path.name)), key=step_of)


def newest(folder: Path) -> Path | None:
    found = complete(folder)
    return found[-1] if found else None


def remove(path: Path) -> None:
    """Delete a folder that must never be seen half deleted."""
    doomed = path.with_name(f".{path.name}.old")
    shutil.rmtree(doomed, ignore_errors=True)
    path.rename(doomed)
    shutil.rmtree(doomed)


def tidy(folder: Path, *, keep: int, keep_every: int | None) -> None:
    """Delete checkpoints but the newest `keep` and those at multiples of `keep_every`."""
    for path in complete(folder)[:-keep]:
        if not (keep_every and step_of(path) % keep_every == 0):
            remove(path)


def sweep(folder: Path) -> None:
    """Delete what an interrupted save or deletion has left."""
    if folder.is_dir():
        for path in folder.glob(".*"):
            shutil.rmtree(path)


def replace_folder(new: Path, final: Path) -> None:
    """Put the finished folder `new` in the place of `final`; `restore_folder` completes the swap if it was
    interrupted."""
    old = final.with_name(f".{final.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    if final.exists():
        final.rename(old)
    new.rename(final)
    sync(final.parent)
    shutil.rmtree(old, ignore_errors=True)


def restore_folder(final: Path) -> None:
    """After a crash within `replace_folder`: bring the old folder back if the new one was not in place yet,
    and clean up."""
    old, new = final.with_name(f".{final.name}.old"), final.with_name(f".{final.name}.new")
    if old.exists() and not final.exists():
        old.rename(final)
    shutil.rmtree(old, ignore_errors=True)
    shutil.rmtree(new, ignore_errors=True)
