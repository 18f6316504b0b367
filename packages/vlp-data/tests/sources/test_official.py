"""The official files of NLVR2, SNLI-VE and VQA as they are, and texts that were cut inside of a character."""

import json
import logging

import pytest
from vlp_data.cli import main
from vlp_data.concepts import build, tables
from vlp_data.errors import BadSample, DataError
from vlp_data.examples import NlvrExamples
from vlp_data.examples.retrieval import image_number
from vlp_data.loader import Loader
from vlp_data.options import ImageTextLines, Karpathy, RegionLines, TaskJson
from vlp_data.sources.given import detect, source_options

NLVR = [
    {"sentence": "Two dogs.", "identifier": "dev-850-0-1", "label": "False", "left_url": "https://x/a.jpg"},
    {"sentence": "A cat.", "identifier": "train-736-2-0", "directory": 17, "label": "True"},
    {"sentence": "A cow.", "identifier": "test2-1-0-0"},
]
ENTAILMENT = [
    {"Flickr30K_ID": "22", "pairID": "22.jpg#2r1c", "gold_label": "contradiction", "sentence2": "A toddler."},
    {"Flickr30K_ID": 23, "pairID": "23.jpg#2r1n", "gold_label": "-", "sentence2": "A dog."},
]
QUESTIONS = {
    "info": {},
    "data_subtype": "val2014",
    "questions": [
        {"image_id": 42, "question": "What is it?", "question_id": 42001},
        {"image_id": 7, "question": "How many?", "question_id": 7000},
    ],
}
ANSWERS = {
    "annotations": [
        {"question_id": 7000, "answers": [{"answer": text} for text in ["2"] * 3 + ["3"]]},
        {"question_id": 42001, "answers": [{"answer": "dog", "answer_id": 1}]},
    ]
}


