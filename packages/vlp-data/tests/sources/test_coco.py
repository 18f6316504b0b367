"""COCO and Karpathy files."""

import json
import logging
import pickle
from pathlib import Path

import pytest
from vlp_data.errors import DataError
from vlp_data.images import open_image
from vlp_data.options import CocoCaptions, CocoInstances, Karpathy

IMAGES = [
    {"id": 1, "file_name": "1.jpg", "width": 60, "height": 40, "license": 4},
    {"id": 2, "file_name": "2.jpg", "width": 60, "height": 40},
    {"id": 3, "file_name": "3.jpg", "width": 60, "height": 40},
]
LICENCES = [{"id": 4, "name": "CC BY 2.0"}]


@pytest.fixture
def captions(tmp_path):
    annotations = [
        {"id": 10, "image_id": 1, "caption": "A dog."},
        {"id": 11, "image_id": 1, "caption": "One dog"},
        {"id": 12, "image_id": 3, "caption": "A cat"},
        {"id": 13, "image_id": 99, "caption": "Lost"},
    ]
    file = tmp_path / "captions_val.json"
    file.write_text(json.dumps({"images": IMAGES, "annotations": annotations, "licenses": LICENCES}))
    return str(file)


@pytest.fixture
def instances(tmp_path):
    common = {"category_id": 7, "iscrowd": 0, "area": 1.0, "segmentation": [[0, 0, 1, 0, 1, 1]]}
    annotations = [
        {**common, "id": 20, "image_id": 1, "bbox": [1.5, 2, 10, 20]},
        {**common, "id": 21, "image_id": 1, "bbox": [40, 2, 20.01, 20]},
        {**common, "id": 22, "image_id": 1, "bbox": [1, 2, 0, 20]},
        {**common, "id": 23, "image_id": 2, "bbox": [1, 2, 3, 4], "iscrowd": 1},
        {**common, "id": 24, "image_id": 99, "bbox": [1, 2, 3, 4]},
    ]
    file = tmp_path / "instances_val.json"
    content = {"images": IMAGES, "annotations": annotations, "categories": [{"id": 7, "name": "dog"}]}
    file.write_text(json.dumps(content))
    return str(file)


def test_captions_by_image(captions):
    source = CocoCaptions(annotations=captions, images="/p").open()
    assert [source[n].key for n in range(len(source))] == ["captions_val/1", "captions_val/3"]
    sample = source[0]
    assert [(t.text, t.role, t.id) for t in sample.texts] == [
        ("A dog.", "caption", 10),
        ("One dog", "caption", 11),
    ]
    assert (sample.images[0].path, sample.images[0].id, sample.images[0].size) == ("/p/1.jpg", 1, (60, 40))
    assert sample.meta["licence"] == "CC BY 2.0"
    assert source.describe()["notes"] == {"captions of unknown images": 1, "images without captions": 1}
    assert pickle.loads(pickle.dumps(source))[1] == source[1]


def test_instances_with_captions(instances, captions):
    source = CocoInstances(annotations=instances, images="/p", captions=captions).open()
    assert len(source) == 1
    sample = source[0]
    assert [(t.text, t.role) for t in sample.texts] == [
        ("A dog.", "caption"),
        ("One dog", "caption"),
        ("dog", "class_name"),
        ("dog", "class_name"),
    ]
    first, second = sample.regions
    assert (first.box, first.texts, first.category, first.id) == ((1.5, 2, 11.5, 22), (2,), 7, 20)
    assert second.box == (40, 2, 60, 22) and second.texts == (3,)
    assert source.describe()["notes"] == {
        "boxes clipped by less than a pixel": 1,
        "boxes without area": 1,
        "crowds": 1,
        "boxes of unknown images": 1,
        "captions of unknown images": 1,
        "images without regions": 2,
    }


def test_crowds_on_request(instances):
    source = CocoInstances(annotations=instances, images="/p", crowd=True).open()
    assert [source[n].regions[-1].crowd for n in range(len(source))] == [False, True]


@pytest.fixture
def karpathy(tmp_path):
    images = [
        {
            "filepath": "val2014" if split != "train" else "train2014",
            "filename": f"{n}.jpg",
            "cocoid": n,
            "split": split,
            "sentences": [{"raw": f"Text {n}.", "sentid": n}],
        }
        for n, split in enumerate(["train", "restval", "val", "test", "train"])
    ]
    file = tmp_path / "dataset.json"
    file.write_text(json.dumps({"dataset": "coco", "images": images}))
    return str(file)


