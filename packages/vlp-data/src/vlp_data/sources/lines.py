"""X-VLM line files: one JSON object per line, pictures inside as base64 or beside as files.

Random access through byte offsets of the lines: one scan per file (kept in `index`, if given), then a seek per sample. For what cannot
be seeked (compressed files, pipes) there is `stream_lines`, which splits files over ranks and workers as the reference does.
Source: X-VLM specification 5.1, 5.2, 5.4; quirks 8.4, 8.5.
"""

import base64
import binascii
import hashlib
import json
import os
import posixpath
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from vlp_data import files
from vlp_data.errors import BadSample, DataError
from vlp_data.options import ImageTextLines, RegionLines
from vlp_data.order import generator
from vlp_data.schema import Image, Region, Sample, Text

_CHUNK_BYTES = 16 * 2**20


class LineFiles:
    """Lines of several files as one sequence of bytes, by offset."""

    def __init__(self, paths: Sequence[str], offsets: Sequence[np.ndarray]) -> None:
        self.paths = tuple(paths)
        self._offsets = tuple(offsets)
        self._first = np.cumsum([0, *(len(o) - 1 for o in offsets)])

    def __len__(self) -> int:
        return int(self._first[-1])

    def _part(self, index: int) -> tuple[int, int]:
        """(number of the file, number of the line in it), both from 0."""
        if not 0 <= index < len(self):
            raise IndexError(f"line {index} of {len(self)}")
        file = int(np.searchsorted(self._first, index, side="right")) - 1
        return file, index - int(self._first[file])

    def place(self, index: int) -> tuple[str, int]:
        """(file, line number from 1) of a line."""
        file, line = self._part(index)
        return self.paths[file], line + 1

    def __getitem__(self, index: int) -> bytes:
        file, line = self._part(index)
        path, (start, end) = self.paths[file], self._offsets[file][line : line + 2].tolist()
        try:
            return files.read_range(path, start, end - start)
        except OSError as error:
            raise BadSample("unreadable file", path, f"{type(error).__name__}: {error}") from error
        except EOFError as error:
            raise DataError(f"{error} Line files must not change while they are in use.") from error


def line_offsets(path: str, index: str = "") -> np.ndarray:
    """Offsets of the lines of a file and, last, its size: int64 [lines + 1]. A last line without newline counts.

    `index` is a folder where the result is kept; it is scanned again when size or date of the file have changed.
    """
    if files.is_compressed(path):
        raise DataError(f"{path} is compressed: lines in it cannot be reached one by one; decompress it")
    size, changed = files.stamp(path)
    kept = (
        Path(index).expanduser() / f"{hashlib.sha256(path.encode()).hexdigest()[:32]}.npz" if index else None
    )
    if kept is not None and kept.is_file():
        with np.load(kept) as archive:
            if archive["stamp"].tolist() == [str(size), changed]:
                return archive["offsets"]
    parts, position = [np.zeros(1, dtype=np.int64)], 0
    with files.open_read(path) as stream:
        while chunk := stream.read(_CHUNK_BYTES):
            parts.append(np.flatnonzero(np.frombuffer(chunk, dtype=np.uint8) == ord("\n")) + 1 + position)
            position += len(chunk)
    offsets = np.concatenate(parts)
    if offsets[-1] != position:
        offsets = np.append(offsets, position)
    if kept is not None:
        kept.parent.mkdir(parents=True, exist_ok=True)
        unfinished = kept.with_name(f".{kept.stem}-{os.getpid()}.npz")
        np.savez(unfinished, offsets=offsets, stamp=np.array([str(size), changed]))
        unfinished.replace(kept)
    return offsets


def open_line_files(paths: tuple[str, ...], index: str = "") -> LineFiles:
    """All lines of files and folders. Raises FileNotFoundError for a missing path, DataError when there is not one line."""
    found = files.expand(paths)
    lines = LineFiles(found, [line_offsets(path, index) for path in found])
    if not len(lines):
        raise DataError(f"no line in {', '.join(found[:3])}{' ...' if len(found) > 3 else ''}")
    return lines


