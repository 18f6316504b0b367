"""Referring expressions with their boxes: task lists joined with REFER's files.

`refs(unc).p` is a pickle, read by `vlp_data.sources.plain_pickle`: nothing in it can run.
Sources: X-VLM specification 5.5; lichengunc/refer (layout of its files); VLUE (lists with boxes).
"""

import json
import posixpath
from collections import Counter
from dataclasses import dataclass
from typing import Any, Literal

from vlp_data import files
from vlp_data.errors import DataError
from vlp_data.roots import FolderText, PathText
from vlp_data.schema import Image, Region, Sample, Target, Text
from vlp_data.sources.rows import Rows, concepts, field, read_json


@dataclass(frozen=True, kw_only=True)
class Refer:
    """Referring expressions: a task list {image, text, ref_id} joined with the files of REFER, or VLUE's
    list, which holds the boxes itself."""

    format: Literal["refer"] = "refer"
    files: tuple[PathText, ...]
    """Task lists, paths or fsspec URLs."""
    refs: PathText = ""
    """`refs(unc).p`, or that list as .json (`vlp-data convert refer` writes it); "" where every entry has its
    box (VLUE)."""
    instances: PathText = ""
    """instances.json of REFER; needed with `refs`."""
    detections: PathText = ""
    """dets.json: boxes to choose from, by image id; "" for none."""
    root: FolderText = ""
    """Folder that relative image paths start at."""
    splits: tuple[str, ...] = ()
    """Keep expressions of these splits of REFER (train, val, testA, testB); () keeps all."""

    def __post_init__(self) -> None:
        if bool(self.refs) != bool(self.instances):
            raise ValueError(
                "refs and instances belong together: give both, or neither for lists that hold the boxes"
            )
        if self.splits and not self.refs:
            raise ValueError("splits needs refs: that is where the split of an expression stands")

    def open(self) -> "ReferSource":
        return open_refer(self)


def read_refs(path: str) -> list[dict[str, Any]]:
    """REFER's list of references from its pickle or from JSON. Raises FileNotFoundError, DataError."""
    if path.endswith(".json"):
        refs = read_json(path, list)
    else:
        from vlp_data.sources.plain_pickle import read_plain_pickle

        refs = read_plain_pickle(path)
    if not isinstance(refs, list) or not all(isinstance(ref, dict) for ref in refs):
        raise DataError(
            f"{path}: expected a list of references, each a dict with ref_id, ann_id, image_id, split, "
            "sentences"
        )
    return refs


def write_refs_json(refs: str, out: str) -> int:
    """Write REFER's pickle as JSON, which anybody can read safely; returns the number of references. Raises
    FileExistsError, DataError."""
    found = read_refs(refs)
    try:
        text = json.dumps(found, ensure_ascii=True, indent=0)
    except (TypeError, ValueError) as error:
        raise DataError(f"{refs}: cannot be written as JSON: {error}") from error
    with files.local(out).open("x", encoding="ascii") as stream:
        stream.write(text + "\n")
    return len(found)


@dataclass(eq=False)
class ReferSource:
    """Rows of expressions, each with its box first and the detections of its image after it."""

    options: Refer
    rows: Rows
    notes: dict[str, int]
    """Expressions by split, and what was left out."""

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Sample:
        row = self.rows[index]
        boxes = [row["box"], *row["detections"]]
        return Sample(
            key=row["key"],
            images=(
                Image(
                    path=files.join(self.options.root, row["image"]),
                    size=row["size"] and tuple(row["size"]),
                    id=row["image_id"],
                ),
            ),
            texts=(
                Text(text=row["text"], role="expression", id=row["ref_id"]),
                *concepts(row, "kwords", row["key"]),
            ),
            regions=tuple(
                Region(box=(x, y, x + w, y + h), category=None if number else row["category"])
                for number, (x, y, w, h) in enumerate(boxes)
            ),
            target=Target(box=0),
            meta={"file": row["file"], "row": row["row"], "ref_id": row["ref_id"], "split": row["split"]},
        )

    def describe(self) -> dict[str, Any]:
        return {
            "format": self.options.format,
            "files": list(self.options.files),
            "rows": len(self),
            "notes": self.notes,
        }


