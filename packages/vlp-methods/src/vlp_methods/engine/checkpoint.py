"""Checkpoints of a run: folders of safetensors and JSON that appear whole or not at all.

    checkpoints/step-00001000/  model.safetensors  optimizer.safetensors  state.json

A checkpoint is written under a hidden name, flushed to disk and renamed; deleting renames first, too. So
whatever instant the process dies at, every `step-*` folder is complete, and the newest is the one with the
highest number. Nothing is pickled.
"""

import json
import os
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.optim import Optimizer

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


def save(folder: Path, step: int, task: nn.Module, optimizer: Optimizer, state: Mapping[str, Any]) -> Path:
    """Write `folder/step-<step>` and return it. `state` must be JSON-serialisable.

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
    final = folder / f"step-{step:08d}"
    new = folder / f".{final.name}.new"
    shutil.rmtree(new, ignore_errors=True)
    new.mkdir()
    _write_tensors(new / "model.safetensors", task.state_dict())
    _write_tensors(new / "optimizer.safetensors", tensors)
    write_json(new / "state.json", {"step": step, "optimizer": numbers, **state})
    sync(new)
    new.rename(final)
    sync(folder)
    return final


def load(path: Path, task: nn.Module, optimizer: Optimizer) -> dict[str, Any]:
    """Restore task and optimizer in place and return the state that was saved with them."""
    load_task(path, task)
    state: dict[str, Any] = json.loads((path / "state.json").read_text())
    index = {name: i for i, name in enumerate(_optimizer_names(task, optimizer))}
    slots: dict[int, dict[str, Any]] = {}
    for key, value in [*_read_tensors(path / "optimizer.safetensors").items(), *state["optimizer"].items()]:
        slot, _, name = key.partition("/")
        slots.setdefault(index[name], {})[slot] = value
    # The groups stay those of the recipe: their options are settings, not state.
    optimizer.load_state_dict({"state": slots, "param_groups": optimizer.state_dict()["param_groups"]})
    return state


def load_task(path: Path, task: nn.Module) -> None:
    """Restore the task alone."""
    task.load_state_dict(_read_tensors(path / "model.safetensors"), strict=True)


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
