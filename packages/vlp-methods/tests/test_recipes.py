"""What holds for every shipped recipe, whatever the method."""

from typing import Any

import pytest
from vlp_core import recipe as recipes
from vlp_core.recipe import build, dumps, parse
from vlp_methods.engine.entry import load, shipped

ROBERTA = "data.tokenizer.files=[vocab.json, merges.txt]"


def settings(name: str, *more: str) -> Any:
    """A recipe with a value for every key that it leaves to the user."""
    values = recipes.read(shipped()[name])
    given = []
    for key in left_open(values):
        number = key in ("steps", "schedule.steps_per_epoch", "teacher.ramp_steps")
        given.append(f"{key}={100 if number else 'x'}")
    return load(name, [*given, *more]).settings


def left_open(values: Any, path: str = "") -> list[str]:
    """Keys whose value is ???."""
    if values == "???":
        return [path]
    items = (
        enumerate(values) if isinstance(values, list) else values.items() if isinstance(values, dict) else ()
    )
    return [key for name, value in items for key in left_open(value, f"{path}.{name}" if path else str(name))]


ALL = sorted(shipped())
TWINS = [name for name in ALL if "/shapes_" in name]


@pytest.mark.parametrize("name", ALL)
def test_resolved_recipe_is_a_recipe(name):
    recipe = settings(name)
    assert build(type(recipe), parse(dumps(recipe))) == recipe


@pytest.mark.parametrize("name", TWINS)
def test_twin_starts_from_the_shapes_pretraining(name):
    """Its encoders and its world are those of METHOD/shapes, so that run's export fits."""
    shapes, twin = settings(f"{name.partition('/')[0]}/shapes"), settings(name)
    for section in ("vision", "text", "concepts"):
        assert getattr(twin.model, section) == getattr(shapes.model, section), section
    assert (twin.data.world, twin.data.tokenizer) == (shapes.data.world, shapes.data.tokenizer)
    if hasattr(twin.model, "embed_width"):
        assert twin.model.embed_width == shapes.model.embed_width


@pytest.mark.parametrize("name", ALL)
def test_test_data_never_selects(name):
    best = settings(name).evaluate.best
    assert best is None or best.startswith("val/")


@pytest.mark.parametrize("name", [name for name in ALL if "/shapes" not in name])
def test_official_recipe_of_a_task_has_a_twin(name):
    task = settings(name).task
    assert task in {settings(twin).task for twin in (f"{name.partition('/')[0]}/shapes", *TWINS)}