def open_refer(options: Refer) -> ReferSource:
    """Join the lists with the references. Raises FileNotFoundError; DataError where a reference, its box or
    its detections are missing."""
    references = _References(options) if options.refs else None
    detections = read_json(options.detections, dict) if options.detections else {}
    notes: Counter[str] = Counter()
    rows = []
    for path in files.expand(options.files):
        for number, entry in enumerate(read_json(path, list)):
            where = f"{path}: entry {number}"
            if not isinstance(entry, dict):
                raise DataError(f"{where} must be an object, found {type(entry).__name__}")
            found = _own(entry, where) if references is None else references.of(entry, where)
            if options.splits and found["split"] not in options.splits:
                notes["expressions of other splits"] += 1
                continue
            notes[f"expressions of split {found['split']}"] += 1
            if not _has_area(found["box"]):
                raise DataError(f"{where}: the box {found['box']} that it refers to has no area")
            if options.detections:
                name = str(found["image_id"])
                if name not in detections:
                    raise DataError(
                        f"{options.detections}: no detections of image {name}, which {where} needs"
                    )
                boxes = [_box(box, f"{options.detections}: {name}") for box in detections[name]]
                found["detections"] = [box for box in boxes if _has_area(box)]
                notes["detections without area"] += len(boxes) - len(found["detections"])
            words = [text.text for text in concepts(entry, "kwords", where)]
            rows.append({**found, "kwords": words, "key": f"{path}:{number}", "file": path, "row": number})
    if not rows:
        raise DataError(
            f"no expression in {', '.join(options.files)} ({dict(notes) or 'the lists are empty'})"
        )
    return ReferSource(options, Rows(rows), {reason: count for reason, count in notes.items() if count})


class _References:
    """What REFER's files say about each reference."""

    def __init__(self, options: Refer) -> None:
        content = read_json(options.instances, dict)
        self.options = options
        self.refs = {
            field(ref, "ref_id", int, f"{options.refs}: {n}"): ref
            for n, ref in enumerate(read_refs(options.refs))
        }
        self.annotations = {a["id"]: a for a in field(content, "annotations", list, options.instances)}
        self.images = {image["id"]: image for image in field(content, "images", list, options.instances)}

    def of(self, entry: dict[str, Any], where: str) -> dict[str, Any]:
        number = field(entry, "ref_id", int, where)
        if number not in self.refs:
            raise DataError(f"{where}: ref_id {number} is not in {self.options.refs}")
        ref = self.refs[number]
        if ref["ann_id"] not in self.annotations or ref["image_id"] not in self.images:
            raise DataError(
                f"{self.options.refs}: annotation {ref['ann_id']} of image {ref['image_id']} (ref_id "
                f"{number}) is not in {self.options.instances}"
            )
        annotation, image = self.annotations[ref["ann_id"]], self.images[ref["image_id"]]
        return {
            "image": field(entry, "image", str, where),
            "text": field(entry, "text", str, where),
            "ref_id": number,
            "split": ref["split"],
            "image_id": ref["image_id"],
            "category": annotation.get("category_id"),
            "size": [image["width"], image["height"]],
            "box": _box(annotation["bbox"], f"{self.options.instances}: annotation {ref['ann_id']}"),
            "detections": [],
        }


def _own(entry: dict[str, Any], where: str) -> dict[str, Any]:
    """An entry of VLUE's kind: {ref_id, bbox, height, width, dets, text, image}."""
    if "bbox" not in entry:
        raise DataError(f"{where}: the entry has no `bbox`; give refs and instances of REFER")
    image = field(entry, "image", str, where)
    return {
        "image": image,
        "text": field(entry, "text", str, where),
        "ref_id": entry.get("ref_id"),
        "split": str(entry.get("split", "")),
        "image_id": posixpath.splitext(posixpath.basename(image))[0],
        "category": None,
        "size": [entry["width"], entry["height"]] if "width" in entry and "height" in entry else None,
        "box": _box(entry["bbox"], where),
        "detections": [_box(box, where) for box in entry.get("dets", ())],
    }


def _box(value: Any, where: str) -> list[float]:
    """x, y, w, h: the first four numbers; a score or a class may follow."""
    if not (
        isinstance(value, list) and len(value) >= 4 and all(isinstance(v, int | float) for v in value[:4])
    ):
        raise DataError(f"{where}: a box must be [x, y, w, h], found {value!r}"[:300])
    return value[:4]


def _has_area(box: list[float]) -> bool:
    return box[2] > 0 and box[3] > 0
