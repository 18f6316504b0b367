"""Views of images."""

import random

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image as Pillow
from vlp_data.transforms import (
    MEAN,
    STD,
    denormalise,
    eval_view,
    normalise,
    random_crop_box,
    train_view,
)


@pytest.fixture
def image():
    return Pillow.fromarray(np.random.default_rng(0).integers(0, 256, (40, 60, 3), dtype=np.uint8))


def test_normalise_and_back(image):
    pixels = np.asarray(image)
    expected = (pixels / 255 - np.array(MEAN)) / np.array(STD)
    got = normalise(image)
    assert got.shape == (3, 40, 60) and got.dtype == torch.float32 and got.is_contiguous()
    np.testing.assert_allclose(got.permute(1, 2, 0).numpy(), expected, atol=1e-5)
    np.testing.assert_array_equal(denormalise(got), pixels)


def test_eval_view_squashes_the_whole_image(image):
    expected = normalise(image.resize((16, 16), Pillow.Resampling.BICUBIC))
    assert torch.equal(eval_view(image, size=16), expected)


def test_a_side_that_no_patch_divides_is_fine(image):
    # ViCHA fine-tunes on 380 pixels with patches of 16.
    for view in ("random_resized_crop", "resize"):
        assert train_view(image, random.Random(0), size=38, view=view).shape == (3, 38, 38)
    assert eval_view(image, size=38).shape == (3, 38, 38)


def test_the_resize_view_keeps_the_whole_image(image):
    view = train_view(image, random.Random(0), size=16, view="resize", flip_probability=0.0, augment=False)
    assert torch.equal(view, eval_view(image, size=16))


def test_train_view_depends_on_the_generator_alone(image):
    views = [train_view(image, random.Random(s), size=16) for s in (1, 1, 2)]
    assert views[0].shape == (3, 16, 16)
    assert torch.equal(views[0], views[1]) and not torch.equal(views[0], views[2])


def test_train_view_flips_as_often_as_asked(image):
    def views(probability):
        return [
            train_view(image, random.Random(s), size=8, flip_probability=probability, augment=False)
            for s in range(40)
        ]

    never, always, half = views(0.0), views(1.0), views(0.5)
    assert all(torch.equal(a, b.flip(2)) for a, b in zip(never, always, strict=True))
    mirrored = sum(torch.equal(h, a) for h, a in zip(half, always, strict=True))
    assert 8 < mirrored < 32


@given(
    width=st.integers(1, 300),
    height=st.integers(1, 300),
    scale=st.floats(0.05, 1.0),
    seed=st.integers(0, 1000),
)
def test_crops_lie_in_the_image(width, height, scale, seed):
    x0, y0, x1, y1 = random_crop_box(width, height, random.Random(seed), min_scale=scale)
    assert 0 <= x0 < x1 <= width and 0 <= y0 < y1 <= height


def test_crops_have_the_asked_share_and_aspect():
    boxes = [random_crop_box(400, 400, random.Random(s), min_scale=0.25, max_scale=0.5) for s in range(100)]
    shares = [(x1 - x0) * (y1 - y0) / 400**2 for x0, y0, x1, y1 in boxes]
    aspects = [(x1 - x0) / (y1 - y0) for x0, y0, x1, y1 in boxes]
    assert min(shares) > 0.24 and max(shares) < 0.51 and max(shares) - min(shares) > 0.2
    assert min(aspects) > 0.74 and max(aspects) < 1.35 and max(aspects) - min(aspects) > 0.4


def test_a_very_wide_image_is_cropped_in_the_middle():
    assert random_crop_box(300, 30, random.Random(0), min_scale=0.9) == (130, 0, 170, 30)
