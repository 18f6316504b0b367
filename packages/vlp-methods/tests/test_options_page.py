"""The table of options in the documentation is made from the schema."""

import dataclasses
import importlib.util
import typing
from collections.abc import Iterator
from pathlib import Path

from vlp_methods.engine.options import Length, Training

ROOT = Path(__file__).parents[3]


def keys(schema: type, place: str = "") -> Iterator[str]:
    """Dotted keys of a schema and of the sections in it."""
    hints = typing.get_type_hints(schema)
    for field in dataclasses.fields(schema):
        key = f"{place}.{field.name}" if place else field.name
        yield key
        todo, many = [hints[field.name]], False
        while todo:
            hint = todo.pop()
            many |= typing.get_origin(hint) in (tuple, dict)
            todo += typing.get_args(hint)
            if isinstance(hint, type) and dataclasses.is_dataclass(hint) and hint is not Length:
                yield from keys(hint, key + ("[]" if many else ""))


def test_every_key_has_a_row_with_its_meaning():
    spec = importlib.util.spec_from_file_location("generate", ROOT / "docs/generate.py")
    assert spec
    assert spec.loader
    generate = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(generate)
    rows = [
        [cell.strip() for cell in line.replace("\\|", "/").split("|")[1:-1]]
        for line in generate.option_page(ROOT).splitlines()
        if line.startswith("| `")
    ]
    meanings = {row[0].strip("`"): row[3] for row in rows}
    wanted = set(keys(Training))
    assert {"steps", "optimizer.rules[].pattern", "schedules[].kind", "average.decay"} <= wanted
    assert wanted <= meanings.keys()
    assert all(meanings[key] for key in wanted), "a field without docstring"
    defaults = {row[0].strip("`"): row[2] for row in rows}
    assert defaults["steps"] == "required"
    assert defaults["save.every"] == "`1000`"
    assert defaults["average"] == "`null`"
