"""The recipe loader: every behaviour users rely on, and agreement with pydantic on what a type admits."""

import dataclasses
import subprocess
import sys
from dataclasses import dataclass, field
from typing import Any, Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st
from vlp_core import recipe as recipes
from vlp_core.recipe import PathText, RecipeError


@dataclass(frozen=True, kw_only=True)
class Lines:
    format: Literal["lines"] = "lines"
    files: tuple[PathText, ...]
    """Files or folders."""


@dataclass(frozen=True, kw_only=True)
class Coco:
    format: Literal["coco"] = "coco"
    root: PathText
    """Folder."""
    split: Literal["train", "val"] = "train"
    """Split."""


@dataclass(frozen=True, kw_only=True)
class Optimizer:
    lr: float
    """Peak rate, over
    two lines."""
    betas: tuple[float, float] = (0.9, 0.999)
    warmup: int | float = 0

    def __post_init__(self) -> None:
        if self.lr <= 0:
            raise ValueError(f"lr={self.lr} must be positive")


@dataclass(frozen=True, kw_only=True)
class Base:
    about: str
    """One line."""
    seed: int = 0


@dataclass(frozen=True, kw_only=True)
class Recipe(Base):
    steps: int = 100
    fast: bool = False
    precision: Literal["fp32", "bf16"] = "fp32"
    clip: float | None = None
    weights: PathText | None = None
    """Checkpoint."""
    optimizer: Optimizer
    """How to optimise."""
    sources: tuple[Lines | Coco, ...] = ()
    source: Lines | Coco | None = None
    limits: dict[str, int] = field(default_factory=dict)
    name: str | tuple[str, ...] = "x"

    def __post_init__(self) -> None:
        if self.fast and self.precision == "fp32":
            raise ValueError("fast needs precision=bf16")


MINIMAL: dict[str, Any] = {"about": "a", "optimizer": {"lr": 0.1}}


def make(*overrides: str, **values: Any) -> Recipe:
    return recipes.build(Recipe, MINIMAL | values, overrides)


def problems(*overrides: str, **values: Any) -> tuple[str, ...]:
    with pytest.raises(RecipeError) as caught:
        make(*overrides, **values)
    return caught.value.problems


# ---------------------------------------------------------------------------------------------------- YAML


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-4", 1e-4),
        ("-2E3", -2000.0),
        ("1.", 1.0),
        (".5", 0.5),
        ("6.02e+23", 6.02e23),
        ("12", 12),
        ("010", 10),
        ("0o17", 15),
        ("0x1F", 31),
        ("-7", -7),
        ("true", True),
        ("null", None),
        ("~", None),
        ("", None),
        ("on", "on"),
        ("no", "no"),
        ("1_000", "1_000"),
        ("12:30", "12:30"),
        ("2024-01-01", "2024-01-01"),
        ("1e", "1e"),
        ("'1e-4'", "1e-4"),
        ("=", "="),
        ("[a, 1e-3, {b: c}]", ["a", 1e-3, {"b": "c"}]),
    ],
)
def test_scalars_follow_yaml_1_2(text, value):
    found = recipes.parse(text)
    assert found == value
    assert type(found) is type(value)


def test_infinity_and_nan_are_floats():
    low, high, none = recipes.parse("[-.inf, .inf, .nan]")
    assert (low, high) == (float("-inf"), float("inf"))
    assert none != none


@pytest.mark.parametrize("loader", ["C", "Python"])
def test_both_parsers_of_pyyaml_agree(loader, monkeypatch):
    import yaml

    if loader == "Python":
        monkeypatch.delattr(yaml, "CSafeLoader", raising=False)
    recipes._loader.cache_clear()
    try:
        assert recipes.parse("a: 1e-4\nb: [010, on, null]") == {"a": 1e-4, "b": [10, "on", None]}
        with pytest.raises(RecipeError, match="line 2, column 1: key 'a' is given twice"):
            recipes.parse("a: 1\na: 2")
        with pytest.raises(RecipeError, match="key 1 is not text"):
            recipes.parse("1: 2")
    finally:
        recipes._loader.cache_clear()


def test_tags_that_would_build_objects_are_refused():
    with pytest.raises(RecipeError, match="could not determine a constructor"):
        recipes.parse("!!python/object/apply:os.getcwd []")


def test_file_errors_name_the_file(tmp_path):
    (tmp_path / "list.yaml").write_text("- a")
    (tmp_path / "latin.yaml").write_bytes(b"about: \xe9\n")
    with pytest.raises(FileNotFoundError, match=r"none\.yaml not found"):
        recipes.read(tmp_path / "none.yaml")
    with pytest.raises(RecipeError, match=r"list\.yaml:\n  holds \['a'\], expected `key: value` lines"):
        recipes.read(tmp_path / "list.yaml")
    with pytest.raises(RecipeError, match=r"latin\.yaml:\n  is not UTF-8"):
        recipes.read(tmp_path / "latin.yaml")


