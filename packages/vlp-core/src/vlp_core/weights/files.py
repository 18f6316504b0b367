"""Reading and writing files of tensors. Nothing of a file is ever executed: pickles are read with
`weights_only=True`."""

import pickle
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from vlp_core.weights.adapter import CheckpointError

WRAPPERS = ("model", "state_dict")


class Checkpoint(NamedTuple):
    """The tensors of a file, and what stood beside them (`config`, `epoch` ...; the metadata of a safetensors
    file)."""

    state: dict[str, Tensor]
    extra: dict[str, Any]


def read(path: str | Path) -> dict[str, Tensor]:
    """The state dict of a checkpoint file, on the CPU; see `read_checkpoint`."""
    return read_checkpoint(path).state


def read_checkpoint(path: str | Path) -> Checkpoint:
    """Read a `.safetensors` file or one of `torch.save`.

    A state dict inside {"model": ...} or {"state_dict": ...} is taken out; "module." before every name
    (DataParallel) is removed. Raises `FileNotFoundError`, and `CheckpointError` for a file that is broken,
    holds no state dict, or could only be read by running pickled code.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(
            f"checkpoint {path} not found" + (" (it is a folder)" if path.is_dir() else "")
        )
    if path.suffix == ".safetensors":
        try:
            with safe_open(path, framework="pt") as file:
                content: Any = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
                extra: dict[str, Any] = dict(file.metadata() or {})
        except SafetensorError as error:
            raise CheckpointError(f"{path} is not a safetensors file: {error}") from error
    else:
        content, extra = _read_pickle(path), {}
    while isinstance(content, Mapping) and (
        wrapper := next((w for w in WRAPPERS if isinstance(content.get(w), Mapping)), None)
    ):
        extra |= {key: value for key, value in content.items() if key != wrapper}
        content = content[wrapper]
    return Checkpoint(_state(content, path), extra)


def write(path: str | Path, state: Mapping[str, Tensor]) -> None:
    """Write a state dict: `.safetensors` (shared tensors are copied), any other suffix as {"model": state} by
    `torch.save`."""
    path = Path(path)
    if path.suffix != ".safetensors":
        torch.save({"model": dict(state)}, path)
        return
    seen: set[int] = set()
    separate: dict[str, Tensor] = {}
    for name, tensor in state.items():
        storage = tensor.untyped_storage().data_ptr()
        separate[name] = tensor.clone().contiguous() if storage in seen else tensor.contiguous()
        seen.add(storage)
    save_file(separate, path, metadata={"format": "pt"})


def _read_pickle(path: Path) -> Any:
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        needed = re.search(r"GLOBAL (\S+)", str(error))
        raise CheckpointError(
            f"{path} cannot be read as plain tensors{f': it needs {needed[1]}' if needed else ''}; "
            "unpickling it could run any code, so it is refused. "
            "If you trust it, open it where its classes are installed and save its state dict alone: "
            'torch.save({"model": state_dict}, "plain.pth")'
        ) from error
    except (RuntimeError, EOFError, KeyError, ValueError) as error:
        raise CheckpointError(f"{path} is not a file of torch.save or is cut off: {error}") from error


def _state(content: Any, path: Path) -> dict[str, Tensor]:
    if not isinstance(content, Mapping) or not content:
        what = "nothing" if isinstance(content, Mapping) else f"a {type(content).__name__}"
        raise CheckpointError(f"{path} holds {what}, not a state dict (a mapping of names to tensors)")
    others = [str(name) for name, value in content.items() if not isinstance(value, Tensor)]
    if others:
        raise CheckpointError(
            f"{path} holds no state dict: {', '.join(others[:5])} "
            f"{'is no tensor' if len(others) == 1 else 'are no tensors'}; "
            f"a state dict is expected at the top or under {' or '.join(WRAPPERS)}"
        )
    if all(str(name).startswith("module.") for name in content):
        return {str(name).removeprefix("module."): tensor for name, tensor in content.items()}
    return {str(name): tensor for name, tensor in content.items()}
