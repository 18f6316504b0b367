"""COCO annotation files.

Source: data specification 1.6; cocodataset.org format description.
"""

import posixpath
from collections import Counter
from dataclasses import dataclass
from typing import Any, Literal, Protocol

from vlp_data import files
from vlp_data.errors import DataError
from vlp_data.roots import FolderText, PathText
from vlp_data.schema import Image, Region, Sample, Text
from vlp_data.sources import Beginning
from vlp_data.sources.rows import Rows, field, read_json


@dataclass(frozen=True, kw_only=True)
class CocoCaptions:
    """COCO captions: one row per image that has captions."""

    format: Literal["coco_captions"] = "coco_captions"
    annotations: PathText
    """captions_*.json, path or fsspec URL."""
    images: FolderText
    """Folder of the images."""

    def open(self) -> "CocoSource":
        return open_captions(self)


@dataclass(frozen=True, kw_only=True)
class CocoInstances:
    """COCO instances: one row per image with boxes; the category name is the text of a box."""

    format: Literal["coco_instances"] = "coco_instances"
    annotations: PathText
    """instances_*.json, path or fsspec URL."""
    images: FolderText
    """Folder of the images."""
    captions: PathText = ""
    """captions_*.json whose captions become texts of the whole image; "" for none."""
    crowd: bool = False
    """Keep crowd annotations."""

    def open(self) -> "CocoSource":
        return open_instances(self)


class AnnotatedImages(Protocol):
    """Options that have an annotation file and a folder of images."""

    @property
    def format(self) -> str: ...

    @property
    def annotations(self) -> str: ...

    @property
    def images(self) -> str: ...


@dataclass(eq=False)
class CocoSource:
    """Rows of an annotation file, one per image that has captions or boxes."""

    options: AnnotatedImages
    rows: Rows
    notes: dict[str, int]
    """What was left out of the rows or repaired, with counts."""

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Sample:
        row = self.rows[index]
        texts = [Text(text=text, role="caption", id=number, listed=True) for text, number in row["captions"]]
        regions = []
        for region in row.get("regions", ()):
            x, y, w, h = region["bbox"]
            regions.append(
                Region(
                    box=(x, y, x + w, y + h),
                    texts=(len(texts),),
                    category=region["category_id"],
                    mask=region["segmentation"],
                    crowd=bool(region["iscrowd"]),
                    area=region["area"],
                    id=region["id"],
                )
            )
            texts.append(Text(text=region["name"], role="class_name"))
        return Sample(
            key=row["key"],
            images=(
                Image(
                    path=files.join(self.options.images, row["file"]),
                    size=row["size"] and tuple(row["size"]),
                    id=row["id"],
                ),
            ),
            texts=tuple(texts),
            regions=tuple(regions),
            meta={"file": self.options.annotations, **row["meta"]},
        )

    def describe(self) -> dict[str, Any]:
        return {
            "format": self.options.format,
            "file": self.options.annotations,
            "rows": len(self),
            "notes": self.notes,
        }


def is_captions(beginning: Beginning) -> bool:
    """Whether a file is COCO's captions_*.json."""
    return _is_coco(beginning.value) and "categories" not in beginning.value


def is_instances(beginning: Beginning) -> bool:
    """Whether a file is COCO's instances_*.json."""
    return _is_coco(beginning.value) and "categories" in beginning.value


def _is_coco(value: Any) -> bool:
    return isinstance(value, dict) and {"annotations", "images"} <= value.keys() and "elems" not in value


def _images(content: dict[str, Any], path: str) -> dict[Any, dict[str, Any]]:
    """Rows without captions and boxes, by image id."""
    licences = {licence["id"]: licence.get("name") for licence in content.get("licenses", ())}
    name = posixpath.splitext(posixpath.basename(path))[0]
    images = {}
    for number, image in enumerate(field(content, "images", list, path)):
        where = f"{path}: images.{number}"
        identifier = field(image, "id", (int, str), where)
        if identifier in images:
            raise DataError(f"{where}: the id {identifier} occurs twice")
        size = [image["width"], image["height"]] if "width" in image and "height" in image else None
        meta = {"licence": licences[image["license"]]} if image.get("license") in licences else {}
        images[identifier] = {
            "key": f"{name}/{identifier}",
            "id": identifier,
            "file": field(image, "file_name", str, where),
            "size": size,
            "captions": [],
            "meta": meta,
        }
    return images


