"""Batches move, and are split, as a whole."""

from dataclasses import dataclass, fields
from typing import NamedTuple

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from vlp_data.batch import (
    Batch,
    CaptionReferencesBatch,
    Concepts,
    EntailmentBatch,
    ImageBatch,
    NlvrBatch,
    RegionBatch,
    VqaBatch,
)


def test_to_moves_every_tensor_and_keeps_the_rest():
    tensor = torch.zeros(2)
    names = [name for name in RegionBatch.__dataclass_fields__ if name not in ("keys", "padded_pairs")]
    batch = RegionBatch(keys=("a", "b"), padded_pairs=3, **dict.fromkeys(names, tensor))
    moved = batch.to("meta")
    assert {getattr(moved, name).device.type for name in names} == {"meta"}
    assert (moved.keys, moved.padded_pairs) == (("a", "b"), 3)
    assert batch.image.device.type == "cpu"


# ---------------------------------------------------------------------------------------- nested and ragged


class Pair(NamedTuple):
    left: object
    right: object


@dataclass(frozen=True)
class Record:
    value: object


@dataclass(frozen=True, kw_only=True)
class Ragged(Batch):
    """A batch as a method outside vlp may have it."""

    inside: object


def values(rows):
    """Whatever may stand in a field of a batch of so many rows."""
    tensor = st.builds(
        lambda width: torch.arange(rows * width, dtype=torch.float32).reshape(rows, width), st.integers(1, 3)
    )
    item = st.one_of(
        st.integers(0, 4).map(lambda count: torch.arange(4.0 * count).reshape(count, 4)),
        st.text(max_size=3),
        st.tuples(st.text(max_size=2), st.integers(0, 2).map(torch.ones)),
    )
    ragged = st.lists(item, min_size=rows, max_size=rows)
    leaf = st.one_of(tensor, ragged, ragged.map(tuple), st.integers(), st.none(), st.text(max_size=3))
    return st.recursive(
        leaf,
        lambda inner: st.one_of(
            st.builds(Pair, inner, inner),
            st.builds(Record, inner),
            st.dictionaries(st.text(max_size=3), inner, max_size=3),
        ),
        max_leaves=6,
    )


batches = st.integers(1, 7).flatmap(
    lambda rows: values(rows).map(
        lambda inside: Ragged(keys=tuple(f"row {n}" for n in range(rows)), inside=inside)
    )
)


def tensors(value):
    if isinstance(value, torch.Tensor):
        return [value]
    if isinstance(value, (Batch, Record)):
        return [t for field in fields(value) for t in tensors(getattr(value, field.name))]
    if isinstance(value, (tuple, list)):
        return [t for item in value for t in tensors(item)]
    if isinstance(value, dict):
        return [t for item in value.values() for t in tensors(item)]
    return []


def same(first, second):
    if isinstance(first, torch.Tensor):
        return first.shape == second.shape and torch.equal(first, second)
    assert type(first) is type(second)
    if isinstance(first, (Batch, Record)):
        return all(same(getattr(first, f.name), getattr(second, f.name)) for f in fields(first))
    if isinstance(first, dict):
        return first.keys() == second.keys() and all(same(first[k], second[k]) for k in first)
    if isinstance(first, (tuple, list)):
        return len(first) == len(second) and all(same(a, b) for a, b in zip(first, second, strict=True))
    return first == second


def joined(parts):
    """The opposite of `split`."""
    first = parts[0]
    if isinstance(first, torch.Tensor):
        return torch.cat(parts)
    if isinstance(first, (Batch, Record)):
        return type(first)(**{f.name: joined([getattr(p, f.name) for p in parts]) for f in fields(first)})
    if isinstance(first, Pair):
        return Pair(*map(joined, zip(*parts, strict=True)))
    if isinstance(first, dict):
        return {key: joined([part[key] for part in parts]) for key in first}
    if isinstance(first, (tuple, list)):
        return type(first)(item for part in parts for item in part)
    assert all(part == first for part in parts)
    return first


@given(batches)
def test_every_tensor_moves_however_deep_it_stands(batch):
    moved = batch.to("meta")
    assert [t.shape for t in tensors(moved)] == [t.shape for t in tensors(batch)]
    assert all(t.is_meta for t in tensors(moved)) and not any(t.is_meta for t in tensors(batch))
    assert same(batch.map(lambda tensor: tensor + 0), batch)


@given(batches, st.data())
def test_the_parts_of_a_batch_are_the_batch(batch, data):
    count = data.draw(st.integers(1, len(batch)))
    parts = batch.split(count)
    assert len(parts) == count and max(map(len, parts)) - min(map(len, parts)) <= 1
    assert same(joined(list(parts)), batch)


def test_a_split_into_too_many_parts_is_refused():
    batch = Ragged(keys=("a", "b"), inside=None)
    for parts in (0, 3):
        with pytest.raises(ValueError, match=f"2 rows cannot be split into {parts} batches"):
            batch.split(parts)


