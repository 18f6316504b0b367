"""Referring expressions with their boxes: task lists joined with REFER's files.

`refs(unc).p` is a pickle, read by `vlp_data.sources.plain_pickle`: nothing in it can run.
Sources: X-VLM specification 5.5; lichengunc/refer (layout of its files); VLUE (lists with boxes).
"""

import json
from dataclasses import dataclass
from dataclasses import field as attribute
from typing import Any, Literal

from vlp_data import files
from vlp_data.errors import BadSample, DataError, shown
from vlp_data.paths import image_at, stem
from vlp_data.roots import FolderText, PathText
from vlp_data.schema import Region, Sample, Target, Text
from vlp_data.sources.rows import (
    Notes,
    Rows,
    check_row,
    concepts,
    field,
    is_finite,
    listed,
    numbers,
    objects,
    optional_id,
    read_entries,
    read_json,
    size_of,
)


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
    schemes: tuple[str, ...] = ()
    """Schemes of URLs that image paths in the lists may be (s3, https, ...), besides that of `root`."""

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
    except (TypeError, ValueError, RecursionError) as error:
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
    places: dict[str, list[str]] = attribute(default_factory=dict)
    """Where what cannot be used stands, by cause; the first of each."""

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Sample:
        try:
            row = self.rows[index]
        except DataError as error:
            raise BadSample("broken entry", f"row {index}", str(error)) from error
        boxes = [row["box"], *row["detections"]]
        return Sample(
            key=row["key"],
            images=(
                image_at(
                    row["image"],
                    root=self.options.root,
                    schemes=self.options.schemes,
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
            meta={
                "file": shown(row["file"]),
                "row": row["row"],
                "ref_id": row["ref_id"],
                "split": row["split"],
            },
        )

    def describe(self) -> dict[str, Any]:
        return {
            "format": self.options.format,
            "files": [shown(file) for file in self.options.files],
            "rows": len(self),
            "notes": self.notes,
            **({"places": self.places} if self.places else {}),
        }


def open_refer(options: Refer) -> ReferSource:
    """Join the lists with the references. Raises FileNotFoundError; DataError where a reference, its box or
    its detections are missing."""
    references = _References(options) if options.refs else None
    detections = _detections(options.detections) if options.detections else {}
    notes = Notes()
    rows = []
    for path in files.expand(options.files):
        for number, entry in enumerate(read_entries(path)):
            where = f"{path}: entry {number}"
            if not isinstance(entry, dict):
                raise DataError(f"{where} must be an object, found {type(entry).__name__}")
            check_row(entry, where)
            found = _own(entry, where) if references is None else references.of(entry, where)
            if options.splits and found["split"] not in options.splits:
                notes.add("expressions of other splits")
                continue
            notes.add(f"expressions of split {found['split']}")
            if not is_finite(found["box"]):
                raise DataError(f"{where}: the box {found['box']} that it refers to holds what is no number")
            if not _has_area(found["box"]):
                raise DataError(f"{where}: the box {found['box']} that it refers to has no area")
            if options.detections:
                name = str(found["image_id"])
                if name not in detections:
                    raise DataError(
                        f"{options.detections}: no detections of image {name}, which {where} needs"
                    )
                found["detections"] = detections[name]
            boxes = found["detections"]
            found["detections"] = [box for box in boxes if is_finite(box) and _has_area(box)]
            if lost := len(boxes) - len(found["detections"]):
                notes.add("detections without area", where, lost)
            words = [text.text for text in concepts(entry, "kwords", where)]
            rows.append({**found, "kwords": words, "key": f"{path}:{number}", "file": path, "row": number})
    if not rows:
        none = "the lists are empty" if not notes.found() else listed(notes.found())
        raise DataError(f"no expression in {', '.join(options.files)} ({none})")
    notes.warn(", ".join(options.files))
    return ReferSource(options, Rows(rows), notes.found(), notes.places)


def _detections(path: str) -> dict[str, list[list[float]]]:
    """Boxes to choose from, by image id."""
    content = read_json(path, dict)
    return {
        name: [_box(box, f"{path}: {name}") for box in field(content, name, list, path)] for name in content
    }


class _References:
    """What REFER's files say about each reference."""

    def __init__(self, options: Refer) -> None:
        content = read_json(options.instances, dict)
        self.options = options
        self.refs = {
            field(ref, "ref_id", (int, str), f"{options.refs}: {n}"): ref
            for n, ref in enumerate(read_refs(options.refs))
        }
        self.annotations, self.images = (
            {
                field(one, "id", (int, str), f"{options.instances}: {name}.{n}"): one
                for n, one in enumerate(objects(content, name, options.instances))
            }
            for name in ("annotations", "images")
        )

    def of(self, entry: dict[str, Any], where: str) -> dict[str, Any]:
        options = self.options
        number = field(entry, "ref_id", (int, str), where)
        if number not in self.refs:
            raise DataError(f"{where}: ref_id {number} is not in {options.refs}")
        ref, there = self.refs[number], f"{options.refs}: ref_id {number}"
        annotation_id = field(ref, "ann_id", (int, str), there)
        image_id = field(ref, "image_id", (int, str), there)
        if annotation_id not in self.annotations or image_id not in self.images:
            raise DataError(
                f"{options.refs}: annotation {annotation_id} of image {image_id} (ref_id "
                f"{number}) is not in {options.instances}"
            )
        annotation, image = self.annotations[annotation_id], self.images[image_id]
        of_box = f"{options.instances}: annotation {annotation_id}"
        category = annotation.get("category_id")
        return {
            "image": field(entry, "image", str, where),
            "text": field(entry, "text", str, where),
            "ref_id": number,
            "split": field(ref, "split", str, there),
            "image_id": image_id,
            "category": category if type(category) is int else None,
            "size": size_of(image),
            "box": _box(field(annotation, "bbox", list, of_box), of_box),
            "detections": [],
        }


def _own(entry: dict[str, Any], where: str) -> dict[str, Any]:
    """An entry of VLUE's kind: {ref_id, bbox, height, width, dets, text, image}."""
    if "bbox" not in entry:
        raise DataError(f"{where}: the entry has no `bbox`; give refs and instances of REFER")
    image = field(entry, "image", str, where)
    detections = [] if entry.get("dets") is None else field(entry, "dets", list, where)
    return {
        "image": image,
        "text": field(entry, "text", str, where),
        "ref_id": optional_id(entry, "ref_id", where),
        "split": "" if entry.get("split") is None else str(field(entry, "split", (int, str), where)),
        "image_id": stem(image),
        "category": None,
        "size": size_of(entry),
        "box": _box(entry["bbox"], where),
        "detections": [_box(box, where) for box in detections],
    }


def _box(value: Any, where: str) -> list[float]:
    """x, y, w, h: the first four numbers; a score or a class may follow."""
    return numbers(value, 4, where, "a box must be [x, y, w, h]")


def _has_area(box: list[float]) -> bool:
    return box[2] > 0 and box[3] > 0
