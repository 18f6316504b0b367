"""X-VLM line files: random access, streaming, splitting, and their faults."""

import hashlib
import json
import pickle

import fsspec
import numpy as np
import pytest
from vlp_data.errors import BadSample, DataError
from vlp_data.images import open_image
from vlp_data.options import ImageTextLines, RegionLines
from vlp_data.sources import lines as line_files
from vlp_data.sources.lines import line_offsets, open_line_files, shard_files, stream_lines


@pytest.fixture
def memory():
    filesystem = fsspec.filesystem("memory")
    filesystem.store.clear()
    yield filesystem
    filesystem.store.clear()


@pytest.mark.golden("xvlm", lambda case: case.has("sharding.json"))
def test_sharding(case):
    for row in case.json("sharding"):
        paths = [str(number) for number in range(row["n"])]
        for part, expected in enumerate(row["slices"]):
            wanted = [str(number) for number in expected]
            assert shard_files(paths, part, row["shards"]) == wanted
            assert shard_files(paths, 0, 1, part, row["shards"]) == wanted


def test_ranks_and_workers_split_files_without_rest_or_repeat():
    paths = [str(n) for n in range(29)]
    parts = [shard_files(paths, rank, 3, worker, 4) for rank in range(3) for worker in range(4)]
    assert sorted(path for part in parts for path in part) == sorted(paths)


def test_one_file_is_read_by_every_rank():
    assert [shard_files(["a"], rank, 4) for rank in range(4)] == [["a"]] * 4


def test_too_few_files_are_refused():
    with pytest.raises(ValueError, match="3 files cannot be split over 4 ranks"):
        shard_files(["a", "b", "c"], 0, 4)
    with pytest.raises(ValueError, match="1 files cannot be split over 2 workers"):
        shard_files(["a", "b"], 0, 2, 1, 2)
    with pytest.raises(ValueError, match="4 is not one of 2 ranks"):
        shard_files(["a", "b"], 4, 2)


@pytest.mark.parametrize("buffer", [0, 3])
def test_streaming_reads_every_line_once_whatever_the_split(image_lines, buffer):
    folder = str(image_lines / "lines")
    orders = []
    for epoch in range(6):
        parts = [
            list(stream_lines([folder], rank=r, world=3, seed=7, epoch=epoch, buffer=buffer))
            for r in range(3)
        ]
        orders.append([line for part in parts for line in part])
        assert len(orders[-1]) == 24
        assert len({line[:2] for line in orders[-1]}) == 24
    assert len({tuple(order) for order in orders}) > 1
    again = list(stream_lines([folder], rank=1, world=3, seed=7, epoch=1, buffer=buffer))
    assert again == orders[1][8:16]
    if not buffer:
        numbers = [number for _, number, _ in again]
        assert numbers == sorted(numbers)


def test_offsets_of_lines(tmp_path, monkeypatch):
    monkeypatch.setattr(line_files, "_CHUNK_BYTES", 4)
    for content, expected in (
        (b"", [0]),
        (b"ab", [0, 2]),
        (b"ab\n\ncdefgh\n", [0, 3, 4, 11]),
        (b"\n\n", [0, 1, 2]),
    ):
        (tmp_path / "a").write_bytes(content)
        assert line_offsets(str(tmp_path / "a")).tolist() == expected


def test_offsets_are_kept_until_the_file_changes(tmp_path, monkeypatch):
    file, index = tmp_path / "a", str(tmp_path / "index")
    file.write_bytes(b"1\n2\n")
    assert line_offsets(str(file), index).tolist() == [0, 2, 4]
    with monkeypatch.context() as patch:
        patch.setattr(line_files.files, "open_read", None)  # a second scan would fail
        assert line_offsets(str(file), index).tolist() == [0, 2, 4]
    file.write_bytes(b"1\n2\n3\n")
    assert line_offsets(str(file), index).tolist() == [0, 2, 4, 6]


def test_compressed_files_cannot_be_indexed(tmp_path):
    (tmp_path / "a.gz").write_bytes(b"x")
    with pytest.raises(DataError, match=r"a\.gz is compressed.*decompress it"):
        open_line_files((str(tmp_path / "a.gz"),))


