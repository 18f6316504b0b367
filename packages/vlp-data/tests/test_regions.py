"""Region sampling against the reference's recorded draws, boxes, masks and images."""

import json
import random

import pytest
import torch
from vlp_data.errors import BadSample
from vlp_data.images import open_image
from vlp_data.options import MaskingOptions, RegionLines, RegionOptions, Squash, TextOptions
from vlp_data.regions import choose_pairs, collate_regions, patch_mask, sample_regions
from vlp_data.sources.lines import parse_regions
from vlp_data.text import Tokenizer


def vocab_file(case):
    return next(p / "vocab.txt" for p in (case.path, *case.path.parents) if (p / "vocab.txt").is_file())


def set_up(case, run):
    config = case.json("region_dataset")["config"]
    regions = config["regions"]
    arguments = {
        "image": Squash(size=config["image_res"], augment=False),
        "text": TextOptions(
            max_words=config["max_words"], max_tokens=config["max_tokens"], tokenized=regions["tokenized"]
        ),
        "masking": MaskingOptions(
            probability=config["mask_prob"],
            max_masks=config["max_masks"],
            skipgram_probability=config["skipgram_prb"],
            skipgram_size=config["skipgram_size"],
            whole_words=config["mask_whole_word"],
        ),
        "regions": RegionOptions(
            max_regions=regions["max_regions"],
            min_visible=regions["min_perc_in_image"],
            careful_flip="substring" if run["careful_hflip"] else "off",
        ),
    }
    options = RegionLines(files=(), image_key=regions["image_key"])
    lines = (case.path / "regions.jsonl").read_text().splitlines()
    samples = [parse_regions(line, "regions.jsonl", n, options) for n, line in enumerate(lines)]
    collation = {k: arguments[k] for k in ("text", "masking")}
    collation |= {
        "size": arguments["image"].size,
        "batch_texts": regions["batch_size"],
        "patch_size": config["patch_size"],
    }
    return samples, Tokenizer.wordpiece(vocab_file(case)), arguments, collation


def is_case(case):
    return case.has("region_dataset.json", "regions.jsonl")


@pytest.mark.golden("xvlm", is_case)
def test_region_dataset(case):
    images = case.tensors("images") if case.has("images.safetensors") else {}
    compared = set()
    for run in case.json("region_dataset")["runs"]:
        samples, tokenizer, arguments, collation = set_up(case, run)
        rng = random.Random(run["seed"])
        examples = []
        for sample in samples:
            image = open_image(sample.images[0])
            try:
                examples.append(sample_regions(sample, image, tokenizer, rng, **arguments))
            except BadSample:
                examples.append(None)
        assert [n for n, e in enumerate(examples) if e is not None] == [s["line"] for s in run["samples"]]
        single = {**collation, "batch_texts": 1}
        for example, want in zip([examples[s["line"]] for s in run["samples"]], run["samples"], strict=True):
            assert list(example.crop) == want["crop_xyxy"]
            assert example.flipped == want["hflip"]
            assert len(example.pairs) == want["n_text"]
            for row, pair in enumerate(example.pairs):
                one = collate_regions(
                    [example._replace(pairs=(pair,))], tokenizer, random.Random(0), **single
                )
                assert one.text_ids[0].tolist() == want["text_ids"][row]
                assert one.attention_mask[0].tolist() == want["text_atts"][row]
                assert one.masked_ids[0].tolist() == want["text_ids_masked"][row]
                assert one.masked_positions[0].tolist() == want["masked_pos"][row]
                assert one.masked_labels[0].tolist() == want["masked_ids"][row]
                assert one.image_attention_mask[0].tolist() == want["image_atts"][row]
                assert one.is_image[0].item() == want["is_image"][row]
                torch.testing.assert_close(one.target_boxes[0], torch.tensor(want["target_bbox"][row]))
            name = f"seed{run['seed']}_line{want['line']}_image"
            if name in images and not run["careful_hflip"]:
                torch.testing.assert_close(example.image, images[name], rtol=1e-4, atol=1e-5)
                compared.add(name)
        batch, want = (
            collate_regions([e for e in examples if e is not None], tokenizer, rng, **collation),
            run["batch"],
        )
        assert batch.image_index.tolist() == want["idx_to_group_img"]
        assert batch.text_ids.tolist() == want["text_ids"]
        assert batch.is_image.tolist() == want["is_image"]
        torch.testing.assert_close(batch.target_boxes, torch.tensor(want["target_bbox"]))
        assert len(batch.image) == want["n_images"]
    assert compared == set(images)