def test_karpathy_train_includes_restval(karpathy):
    def keys(**options):
        source = Karpathy(annotations=karpathy, images="/p", **options).open()
        return [source[n].key for n in range(len(source))]

    assert keys(split="train") == ["coco/train/0", "coco/restval/1", "coco/train/4"]
    assert keys(split="train", restval=False) == ["coco/train/0", "coco/train/4"]
    assert keys(split="test") == ["coco/test/3"]
    sample = Karpathy(annotations=karpathy, images="/p", split="restval").open()[0]
    assert sample.images[0].path == "/p/val2014/1.jpg"
    assert [(t.text, t.id) for t in sample.texts] == [("Text 1.", 1)]


def test_faults_name_file_and_field(tmp_path, captions, instances):
    def broken(change, file):
        content = json.loads(Path(file).read_text())
        change(content)
        (tmp_path / "broken.json").write_text(json.dumps(content))
        return str(tmp_path / "broken.json")

    with pytest.raises(DataError, match=r"broken\.json: field `images` is missing"):
        CocoCaptions(annotations=broken(lambda c: c.pop("images"), captions), images="").open()
    with pytest.raises(DataError, match=r"annotations\.0: field `caption` is missing"):
        CocoCaptions(annotations=instances, images="").open()
    with pytest.raises(DataError, match=r"images\.1: the id 1 occurs twice"):
        CocoCaptions(annotations=broken(lambda c: c["images"][1].update(id=1), captions), images="").open()
    with pytest.raises(DataError, match=r"annotations\.2: category 8 is not in `categories`"):
        CocoInstances(
            annotations=broken(lambda c: c["annotations"][2].update(category_id=8), instances), images=""
        ).open()
    with pytest.raises(DataError, match="no image with captions"):
        CocoCaptions(annotations=broken(lambda c: c["annotations"].clear(), captions), images="").open()
    with pytest.raises(FileNotFoundError, match=r"gone\.json not found"):
        CocoCaptions(annotations=str(tmp_path / "gone.json"), images="").open()


def test_real_files_agree_with_each_other(shared_data):
    folder = shared_data / "coco-mini"
    annotations = folder / "annotations"
    captions = CocoCaptions(
        annotations=str(annotations / "captions.json"), images=str(folder / "images")
    ).open()
    by_image = {captions[n].images[0].id: [t.text for t in captions[n].texts] for n in range(len(captions))}
    assert sum(map(len, by_image.values())) == len(
        json.loads((annotations / "captions.json").read_text())["annotations"]
    )
    karpathy = {}
    for split in ("train", "val", "test"):
        source = Karpathy(
            annotations=str(annotations / "dataset_karpathy_style.json"), images=str(folder), split=split
        ).open()
        for number in range(len(source)):
            karpathy[source[number].images[0].id] = sorted(t.text for t in source[number].texts)
    assert karpathy == {key: sorted(texts) for key, texts in by_image.items()}

    instances = CocoInstances(
        annotations=str(annotations / "instances.json"), images=str(folder / "images")
    ).open()
    raw = json.loads((annotations / "instances.json").read_text())["annotations"]
    assert sum(len(instances[n].regions) for n in range(len(instances))) == sum(not a["iscrowd"] for a in raw)
    for number in range(len(instances)):
        sample = instances[number]
        image = open_image(sample.images[0])
        assert image.size == sample.images[0].size
        assert all(r.box[2] <= image.width and r.box[3] <= image.height for r in sample.regions)


BASE = {
    "licenses": [{"id": 1, "name": "cc"}],
    "images": [{"id": n, "file_name": f"{n}.jpg", "width": 60, "height": 40} for n in (1, 2)],
    "categories": [{"id": 1, "name": "dog"}],
    "annotations": [{"id": n, "image_id": n, "category_id": 1, "bbox": [1, 1, 9, 9]} for n in (1, 2)],
}


@pytest.fixture
def changed(tmp_path):
    def opened(**change):
        (tmp_path / "i.json").write_text(json.dumps({**BASE, **change}))
        return CocoInstances(annotations=str(tmp_path / "i.json"), images="").open()

    return opened


@pytest.mark.parametrize("licences", [None, "cc", [None], [{"name": "cc"}], [{"id": [1]}]])
def test_licences_are_not_needed(changed, licences):
    assert len(changed(licenses=licences)) == 2


