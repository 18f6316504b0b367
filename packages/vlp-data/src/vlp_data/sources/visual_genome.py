"""Visual Genome's own annotation files.

Source: visualgenome.org, version 1.2/1.4 (objects.json, attributes.json, region_descriptions.json,
image_data.json); data specification 1.6 and pitfall 4.
"""

import posixpath
from collections import Counter
from dataclasses import dataclass
from typing import Any, Literal

from vlp_data import files
from vlp_data.errors import DataError
from vlp_data.roots import FolderText, PathText
from vlp_data.schema import Image, Region, Sample, Text
from vlp_data.sources.rows import Rows, field, read_json


@dataclass(frozen=True, kw_only=True)
class VisualGenome:
    """Visual Genome: one row per image with its objects (attributes before the name) or its regions."""

    format: Literal["visual_genome"] = "visual_genome"
    annotations: PathText
    """objects.json, attributes.json or region_descriptions.json; the entries tell which."""
    image_data: PathText
    """image_data.json: sizes, and the ids the images have in COCO and Flickr."""
    images: FolderText = ""
    """Folder of the images."""
    image_name: str = "image/{id}.jpg"
    """File of an image below `images`: `{id}` its id, `{folder}` its folder in the release (VG_100K or
    VG_100K_2)."""

    def open(self) -> "VisualGenomeSource":
        return open_visual_genome(self)


@dataclass(eq=False)
class VisualGenomeSource:
    """Rows of one annotation file, one per image that has a usable box."""

    options: VisualGenome
    rows: Rows
    notes: dict[str, int]
    """What was left out of the rows or repaired, with counts."""

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Sample:
        row = self.rows[index]
        texts: list[Text] = []
        regions = []
        for box, names, attributes, number in row["regions"]:
            regions.append(
                Region(
                    box=tuple(box),
                    texts=tuple(range(len(texts), len(texts) + len(names))),
                    attributes=tuple(attributes) if attributes else "",
                    id=number,
                )
            )
            texts += [Text(text=name, role="region", listed=len(names) > 1) for name in names]
        return Sample(
            key=f"visual_genome/{row['id']}",
            images=(
                Image(
                    path=files.join(self.options.images, row["file"]), size=tuple(row["size"]), id=row["id"]
                ),
            ),
            texts=tuple(texts),
            regions=tuple(regions),
            meta={"file": self.options.annotations, "coco_id": row["coco_id"], "flickr_id": row["flickr_id"]},
        )

    def describe(self) -> dict[str, Any]:
        return {
            "format": self.options.format,
            "file": self.options.annotations,
            "rows": len(self),
            "notes": self.notes,
        }


def open_visual_genome(options: VisualGenome) -> VisualGenomeSource:
    """Read an annotation file. Boxes are cut to the image. Boxes with no part in the image or without a
    name are left out, and then images without a box. Raises FileNotFoundError, DataError."""
    from urllib.parse import urlsplit

    path = options.annotations
    known = {
        field(entry, "image_id", int, f"{options.image_data}: entry {n}"): entry
        for n, entry in enumerate(read_json(options.image_data, list))
    }
    notes: Counter[str] = Counter()
    rows = []
    for number, entry in enumerate(read_json(path, list)):
        where = f"{path}: entry {number}"
        identifier = entry.get("image_id", entry.get("id"))
        if identifier not in known:
            raise DataError(f"{where}: image {identifier!r} is not in {options.image_data}")
        image = known[identifier]
        size = (
            field(image, "width", int, options.image_data),
            field(image, "height", int, options.image_data),
        )
        regions = [
            region
            for part in _parts(entry, where)
            if (region := _region(part, size, where, notes)) is not None
        ]
        if not regions:
            notes["images without a box"] += 1
            continue
        folder = posixpath.basename(posixpath.dirname(urlsplit(image.get("url", "")).path))
        rows.append(
            {
                "id": identifier,
                "file": options.image_name.format(id=identifier, folder=folder),
                "size": size,
                "coco_id": image.get("coco_id"),
                "flickr_id": image.get("flickr_id"),
                "regions": regions,
            }
        )
    if not rows:
        raise DataError(f"{path}: no image with a usable box ({dict(notes) or 'the file lists none'})")
    return VisualGenomeSource(
        options, Rows(rows), {reason: count for reason, count in notes.items() if count}
    )


def _parts(entry: dict[str, Any], where: str) -> list[dict[str, Any]]:
    for name in ("objects", "attributes", "regions"):
        if name in entry:
            return field(entry, name, list, where)
    raise DataError(
        f"{where}: none of the fields objects, attributes, regions; is it a file of Visual Genome?"
    )


def _region(
    part: dict[str, Any], size: tuple[int, int], where: str, notes: Counter[str]
) -> tuple[list[int], list[str], list[str], int | None] | None:
    """(xyxy box cut to the image, names, attributes, id)."""
    names = [part["phrase"]] if "phrase" in part else field(part, "names", list, where)
    names = [name.strip() for name in names if name.strip()]
    x, y = (field(part, name, (int, float), where) for name in ("x", "y"))
    w, h = (
        part[name] if name in part else field(part, long, (int, float), where)
        for name, long in (("w", "width"), ("h", "height"))
    )
    box = [int(v) for v in (x, y, x + w, y + h)]
    cut = [max(box[0], 0), max(box[1], 0), min(box[2], size[0]), min(box[3], size[1])]
    if not names:
        notes["boxes without a name"] += 1
    elif cut[0] >= cut[2] or cut[1] >= cut[3]:
        notes["boxes with nothing in the image"] += 1
    else:
        notes["boxes cut to the image"] += cut != box
        attributes = [text.strip() for text in part.get("attributes", ()) if text.strip()]
        return cut, names, attributes, part.get("object_id", part.get("region_id"))
    return None
