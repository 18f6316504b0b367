"""Strict loading of a state dict into a model."""

import logging
from collections.abc import Callable, Iterable, Mapping
from fnmatch import fnmatchcase
from pathlib import Path
from typing import NamedTuple, Protocol, runtime_checkable

from torch import Size, Tensor, nn

from vlp_core.weights.adapter import Adapter, CheckpointError, groups
from vlp_core.weights.files import read

LISTED = 10
"""Number of tensors of a wrong shape that a message names."""

log = logging.getLogger(__name__)


@runtime_checkable
class HasPositionTables(Protocol):
    """A module some of whose parameters have the size of the image."""

    def position_tables(self) -> dict[str, Callable[[Tensor, Size], Tensor]]:
        """Parameter name -> function(tensor of a checkpoint, wanted shape) that resizes it."""
        ...


class LoadReport(NamedTuple):
    """Names of what happened: `loaded`, `missing`, `resized` are ours; `unexpected` are the source's."""

    loaded: tuple[str, ...]
    missing: tuple[str, ...]
    unexpected: tuple[str, ...]
    resized: tuple[str, ...]

    def joined(self, **others: "LoadReport") -> "LoadReport":
        """The report of a model with those of what goes with it; our names of the others begin with their
        keyword."""
        found = {field: list(names) for field, names in self._asdict().items()}
        for part, other in others.items():
            for field, names in other._asdict().items():
                found[field] += names if field == "unexpected" else [f"{part}.{name}" for name in names]
        return LoadReport(**{field: tuple(names) for field, names in found.items()})


def load(
    model: nn.Module,
    state: Mapping[str, Tensor] | str | Path,
    adapter: Adapter | None = None,
    *,
    allow_missing: Iterable[str] = (),
    allow_unexpected: Iterable[str] = (),
    resize: bool = True,
    name: str | None = None,
) -> LoadReport:
    """Load a state dict or a file into `model`; all or nothing.

    Args:
        model: Module to fill.
        state: Tensors by name, or a file of them.
        adapter: Maps the source's names to those of `model`; None when they are ours already.
        allow_missing: Groups of our names that may be absent and keep their values; a group is a prefix
            (`"itm_head"`) and may hold `*` (`"text.layers.*.cross_attention"`).
        allow_unexpected: Groups of the source's names that may be left over, in the same form.
        resize: Position tables made for another image size are resized to the model's (said once in the
            log); with False that is an error.
        name: What messages call the state dict; by default the path when one is given.

    Raises:
        CheckpointError: Lists missing and unexpected names by group, and tensors of a wrong shape; also for
            a checkpoint of which nothing fits.
        FileNotFoundError: No such file.
    """
    name = name or (str(state) if isinstance(state, str | Path) else "the state dict")
    source = read(state) if isinstance(state, str | Path) else state
    ours, unmatched = (dict(source), ()) if adapter is None else adapter.translate(source)
    expected = model.state_dict()
    foreign = [key for key in ours if key not in expected]
    loaded = {key: tensor for key, tensor in ours.items() if key in expected}
    if not loaded:
        # On the meta device: only the names are of interest.
        empty = {
            key: tensor.to("meta")
            for key, tensor in expected.items()
            if adapter is None or adapter.knows(key)
        }
        named = empty if adapter is None else adapter.to_source(empty, gradients=True)
        raise CheckpointError(
            f"nothing in {name} belongs to this {type(model).__name__}: it holds {groups(source)}, "
            f"where {groups(named)} was expected"
        )
    missing = tuple(key for key in expected if key not in loaded)
    unexpected = (*unmatched, *foreign)
    problems: list[str] = []
    if refused := _outside(missing, allow_missing):
        problems.append(f"{len(refused)} missing: {groups(refused)}")
    if refused := _outside(unexpected, allow_unexpected):
        problems.append(f"{len(refused)} unexpected: {groups(refused)}")
    misfits: list[str] = []
    resized: dict[str, tuple[Size, Size]] = {}
    tables = _position_tables(model) if resize else {}
    for key, tensor in loaded.items():
        wanted = expected[key].shape
        if tensor.shape == wanted:
            continue
        try:
            if key not in tables or tensor.ndim != len(wanted) or tensor.shape[-1] != wanted[-1]:
                raise ValueError(f"it has shape {list(tensor.shape)}, the model needs {list(wanted)}")
            loaded[key] = tables[key](tensor, wanted)
            resized[key] = (tensor.shape, wanted)
        except ValueError as error:
            misfits.append(f"{key} does not fit: {error}")
    problems += misfits[:LISTED]
    if len(misfits) > LISTED:
        problems.append(f"{len(misfits) - LISTED} more do not fit")
    if problems:
        raise CheckpointError(f"{name} does not fit this {type(model).__name__}. " + "; ".join(problems))
    model.load_state_dict(loaded, strict=False)
    if resized:
        log.info("%s: resized %s", name, _changes(resized))
    return LoadReport(tuple(loaded), missing, unexpected, tuple(resized))


def _outside(names: Iterable[str], allowed: Iterable[str]) -> list[str]:
    allowed = tuple(allowed)
    return [
        name
        for name in names
        if not any(fnmatchcase(name, a) or fnmatchcase(name, f"{a}.*") for a in allowed)
    ]


def _position_tables(model: nn.Module) -> dict[str, Callable[[Tensor, Size], Tensor]]:
    return {
        f"{prefix}.{name}" if prefix else name: function
        for prefix, module in model.named_modules()
        if isinstance(module, HasPositionTables)
        for name, function in module.position_tables().items()
    }


def _changes(resized: Mapping[str, tuple[Size, Size]]) -> str:
    counts: dict[tuple[int, int], int] = {}
    for old, new in resized.values():
        counts[old[-2], new[-2]] = counts.get((old[-2], new[-2]), 0) + 1
    return ", ".join(
        f"{n} position table{'s' * (n > 1)} from {a} to {b} rows" for (a, b), n in counts.items()
    )