# ----------------------------------------------------------------------------------------------------------
# overrides


def test_values_of_overrides_are_yaml():
    recipe = make(
        "optimizer.lr=1e-4", "clip=null", "sources=[{format: lines, files: [a, b]}]", "fast=false", "seed=-1"
    )
    assert recipe.optimizer.lr == 1e-4
    assert recipe.sources == (Lines(files=("a", "b")),)
    assert recipe.seed == -1


def test_later_override_wins_and_the_original_is_untouched():
    values = {"about": "a", "optimizer": {"lr": 0.1}}
    changed = recipes.apply_overrides(values, ["optimizer.lr=1", "optimizer.lr=2", "new.section.key=3"])
    assert changed == {"about": "a", "optimizer": {"lr": 2}, "new": {"section": {"key": 3}}}
    assert values == {"about": "a", "optimizer": {"lr": 0.1}}


def test_list_items_are_addressed_by_number():
    sources = [{"format": "lines", "files": ["a"]}, {"format": "coco", "root": "b"}]
    recipe = make("sources.0.files=[c]", "sources.1.split=val", sources=sources)
    assert recipe.sources == (Lines(files=("c",)), Coco(root="b", split="val"))


def test_override_replaces_a_null_or_missing_section():
    assert make("source.format=coco", "source.root=r", source=None).source == Coco(root="r")
    assert make("source.format=coco", "source.root=r", source="???").source == Coco(root="r")


def test_value_may_hold_equal_signs_and_spaces():
    assert make("about=a=b c").about == "a=b c"


def test_text_field_takes_a_number_as_typed():
    assert make("about=2026", "name=1.50").about == "2026"
    assert make("name=1.50").name == "1.50"
    assert problems(about=2026) == ("about: expected text, got 2026",)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("seed", "seed: not of the form key=value"),
        ("=3", "=3: '' is not a dotted key"),
        ("a..b=3", "a..b=3: 'a..b' is not a dotted key"),
        ("seed.x=3", "seed.x: seed is 1, it has no keys"),
        ("sources.x=3", "sources.x: sources is a list; use the number of an item, such as sources.0"),
        ("sources.2.root=3", "sources.2: sources has 1 items, numbered from 0"),
        ("limits=[1", "limits=[1: the value is not YAML"),
    ],
)
def test_malformed_override_is_explained(override, message):
    found = problems(override, "about=b", seed=1, sources=[{"format": "coco", "root": "r"}])
    assert len(found) == 1
    assert found[0].startswith(message)


# ---------------------------------------------------------------------------------------------------------
# validation


def test_all_problems_at_once(tmp_path):
    file = tmp_path / "r.yaml"
    file.write_text(
        "stepz: 3\nprecision: bf61\noptimizer: {lrr: 1, betas: [0.9]}\nsource: {format: cocoo}\nlimits: {a: "
        "x}\n"
    )
    with pytest.raises(RecipeError) as caught:
        recipes.load(file, Recipe, ["fast=maybe", "nonsense"])
    assert caught.value.problems == (
        "nonsense: not of the form key=value",
        "stepz: unknown key; did you mean steps?",
        "about: required (text); give about=...",
        "fast: expected true or false, got 'maybe'",
        "precision: expected one of fp32, bf16, got 'bf61'; did you mean bf16?",
        "optimizer.lrr: unknown key; did you mean optimizer.lr?",
        "optimizer.lr: required (float); give optimizer.lr=...",
        "optimizer.betas: expected 2 items, got 1: [0.9]",
        "source.format: expected one of lines, coco, got 'cocoo'; did you mean coco?",
        "limits.a: expected int, got 'x'",
    )
    assert str(caught.value).startswith(f"{file}:\n  nonsense")


@pytest.mark.parametrize(
    ("override", "hint"),
    [
        ("optimiser.lr=1", "optimiser: unknown key; did you mean optimizer?"),
        ("lr=1", "lr: unknown key; did you mean optimizer.lr?"),
        (
            "source={format: coco, root: r, splitt: val}",
            "source.splitt: unknown key; did you mean source.split?",
        ),
        ("zzz=1", "zzz: unknown key; known here: about, seed, steps"),
    ],
)
def test_unknown_key_gets_the_nearest_at_any_depth(override, hint):
    (found,) = problems(override)
    assert found.startswith(hint)


def test_required_values_are_reported_together():
    found = problems(about="???", optimizer={"lr": "???"}, source="???", sources=["???"])
    assert found == (
        "about: required (text); give about=...",
        "optimizer.lr: required (float); give optimizer.lr=...",
        "sources.0: required (mapping or mapping); give sources.0=...",
        "source: required (mapping or mapping or null); give source=...",
    )


