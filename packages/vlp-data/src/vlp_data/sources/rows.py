"""Rows of large JSON lists, kept as one block of bytes, and the checks that all readers share.

Python objects would cost several times the memory, and once more per worker: reading one changes its
reference count, which copies the page it lies on.
"""

import json
import logging
import lzma
import math
import zlib
from collections import Counter
from collections.abc import Iterable
from typing import Any

from vlp_data import files
from vlp_data.errors import DataError, shown
from vlp_data.schema import Identifier, Text

log = logging.getLogger(__name__)

LARGEST = 2**31
"""Numbers of this size and above are no pixels."""
NAMED = 3
"""Places named per cause."""


class Rows:
    """An immutable list of JSON objects. A row may be broken (`broken`), which reading it says."""

    def __init__(self, rows: Iterable[dict[str, Any]]) -> None:
        import numpy as np

        parts = [_encoded(row) for row in rows]
        self._ends = np.cumsum([0, *(len(part) for part in parts)])
        self._bytes = np.frombuffer(b"".join(parts), dtype=np.uint8)

    def __len__(self) -> int:
        return len(self._ends) - 1

    def __getitem__(self, index: int) -> dict[str, Any]:
        if not 0 <= index < len(self):
            raise IndexError(f"row {index} of {len(self)}")
        row = json.loads(self._bytes[self._ends[index] : self._ends[index + 1]].tobytes())
        check_row(row, "the row")
        return row


_BROKEN = "\0broken"


def broken(reason: str) -> dict[str, Any]:
    """A row that cannot be used."""
    return {_BROKEN: reason}


def check_row(row: dict[str, Any], where: str) -> None:
    """Raise DataError for a `broken` row."""
    if _BROKEN in row:
        raise DataError(f"{where} is {row[_BROKEN]}")


def _encoded(row: dict[str, Any]) -> bytes:
    # Lone surrogates are kept for the reader to see: UTF-8 proper has none.
    try:
        return json.dumps(row, ensure_ascii=False, separators=(",", ":")).encode("utf-8", "surrogatepass")
    except RecursionError as error:
        raise DataError(f"a row of {', '.join(map(str, row))} is nested too deeply") from error


def parse_json(text: bytes | str) -> Any:
    """A JSON value. Raises ValueError, also for a value that is nested too deeply."""
    try:
        return json.loads(text)
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error


def read_bytes(path: str) -> bytes:
    """All bytes of a file, decompressed. Raises FileNotFoundError, OSError; DataError for a damaged
    archive."""
    try:
        with files.open_read(path) as stream:
            return stream.read()
    except FileNotFoundError:
        raise FileNotFoundError(f"{shown(path)} not found") from None
    except (EOFError, zlib.error, lzma.LZMAError) as error:
        raise DataError(f"{path} is damaged: {error}") from error


def read_json(path: str, expected: type | tuple[type, ...]) -> Any:
    """The content of a JSON file whose outermost value is a list or an object, as expected. Raises
    FileNotFoundError, DataError."""
    data = read_bytes(path)
    try:
        content = parse_json(data)
    except ValueError as error:
        lines = "; it may hold one JSON value a line" if "Extra data" in str(error) else ""
        raise DataError(f"{path} is not JSON: {error}{lines}") from error
    if not isinstance(content, expected):
        kinds = expected if isinstance(expected, tuple) else (expected,)
        names = " or ".join(kind.__name__ for kind in kinds)
        raise DataError(f"{path}: expected a JSON {names}, found {type(content).__name__}")
    return content


def read_entries(path: str) -> list[Any]:
    """The entries of a JSON list, or the objects of a file that holds one a line (blank lines are passed
    over); a line that is not JSON is a `broken` row. Raises FileNotFoundError; DataError for a file that is
    neither."""
    data = read_bytes(path)
    if not data.lstrip().startswith(b"{"):
        try:
            content = parse_json(data)
        except ValueError as error:
            raise DataError(f"{path} is not JSON: {error}") from error
        if not isinstance(content, list):
            raise DataError(f"{path}: expected a JSON list, found {type(content).__name__}")
        return content
    entries = [_of_line(line) for line in data.splitlines() if line.strip()]
    if entries == [{}]:
        raise DataError(f"{path}: expected a JSON list, found dict")
    if all(_BROKEN in entry for entry in entries):
        # One object over several lines.
        try:
            return [parse_json(data)]
        except ValueError as error:
            raise DataError(f"{path} is not JSON: {error}") from error
    return entries


def _of_line(line: bytes) -> dict[str, Any]:
    try:
        entry = parse_json(line)
    except ValueError as error:
        return broken(f"not JSON: {error}"[:200])
    if not isinstance(entry, dict):
        return broken(f"a JSON object was expected, found {type(entry).__name__}")
    return entry


# ------------------------------------------------------------------------------------------------ fields


