"""Referring expressions joined with REFER's files, and pickles that must not run."""

import json
import os
import pickle

import pytest
from vlp_data.errors import DataError
from vlp_data.options import Refer, TaskJson
from vlp_data.roots import rooted
from vlp_data.sources.plain_pickle import read_plain_pickle
from vlp_data.sources.refer import read_refs, write_refs_json

REFS = [
    {"ref_id": 5, "ann_id": 50, "image_id": 7, "split": "testA", "category_id": 1, "sentences": []},
    {"ref_id": 6, "ann_id": 51, "image_id": 7, "split": "val", "category_id": 2, "sentences": []},
]
INSTANCES = {
    "images": [{"id": 7, "width": 60, "height": 40}],
    "annotations": [
        {"id": 50, "image_id": 7, "bbox": [1.5, 2, 10, 20], "category_id": 1},
        {"id": 51, "image_id": 7, "bbox": [30, 5, 8, 9], "category_id": 2},
    ],
}
ENTRIES = [
    {"image": "train2014/COCO_train2014_000000000007.jpg", "text": "red dog", "ref_id": 5},
    {"image": "train2014/COCO_train2014_000000000007.jpg", "text": "Cat!", "ref_id": 6},
    {"image": "train2014/COCO_train2014_000000000007.jpg", "text": "the dog", "ref_id": 5},
]
DETECTIONS = {"7": [[1, 2, 3, 4, 0.9, 3], [5, 6, 0, 8], [9, 10, 11, 12]], "8": []}


@pytest.fixture
def folder(tmp_path):
    for name, content in (
        ("list.json", ENTRIES),
        ("refs.json", REFS),
        ("instances.json", INSTANCES),
        ("dets.json", DETECTIONS),
    ):
        (tmp_path / name).write_text(json.dumps(content))
    for protocol in range(pickle.HIGHEST_PROTOCOL + 1):
        (tmp_path / f"refs{protocol}.p").write_bytes(pickle.dumps(REFS, protocol=protocol))
    return tmp_path


def options(folder, **changes):
    settings = {"files": ("list.json",), "refs": "refs.json", "instances": "instances.json", **changes}
    return rooted(Refer(**settings), str(folder))


@pytest.mark.parametrize("refs", ["refs.json", *(f"refs{p}.p" for p in range(pickle.HIGHEST_PROTOCOL + 1))])
def test_expressions_get_their_box(folder, refs):
    source = options(folder, refs=refs).open()
    assert len(source) == 3
    first, second, third = source[0], source[1], source[2]
    assert first.regions[first.target.box].box == third.regions[0].box == (1.5, 2, 11.5, 22)
    assert second.regions[0].box == (30, 5, 38, 14) and second.regions[0].category == 2
    assert [(t.text, t.role, t.id) for t in second.texts] == [("Cat!", "expression", 6)]
    assert first.images[0].path == str(folder / ENTRIES[0]["image"])
    assert (first.images[0].size, first.images[0].id) == ((60, 40), 7)
    assert (first.meta["split"], second.meta["split"], first.meta["ref_id"]) == ("testA", "val", 5)
    assert len(first.regions) == 1 and len({s.key for s in (first, second, third)}) == 3
    assert source.describe()["notes"] == {
        "expressions of split testA": 2,
        "expressions of split val": 1,
    }
    assert pickle.loads(pickle.dumps(source))[2] == third


def test_expressions_keep_the_concepts_of_their_list(folder):
    (folder / "list.json").write_text(json.dumps([{**ENTRIES[0], "kwords": ["dog", "red cat"]}, ENTRIES[1]]))
    with_concepts, without = (options(folder).open()[n] for n in (0, 1))
    assert [t.text for t in with_concepts.texts if t.role == "concept"] == ["dog", "red cat"]
    assert [t.role for t in without.texts] == ["expression"]


def test_detections_follow_the_box(folder):
    source = options(folder, detections="dets.json", splits=("testA",)).open()
    assert [sample.texts[0].text for sample in (source[0], source[1])] == ["red dog", "the dog"]
    assert [region.box for region in source[1].regions] == [(1.5, 2, 11.5, 22), (1, 2, 4, 6), (9, 10, 20, 22)]
    assert source.describe()["notes"] == {
        "expressions of split testA": 2,
        "expressions of other splits": 1,
        "detections without area": 2,
    }


def test_lists_that_hold_the_boxes(folder):
    entry = {
        "image": "a/COCO_train2014_000000000007.jpg",
        "text": "dog",
        "ref_id": 3,
        "bbox": [1, 2, 3, 4],
        "dets": [[5, 6, 7, 8]],
        "width": 60,
        "height": 40,
    }
    (folder / "vlue.json").write_text(json.dumps([entry]))
    sample = options(folder, files=("vlue.json",), refs="", instances="").open()[0]
    assert [region.box for region in sample.regions] == [(1, 2, 4, 6), (5, 6, 12, 14)]
    assert sample.images[0].size == (60, 40) and sample.meta["ref_id"] == 3
    with pytest.raises(
        DataError, match=r"list\.json: entry 0: the entry has no `bbox`; give refs and instances"
    ):
        options(folder, refs="", instances="").open()