def test_files_without_a_line_are_refused(tmp_path):
    (tmp_path / "a").write_bytes(b"")
    with pytest.raises(DataError, match="no line in"):
        open_line_files((str(tmp_path),))


def test_rows_of_image_text_lines(image_lines):
    source = ImageTextLines(files=(str(image_lines / "lines"),), root=str(image_lines)).open()
    assert len(source) == 24
    sample = source[9]
    assert sample.key == f"{image_lines / 'lines' / 'part-1'}:2"
    assert [(t.text, t.role, t.listed) for t in sample.texts] == [
        ("a dog", "caption", True),
        ("a cat on the grass 9", "caption", True),
    ]
    assert sample.images[0].path == str(image_lines / "pictures" / "09.jpg") and sample.images[0].id == "09"
    assert open_image(sample.images[0]).size == (60, 40)
    assert pickle.loads(pickle.dumps(source))[9] == sample
    assert source.describe() == {"format": "xvlm_images", "files": 3, "lines": 24}
    with pytest.raises(IndexError):
        source[24]


def test_remote_lines_with_remote_pictures(memory, encoded):
    memory.pipe("/set/pictures/1.jpg", encoded(1))
    memory.pipe("/set/lines/a", json.dumps({"desc": "a dog", "image_rpath": "pictures/1.jpg"}).encode())
    sample = ImageTextLines(files=("memory://set/lines",), root="memory://set").open()[0]
    assert sample.texts[0].text == "a dog" and not sample.texts[0].listed
    assert open_image(sample.images[0]).size == (60, 40)


def test_other_field_names(tmp_path, encoded):
    line = {"words": "a dog", "img": "x.jpg", "binary": "nonsense"}
    (tmp_path / "a").write_text(json.dumps(line))
    source = ImageTextLines(files=(str(tmp_path / "a"),), image_key="img", caption_keys=("words",)).open()
    assert (source[0].images[0].path, source[0].texts[0].text) == ("x.jpg", "a dog")


def test_rows_of_region_lines(tmp_path, region_line):
    (tmp_path / "a").write_text(
        region_line(
            elems=[
                {"caption": ["a dog", "dog"], "bb": [1.9, 2, 10.5, 20], "attributes": ["red"]},
                {"caption": "a cat", "bb": [3, 4, 5, 6], "attributes": "bright"},
            ]
        )
    )
    sample = RegionLines(files=(str(tmp_path / "a"),)).open()[0]
    assert [(t.text, t.role, t.listed) for t in sample.texts] == [
        ("a dog on the grass", "caption", False),
        ("a dog", "region", True),
        ("dog", "region", True),
        ("a cat", "region", False),
    ]
    first, second = sample.regions
    assert (first.box, first.texts, first.attributes) == ((1, 2, 11, 22), (1, 2), ("red",))
    assert (second.box, second.texts, second.attributes) == ((3, 4, 8, 10), (3,), "bright")


@pytest.mark.parametrize(
    ("line", "cause", "detail"),
    [
        ("", "empty line", "blanks"),
        ("   ", "empty line", "blanks"),
        ('{"caption": "a"', "broken line", "not JSON"),
        ("[1]", "broken line", "object was expected, found list"),
        ('{"image_rpath": "a.jpg"}', "broken line", "none of the fields caption, desc"),
        ('{"caption": 3, "image_rpath": "a.jpg"}', "broken line", "`caption` must be a string or a list"),
        ('{"caption": [], "image_rpath": "a.jpg"}', "broken line", "`caption` must be a string or a list"),
        ('{"caption": "a"}', "broken line", "none of the fields binary, image_rpath"),
        ('{"caption": "a", "image_rpath": ""}', "broken line", "`image_rpath` must be a string"),
        ('{"caption": "a", "binary": "%%%"}', "broken base64", "`binary`"),
    ],
)
def test_faults_of_image_text_lines(tmp_path, line, cause, detail):
    (tmp_path / "a").write_text('{"caption": "a", "image_rpath": "a.jpg"}\n' + line + "\n")
    source = ImageTextLines(files=(str(tmp_path / "a"),)).open()
    assert len(source) == 2
    with pytest.raises(BadSample) as error:
        source[1]
    assert (error.value.cause, error.value.file) == (cause, f"{tmp_path / 'a'}:2")
    assert detail in error.value.detail


