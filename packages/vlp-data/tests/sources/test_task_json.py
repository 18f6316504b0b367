"""ALBEF-type task lists."""

import json

import pytest
from vlp_data.errors import BadSample, DataError
from vlp_data.images import open_image
from vlp_data.options import TaskJson


@pytest.fixture
def opened(tmp_path):
    def open_list(*entries, **options):
        file = tmp_path / "list.json"
        file.write_text(json.dumps(list(entries)))
        return TaskJson(files=(str(file),), **options).open()

    return open_list


def test_captions(opened):
    source = opened(
        {"image": "a.jpg", "caption": "A dog.", "image_id": "coco_1"},
        {"image": "b.jpg", "caption": ["one", "two"], "kwords": ["dog", "cat"]},
        root="/images",
    )
    first, second = source[0], source[1]
    assert [(t.text, t.listed) for t in first.texts] == [("A dog.", False)]
    assert (first.images[0].path, first.images[0].id) == ("/images/a.jpg", "coco_1")
    assert [(t.text, t.role) for t in second.texts] == [
        ("one", "caption"),
        ("two", "caption"),
        ("dog", "concept"),
        ("cat", "concept"),
    ]
    assert second.images[0].id == "b"
    assert len({first.key, second.key}) == 2
    assert source.describe()["kinds"] == {"caption": 1}


def test_answers_are_weighted_by_their_share(opened):
    source = opened(
        {
            "image": "a.jpg",
            "question": "Why?",
            "question_id": 7,
            "answer": ["x"] * 3 + ["y"],
            "dataset": "vqa",
        },
        {"image": "b.jpg", "question": "What?", "answer": "z", "dataset": "vg"},
        {"image": "c.jpg", "question": "Who?", "question_id": 8, "dataset": "vqa"},
        root="/vqa",
        dataset_roots={"vg": "/vg"},
    )
    assert source[0].target.answers == (("x", 0.75), ("y", 0.25))
    assert source[0].target.raw_answers == ("x", "x", "x", "y")
    assert (source[0].texts[0].role, source[0].texts[0].id) == ("question", 7)
    assert source[1].target.answers == (("z", 0.5),)
    assert [source[n].images[0].path for n in range(3)] == ["/vqa/a.jpg", "/vg/b.jpg", "/vqa/c.jpg"]
    assert source[2].target is None
    assert source[1].meta["dataset"] == "vg"


def test_pairs_of_images(opened):
    entry = {
        "images": ["a.png", "b.png"],
        "sentence": "Two dogs.",
        "label": "True",
        "kwords1": ["dog"],
        "kwords2": ["cat"],
    }
    sample = opened(entry)[0]
    assert [image.path for image in sample.images] == ["a.png", "b.png"]
    assert sample.target.label == 1 and sample.texts[0].role == "sentence"
    assert [(t.text, t.image) for t in sample.texts[1:]] == [("dog", 0), ("cat", 1)]


def test_entailment_and_expressions(opened):
    source = opened(
        {"image": "123", "sentence": "A dog.", "label": "entailment"},
        {"image": "c.jpg", "text": "left dog", "ref_id": 5},
        root="/r",
    )
    assert source[0].images[0].path == "/r/123.jpg" and source[0].target.label == 2
    assert (source[1].texts[0].role, source[1].texts[0].id) == ("expression", 5)


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({"image": "a.jpg"}, r"entry 0: cannot tell what this entry is from its fields image"),
        ({"caption": "a"}, r"entry 0: field `image` is missing; the row has caption"),
        ({"image": 3, "caption": "a"}, "`image` must be str, found 3"),
        ({"image": "a", "caption": []}, "`caption` must be a string or a list of strings"),
        (
            {"image": "a.jpg", "caption": "a", "kwords": "dog"},
            r"list\.json: entry 0: `kwords` must be a list of strings, found 'dog'",
        ),
        (
            {"images": ["a", "b"], "sentence": "x", "label": "True", "kwords1": ["a"], "kwords2": [3]},
            r"entry 0: `kwords2` must be a list of strings, found \[3\]",
        ),
        (
            {"images": ["a"], "sentence": "x", "label": "maybe"},
            "`label` must be one of False, True, found 'maybe'",
        ),
    ],
)
def test_a_list_that_begins_wrong_is_refused(opened, entry, message):
    with pytest.raises(DataError, match=message):
        opened(entry)


def test_a_later_fault_is_a_bad_sample(opened):
    source = opened({"image": "a.jpg", "caption": "a"}, {"image": "a.jpg", "caption": 5})
    with pytest.raises(BadSample, match="broken entry") as error:
        source[1]
    assert error.value.file.endswith("list.json:1")


def test_files_that_are_no_lists(tmp_path):
    for content, message in (
        ("{}", "expected a JSON list, found dict"),
        ("[", "is not JSON"),
        ("[]", "no entry in"),
        ("[1]", "entry 0 must be an object"),
    ):
        (tmp_path / "x.json").write_text(content)
        with pytest.raises(DataError, match=message):
            TaskJson(files=(str(tmp_path / "x.json"),)).open()
    with pytest.raises(FileNotFoundError, match=r"gone\.json not found"):
        TaskJson(files=(str(tmp_path / "gone.json"),)).open()


def test_real_lists_are_read_entry_by_entry(shared_data):
    folder = shared_data / "formats" / "albef_json"
    seen = set()
    for file in sorted(folder.glob("*.json")):
        entries = json.loads(file.read_text())
        if not isinstance(entries[0], dict):  # the list of candidate answers
            continue
        source = TaskJson(files=(str(file),), root=str(shared_data / "coco-mini")).open()
        assert len(source) == len(entries)
        for number, entry in enumerate(entries):
            sample = source[number]
            words = entry.get("caption", entry.get("question", entry.get("sentence")))
            texts = [t.text for t in sample.texts if t.role != "concept"]
            assert texts == (words if isinstance(words, list) else [words])
            assert len(sample.images) == len(entry.get("images", [1]))
            assert [t.text for t in sample.texts if t.role == "concept"] == entry.get("kwords", [])
            if "answer" in entry:
                answers = entry["answer"] if isinstance(entry["answer"], list) else [entry["answer"]]
                assert list(sample.target.raw_answers) == answers
            if "images" not in entry:
                assert open_image(sample.images[0]).mode == "RGB"
        seen |= set(source.describe()["kinds"])
    assert seen == {"caption", "vqa", "nlvr"}


def test_captions_of_an_image_are_joined(opened):
    source = opened(
        {"image": "a.jpg", "caption": "one", "image_id": 1},
        {"image": "b.jpg", "caption": ["two", "three"], "image_id": 2},
        {"image": "a.jpg", "caption": "four", "image_id": 1},
        group_captions=True,
    )
    assert [[text.text for text in source[n].texts] for n in range(len(source))] == [
        ["one", "four"],
        ["two", "three"],
    ]
    assert [source[n].images[0].id for n in (0, 1)] == [1, 2]


def test_only_captions_are_joined(opened):
    with pytest.raises(
        DataError, match="entry 0: group_captions joins captions only, this entry is of kind vqa"
    ):
        opened({"image": "a.jpg", "question": "dog?"}, group_captions=True)
