"""Options below a root: the types of their fields say what is a path."""

from dataclasses import dataclass, field

from vlp_data.options import CocoCaptions, CocoInstances, ImageTextLines, Karpathy, RegionLines, TaskJson
from vlp_data.roots import FolderText, PathText, rooted


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


@dataclass(frozen=True)
class Part:
    file: PathText = "p"
    word: str = "w"


@dataclass(frozen=True)
class Everything:
    name: str = "n"
    path: PathText = "a"
    none: PathText = ""
    folder: FolderText = ""
    pair: tuple[PathText, FolderText] = ("a", "")
    words: tuple[str, ...] = ("a",)
    files: dict[str, PathText] = field(default_factory=lambda: {"x": "a", "y": ""})
    folders: dict[str, FolderText] = field(default_factory=lambda: {"x": "a", "y": ""})
    perhaps: PathText | None = None
    one_or_many: PathText | tuple[PathText, ...] | None = ("a", "b, c")
    part: Part | None = Part()
    parts: tuple[Part, ...] = (Part("a"), Part("/b"))
    count: int = 3


def test_types_say_what_is_a_path():
    assert rooted(Everything(), "/r") == Everything(
        path="/r/a",
        folder="/r",
        pair=("/r/a", "/r"),
        files={"x": "/r/a", "y": ""},
        folders={"x": "/r/a", "y": "/r"},
        one_or_many=("/r/a", "/r/b", "/r/c"),
        part=Part("/r/p"),
        parts=(Part("/r/a"), Part("/b")),
    )
    assert rooted(Everything(perhaps="a", one_or_many="b", part=None), "/r").perhaps == "/r/a"
    assert rooted(Everything(one_or_many="b"), "/r").one_or_many == "/r/b"
