"""Paths that may be URLs: local paths are read directly, anything with `://` through fsspec (hdfs, webhdfs,
s3, gs, abfs, http, memory, ...).

The functions here trust their paths, which a user wrote. Paths that stand in a data file are not trusted:
`require_permitted` is asked before one of them is opened.

Nothing is kept open between calls, so sources can be pickled and forked freely. Remote reads are repeated
with growing pauses; a missing file is not.
"""

import os
import posixpath
import re
import stat
import time
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

from vlp_data.errors import DataError, shown

_T = TypeVar("_T")
PAUSES_SECONDS = (0.5, 2.0, 8.0)
"""Waits before the second, third and fourth attempt of a remote read."""


OWN_SCHEMES = ("file", "local", "memory")
"""Schemes of URLs that read nothing but this machine: what a data file may always name."""
_SCHEME = re.compile(r"[a-z][a-z0-9+.-]*", re.IGNORECASE)


def is_url(path: str) -> bool:
    """Whether fsspec is needed. `file://` counts as a URL."""
    return "://" in path


def scheme(path: str) -> str:
    """`s3` of `s3://bucket/a`; "" of a local path."""
    return path.partition("://")[0].lower() if is_url(path) else ""


def require_permitted(path: str, schemes: Collection[str] = ()) -> None:
    """Raise DataError unless a path that stands in a data file may be opened: a local path, or a URL of
    `OWN_SCHEMES` or of `schemes`.

    A chain of URLs (`zip://a::s3://b`) is never permitted, because fsspec would start whatever its parts
    name: `reference://::FILE` renders templates of the file (before fsspec 2026.4 without a sandbox).
    """
    if "\0" in path:
        raise DataError(f"{path}: no path has a NUL character")
    try:
        os.fsencode(path)
    except UnicodeEncodeError as error:
        raise DataError(f"{path}: no path has half of a character (a lone surrogate)") from error
    if not is_url(path):
        return
    name = scheme(path)
    if "::" in path:
        raise DataError(f"{path}: a chain of URLs is never opened from data")
    if not _SCHEME.fullmatch(name) or name not in {*OWN_SCHEMES, *schemes}:
        raise DataError(
            f"{path}: URLs of {name}:// in data are opened only if the source allows it (schemes=[{name}])"
        )


def local(path: str) -> Path:
    """A local path, `~` expanded. Raises DataError for a path that no file can have: the home of a user who
    is not known, a NUL character."""
    if "\0" in path:
        raise DataError(f"{path}: no path has a NUL character")
    try:
        return Path(path).expanduser()
    except RuntimeError as error:
        raise DataError(f"{path}: {error} Write the folder in full.") from error


def join(root: str, path: str) -> str:
    """`path` below `root`; unchanged when it is absolute, a URL, or `root` is empty; `root` itself for an
    empty path."""
    if not root or is_url(path) or path.startswith(("/", "~")):
        return path
    if not path:
        return root
    return posixpath.join(root, path) if is_url(root) else os.fspath(Path(root) / path)


def _filesystem(url: str) -> tuple[Any, str]:
    import fsspec.core

    try:
        return fsspec.core.url_to_fs(url)
    except (ImportError, ValueError) as error:
        # The package for the protocol is not installed, or there is no such protocol.
        raise DataError(f"{url} cannot be reached: {error}") from error


def repeat(url: str, action: Callable[[], _T]) -> _T:
    """The result of a remote read, tried again after each of `PAUSES_SECONDS`. Errors that waiting
    does not cure (a missing file, no permission) are raised at once, others become OSError."""
    for pause in (*PAUSES_SECONDS, None):
        try:
            return action()
        except (FileNotFoundError, PermissionError, IsADirectoryError, EOFError):
            raise
        except Exception as error:  # each protocol has errors of its own, many of them no OSError
            if pause is None:
                raise OSError(shown(f"{url}: {type(error).__name__}: {error}")) from error
            time.sleep(pause)
    raise AssertionError


def read(path: str) -> bytes:
    """All bytes of a file. Raises OSError (FileNotFoundError when it is not there)."""
    if not is_url(path):
        return local(path).read_bytes()
    filesystem, inner = _filesystem(path)
    return repeat(path, lambda: filesystem.cat_file(inner))


