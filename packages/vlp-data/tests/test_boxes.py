"""Boxes and images of another size than stated."""

import io
import json
import math

import numpy as np
import pytest
from PIL import Image as Pillow
from vlp_data.boxes import fault, fitted, scales
from vlp_data.cli import main
from vlp_data.errors import BadSample
from vlp_data.examples import BoxExamples, RegionExamples
from vlp_data.images import open_image
from vlp_data.loader import Loader
from vlp_data.options import CocoInstances, Refer, RegionLines, RegionOptions, Squash
from vlp_data.schema import Image, Region, Sample


def sample(size, box=(30, 20, 60, 40)):
    return Sample(
        key="k",
        images=(Image(path="a.jpg", size=size),),
        regions=(Region(box=box, area=600, mask=[[30, 20, 60, 20, 60, 40]]),),
    )


def test_boxes_follow_a_scaled_copy():
    half = fitted(sample((120, 80)), Pillow.new("RGB", (60, 40)))
    assert half.regions[0].box == (15, 10, 30, 20)
    assert (half.regions[0].area, half.regions[0].mask) == (150, [[15, 10, 30, 10, 30, 20]])
    assert fitted(sample((640, 427)), Pillow.new("RGB", (320, 214))).regions[0].box[2] == 30
    rle = {"size": [80, 120], "counts": "x"}
    kept = Sample(key="k", images=half.images, regions=(Region(box=(0, 0, 9, 9), mask=rle),))
    assert fitted(kept, Pillow.new("RGB", (60, 40))).regions[0].mask == rle


@pytest.mark.parametrize("size", [(60, 40), None])
def test_boxes_of_the_image_itself_stay_as_they_are(size):
    given = sample(size)
    assert fitted(given, Pillow.new("RGB", (60, 40))) is given


@pytest.mark.parametrize(
    ("size", "message"),
    [
        ((40, 60), r"an image of 40 x 60 pixels, a.jpg has 60 x 40 \(turned, perhaps by EXIF\)"),
        ((100, 40), "an image of 100 x 40 pixels, a.jpg has 60 x 40"),
        ((60, 30), "60 x 30"),
    ],
)
def test_another_picture_is_refused(size, message):
    with pytest.raises(BadSample, match=message) as error:
        fitted(sample(size), Pillow.new("RGB", (60, 40)))
    assert error.value.cause == "image of another size"
    assert scales(size, (60, 40)) is None


@pytest.mark.parametrize(
    ("box", "cause"),
    [
        ((0, 0, 60, 40), ""),
        ((-5, -5, 1, 1), ""),
        ((0, 0, 1, 1), ""),
        ((0.1, 0.1, 0.6, 0.5), "box in fractions of the image"),
        ((60, 0, 70, 9), "box outside the image"),
        ((-9, 0, 0, 9), "box outside the image"),
        ((5, 5, 5, 9), "box without area"),
        ((9, 5, 5, 9), "box without area"),
        ((math.nan, 5, 9, 9), "box that is no number"),
        ((1, 5, math.inf, 9), "box that is no number"),
    ],
)
def test_why_a_box_cannot_be_used(box, cause):
    assert fault(box, 60, 40) == cause


@pytest.fixture
def turned(tmp_path):
    """A JPEG of 60 x 40 that EXIF shows as 40 x 60, its COCO file for either size, and REFER's files."""
    exif = Pillow.Exif()
    exif[0x0112] = 6
    stream = io.BytesIO()
    noise = np.random.default_rng(0).integers(0, 255, (40, 60, 3), dtype=np.uint8)
    Pillow.fromarray(noise).save(stream, "JPEG", exif=exif)
    (tmp_path / "a.jpg").write_bytes(stream.getvalue())

    def write(width, height, box=(1, 2, 20, 30)):
        content = {
            "images": [{"id": 1, "file_name": "a.jpg", "width": width, "height": height}],
            "categories": [{"id": 1, "name": "dog"}],
            "annotations": [{"id": 1, "image_id": 1, "category_id": 1, "bbox": list(box)}],
        }
        (tmp_path / "i.json").write_text(json.dumps(content))
        refs = [{"ref_id": 1, "ann_id": 1, "image_id": 1, "split": "val"}]
        (tmp_path / "r.json").write_text(json.dumps(refs))
        (tmp_path / "l.json").write_text(json.dumps([{"image": "a.jpg", "text": "a dog", "ref_id": 1}]))
        line = {"elems": [{"caption": "a dog", "bb": list(box)}], "image_rpath": "a.jpg"}
        (tmp_path / "l.jsonl").write_text(json.dumps({**line, "width": width, "height": height}) + "\n")

    return tmp_path, write


def readers(folder, tokenizer):
    """Every reader whose rows have boxes, with the examples that use them."""
    view, root = Squash(size=32, augment=False, crop="none", flip=0.0), str(folder)
    common = {"tokenizer": tokenizer, "image": view}
    regions = {**common, "batch_texts": 1, "patch_size": 16}
    coco = CocoInstances(annotations=f"{root}/i.json", images=root).open()
    lines = RegionLines(files=(f"{root}/l.jsonl",), root=root).open()
    refer = Refer(
        files=(f"{root}/l.json",), refs=f"{root}/r.json", instances=f"{root}/i.json", root=root
    ).open()
    for crop in ("none", "around_box"):
        yield RegionExamples(source=coco, **regions, regions=RegionOptions(crop=crop))
        yield RegionExamples(source=lines, **regions, regions=RegionOptions(crop=crop))
    yield BoxExamples(source=refer, **common)


def test_an_annotation_of_the_turned_image_is_refused_by_every_reader(turned, tokenizer, capsys):
    folder, write = turned
    write(40, 60)
    for examples in readers(folder, tokenizer):
        loader = Loader(examples, global_batch=1, seed=0, max_bad_fraction=1.0)
        with pytest.raises(Exception, match="image of another size"):
            next(loader)
        assert set(loader.counts) == {"image of another size"}
    assert main(["inspect", str(folder / "i.json"), "--root", str(folder)]) == 1
    out = capsys.readouterr().out
    assert "image of another size: 1 (i/1)" in out
    assert "images that EXIF would turn, used as stored: 1" in out


def test_an_annotation_of_the_stored_image_is_right_whatever_exif_says(turned, tokenizer, capsys):
    folder, write = turned
    write(60, 40, (6, 4, 30, 20))
    for examples in readers(folder, tokenizer):
        with Loader(examples, global_batch=1, seed=0) as loader:
            for _ in range(4):
                next(loader)
            assert not loader.bad
    assert main(["inspect", str(folder / "i.json"), "--root", str(folder)]) == 0
    assert open_image(Image(path=str(folder / "a.jpg"))).size == (60, 40)


def test_boxes_of_a_larger_copy_are_scaled_by_every_reader(turned, tokenizer, capsys):
    folder, write = turned
    write(120, 80, (12, 8, 60, 40))
    for examples in readers(folder, tokenizer):
        with Loader(examples, global_batch=1, seed=0) as loader:
            batch = next(loader)
        if getattr(examples, "regions", None) is None or examples.regions.crop == "none":
            x, y, w, h = batch.target_boxes[0].tolist()
            assert (w, h) == pytest.approx((0.5, 0.5)) and y == pytest.approx(0.35)
            assert x in (pytest.approx(0.35), pytest.approx(0.65))
    assert main(["inspect", str(folder / "i.json"), "--root", str(folder)]) == 0
    assert "another scale than stated, boxes are scaled: 1" in capsys.readouterr().out
