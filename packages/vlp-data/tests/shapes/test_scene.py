import hashlib
import json
import math
import os
import subprocess
import sys

import cv2
import numpy as np
import pytest
from vlp_data import shapes
from vlp_data.shapes import annotations, figures, paint
from vlp_data.shapes.dice import Dice
from vlp_data.shapes.scene import EASY_COLORS, EASY_KINDS, EASY_RADII, PAINT, RADII

SCENES = [shapes.draw(11, index) for index in range(40)]


def digest(scene: shapes.Scene) -> str:
    """Hash of pixels, masks and all texts."""
    record = annotations.record(scene, shapes.annotate(scene), "train")
    blocks = (
        scene.image.tobytes(),
        np.packbits(scene.masks).tobytes(),
        json.dumps(record, sort_keys=True).encode(),
    )
    return hashlib.sha256(b"".join(blocks)).hexdigest()


def test_scenes_are_the_same_on_every_machine() -> None:
    # Any change of these is a new format version (shapes.world.VERSION): folders in caches would no longer
    # be what is drawn now.
    digests = {key: digest(shapes.draw(*key[:2], size=key[2]))[:16] for key in DIGESTS}
    assert digests == DIGESTS


DIGESTS = {
    (0, 0, 96): "055a6c63bf22e231",
    (0, 1, 96): "de76cc3426de04c0",
    (7, 123456, 96): "d2c992fddbe5235f",
    (4294967295, 4294967295, 64): "27da4eeea75b60b0",
    (3, 14, 224): "793c69626d0ec770",
}


@pytest.mark.parametrize(
    "settings",
    [{"NPY_DISABLE_CPU_FEATURES": "AVX2 FMA3 AVX512F AVX512_SKX X86_V3 X86_V4"}, {"PYTHONHASHSEED": "1"}],
)
def test_scenes_do_not_depend_on_processor_features_or_hash_seed(settings: dict[str, str]) -> None:
    code = (
        "import hashlib; from vlp_data import shapes; s = [shapes.draw(5, k) for k in range(6)];"
        "print(hashlib.sha256(b''.join(x.image.tobytes() + repr(shapes.annotate(x)).encode() for x in "
        "s)).hexdigest())"
    )
    run = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code],
        env={**os.environ, **settings},
        capture_output=True,
        text=True,
        check=True,
    )
    scenes = [shapes.draw(5, index) for index in range(6)]
    here = hashlib.sha256(
        b"".join(s.image.tobytes() + repr(shapes.annotate(s)).encode() for s in scenes)
    ).hexdigest()
    assert run.stdout.strip() == here


def test_a_scene_depends_on_seed_and_index_alone() -> None:
    again = shapes.draw(11, 3)
    assert np.array_equal(again.image, SCENES[3].image)
    assert again.layout == SCENES[3].layout
    assert shapes.annotate(again) == shapes.annotate(SCENES[3])
    assert not np.array_equal(shapes.draw(12, 3).image, again.image)


def test_boxes_are_the_extents_of_masks() -> None:
    for scene in SCENES:
        assert len(scene.boxes) == len(scene.things) == len(scene.masks)
        for mask, (left, top, right, bottom) in zip(scene.masks, scene.boxes, strict=True):
            assert mask[top:bottom, left:right].sum() == mask.sum() > 0
            inside = mask[top:bottom, left:right]
            assert inside[0].any()
            assert inside[-1].any()
            assert inside[:, 0].any()
            assert inside[:, -1].any()


def test_masks_do_not_overlap_and_later_things_lie_in_front() -> None:
    overlapping = 0
    for scene in SCENES:
        assert scene.masks.sum(axis=0).max() == 1
        hidden = np.zeros((scene.size, scene.size), bool)
        for visible, whole in reversed(list(zip(scene.masks, scene.whole_masks, strict=True))):
            assert np.array_equal(visible, whole & ~hidden)
            overlapping += bool((whole & hidden).any())
            hidden |= whole
    assert overlapping > len(SCENES) / 4


