import json
import math

import pytest
from vlp_core.schedule import constant, cosine, epoch_cosine, linear, named, warmup_steps


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
