"""How methods, their tasks and their recipes are found. Imports no torch.

A method is a package named by one line of entry-point group `vlp.methods`:

    [project.entry-points."vlp.methods"]
    xvlm = "vlp_methods.xvlm"

Its `__init__` holds `tasks: dict[str, TaskEntry]` and imports nothing heavy; its recipes are the files
`recipes/*.yaml` beside it.
"""

import importlib
import importlib.util
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from vlp_core import recipe as recipes

from vlp_methods.engine import earlier

GROUP = "vlp.methods"


class TaskEntry(NamedTuple):
    """Where a task's schema and builder are, as `module:attribute`, so that naming them imports neither."""

    schema: str
    """A subclass of `vlp_methods.engine.options.Training`; its module must import no torch."""
    build: str
    """A function `build(recipe) -> vlp_methods.engine.job.Job`."""


class UserError(Exception):
    """Something the user can put right; `vlp-train` prints the message and exits 2."""


class Recipe(NamedTuple):
    """A recipe that has been found and checked."""

    name: str
    """`xvlm/pretrain_base`, or the stem of the file."""
    file: Path
    settings: Any
    """An instance of the task's schema."""
    entry: TaskEntry
    values: dict[str, Any]
    """What the file holds, before overrides."""


def methods() -> dict[str, str]:
    """Installed methods: name -> module."""
    import importlib.metadata

    return {point.name: point.value for point in importlib.metadata.entry_points(group=GROUP)}


def shipped(installed: Mapping[str, str] | None = None) -> dict[str, Path]:
    """Recipes of all installed methods: `method/name` -> file. No method is imported for it. `installed` is
    what `methods` gives, where somebody has asked already."""
    found: dict[str, Path] = {}
    for name, module in sorted((methods() if installed is None else installed).items()):
        spec = importlib.util.find_spec(module)
        if spec is None or not spec.submodule_search_locations:
            raise UserError(
                f"method {name}: entry point {GROUP} names {module}, which is not an importable package"
            )
        folder = Path(spec.submodule_search_locations[0]) / "recipes"
        found |= {f"{name}/{file.stem}": file for file in sorted(folder.glob("*.yaml"))}
    return found


def locate(name: str, installed: Mapping[str, str] | None = None) -> Path:
    """The file of a recipe, given as `method/name` or as a path ending in `.yaml`; `installed` as in
    `shipped`."""
    if name.endswith((".yaml", ".yml")):
        if not Path(name).is_file():
            raise UserError(f"{name}: no such recipe file")
        return Path(name)
    known = shipped(installed)
    if name not in known:
        near = recipes.nearest(name, known)
        raise UserError(
            f"{name}: no such recipe; "
            + (f"did you mean {near}? " if near else "")
            + "`vlp-train ls` lists them"
        )
    return known[name]


def attribute(place: str) -> Any:
    """The object at `module:attribute`."""
    module, _, name = place.partition(":")
    return getattr(importlib.import_module(module), name)


def _one_of(word: Any, known: Mapping[str, Any], what: str, source: str) -> Any:
    if not isinstance(word, str) or word not in known:
        near = recipes.nearest(str(word), known)
        known_text = ", ".join(known) or "none is installed"
        text = (
            "required"
            if word is None
            else f"{word!r} is not known" + (f"; did you mean {near}?" if near else "")
        )
        raise recipes.RecipeError([f"{what}: {text} (known: {known_text})"], source)
    return known[word]


def task_entry(
    method: Any, task: Any, source: str = "", installed: Mapping[str, str] | None = None
) -> TaskEntry:
    """The entry of a task. An unknown method or task raises `RecipeError` with the known ones; `source` is
    the file named in it; `installed` as in `shipped`."""
    known = methods() if installed is None else installed
    module = importlib.import_module(_one_of(method, known, "method", source))
    entry: TaskEntry = _one_of(task, module.tasks, "task", source)
    return entry


def load(name: str, overrides: list[str] | tuple[str, ...] = ()) -> Recipe:
    """Find a recipe by name or path, apply overrides and check it against its task's schema.

    Raises `UserError` if there is no such recipe and `vlp_core.recipe.RecipeError` with all mistakes in it.
    """
    installed = methods()  # once: looking through all packages takes milliseconds
    file = locate(name, installed)
    values, renamed = earlier.upgrade(recipes.read(file))
    entry = task_entry(values.get("method"), values.get("task"), str(file), installed)
    settings = recipes.build(attribute(entry.schema), values, overrides, source=str(file))
    earlier.announce(file, renamed)
    return Recipe(file.stem if name.endswith((".yaml", ".yml")) else name, file, settings, entry, values)