@dataclass(frozen=True)
class ImageTextSource:
    """Rows of X-VLM image-text lines."""

    options: ImageTextLines
    lines: LineFiles

    def __len__(self) -> int:
        return len(self.lines)

    def __getitem__(self, index: int) -> Sample:
        path, number = self.lines.place(index)
        return parse_image_text(self.lines[index], path, number, self.options)

    def describe(self) -> dict[str, Any]:
        return {"format": self.options.format, "files": len(self.lines.paths), "lines": len(self)}


@dataclass(frozen=True)
class RegionSource:
    """Rows of X-VLM region lines."""

    options: RegionLines
    lines: LineFiles

    def __len__(self) -> int:
        return len(self.lines)

    def __getitem__(self, index: int) -> Sample:
        path, number = self.lines.place(index)
        return parse_regions(self.lines[index], path, number, self.options)

    def describe(self) -> dict[str, Any]:
        return {"format": self.options.format, "files": len(self.lines.paths), "lines": len(self)}


def open_image_text_lines(options: ImageTextLines) -> ImageTextSource:
    """Index the files of the option."""
    return ImageTextSource(options, open_line_files(options.files, options.index))


def open_region_lines(options: RegionLines) -> RegionSource:
    """Index the files of the option."""
    return RegionSource(options, open_line_files(options.files, options.index))


def parse_image_text(line: bytes | str, path: str, number: int, options: ImageTextLines) -> Sample:
    """One image-text line. Raises BadSample: "empty line", "broken line", "broken base64"."""
    key = f"{path}:{number}"
    entry = _entry(line, key)
    caption_key = next((k for k in options.caption_keys if k in entry), None)
    if caption_key is None:
        raise BadSample("broken line", key, f"none of the fields {', '.join(options.caption_keys)}")
    return Sample(
        key=key,
        images=(_image(entry, key, options),),
        texts=_texts(entry[caption_key], "caption", key, caption_key),
        meta={"file": path, "line": number},
    )


def parse_regions(line: bytes | str, path: str, number: int, options: RegionLines) -> Sample:
    """One region line; boxes are cut to whole pixels, as the reference does. Raises BadSample as `parse_image_text`."""
    key = f"{path}:{number}"
    entry = _entry(line, key)
    elements = entry.get("elems")
    if not isinstance(elements, list) or not elements:
        raise BadSample("broken line", key, "`elems` must be a list with at least one element")
    texts: list[Text] = []
    if "caption" in entry:
        texts += _texts(entry["caption"], "caption", key, "caption")
    regions = []
    for position, element in enumerate(elements):
        name = f"elems.{position}"
        if not isinstance(element, dict):
            raise BadSample("broken line", key, f"`{name}` must be an object")
        words = _texts(element.get("caption"), "region", key, f"{name}.caption")
        box = element.get("bb")
        if not (isinstance(box, list) and len(box) == 4 and all(_is_number(v) for v in box)):
            raise BadSample("broken line", key, f"`{name}.bb` must be [x, y, w, h], found {box!r}")
        x, y, w, h = (int(v) for v in box)
        regions.append(
            Region(
                box=(x, y, x + w, y + h),
                texts=tuple(range(len(texts), len(texts) + len(words))),
                attributes=_attributes(element.get("attributes", ""), key, name),
            )
        )
        texts += words
    return Sample(
        key=key,
        images=(_image(entry, key, options),),
        texts=tuple(texts),
        regions=tuple(regions),
        meta={"file": path, "line": number},
    )


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 2**31


def _entry(line: bytes | str, key: str) -> dict[str, Any]:
    if not line.strip():
        raise BadSample("empty line", key, "nothing but blanks")
    try:
        entry = json.loads(line)
    except ValueError as error:
        raise BadSample("broken line", key, f"not JSON: {error}"[:200]) from error
    if not isinstance(entry, dict):
        raise BadSample("broken line", key, f"a JSON object was expected, found {type(entry).__name__}")
    return entry