@pytest.mark.parametrize(
    ("width", "height", "size"),
    [(None, None, None), ("60", "40", (60, 40)), (60.0, 40, (60, 40)), (0, 40, None), ("wide", 1, None)],
)
def test_sizes_that_are_no_sizes_count_as_none(changed, width, height, size):
    image = {"id": 1, "file_name": "1.jpg", "width": width, "height": height}
    source = changed(images=[image, BASE["images"][1]])
    assert source[0].images[0].size == size
    assert source.describe()["notes"].get("images whose size is no size", 0) == (size is None)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"categories": [{"id": 1, "supercategory": "x"}]},
            r"i\.json: categories\.0: field `name` is missing",
        ),
        (
            {"categories": [{"id": 1, "name": None}]},
            r"i\.json: categories\.0: `name` must be str, found None",
        ),
        (
            {"categories": [{"id": 1, "name": "dog"}, {"id": 1, "name": "cat"}]},
            r"categories\.1: the id 1 is that of 'dog' and of 'cat'",
        ),
        ({"images": ["1.jpg"]}, r"i\.json: images\.0 must be an object, found str"),
        ({"annotations": [3]}, r"annotations\.0 must be an object, found int"),
        (
            {"annotations": [{**BASE["annotations"][0], "bbox": ["1", "1", "9", "9"]}]},
            r"annotations\.0: `bbox` must be \[x, y, w, h\], found \['1', ",
        ),
    ],
)
def test_faults_of_instances_name_file_and_entry(changed, change, message):
    with pytest.raises(DataError, match=message):
        changed(**change)


@pytest.mark.parametrize(
    ("box", "cause"),
    [
        ([float("nan"), 1, 5, 5], "boxes that are no numbers"),
        ([1, 1, float("inf"), 5], "boxes that are no numbers"),
        ([1, 1, 10**30, 5], "boxes that are no numbers"),
        ([1, 1, 0, 5], "boxes without area"),
        ([60, 1, 5, 5], "boxes outside the image"),
        ([-9, 1, 5, 5], "boxes outside the image"),
    ],
)
def test_boxes_that_cannot_be_used_are_counted_and_named(changed, box, cause, caplog):
    bad = {**BASE["annotations"][1], "bbox": box}
    with caplog.at_level(logging.WARNING, logger="vlp_data.sources.rows"):
        described = changed(annotations=[BASE["annotations"][0], bad]).describe()
    assert described["notes"] == {cause: 1, "images without regions": 1}
    assert described["places"] == {cause: ["annotations.1"]}
    assert f"{cause}: 1 (annotations.1)" in caplog.text
    with pytest.raises(DataError, match=rf"i\.json: no image with regions \(1 {cause}, 2 images without"):
        changed(annotations=[bad])


def test_a_file_of_fractions_is_refused(changed):
    boxes = [[0.1, 0.1, 0.5, 0.4], [0, 0, 1, 1]]
    annotations = [{**BASE["annotations"][n], "bbox": boxes[n]} for n in (0, 1)]
    with pytest.raises(DataError, match=r"all 2 boxes lie in 0\.\.1: they are shares of the image"):
        changed(annotations=annotations)
    assert len(changed(annotations=[{**BASE["annotations"][0], "bbox": [0, 0, 1, 1]}])) == 1


def test_ids_of_two_types_are_joined_and_counted(changed, tmp_path):
    annotations = [{**BASE["annotations"][0], "image_id": "1"}, {**BASE["annotations"][1], "image_id": "9"}]
    source = changed(annotations=annotations)
    assert [source[n].images[0].id for n in range(len(source))] == [1]
    assert source.describe()["notes"] == {
        "ids of another type than that of their image or category": 1,
        "boxes of unknown images": 1,
        "images without regions": 1,
    }
    both = [*BASE["images"], {"id": "1", "file_name": "other.jpg"}]
    source = changed(images=both, annotations=annotations[:1])
    assert source[0].images[0].path == "other.jpg"
    captions = {**BASE, "annotations": [{"image_id": "2", "caption": "a dog"}]}
    (tmp_path / "c.json").write_text(json.dumps(captions))
    source = CocoCaptions(annotations=str(tmp_path / "c.json"), images="").open()
    assert (source[0].images[0].id, source[0].texts[0].text) == (2, "a dog")


@pytest.mark.parametrize("mask", [5, [[1, "2"]], {"size": [0, 1], "counts": "x"}, {"counts": "x"}, "x"])
def test_masks_that_are_none_are_counted(changed, mask):
    source = changed(annotations=[{**BASE["annotations"][0], "segmentation": mask}])
    assert source[0].regions[0].mask is None
    assert source.describe()["notes"]["masks that are neither polygons nor RLE"] == 1


def test_karpathy_without_a_folder(tmp_path):
    entry = {"filename": "a.jpg", "split": "train", "sentences": [{"raw": "a"}]}
    for folder in ({"filepath": None}, {}, {"filepath": ""}):
        (tmp_path / "k.json").write_text(json.dumps({"images": [{**folder, **entry}]}))
        source = Karpathy(annotations=str(tmp_path / "k.json"), images="", split="train").open()
        assert source[0].images[0].path == "a.jpg"
