"""Checks of option values, and options from plain JSON. Imports nothing heavy."""

import dataclasses
import types
import typing
from collections.abc import Mapping, Sequence
from typing import Any, Literal, TypeVar, Union

T = TypeVar("T")


def positive(options: object, *names: str) -> None:
    """Raise ValueError for a field that is not positive."""
    for name in names:
        value = getattr(options, name)
        if value <= 0:
            raise ValueError(f"{name}={value} must be positive")


def fraction(options: object, *names: str) -> None:
    """Raise ValueError for a field outside 0..1."""
    for name in names:
        value = getattr(options, name)
        if not 0 <= value <= 1:
            raise ValueError(f"{name}={value} must lie in 0..1")


def from_mapping(options: type[T], values: Mapping[str, Any], keys: Sequence[str], what: str) -> T:
    """An option dataclass from plain values of which only `keys` may be given; `what` names them in messages.

    Missing keys take the defaults. Raises ValueError for an unknown key, a value of another type, and what
    the dataclass itself refuses.
    """
    hints = typing.get_type_hints(options)
    for key in values:
        if key not in keys:
            raise ValueError(f"{what}: unknown key {key!r}; known here: {', '.join(keys)}")
    needed = [
        field.name
        for field in dataclasses.fields(options)  # type: ignore[arg-type]  # every caller gives a dataclass
        if field.name in keys
        and field.name not in values
        and field.default is dataclasses.MISSING
        and field.default_factory is dataclasses.MISSING
    ]
    if needed:
        raise ValueError(f"{what}: {', '.join(needed)} must be given")
    try:
        return options(**{key: _as(hints[key], value, key) for key, value in values.items()})
    except ValueError as error:
        raise ValueError(f"{what}: {error}") from error


def _as(hint: Any, value: Any, key: str) -> Any:
    """`value` as the type of a field; lists become tuples, whole numbers floats."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (Union, types.UnionType):
        if value is None and type(None) in arguments:
            return None
        (hint,) = (member for member in arguments if member is not type(None))
        return _as(hint, value, key)
    if origin is Literal:
        if value in arguments:
            return value
        raise ValueError(f"{key}={value!r} must be one of {', '.join(map(str, arguments))}")
    if origin is tuple and isinstance(value, (list, tuple)):
        kinds = [arguments[0]] * len(value) if arguments[-1] is Ellipsis else list(arguments)
        if len(kinds) != len(value):
            raise ValueError(f"{key} must hold {len(kinds)} values, got {len(value)}")
        return tuple(_as(kind, item, key) for kind, item in zip(kinds, value, strict=True))
    if hint is float and type(value) is int:
        return float(value)
    if dataclasses.is_dataclass(hint) and isinstance(hint, type) and isinstance(value, Mapping):
        return from_mapping(hint, value, [field.name for field in dataclasses.fields(hint)], key)
    if isinstance(hint, type) and type(value) is hint:
        return value
    raise ValueError(f"{key}={value!r} has the wrong type")