@pytest.mark.parametrize(
    ("override", "value"),
    [
        ("optimizer.lr=1", 1.0),
        ("optimizer.lr='1e-4'", 1e-4),
        ("steps=2e5", 200000),
        ("optimizer.warmup=2", 2),
        ("optimizer.warmup=0.5", 0.5),
        ("optimizer.warmup=2.0", 2.0),
        ("name=a", "a"),
        ("name=[a, b]", ("a", "b")),
        ("weights=null", None),
        ("limits={a: 1}", {"a": 1}),
    ],
)
def test_what_types_admit(override, value):
    found: Any = make(override)
    for part in override.partition("=")[0].split("."):
        found = getattr(found, part)
    assert found == value
    assert type(found) is type(value)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("steps=1.5", "steps: expected int, got 1.5"),
        ("steps=true", "steps: expected int, got true"),
        ("steps=null", "steps: expected int, got null"),
        ("steps='3'", "steps: expected int, got '3'"),
        ("fast=1", "fast: expected true or false, got 1"),
        ("clip=abc", "clip: expected float or null, got 'abc'"),
        ("optimizer.lr=abc", "optimizer.lr: expected float, got 'abc'"),
        ("optimizer.betas=0.9", "optimizer.betas: expected list of 2 (float, float), got 0.9"),
        ("optimizer=3", "optimizer: expected mapping, got 3"),
        ("optimizer=null", "optimizer: expected mapping, got null"),
        ("source={}", "source.format: required (one of lines, coco); give source.format=..."),
        ("sources=[{format: lines}]", "sources.0.files: required (list of path); give sources.0.files=..."),
        ("name=[a, 1]", "name.1: expected text, got 1"),
        ("weights=[a]", "weights: expected path or null, got ['a']"),
    ],
)
def test_wrong_type_is_explained(override, message):
    assert problems(override) == (message,)


def test_rules_of_a_section_are_reported_with_its_key():
    assert problems("optimizer.lr=-1", "precision=fp16") == (
        "precision: expected one of fp32, bf16, got 'fp16'; did you mean bf16?",
        "optimizer: lr=-1.0 must be positive",
    )
    assert problems("fast=true") == ("fast needs precision=bf16",)


def test_environment_is_read_in_path_fields_only(monkeypatch):
    monkeypatch.setenv("DATA", "/mnt")
    monkeypatch.delenv("NOWHERE", raising=False)
    recipe = make("weights=${env:DATA}/w.pt", "sources=[{format: lines, files: [s3://b/${env:DATA}, c]}]")
    assert recipe.weights == "/mnt/w.pt"
    assert recipe.sources[0].files == ("s3://b//mnt", "c")
    assert problems("weights=${env:NOWHERE}", "about=${env:DATA}") == (
        "about: '${env:DATA}': ${env:NAME} is replaced in path fields only",
        "weights: '${env:NOWHERE}': environment variable NOWHERE is not set",
    )


def test_recipe_is_frozen():
    recipe = make()
    with pytest.raises(dataclasses.FrozenInstanceError):
        recipe.steps = 3  # type: ignore[misc]  # frozen: that it fails is the test
    with pytest.raises(dataclasses.FrozenInstanceError):
        recipe.optimizer.lr = 3  # type: ignore[misc]  # frozen, too


def test_schema_with_a_type_that_yaml_cannot_hold_is_the_programmers_error():
    @dataclass(frozen=True, kw_only=True)
    class Bad:
        value: complex = 0j

    with pytest.raises(TypeError, match="value: a schema cannot have a field of type"):
        recipes.build(Bad, {"value": 1})


def test_union_without_a_common_literal_is_the_programmers_error():
    @dataclass(frozen=True, kw_only=True)
    class Outer:
        value: Optimizer | Lines

    with pytest.raises(TypeError, match="no Literal field in common"):
        recipes.build(Outer, {"value": {}})


# -------------------------------------------------------------------------------------- there and back, other
# libraries

TEXT = st.text(st.characters(codec="utf-8", exclude_categories=("Cs", "Cc")), max_size=12).filter(
    lambda text: text != "???" and "${env" not in text
) | st.sampled_from(
    ["1e-4", "null", "on", "010", "1.0", "~", "true", "- a", "a: b", "#", "", " x ", "0x1f", ".inf"]
)
NUMBER = st.floats(allow_nan=False)
RECIPES = st.builds(
    Recipe,
    about=TEXT,
    seed=st.integers(),
    steps=st.integers(),
    clip=st.none() | NUMBER,
    weights=st.none() | TEXT,
    optimizer=st.builds(Optimizer, lr=st.floats(min_value=1e-300), warmup=st.integers() | NUMBER),
    sources=st.lists(
        st.builds(Lines, files=st.lists(TEXT, max_size=2).map(tuple)) | st.builds(Coco, root=TEXT), max_size=2
    ).map(tuple),
    source=st.none() | st.builds(Coco, root=TEXT),
    limits=st.dictionaries(TEXT, st.integers(), max_size=2),
    name=TEXT | st.lists(TEXT, max_size=2).map(tuple),
)


