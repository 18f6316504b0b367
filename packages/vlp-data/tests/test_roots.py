"""Source options below a root."""

from vlp_data.options import CocoCaptions, CocoInstances, ImageTextLines, Karpathy, RegionLines, TaskJson
from vlp_data.roots import rooted


def test_relative_paths_start_at_the_root():
    lines = rooted(RegionLines(files=("a", "b,c", "s3://bucket/d", "/e"), index="offsets"), "/data")
    assert lines.files == ("/data/a", "/data/b", "/data/c", "s3://bucket/d", "/e")
    assert (lines.root, lines.index) == ("/data", "/data/offsets")
    assert rooted(ImageTextLines(files=("a",), root="images"), "s3://b").root == "s3://b/images"
    assert rooted(ImageTextLines(files=("a",)), "/data").index == ""
    coco = rooted(CocoInstances(annotations="i.json", images="p"), "/data")
    assert (coco.annotations, coco.images, coco.captions) == ("/data/i.json", "/data/p", "")
    assert rooted(CocoCaptions(annotations="i.json", images=""), "/data").images == "/data"
    assert rooted(TaskJson(files=("a",), dataset_roots={"vg": "vg"}), "/data").dataset_roots == {
        "vg": "/data/vg"
    }
    assert rooted(Karpathy(annotations="k.json", images="p", split="val"), "/data").images == "/data/p"


def test_an_empty_root_changes_nothing():
    options = RegionLines(files=("a",), root="images")
    assert rooted(options, "") == options
