"""Choosing concepts, lists that carry them, and filtering, against the reference's files."""

import json
import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from vlp_data.concepts import filtering, select, tables
from vlp_data.concepts.tables import from_rows, to_rows
from vlp_data.errors import DataError

SIM_TOLERANCE = 2e-3
"""The reference computes cosines in float16."""


def is_selection(case) -> bool:
    needed = {"keyword_embeddings", "image_embeddings", "dataset_with_kwords", "filtered"}
    return case.has("selection_and_filtering.json") and needed <= case.json("selection_and_filtering").keys()


@pytest.fixture
def chosen(case, tmp_path):
    """(the case, its choices, images and captions), read from the reference's JSON files."""
    golden = case.json("selection_and_filtering")
    for name in ("keyword", "image", "caption"):
        (tmp_path / f"{name}.json").write_text(json.dumps(golden[f"{name}_embeddings"]))
    concepts = select.read_concepts(str(tmp_path / "keyword.json"))
    images = tables.read_vectors(str(tmp_path / "image.json"))
    captions = tables.read_vectors(str(tmp_path / "caption.json"))
    choices = select.choose(images.keys, images.values, concepts, k=golden["k"], device="cpu")
    return golden, choices, images, captions


@pytest.mark.golden("vicha", is_selection)
def test_concepts_of_every_row_equal_the_reference(case, chosen) -> None:
    golden, choices, _, _ = chosen
    found = select.assign(from_rows(golden["dataset"]), choices)
    assert to_rows(found.rows) == golden["dataset_with_kwords"]
    relative = select.assign(
        from_rows(golden["relative_dataset"]), choices, root=golden["relative_image_root"]
    )
    assert to_rows(relative.rows) == golden["relative_dataset_with_kwords"]


@pytest.mark.golden("vicha", is_selection)
def test_both_images_of_a_pair_get_their_concepts(case, chosen) -> None:
    golden, choices, _, _ = chosen
    found = select.assign(from_rows(golden["nlvr_dataset"]), choices, missing="keep")
    assert to_rows(found.rows) == golden["nlvr_dataset_with_kwords"]


@pytest.mark.golden("vicha", is_selection)
def test_scores_equal_the_reference(case, chosen) -> None:
    golden, choices, _, _ = chosen
    names = list(golden["keyword_embeddings"])
    for row, expected in zip(choices.to_pylist(), golden["similarity_fp32"], strict=True):
        best = [expected[names.index(name)] for name in row["concepts"]]
        torch.testing.assert_close(torch.tensor(row["scores"]), torch.tensor(best), atol=1e-5, rtol=1e-4)


@pytest.mark.golden("vicha", is_selection)
def test_filtered_lists_equal_the_reference(case, chosen) -> None:
    golden, _, images, captions = chosen
    rows = filtering.score(from_rows(golden["dataset"]), images, captions)
    for fraction, expected in golden["filtered"].items():
        for kind, found in (
            ("percentage", filtering.best(rows, float(fraction))),
            ("per_image", filtering.best_per_image(rows, float(fraction), keep_one=False)),
        ):
            listed = to_rows(found)
            assert [(row["image"], row["caption"]) for row in listed] == [
                (row["image"], row["caption"]) for row in expected[kind]
            ]
            for row, other in zip(listed, expected[kind], strict=True):
                assert row["sim"] == pytest.approx(other["sim"], abs=SIM_TOLERANCE)


@given(st.integers(1, 40), st.integers(1, 60), st.data())
def test_nearest_is_the_sorted_matrix_product(rows: int, count: int, data: st.DataObject) -> None:
    k = data.draw(st.integers(1, count))
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 999)))
    images, concepts = (torch.randn(n, 8, generator=generator) for n in (rows, count))
    found = select.nearest(images, concepts, k=k)
    scores = torch.nn.functional.normalize(images) @ torch.nn.functional.normalize(concepts).T
    torch.testing.assert_close(found.scores, scores.topk(k).values)
    torch.testing.assert_close(scores.gather(1, found.ids), found.scores)
    assert all(len(set(row)) == k for row in found.ids.tolist())


def test_nearest_works_in_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    images, concepts = torch.randn(50, 8), torch.randn(30, 8)
    whole = select.nearest(images, concepts, k=4)
    monkeypatch.setattr(select, "BLOCK_BYTES", 4 * 40 * 7)
    blocks = select.nearest(images, concepts, k=4)
    torch.testing.assert_close(blocks.scores, whole.scores)
    assert torch.equal(blocks.ids, whole.ids)


