"""COCO annotation files.

Boxes that cannot be used (no numbers, no area, nothing of them in the image of the stated size) are left out,
counted and named; a file all of whose boxes are shares of the image is refused. A stated size that is no size
counts as none. Source: data specification 1.6; cocodataset.org format description.
"""

import posixpath
from dataclasses import dataclass
from dataclasses import field as attribute
from typing import Any, Literal, Protocol

from vlp_data.errors import DataError, shown
from vlp_data.paths import image_at
from vlp_data.roots import FolderText, PathText
from vlp_data.schema import Identifier, Region, Sample, Text
from vlp_data.sources import Beginning
from vlp_data.sources.rows import (
    Notes,
    Rows,
    field,
    is_finite,
    listed,
    number_or_none,
    numbers,
    objects,
    optional_id,
    read_json,
    short,
    size_of,
)


@dataclass(frozen=True, kw_only=True)
class CocoCaptions:
    """COCO captions: one row per image that has captions."""

    format: Literal["coco_captions"] = "coco_captions"
    annotations: PathText
    """captions_*.json, path or fsspec URL."""
    images: FolderText
    """Folder of the images."""
    schemes: tuple[str, ...] = ()
    """Schemes of URLs that file names in the file may be (s3, https, ...), besides that of `images`."""

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
    schemes: tuple[str, ...] = ()
    """Schemes of URLs that file names in the file may be (s3, https, ...), besides that of `images`."""

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

    @property
    def schemes(self) -> tuple[str, ...]: ...


@dataclass(eq=False)
class CocoSource:
    """Rows of an annotation file, one per image that has captions or boxes."""

    options: AnnotatedImages
    rows: Rows
    notes: dict[str, int]
    """What was left out of the rows or repaired, with counts."""
    places: dict[str, list[str]] = attribute(default_factory=dict)
    """Where what cannot be used stands, by cause; the first of each."""

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
                image_at(
                    row["file"],
                    root=self.options.images,
                    schemes=self.options.schemes,
                    size=row["size"] and tuple(row["size"]),
                    id=row["id"],
                ),
            ),
            texts=tuple(texts),
            regions=tuple(regions),
            meta={"file": shown(self.options.annotations), **row["meta"]},
        )

    def describe(self) -> dict[str, Any]:
        return {
            "format": self.options.format,
            "file": shown(self.options.annotations),
            "rows": len(self),
            "notes": self.notes,
            **({"places": self.places} if self.places else {}),
        }


def is_captions(beginning: Beginning) -> bool:
    """Whether a file is COCO's captions_*.json."""
    return _is_coco(beginning.value) and "categories" not in beginning.value


def is_instances(beginning: Beginning) -> bool:
    """Whether a file is COCO's instances_*.json."""
    return _is_coco(beginning.value) and "categories" in beginning.value


def _is_coco(value: Any) -> bool:
    return isinstance(value, dict) and {"annotations", "images"} <= value.keys() and "elems" not in value


class _ById:
    """Things by their id, found also where the id is a number here and its digits in text there."""

    def __init__(self, things: dict[Identifier, Any]) -> None:
        self._things = things
        self._texts = {str(name): name for name in things}
        self._mixed = len(self._texts) < len(things)

    def find(self, name: Identifier) -> tuple[Any, bool]:
        """(the thing or None, whether its id is of another type)."""
        if name in self._things:
            return self._things[name], False
        if self._mixed or str(name) not in self._texts:
            return None, False
        return self._things[self._texts[str(name)]], True


OTHER_TYPE = "ids of another type than that of their image or category"


def _images(content: dict[str, Any], path: str, notes: Notes) -> dict[Identifier, dict[str, Any]]:
    """Rows without captions and boxes, by image id."""
    licences = _licences(content.get("licenses"))
    name = posixpath.splitext(posixpath.basename(path))[0]
    images = {}
    for number, image in enumerate(objects(content, "images", path)):
        where = f"{path}: images.{number}"
        identifier = field(image, "id", (int, str), where)
        if identifier in images:
            raise DataError(f"{where}: the id {identifier} occurs twice")
        size = size_of(image)
        if size is None and ("width" in image or "height" in image):
            notes.add("images whose size is no size", f"images.{number}")
        licence = image.get("license")
        known = isinstance(licence, int | str) and licence in licences
        images[identifier] = {
            "key": f"{name}/{identifier}",
            "id": identifier,
            "file": field(image, "file_name", str, where),
            "size": size,
            "captions": [],
            "meta": {"licence": licences[licence]} if known else {},
        }
    return images


def _licences(found: Any) -> dict[Any, Any]:
    """Names of licences by id; training can do without them, so nothing is refused."""
    entries = found if isinstance(found, list) else []
    return {
        one["id"]: one.get("name")
        for one in entries
        if isinstance(one, dict) and isinstance(one.get("id"), int | str)
    }


def _add_captions(
    images: dict[Identifier, dict[str, Any]], path: str, content: dict[str, Any], notes: Notes
) -> None:
    """Append captions to their images, and count those of no known image."""
    by_id = _ById(images)
    for number, annotation in enumerate(objects(content, "annotations", path)):
        where = f"{path}: annotations.{number}"
        image, other = by_id.find(field(annotation, "image_id", (int, str), where))
        text = field(annotation, "caption", str, where)
        if image is None:
            notes.add("captions of unknown images", f"annotations.{number}")
            continue
        if other:
            notes.add(OTHER_TYPE)
        image["captions"].append((text, optional_id(annotation, "id", where)))