def lines(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def test_nlvr(tmp_path):
    path = lines(tmp_path / "dev.json", NLVR)
    assert detect((path,)) == "task_json"
    source = TaskJson(files=(path,), root="/nlvr2").open()
    first, second, third = (source[n] for n in range(3))
    assert [image.path for image in first.images] == [
        "/nlvr2/dev/dev-850-0-img0.png",
        "/nlvr2/dev/dev-850-0-img1.png",
    ]
    assert second.images[1].path == "/nlvr2/images/train/17/train-736-2-img1.png"
    assert (first.target.label, second.target.label, third.target) == (0, 1, None)
    assert (first.texts[0].role, first.texts[0].id) == ("sentence", "dev-850-0-1")
    assert first.meta["identifier"] == "dev-850-0-1"
    assert source.describe()["kinds"] == {"nlvr": 1}


def test_entailment(tmp_path):
    path = lines(tmp_path / "snli_ve_dev.jsonl", ENTAILMENT)
    assert detect((path,)) == "task_json"
    first, second = (TaskJson(files=(path,), root="/flickr").open()[n] for n in range(2))
    assert (first.images[0].path, second.images[0].path) == ("/flickr/22.jpg", "/flickr/23.jpg")
    assert (first.texts[0].text, first.texts[0].role, first.texts[0].id) == (
        "A toddler.",
        "hypothesis",
        "22.jpg#2r1c",
    )
    assert (first.target.label, second.target) == (0, None)
    assert first.meta["identifier"] == "22.jpg#2r1c"


@pytest.fixture
def vqa(tmp_path):
    def write(questions=QUESTIONS, answers=ANSWERS):
        (tmp_path / "q.json").write_text(json.dumps(questions))
        (tmp_path / "a.json").write_text(json.dumps(answers))
        return TaskJson(
            files=(str(tmp_path / "q.json"),), annotations=(str(tmp_path / "a.json"),), root="/coco"
        )

    return write


def test_questions_with_their_annotations(vqa, tmp_path):
    source = vqa().open()
    first, second = source[0], source[1]
    assert first.images[0].path == "/coco/val2014/COCO_val2014_000000000042.jpg"
    assert (first.images[0].id, first.texts[0].id, first.texts[0].role) == (42, 42001, "question")
    assert first.target.raw_answers == ("dog",) and first.target.answers == (("dog", 1.0),)
    assert second.target.answers == (("2", 0.75), ("3", 0.25))
    assert detect((str(tmp_path / "q.json"),)) == "task_json"
    given = {"annotations": str(tmp_path / "a.json")}
    assert source_options((str(tmp_path / "q.json"),), given=given).open()[0].target == first.target


def test_test_sets_have_no_target(vqa, tmp_path):
    vqa({**QUESTIONS, "data_subtype": "test-dev2015"})
    source = TaskJson(files=(str(tmp_path / "q.json"),)).open()
    assert source[0].target is None
    assert source[0].images[0].path == "test2015/COCO_test2015_000000000042.jpg"
    (tmp_path / "l.json").write_text(
        json.dumps(
            [
                {"images": ["a.png", "b.png"], "sentence": "x"},
                {"image": "a.jpg", "sentence": "x", "label": None},
                {"image": "a.jpg", "question": "x", "answer": []},
            ]
        )
    )
    source = TaskJson(files=(str(tmp_path / "l.json"),)).open()
    assert [source[n].target for n in range(3)] == [None] * 3


def test_what_does_not_fit_is_refused_or_counted(vqa, tmp_path, caplog):
    twice = {"annotations": [*ANSWERS["annotations"], ANSWERS["annotations"][0]]}
    with pytest.raises(DataError, match=r"a\.json: annotations\.2: question_id 7000 is annotated twice"):
        vqa(answers=twice).open()
    asked_twice = {**QUESTIONS, "questions": QUESTIONS["questions"][:1] * 2}
    with pytest.raises(DataError, match=r"q\.json: questions\.1: question_id 42001 occurs twice"):
        vqa(asked_twice).open()
    with pytest.raises(DataError, match="do the files belong together"):
        vqa(answers={"annotations": [{"question_id": 1, "answers": [{"answer": "x"}]}]}).open()
    with caplog.at_level(logging.WARNING, logger="vlp_data.sources.rows"):
        source = vqa(answers={"annotations": [ANSWERS["annotations"][0], {"question_id": 5, "answers": []}]})
        described = source.open().describe()
    assert described["notes"] == {"questions without an annotation": 1, "annotations without a question": 1}
    assert "questions without an annotation: 1 (questions.0)" in caplog.text
    lines(tmp_path / "l.json", [{"image": "a.jpg", "question": "x"}])
    with pytest.raises(DataError, match="is no file of VQA's own questions"):
        TaskJson(files=(str(tmp_path / "l.json"),), annotations=(str(tmp_path / "a.json"),)).open()


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        (["2", 2, 2.5], ("2", "2", "2.5")),
        (3, ("3",)),
        ([{"answer": "dog", "answer_id": 1}, {"answer": 4}], ("dog", "4")),
        ("half \ud83d", ("half ",)),
    ],
)
def test_answers_that_are_no_strings_are_read(tmp_path, answer, expected):
    lines(tmp_path / "l.json", [{"image": "a.jpg", "question": "x", "answer": answer}])
    assert TaskJson(files=(str(tmp_path / "l.json"),)).open()[0].target.raw_answers == expected


@pytest.mark.parametrize("answer", [True, [None], [["a"]], {"a": 1}, [{"text": "a"}], [float("nan")]])
def test_other_answers_are_refused_by_name(tmp_path, answer):
    path = lines(tmp_path / "l.json", [{"image": "a.jpg", "question": "x", "answer": answer}])
    with pytest.raises(DataError, match=r"l\.json: entry 0: (field )?`answer`"):
        TaskJson(files=(path,)).open()


@pytest.mark.parametrize("lists", [True, False])
def test_lists_are_read_as_lines_too(tmp_path, lists):
    rows = [{"image": f"{n}.jpg", "caption": f"a {n}"} for n in range(3)]
    path = tmp_path / "l.json"
    path.write_text(json.dumps(rows, indent=1 if lists else None)) if lists else lines(path, rows)
    source = TaskJson(files=(str(path),)).open()
    assert [source[n].texts[0].text for n in range(3)] == ["a 0", "a 1", "a 2"]
    assert [row["caption"] for row in tables.to_rows(tables.read_list(str(path)))] == ["a 0", "a 1", "a 2"]


@pytest.mark.parametrize("bad", ["{", "[1]", "3", '{"image": "a.jpg"}', '{"image": 3, "caption": "a"}'])
def test_one_bad_line_is_one_counted_sample(tmp_path, bad):
    rows = [json.dumps({"image": f"{n}.jpg", "caption": "a"}) for n in range(3)]
    (tmp_path / "l.json").write_text("\n".join([rows[0], bad, *rows[1:], ""]))
    source = TaskJson(files=(str(tmp_path / "l.json"),)).open()
    assert len(source) == 4
    with pytest.raises(BadSample, match=r"broken entry: .*l\.json:1"):
        source[1]
    assert source[3].images[0].path == "2.jpg"


