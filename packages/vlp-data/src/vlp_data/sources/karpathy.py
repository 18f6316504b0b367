"""Karpathy's files of splits.

Source: data specification 1.6; Karpathy and Fei-Fei, arXiv 1412.2306.
"""

import posixpath
from dataclasses import dataclass
from typing import Any, Literal

from vlp_data.roots import FolderText, PathText
from vlp_data.sources import Beginning
from vlp_data.sources.coco import CocoSource, source_of
from vlp_data.sources.rows import Notes, field, objects, optional_id, read_json


@dataclass(frozen=True, kw_only=True)
class Karpathy:
    """Karpathy's dataset_*.json: one row per image of the split."""

    format: Literal["karpathy"] = "karpathy"
    annotations: PathText
    """dataset_coco.json or dataset_flickr30k.json, path or fsspec URL."""
    images: FolderText
    """Folder that the paths FILEPATH/FILENAME of the entries start at."""
    split: Literal["train", "restval", "val", "test"]
    """Which images; train includes restval unless `restval` is false."""
    restval: bool = True
    """Count restval as part of train, as every published COCO result does."""
    schemes: tuple[str, ...] = ()
    """Schemes of URLs that file names in the file may be (s3, https, ...), besides that of `images`."""

    def open(self) -> CocoSource:
        return open_karpathy(self)


def is_karpathy(beginning: Beginning) -> bool:
    """Whether a file is Karpathy's dataset_*.json."""
    value = beginning.value
    return (
        isinstance(value, dict)
        and isinstance(value.get("images"), list)
        and not {"annotations", "elems"} & value.keys()
    )


def open_karpathy(options: Karpathy) -> CocoSource:
    """Read dataset_*.json; all images of the split. Raises FileNotFoundError, DataError."""
    path = options.annotations
    content = read_json(path, dict)
    splits = {"train", "restval"} if options.split == "train" and options.restval else {options.split}
    images: dict[Any, dict[str, Any]] = {}
    name = content.get("dataset", posixpath.splitext(posixpath.basename(path))[0])
    notes = Notes()
    for number, image in enumerate(objects(content, "images", path)):
        where = f"{path}: images.{number}"
        if field(image, "split", str, where) not in splits:
            notes.add(f"images of split {image['split']}")
            continue
        names = (optional_id(image, key, where) for key in ("cocoid", "imgid", "filename"))
        identifier = next((one for one in names if one is not None), number)
        folder = "" if image.get("filepath") is None else field(image, "filepath", str, where)
        images[number] = {
            "key": f"{name}/{image['split']}/{identifier}",
            "id": identifier,
            "file": posixpath.join(folder, field(image, "filename", str, where)),
            "size": None,
            "captions": [
                (field(one, "raw", str, where), optional_id(one, "sentid", where))
                for one in objects(image, "sentences", where)
            ],
            "meta": {"split": image["split"]},
        }
    return source_of(options, images, "captions", notes)
