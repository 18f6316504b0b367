"""Recipes: one YAML file, one typed schema, every mistake reported at once.

A schema is a frozen keyword-only stdlib dataclass; each field may carry a one-line docstring (a string
literal below it), cross-field rules live in `__post_init__` and raise `ValueError`. Field types: `bool`,
`int`, `float`, `str`, `PathText`, `None`, `Literal[...]`, `tuple[X, ...]`, `tuple[X, Y]`, `dict[str, X]`,
another dataclass, and unions of these; dataclasses in one union are told apart by a field of type
`Literal["name"]` that all of them have.

YAML is read with the scalar rules of YAML 1.2 (`1e-4` is a float, `on` and `010` are not a bool and an octal
number), the same ones for files and for `key=value` overrides. Rules of the file format: `???` marks a value
the user must give, `${env:NAME}` is replaced in `PathText` fields, nothing else is interpolated.

The schema walk is written out here because start-up is budgeted (0.15 s for a user error): importing a
validation library and building validators for nested dataclasses takes longer than everything else
`vlp-train` does before it prints its one line. Nothing in this module imports torch.
"""

import dataclasses
import functools
import itertools
import os
import re
import types
import typing
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, TypeVar, Union

__all__ = [
    "REQUIRED",
    "Difference",
    "Line",
    "PathText",
    "RecipeError",
    "apply_overrides",
    "build",
    "describe",
    "differences",
    "dump",
    "dumps",
    "inline",
    "load",
    "nearest",
    "parse",
    "read",
]

T = TypeVar("T")

REQUIRED = "???"
"""The value in a recipe that says: the user must give this."""

PATH = "path"
PathText = Annotated[str, PATH]
"""A local path or fsspec URL; `${env:NAME}` inside is replaced by the environment variable."""

ENVIRONMENT = re.compile(r"\$\{env:([^}]*)\}")
INTEGER = re.compile(r"[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+")
FLOAT = re.compile(
    r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)"
)
BOOL = re.compile(r"true|True|TRUE|false|False|FALSE")
NULL = re.compile(r"~|null|Null|NULL|")


class RecipeError(ValueError):
    """One or more mistakes of a recipe or its overrides.

    `problems` holds one sentence per mistake, each beginning with the dotted key; `source` names the file
    they are in.
    """

    def __init__(self, problems: Iterable[str], source: str = "") -> None:
        self.problems = tuple(problems)
        self.source = source
        super().__init__(
            "\n".join((f"{source}:" if source else "recipe:", *(f"  {line}" for line in self.problems)))
        )


class Line(NamedTuple):
    """One key of a recipe, as `describe` lists it."""

    key: str
    kind: str
    value: Any
    origin: Literal["default", "recipe", "command line"]
    doc: str


class Difference(NamedTuple):
    """One key whose value differs; `ABSENT` stands for a key that one side does not have."""

    key: str
    before: Any
    after: Any


class _Absent:
    def __repr__(self) -> str:
        return "(absent)"


ABSENT = _Absent()
_WRONG = object()  # result of a conversion that has reported a problem

# YAML
# ------------------------------------------------------------------------------------------------------------


def _integer(text: str) -> int:
    return int(text, {"0o": 8, "0x": 16}.get(text[:2], 10))


def _float(text: str) -> float:
    return float(text.replace(".", "", 1) if text.lower().lstrip("+-") in (".inf", ".nan") else text)


def _resolve_as_1_2(cls: Any) -> Any:
    """Replace PyYAML's YAML 1.1 scalar rules of a loader or dumper class by those of the YAML 1.2 core
    schema."""
    cls.yaml_implicit_resolvers = {}
    for tag, pattern, first in (
        ("bool", BOOL, "tTfF"),
        ("int", INTEGER, "-+0123456789"),
        ("float", FLOAT, "-+.0123456789"),
        ("null", NULL, ["~", "n", "N", ""]),
    ):
        whole = re.compile(rf"(?:{pattern.pattern})\Z")
        cls.add_implicit_resolver(f"tag:yaml.org,2002:{tag}", whole, list(first))
    return cls


