"""X-VLM line files: one JSON object per line, images inside as base64 or in files of their own.

Random access through byte offsets of the lines: one scan per file (kept in `index`, if given), then a seek
per sample; or, with the order "files", one pass over every file (`vlp_data.order` says which rank reads
what).
Source: X-VLM specification 5.1, 5.2, 5.4; quirks 8.4, 8.5.
"""

import base64
import fcntl
import os
import zipfile
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, ClassVar, Literal

from vlp_data import files
from vlp_data.errors import BadSample, DataError, shown
from vlp_data.paths import image_at, stem
from vlp_data.roots import FolderText, PathText
from vlp_data.schema import Image, Region, Sample, Text, whole
from vlp_data.sources import Beginning
from vlp_data.sources.rows import concepts, parse_json, short, size_of

if TYPE_CHECKING:
    import numpy as np

    from vlp_data.order import Runs

_CHUNK_BYTES = 16 * 2**20


@dataclass(frozen=True, kw_only=True)
class ImageTextLines:
    """X-VLM image-text lines: text files with one JSON object per line, {caption, binary | image_rpath}."""

    format: Literal["xvlm_images"] = "xvlm_images"
    files: tuple[PathText, ...]
    """Files or folders (not recursive; names with `_SUCCESS` or a leading dot are left out), paths or fsspec
    URLs."""
    root: FolderText = ""
    """Folder that relative image paths start at."""
    image_key: str = ""
    """Field that holds the image; "" takes `binary` or `image_rpath`, whichever a line has."""
    image_kind: Literal["auto", "path", "base64"] = "auto"
    """What that field holds; auto: base64 for `binary`, else a path."""
    caption_keys: tuple[str, ...] = ("caption", "desc")
    """Fields that may hold the caption; the first one a line has is taken."""
    index: PathText = ""
    """Folder where line offsets are kept, so that large files are scanned only once; "" scans at every
    start."""
    order: Literal["shuffled", "files"] = "shuffled"
    """Lines one by one in random order, or file after file: for remote storage, where one long read is
    cheaper than many short ones, and for compressed files, which cannot be read otherwise."""
    buffer: int = 0
    """With order "files": a line is mixed with lines up to about this many places away, as by a shuffle
    buffer of this size; 0 keeps the order of the file."""
    schemes: tuple[str, ...] = ()
    """Schemes of URLs that image paths in the lines may be (s3, https, ...), besides that of `root`."""
    scratch: ClassVar[tuple[str, ...]] = ("index",)
    """Options that hold no data (`vlp_data.identity`)."""

    def __post_init__(self) -> None:
        _check_reading(self)

    def open(self) -> "ImageTextRows":
        return open_image_text_lines(self)


@dataclass(frozen=True, kw_only=True)
class RegionLines:
    """X-VLM region lines: {elems: [{caption, bb: [x, y, w, h], attributes?}], caption?, binary |
    image_rpath, width?, height?}."""

    format: Literal["xvlm_regions"] = "xvlm_regions"
    files: tuple[PathText, ...]
    """Files or folders (not recursive; names with `_SUCCESS` or a leading dot are left out), paths or fsspec
    URLs."""
    root: FolderText = ""
    """Folder that relative image paths start at."""
    image_key: str = ""
    """Field that holds the image; "" takes `binary` or `image_rpath`, whichever a line has."""
    image_kind: Literal["auto", "path", "base64"] = "auto"
    """What that field holds; auto: base64 for `binary`, else a path."""
    index: PathText = ""
    """Folder where line offsets are kept, so that large files are scanned only once; "" scans at every
    start."""
    order: Literal["shuffled", "files"] = "shuffled"
    """Lines one by one in random order, or file after file: for remote storage, where one long read is
    cheaper than many short ones, and for compressed files, which cannot be read otherwise."""
    buffer: int = 0
    """With order "files": a line is mixed with lines up to about this many places away, as by a shuffle
    buffer of this size; 0 keeps the order of the file."""
    schemes: tuple[str, ...] = ()
    """Schemes of URLs that image paths in the lines may be (s3, https, ...), besides that of `root`."""
    scratch: ClassVar[tuple[str, ...]] = ("index",)
    """Options that hold no data (`vlp_data.identity`)."""

    def __post_init__(self) -> None:
        _check_reading(self)

    def open(self) -> "RegionRows":
        return open_region_lines(self)


