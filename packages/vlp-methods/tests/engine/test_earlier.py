"""Recipes and run folders of earlier versions are read as if they had been written today."""

import logging

import pytest
import torch
from safetensors.torch import load_file
from vlp_core import recipe as recipes
from vlp_methods.engine import earlier
from vlp_methods.engine.entry import load, shipped

OF_TODAY = {
    "data": {
        "view": {"kind": "squash", "crop": "none", "size": 48},
        "tokenizer": {"kind": "wordpiece", "files": ["vocab.txt"]},
        "regions": {"images": 8},
        "train": {"images": 4},
    },
    "answers": {"mode": "generate", "answer_tokens": 12},
    "heat": {"mode": "itm", "layer": 9},
    "gather_gradient": "sum",
}
OF_BEFORE = {
    "data": {
        "view": {"view": "resize", "size": 48},
        "tokenizer": {"kind": "bert", "files": ["vocab.txt"]},
        "regions": {"pictures": 8},
        "train": {"pictures": 4},
    },
    "answers": {"mode": "generate", "max_tokens": 12},
    "heat": {"mode": "itm"},
    "gather_gradient": "full",
}


def test_every_key_of_before_has_its_name_of_today():
    found, notes = earlier.upgrade(OF_BEFORE)
    assert found == OF_TODAY
    assert notes == [
        "data.view as data.view.kind=squash",
        "data.view.view as data.view.crop",
        "data.tokenizer.kind=bert as wordpiece",
        "data.regions.pictures as data.regions.images",
        "data.train.pictures as data.train.images",
        "gather_gradient=full as sum",
        "answers.max_tokens as answers.answer_tokens",
        "heat.layer=9",
    ]
    assert "pictures" in OF_BEFORE["data"]["regions"]  # the values that were given stay as they are


@pytest.mark.parametrize(
    "values", [OF_TODAY, {}, {"data": None, "answers": "???"}, {"data": {"view": "???", "tokenizer": None}}]
)
def test_values_of_today_and_strange_ones_stay(values):
    assert earlier.upgrade(values) == (values, [])


@pytest.mark.parametrize("name", [name for name in shipped() if not name.startswith("toy/")])
def test_shipped_recipes_are_of_today(name):
    values = recipes.read(shipped()[name])
    assert earlier.upgrade(values) == (values, [])


def as_before(text: str) -> str:
    """A recipe.yaml as the version before wrote it."""
    values = recipes.parse(text)
    view = values["data"]["view"]
    for key in ("kind", "mean", "std"):
        del view[key]
    view["view"] = {"none": "resize", "random": "random_resized_crop"}[view.pop("crop")]
    values["data"]["tokenizer"] = {"kind": "bert", "files": values["data"]["tokenizer"]["files"]}
    regions = values["data"]["regions"]
    regions["pictures"] = regions.pop("images")
    return recipes.dumps(values)


def test_run_and_file_of_before_go_on_with_one_line_that_says_so(train, tiny_of, tmp_path, losses, caplog):
    tiny = tiny_of("xvlm")
    constant = ("save.every=1", "schedule={kind: constant, warmup_steps: 0}", "data.test=null")
    assert train(*tiny, *constant, "steps=3", "--run", tmp_path / "whole") == 0
    run = tmp_path / "run"
    assert train(*tiny, *constant, "steps=2", "--run", run) == 0
    recipe = run / "recipe.yaml"
    mine = tmp_path / "mine.yaml"
    for file in (mine, recipe):
        file.write_text(as_before((run / "recipe.yaml").read_text() if file == mine else recipe.read_text()))
    caplog.set_level(logging.WARNING)
    assert train(mine, "steps=3", "--run", run) == 0
    said = [record.getMessage() for record in caplog.records if "earlier version" in record.getMessage()]
    assert any(line.startswith(str(mine)) for line in said)
    assert all("data.regions.pictures as data.regions.images" in line for line in said)
    assert losses(run) == losses(tmp_path / "whole")
    first, second = (
        load_file(folder / "checkpoints/step-00000003/model.safetensors")
        for folder in (run, tmp_path / "whole")
    )
    assert all(torch.equal(first[name], second[name]) for name in second)
    assert recipes.read(recipe)["data"]["view"]["kind"] == "squash"  # written anew


def test_recipe_of_before_shows_its_keys_of_today(tmp_path):
    file = tmp_path / "old.yaml"
    file.write_text(as_before(recipes.dumps(load("xvlm/shapes").settings)))
    assert load(str(file)).settings == load("xvlm/shapes").settings
