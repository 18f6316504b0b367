"""Accuracy and consistency of labels, against the NLVR2 scripts."""

import csv
import json

import pytest
from vlp_eval.metrics import labels


def read(case):
    lines = (case.path / "examples.jsonl").read_text().splitlines()
    truth = {one["identifier"]: one["label"].lower() for one in map(json.loads, lines)}
    with (case.path / "predictions.csv").open(newline="") as stream:
        return truth, {identifier: word.lower() for identifier, word in csv.reader(stream)}


@pytest.mark.golden("metrics", lambda case: case.has("examples.jsonl", "predictions.csv"))
def test_accuracy_and_consistency_equal_the_nlvr2_scripts(case):
    truth, predictions = read(case)
    expected = case.json("expected")
    accuracy, consistency = labels.accuracy(predictions, truth), labels.consistency(predictions, truth)
    assert accuracy.total == expected["num_examples"]
    assert accuracy.accuracy == pytest.approx(100 * expected["accuracy"], abs=1e-9)
    assert consistency.total == expected["num_sentences"]
    assert consistency.accuracy == pytest.approx(100 * expected["consistency"], abs=1e-9)
    for subset in expected["subsets"].values():
        ids = subset["identifiers"]
        found = labels.accuracy({one: predictions[one] for one in ids}, {one: truth[one] for one in ids})
        assert found.accuracy == pytest.approx(subset["accuracy_percent"], abs=1e-9)


def test_accuracy_of_each_label():
    truth = {"a": 0, "b": 0, "c": 2}
    found = labels.accuracy({"a": 0, "b": 2, "c": 2}, truth)
    assert (found.correct, found.total) == (2, 3)
    assert found.labels == {0: 50.0, 2: 100.0}


def test_a_sentence_with_one_wrong_pair_is_wrong():
    truth = {"dev-1-0-0": True, "dev-1-1-0": False, "dev-1-0-1": True, "test1-1-0-0": True}
    found = labels.consistency(truth | {"dev-1-1-0": True}, truth)
    assert (found.correct, found.total) == (2, 3)


def test_what_is_no_identifier_is_refused():
    with pytest.raises(ValueError, match="'row 3' is no NLVR2 identifier"):
        labels.consistency({"row 3": 1}, {"row 3": 1})
    with pytest.raises(ValueError, match="not among the labelled samples"):
        labels.accuracy({"a": 1, "b": 1}, {"a": 1})