def read_regular(path: str, most: int) -> bytes:
    """As `read`, of a file proper with at most `most` bytes. Raises DataError for a device, a pipe or a
    folder, which would be waited for or read without end, and for a longer file."""
    if not is_url(path) or scheme(path) in ("file", "local"):
        where = local(path.partition("://")[2] if is_url(path) else path)
        # Without O_NONBLOCK the opening of a pipe waits for somebody who writes.
        descriptor = os.open(where, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        try:
            found = os.fstat(descriptor)
            if not stat.S_ISREG(found.st_mode):
                raise DataError(f"{path} is no file but a folder, a pipe or a device")
            if found.st_size > most:
                raise DataError(f"{path} has {found.st_size} bytes, the limit is {most}")
            with os.fdopen(descriptor, "rb", closefd=False) as stream:
                return stream.read()
        finally:
            os.close(descriptor)
    filesystem, inner = _filesystem(path)
    return repeat(path, lambda: filesystem.cat_file(inner))


def read_range(path: str, start: int, length: int) -> bytes:
    """`length` bytes from `start`. Raises OSError; EOFError when the file is shorter."""
    if not is_url(path):
        with local(path).open("rb", buffering=0) as stream:
            stream.seek(start)
            data = stream.read(length)
    else:
        filesystem, inner = _filesystem(path)
        data = repeat(path, lambda: filesystem.cat_file(inner, start=start, end=start + length))
    if len(data) != length:
        raise EOFError(
            f"{shown(path)} has {len(data)} bytes at {start}, {length} were expected; did it change?"
        )
    return data


def open_read(path: str) -> BinaryIO:
    """A stream for reading from start to end; `.gz`, `.bz2`, `.xz`, `.zst` are decompressed (zst needs its
    fsspec codec)."""
    if not is_url(path) and not is_compressed(path):
        return local(path).open("rb")
    import fsspec

    opened: Any = fsspec.open(path if is_url(path) else os.fspath(local(path)), "rb", compression="infer")
    return opened.open()


def is_compressed(path: str) -> bool:
    """Whether a file is compressed, by its suffix."""
    return path.endswith((".gz", ".bz2", ".xz", ".zst", ".lzma"))


def stamp(path: str) -> tuple[int, str]:
    """(size in bytes, something that changes when the file is rewritten). Raises FileNotFoundError."""
    if not is_url(path):
        status = local(path).stat()
        return status.st_size, str(status.st_mtime_ns)
    filesystem, inner = _filesystem(path)
    information = filesystem.info(inner)
    changed = next(
        (information[k] for k in ("ETag", "etag", "LastModified", "mtime", "created") if k in information), ""
    )
    return int(information["size"]), str(changed)


def expand(paths: tuple[str, ...] | list[str]) -> list[str]:
    """The files behind paths: a folder stands for the files directly in it, a string may hold several paths
    joined by commas (X-VLM).

    Names with `_SUCCESS` and those that begin with a dot are left out. Sorted by path inside a folder, so
    that all ranks and nodes agree; folders in the order given. Raises FileNotFoundError for a path that does
    not exist and for no files at all.
    """
    found: list[str] = []
    for path in (part.strip() for entry in paths for part in entry.split(",") if part.strip()):
        found += _expand_one(path)
    if not found:
        raise FileNotFoundError(f"no data files in {shown(', '.join(paths)) or 'an empty list of paths'}")
    return found


def _expand_one(path: str) -> list[str]:
    if not is_url(path):
        where = local(path)
        if where.is_file():
            return [os.fspath(where)]
        if not where.is_dir():
            raise FileNotFoundError(f"{shown(path)} not found (neither a file nor a folder)")
        names = [os.fspath(entry) for entry in where.iterdir() if entry.is_file()]
    else:
        filesystem, inner = _filesystem(path)
        if filesystem.isfile(inner):
            return [path]
        if not filesystem.isdir(inner):
            raise FileNotFoundError(f"{shown(path)} not found (neither a file nor a folder)")
        entries = filesystem.ls(inner, detail=True)
        names = [filesystem.unstrip_protocol(entry["name"]) for entry in entries if entry["type"] == "file"]
    kept = [name for name in names if "_SUCCESS" not in posixpath.basename(name)]
    return sorted(name for name in kept if not posixpath.basename(name).startswith("."))