def test_nearest_refuses_more_concepts_than_there_are() -> None:
    with pytest.raises(ValueError, match=r"k=5 must lie in 1\.\.4"):
        select.nearest(torch.ones(1, 2), torch.ones(4, 2), k=5)


def choices_of(names: dict[str, list[str] | None]):
    rows = [
        {"image": name, "concepts": words, "scores": None, "problem": None if words else "broken image"}
        for name, words in names.items()
    ]
    return select.pa.Table.from_pylist(rows)


def test_images_without_concepts_are_an_error_or_left_out() -> None:
    rows = from_rows([{"image": name, "caption": name} for name in ("a", "b", "c", "a")])
    choices = choices_of({"a": ["dog", "cat"], "b": None})
    with pytest.raises(
        DataError, match="2 images of the list have no concepts, the first is b: broken image"
    ):
        select.assign(rows, choices)
    found = select.assign(rows, choices, missing="drop")
    assert to_rows(found.rows) == [{"image": "a", "caption": "a", "kwords": ["dog", "cat"]}] * 2
    assert found.without == ["b", "c"]


def test_pairs_are_dropped_when_either_image_has_no_concepts() -> None:
    rows = from_rows([{"images": ["a", "b"], "kwords1": ["old"]}, {"images": ["a", "c"], "kwords1": ["old"]}])
    choices = choices_of({"a": ["dog"], "b": ["cat"]})
    found = select.assign(rows, choices, missing="drop")
    assert to_rows(found.rows) == [{"images": ["a", "b"], "kwords1": ["dog"], "kwords2": ["cat"]}]
    assert found.without == ["c"]
    assert select.distinct_images(rows).to_pylist() == ["a", "b", "c"]
    with pytest.raises(DataError, match="two paths in every row"):
        select.images_of(from_rows([{"images": ["a"]}]))


def test_vectors_of_other_models_are_refused() -> None:
    concepts = select.Vocabulary(select.pa.array(["a"]), torch.ones(1, 4))
    with pytest.raises(DataError, match="vectors of 3 numbers, the concepts of 4"):
        select.choose(select.pa.array(["x"]), np.ones((1, 3)), concepts, k=1, device="cpu")


def scored(*pairs: tuple[str, float]):
    return from_rows(
        [{"image": image, "caption": f"{image}{n}", "sim": sim} for n, (image, sim) in enumerate(pairs)]
    )


def test_an_image_with_one_caption_stays_unless_legacy() -> None:
    rows = scored(("a", 0.2), ("b", 0.9), ("a", 0.4), ("a", 0.3))
    assert [row["caption"] for row in to_rows(filtering.best_per_image(rows, 0.5))] == ["a2", "b1"]
    assert [row["caption"] for row in to_rows(filtering.best_per_image(rows, 0.5, keep_one=False))] == ["a2"]


@given(
    st.lists(st.tuples(st.sampled_from("abc"), st.sampled_from([0.25, 0.5, 0.75])), min_size=1),
    st.floats(0.01, 1),
)
def test_filters_keep_the_best_in_a_stable_order(pairs: list[tuple[str, float]], fraction: float) -> None:
    listed = to_rows(scored(*pairs))
    ranked = sorted(listed, key=lambda row: -row["sim"])
    assert to_rows(filtering.best(from_rows(listed), fraction)) == ranked[: int(fraction * len(listed))]
    expected = []
    for image in dict.fromkeys(row["image"] for row in listed):
        own = [row for row in ranked if row["image"] == image]
        expected += own[: max(1, math.floor(fraction * len(own)))]
    assert to_rows(filtering.best_per_image(from_rows(listed), fraction)) == expected


def test_filters_say_what_is_missing() -> None:
    with pytest.raises(DataError, match="no field `sim`"):
        filtering.best(from_rows([{"image": "a"}]), 0.5)
    with pytest.raises(ValueError, match="fraction=0"):
        filtering.best(scored(("a", 0.1)), 0)
    vectors = tables.vectors_of(tables.vector_table(["a"], np.ones((1, 2), np.float32)), "x")
    rows = from_rows([{"image": "a", "caption": "b"}])
    with pytest.raises(DataError, match="the caption of 1 rows has no vector, the first is 'b'"):
        filtering.score(rows, vectors, vectors)