def _add_captions(images: dict[Any, dict[str, Any]], path: str, content: dict[str, Any]) -> int:
    """Append captions to their images; returns how many belong to no known image."""
    homeless = 0
    for number, annotation in enumerate(field(content, "annotations", list, path)):
        where = f"{path}: annotations.{number}"
        image = images.get(field(annotation, "image_id", (int, str), where))
        text = field(annotation, "caption", str, where)
        if image is None:
            homeless += 1
        else:
            image["captions"].append((text, annotation.get("id")))
    return homeless


def open_captions(options: CocoCaptions) -> CocoSource:
    """Read captions_*.json. Images without a caption are left out. Raises FileNotFoundError, DataError."""
    content = read_json(options.annotations, dict)
    images = _images(content, options.annotations)
    notes = {"captions of unknown images": _add_captions(images, options.annotations, content)}
    return source_of(options, images, "captions", notes)


def open_instances(options: CocoInstances) -> CocoSource:
    """Read instances_*.json, perhaps with captions. Boxes without area are left out, crowds too
    unless `options.crowd`, and then images without a box. Raises FileNotFoundError, DataError."""
    path = options.annotations
    content = read_json(path, dict)
    images = _images(content, path)
    names = {category["id"]: category["name"] for category in field(content, "categories", list, path)}
    notes: Counter[str] = Counter()
    for row in images.values():
        row["regions"] = []
    for number, annotation in enumerate(field(content, "annotations", list, path)):
        where = f"{path}: annotations.{number}"
        box = field(annotation, "bbox", list, where)
        category = field(annotation, "category_id", int, where)
        image = images.get(field(annotation, "image_id", (int, str), where))
        if len(box) != 4:
            raise DataError(f"{where}: `bbox` must be [x, y, w, h], found {box!r}")
        if category not in names:
            raise DataError(f"{where}: category {category} is not in `categories`")
        if image is None:
            notes["boxes of unknown images"] += 1
        elif annotation.get("iscrowd") and not options.crowd:
            notes["crowds"] += 1
        elif box[2] <= 0 or box[3] <= 0:
            notes["boxes without area"] += 1
        else:
            if image["size"] and (clipped := _clip_rounding(box, image["size"])) != box:
                box = clipped
                notes["boxes clipped by less than a pixel"] += 1
            image["regions"].append(
                {
                    "bbox": box,
                    "category_id": category,
                    "name": names[category],
                    "segmentation": annotation.get("segmentation"),
                    "iscrowd": annotation.get("iscrowd", 0),
                    "area": annotation.get("area"),
                    "id": annotation.get("id"),
                }
            )
    if options.captions:
        notes["captions of unknown images"] = _add_captions(
            images, options.captions, read_json(options.captions, dict)
        )
    return source_of(options, images, "regions", notes)


def _clip_rounding(box: list[float], size: list[int]) -> list[float]:
    """The box, cut at the right and lower edge where it leaves the image by less than a pixel.

    COCO's boxes were rounded to hundredths of a pixel. Boxes that leave the image by more stay as they are:
    the sampler of regions decides about them.
    """
    x, y, w, h = box
    return [
        x,
        y,
        *(
            limit - start if limit < start + side < limit + 1 else side
            for start, side, limit in zip((x, y), (w, h), size, strict=True)
        ),
    ]


def source_of(
    options: AnnotatedImages, images: dict[Any, dict[str, Any]], needed: str, notes: dict[str, int]
) -> CocoSource:
    """The rows that have what is `needed`, "captions" or "regions". Raises DataError if there are none."""
    rows = [row for row in images.values() if row[needed]]
    notes[f"images without {needed}"] = len(images) - len(rows)
    if not rows:
        raise DataError(f"{options.annotations}: no image with {needed} ({_listed(notes)})")
    return CocoSource(options, Rows(rows), {reason: count for reason, count in notes.items() if count})


def _listed(counts: dict[str, int]) -> str:
    return (
        ", ".join(f"{count} {reason}" for reason, count in counts.items() if count) or "the file lists none"
    )
