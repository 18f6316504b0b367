"""Options of a source from files and a few words, as a command line gives them."""

import json
import lzma
import types
import typing
import zlib
from collections.abc import Mapping
from dataclasses import MISSING, fields
from typing import Annotated, Any, Literal, Union

from vlp_data import files
from vlp_data.errors import DataError
from vlp_data.roots import FolderText, PathText
from vlp_data.sources import Beginning, SourceOptions, formats
from vlp_data.sources.rows import parse_json

FILES = (PathText, FolderText, tuple[PathText, ...])
"""Types of the field that takes the files."""


def detect(paths: tuple[str, ...]) -> str:
    """The format of files, from the first one's content. Raises FileNotFoundError; DataError when no format
    knows it, or several do."""
    path = files.expand(paths)[0]
    beginning = _beginning(path)
    found = [row.name for row in formats().values() if row.recognises(beginning)]
    if len(found) == 1:
        return found[0]
    known = ", ".join(formats())
    if found:
        raise DataError(f"{path} may be of the formats {', '.join(found)}; say which one (--format)")
    if beginning.value is None:
        raise DataError(
            f"{path} is neither JSON nor lines of JSON, and no format knows it; say which one it is "
            f"(--format, one of {known})"
        )
    raise DataError(
        f"{path} has none of the formats that are told by content; say which (--format, of {known})"
    )


def _beginning(path: str) -> Beginning:
    try:
        return _read_beginning(path)
    except (EOFError, zlib.error, lzma.LZMAError) as error:
        raise DataError(f"{path} is damaged: {error}") from error


def _read_beginning(path: str) -> Beginning:
    with files.open_read(path) as stream:
        line = stream.readline()
        try:
            return Beginning(path, line, parse_json(line))
        except ValueError:
            if line.strip() and not line.lstrip().startswith((b"[", b"{")):
                return Beginning(path, line, None)
        try:
            # An indented document.
            return Beginning(path, line, parse_json(line + stream.read()))
        except ValueError:
            return Beginning(path, line, None)


def source_options(
    paths: tuple[str, ...],
    *,
    format: str | None = None,
    root: str = "",
    split: str = "train",
    given: Mapping[str, str] | None = None,
) -> SourceOptions:
    """Options of a source for files of a format (None: `detect` it), images below `root`.

    The first required field of the format that names paths takes the files, the first other field of type
    `FolderText` takes `root`, and a required field `split` takes `split`. `given`: values of further fields
    as text; what is no text is written as JSON, lists of words also as WORD,WORD. Raises FileNotFoundError;
    DataError, naming format and field, for a format or field that does not exist, a value of a wrong type,
    and a required field without a value.
    """
    name = format or detect(paths)
    if name not in formats():
        raise DataError(f"format {name!r} is not known; known: {', '.join(formats())}")
    kind = formats()[name].load()
    hints = typing.get_type_hints(kind, include_extras=True)
    places = {item.name: hints[item.name] for item in fields(kind) if item.init and item.name != "format"}
    required = [
        item.name
        for item in fields(kind)
        if item.name in places and item.default is MISSING and item.default_factory is MISSING
    ]
    words = {"split": split, **(given or {})} if "split" in required else given or {}
    values: dict[str, Any] = {}
    for key, text in words.items():
        if key not in places:
            raise DataError(f"format {name} has no option {key!r}; it has {', '.join(places)}")
        values[key] = _value(places[key], text, f"{key} of format {name}")
    taker = next((key for key in required if places[key] in FILES), None)
    if taker is None:
        raise DataError(f"format {name} has no required field that takes files")
    if taker in values:
        raise DataError(f"{taker} of format {name} is given twice: the files are meant for it")
    if places[taker] == tuple[PathText, ...]:
        values[taker] = paths
    elif len(paths) == 1:
        values[taker] = paths[0]
    else:
        raise DataError(f"{name} takes one file, got {len(paths)}")
    folder = next((key for key in places if places[key] == FolderText and key not in values), None)
    if folder is not None:
        values[folder] = root
    elif root:
        raise DataError(f"root {root} has no effect: format {name} has no folder left that it could be")
    for key in required:
        if key not in values:
            raise DataError(f"format {name} needs {key}, {_meaning(places[key])}; give --option {key}=...")
    return kind(**values)


def _value(hint: Any, text: str, where: str) -> Any:
    """A value of the type `hint` from text. Raises DataError."""
    readings: list[Any] = [text, tuple(text.split(","))]
    try:
        value = json.loads(text)
        readings.append(tuple(value) if isinstance(value, list) else value)
    except ValueError:
        pass
    for reading in readings:
        if _fits(hint, reading):
            return reading
    raise DataError(f"{where}: {text!r} is not {_meaning(hint)}")


def _fits(hint: Any, value: Any) -> bool:
    origin, inside = typing.get_origin(hint), typing.get_args(hint)
    if origin is Annotated:
        return _fits(inside[0], value)
    if origin is Literal:
        return value in inside
    if origin in (Union, types.UnionType):
        return any(_fits(part, value) for part in inside)
    if origin is tuple:
        parts = inside[:1] * len(value) if inside[-1] is Ellipsis and isinstance(value, tuple) else inside
        return (
            isinstance(value, tuple)
            and len(parts) == len(value)
            and all(_fits(part, item) for part, item in zip(parts, value, strict=True))
        )
    if origin is dict:
        return isinstance(value, dict) and all(_fits(inside[1], item) for item in value.values())
    if hint is float:
        return type(value) in (int, float)
    return type(value) is hint


def _meaning(hint: Any) -> str:
    """A type in the words of a message."""
    origin, inside = typing.get_origin(hint), typing.get_args(hint)
    if origin is Annotated:
        return "a path" if "path" in inside[1:] else _meaning(inside[0])
    if origin is Literal:
        return f"one of {', '.join(map(str, inside))}"
    if origin in (Union, types.UnionType):
        return " or ".join(map(_meaning, inside))
    words = {tuple: "a JSON list", dict: "a JSON object", bool: "true or false", str: "text"}
    return words.get(origin or hint, "null" if hint is type(None) else getattr(hint, "__name__", str(hint)))