def patch_mask_rows(case):
    for file in [case.path] if case.path.is_file() else sorted(case.path.glob("*.json")):
        content = json.loads(file.read_text())
        if isinstance(content, list) and content and {"num_patch", "on"} <= set(content[0]):
            return content
    return None


@pytest.mark.golden("xvlm", lambda case: patch_mask_rows(case) is not None)
def test_image_attention_masks(case):
    for row in patch_mask_rows(case):
        size, side = row["image_res"], row["num_patch"]
        mask = patch_mask((row["x"], row["y"], row["w"], row["h"]), size=size, patch_size=size // side)
        assert mask.shape == (1 + side * side,)
        assert mask.nonzero().flatten().tolist() == row["on"]


def test_the_smallest_box_covers_one_patch():
    assert patch_mask((31.9, 31.9, 0.0, 0.0), size=32, patch_size=16).tolist() == [1, 0, 0, 0, 1]
    assert patch_mask((32.0, 0.0, 0.0, 0.0), size=32, patch_size=16).tolist() == [1, 0, 1, 0, 0]
    assert patch_mask(None, size=32, patch_size=16).tolist() == [1] * 5


@pytest.mark.parametrize(("count", "wanted"), [(9, 9), (20, 8), (5, 8), (8, 16), (3, 10), (1, 4)])
def test_a_batch_always_has_the_same_number_of_pairs(count, wanted):
    chosen = choose_pairs(count, wanted, random.Random(0))
    assert len(chosen) == wanted
    counts = [chosen.count(i) for i in range(count)]
    if count >= wanted:
        assert max(counts) == 1
    else:
        assert min(counts) >= 1 and max(counts) - min(counts) <= 1


def test_no_pair_at_all_is_refused():
    with pytest.raises(ValueError, match="no pair"):
        choose_pairs(0, 4, random.Random(0))


@pytest.fixture
def drawn(tokenizer, region_line):
    """drawn(seed, careful_flip=..., elems=..., ...) -> example of a line of the conftest."""

    def draw(seed=0, *, options=None, augment=False, **changes):
        sample = parse_regions(region_line(**changes), "lines", 1, RegionLines(files=()))
        return sample_regions(
            sample,
            open_image(sample.images[0]),
            tokenizer,
            random.Random(seed),
            image=Squash(size=32, augment=augment),
            text=TextOptions(max_tokens=8),
            masking=MaskingOptions(max_masks=2),
            regions=options or RegionOptions(),
        )

    return draw


@pytest.mark.parametrize("seed", range(20))
def test_boxes_lie_in_the_view_and_the_first_pair_is_the_whole_image(drawn, seed):
    example = drawn(seed, augment=True)
    assert example.image.shape == (3, 32, 32)
    assert example.pairs[0].box is None
    assert 2 <= len(example.pairs) <= 4  # the caption, and at least the box of the crop
    for pair in example.pairs[1:]:
        x, y, w, h = pair.box
        assert w > 0 and h > 0
        assert x >= -1e-6 and y >= -1e-6 and x + w <= 32 + 1e-4 and y + h <= 32 + 1e-4


def test_without_a_crop_all_of_the_image_is_seen(drawn):
    elems = [{"caption": "a dog", "bb": [0, 0, 30, 40]}, {"caption": "a cat", "bb": [30, 20, 30, 20]}]
    for seed in range(10):
        example = drawn(seed, elems=elems, options=RegionOptions(crop="none"))
        assert example.crop == (0, 0, 60, 40)
        boxes = sorted(pair.box[2:] for pair in example.pairs[1:])
        assert boxes == [pytest.approx((16, 16)), pytest.approx((16, 32))]


def test_pairs_are_limited_with_the_caption_counted(drawn):
    for seed in range(10):
        assert len(drawn(seed, options=RegionOptions(max_regions=2)).pairs) == 2
        assert len(drawn(seed, options=RegionOptions(max_regions=2), caption=None).pairs) <= 2


def test_attributes_stand_before_the_text(drawn, tokenizer):
    texts = {tokenizer.decode(pair.text.ids) for seed in range(30) for pair in drawn(seed).pairs}
    assert texts >= {"a dog on the grass", "a dog", "bright grass", "red the cat", "bright a cat"}
    assert "grass" not in texts


def test_flipping_mirrors_boxes(drawn):
    elems = [{"caption": "a dog", "bb": [0, 0, 60, 40]}, {"caption": "a cat", "bb": [0, 0, 15, 40]}]
    seen = set()
    for seed in range(20):
        example = drawn(seed, elems=elems, caption=None)
        if example.crop != (0, 0, 60, 40):
            continue
        boxes = {round(pair.box[2]): pair.box[0] for pair in example.pairs}
        assert boxes[8] == pytest.approx(24 if example.flipped else 0)
        seen.add(example.flipped)
    assert seen == {True, False}


@pytest.mark.parametrize(
    ("careful_flip", "caption", "flips"),
    [
        ("off", "the left dog", True),
        ("substring", "the left dog", False),
        ("substring", "a bright dog", False),
        ("word", "the left dog", False),
        ("word", "a bright dog", True),
    ],
)
def test_careful_flip(drawn, careful_flip, caption, flips):
    elems = [{"caption": "a dog", "bb": [5, 5, 20, 20]}]
    options = RegionOptions(careful_flip=careful_flip)
    flipped = [drawn(seed, options=options, elems=elems, caption=caption).flipped for seed in range(20)]
    assert any(flipped) == flips


@pytest.mark.parametrize("crop", ["around_box", "none"])
@pytest.mark.parametrize(
    ("box", "cause"),
    [
        ([50, 5, 20, 20], "box outside the image"),
        ([-1, 5, 20, 20], "box outside the image"),
        ([5, 30, 20, 20], "box outside the image"),
        ([70, 50, 5, 5], "box outside the image"),
        ([5, 5, 0, 20], "box without area"),
        ([5, 5, 10, -3], "box without area"),
        ([0.1, 0.1, 0.5, 0.4], "box without area"),
    ],
)
def test_a_line_without_a_usable_box_is_skipped_in_every_crop_mode(drawn, box, cause, crop):
    with pytest.raises(BadSample) as error:
        drawn(elems=[{"caption": "a dog", "bb": box}], options=RegionOptions(crop=crop))
    assert (error.value.cause, error.value.file) == (cause, "lines:1")


def test_boxes_that_cannot_be_used_are_told_beside_those_that_can(drawn):
    elems = [
        {"caption": "a dog", "bb": [5, 5, 20, 20]},
        {"caption": "a cat", "bb": [50, 5, 20, 20]},
        {"caption": "grass", "bb": [5, 5, 0, 20]},
    ]
    example = drawn(elems=elems, caption=None, options=RegionOptions(crop="none"))
    assert len(example.pairs) == 1
    assert [one.cause for one in example.unusable] == ["box outside the image", "box without area"]
    assert "box 1, (50, 5, 70, 25) (x0, y0, x1, y1), in an image of 60 x 40" in example.unusable[0].detail
    anchored = next(one for seed in range(99) if (one := _drawn_or_none(drawn, seed, elems)) is not None)
    assert [one.cause for one in anchored.unusable] == ["box without area"]


def _drawn_or_none(drawn, seed, elems):
    try:
        return drawn(seed, elems=elems, caption=None)
    except BadSample:
        return None


def test_boxes_can_be_clipped_instead(drawn):
    clip = RegionOptions(outside_boxes="clip")
    example = drawn(options=clip, elems=[{"caption": "a dog", "bb": [50, 5, 20, 20]}], caption=None)
    assert example.crop[0] <= 50 and example.crop[2] == 60 and len(example.pairs) == 1
    with pytest.raises(BadSample, match="box outside the image"):
        drawn(options=clip, elems=[{"caption": "a dog", "bb": [70, 5, 20, 20]}])


def test_barely_visible_boxes_are_left_out(drawn):
    elems = [{"caption": "a dog", "bb": [0, 0, 10, 40]}, {"caption": "a cat", "bb": [0, 0, 60, 40]}]
    few = [
        len(drawn(s, options=RegionOptions(min_visible=0.9), elems=elems, caption=None).pairs)
        for s in range(30)
    ]
    all_of = [
        len(drawn(s, options=RegionOptions(min_visible=0.0), elems=elems, caption=None).pairs)
        for s in range(30)
    ]
    assert set(all_of) == {2} and min(few) == 1


def test_collation_counts_padded_pairs_and_drops_images_without_a_pair(drawn, tokenizer):
    examples = [drawn(1), drawn(2)._replace(pairs=()), drawn(3)]
    pairs = sum(len(example.pairs) for example in examples)
    common = {
        "size": 32,
        "text": TextOptions(max_tokens=8),
        "masking": MaskingOptions(max_masks=2),
        "patch_size": 16,
    }
    batch = collate_regions(examples, tokenizer, random.Random(0), batch_texts=pairs + 3, **common)
    assert batch.padded_pairs == 3 and len(batch.image) == 2
    assert set(batch.image_index.tolist()) == {0, 1}
    assert batch.image_attention_mask.shape == (pairs + 3, 5)
    assert batch.target_boxes[batch.is_image == 1].unique(dim=0).tolist() == [[0.5, 0.5, 1.0, 1.0]]
    assert collate_regions(examples, tokenizer, random.Random(0), batch_texts=2, **common).padded_pairs == 0