def test_masks_match_the_drawn_pixels() -> None:
    for scene in SCENES:
        ground = scene.layout.background
        dice = Dice(scene.seed, scene.index, PAINT)
        empty = paint.paint_background(
            scene.size, kind=ground.kind, colors=ground.rgb, direction=ground.direction, dice=dice
        )
        samples = [
            figures.rasterise(t.kind, x=t.x, y=t.y, radius=t.radius, turn=t.turn, size=scene.size)
            for t in scene.things
        ]
        covered = [figures.coverage(inside) for inside in samples]
        free = np.max(covered, axis=0) == 0
        assert np.array_equal(scene.image[free], empty[free])
        for number, thing in enumerate(scene.things):
            above = np.max([np.zeros_like(covered[0]), *covered[number + 1 :]], axis=0)
            pure = (covered[number] == 16) & (above == 0)
            assert (scene.masks[number] | ~pure).all()
            colors = np.array(thing.tones)
            pixels = scene.image[pure].astype(int)
            # Mixtures of the tones of this object, and its base tone for certain somewhere.
            assert (pixels >= colors.min(axis=0) - 1).all()
            assert (pixels <= colors.max(axis=0) + 1).all()
            assert (np.abs(pixels - colors[0]).max(axis=1) <= 6).any()


def test_colour_words_are_those_of_the_nearest_palette_entry() -> None:
    palette = np.array(list(paint.PALETTE.values()))
    for scene in SCENES:
        for thing in scene.things:
            distance = np.abs(palette - np.array(thing.tones.base)).sum(axis=1)
            assert shapes.COLORS[int(distance.argmin())] == thing.color
            assert thing.color not in scene.layout.background.colors


@pytest.mark.parametrize("kind", shapes.KINDS)
@pytest.mark.parametrize("turn", [0, 37])
def test_rasterised_outline_equals_that_of_another_rasteriser(kind: str, turn: int) -> None:
    size, x, y, radius = 96, 1900, 2300, 1500
    ours = figures.rasterise(kind, x=x, y=y, radius=radius, turn=turn, size=size)
    side = size * figures.SAMPLES
    angle = 2 * math.pi * turn / figures.TURN
    turning = np.array([[math.cos(angle), math.sin(angle)], [-math.sin(angle), math.cos(angle)]])
    contours = [
        np.round((np.array(c) / figures.ONE @ turning * radius + [x, y]) / figures.SPAN * side).astype(
            np.int32
        )
        for c in figures.OUTLINES[kind]()
    ]
    theirs = cv2.fillPoly(np.zeros((side, side), np.uint8), contours, 1).astype(bool)
    # The other one also paints the cells that the outline touches.
    assert (ours & theirs).sum() / (ours | theirs).sum() > 0.96


def test_rasterised_circle_is_the_disc() -> None:
    size, x, y, radius = 64, 2000, 1500, 1200
    inside = figures.rasterise("circle", x=x, y=y, radius=radius, turn=0, size=size)
    step = figures.SPAN / (size * figures.SAMPLES)
    centre = (np.arange(size * figures.SAMPLES) + 0.5) * step
    distance = np.hypot(centre[None, :] - x, centre[:, None] - y)
    # A polygon of 64 corners lies within 0.13 % of the radius of its circle.
    assert inside[distance < radius * 0.9985].all()
    assert not inside[distance > radius].any()


def test_angles_are_far_from_rounding_ties() -> None:
    for step in range(figures.TURN):
        exact = math.cos(2 * math.pi * step / figures.TURN) * figures.ONE
        assert step % 64 == 0 or abs(exact - math.floor(exact) - 0.5) > 1e-6


def test_most_of_every_object_is_seen_and_sizes_are_apart() -> None:
    for scene in SCENES:
        assert 2 <= len(scene.things) <= 5
        for thing, visible, whole in zip(scene.things, scene.masks, scene.whole_masks, strict=True):
            assert visible.sum() >= 0.6 * whole.sum()
            low, high = RADII[thing.size]
            assert low <= thing.radius <= high


