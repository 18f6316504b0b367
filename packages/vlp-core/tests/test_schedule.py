import json
import math

import pytest
from vlp_core.schedule import constant, cosine, epoch_cosine, linear, named, polynomial, share_of


def test_linear_rises_from_zero_and_falls_to_zero():
    factors = [linear(step, warmup=2, total_steps=6) for step in range(8)]
    assert factors == [0, 0.5, 1, 0.75, 0.5, 0.25, 0, 0]


def test_linear_without_warmup_starts_at_one():
    assert [linear(step, warmup=0, total_steps=4) for step in range(5)] == [1, 0.75, 0.5, 0.25, 0]


def test_fraction_of_warmup_is_cut_to_whole_steps():
    assert share_of(0.1, 59) == 5
    assert share_of(5, 59) == 5
    assert linear(5, warmup=0.1, total_steps=59) == 1
    assert linear(4, warmup=0.1, total_steps=59) == pytest.approx(0.8)


def test_cosine_ends_at_its_floor():
    assert cosine(2, warmup=2, total_steps=6, floor=0.1) == 1
    assert cosine(4, warmup=2, total_steps=6, floor=0.1) == pytest.approx(0.55)
    assert cosine(6, warmup=2, total_steps=6, floor=0.1) == pytest.approx(0.1)
    assert cosine(9, warmup=2, total_steps=6, floor=0.1) == pytest.approx(0.1)


def test_constant_stays_at_one_after_the_warmup():
    assert [constant(step, warmup=2, total_steps=4) for step in range(6)] == [0, 0.5, 1, 1, 1, 1]


def test_edges_of_the_warmup_are_those_of_the_references():
    """Transformers and MAE: the first step has rate 0. open_clip: the last step of the warm-up has the
    peak."""
    assert [cosine(step, warmup=4, total_steps=9) for step in range(5)] == [0, 0.25, 0.5, 0.75, 1]
    before = [cosine(step, warmup=4, total_steps=9, edge="before") for step in range(5)]
    assert before == [0.25, 0.5, 0.75, 1, 1]
    start = [linear(step, warmup=2, total_steps=9, start=0.5) for step in range(3)]
    assert start == [0.5, 0.75, 1]


def test_polynomial_as_vlc_writes_it():
    lr, end, warm, total = 1e-4, 1e-5, 3, 11
    for power in (0.5, 1.0, 2.0):
        for step in range(14):
            if step < warm:
                expected = lr * step / warm
            elif step > total:
                expected = end
            else:
                expected = (lr - end) * (1 - (step - warm) / (total - warm)) ** power + end
            found = lr * polynomial(step, warmup=warm, total_steps=total, floor=end / lr, power=power)
            assert found == pytest.approx(expected, rel=1e-12), (power, step)


def test_linear_with_a_floor_is_polynomial_of_power_one():
    for step in range(12):
        found = linear(step, warmup=2, total_steps=9, floor=0.2)
        assert found == pytest.approx(polynomial(step, warmup=2, total_steps=9, floor=0.2), rel=1e-12)


def test_cosine_of_every_step_as_mae_writes_it():
    lr, low, warm, total = 2e-3, 1e-6, 5, 40
    for step in range(total):
        if step < warm:
            expected = lr * step / warm
        else:
            expected = low + (lr - low) * 0.5 * (1 + math.cos(math.pi * (step - warm) / (total - warm)))
        assert lr * cosine(step, warmup=warm, total_steps=total, floor=low / lr) == pytest.approx(expected)


def test_constant_cools_down_as_open_clip_does():
    lr, end, power, cool, total, warm = 1e-3, 1e-5, 2.0, 4, 12, 3
    for step in range(total):
        if step < warm:
            expected = lr * (step + 1) / warm
        elif step < total - cool:
            expected = lr
        else:
            expected = (1 - (step - (total - cool)) / cool) ** power * (lr - end) + end
        shape = {"cooldown": cool, "floor": end / lr, "power": power, "edge": "before"}
        assert lr * constant(step, warmup=warm, total_steps=total, **shape) == pytest.approx(expected)
    assert constant(99, warmup=0, total_steps=10, cooldown=0.2, floor=0.1) == pytest.approx(0.1)


def test_schedules_by_name():
    assert named("constant", warmup=2, total_steps=6)(1) == 0.5
    assert named("linear", warmup=2, total_steps=6)(3) == linear(3, warmup=2, total_steps=6)
    assert named("cosine", warmup=2, total_steps=6)(3) == cosine(3, warmup=2, total_steps=6)
    with pytest.raises(ValueError, match="choose among linear, cosine, polynomial, constant"):
        named("step", warmup=2, total_steps=6)


@pytest.mark.golden("vicha", lambda case: case.path.is_file() and case.path.stem == "schedules")
def test_every_update_of_the_published_runs_has_the_rate_of_the_reference(case):
    for name, run in json.loads(case.path.read_text()).items():
        options, steps = run["schedular"], run["iterations_per_epoch"]
        rates = {"start": options["warmup_lr"] / options["lr"], "floor": options["min_lr"] / options["lr"]}
        shape = {"steps_per_epoch": steps, "epochs": options["epochs"], "warmup": options["warmup_epochs"]}
        changes = {(epoch, update): rate for epoch, update, rate in run["changes"]}
        rate = 0.0
        for step in range(steps * options["epochs"]):
            rate = changes.pop(divmod(step, steps), rate)
            found = options["lr"] * epoch_cosine(step, **shape, **rates)
            assert math.isclose(found, rate, rel_tol=1e-9), (name, step)
        assert not changes
        after = options["lr"] * epoch_cosine(steps * options["epochs"], **shape, **rates)
        assert after == pytest.approx(run["lr_after_last_epoch_step"])


def test_staircase_of_the_first_epoch_counts_hundreds_and_may_be_cut_off():
    shape = {"epochs": 2, "warmup": 4, "start": 0.2, "floor": 0.0}
    factors = [epoch_cosine(step, steps_per_epoch=250, **shape) for step in (0, 100, 101, 200, 201, 249, 250)]
    assert factors == pytest.approx([0.2, 0.2, 0.4, 0.4, 0.6, 0.6, 0.5])
    assert epoch_cosine(0, steps_per_epoch=9, **{**shape, "warmup": 0}) == 1
    assert epoch_cosine(10_000, steps_per_epoch=250, **shape) == 0


@pytest.mark.parametrize("wrong", [{"steps_per_epoch": 0}, {"epochs": 0}, {"warmup": -1}, {"step": -1}])
def test_impossible_runs_have_no_rate(wrong):
    options = {"step": 0, "steps_per_epoch": 5, "epochs": 2, "warmup": 1, "start": 0.1, "floor": 0.1}
    with pytest.raises(ValueError, match="must be at least 1"):
        epoch_cosine(**{**options, **wrong})
