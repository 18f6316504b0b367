"""What only some tasks of X-VLM have; what all tasks of all methods have in common is in
`tests/test_tasks.py`."""

import json

import pytest
from vlp_core.recipe import RecipeError
from vlp_methods.engine.entry import load

SMALL = {"vqa": ("data.train.batch=4", "answers.candidates=4")}


@pytest.fixture
def small(task):
    return lambda name, *more: task(f"xvlm/shapes_{name}", *SMALL[name], *more)


def test_answers_are_written_where_the_recipe_says_so(train, small, tmp_path):
    options = ("answers={mode: generate, beams: 2, max_tokens: 4}", "data.candidates=", "steps=1")
    words = [word for word in small("vqa") if not word.startswith("answers.")]
    assert train(*words, *options, "--run", tmp_path / "run") == 0
    report = json.loads((tmp_path / "run/eval/test-00000001/vqa.json").read_text())
    assert "accuracy" in list(report["results"].values())[-1]


@pytest.mark.parametrize("mode", ["rank", "generate"])
def test_candidates_belong_to_ranking(mode):
    words = ["model.weights.model=x", f"answers={{mode: {mode}}}"]
    with pytest.raises(RecipeError, match=r"data\.candidates belongs to answers\.mode=rank"):
        load("xvlm/shapes_vqa", [*words, *(["data.candidates="] if mode == "rank" else [])])


def test_unlabelled_questions_are_answered_for_the_server(train, small, world, tmp_path):
    questions = json.loads((world / "vqa_test.json").read_text())
    unlabelled = [{key: value for key, value in one.items() if key != "answer"} for one in questions]
    for one in unlabelled:
        one["image"] = str(world / one["image"])
    (tmp_path / "questions.json").write_text(json.dumps(unlabelled))
    options = (
        "data.val=null",
        "evaluate={every: null, best: null}",
        f"data.test.source.files=[{tmp_path / 'questions.json'}]",
        "data.test.annotations=",
    )
    run = tmp_path / "run"
    assert train(*small("vqa"), *options, "steps=1", "--run", run) == 0
    results = json.loads((run / "eval/test-00000001/vqa_result.json").read_text())
    assert {one["question_id"] for one in results} == {one["question_id"] for one in questions}
    assert json.loads((run / "eval/test-00000001.json").read_text()) == {}