class Evil:
    def __reduce__(self):
        return os.mkdir, ("never",)


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_nothing_in_a_pickle_is_executed(tmp_path, monkeypatch, protocol):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "refs.p").write_bytes(pickle.dumps([{"ref_id": Evil()}], protocol=protocol))
    with pytest.raises(DataError, match=r"refs\.p is no pickle of plain .*mkdir; nothing of it was executed"):
        read_plain_pickle(str(tmp_path / "refs.p"))
    assert not (tmp_path / "never").exists()


@pytest.mark.parametrize(
    "code",
    [
        b"\x80\x02c__builtin__\neval\nX\x01\x00\x00\x001\x85R.",  # GLOBAL, REDUCE
        b"(S'never'\nios\nmkdir\n.",  # INST
        b"\x80\x04\x8c\x02os\x8c\x05mkdir\x93\x8c\x05never\x85R.",  # STACK_GLOBAL
        b"\x80\x02\x82\x01.",  # EXT1
        b"\x80\x02}X\x01\x00\x00\x00a)\x81.",  # NEWOBJ of a string
        b"Pid\n.",  # PERSID
    ],
)
def test_no_opcode_leads_to_code(tmp_path, monkeypatch, code):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.p").write_bytes(code)
    with pytest.raises(DataError, match=r"a\.p is"):
        read_plain_pickle(str(tmp_path / "a.p"))
    assert not (tmp_path / "never").exists()


def test_python_2_strings_are_read(tmp_path):
    (tmp_path / "a.p").write_bytes(b"(lp0\n(dp1\nS'ref_id'\np2\nI5\nsS'raw'\np3\nS'caf\\xc3\\xa9'\np4\nsa.")
    assert read_refs(str(tmp_path / "a.p")) == [{"ref_id": 5, "raw": "caf\u00e9"}]


def test_pickles_become_json(folder):
    out = folder / "out.json"
    assert write_refs_json(str(folder / "refs2.p"), str(out)) == 2
    assert json.loads(out.read_text()) == REFS
    with pytest.raises(FileExistsError):
        write_refs_json(str(folder / "refs2.p"), str(out))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("refs.json", REFS[:1], r"list\.json: entry 1: ref_id 6 is not in .*refs\.json"),
        ("refs.json", {"a": 1}, r"refs\.json: expected a JSON list"),
        ("refs.json", [3], r"refs\.json: expected a list of references"),
        (
            "instances.json",
            {**INSTANCES, "annotations": []},
            r"annotation 50 of image 7 \(ref_id 5\) is not in",
        ),
        ("instances.json", {**INSTANCES, "images": []}, r"annotation 50 of image 7 \(ref_id 5\) is not in"),
        ("dets.json", {}, r"dets\.json: no detections of image 7, which .*entry 0 needs"),
        ("dets.json", {"7": [[1, 2]]}, r"dets\.json: 7: a box must be \[x, y, w, h\], found \[1, 2\]"),
        ("list.json", [{**ENTRIES[0], "kwords": "dog"}], r"list\.json: entry 0: `kwords` must be a list of"),
        ("list.json", [], "no expression in .*the lists are empty"),
        ("list.json", [{"image": "a.jpg", "text": "dog"}], "field `ref_id` is missing"),
    ],
)
def test_files_that_do_not_fit_together_are_named(folder, name, content, message):
    (folder / name).write_text(json.dumps(content))
    with pytest.raises(DataError, match=message):
        options(folder, detections="dets.json").open()


def test_boxes_without_area_are_refused(folder):
    broken = {**INSTANCES, "annotations": [{"id": 50, "bbox": [1, 2, 0, 4]}, INSTANCES["annotations"][1]]}
    (folder / "instances.json").write_text(json.dumps(broken))
    with pytest.raises(DataError, match="that it refers to has no area"):
        options(folder).open()


def test_options_that_cannot_work_are_refused(folder):
    with pytest.raises(ValueError, match="refs and instances belong together"):
        Refer(files=("a",), refs="b")
    with pytest.raises(ValueError, match="splits needs refs"):
        Refer(files=("a",), splits=("val",))
    with pytest.raises(FileNotFoundError, match=r"none\.p not found"):
        options(folder, refs="none.p").open()
    (folder / "cut.p").write_bytes((folder / "refs2.p").read_bytes()[:-9])
    with pytest.raises(DataError, match=r"cut\.p is"):
        options(folder, refs="cut.p").open()


def test_real_references(shared_data):
    folder = shared_data / "refcocoplus-sample"
    inner = folder / "refcoco+"
    sources = [
        Refer(
            files=(str(folder / "refcoco+_test.json"),),
            refs=str(inner / refs),
            instances=str(inner / "instances.json"),
        ).open()
        for refs in ("refs(unc).p", "refs(unc).json")
    ]
    plain = TaskJson(files=(str(folder / "refcoco+_test.json"),)).open()
    boxes = {a["id"]: a["bbox"] for a in json.loads((inner / "instances.json").read_text())["annotations"]}
    refs = {ref["ref_id"]: ref for ref in json.loads((inner / "refs(unc).json").read_text())}
    assert len(sources[0]) == len(plain) > 0
    for number in range(len(plain)):
        sample = sources[0][number]
        assert sample == sources[1][number]
        assert sample.texts[0].text == plain[number].texts[0].text
        x, y, w, h = boxes[refs[sample.meta["ref_id"]]["ann_id"]]
        assert sample.regions[0].box == (x, y, x + w, y + h)
        assert sample.meta["split"] == "testB"
        width, height = sample.images[0].size
        assert x + w <= width + 1 and y + h <= height + 1
