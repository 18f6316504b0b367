"""Annotation files of others to X-VLM region lines. The same input gives the same bytes; a folder is complete
or absent."""

import json
import os
import posixpath
import re
import shutil
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeAlias

from vlp_data import files
from vlp_data.errors import BadSample, DataError
from vlp_data.order import share
from vlp_data.schema import Sample, Source
from vlp_data.sources.rows import read_json, strings

Progress: TypeAlias = Callable[[int, int], None]
Collection: TypeAlias = Literal["coco", "flickr"]


class Converted(NamedTuple):
    """What was written, and what was left out, by cause."""

    images: int
    regions: int
    left_out: dict[str, int]


def held_out(paths: Iterable[str]) -> set[int]:
    """Numbers of the images of validation and test sets, from their annotation files.

    Of Karpathy's file these are the images of its splits val and test, of a COCO file or a task list all
    images. The number is that in the file name, the same in COCO 2014, COCO 2017 and Flickr. Raises
    FileNotFoundError, DataError.
    """
    found: set[int] = set()
    for path in paths:
        content = read_json(path, (dict, list))
        images = content.get("images") if isinstance(content, dict) else content
        if not isinstance(images, list) or not all(isinstance(image, dict) for image in images):
            raise DataError(f"{path}: neither a list of entries nor an annotation file with `images`")
        for number, image in enumerate(images):
            if image.get("split", "test") not in ("val", "test"):
                continue
            where = f"{path}: entry {number}"
            if image.get("images"):
                names = strings(image, "images", where)
            else:
                names = [image.get("file_name") or image.get("filename") or image.get("image")]
            found |= {_number(name, where) for name in names}
    return found


def _number(name: Any, where: str) -> int:
    stem = posixpath.splitext(posixpath.basename(name))[0] if isinstance(name, str) else ""
    digits = re.search(r"[0-9]{1,18}$", stem)
    if digits is None:
        raise DataError(f"{where}: the image {name!r} has no number in its file name")
    return int(digits[0])


def write_region_lines(
    source: Source,
    out: str,
    *,
    excluded: dict[Collection, set[int]] | None = None,
    shards: int = 8,
    progress: Progress | None = None,
) -> Converted:
    """Write a source of boxes as X-VLM region lines into a new folder, `shards` files of equally many lines.

    `excluded`: images not to be written, by the number they have in COCO and in Flickr (`held_out`). Boxes
    are cut to whole pixels inside the image; boxes of which nothing is left are not written. Raises
    FileExistsError when the folder has content; DataError for a source whose images are not files of their
    own, and when nothing is left to write.
    """
    if shards <= 0:
        raise ValueError(f"shards={shards} must be positive")
    folder = files.local(out).resolve()
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise FileExistsError(f"{out} is not empty; choose another folder or delete it")
    lines: list[str] = []
    regions = 0
    left_out: Counter[str] = Counter()
    for number in range(len(source)):
        line = _line(source, number, excluded or {}, left_out)
        if line is not None:
            lines.append(json.dumps(line, ensure_ascii=True))
            regions += len(line["elems"])
        if progress is not None:
            progress(number + 1, len(source))
    if len(lines) < shards:
        raise DataError(f"{len(lines)} lines cannot fill {shards} files ({dict(left_out)}); ask for fewer")
    part = folder.parent / f".{folder.name}.writing-{os.getpid()}"
    try:
        part.mkdir(parents=True)
        for k in range(shards):
            _write(part / f"part-{k:05d}.jsonl", [lines[n] for n in share(len(lines), k, shards)])
        if folder.exists():
            folder.rmdir()
        part.rename(folder)
    finally:
        shutil.rmtree(part, ignore_errors=True)
    return Converted(len(lines), regions, dict(left_out))


def _line(
    source: Source, number: int, excluded: dict[Collection, set[int]], left_out: Counter[str]
) -> dict[str, Any] | None:
    """The line of a row; None, counted, where there is none."""
    try:
        sample = source[number]
    except BadSample as error:
        left_out[f"images left out: {error.cause}"] += 1
        return None
    if cause := _excluded(sample, excluded):
        left_out[cause] += 1
        return None
    elems = _elems(sample, left_out)
    if not elems:
        left_out["images without a box"] += 1
        return None
    captions = [text.text for text in sample.texts if text.role == "caption"]
    return {
        "elems": elems,
        **({"caption": captions} if captions else {}),
        "image_rpath": _path(sample),
        **_size(sample),
    }


def _write(path: Path, lines: list[str]) -> None:
    with path.open("w", encoding="ascii", newline="\n") as stream:
        stream.writelines(f"{line}\n" for line in lines)


def _excluded(sample: Sample, excluded: dict[Collection, set[int]]) -> str:
    """Why an image is not to be written, "" if it is."""
    own = {"coco": sample.meta.get("coco_id"), "flickr": sample.meta.get("flickr_id")}
    if "coco_id" not in sample.meta and isinstance(sample.images[0].id, int):
        own["coco"] = sample.images[0].id
    for collection, numbers in excluded.items():
        if own[collection] in numbers:
            return f"images held out ({collection})"
    return ""


def _elems(sample: Sample, left_out: Counter[str]) -> list[dict[str, Any]]:
    width, height = sample.images[0].size or (float("inf"), float("inf"))
    elems = []
    for region in sample.regions:
        x0, y0, x1, y1 = region.box
        left, top, right, bottom = int(max(x0, 0)), int(max(y0, 0)), int(min(x1, width)), int(min(y1, height))
        texts = [sample.texts[number].text for number in region.texts]
        if left >= right or top >= bottom:
            left_out["boxes of less than a pixel"] += 1
            continue
        elem: dict[str, Any] = {"caption": texts if len(texts) > 1 else texts[0]}
        if region.attributes:
            elem["attributes"] = (
                list(region.attributes) if isinstance(region.attributes, tuple) else region.attributes
            )
        elems.append({**elem, "bb": [left, top, right - left, bottom - top]})
    return elems


def _size(sample: Sample) -> dict[str, int]:
    """What the boxes belong to, so that another image under this name is noticed."""
    size = sample.images[0].size
    return {} if size is None else {"width": size[0], "height": size[1]}


def _path(sample: Sample) -> str:
    path = sample.images[0].path
    if path is None:
        raise DataError(f"{sample.key}: the image is no file of its own; lines name files")
    return path
