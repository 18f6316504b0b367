"""What data is made of, by checksum: whether it is still the same, cheaply.

A file of up to `WHOLE_BYTES` counts with all its bytes; of a longer one its length and `BLOCKS` blocks spread
evenly over it count, so that terabytes cost milliseconds. Dates and paths do not count: a copy is the same
data. Of remote files length and ETag (or date, where there is none) count. Images are not looked at.
"""

import dataclasses
import hashlib
from collections.abc import Mapping
from typing import Any

from vlp_data import files
from vlp_data.roots import FolderText, PathText, path_fields

WHOLE_BYTES = 64 * 2**20
BLOCKS = 64
BLOCK_BYTES = 2**20
LISTED_FILES = 64
"""Files of one option that are told apart; of more there is one checksum together."""


def checksum(path: str, *, whole: bool = False) -> str:
    """SHA-256 of a file, as the module says; `whole`: of all bytes whatever its length. Raises
    FileNotFoundError, OSError."""
    if files.is_url(path):
        size, changed = files.stamp(path)
        return hashlib.sha256(f"{size} {changed}".encode()).hexdigest()
    with files.local(path).open("rb") as stream:
        size = stream.seek(0, 2)
        stream.seek(0)
        if whole or size <= WHOLE_BYTES:
            return hashlib.file_digest(stream, "sha256").hexdigest()
        digest = hashlib.sha256(f"{size} ".encode())
        for block in range(BLOCKS):
            stream.seek((size - BLOCK_BYTES) * block // (BLOCKS - 1))
            digest.update(stream.read(BLOCK_BYTES))
        return digest.hexdigest()


def folder_checksum(path: str) -> str:
    """SHA-256 of all files below a local folder, with their names, or of one file; every byte counts. Files
    whose name begins with a dot do not."""
    where = files.local(path)
    if where.is_file():
        return checksum(path, whole=True)
    digest = hashlib.sha256()
    for file in sorted(file for file in where.rglob("*") if file.is_file()):
        name = file.relative_to(where)
        if not any(part.startswith(".") for part in name.parts):
            digest.update(f"{name.as_posix()}\0{checksum(str(file), whole=True)}\n".encode())
    return digest.hexdigest()


def identity(source: Any) -> dict[str, str]:
    """Checksums of the files behind a source, by option (`files.0`, `annotations`): its annotation files, and
    whatever else its options name by fields of the type `PathText`.

    Takes an opened source with `options`, or the options of a source or a tokenizer (any dataclass); {} for
    anything else. Options that a class lists in `scratch` hold no data. Raises FileNotFoundError, OSError.
    """
    options = getattr(source, "options", source)
    if not dataclasses.is_dataclass(options) or isinstance(options, type):
        return {}
    scratch = getattr(options, "scratch", ())
    found: dict[str, str] = {}
    for name, hint in path_fields(type(options)).items():
        if name not in scratch and hint in (PathText, tuple[PathText, ...], dict[str, PathText]):
            found |= _of_field(name, getattr(options, name))
        elif hint != FolderText and dataclasses.is_dataclass(getattr(options, name)):
            inner = identity(getattr(options, name))
            found |= {f"{name}.{key}": value for key, value in inner.items()}
    return found


def _of_field(name: str, value: Any) -> dict[str, str]:
    if isinstance(value, str):
        return {name: checksum(value)} if value else {}
    if isinstance(value, Mapping):
        return {f"{name}.{key}": checksum(path) for key, path in value.items() if path}
    if not value:
        return {}
    sums = [checksum(path) for path in files.expand(value)]
    if len(sums) > LISTED_FILES:
        return {name: hashlib.sha256("\n".join(sums).encode()).hexdigest()}
    return {f"{name}.{number}": one for number, one in enumerate(sums)}


def differences(then: Mapping[str, str], now: Mapping[str, str]) -> list[str]:
    """Names whose checksum is another one or not there; none when nothing is known of then."""
    if not then:
        return []
    return sorted(name for name in then.keys() | now.keys() if then.get(name) != now.get(name))
