"""Options of `vlp-eval BENCHMARK`: those of the benchmark, its data, the files beside it and where it runs,
all under flat keys. Imports no torch."""

import dataclasses
import functools
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

from vlp_core import recipe
from vlp_core.recipe import PathText
from vlp_data.options import ConceptOptions
from vlp_data.sources import source_type

from vlp_eval.benchmarks import Benchmark
from vlp_eval.benchmarks.options import BenchmarkOptions, at_least


@dataclass(frozen=True, kw_only=True)
class Command:
    """What every command has beside the options of its benchmark."""

    tokenizer: tuple[PathText, ...] = ()
    """Files of the vocabulary, such as vocab.txt, or vocab.json and merges.txt; empty takes the checkpoint's
    (official checkpoints hold none)."""
    concepts: ConceptOptions | None = None
    """How the words attached to an image (kwords) are read, for a model with a concept encoder:
    concepts.max_tokens, concepts.separator, concepts.pad. null takes the checkpoint's, padded to max_tokens
    in retrieval and grounding, as the reference evaluates."""
    workers: int = 0
    """Processes that decode images; 0 decodes in the main process."""
    device: str = "auto"
    """auto (a GPU if there is one), cpu, cuda or cuda:N."""
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    """Precision of the model; scores are compared in fp32."""
    out: PathText = "eval"
    """Folder for BENCHMARK.json, the file of predictions and BENCHMARK.png; files there are replaced."""

    def __post_init__(self) -> None:
        at_least(self, 0, "workers")


class Options(NamedTuple):
    """The checked options of one command."""

    source: Any
    """Options of the source (`data`), with `open()`."""
    files: Any | None
    """Paths beside the source; None for a benchmark without."""
    options: BenchmarkOptions
    """How the benchmark is taken."""
    command: Command
    """The rest."""
    flat: Any
    """All of these in one dataclass, for the report."""


@functools.cache
def schema(benchmark: Benchmark) -> type:
    """The dataclass of all keys of a command: `data`, and the fields of the benchmark's classes and of
    `Command`. Raises TypeError for a key that two of them have."""
    found: dict[str, dataclasses.Field[Any]] = {}
    hints: dict[str, Any] = {"data": source_type(benchmark.holds)}
    for part in _parts(benchmark):
        own = typing.get_type_hints(part, include_extras=True)
        for field in dataclasses.fields(part):
            if field.name in hints:
                raise TypeError(f"{part.__name__}.{field.name}: another class of this benchmark has this key")
            hints[field.name], found[field.name] = own[field.name], field

    def check(self: Any) -> None:
        for part in _parts(benchmark):
            _piece(part, self)

    fields: list[Any] = [("data", hints["data"])]
    for name, one in found.items():
        # A field object belongs to the class that it was made in; the new class gets one of the same default.
        if one.default_factory is not dataclasses.MISSING:
            fields.append((name, hints[name], dataclasses.field(default_factory=one.default_factory)))
        elif one.default is not dataclasses.MISSING:
            fields.append((name, hints[name], dataclasses.field(default=one.default)))
        else:
            fields.append((name, hints[name]))
    return dataclasses.make_dataclass(
        f"{benchmark.name}_options", fields, namespace={"__post_init__": check}, frozen=True, kw_only=True
    )


def load(benchmark: Benchmark, values: Mapping[str, Any], overrides: Sequence[str]) -> Options:
    """Options from the values of a recipe file with `key=value` overrides.

    Raises `RecipeError` with every mistake at once; a key of an earlier version is answered with what became
    of it.
    """
    try:
        flat = recipe.build(schema(benchmark), _with_format(benchmark, values), overrides)
    except recipe.RecipeError as error:
        problems = [_with_earlier(benchmark, problem) for problem in error.problems]
        raise recipe.RecipeError(problems) from error
    pieces = {part: _piece(part, flat) for part in _parts(benchmark)}
    files = benchmark.part("files")
    return Options(
        source=flat.data,
        files=None if files is None else pieces[files],
        options=pieces[benchmark.part("options")],
        command=pieces[Command],
        flat=flat,
    )


class Keys(NamedTuple):
    """Keys of a command, to be shown."""

    common: list[recipe.Line]
    """Those that do not depend on the format of the data."""
    formats: dict[str, list[recipe.Line]]
    """Those of each format, by its name."""


def keys(benchmark: Benchmark) -> Keys:
    """Every key with default and meaning; `REQUIRED` is the value of what the user has to give."""
    union = source_type(benchmark.holds)
    formats = {}
    for source in typing.get_args(union) or (union,):
        lines = [line._replace(key=f"data.{line.key}") for line in _lines(source)]
        formats[source.format] = lines
    return Keys([line for part in _parts(benchmark) for line in _lines(part)], formats)


def _with_format(benchmark: Benchmark, values: Mapping[str, Any]) -> dict[str, Any]:
    """Values with the benchmark's own format of data where none is named."""
    data = values.get("data", {})
    if not isinstance(data, Mapping):
        return dict(values)
    return {**values, "data": {**({"format": benchmark.format} if benchmark.format else {}), **data}}


def _parts(benchmark: Benchmark) -> list[type]:
    files = benchmark.part("files")
    return [*([] if files is None else [files]), benchmark.part("options"), Command]


def _piece(part: type, flat: Any) -> Any:
    return part(**{field.name: getattr(flat, field.name) for field in dataclasses.fields(part)})


def _with_earlier(benchmark: Benchmark, problem: str) -> str:
    key, _, rest = problem.partition(": ")
    if rest.startswith("unknown key") and key in benchmark.earlier:
        return f"{key}: unknown key; {benchmark.earlier[key]}"
    return problem


def _lines(part: type) -> list[recipe.Line]:
    """The keys of a dataclass, filled with placeholders where the user has to give something."""
    hints = typing.get_type_hints(part, include_extras=True)
    given = {
        field.name: _placeholder(hints[field.name])
        for field in dataclasses.fields(part)
        if field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
    }
    lines = recipe.describe(part(**given), {})
    return [line._replace(value=recipe.REQUIRED) if line.key in given else line for line in lines]


def _placeholder(hint: Any) -> Any:
    if typing.get_origin(hint) is tuple:
        return (recipe.REQUIRED,)
    return {int: 1, float: 1.0}.get(hint, recipe.REQUIRED)