def _check_reading(options: ImageTextLines | RegionLines) -> None:
    if options.buffer < 0:
        raise ValueError(f"buffer={options.buffer} must not be negative")
    if options.buffer and options.order != "files":
        raise ValueError(
            'buffer mixes lines that are read file after file; order="shuffled" mixes all of them already'
        )


def is_image_text(beginning: Beginning) -> bool:
    """Whether a file holds image-text lines."""
    value = beginning.value
    other = {"elems", "annotations"}
    return (
        isinstance(value, dict)
        and bool({"binary", "image_rpath"} & value.keys())
        and not other & value.keys()
    )


def is_regions(beginning: Beginning) -> bool:
    """Whether a file holds region lines."""
    return isinstance(beginning.value, dict) and "elems" in beginning.value


class LineFiles:
    """Lines of several files as one sequence of bytes, by offset.

    `forward`: the lines are mostly asked for in ascending order, so files that are remote or compressed stay
    open between calls (in the process that opened them; copies and pickles open their own).
    """

    def __init__(
        self, paths: Sequence[str], offsets: Sequence["np.ndarray"], *, forward: bool = False
    ) -> None:
        import numpy as np

        self.paths = tuple(paths)
        self._offsets = tuple(offsets)
        self._first = np.cumsum([0, *(len(o) - 1 for o in offsets)])
        self._forward = forward
        self._opened: _Opened | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_opened": None}

    def __len__(self) -> int:
        return int(self._first[-1])

    @property
    def lengths(self) -> tuple[int, ...]:
        """Lines of each file."""
        return tuple((self._first[1:] - self._first[:-1]).tolist())

    def _part(self, index: int) -> tuple[int, int]:
        """(number of the file, number of the line in it), both from 0."""
        if not 0 <= index < len(self):
            raise IndexError(f"line {index} of {len(self)}")
        file = int(self._first.searchsorted(index, side="right")) - 1
        return file, index - int(self._first[file])

    def place(self, index: int) -> tuple[str, int]:
        """(file, line number from 1) of a line."""
        file, line = self._part(index)
        return self.paths[file], line + 1

    def __getitem__(self, index: int) -> bytes:
        file, line = self._part(index)
        path, (start, end) = self.paths[file], self._offsets[file][line : line + 2].tolist()
        try:
            if self._forward and files.is_url(path):
                return files.repeat(path, lambda: self._read_on(path, start, end - start))
            if files.is_compressed(path):
                return self._read_on(path, start, end - start)
            return files.read_range(path, start, end - start)
        except OSError as error:
            raise BadSample("unreadable file", path, f"{type(error).__name__}: {error}") from error
        except (zlib.error, zipfile.BadZipFile) as error:
            raise DataError(f"{path} is damaged: {error}") from error
        except EOFError as error:
            raise DataError(f"{error} Line files must not change while they are in use.") from error

    def _read_on(self, path: str, start: int, length: int) -> bytes:
        opened = self._opened
        # A forked process must not move the position of its parent's file.
        if (
            opened is None
            or (opened.path, opened.process) != (path, os.getpid())
            or not opened.reaches(start)
        ):
            self._close()
            opened = self._opened = _Opened(path, os.getpid(), files.open_read(path))
        try:
            return opened.read(start, length)
        except Exception:
            self._close()
            raise

    def _close(self) -> None:
        opened, self._opened = self._opened, None
        if opened is not None and opened.process == os.getpid():
            opened.stream.close()


@dataclass(eq=False)
class _Opened:
    """A file that stays open; a compressed one is read from front to back only."""

    path: str
    process: int
    stream: BinaryIO
    position: int = 0

    def reaches(self, start: int) -> bool:
        return start >= self.position or not files.is_compressed(self.path)

    def read(self, start: int, length: int) -> bytes:
        if not files.is_compressed(self.path):
            self.position = self.stream.seek(start)
        while self.position < start:
            self._some(min(start - self.position, _CHUNK_BYTES))
        parts = []
        while (missing := start + length - self.position) > 0:
            parts.append(self._some(missing))
        return b"".join(parts)

    def _some(self, length: int) -> bytes:
        data = self.stream.read(length)
        if not data:
            raise EOFError(f"{self.path} ends after {self.position} bytes; did it change?")
        self.position += len(data)
        return data


