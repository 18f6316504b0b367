"""Visual Genome's own annotation files.

Source: visualgenome.org, version 1.2/1.4 (objects.json, attributes.json, region_descriptions.json,
image_data.json); data specification 1.6 and pitfall 4.
"""

import posixpath
from dataclasses import dataclass
from dataclasses import field as attribute
from typing import Any, Literal

from vlp_data.errors import DataError, shown
from vlp_data.paths import image_at
from vlp_data.roots import FolderText, PathText
from vlp_data.schema import Region, Sample, Text, whole
from vlp_data.sources.rows import (
    Notes,
    Rows,
    field,
    is_finite,
    listed,
    numbers,
    objects,
    optional_id,
    read_json,
    short,
    size_of,
    strings,
)


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
    schemes: tuple[str, ...] = ()
    """Schemes of URLs that `image_name` may make (s3, https, ...), besides that of `images`."""

    def __post_init__(self) -> None:
        try:
            self.image_name.format(id=1, folder="")
        except (KeyError, IndexError, ValueError, AttributeError) as error:
            raise ValueError(
                f"image_name={self.image_name!r}: only {{id}} and {{folder}} may stand in braces"
            ) from error

    def open(self) -> "VisualGenomeSource":
        return open_visual_genome(self)


@dataclass(eq=False)
class VisualGenomeSource:
    """Rows of one annotation file, one per image that has a usable box."""

    options: VisualGenome
    rows: Rows
    notes: dict[str, int]
    """What was left out of the rows or repaired, with counts."""
    places: dict[str, list[str]] = attribute(default_factory=dict)
    """Where what cannot be used stands, by cause; the first of each."""

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
                image_at(
                    row["file"],
                    root=self.options.images,
                    schemes=self.options.schemes,
                    size=tuple(row["size"]),
                    id=row["id"],
                ),
            ),
            texts=tuple(texts),
            regions=tuple(regions),
            meta={
                "file": shown(self.options.annotations),
                "coco_id": row["coco_id"],
                "flickr_id": row["flickr_id"],
            },
        )

    def describe(self) -> dict[str, Any]:
        return {
            "format": self.options.format,
            "file": shown(self.options.annotations),
            "rows": len(self),
            "notes": self.notes,
            **({"places": self.places} if self.places else {}),
        }


def open_visual_genome(options: VisualGenome) -> VisualGenomeSource:
    """Read an annotation file. Boxes are cut to the image. Boxes with no part in the image or without a
    name are left out, and then images without a box. Raises FileNotFoundError, DataError."""
    path, notes = options.annotations, Notes()
    known = _known(options)
    rows = []
    for number, entry in enumerate(read_json(path, list)):
        where = f"{path}: entry {number}"
        if not isinstance(entry, dict):
            raise DataError(f"{where} must be an object, found {type(entry).__name__}")
        identifier = field(entry, "image_id" if "image_id" in entry else "id", int, where)
        if identifier not in known:
            raise DataError(f"{where}: image {identifier!r} is not in {options.image_data}")
        image = known[identifier]
        regions = [
            region
            for place, part in enumerate(_parts(entry, where))
            if (region := _region(part, image["size"], f"{where}: box {place}", notes)) is not None
        ]
        if not regions:
            notes.add("images without a box")
            continue
        file = options.image_name.format(id=identifier, folder=image["folder"])
        rows.append({"id": identifier, "file": file, "regions": regions, **image})
    if not rows:
        raise DataError(f"{path}: no image with a usable box ({listed(notes.found())})")
    notes.warn(path)
    return VisualGenomeSource(options, Rows(rows), notes.found(), notes.places)


def _known(options: VisualGenome) -> dict[int, dict[str, Any]]:
    """What image_data.json says about each image."""
    from urllib.parse import urlsplit

    known = {}
    for number, entry in enumerate(read_json(options.image_data, list)):
        where = f"{options.image_data}: entry {number}"
        size = size_of(entry) if isinstance(entry, dict) else None
        identifier = field(entry, "image_id", int, where)
        if size is None:
            raise DataError(
                f"{where}: `width` and `height` must be numbers of pixels, found "
                f"{short(entry.get('width'))} and {short(entry.get('height'))}"
            )
        url = "" if entry.get("url") is None else field(entry, "url", str, where)
        try:
            folder = posixpath.basename(posixpath.dirname(urlsplit(url).path))
        except ValueError as error:
            raise DataError(f"{where}: `url` is no URL: {error}") from error
        known[identifier] = {
            "size": size,
            "folder": folder,
            "coco_id": optional_id(entry, "coco_id", where),
            "flickr_id": optional_id(entry, "flickr_id", where),
        }
    return known


def _parts(entry: dict[str, Any], where: str) -> list[dict[str, Any]]:
    for name in ("objects", "attributes", "regions"):
        if name in entry:
            return objects(entry, name, where)
    raise DataError(
        f"{where}: none of the fields objects, attributes, regions; is it a file of Visual Genome?"
    )


def _region(
    part: dict[str, Any], size: tuple[int, int], where: str, notes: Notes
) -> tuple[list[int], list[str], list[str], int | str | None] | None:
    """(xyxy box cut to the image, names, attributes, id)."""
    names = [field(part, "phrase", str, where)] if "phrase" in part else strings(part, "names", where)
    names = [name.strip() for name in names if whole(name).strip()]
    given = [
        field(part, name if name in part else long, (int, float), where)
        for name, long in (("x", "x"), ("y", "y"), ("w", "width"), ("h", "height"))
    ]
    x, y, w, h = numbers(given, 4, where, "a box must be x, y, w, h")
    if not is_finite((x, y, w, h)):
        notes.add("boxes that are no numbers", where)
        return None
    box = [int(v) for v in (x, y, x + w, y + h)]
    cut = [max(box[0], 0), max(box[1], 0), min(box[2], size[0]), min(box[3], size[1])]
    if not names:
        notes.add("boxes without a name")
    elif cut[0] >= cut[2] or cut[1] >= cut[3]:
        notes.add("boxes with nothing in the image", where)
    else:
        if cut != box:
            notes.add("boxes cut to the image")
        words = [] if part.get("attributes") is None else strings(part, "attributes", where)
        attributes = [text.strip() for text in map(whole, words) if text.strip()]
        number = optional_id(part, "object_id" if part.get("object_id") is not None else "region_id", where)
        return cut, names, attributes, number
    return None
