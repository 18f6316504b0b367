"""Accuracy of answers, against the official evaluator and the copy of ALBEF."""

import gzip
import json

import pytest
from vlp_eval.metrics import vqa


def zipped(case, name):
    return json.loads(gzip.decompress((case.path / name).read_bytes()))


@pytest.mark.golden("metrics", lambda case: case.has("normalisation.json"))
def test_normal_forms_equal_the_official_ones(case):
    table = case.json("normalisation")
    official = table["columns"].index("official")
    for row in table["rows"]:
        assert vqa.normalise_answer(row[0]) == row[official], row[0]


@pytest.mark.golden("metrics", lambda case: case.has("accuracy_cases.json"))
def test_accuracy_of_a_question_equals_both_evaluators_and_the_soft_targets_of_vilt(case):
    for item in case.json("accuracy_cases"):
        for variant in ("official", "albef"):
            found = 100 * vqa.answer_accuracy(item["prediction"], item["answers"], variant=variant)
            assert found == pytest.approx(item[variant], abs=0.005), item["note"]
        assert vqa.soft_targets(item["answers"]) == pytest.approx(item["vilt_soft_targets"])


REAL = ("real_annotations.json.gz", "real_predictions.json", "real_expected.json")


@pytest.mark.golden("metrics", lambda case: case.has(*REAL))
def test_accuracy_on_real_questions_equals_both_evaluators(case):
    annotations = zipped(case, REAL[0])["annotations"]
    predictions = {one["question_id"]: one["answer"] for one in case.json("real_predictions")}
    answers = {one["question_id"]: [a["answer"] for a in one["answers"]] for one in annotations}
    groups = {
        key: {one["question_id"]: one[key] for one in annotations} for key in ("question_type", "answer_type")
    }
    expected = case.json("real_expected")
    for variant, key, each in (
        ("official", "official", "per_question_official"),
        ("albef", "albef_xvlm_vicha", "per_question_albef"),
    ):
        found = vqa.accuracy(predictions, answers, variant=variant, groups=groups)
        assert found.overall == expected[key]["overall"]
        assert found.groups["question_type"] == expected[key]["perQuestionType"]
        assert found.groups["answer_type"] == expected[key]["perAnswerType"]
        for question, value in expected[each].items():
            assert found.questions[int(question)] == pytest.approx(value, abs=0.005)


@pytest.mark.golden("xvlm", lambda case: case.has("vqa_accuracy.json"))
def test_accuracy_equals_that_of_x_vlms_tool(case):
    content = case.json("vqa_accuracy")
    items = dict(enumerate(content["items"]))
    found = vqa.accuracy(
        {number: item["prediction"] for number, item in items.items()},
        {number: item["answers"] for number, item in items.items()},
        variant="albef",
        groups={"answer_type": {number: item["answer_type"] for number, item in items.items()}},
    )
    assert found.overall == content["overall"]
    assert found.groups["answer_type"] == content["per_answer_type"]
    assert found.questions == {number: item["accuracy"] for number, item in items.items()}


def test_three_of_ten_are_worth_ninety():
    assert vqa.answer_accuracy("yes", ["yes"] * 3 + ["no"] * 7) == pytest.approx(0.9)


def test_questions_and_predictions_must_be_the_same():
    with pytest.raises(
        ValueError, match="1 of the annotated questions are not among the predictions, the first is 2"
    ):
        vqa.accuracy({1: "a"}, {1: ["a"], 2: ["b"]})
    with pytest.raises(
        ValueError, match="1 of the predictions are not among the annotated questions, the first is 3"
    ):
        vqa.accuracy({1: "a", 3: "c"}, {1: ["a"]})
    with pytest.raises(ValueError, match="no annotated questions"):
        vqa.accuracy({}, {})
    with pytest.raises(ValueError, match="variant='best' is not known"):
        vqa.accuracy({1: "a"}, {1: ["a"]}, variant="best")
