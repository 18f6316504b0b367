import pytest
from vlp_core.schedule import constant, cosine, linear, named, warmup_steps


def test_linear_rises_from_zero_and_falls_to_zero():
    factors = [linear(step, warmup=2, total_steps=6) for step in range(8)]
    assert factors == [0, 0.5, 1, 0.75, 0.5, 0.25, 0, 0]


def test_linear_without_warmup_starts_at_one():
    assert [linear(step, warmup=0, total_steps=4) for step in range(5)] == [1, 0.75, 0.5, 0.25, 0]


def test_fraction_of_warmup_is_cut_to_whole_steps():
    assert warmup_steps(0.1, 59) == 5
    assert warmup_steps(5, 59) == 5
    assert linear(5, warmup=0.1, total_steps=59) == 1
    assert linear(4, warmup=0.1, total_steps=59) == pytest.approx(0.8)


def test_cosine_ends_at_its_floor():
    assert cosine(2, warmup=2, total_steps=6, floor=0.1) == 1
    assert cosine(4, warmup=2, total_steps=6, floor=0.1) == pytest.approx(0.55)
    assert cosine(6, warmup=2, total_steps=6, floor=0.1) == pytest.approx(0.1)
    assert cosine(9, warmup=2, total_steps=6, floor=0.1) == pytest.approx(0.1)


def test_constant_stays_at_one_after_the_warmup():
    assert [constant(step, warmup=2, total_steps=4) for step in range(6)] == [0, 0.5, 1, 1, 1, 1]


def test_schedules_by_name():
    assert named("constant", warmup=2, total_steps=6)(1) == 0.5
    assert named("linear", warmup=2, total_steps=6)(3) == linear(3, warmup=2, total_steps=6)
    assert named("cosine", warmup=2, total_steps=6)(3) == cosine(3, warmup=2, total_steps=6)
    with pytest.raises(ValueError, match="choose among linear, cosine, constant"):
        named("step", warmup=2, total_steps=6)
