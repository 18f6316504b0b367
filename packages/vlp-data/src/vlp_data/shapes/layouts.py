"""The files of a `shapes` folder in the layouts that real data has.

All paths inside the files are relative to the folder. Sources of the layouts: COCO
(cocodataset.org/#format-data), Karpathy's `dataset_coco.json`, X-VLM README (image and region lines), ALBEF
(retrieval lists).
"""

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from vlp_data.order import share
from vlp_data.shapes.figures import KINDS
from vlp_data.shapes.vocabulary import vocabulary

Record = dict[str, Any]

LINE_FILES = 8
"""At most so many files per split of X-VLM lines: the reference's reader spreads files, not lines, over ranks
and workers."""

_INFO = {
    "description": "vlp shapes: procedurally drawn scenes",
    "version": "1.0",
    "year": 2026,
    "contributor": "vlp",
}
_LICENSES = [{"id": 1, "name": "CC0 1.0", "url": "https://creativecommons.org/publicdomain/zero/1.0/"}]
_CATEGORIES = [
    {"id": number, "name": kind, "supercategory": "shape"} for number, kind in enumerate(KINDS, start=1)
]


def write_layouts(folder: Path, records: Sequence[Record], splits: Sequence[str]) -> None:
    """Write every annotation file for complete records (with "pairs") into an existing folder."""
    _lines(folder / "annotations.jsonl", records)
    write_json(folder / "dataset_karpathy.json", _karpathy(records))
    (folder / "vocab.txt").write_text("\n".join(vocabulary()) + "\n", encoding="ascii")
    (folder / "coco").mkdir()
    for split in splits:
        chosen = [record for record in records if record["split"] == split]
        write_json(folder / "coco" / f"instances_{split}.json", coco_instances(chosen))
        write_json(folder / "coco" / f"captions_{split}.json", coco_captions(chosen))
        write_json(folder / f"shapes_{split}.json", retrieval(chosen, grouped=split != "train"))
        _sharded(folder / "xvlm" / f"images_{split}", [_image_line(record) for record in chosen])
        _sharded(folder / "xvlm" / f"regions_{split}", [_region_line(record) for record in chosen])


def _coco_images(records: Sequence[Record]) -> list[Record]:
    return [
        {
            "id": record["image_id"],
            "file_name": record["image"],
            "width": record["width"],
            "height": record["height"],
            "license": 1,
            "coco_url": "",
            "flickr_url": "",
            "date_captured": "2026-01-01 00:00:00",
        }
        for record in records
    ]


def category_id(kind: str) -> int:
    """COCO category of a kind."""
    return KINDS.index(kind) + 1


def annotation_id(record: Record, number: int) -> int:
    """COCO id of an object of a scene."""
    return record["image_id"] * 100 + number


def coco_instances(records: Sequence[Record]) -> Record:
    """A COCO instances file of these scenes."""
    annotations = [
        {
            "id": annotation_id(record, k),
            "image_id": record["image_id"],
            "category_id": category_id(thing["kind"]),
            "bbox": thing["bbox"],
            "area": thing["area"],
            "segmentation": thing["segmentation"],
            "iscrowd": 0,
        }
        for record in records
        for k, thing in enumerate(record["objects"])
    ]
    images = _coco_images(records)
    return {
        "info": _INFO,
        "licenses": _LICENSES,
        "images": images,
        "annotations": annotations,
        "categories": _CATEGORIES,
    }


def _sentence_id(record: Record, number: int) -> int:
    return (record["image_id"] - 1) * len(record["captions"]) + number


def coco_captions(records: Sequence[Record]) -> Record:
    """A COCO captions file of these scenes."""
    annotations = [
        {"id": _sentence_id(record, k), "image_id": record["image_id"], "caption": caption}
        for record in records
        for k, caption in enumerate(record["captions"])
    ]
    return {"info": _INFO, "licenses": _LICENSES, "images": _coco_images(records), "annotations": annotations}


def _karpathy(records: Sequence[Record]) -> Record:
    images = []
    for record in records:
        folder, name = record["image"].rsplit("/", 1)
        sentences = [
            {
                "tokens": "".join(c for c in caption.lower() if c.isalnum() or c == " ").split(),
                "raw": caption,
                "imgid": record["index"],
                "sentid": _sentence_id(record, k),
            }
            for k, caption in enumerate(record["captions"])
        ]
        images.append(
            {
                "filepath": folder,
                "filename": name,
                "imgid": record["index"],
                "split": record["split"],
                "cocoid": record["image_id"],
                "sentids": [sentence["sentid"] for sentence in sentences],
                "sentences": sentences,
            }
        )
    return {"dataset": "shapes", "images": images}


def retrieval(records: Sequence[Record], *, grouped: bool) -> list[Record]:
    """Captions as the ALBEF family lists them, with ViCHA's concepts: one entry per image, or per caption."""
    if grouped:
        return [
            {"image": record["image"], "caption": record["captions"], "kwords": record["concepts"]}
            for record in records
        ]
    return [
        {
            "image": record["image"],
            "caption": caption,
            "image_id": record["image_id"],
            "kwords": record["concepts"],
        }
        for record in records
        for caption in record["captions"]
    ]


def _image_line(record: Record) -> Record:
    return {"caption": record["captions"], "image_rpath": record["image"], "kwords": record["concepts"]}


def _region_line(record: Record) -> Record:
    elems = []
    for thing in record["objects"]:
        words = [
            thing[name] for name in ("size", "texture", "color") if thing[name] not in ("medium", "plain")
        ]
        elems.append({"caption": thing["kind"], "attributes": " ".join(words), "bb": thing["bbox"]})
    elems += [{"caption": phrase["text"], "bb": phrase["bbox"]} for phrase in record["phrases"]]
    return {
        "elems": elems,
        "caption": record["captions"],
        "image_rpath": record["image"],
        "kwords": record["concepts"],
    }


def _sharded(folder: Path, records: Sequence[Record]) -> None:
    folder.mkdir(parents=True)
    files = min(LINE_FILES, len(records))
    for k in range(files):
        _lines(
            folder / f"part-{k:03d}.jsonl",
            [records[n] for n in share(len(records), k, files)],
        )


def write_json(path: Path, content: Any) -> None:
    """One line of ASCII JSON."""
    path.write_text(json.dumps(content, ensure_ascii=True) + "\n", encoding="ascii")


def _lines(path: Path, records: Iterable[Record]) -> None:
    with path.open("w", encoding="ascii", newline="\n") as stream:
        stream.writelines(json.dumps(record, ensure_ascii=True) + "\n" for record in records)