@pytest.mark.parametrize(
    ("change", "detail"),
    [
        ({"elems": None}, "`elems` must be a list"),
        ({"elems": []}, "`elems` must be a list"),
        ({"elems": [3]}, "`elems.0` must be an object"),
        ({"elems": [{"bb": [1, 2, 3, 4]}]}, "`elems.0.caption` must be a string"),
        ({"elems": [{"caption": "a", "bb": [1, 2, 3]}]}, "`elems.0.bb` must be"),
        ({"elems": [{"caption": "a", "bb": [1, 2, 3, "4"]}]}, "`elems.0.bb` must be"),
        ({"elems": [{"caption": "a", "bb": [1, 2, 3, float("inf")]}]}, "`elems.0.bb` must be"),
        ({"elems": [{"caption": "a", "bb": [1, 2, 3, 4], "attributes": 5}]}, "`elems.0.attributes` must be"),
        ({"caption": None, "binary": None}, "no picture"),
    ],
)
def test_faults_of_region_lines(tmp_path, region_line, change, detail):
    (tmp_path / "a").write_text(region_line(**change))
    with pytest.raises(BadSample) as error:
        RegionLines(files=(str(tmp_path / "a"),)).open()[0]
    assert error.value.cause == "broken line" and detail in error.value.detail


def test_a_line_file_that_shrinks_under_way_stops(tmp_path):
    (tmp_path / "a").write_text('{"caption": "a", "image_rpath": "a.jpg"}\n')
    source = ImageTextLines(files=(str(tmp_path / "a"),)).open()
    (tmp_path / "a").write_text("{}")
    with pytest.raises(DataError, match="did it change"):
        source[0]
    (tmp_path / "a").unlink()
    with pytest.raises(BadSample, match="unreadable file"):
        source[0]


def test_real_lines_are_read_as_expected(shared_data):
    folder = shared_data / "formats" / "xvlm_jsonl"
    for name, expected in json.loads((folder / "expected.json").read_text()).items():
        options = RegionLines if "elems" in expected[0] else ImageTextLines
        source = options(files=(str(folder / name),), root=str(shared_data / "coco-mini")).open()
        assert len(source) == len(expected)
        for number, want in enumerate(expected):
            sample = source[number]
            captions = [t.text for t in sample.texts if t.role == "caption"]
            wanted = want.get("caption", [])
            assert captions == (wanted if isinstance(wanted, list) else [wanted])
            picture = open_image(sample.images[0])
            if "binary" in want:
                assert hashlib.sha256(sample.images[0].data).hexdigest() == want["binary"]["sha256"]
                assert list(picture.size) == want["binary"]["size_wh"]
            else:
                assert sample.images[0].path.endswith(want["image_rpath"])
            for region, element in zip(sample.regions, want.get("elems", []), strict=True):
                texts = [sample.texts[t].text for t in region.texts]
                assert texts == (
                    element["caption"] if isinstance(element["caption"], list) else [element["caption"]]
                )
                x0, y0, x1, y1 = region.box
                assert [x0, y0, x1 - x0, y1 - y0] == element["bb"]
                assert region.attributes == element.get("attributes", "")
                inside = 0 <= x0 < x1 <= picture.width and 0 <= y0 < y1 <= picture.height
                assert inside == element["valid_box"]


def test_the_success_file_of_a_folder_is_no_data(shared_data):
    folder = shared_data / "formats" / "xvlm_jsonl" / "images_rpath"
    assert (folder / "_SUCCESS").is_file()
    source = ImageTextLines(files=(str(folder),), root=str(shared_data / "coco-mini")).open()
    assert source.describe()["files"] == len(list(folder.glob("part-*")))
    assert np.all([open_image(source[n].images[0]).mode == "RGB" for n in range(len(source))])
