"""Resizing of position tables; equality with X-VLM's is in test_xvlm_parity.py."""

import pytest
import torch
from torch.testing import assert_close
from vlp_core.vision.positions import resize_position_table, resize_swin_table, sincos_table


@pytest.mark.golden("vicha", lambda case: {"sincos", "cases"} <= case.config.keys())
def test_tables_equal_those_of_vicha(case):
    tables, expected = case.tensors("inputs"), case.tensors("outputs")
    found = {}
    for old, new, _ in case.config["cases"]:
        name = f"pos_{old}_to_{new}"
        found[name] = resize_position_table(tables[name][0], new)[None]
    for width, grid in case.config["sincos"]:
        found[f"sincos_dim{width}_grid{grid}"] = sincos_table(width, grid)
    assert found.keys() == expected.keys()
    for name, table in found.items():
        assert_close(table, expected[name], rtol=1e-5, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("target", [4, 7, 12])
def test_constant_swin_table_stays_constant(target):
    resized = resize_swin_table(torch.tensor([[2.0, -3.0]]).expand(81, 2), target)
    assert_close(resized, torch.tensor([[2.0, -3.0]]).expand((2 * target - 1) ** 2, 2))


def test_swin_table_keeps_its_centre_symmetry_and_type():
    distance = torch.arange(-6, 7, dtype=torch.float16).abs()
    table = (-distance[:, None] - 2 * distance).flatten()[:, None]
    resized = resize_swin_table(table, 12)
    assert resized.dtype == torch.float16
    square = resized.view(23, 23)
    assert_close(square, square.flip(0, 1))
    assert square[11, 11] == 0
    assert square.argmax() == 11 * 23 + 11


def test_table_of_the_wanted_window_is_returned_as_it_is():
    table = torch.randn(169, 3)
    assert resize_swin_table(table, 7) is table
    positions = torch.randn(17, 3)
    assert resize_position_table(positions, 4) is positions


@pytest.mark.parametrize("shape", [(168, 3), (64, 3), (169,)], ids=str)
def test_swin_table_of_another_form_is_refused(shape):
    with pytest.raises(ValueError, match=r"is not of the form \[\(2w-1\)\^2, heads\]"):
        resize_swin_table(torch.zeros(shape), 7)


def test_swin_table_too_small_for_a_spline_is_refused():
    with pytest.raises(
        ValueError, match="a table for window 2 cannot be resized to window 7: 3 is the smallest"
    ):
        resize_swin_table(torch.zeros(9, 1), 7)


def test_class_row_is_kept_and_a_constant_grid_stays_constant():
    table = torch.cat([torch.full((1, 5), 9.0), torch.full((16, 5), 0.5)])
    resized = resize_position_table(table, 7)
    assert resized.shape == (50, 5)
    assert torch.equal(resized[0], table[0])
    assert_close(resized[1:], torch.full((49, 5), 0.5))


def test_grid_is_row_major():
    rows = torch.arange(4.0).repeat_interleave(4)
    table = torch.cat([torch.zeros(1), rows])[:, None]
    square = resize_position_table(table, 8)[1:].view(8, 8)
    assert_close(square, square[:, :1].expand(8, 8))
    assert bool((square[1:, 0] > square[:-1, 0]).all())


@pytest.mark.parametrize("shape", [(16, 3), (1, 3), (17,)], ids=str)
def test_position_table_of_another_form_is_refused(shape):
    with pytest.raises(ValueError, match=r"is not of the form \[1\+g\*g, width\]"):
        resize_position_table(torch.zeros(shape), 7)
