"""X-VLM line files: random access, streaming, splitting, and their faults."""

import gzip
import hashlib
import json
import lzma
import multiprocessing
import pickle

import fsspec
import numpy as np
import pytest
from vlp_data.errors import BadSample, DataError
from vlp_data.images import open_image
from vlp_data.options import ImageTextLines, RegionLines
from vlp_data.sources import lines as line_files
from vlp_data.sources.lines import line_offsets


@pytest.fixture
def memory():
    filesystem = fsspec.filesystem("memory")
    filesystem.store.clear()
    yield filesystem
    filesystem.store.clear()


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
    (tmp_path / "a.gz").write_bytes(gzip.compress(b"x\n"))
    for settings in ({}, {"order": "files", "buffer": 4}):
        with pytest.raises(
            DataError, match=r"a\.gz is compressed.*decompress it, or read it from front to back"
        ):
            ImageTextLines(files=(str(tmp_path / "a.gz"),), **settings).open()


def test_files_without_a_line_are_refused(tmp_path):
    (tmp_path / "a").write_bytes(b"")
    with pytest.raises(DataError, match="no line in"):
        ImageTextLines(files=(str(tmp_path),)).open()


def test_rows_of_image_text_lines(image_lines):
    source = ImageTextLines(files=(str(image_lines / "lines"),), root=str(image_lines)).open()
    assert len(source) == 24
    sample = source[9]
    assert sample.key == f"{image_lines / 'lines' / 'part-1'}:2"
    assert [(t.text, t.role, t.listed) for t in sample.texts] == [
        ("a dog", "caption", True),
        ("a cat on the grass 9", "caption", True),
    ]
    assert sample.images[0].path == str(image_lines / "images" / "09.jpg") and sample.images[0].id == "09"
    assert open_image(sample.images[0]).size == (60, 40)
    assert pickle.loads(pickle.dumps(source))[9] == sample
    assert source.describe() == {"format": "xvlm_images", "files": 3, "lines": 24, "order": "shuffled"}
    with pytest.raises(IndexError):
        source[24]


def test_remote_lines_with_remote_images(memory, encoded):
    memory.pipe("/set/images/1.jpg", encoded(1))
    memory.pipe("/set/lines/a", json.dumps({"desc": "a dog", "image_rpath": "images/1.jpg"}).encode())
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


def test_lines_may_have_concepts(tmp_path, region_line):
    (tmp_path / "a").write_text('{"caption": "a", "image_rpath": "a.jpg", "kwords": ["dog", "cat"]}\n')
    (tmp_path / "b").write_text(region_line(kwords=["dog"]))
    image = ImageTextLines(files=(str(tmp_path / "a"),)).open()[0]
    assert [(t.text, t.role) for t in image.texts[1:]] == [("dog", "concept"), ("cat", "concept")]
    sample = RegionLines(files=(str(tmp_path / "b"),)).open()[0]
    assert [t.text for t in sample.texts if t.role == "concept"] == ["dog"]
    assert [sample.texts[n].role for region in sample.regions for n in region.texts] == ["region"] * 4


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
        (
            '{"caption": "a", "image_rpath": "a.jpg", "kwords": "b"}',
            "broken line",
            "`kwords` must be a list of",
        ),
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
        ({"kwords": [1]}, "`kwords` must be a list of strings, found [1]"),
        ({"caption": None, "binary": None}, "no image"),
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
            image = open_image(sample.images[0])
            if "binary" in want:
                assert hashlib.sha256(sample.images[0].data).hexdigest() == want["binary"]["sha256"]
                assert list(image.size) == want["binary"]["size_wh"]
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
                inside = 0 <= x0 < x1 <= image.width and 0 <= y0 < y1 <= image.height
                assert inside == element["valid_box"]


def test_the_success_file_of_a_folder_is_no_data(shared_data):
    folder = shared_data / "formats" / "xvlm_jsonl" / "images_rpath"
    assert (folder / "_SUCCESS").is_file()
    source = ImageTextLines(files=(str(folder),), root=str(shared_data / "coco-mini")).open()
    assert source.describe()["files"] == len(list(folder.glob("part-*")))
    assert np.all([open_image(source[n].images[0]).mode == "RGB" for n in range(len(source))])


