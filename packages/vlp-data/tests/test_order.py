"""The order is a pure function of seed and position."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from vlp_data.order import Order, generator


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