@functools.cache
def _loader() -> Any:
    import yaml

    # The C parser where PyYAML was built with it.
    base: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)

    class Loader(base):
        pass

    def mapping(loader: Any, node: Any) -> dict[str, Any]:
        seen: dict[str, Any] = {}
        for key_node, _ in node.value:
            key = loader.construct_object(key_node)
            if not isinstance(key, str):
                raise yaml.constructor.ConstructorError(
                    None, None, f"key {key!r} is not text; quote it", key_node.start_mark
                )
            if key in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"key {key!r} is given twice", key_node.start_mark
                )
            seen[key] = None
        return loader.construct_mapping(node, deep=True)

    _resolve_as_1_2(Loader)
    Loader.add_constructor(
        "tag:yaml.org,2002:int", lambda loader, node: _integer(loader.construct_scalar(node))
    )
    Loader.add_constructor(
        "tag:yaml.org,2002:float", lambda loader, node: _float(loader.construct_scalar(node))
    )
    Loader.add_constructor("tag:yaml.org,2002:map", mapping)
    return Loader


@functools.cache
def _dumper() -> Any:
    import yaml

    class Dumper(yaml.SafeDumper):
        def ignore_aliases(self, data: Any) -> bool:
            return True

    return _resolve_as_1_2(Dumper)


def parse(text: str, source: str = "text") -> Any:
    """YAML text to plain values, by the scalar rules of YAML 1.2.

    Raises `RecipeError` with line and column for a syntax error, a key given twice or a key that is not text.
    """
    import yaml

    # YAML takes braces inside [...] and {...} for its own; those of ${env:NAME} must not need quotes there.
    shielded = ENVIRONMENT.sub(lambda found: found[0].translate(_SHIELD), text)
    try:
        return _unshielded(
            yaml.load(shielded, Loader=_loader())
        )  # a subclass of SafeLoader: plain values only
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f"line {mark.line + 1}, column {mark.column + 1}: " if mark else ""
        raise RecipeError([f"{where}{getattr(error, 'problem', None) or error}"], source) from None


_SHIELD = {ord("{"): "\ue000", ord("}"): "\ue001"}
_BARE = {ord(shield): chr(brace) for brace, shield in _SHIELD.items()}


def _unshielded(value: Any) -> Any:
    if isinstance(value, str):
        return value.translate(_BARE)
    if isinstance(value, list):
        return [_unshielded(item) for item in value]
    if isinstance(value, dict):
        return {_unshielded(key): _unshielded(item) for key, item in value.items()}
    return value


def read(path: str | os.PathLike[str]) -> dict[str, Any]:
    """The mapping in a YAML file, unchecked against any schema.

    Raises `FileNotFoundError`, or `RecipeError` if the file is not a YAML mapping.
    """
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise FileNotFoundError(f"{path} not found") from None
    except UnicodeDecodeError as error:
        raise RecipeError([f"is not UTF-8 text ({error.reason} at byte {error.start})"], str(path)) from None
    values = parse(text, str(path))
    if not isinstance(values, dict):
        raise RecipeError([f"holds {_show(values)}, expected `key: value` lines"], str(path))
    return values


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: _plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, (tuple, list)):
        return [_plain(item) for item in value]
    return value


def dump(recipe: Any) -> dict[str, Any]:
    """A recipe as plain dicts, lists and scalars, every field written out: `build(type(recipe), dump(recipe))
    == recipe`."""
    return typing.cast("dict[str, Any]", _plain(recipe))


def dumps(recipe: Any) -> str:
    """`dump` as YAML text; reading it back gives an equal recipe."""
    import yaml

    return yaml.dump(_plain(recipe), Dumper=_dumper(), sort_keys=False, width=110, allow_unicode=False)


def inline(value: Any) -> str:
    """A plain value as YAML on one line."""
    import yaml

    text: str = yaml.dump(
        _plain(value), Dumper=_dumper(), sort_keys=False, width=1 << 30, default_flow_style=True
    )
    return text.removesuffix("...\n").rstrip("\n")


