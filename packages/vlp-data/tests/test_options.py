"""Options: checks, roots, and what importing them costs."""

import subprocess
import sys

import pytest
from vlp_data.options import (
    CocoCaptions,
    CocoInstances,
    ImageOptions,
    ImageTextLines,
    Karpathy,
    MaskingOptions,
    RegionLines,
    RegionOptions,
    TaskJson,
    TextOptions,
    rooted,
)


def test_options_and_sources_import_no_torch():
    program = (
        "import sys, vlp_data.options, vlp_data.sources.coco, vlp_data.sources.lines, vlp_data.sources.task_json\n"
        "print(sorted({'torch', 'cv2', 'PIL', 'tokenizers', 'fsspec'} & set(sys.modules)))"
    )
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ImageOptions(size=0), "size=0 must be positive"),
        (lambda: ImageOptions(flip=1.5), r"flip=1.5 must lie in 0\.\.1"),
        (lambda: TextOptions(max_tokens=1), "max_tokens=1 leaves no room"),
        (lambda: TextOptions(max_tokens=2, separator=True), "max_tokens=2 leaves no room"),
        (lambda: MaskingOptions(max_masks=0), "max_masks=0 must be positive"),
        (lambda: MaskingOptions(probability=-0.1), "probability=-0.1 must lie"),
        (lambda: RegionOptions(min_visible=2), "min_visible=2 must lie"),
    ],
)
def test_impossible_values_are_named(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_rooted_puts_relative_paths_below_a_root():
    lines = rooted(RegionLines(files=("a", "b,c", "s3://bucket/d", "/e"), index="offsets"), "/data")
    assert lines.files == ("/data/a", "/data/b", "/data/c", "s3://bucket/d", "/e")
    assert (lines.root, lines.index) == ("/data", "/data/offsets")
    assert rooted(ImageTextLines(files=("a",), root="pictures"), "s3://b").root == "s3://b/pictures"
    coco = rooted(CocoInstances(annotations="i.json", images="p"), "/data")
    assert (coco.annotations, coco.images, coco.captions) == ("/data/i.json", "/data/p", "")
    assert rooted(CocoCaptions(annotations="i.json", images="p"), "").images == "p"
    assert rooted(TaskJson(files=("a",), dataset_roots={"vg": "vg"}), "/data").dataset_roots == {
        "vg": "/data/vg"
    }
    assert rooted(Karpathy(annotations="k.json", images="p", split="val"), "/data").images == "/data/p"
