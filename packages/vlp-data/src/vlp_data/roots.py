"""Types of fields that name paths, and options whose relative paths start at a folder."""

import functools
import types
import typing
from dataclasses import fields, is_dataclass, replace
from typing import Annotated, Any, TypeAlias, TypeVar, Union

from vlp_data.files import join

PathText: TypeAlias = Annotated[str, "path"]
"""A local path or fsspec URL; "" is none. Recipes replace `${env:NAME}` in fields of this type."""
FolderText: TypeAlias = Annotated[str, "path", "folder"]
"""A folder that other paths start at; "" is the root itself (see `rooted`). Otherwise like `PathText`."""

_Options = TypeVar("_Options")


def rooted(options: _Options, root: str) -> _Options:
    """The same options with relative paths below `root` (a folder or fsspec URL; "" changes nothing).

    The type of a field says what is a path: `PathText` (an empty one stays empty), `FolderText` (an empty one
    is the root itself), and tuples, dicts, unions and dataclasses of these. An item of a tuple of `PathText`
    may be several paths joined by commas (`vlp_data.files.expand`); it becomes several items. Works for every
    dataclass, those of other packages included.
    """
    hints = path_fields(type(options))
    changed = {name: _below(hint, getattr(options, name), root) for name, hint in hints.items()}
    return replace(options, **changed)  # type: ignore[type-var]


@functools.cache
def path_fields(options: type) -> dict[str, Any]:
    """Types of the fields of a dataclass that hold paths, by name, in the order of the class."""
    hints = typing.get_type_hints(options, include_extras=True)
    return {
        field.name: hints[field.name]
        for field in fields(options)
        if field.init and _has_path(hints[field.name])
    }


def _has_path(hint: Any) -> bool:
    if hint in (PathText, FolderText) or is_dataclass(hint):
        return True
    return any(_has_path(part) for part in _parts(hint))


def _parts(hint: Any) -> tuple[Any, ...]:
    """Types inside of a tuple, dict or union; none for anything else."""
    inside = (tuple, dict, Union, types.UnionType)
    return typing.get_args(hint) if typing.get_origin(hint) in inside else ()


def _below(hint: Any, value: Any, root: str) -> Any:
    """`value` of the type `hint` with the paths in it below `root`."""
    origin, parts = typing.get_origin(hint), _parts(hint)
    if is_dataclass(value):
        return rooted(value, root)
    if hint == FolderText:
        return join(root, value) if value else root
    if hint == PathText:
        return join(root, value) if value else value
    if origin is dict and isinstance(value, dict):
        return {key: _below(parts[1], item, root) for key, item in value.items()}
    if hint == tuple[PathText, ...]:
        return tuple(_below(PathText, part.strip(), root) for item in value for part in item.split(","))
    if origin is tuple and isinstance(value, tuple):
        kinds = parts[:1] * len(value) if parts[-1] is Ellipsis else parts
        return tuple(_below(kind, item, root) for kind, item in zip(kinds, value, strict=True))
    if origin in (Union, types.UnionType):
        for part in parts:
            if _has_path(part) and isinstance(
                value, {tuple: tuple, dict: dict}.get(typing.get_origin(part), str)
            ):
                return _below(part, value, root)
    return value