@pytest.mark.parametrize("indent", [None, 1])
@pytest.mark.parametrize("kind", [ImageTextLines, RegionLines])
def test_a_list_where_lines_are_meant_is_told(tmp_path, kind, indent):
    (tmp_path / "l.json").write_text(json.dumps([{"image_rpath": "a", "caption": "b"}] * 2, indent=indent))
    with pytest.raises(DataError, match=r"l\.json is one JSON list, and this format has one object a line"):
        kind(files=(str(tmp_path / "l.json"),)).open()


def test_unlabelled_rows_are_counted_in_training(tmp_path, tokenizer):
    path = lines(tmp_path / "l.json", [NLVR[2]] * 20)
    examples = NlvrExamples(source=TaskJson(files=(path,)).open(), tokenizer=tokenizer)
    with pytest.raises(DataError, match=r"no label: 50 \(.*l\.json:\d"):
        next(Loader(examples, global_batch=2, seed=0))


# ------------------------------------------------------------------------------- halves of characters


HALF = "a dog \ud83d on grass"


def test_a_cut_character_is_left_out_and_told(tmp_path, tokenizer, capsys):
    rows = [{"image": f"{n}.jpg", "caption": HALF if n == 2 else "a dog"} for n in range(4)]
    (tmp_path / "list.json").write_text(json.dumps(rows))
    lines(tmp_path / "l.jsonl", [{"image_rpath": row["image"], "caption": row["caption"]} for row in rows])
    for options, key in (
        (TaskJson(files=(str(tmp_path / "list.json"),)), "list.json:2"),
        (ImageTextLines(files=(str(tmp_path / "l.jsonl"),)), "l.jsonl:3"),
    ):
        text = options.open()[2].texts[0]
        assert (text.text, text.cut) == ("a dog  on grass", True)
        assert main(["inspect", options.files[0], "--no-images"]) == 1
        out = capsys.readouterr().out
        assert "text with half of a character, which is left out: 1 (" in out and key in out
    assert tokenizer.token_ids(HALF) == tokenizer.token_ids("a dog  on grass")
    assert tokenizer.encode([HALF], separator=False).ids.tolist()[0][1:] == tokenizer.token_ids(HALF)


def test_whole_emoji_stay(tmp_path):
    (tmp_path / "list.json").write_text('[{"image": "a.jpg", "caption": "a \\ud83d\\ude00 dog"}]')
    text = TaskJson(files=(str(tmp_path / "list.json"),)).open()[0].texts[0]
    assert (text.text, text.cut) == ("a \U0001f600 dog", False)


def test_cut_characters_everywhere(tmp_path):
    elems = [{"caption": HALF, "bb": [1, 1, 9, 9], "attributes": ["re\ud83dd"]}]
    path = lines(tmp_path / "r.jsonl", [{"elems": elems, "image_rpath": "a.jpg"}])
    assert RegionLines(files=(path,)).open()[0].regions[0].attributes == ("red",)
    content = {"images": [{"filename": "a.jpg", "split": "train", "sentences": [{"raw": HALF}]}]}
    (tmp_path / "k.json").write_text(json.dumps(content))
    kept = Karpathy(annotations=str(tmp_path / "k.json"), images="", split="train").open()
    assert kept[0].texts[0].cut
    built = build.karpathy(str(tmp_path / "k.json"), splits=("train",))
    tables.write_list(str(tmp_path / "out.parquet"), built.rows)
    rows = tables.from_rows([{"caption": HALF, "kwords": ["a\ud83d"]}])
    assert rows.to_pylist() == [{"caption": "a dog  on grass", "kwords": ["a"]}]


def test_ids_with_cut_characters_stay_apart_and_can_be_written(tmp_path):
    rows = [{"image": "a.jpg", "caption": "a", "image_id": f"x{half}"} for half in ("\ud83d", "\ud83e")]
    (tmp_path / "list.json").write_text(json.dumps(rows))
    source = TaskJson(files=(str(tmp_path / "list.json"),)).open()
    assert [source[n].images[0].id for n in (0, 1)] == ["x\\ud83d", "x\\ud83e"]
    numbers = [image_number(source[n]) for n in (0, 1)]
    assert numbers[0] != numbers[1]
    json.dumps(source[0].meta, ensure_ascii=False).encode()