def test_a_field_that_does_not_count_the_rows_is_named():
    for inside in (torch.zeros(3, 2), ["a"], Pair(torch.zeros(2), torch.zeros(3))):
        with pytest.raises(ValueError, match=r"inside holds \d entries where 2 are to be split"):
            Ragged(keys=("a", "b"), inside=inside).split(2)


# ------------------------------------------------------------------------------------- fields of other axes


def concepts(count):
    return Concepts(torch.arange(count * 2).reshape(count, 2), torch.ones(count, 2))


def test_questions_take_their_answers_along():
    batch = VqaBatch(
        keys=("a", "b", "c"),
        image=torch.arange(3.0)[:, None],
        concepts=concepts(3),
        question_ids=torch.arange(3)[:, None],
        question_mask=torch.ones(3, 1),
        answer_ids=torch.arange(6)[:, None],
        answer_mask=torch.ones(6, 1),
        answer_weights=torch.arange(6.0),
        question_index=torch.tensor([0, 0, 1, 2, 2, 2]),
    )
    first, second = batch.split(2)
    assert first.question_index.tolist() == [0, 0] and first.answer_weights.tolist() == [0, 1]
    assert second.question_index.tolist() == [0, 1, 1, 1] and second.answer_ids.flatten().tolist() == [
        2,
        3,
        4,
        5,
    ]
    assert second.keys == ("b", "c") and second.image.flatten().tolist() == [1, 2]
    assert second.concepts.ids.tolist() == [[2, 3], [4, 5]]


def region_batch(image_index, **more):
    pairs = len(image_index)
    names = ("text_ids", "attention_mask", "masked_ids", "masked_positions", "masked_labels")
    row = torch.arange(pairs)[:, None]
    return RegionBatch(
        keys=tuple(str(n) for n in range(pairs)),
        image=torch.arange(4.0)[:, None],
        image_index=torch.tensor(image_index),
        image_attention_mask=row,
        **dict.fromkeys(names, row),
        target_boxes=row,
        is_image=row[:, 0],
        **more,
    )


def test_regions_take_their_images_along():
    batch = region_batch(
        [3, 0, 0, 1, 3, 1], padded_pairs=2, concepts=concepts(4), padding=torch.zeros(4, 2, 2)
    )
    parts = batch.split(3)
    for part, (start, stop) in zip(parts, ((0, 2), (2, 4), (4, 6)), strict=True):
        assert part.text_ids.flatten().tolist() == list(range(start, stop))
        # Every pair still points at its own image, and no other image is carried.
        expected = batch.image[batch.image_index[start:stop]]
        assert torch.equal(part.image[part.image_index], expected)
        assert set(part.image_index.tolist()) == set(range(len(part.image)))
        ids = batch.concepts.ids[batch.image_index[start:stop]]
        assert torch.equal(part.concepts.ids[part.image_index], ids)
        assert len(part.padding) == len(part.concepts.attention_mask) == len(part.image)
    assert [part.padded_pairs for part in parts] == [2, 0, 0]


def test_pairs_of_one_image_come_together():
    batch = region_batch([3, 0, 0, 1, 3, 1], padded_pairs=2).by_image()
    assert batch.image_index.tolist() == [0, 0, 1, 1, 3, 3]
    assert batch.keys == ("1", "2", "3", "5", "0", "4")
    assert batch.text_ids.flatten().tolist() == [1, 2, 3, 5, 0, 4]
    assert len(batch.image) == 4 and batch.padded_pairs == 2
    assert [len(part.image) for part in batch.split(3)] == [1, 1, 1]


def test_sentences_take_both_images_along():
    row = torch.arange(3)[:, None]
    batch = NlvrBatch(
        keys=("a", "b", "c"),
        image=torch.arange(6.0)[:, None],
        text_ids=row,
        attention_mask=row,
        labels=row[:, 0],
        concepts=concepts(3),
        second_concepts=concepts(3),
    )
    first, second = batch.split(2)
    assert first.image.flatten().tolist() == [0, 3] and second.image.flatten().tolist() == [1, 2, 4, 5]
    assert second.second_concepts.ids.tolist() == second.concepts.ids.tolist() == [[2, 3], [4, 5]]
    assert second.padding is None


def test_references_are_split_by_their_images():
    batch = CaptionReferencesBatch(
        keys=("a", "b"), image=torch.zeros(2, 1), references=(("one", "two"), ("three",))
    )
    assert [part.references for part in batch.split(2)] == [(("one", "two"),), (("three",),)]


def test_all_batches_with_images_share_their_fields():
    for kind in (RegionBatch, NlvrBatch, VqaBatch, EntailmentBatch):
        assert issubclass(kind, ImageBatch) and {"image", "padding", "concepts"} <= set(
            kind.__dataclass_fields__
        )