@pytest.mark.parametrize("kind", ["local", "gz", "xz", "memory", "memory-gz"])
def test_lines_read_file_after_file_are_the_same(image_lines, memory, kind):
    plain = ImageTextLines(files=(str(image_lines / "lines"),)).open()
    name = str(image_lines / "lines")
    pack = {"gz": gzip.compress, "xz": lzma.compress}.get(kind.rsplit("-", 1)[-1], bytes)
    suffix = {"gz": ".gz", "xz": ".xz"}.get(kind.rsplit("-", 1)[-1], "")
    for path in sorted((image_lines / "lines").iterdir()):
        if kind.startswith("memory"):
            memory.pipe(f"/set/{path.name}{suffix}", pack(path.read_bytes()))
            name = "memory://set"
        elif suffix:
            name = str(image_lines / "packed")
            (image_lines / "packed").mkdir(exist_ok=True)
            (image_lines / "packed" / f"{path.name}{suffix}").write_bytes(pack(path.read_bytes()))
    source = ImageTextLines(files=(name,), order="files").open()
    assert source.runs == ((8, 8, 8), 0) and plain.runs is None
    for index in (0, 3, 4, 9, 23, 2, 8, 8, 7):  # ahead, into the next file, back, the same again
        assert source[index].texts == plain[index].texts
    copy = pickle.loads(pickle.dumps(source))
    assert copy[5].texts == plain[5].texts


def test_a_forked_process_reads_its_own_lines(image_lines):
    packed = image_lines / "all.gz"
    packed.write_bytes(
        b"".join(gzip.compress(p.read_bytes()) for p in sorted((image_lines / "lines").iterdir()))
    )
    plain = ImageTextLines(files=(str(image_lines / "lines"),)).open()
    source = ImageTextLines(files=(str(packed),), order="files").open()
    assert source[4].texts == plain[4].texts
    with multiprocessing.get_context("fork").Pool(1) as pool:
        assert pool.apply(source.__getitem__, (20,)).texts == plain[20].texts
    assert source[5].texts == plain[5].texts


def test_remote_files_stay_open_when_read_file_after_file(image_lines, memory, monkeypatch):
    memory.pipe("/set/a", (image_lines / "lines" / "part-0").read_bytes())
    opened = []
    monkeypatch.setattr(
        line_files.files,
        "open_read",
        lambda path, original=line_files.files.open_read: opened.append(path) or original(path),
    )
    source = ImageTextLines(files=("memory://set/a",), order="files").open()
    assert [source[n].key for n in range(8)] == [f"memory://set/a:{n}" for n in range(1, 9)]
    assert len(opened) == 2  # the scan for offsets, and the reading


def test_a_compressed_file_that_shrinks_stops(tmp_path):
    line = b'{"caption": "a", "image_rpath": "a.jpg"}\n'
    (tmp_path / "a.gz").write_bytes(gzip.compress(line * 3))
    source = ImageTextLines(files=(str(tmp_path / "a.gz"),), order="files").open()
    (tmp_path / "a.gz").write_bytes(gzip.compress(line))
    with pytest.raises(DataError, match=r"a\.gz ends after 41 bytes; did it change"):
        source[2]


def test_one_of_several_processes_scans(tmp_path):
    (tmp_path / "a").write_bytes(b"1\n2\n" * 1000)
    with multiprocessing.get_context("fork").Pool(3) as pool:
        found = pool.starmap(line_offsets, [(str(tmp_path / "a"), str(tmp_path / "index"))] * 6)
    assert all(np.array_equal(offsets, found[0]) for offsets in found)
    assert len(list((tmp_path / "index").glob("*.npz"))) == 1


def test_orders_that_cannot_be_are_refused():
    for kind in (ImageTextLines, RegionLines):
        with pytest.raises(ValueError, match="buffer=-1 must not be negative"):
            kind(files=("a",), order="files", buffer=-1)
        with pytest.raises(ValueError, match='order="shuffled" mixes all of them already'):
            kind(files=("a",), buffer=5)