@given(RECIPES)
def test_written_and_read_is_the_identity(recipe):
    text = recipes.dumps(recipe)
    assert text.isascii()
    assert recipes.build(Recipe, recipes.parse(text)) == recipe
    assert recipes.dumps(recipes.build(Recipe, recipes.parse(text))) == text


@given(TEXT | NUMBER | st.integers() | st.none() | st.lists(TEXT | st.integers(), max_size=3))
def test_inline_is_one_line_of_yaml(value):
    text = recipes.inline(value)
    assert "\n" not in text
    assert recipes.parse(text) == value


SCALARS = st.one_of(
    st.booleans(),
    st.integers(-3, 3),
    st.sampled_from([0.5, 2.0]),
    st.sampled_from(["a", "b", "z"]),
    st.none(),
)


@given(
    st.recursive(
        SCALARS,
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from("ab"), inner),
        max_leaves=4,
    )
)
def test_types_admit_what_pydantic_admits(value):
    """Strict pydantic is the judge; where the loader is more generous on purpose, its own conversion goes
    first."""
    from pydantic import ConfigDict, TypeAdapter, ValidationError

    for hint in (
        bool,
        int,
        float,
        str,
        int | None,
        bool | str,
        int | float,
        Literal["a", "b"],
        tuple[int, ...],
        tuple[str, int],
        dict[str, int],
        tuple[int, ...] | str,
        dict[str, tuple[float, ...]] | None,
    ):
        schema = dataclasses.make_dataclass("Schema", [("x", hint)], frozen=True, kw_only=True)
        judged: Any = _generous(value, hint)
        try:
            expected = TypeAdapter(hint, config=ConfigDict(strict=True)).validate_python(_tuples(judged))
        except ValidationError:
            with pytest.raises(RecipeError):
                recipes.build(schema, {"x": value})
        else:
            found = recipes.build(schema, {"x": value}).x
            assert found == expected
            assert type(found) is type(expected)


def _tuples(value: Any) -> Any:
    if isinstance(value, list):
        return tuple(_tuples(item) for item in value)
    return {key: _tuples(item) for key, item in value.items()} if isinstance(value, dict) else value


def _generous(value: Any, hint: Any) -> Any:
    """An integral float counts as an int where no float is asked for."""
    if "float" in str(hint):
        return value
    if isinstance(value, float) and "int" in str(hint) and value.is_integer():
        return int(value)
    if isinstance(value, list):
        return [_generous(item, hint) for item in value]
    return {key: _generous(item, hint) for key, item in value.items()} if isinstance(value, dict) else value


# --------------------------------------------------------------------------------------------------------
# description


def test_describe_gives_type_origin_and_docstring():
    values = {"about": "a", "optimizer": {"lr": 0.1}, "sources": [{"format": "coco", "root": "r"}]}
    overrides = ["optimizer.lr=2", "limits={a: 1}"]
    recipe = recipes.build(Recipe, recipes.apply_overrides(values, overrides))
    lines = {line.key: line for line in recipes.describe(recipe, values, overrides)}
    assert lines["about"] == ("about", "text", "a", "recipe", "One line.")
    assert lines["optimizer.lr"] == (
        "optimizer.lr",
        "float",
        2.0,
        "command line",
        "Peak rate, over two lines.",
    )
    assert lines["sources.0.split"] == ("sources.0.split", "one of train, val", "train", "default", "Split.")
    assert lines["sources.0.root"].origin == "recipe"
    assert lines["limits"][1:4] == ("mapping of int", {"a": 1}, "command line")
    assert lines["weights"][1:4] == ("path or null", None, "default")
    assert lines["optimizer.warmup"].kind == "int or float"


def test_differences_name_what_changed():
    before = recipes.dump(make("sources=[{format: coco, root: r}]", "seed=1"))
    after = recipes.dump(make("sources=[{format: coco, root: s}]", "optimizer.warmup=0.0", "seed=1"))
    assert recipes.differences(before, before) == []
    changed = recipes.differences(before, after)
    assert [(d.key, d.before, d.after) for d in changed] == [
        ("optimizer.warmup", 0, 0.0),
        ("sources.0.root", "r", "s"),
    ]
    (gone,) = recipes.differences({"a": 1, "b": 2}, {"a": 1})
    assert repr(gone.after) == "(absent)"


def test_import_loads_no_torch_and_no_yaml():
    code = "import sys, vlp_core.recipe; assert not {'torch', 'numpy', 'yaml', 'pydantic'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