def open_captions(options: CocoCaptions) -> CocoSource:
    """Read captions_*.json. Images without a caption are left out. Raises FileNotFoundError, DataError."""
    content, notes = read_json(options.annotations, dict), Notes()
    images = _images(content, options.annotations, notes)
    _add_captions(images, options.annotations, content, notes)
    return source_of(options, images, "captions", notes)


def open_instances(options: CocoInstances) -> CocoSource:
    """Read instances_*.json, perhaps with captions. Boxes that cannot be used are left out, crowds too unless
    `options.crowd`, and then images without a box. Raises FileNotFoundError, DataError."""
    path = options.annotations
    content, notes = read_json(path, dict), Notes()
    images = _images(content, path, notes)
    for row in images.values():
        row["regions"] = []
    by_id, names = _ById(images), _ById(_categories(content, path))
    found: list[list[float]] = []
    for number, annotation in enumerate(objects(content, "annotations", path)):
        where, place = f"{path}: annotations.{number}", f"annotations.{number}"
        values = field(annotation, "bbox", list, where)
        category = field(annotation, "category_id", (int, str), where)
        image, other = by_id.find(field(annotation, "image_id", (int, str), where))
        if len(values) != 4:
            raise DataError(f"{where}: `bbox` must be [x, y, w, h], found {short(values)}")
        box = numbers(values, 4, where, "`bbox` must be [x, y, w, h]")
        name, other_name = names.find(category)
        if name is None:
            raise DataError(f"{where}: category {category} is not in `categories`")
        if image is None:
            notes.add("boxes of unknown images", place)
        elif annotation.get("iscrowd") and not options.crowd:
            notes.add("crowds")
        elif not is_finite(box):
            notes.add("boxes that are no numbers", place)
        elif box[2] <= 0 or box[3] <= 0:
            notes.add("boxes without area", place)
        elif image["size"] and not _touches(box, image["size"]):
            notes.add("boxes outside the image", place)
        else:
            found.append(box)
            if other or other_name:
                notes.add(OTHER_TYPE)
            if image["size"] and (clipped := _clip_rounding(box, image["size"])) != box:
                box = clipped
                notes.add("boxes clipped by less than a pixel")
            image["regions"].append(
                {
                    "bbox": box,
                    "category_id": category if not isinstance(category, str) else None,
                    "name": name,
                    "segmentation": _mask(annotation, notes, place),
                    "iscrowd": bool(annotation.get("iscrowd")),
                    "area": number_or_none(annotation.get("area")),
                    "id": optional_id(annotation, "id", where),
                }
            )
    if _in_fractions(found):
        raise DataError(
            f"{path}: all {len(found)} boxes lie in 0..1: they are shares of the image, where [x, y, w, h] "
            "in pixels are meant; multiply them by width and height of the images"
        )
    if options.captions:
        _add_captions(images, options.captions, read_json(options.captions, dict), notes)
    return source_of(options, images, "regions", notes)


def _in_fractions(boxes: list[list[float]]) -> bool:
    """Whether all boxes lie in 0..1, and not all are whole pixels."""
    return (
        bool(boxes)
        and all(x >= 0 and y >= 0 and x + w <= 1 and y + h <= 1 for x, y, w, h in boxes)
        and not all(float(side).is_integer() for box in boxes for side in box)
    )


def _categories(content: dict[str, Any], path: str) -> dict[Identifier, str]:
    names: dict[Identifier, str] = {}
    for number, category in enumerate(objects(content, "categories", path)):
        where = f"{path}: categories.{number}"
        identifier, name = field(category, "id", (int, str), where), field(category, "name", str, where)
        if names.setdefault(identifier, name) != name:
            raise DataError(f"{where}: the id {identifier} is that of {names[identifier]!r} and of {name!r}")
    return names


def _mask(annotation: dict[str, Any], notes: Notes, place: str) -> Any:
    """Polygons or RLE as given; None, counted, for anything else."""
    mask = annotation.get("segmentation")
    if mask is None:
        return None
    if isinstance(mask, list) and all(
        isinstance(polygon, list)
        and all(isinstance(side, int | float) and not isinstance(side, bool) for side in polygon)
        and is_finite(polygon)
        for polygon in mask
    ):
        return mask
    if (
        isinstance(mask, dict)
        and {"size", "counts"} <= mask.keys()
        and isinstance(mask["counts"], str | list)
    ):
        size = mask["size"]
        if isinstance(size, list) and len(size) == 2 and all(type(side) is int and side > 0 for side in size):
            return mask
    notes.add("masks that are neither polygons nor RLE", place)
    return None


def _touches(box: list[float], size: tuple[int, int]) -> bool:
    """Whether any of the box lies in an image of this size."""
    x, y, w, h = box
    return x < size[0] and y < size[1] and x + w > 0 and y + h > 0


def _clip_rounding(box: list[float], size: tuple[int, int]) -> list[float]:
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
    options: AnnotatedImages, images: dict[Any, dict[str, Any]], needed: str, notes: Notes
) -> CocoSource:
    """The rows that have what is `needed`, "captions" or "regions"; says what cannot be used. Raises
    DataError if there are none."""
    rows = [row for row in images.values() if row[needed]]
    notes.add(f"images without {needed}", count=len(images) - len(rows))
    if not rows:
        raise DataError(f"{options.annotations}: no image with {needed} ({listed(notes.found())})")
    notes.warn(options.annotations)
    return CocoSource(options, Rows(rows), notes.found(), notes.places)