def _texts(value: Any, role: Any, key: str, name: str) -> tuple[Text, ...]:
    alternatives = value if isinstance(value, list) else [value]
    if not alternatives or not all(isinstance(text, str) for text in alternatives):
        raise BadSample(
            "broken line", key, f"`{name}` must be a string or a list of strings, found {value!r}"[:200]
        )
    return tuple(Text(text=text, role=role, listed=isinstance(value, list)) for text in alternatives)


def _attributes(value: Any, key: str, name: str) -> str | tuple[str, ...]:
    if isinstance(value, str):
        return value
    if isinstance(value, list) and value and all(isinstance(text, str) for text in value):
        return tuple(value)
    raise BadSample(
        "broken line",
        key,
        f"`{name}.attributes` must be a string or a list of strings, found {value!r}"[:200],
    )


def _image(entry: dict[str, Any], key: str, options: ImageTextLines | RegionLines) -> Image:
    names = (options.image_key,) if options.image_key else ("binary", "image_rpath")
    name = next((n for n in names if n in entry), None)
    if name is None:
        raise BadSample("broken line", key, f"no picture: none of the fields {', '.join(names)}")
    value = entry[name]
    if not isinstance(value, str) or not value:
        raise BadSample("broken line", key, f"`{name}` must be a string that is not empty")
    kind = options.image_kind if options.image_kind != "auto" else "base64" if name == "binary" else "path"
    if kind == "path":
        return Image(
            path=files.join(options.root, value), id=posixpath.splitext(posixpath.basename(value))[0]
        )
    try:
        return Image(data=base64.b64decode(value, validate=True))
    except binascii.Error as error:
        raise BadSample("broken base64", key, f"`{name}`: {error}") from error


# ---------------------------------------------------------------------------------------------- streaming


def shard_files(paths: Sequence[str], rank: int, world: int, worker: int = 0, workers: int = 1) -> list[str]:
    """The files of one worker: rank r of W gets files [n*r//W, n*(r+1)//W), and its workers split that list by the same formula.

    The rank split is skipped for one rank or exactly one file (every rank then reads it). Raises ValueError when there are fewer files
    than ranks or workers.
    """
    own = list(paths)
    if world > 1 and len(own) != 1:
        own = _slice(own, rank, world, "ranks")
    return _slice(own, worker, workers, "workers") if workers > 1 else own


def _slice(paths: list[str], number: int, parts: int, what: str) -> list[str]:
    if not 0 <= number < parts:
        raise ValueError(f"{number} is not one of {parts} {what}")
    if len(paths) < parts:
        raise ValueError(
            f"{len(paths)} files cannot be split over {parts} {what}; write more files or use fewer {what}"
        )
    return paths[len(paths) * number // parts : len(paths) * (number + 1) // parts]


def stream_lines(
    paths: Sequence[str],
    *,
    rank: int = 0,
    world: int = 1,
    worker: int = 0,
    workers: int = 1,
    seed: int | None = None,
    epoch: int = 0,
    buffer: int = 0,
) -> Iterator[tuple[str, int, bytes]]:
    """One pass over this worker's files: (file, line number from 1, line without its end).

    With `seed` the files are shuffled, by one permutation per epoch that all ranks share, before they are split, so that no line is read
    twice or left out (the reference lets each worker shuffle by itself; specification 8.4). Lines stay in order unless `buffer` > 0,
    which keeps that many lines to draw the next one from (the reference has none; 8.5).
    """
    names = files.expand(list(paths))
    if seed is not None:
        generator("files", seed, epoch).shuffle(names)
    rng = generator("lines", seed or 0, epoch, rank, worker)
    waiting: list[tuple[str, int, bytes]] = []
    for path in shard_files(names, rank, world, worker, workers):
        with files.open_read(path) as stream:
            for number, line in enumerate(stream, 1):
                item = (path, number, line.rstrip(b"\r\n"))
                if buffer <= 0:
                    yield item
                    continue
                waiting.append(item)
                if len(waiting) > buffer:
                    yield waiting.pop(rng.randrange(len(waiting)))
    rng.shuffle(waiting)
    yield from waiting