def line_offsets(path: str, index: str = "") -> "np.ndarray":
    """Offsets of the lines of a file (of its content, if it is compressed) and, last, its size: int64 [lines
    + 1]. A last line without newline counts.

    `index` is a folder where the result is kept; it is scanned again when size or date of the file have
    changed. Of several processes that ask at once, one scans and the others wait.
    """
    if not index:
        return _scan(path)
    import hashlib

    import numpy as np

    size, changed = files.stamp(path)
    kept = Path(index).expanduser() / f"{hashlib.sha256(os.fsencode(path)).hexdigest()[:32]}.npz"
    kept.parent.mkdir(parents=True, exist_ok=True)
    with kept.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        found = _kept_offsets(kept, [str(size), changed]) if kept.is_file() else None
        if found is not None:
            return found
        offsets = _scan(path)
        unfinished = kept.with_name(f".{kept.stem}-{os.getpid()}.npz")
        np.savez(unfinished, offsets=offsets, stamp=np.array([str(size), changed]))
        unfinished.replace(kept)
    return offsets


def _kept_offsets(kept: Path, stamp: list[str]) -> "np.ndarray | None":
    """Offsets that were kept; None when they are those of another file, or damaged."""
    import numpy as np

    try:
        with np.load(kept) as archive:
            return archive["offsets"] if archive["stamp"].tolist() == stamp else None
    except (ValueError, OSError, KeyError, EOFError, zipfile.BadZipFile, zlib.error):
        return None


def _scan(path: str) -> "np.ndarray":
    import numpy as np

    parts, position = [np.zeros(1, dtype=np.int64)], 0
    try:
        with files.open_read(path) as stream:
            while chunk := stream.read(_CHUNK_BYTES):
                if not position:
                    _require_lines(chunk, path)
                parts.append(np.flatnonzero(np.frombuffer(chunk, dtype=np.uint8) == ord("\n")) + 1 + position)
                position += len(chunk)
    except (EOFError, zlib.error) as error:
        raise DataError(f"{path} is damaged: {error}") from error
    offsets = np.concatenate(parts)
    return offsets if offsets[-1] == position else np.append(offsets, position)


def _require_lines(beginning: bytes, path: str) -> None:
    """Raise DataError for a file that is one JSON list, and so has no object in any line."""
    first, newline, rest = beginning.lstrip().partition(b"\n")
    if not first.startswith(b"["):
        return
    try:
        parse_json(first)
    except ValueError:
        # A list over several lines, or one line that is broken.
        is_list = not newline or first.strip() in (b"[", b"[{")
    else:
        is_list = not rest.strip()
    if is_list:
        raise DataError(
            f"{path} is one JSON list, and this format has one object a line; format=task_json reads lists"
        )


def open_line_files(options: ImageTextLines | RegionLines) -> LineFiles:
    """All lines of the files and folders of `options`. Raises FileNotFoundError for a missing path; DataError
    when there is not one line, and for compressed files that would have to be read in random order."""
    found = files.expand(options.files)
    forward = options.order == "files"
    packed = next((path for path in found if files.is_compressed(path)), None)
    if packed is not None and (not forward or options.buffer):
        raise DataError(
            f"{packed} is compressed: its lines cannot be reached one by one; decompress it, "
            "or read it from front to back "
            '(order="files", buffer=0)'
        )
    lines = LineFiles(found, [line_offsets(path, options.index) for path in found], forward=forward)
    if not len(lines):
        raise DataError(f"no line in {', '.join(found[:3])}{' ...' if len(found) > 3 else ''}")
    return lines


@dataclass(eq=False)
class ImageTextRows:
    """Rows of X-VLM image-text lines."""

    options: ImageTextLines
    lines: LineFiles

    def __len__(self) -> int:
        return len(self.lines)

    def __getitem__(self, index: int) -> Sample:
        path, number = self.lines.place(index)
        return parse_image_text(self.lines[index], path, number, self.options)

    @property
    def runs(self) -> "Runs | None":
        """The files, when lines are read file after file; None when they are shuffled one by one."""
        return _runs(self.options, self.lines)

    def describe(self) -> dict[str, Any]:
        return _description(self.options, self.lines)


