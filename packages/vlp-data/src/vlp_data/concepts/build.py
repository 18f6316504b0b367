"""Caption lists {image, caption, image_id?} from the raw layouts of the pre-training sets.

Rows keep the order of the source: the loader shuffles, and the same files give the same list. Source: ViCHA
specification 5.1 and 5.7; data specification 1.5 and 1.6.
"""

import posixpath
from collections import Counter
from collections.abc import Iterator
from typing import Any, Literal, NamedTuple, TypeAlias
from urllib.parse import urlsplit

import pyarrow as pa

from vlp_data import files
from vlp_data.concepts.tables import from_rows, read_table
from vlp_data.errors import BadSample, DataError
from vlp_data.paths import image_at
from vlp_data.sources.karpathy import Karpathy, open_karpathy
from vlp_data.sources.rows import field, objects, read_json

Split: TypeAlias = Literal["train", "val", "test", "restval"]


class Built(NamedTuple):
    """A list, and what of the source is not in it, by cause."""

    rows: pa.Table
    left_out: dict[str, int]


def karpathy(
    annotations: str, *, splits: tuple[Split, ...] = ("train", "val"), folder: str = "", root: str = ""
) -> Built:
    """COCO or Flickr30k by Karpathy's file: a row per sentence, with the `image_id` of its image (cocoid,
    else imgid).

    `restval` is a split of its own, as in the file. `folder` is put before the file names
    ("flickr30k-images"). With `root` rows whose image is not below it are left out. Raises FileNotFoundError,
    DataError.
    """
    rows: list[dict[str, Any]] = []
    left_out: Counter[str] = Counter()
    for split in splits:
        source = open_karpathy(Karpathy(annotations=annotations, images=folder, split=split, restval=False))
        for number in range(len(source)):
            try:
                sample = source[number]
            except BadSample as error:
                left_out[f"images left out: {error.cause}"] += 1
                continue
            image = sample.images[0]
            rows += [
                {"image": image.path, "caption": text.text, "image_id": image.id} for text in sample.texts
            ]
    return _present(rows, root, left_out)


def visual_genome(
    annotations: str, *, image_data: str = "", image_name: str = "image/{id}.jpg", root: str = ""
) -> Built:
    """Visual Genome: a row per phrase of region_descriptions.json.

    `image_name`: path of an image; {id} its number, {folder} VG_100K or VG_100K_2, which image_data.json
    tells. Blank phrases are left out. Raises FileNotFoundError, DataError.
    """
    folders: dict[int, str] = {}
    if "{folder}" in image_name:
        if not image_data:
            raise DataError("{folder} of an image stands in image_data.json; give image_data")
        for number, entry in enumerate(read_json(image_data, list)):
            where = f"{image_data}: entry {number}"
            try:
                url = urlsplit(field(entry, "url", str, where)).path
            except ValueError as error:
                raise DataError(f"{where}: `url` is no URL: {error}") from error
            folders[field(entry, "image_id", int, where)] = posixpath.basename(posixpath.dirname(url))
    left_out: Counter[str] = Counter()
    rows = []
    for number, entry in enumerate(read_json(annotations, list)):
        where = f"{annotations}: entry {number}"
        if not isinstance(entry, dict) or not {"id", "image_id"} & entry.keys():
            raise DataError(f"{where}: neither `id` nor `image_id`")
        identifier = field(entry, "image_id" if "image_id" in entry else "id", int, where)
        if folders and identifier not in folders:
            raise DataError(f"{where}: image {identifier} is not in {image_data}")
        image = image_name.format(id=identifier, folder=folders.get(identifier, ""))
        for region in objects(entry, "regions", where):
            phrase = field(region, "phrase", str, where)
            if phrase.strip():
                rows.append({"image": image, "caption": phrase, "image_id": identifier})
            else:
                left_out["blank captions"] += 1
    return _present(rows, root, left_out)


def sbu(annotations: str, *, images: str = "images_train", root: str = "") -> Built:
    """SBU: a row per [path, caption] of annot.json. `images` replaces the folder called `images` in the
    paths; "" leaves them alone."""
    left_out: Counter[str] = Counter()
    rows = []
    for number, entry in enumerate(read_json(annotations, list)):
        if not (isinstance(entry, list) and len(entry) == 2 and all(isinstance(part, str) for part in entry)):
            raise DataError(f"{annotations}: entry {number} must be [path, caption], found {entry!r}"[:300])
        path, caption = entry
        if images:
            path = "/".join(images if piece == "images" else piece for piece in path.split("/"))
        if caption.strip():
            rows.append({"image": path, "caption": caption})
        else:
            left_out["blank captions"] += 1
    return _present(rows, root, left_out)


def cc3m(downloads: str, *, folder: str = "", root: str = "") -> Built:
    """CC3M (or any set of links) as img2dataset downloads it: a row per image that arrived, from the
    00000.parquet of every shard.

    Images are named SHARD/KEY.jpg below `folder`, which is where `output_format=files` puts them; a .tar
    shard has to be unpacked into a folder of its name. Raises FileNotFoundError, DataError.
    """
    tables = [path for path in files.expand([downloads]) if path.endswith(".parquet")]
    if not tables:
        raise DataError(f"{downloads} holds no NUMBER.parquet of img2dataset")
    left_out: Counter[str] = Counter()
    rows = [row for path in tables for row in _arrived(path, folder, left_out)]
    return _present(rows, root, left_out)


def _arrived(path: str, folder: str, left_out: Counter[str]) -> Iterator[dict[str, Any]]:
    shard = posixpath.splitext(posixpath.basename(path))[0]
    for row in read_table(path, ["key", "caption", "status"]).to_pylist():
        if row["status"] != "success":
            left_out["images that did not arrive"] += 1
        elif not (row["caption"] or "").strip():
            left_out["blank captions"] += 1
        else:
            yield {"image": posixpath.join(folder, shard, f"{row['key']}.jpg"), "caption": row["caption"]}


def _present(rows: list[dict[str, Any]], root: str, left_out: Counter[str] | None = None) -> Built:
    left_out = Counter() if left_out is None else left_out
    if root:
        there = {path: _exists(root, path) for path in dict.fromkeys(row["image"] for row in rows)}
        left_out["rows whose image is not there"] = sum(not there[row["image"]] for row in rows)
        rows = [row for row in rows if there[row["image"]]]
    if not rows:
        raise DataError(f"no captions are left ({dict(left_out)}); does root fit the files?")
    return Built(from_rows(rows), {cause: number for cause, number in left_out.items() if number})


def _exists(root: str, name: str) -> bool:
    try:
        files.stamp(image_at(name, root=root).path or "")
    except (FileNotFoundError, NotADirectoryError, DataError, BadSample):
        return False
    return True