# ----------------------------------------------------------------------------------------------------------
# overrides


def _split(override: str) -> tuple[list[str], str] | str:
    key, sign, text = override.partition("=")
    parts = key.split(".")
    if not sign:
        return f"{override}: not of the form key=value"
    if not all(part and part == part.strip() for part in parts):
        return f"{override}: {key!r} is not a dotted key such as optimizer.lr"
    return parts, text


def _step_into(node: Any, part: str, path: str) -> tuple[Any, str]:
    """The key under which `part` lives in `node`, or a complaint."""
    if isinstance(node, list):
        if not part.isdecimal():
            return None, f"{path}.{part}: {path} is a list; use the number of an item, such as {path}.0"
        if int(part) >= len(node):
            return None, f"{path}.{part}: {path} has {len(node)} items, numbered from 0"
        return int(part), ""
    if isinstance(node, dict):
        return part, ""
    return None, f"{path}.{part}: {path} is {_show(node)}, it has no keys"


def _apply(
    values: Mapping[str, Any], overrides: Sequence[str]
) -> tuple[dict[str, Any], dict[str, str], list[str]]:
    tree: dict[str, Any] = _plain(values)
    given: dict[str, str] = {}
    problems: list[str] = []
    for override in overrides:
        split = _split(override)
        if isinstance(split, str):
            problems.append(split)
            continue
        parts, text = split
        try:
            value = parse(text)
        except RecipeError as error:
            problems.append(f"{override}: the value is not YAML ({error.problems[0]}); quote it")
            continue
        node: Any = tree
        for depth, part in enumerate(parts):
            key, complaint = _step_into(node, part, ".".join(parts[:depth]))
            if complaint:
                problems.append(complaint)
                break
            if depth == len(parts) - 1:
                node[key] = value
                given[".".join(parts)] = text
                continue
            child = node.get(key) if isinstance(node, dict) else node[key]
            if (
                child is None or child == REQUIRED
            ):  # a section that is absent, null or still to be given starts empty
                child = node[key] = {}
            node = child
    return tree, given, problems


def apply_overrides(values: Mapping[str, Any], overrides: Sequence[str]) -> dict[str, Any]:
    """A copy of `values` with `key=value` overrides applied in order (later wins).

    The value is parsed as YAML; list items are addressed by number (`sources.0.names=[coco]`). Raises
    `RecipeError` listing every override that is malformed or leads through something that has no keys.
    """
    tree, _, problems = _apply(values, overrides)
    if problems:
        raise RecipeError(problems, "command line")
    return tree


# ---------------------------------------------------------------------------------------------------------
# validation


def nearest(word: str, known: Iterable[str]) -> str | None:
    """The most similar of the known words, or None when nothing is near."""
    import difflib

    found = difflib.get_close_matches(word, list(known), n=1, cutoff=0.6)
    return found[0] if found else None


def _show(value: Any) -> str:
    text = "null" if value is None else str(value).lower() if isinstance(value, bool) else repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


@functools.cache
def _hints(schema: type) -> dict[str, Any]:
    hints = typing.get_type_hints(schema, include_extras=True)
    return {field.name: hints[field.name] for field in dataclasses.fields(schema) if field.init}


def _members(hint: Any) -> tuple[Any, ...]:
    """The alternatives of a union, `(hint,)` for anything else."""
    if typing.get_origin(hint) in (Union, types.UnionType):
        return tuple(member for part in typing.get_args(hint) for member in _members(part))
    return (hint,)


def _is_schema(hint: Any) -> bool:
    return isinstance(hint, type) and dataclasses.is_dataclass(hint)


def _tag(schemas: Sequence[type]) -> str:
    """The field of type `Literal["name"]` that all members of a union of dataclasses have."""
    common = [
        name
        for name in _hints(schemas[0])
        if all(typing.get_origin(_hints(s).get(name)) is Literal for s in schemas)
    ]
    if not common:
        raise TypeError(
            f"{' | '.join(s.__name__ for s in schemas)} have no Literal field in common to tell them apart"
        )
    return common[0]