def test_every_word_of_the_world_occurs() -> None:
    layouts = [shapes.draw(2, index, size=32).layout for index in range(150)]
    things = [thing for layout in layouts for thing in layout.things]
    assert {thing.kind for thing in things} == set(shapes.KINDS)
    assert {thing.color for thing in things} == set(shapes.COLORS)
    assert {thing.texture for thing in things} == set(shapes.TEXTURES)
    assert {thing.size for thing in things} == set(shapes.SIZES)
    assert {layout.background.kind for layout in layouts} == set(shapes.BACKGROUNDS)
    assert {len(layout.things) for layout in layouts} == {2, 3, 4, 5}


def test_easy_scenes_have_one_thing_in_a_field_and_fewer_words() -> None:
    scenes = [shapes.draw(2, index, size=48, difficulty="easy") for index in range(120)]
    things = [thing for scene in scenes for thing in scene.things]
    assert {thing.kind for thing in things} == set(EASY_KINDS)
    assert {thing.color for thing in things} == set(EASY_COLORS)
    assert {len(scene.things) for scene in scenes} == {2, 3, 4}
    for scene in scenes:
        assert np.array_equal(scene.masks, scene.whole_masks)
        # 16 pixels are a field, and a patch of the small recipes.
        fields = [
            {(y // 16, x // 16) for y, x in zip(*np.nonzero(mask), strict=True)} for mask in scene.masks
        ]
        assert all(len(field) == 1 for field in fields)
        assert len(set.union(*fields)) == len(fields)
        for thing in scene.things:
            low, high = EASY_RADII[thing.size]
            assert low <= thing.radius <= high


def test_what_easy_scenes_lack_is_asked_with_their_own_words() -> None:
    scenes = [shapes.draw(2, index, size=48, difficulty="easy") for index in range(60)]
    questions = [question for scene in scenes for question in shapes.annotate(scene).questions]
    asked = {word.strip("?") for q in questions if q.text.startswith("Is there") for word in q.text.split()}
    assert not asked & (set(shapes.KINDS) - set(EASY_KINDS))
    assert not asked & (set(shapes.COLORS) - set(EASY_COLORS))


@pytest.mark.parametrize("size", [32, 97, 224])
def test_images_of_any_size_show_the_same_objects(size: int) -> None:
    for other in SCENES[:12]:
        scene = shapes.draw(11, other.index, size=size)
        assert scene.image.shape == (size, size, 3)
        assert scene.image.dtype == np.uint8
        assert scene.layout == other.layout
        for whole, whole96 in zip(scene.whole_masks, other.whole_masks, strict=True):
            # Area and centre as shares of the image, to about a pixel of the smaller image.
            pixel = 1 / min(size, 96)
            assert abs(whole.mean() ** 0.5 - whole96.mean() ** 0.5) < pixel
            for mine, theirs in zip(np.nonzero(whole), np.nonzero(whole96), strict=True):
                assert abs((mine.mean() + 0.5) / size - (theirs.mean() + 0.5) / 96) < pixel


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"seed": -1, "index": 0}, "seed=-1"),
        ({"seed": 2**32, "index": 0}, "seed=4294967296"),
        ({"seed": 0, "index": -1}, "index=-1"),
        (
            {"seed": 0, "index": 0, "difficulty": "hard"},
            "difficulty='hard' is not known; choose among full, easy",
        ),
        ({"seed": 0, "index": 0, "size": 31}, "size=31 must be between 32 and 2048"),
    ],
)
def test_arguments_out_of_range_are_named(arguments: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        shapes.draw(**arguments)


def test_dice_are_fair_and_pinned() -> None:
    dice = Dice(1, 2, 3)
    assert [dice.below(1000) for _ in range(4)] == PINNED
    draws = np.bincount([dice.below(6) for _ in range(6000)], minlength=6)
    assert draws.min() > 880
    assert sorted(dice.shuffled(range(9))) == list(range(9))
    assert len(set(dice.sample("abcdef", 3))) == 3
    weighted = [dice.weighted((("a", 1), ("b", 3))) for _ in range(4000)]
    assert 0.71 < weighted.count("b") / 4000 < 0.79


PINNED = [670, 111, 511, 356]
