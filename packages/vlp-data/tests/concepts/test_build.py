"""Caption lists from raw layouts."""

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from vlp_data.concepts import build
from vlp_data.concepts.tables import to_rows
from vlp_data.errors import DataError


def written(path: Path, content: object) -> str:
    path.write_text(json.dumps(content))
    return str(path)


def karpathy_file(folder: Path, **more: object) -> str:
    def image(number: int, split: str, *captions: str) -> dict:
        name = f"COCO_{number}.jpg"
        sentences = [{"raw": text, "sentid": n} for n, text in enumerate(captions)]
        return {"filename": name, "split": split, "sentences": sentences, "imgid": number, **more}

    images = [
        image(1, "train", "a dog", "one dog"),
        image(2, "test", "a cat"),
        image(3, "restval", "a bird"),
        image(4, "val", "a fish"),
    ]
    return written(folder / "dataset.json", {"images": images, "dataset": "coco"})


def test_coco_has_a_row_per_sentence_of_the_splits(tmp_path: Path) -> None:
    file = karpathy_file(tmp_path, filepath="train2014", cocoid=77)
    rows = to_rows(build.karpathy(file).rows)
    assert rows[:2] == [
        {"image": "train2014/COCO_1.jpg", "caption": "a dog", "image_id": 77},
        {"image": "train2014/COCO_1.jpg", "caption": "one dog", "image_id": 77},
    ]
    assert [row["caption"] for row in rows] == ["a dog", "one dog", "a fish"]
    found = build.karpathy(file, splits=("restval", "test"))
    assert [row["caption"] for row in to_rows(found.rows)] == ["a bird", "a cat"]


def test_flickr_takes_its_folder_and_leaves_out_what_is_not_there(tmp_path: Path) -> None:
    file = karpathy_file(tmp_path)
    (tmp_path / "flickr30k-images").mkdir()
    (tmp_path / "flickr30k-images" / "COCO_1.jpg").touch()
    found = build.karpathy(file, folder="flickr30k-images", root=str(tmp_path))
    assert [(row["image"], row["image_id"]) for row in to_rows(found.rows)] == [
        ("flickr30k-images/COCO_1.jpg", 1)
    ] * 2
    assert found.left_out == {"rows whose image is not there": 1}
    with pytest.raises(DataError, match="no captions are left"):
        build.karpathy(file, root=str(tmp_path / "elsewhere"))


def test_visual_genome_has_a_row_per_phrase(tmp_path: Path) -> None:
    regions = [{"phrase": "a red car", "x": -5}, {"phrase": " "}, {"phrase": "sky"}]
    file = written(tmp_path / "regions.json", [{"id": 12, "regions": regions}])
    found = build.visual_genome(file)
    assert to_rows(found.rows) == [
        {"image": "image/12.jpg", "caption": "a red car", "image_id": 12},
        {"image": "image/12.jpg", "caption": "sky", "image_id": 12},
    ]
    assert found.left_out == {"blank captions": 1}
    data = written(tmp_path / "data.json", [{"image_id": 12, "url": "https://x.org/vg/VG_100K_2/12.jpg"}])
    found = build.visual_genome(file, image_data=data, image_name="images/{folder}/{id}.jpg")
    assert to_rows(found.rows)[0]["image"] == "images/VG_100K_2/12.jpg"
    with pytest.raises(DataError, match="give image_data"):
        build.visual_genome(file, image_name="{folder}/{id}.jpg")
    other = written(tmp_path / "other.json", [{"image_id": 1, "url": "https://x.org/VG_100K/1.jpg"}])
    with pytest.raises(DataError, match="image 12 is not in"):
        build.visual_genome(file, image_data=other, image_name="{folder}/{id}.jpg")


def test_sbu_moves_its_folder(tmp_path: Path) -> None:
    file = written(tmp_path / "annot.json", [["images/0/my_images.jpg", "a dog"], ["images/1/b.jpg", ""]])
    found = build.sbu(file)
    assert to_rows(found.rows) == [{"image": "images_train/0/my_images.jpg", "caption": "a dog"}]
    assert found.left_out == {"blank captions": 1}
    assert to_rows(build.sbu(file, images="").rows)[0]["image"] == "images/0/my_images.jpg"
    with pytest.raises(DataError, match=r"entry 0 must be \[path, caption\]"):
        build.sbu(written(tmp_path / "bad.json", [{"image": "x"}]))


def test_cc3m_lists_what_arrived(tmp_path: Path) -> None:
    for shard, status in (("00000", "success"), ("00001", "failed_to_download")):
        rows = {
            "key": [f"{shard}0007", f"{shard}0008"],
            "caption": ["a dog", None],
            "status": [status, "success"],
        }
        pq.write_table(pa.table(rows), tmp_path / f"{shard}.parquet")
    found = build.cc3m(str(tmp_path), folder="cc3m/train")
    assert to_rows(found.rows) == [{"image": "cc3m/train/00000/000000007.jpg", "caption": "a dog"}]
    assert found.left_out == {"images that did not arrive": 1, "blank captions": 2}
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "x.txt").touch()
    with pytest.raises(DataError, match=r"no NUMBER\.parquet of img2dataset"):
        build.cc3m(str(tmp_path / "other"))