def _kind(hint: Any) -> str:
    """A type in the words of a message: `int or null`, `list of path`, `one of bert, roberta`."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if len(_members(hint)) > 1:
        return " or ".join(_kind(member) for member in _members(hint))
    if origin is Annotated:
        return PATH if PATH in arguments[1:] else _kind(arguments[0])
    if origin is Literal:
        choices = ", ".join(str(choice) for choice in arguments)
        return choices if len(arguments) == 1 else f"one of {choices}"
    if origin is tuple:
        if arguments[-1] is Ellipsis:
            return f"list of {_kind(arguments[0])}"
        return f"list of {len(arguments)} ({', '.join(_kind(item) for item in arguments)})"
    if origin is dict:
        return f"mapping of {_kind(arguments[1])}"
    if hint is type(None):
        return "null"
    return {bool: "true or false", str: "text"}.get(
        hint, hint.__name__ if not _is_schema(hint) else "mapping"
    )


class _Walk:
    """One walk of a schema over values; collects problems instead of raising the first."""

    def __init__(self, schema: type, given: Mapping[str, str]) -> None:
        self.schema = schema
        self.given = given  # dotted key -> text as typed on the command line
        self.problems: list[str] = []

    def wrong(self, path: str, text: str) -> Any:
        self.problems.append(f"{path}: {text}" if path else text)
        return _WRONG

    def convert(self, hint: Any, value: Any, path: str) -> Any:
        if isinstance(value, str) and value == REQUIRED:
            return self.wrong(path, f"required ({_kind(hint)}); give {path}=...")
        members = _members(hint)
        schemas = [member for member in members if _is_schema(member)]
        if schemas and isinstance(value, Mapping):
            return self.section(schemas, value, path)
        if value is None and type(None) in members:
            return None
        others = [member for member in members if member not in schemas and member is not type(None)]
        for exact in (
            True,
            False,
        ):  # `int | float` keeps 2 an int and 2.0 a float; only then is 2.0 taken for an int
            for member in others:
                if (found := self.single(member, value, path, exact)) is not None:
                    return found
        hint_text = ""
        if isinstance(value, str) and (
            near := nearest(
                value, [str(c) for m in others if typing.get_origin(m) is Literal for c in typing.get_args(m)]
            )
        ):
            hint_text = f"; did you mean {near}?"
        return self.wrong(path, f"expected {_kind(hint)}, got {_show(value)}{hint_text}")

    def single(self, hint: Any, value: Any, path: str, exact: bool) -> Any:
        """`value` as the non-union type `hint`; None when it is not one. `exact` allows no change of type."""
        origin, arguments = typing.get_origin(hint), typing.get_args(hint)
        if origin is Annotated:
            return (
                self.single(arguments[0], value, path, exact)
                if PATH not in arguments
                else self.path(value, path)
            )
        if origin is Literal:
            typed = self.given.get(path)
            for choice in arguments:
                if (type(choice) is type(value) and choice == value) or choice == typed:
                    return choice
            return None
        if origin is tuple and isinstance(value, (list, tuple)):
            return self.items(arguments, value, path)
        if origin is dict and isinstance(value, Mapping):
            items = {key: self.convert(arguments[1], item, f"{path}.{key}") for key, item in value.items()}
            return _WRONG if any(item is _WRONG for item in items.values()) else items
        if origin is not None or _is_schema(hint):
            return None
        if hint not in (bool, int, float, str):
            raise TypeError(f"{path}: a schema cannot have a field of type {hint}")
        if type(value) is hint:
            if isinstance(value, str) and ENVIRONMENT.search(value):
                return self.wrong(path, f"{value!r}: ${{env:NAME}} is replaced in path fields only")
            return value
        return None if exact else self.lenient(hint, value, path)

    def lenient(self, hint: type, value: Any, path: str) -> Any:
        if hint is int and isinstance(value, float) and value.is_integer():  # steps=2e5
            return int(value)
        if hint is float and type(value) is int:
            return float(value)
        if hint is float and isinstance(value, str) and FLOAT.fullmatch(value):  # "1e-4" in quotes
            return _float(value)
        if (
            hint is str and path in self.given and not isinstance(value, (list, dict))
        ):  # name=2026 for a text field
            return self.given[path]
        return None

    def path(self, value: Any, path: str) -> Any:
        if not isinstance(value, str):
            return self.lenient(str, value, path)
        unset = [name for name in ENVIRONMENT.findall(value) if name not in os.environ]
        if unset:
            return self.wrong(path, f"{value!r}: environment variable {', '.join(unset)} is not set")
        return ENVIRONMENT.sub(lambda match: os.environ[match[1]], value)

    def items(self, arguments: tuple[Any, ...], value: Sequence[Any], path: str) -> Any:
        hints = [arguments[0]] * len(value) if arguments[-1] is Ellipsis else list(arguments)
        if len(hints) != len(value):
            return self.wrong(path, f"expected {len(hints)} items, got {len(value)}: {_show(value)}")
        found = tuple(
            self.convert(hint, item, f"{path}.{i}")
            for i, (hint, item) in enumerate(zip(hints, value, strict=True))
        )
        return _WRONG if any(item is _WRONG for item in found) else found

    def section(self, schemas: Sequence[type], value: Mapping[str, Any], path: str) -> Any:
        if len(schemas) == 1:
            return self.fields(schemas[0], value, path)
        tag = _tag(schemas)
        names = {name: schema for schema in schemas for name in typing.get_args(_hints(schema)[tag])}
        key = f"{path}.{tag}" if path else tag
        if tag not in value or value[tag] == REQUIRED:
            return self.wrong(key, f"required (one of {', '.join(names)}); give {key}=...")
        if not isinstance(value[tag], str) or value[tag] not in names:
            near = nearest(str(value[tag]), names)
            return self.wrong(
                key,
                f"expected one of {', '.join(names)}, got {_show(value[tag])}"
                + (f"; did you mean {near}?" if near else ""),
            )
        return self.fields(names[value[tag]], value, path)

    def fields(self, schema: type, value: Mapping[str, Any], path: str) -> Any:
        hints = _hints(schema)
        before = len(self.problems)
        prefix = f"{path}." if path else ""
        for key in value:
            if key not in hints:
                self.unknown(key, hints, prefix)
        found: dict[str, Any] = {}
        for field in dataclasses.fields(schema):
            if field.name in value:
                found[field.name] = self.convert(hints[field.name], value[field.name], prefix + field.name)
            elif field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING:
                self.wrong(
                    prefix + field.name,
                    f"required ({_kind(hints[field.name])}); give {prefix}{field.name}=...",
                )
        if len(self.problems) > before:
            return _WRONG
        try:
            return schema(**found)
        except ValueError as error:  # a rule of __post_init__
            return self.wrong(path, str(error))

    def unknown(self, key: str, hints: Mapping[str, Any], prefix: str) -> None:
        near = nearest(key, hints)
        if near is None:
            everywhere = list(_keys(self.schema))
            same_name = [full for full in everywhere if full.rsplit(".", 1)[-1] == key]
            near_full = same_name[0] if same_name else nearest(prefix + key, everywhere)
        else:
            near_full = prefix + near
        way_out = f"did you mean {near_full}?" if near_full else f"known here: {', '.join(hints)}"
        self.wrong(prefix + key, f"unknown key; {way_out}")


def _keys(schema: type, prefix: str = "") -> Iterator[str]:
    """Dotted keys of a schema, sections before their fields."""
    for name, hint in _hints(schema).items():
        yield prefix + name
        for member in _members(hint):
            if _is_schema(member):
                yield from _keys(member, f"{prefix}{name}.")


def build(
    schema: type[T], values: Mapping[str, Any], overrides: Sequence[str] = (), *, source: str = ""
) -> T:
    """An instance of `schema` from plain values with `key=value` overrides.

    Raises `RecipeError` that lists every malformed override, unknown key (with the nearest known one),
    missing value, wrong type or choice, unset environment variable and broken rule of a `__post_init__`.
    `source` names the file in the message.
    """
    tree, given, problems = _apply(values, overrides)
    walk = _Walk(schema, given)
    recipe = walk.convert(schema, tree, "")
    if problems or walk.problems:
        raise RecipeError([*problems, *walk.problems], source)
    return typing.cast("T", recipe)


def load(path: str | os.PathLike[str], schema: type[T], overrides: Sequence[str] = ()) -> T:
    """The recipe in a YAML file with `key=value` overrides, checked against `schema`. Raises as `read` and
    `build` do."""
    return build(schema, read(path), overrides, source=str(path))


# --------------------------------------------------------------------------------------------------------
# description


@functools.cache
def _docs(schema: type) -> dict[str, str]:
    """Docstrings of the fields: the string literal below each annotated name, in the class or the classes it
    extends."""
    import ast
    import inspect
    import textwrap

    docs: dict[str, str] = {}
    for base in reversed(schema.__mro__):
        if not _is_schema(base):
            continue
        body = typing.cast("ast.ClassDef", ast.parse(textwrap.dedent(inspect.getsource(base))).body[0]).body
        for statement, following in itertools.pairwise(body):
            if (
                isinstance(statement, ast.AnnAssign)
                and isinstance(statement.target, ast.Name)
                and isinstance(following, ast.Expr)
                and isinstance(following.value, ast.Constant)
                and isinstance(following.value.value, str)
            ):
                docs[statement.target.id] = " ".join(following.value.value.split())
    return docs


def _leaves(schema: type, recipe: Any, prefix: str) -> Iterator[tuple[str, str, Any, str]]:
    for name, hint in _hints(schema).items():
        value, key, doc = getattr(recipe, name), prefix + name, _docs(schema).get(name, "")
        if dataclasses.is_dataclass(value):
            yield from _leaves(type(value), value, f"{key}.")
        elif isinstance(value, tuple) and value and all(dataclasses.is_dataclass(item) for item in value):
            for i, item in enumerate(value):
                yield from _leaves(type(item), item, f"{key}.{i}.")
        else:
            yield key, _kind(hint), _plain(value), doc


def _has(values: Any, key: str) -> bool:
    for part in key.split("."):
        if isinstance(values, Mapping) and part in values:
            values = values[part]
        elif isinstance(values, list) and part.isdecimal() and int(part) < len(values):
            values = values[int(part)]
        else:
            return False
    return True


def describe(recipe: Any, values: Mapping[str, Any], overrides: Sequence[str] = ()) -> list[Line]:
    """Every key of a checked recipe: type, value, where the value came from, docstring.

    `values` is what `read` returned for its file and `overrides` what was given on the command line. Needs
    the source of the schema's module, which is where the docstrings are.
    """
    overridden = {override.partition("=")[0] for override in overrides}

    def origin(key: str) -> Literal["default", "recipe", "command line"]:
        parts = key.split(".")
        if any(".".join(parts[:depth]) in overridden for depth in range(1, len(parts) + 1)):
            return "command line"
        return "recipe" if _has(values, key) else "default"

    return [
        Line(key, kind, value, origin(key), doc)
        for key, kind, value, doc in _leaves(type(recipe), recipe, "")
    ]


def _flat(values: Any, prefix: str) -> dict[str, Any]:
    if isinstance(values, Mapping) and values:
        items: Iterable[tuple[Any, Any]] = values.items()
    elif isinstance(values, list) and values:
        items = enumerate(values)
    else:
        return {prefix: values}
    flat: dict[str, Any] = {}
    for key, value in items:
        flat |= _flat(value, f"{prefix}.{key}" if prefix else str(key))
    return flat


def differences(before: Mapping[str, Any], after: Mapping[str, Any]) -> list[Difference]:
    """Keys whose values differ between two dumped recipes, in the order of `after`."""
    old, new = _flat(before, ""), _flat(after, "")
    return [
        Difference(key, old.get(key, ABSENT), new.get(key, ABSENT))
        for key in [*new, *(key for key in old if key not in new)]
        if key not in old or key not in new or type(old[key]) is not type(new[key]) or old[key] != new[key]
    ]