@dataclass(eq=False)
class RegionRows:
    """Rows of X-VLM region lines."""

    options: RegionLines
    lines: LineFiles

    def __len__(self) -> int:
        return len(self.lines)

    def __getitem__(self, index: int) -> Sample:
        path, number = self.lines.place(index)
        return parse_regions(self.lines[index], path, number, self.options)

    @property
    def runs(self) -> "Runs | None":
        """The files, when lines are read file after file; None when they are shuffled one by one."""
        return _runs(self.options, self.lines)

    def describe(self) -> dict[str, Any]:
        return _description(self.options, self.lines)


def open_image_text_lines(options: ImageTextLines) -> ImageTextRows:
    """Find the lines of all files. Raises as `open_line_files`."""
    return ImageTextRows(options, open_line_files(options))


def open_region_lines(options: RegionLines) -> RegionRows:
    """Find the lines of all files. Raises as `open_line_files`."""
    return RegionRows(options, open_line_files(options))


def _runs(options: ImageTextLines | RegionLines, lines: LineFiles) -> "Runs | None":
    from vlp_data.order import Runs

    return Runs(lines.lengths, options.buffer) if options.order == "files" else None


def _description(options: ImageTextLines | RegionLines, lines: LineFiles) -> dict[str, Any]:
    return {"format": options.format, "files": len(lines.paths), "lines": len(lines), "order": options.order}


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
        texts=_texts(entry[caption_key], "caption", key, caption_key) + _concepts(entry, key),
        meta={"file": shown(path), "line": number},
    )


def parse_regions(line: bytes | str, path: str, number: int, options: RegionLines) -> Sample:
    """One region line; boxes are cut to whole pixels, as the reference does. Raises BadSample as
    `parse_image_text`."""
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
            raise BadSample("broken line", key, f"`{name}.bb` must be [x, y, w, h], found {short(box)}")
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
        texts=(*texts, *_concepts(entry, key)),
        regions=tuple(regions),
        meta={"file": shown(path), "line": number},
    )


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 2**31


def _entry(line: bytes | str, key: str) -> dict[str, Any]:
    if not line.strip():
        raise BadSample("empty line", key, "nothing but blanks")
    try:
        entry = parse_json(line)
    except ValueError as error:
        raise BadSample("broken line", key, f"not JSON: {error}"[:200]) from error
    if not isinstance(entry, dict):
        raise BadSample("broken line", key, f"a JSON object was expected, found {type(entry).__name__}")
    return entry


def _texts(value: Any, role: Any, key: str, name: str) -> tuple[Text, ...]:
    alternatives = value if isinstance(value, list) else [value]
    if not alternatives or not all(isinstance(text, str) for text in alternatives):
        raise BadSample(
            "broken line", key, f"`{name}` must be a string or a list of strings, found {short(value)}"
        )
    return tuple(Text(text=text, role=role, listed=isinstance(value, list)) for text in alternatives)


def _concepts(entry: dict[str, Any], key: str) -> tuple[Text, ...]:
    """The concepts of the image in `kwords`, as in ViCHA's lists; X-VLM's own lines have none."""
    try:
        return concepts(entry, "kwords", key)
    except DataError as error:
        raise BadSample("broken line", key, str(error)) from error


def _attributes(value: Any, key: str, name: str) -> str | tuple[str, ...]:
    if isinstance(value, str):
        return whole(value)
    if isinstance(value, list) and value and all(isinstance(text, str) for text in value):
        return tuple(map(whole, value))
    raise BadSample(
        "broken line",
        key,
        f"`{name}.attributes` must be a string or a list of strings, found {short(value)}",
    )


def _image(entry: dict[str, Any], key: str, options: ImageTextLines | RegionLines) -> Image:
    names = (options.image_key,) if options.image_key else ("binary", "image_rpath")
    name = next((n for n in names if n in entry), None)
    if name is None:
        raise BadSample("broken line", key, f"no image: none of the fields {', '.join(names)}")
    value = entry[name]
    if not isinstance(value, str) or not value:
        raise BadSample("broken line", key, f"`{name}` must be a string that is not empty")
    kind = options.image_kind if options.image_kind != "auto" else "base64" if name == "binary" else "path"
    size = size_of(entry)
    if kind == "path":
        return image_at(value, root=options.root, schemes=options.schemes, id=stem(value), size=size)
    try:
        return Image(data=base64.b64decode(value, validate=True), size=size)
    except ValueError as error:  # binascii.Error, and text that is not ASCII
        raise BadSample("broken base64", key, f"`{name}`: {error}") from error
