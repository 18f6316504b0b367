"""Rows of large JSON lists, kept as one block of bytes.

Python objects would cost several times the memory, and once more per worker: reading one changes its
reference count, which copies the page it lies on.
"""

import json
from collections.abc import Iterable
from typing import Any

from vlp_data import files
from vlp_data.errors import DataError
from vlp_data.schema import Text


class Rows:
    """An immutable list of JSON objects."""

    def __init__(self, rows: Iterable[dict[str, Any]]) -> None:
        import numpy as np

        parts = [json.dumps(row, ensure_ascii=False, separators=(",", ":")).encode() for row in rows]
        self._ends = np.cumsum([0, *(len(part) for part in parts)])
        self._bytes = np.frombuffer(b"".join(parts), dtype=np.uint8)

    def __len__(self) -> int:
        return len(self._ends) - 1

    def __getitem__(self, index: int) -> dict[str, Any]:
        if not 0 <= index < len(self):
            raise IndexError(f"row {index} of {len(self)}")
        return json.loads(self._bytes[self._ends[index] : self._ends[index + 1]].tobytes())


def read_json(path: str, expected: type | tuple[type, ...]) -> Any:
    """The content of a JSON file whose outermost value is a list or an object, as expected. Raises
    FileNotFoundError, DataError."""
    try:
        with files.open_read(path) as stream:
            content = json.load(stream)
    except FileNotFoundError:
        raise FileNotFoundError(f"{path} not found") from None
    except ValueError as error:
        raise DataError(f"{path} is not JSON: {error}") from error
    if not isinstance(content, expected):
        kinds = expected if isinstance(expected, tuple) else (expected,)
        names = " or ".join(kind.__name__ for kind in kinds)
        raise DataError(f"{path}: expected a JSON {names}, found {type(content).__name__}")
    return content


def field(row: dict[str, Any], name: str, kind: type | tuple[type, ...], where: str) -> Any:
    """`row[name]`, checked. Raises DataError naming the row and the field."""
    if name not in row:
        raise DataError(f"{where}: field `{name}` is missing; the row has {', '.join(sorted(row))}")
    value = row[name]
    if not isinstance(value, kind) or isinstance(value, bool):
        kinds = kind if isinstance(kind, tuple) else (kind,)
        raise DataError(
            f"{where}: `{name}` must be {' or '.join(k.__name__ for k in kinds)}, found {value!r}"[:300]
        )
    return value


def concepts(row: dict[str, Any], name: str, where: str, *, image: int = 0) -> tuple[Text, ...]:
    """The concepts of an image in `row[name]`; none if there is no such field. Raises DataError naming the
    row and the field."""
    words = row.get(name, [])
    if not isinstance(words, list) or not all(isinstance(word, str) for word in words):
        raise DataError(f"{where}: `{name}` must be a list of strings, found {words!r}"[:300])
    return tuple(Text(text=word, role="concept", image=image) for word in words)
