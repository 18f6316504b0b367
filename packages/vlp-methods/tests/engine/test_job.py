import pytest
from vlp_methods.engine.job import Mixing


def test_each_stream_runs_by_its_own_probability_and_in_order():
    mixing = Mixing((("regions", 0.5), ("images", 1.0)))
    steps = [mixing.names(0, step) for step in range(4000)]
    assert set(steps) == {("regions", "images"), ("images",)}
    assert abs(sum(len(names) == 2 for names in steps) / 4000 - 0.5) < 0.03


def test_one_stream_per_step_by_ratio():
    mixing = Mixing.one_of({"caption": 3, "detect": 1, "never": 0})
    steps = [mixing.names(5, step) for step in range(4000)]
    assert set(steps) == {("caption",), ("detect",)}
    assert abs(steps.count(("caption",)) / 4000 - 0.75) < 0.03


def test_choice_is_a_pure_function_of_seed_and_step():
    mixing = Mixing((("regions", 0.5), ("images", 1.0)))
    forwards = [mixing.names(3, step) for step in range(50)]
    assert [mixing.names(3, step) for step in reversed(range(50))] == forwards[::-1]
    assert forwards != [mixing.names(4, step) for step in range(50)]
    # Written down, so that a change of the rule (which would break resuming older runs) is noticed.
    assert [len(names) for names in forwards[:12]] == [1, 2, 1, 2, 1, 1, 2, 1, 1, 1, 2, 2]


@pytest.mark.parametrize(
    ("streams", "rule", "message"),
    [
        ((("a", 0.5),), "each", "one of them is 1"),
        ((("a", 1.0), ("b", -0.1)), "each", r"in \[0, 1\]"),
        ((("a", 1.0), ("b", 1.5)), "each", r"in \[0, 1\]"),
        ((("a", 1.0), ("a", 0.5)), "each", "different names"),
        ((), "one", "different names"),
        ((("a", 0.0),), "one", "one must be positive"),
    ],
)
def test_impossible_mixing_is_refused(streams, rule, message):
    with pytest.raises(ValueError, match=message):
        Mixing(streams, rule)
