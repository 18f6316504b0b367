"""The order is a pure function of seed and position."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from vlp_data.order import Order, Runs, generator, share


def test_every_sample_comes_once_per_epoch():
    order = Order(37, seed=3)
    taken = order.indices(0, 3 * 37)
    for epoch in range(3):
        assert sorted(i for e, i in taken if e == epoch) == list(range(37))
    assert [i for e, i in taken if e == 0] != [i for e, i in taken if e == 1]


@given(
    length=st.integers(1, 20), seed=st.integers(0, 10), position=st.integers(0, 100), count=st.integers(0, 50)
)
def test_positions_do_not_depend_on_how_they_are_asked_for(length, seed, position, count):
    together = Order(length, seed).indices(position, count)
    one_by_one = Order(length, seed)
    assert together == [one_by_one.indices(p, 1)[0] for p in range(position, position + count)]
    assert [e for e, _ in together] == [p // length for p in range(position, position + count)]


def test_the_order_never_changes_between_versions():
    # A change here would make every saved position point at other samples.
    assert [i for _, i in Order(10, seed=0).indices(0, 20)] == [
        *(0, 8, 9, 3, 7, 5, 1, 2, 6, 4),
        *(3, 7, 4, 2, 9, 8, 1, 6, 5, 0),
    ]
    assert generator(0, 1, 2).random() == 0.7209151272570041


def test_seeds_differ():
    assert Order(50, seed=0).indices(0, 50) != Order(50, seed=1).indices(0, 50)


def test_an_empty_source_is_refused():
    with pytest.raises(ValueError, match="holds no samples"):
        Order(0, seed=0)


def test_generators_are_told_apart_by_all_parts():
    assert generator(1, 2, 3).random() == generator(1, 2, 3).random()
    assert generator(1, 23).random() != generator(12, 3).random()


@pytest.mark.golden("xvlm", lambda case: case.has("sharding.json"))
def test_shares_are_those_of_the_reference(case):
    for row in case.json("sharding"):
        parts = [list(share(row["n"], part, row["shards"])) for part in range(row["shards"])]
        assert parts == row["slices"]


def test_file_by_file_keeps_the_lines_of_a_file_together():
    order = Order(24, seed=5, runs=Runs((7, 0, 9, 8)))
    files = [range(7), range(7, 16), range(16, 24)]
    seen = set()
    for epoch in range(12):
        taken = order.permutation(epoch).tolist()
        parts = []
        while taken:
            part = next(f for f in files if f[0] == taken[0])
            assert taken[: len(part)] == list(part)
            parts.append(part[0])
            taken = taken[len(part) :]
        assert sorted(parts) == [0, 7, 16]
        seen.add(tuple(parts))
    assert len(seen) > 3


@given(buffer=st.integers(1, 40), seed=st.integers(0, 5), epoch=st.integers(0, 3))
def test_a_buffer_mixes_nearby_lines(buffer, seed, epoch):
    plain = Order(60, seed, runs=Runs((20, 40))).permutation(epoch).tolist()
    mixed = Order(60, seed, runs=Runs((20, 40), buffer)).permutation(epoch).tolist()
    assert sorted(mixed) == list(range(60))
    assert all(abs(plain.index(line) - place) < buffer for place, line in enumerate(mixed))
    assert buffer < 5 or mixed != plain


def test_the_order_of_files_never_changes_between_versions():
    assert Order(8, seed=0, runs=Runs((3, 3, 2))).permutation(0).tolist() == [3, 4, 5, 6, 7, 0, 1, 2]
    assert Order(8, seed=0, runs=Runs((3, 3, 2), 3)).permutation(1).tolist() == [3, 4, 5, 6, 7, 1, 0, 2]


def test_runs_must_hold_the_samples():
    with pytest.raises(ValueError, match="the runs hold 5 samples, the source 6"):
        Order(6, seed=0, runs=Runs((2, 3)))