def field(row: Any, name: str, kind: type | tuple[type, ...], where: str) -> Any:
    """`row[name]`, checked. Raises DataError naming the row and the field."""
    if not isinstance(row, dict):
        raise DataError(f"{where} must be an object, found {type(row).__name__}")
    if name not in row:
        raise DataError(f"{where}: field `{name}` is missing; the row has {', '.join(sorted(map(str, row)))}")
    value = row[name]
    if not isinstance(value, kind) or isinstance(value, bool):
        kinds = kind if isinstance(kind, tuple) else (kind,)
        raise DataError(
            f"{where}: `{name}` must be {' or '.join(k.__name__ for k in kinds)}, found {short(value)}"
        )
    return value


def objects(row: dict[str, Any], name: str, where: str) -> list[dict[str, Any]]:
    """`row[name]`, a list of objects. Raises DataError."""
    values = field(row, name, list, where)
    for number, value in enumerate(values):
        if not isinstance(value, dict):
            raise DataError(f"{where}: {name}.{number} must be an object, found {type(value).__name__}")
    return values


def strings(row: dict[str, Any], name: str, where: str) -> list[str]:
    """`row[name]`, a list of strings. Raises DataError."""
    values = field(row, name, list, where)
    if not all(isinstance(value, str) for value in values):
        raise DataError(f"{where}: `{name}` must be a list of strings, found {short(values)}")
    return values


def optional_id(row: dict[str, Any], name: str, where: str) -> Identifier | None:
    """`row[name]`, a number or a string; None where it is missing or null. Raises DataError."""
    return None if row.get(name) is None else field(row, name, (int, str), where)


def size_of(row: dict[str, Any]) -> tuple[int, int] | None:
    """(`width`, `height`) of an image, also where they are written as text; None where they are missing or no
    numbers of pixels."""
    sides = tuple(_side(row.get(name)) for name in ("width", "height"))
    return (sides[0], sides[1]) if all(sides) else None


def _side(value: Any) -> int:
    if isinstance(value, str):
        text = value.strip()
        value = int(text) if text.isdecimal() and len(text) < 11 else 0
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    return value if type(value) is int and 0 < value < LARGEST else 0


def numbers(value: Any, count: int, where: str, what: str) -> list[float]:
    """The first `count` numbers of a list, NaN and the infinite included (`is_finite` tells them). Raises
    DataError when it is shorter or holds something else; `what` says what was expected."""
    if not (isinstance(value, list) and len(value) >= count and all(map(_is_number, value[:count]))):
        raise DataError(f"{where}: {what}, found {short(value)}")
    return [_floated(side) for side in value[:count]]


def is_finite(box: Iterable[float]) -> bool:
    """Whether all are numbers that pixels can have."""
    return all(math.isfinite(side) and abs(side) < LARGEST for side in box)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _floated(value: int | float) -> int | float:
    return value if isinstance(value, float) or abs(value) < LARGEST else math.inf


def number_or_none(value: Any) -> float | None:
    """A finite number, or None."""
    return value if _is_number(value) and is_finite([value]) else None


def concepts(row: dict[str, Any], name: str, where: str, *, image: int = 0) -> tuple[Text, ...]:
    """The concepts of an image in `row[name]`; none if there is no such field. Raises DataError naming the
    row and the field."""
    words = row.get(name, [])
    if not isinstance(words, list) or not all(isinstance(word, str) for word in words):
        raise DataError(f"{where}: `{name}` must be a list of strings, found {short(words)}")
    return tuple(Text(text=word, role="concept", image=image) for word in words)


def short(value: Any) -> str:
    """A value in a message."""
    try:
        return repr(value)[:200]
    except RecursionError:
        return f"a {type(value).__name__} that is nested too deeply"


# ------------------------------------------------------------------------------------------------ notes


class Notes:
    """What a reader left out or repaired: how often by cause, and where first."""

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()
        self.places: dict[str, list[str]] = {}

    def add(self, cause: str, place: str = "", count: int = 1) -> None:
        """Count a cause; the first places are kept."""
        self.counts[cause] += count
        if place and len(kept := self.places.setdefault(cause, [])) < NAMED:
            kept.append(shown(place))

    def found(self) -> dict[str, int]:
        """The counts that are not 0."""
        return {cause: count for cause, count in self.counts.items() if count}

    def warn(self, path: str) -> None:
        """Log what cannot be used, with its places."""
        for cause, places in self.places.items():
            more = ", ..." if self.counts[cause] > len(places) else ""
            log.warning("%s: %s: %d (%s%s)", shown(path), cause, self.counts[cause], ", ".join(places), more)


def listed(counts: dict[str, int]) -> str:
    """Counts in the words of a message."""
    return (
        ", ".join(f"{count} {reason}" for reason, count in counts.items() if count) or "the file lists none"
    )
