"""METEOR and SPICE; without Java or the package only their refusal can be tested."""

import importlib.util
import shutil

import pytest
from vlp_eval.metrics import java

INSTALLED = shutil.which("java") is not None and importlib.util.find_spec("pycocoevalcap") is not None


@pytest.mark.skipif(INSTALLED, reason="Java and pycocoevalcap are installed")
def test_what_is_missing_is_named():
    with pytest.raises(ValueError, match=r"meteor needs (Java|the package pycocoevalcap)"):
        java.judge({1: "a dog"}, {1: ["a dog"]}, ["meteor"])


@pytest.mark.skipif(not INSTALLED, reason="needs Java and vlp-eval[caption-java]")
@pytest.mark.golden("metrics", lambda case: case.has("references.json", "results.json", "expected.json"))
def test_meteor_equals_the_published_numbers(case):
    references: dict[int, list[str]] = {}
    for one in case.json("references")["annotations"]:
        references.setdefault(one["image_id"], []).append(one["caption"])
    captions = {one["image_id"]: one["caption"] for one in case.json("results")}
    found = java.judge(captions, {one: references[one] for one in captions}, ["meteor"])["meteor"]
    assert found.value == pytest.approx(case.json("expected")["corpus"]["METEOR"], abs=1e-6)


def test_unknown_metrics_are_refused():
    with pytest.raises(ValueError, match="metric 'bleu' is not known; choose among meteor, spice"):
        java.judge({1: "a"}, {1: ["a"]}, ["bleu"])
