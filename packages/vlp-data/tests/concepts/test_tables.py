"""Lists, vocabularies and vectors survive the way through both formats; paths move as asked."""

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from vlp_data.concepts import tables
from vlp_data.errors import DataError

ROWS = [
    {"image": "a.jpg", "caption": "a dog", "image_id": 1, "kwords": ["dog", "grass"]},
    {"image": "b.jpg", "caption": "Hund \u00fc", "kwords": []},
    {"image": "c.jpg", "caption": "x", "answer": ["yes", "no"]},
    {"image": "d.jpg", "caption": "y", "answer": "yes", "title": None, "box": {"x": 1}, "score": 0.5},
]
VALUES = st.one_of(
    st.text(max_size=3),
    st.integers(-(2**70), 2**70),
    st.floats(allow_nan=False),
    st.booleans(),
    st.none(),
    st.lists(st.one_of(st.text(max_size=2), st.integers(-9, 9), st.none()), max_size=3),
    st.dictionaries(st.sampled_from("xy"), st.integers(-9, 9), max_size=2),
)


@pytest.mark.parametrize("suffix", [".json", ".parquet"])
def test_lists_survive_both_formats(tmp_path: Path, suffix: str) -> None:
    file = str(tmp_path / f"list{suffix}")
    tables.write_list(file, tables.from_rows(ROWS))
    assert tables.to_rows(tables.read_list(file)) == ROWS
    # Concatenated with a list of other fields and types.
    (tmp_path / "other.json").write_text('[{"image": 7, "extra": true}]')
    both = tables.read_list([file, str(tmp_path / "other.json")])
    assert tables.to_rows(both) == [*ROWS, {"image": 7, "extra": True}]


@given(st.lists(st.dictionaries(st.sampled_from(["a", "b"]), VALUES), min_size=1, max_size=4))
def test_any_json_object_survives_a_table(rows: list[dict]) -> None:
    table = tables.from_rows(rows)
    # A row without any field is a row still.
    assert table.num_rows == (len(rows) if table.num_columns else 0)
    if table.num_columns:
        found = tables.to_rows(table)
        assert [json.dumps(row, sort_keys=True) for row in found] == [
            json.dumps(row, sort_keys=True) for row in rows
        ]


def test_lists_that_are_none_are_refused(tmp_path: Path) -> None:
    for content, message in (
        ("[]", "no rows in"),
        ("[1]", "entry 0 must be an object"),
        ("{}", "expected a JSON list"),
    ):
        (tmp_path / "list.json").write_text(content)
        with pytest.raises(DataError, match=message):
            tables.read_list(str(tmp_path / "list.json"))
    with pytest.raises(DataError, match=r"written as \.json or \.parquet"):
        tables.write_list(str(tmp_path / "list.csv"), tables.from_rows(ROWS))
    (tmp_path / "list.parquet").write_bytes(b"no")
    with pytest.raises(DataError, match="is no Parquet file"):
        tables.read_list(str(tmp_path / "list.parquet"))
    with pytest.raises(FileNotFoundError, match=r"gone\.parquet not found"):
        tables.read_list(str(tmp_path / "gone.parquet"))
    table = tables.from_rows(ROWS)
    with pytest.raises(DataError, match="no field `name`, only image"):
        tables.texts_of(table, "name")
    with pytest.raises(DataError, match="must be one string in every row"):
        tables.texts_of(table, "answer")


def test_vocabularies_survive_both_formats_and_the_reference_counts(tmp_path: Path) -> None:
    counts = {"dog": 3, "a \u00fc": 2}
    tables.write_vocabulary(str(tmp_path / "v.parquet"), counts)
    assert tables.read_vocabulary(str(tmp_path / "v.parquet")) == counts
    tables.write_vocabulary(str(tmp_path / "v.json"), counts)
    assert json.loads((tmp_path / "v.json").read_text()) == list(counts)
    assert tables.read_vocabulary(str(tmp_path / "v.json")) == {"dog": None, "a \u00fc": None}
    (tmp_path / "v.json").write_text('{"dog": 2, "cat": 0}')
    assert tables.read_vocabulary(str(tmp_path / "v.json")) == {"dog": 3, "cat": 1}
    for content, message in (
        ('["a", "a"]', "listed twice"),
        ("[]", "must hold concepts"),
        ('[""]', "not empty"),
    ):
        (tmp_path / "v.json").write_text(content)
        with pytest.raises(DataError, match=message):
            tables.read_vocabulary(str(tmp_path / "v.json"))


@pytest.mark.parametrize("suffix", [".json", ".parquet"])
@pytest.mark.parametrize("kind", ["float16", "float32"])
def test_vectors_survive_both_formats(tmp_path: Path, suffix: str, kind: str) -> None:
    values = np.random.default_rng(0).normal(size=(3, 5)).astype(kind)
    blank = np.where([[True], [False], [True]], values, 0).astype(kind)
    table = tables.vector_table(["a", "b", "c"], blank, [None, "broken", None])
    vectors = tables.vectors_of(table, "x")
    assert vectors.problems == {"b": "broken"}
    file = str(tmp_path / f"vectors{suffix}")
    tables.write_vectors(file, vectors)
    found = tables.read_vectors(file)
    assert found.keys.to_pylist() == ["a", "c"]
    assert found.problems == ({} if suffix == ".json" else {"b": "broken"})
    np.testing.assert_array_equal(found.values, values[[0, 2]])


def test_vectors_that_are_none_are_refused(tmp_path: Path) -> None:
    for content, message in (
        ('{"a": [[1, 2]], "b": [[1]]}', r"one length, found \[1, 2\]"),
        ('{"a": "x"}', "the value of 'a' must be one vector"),
    ):
        (tmp_path / "v.json").write_text(content)
        with pytest.raises(DataError, match=message):
            tables.read_vectors(str(tmp_path / "v.json"))
    with pytest.raises(DataError, match="holds no vectors"):
        tables.vectors_of(tables.from_rows(ROWS), "x")
    with pytest.raises(DataError, match="a key occurs twice"):
        tables.vectors_of(tables.vector_table(["a", "a"], np.ones((2, 1), np.float32)), "x")


def test_images_of_lists_move() -> None:
    table = tables.with_images(
        tables.from_rows([{"image": "a"}, {"images": ["b", "c"]}]), lambda path: f"x/{path}"
    )
    assert tables.to_rows(table) == [{"image": "x/a"}, {"images": ["x/b", "x/c"]}]
