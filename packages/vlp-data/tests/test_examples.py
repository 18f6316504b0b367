"""From rows to batches, and rows that cannot be used."""

import json
import random

import pytest
import torch
from vlp_data.examples import ImageTextExamples, RegionExamples
from vlp_data.loader import Skipped, attempt
from vlp_data.options import (
    CocoInstances,
    ImageTextLines,
    MaskingOptions,
    RegionLines,
    Squash,
    TextOptions,
)

TEXT, MASKING = TextOptions(max_tokens=8), MaskingOptions(max_masks=2)


@pytest.fixture
def examples(image_lines, tokenizer):
    source = ImageTextLines(files=(str(image_lines / "lines"),), root=str(image_lines)).open()
    return ImageTextExamples(
        source=source, tokenizer=tokenizer, image=Squash(size=32), text=TEXT, masking=MASKING
    )


def test_image_text_batches(examples):
    made = [examples.example(n, random.Random(n)) for n in range(5)]
    batch = examples.collate(made, random.Random(0))
    assert batch.image.shape == (5, 3, 32, 32) and batch.image.dtype == torch.float32
    assert batch.text_ids.shape == batch.masked_ids.shape == batch.attention_mask.shape == (5, 8)
    assert batch.masked_positions.shape == batch.masked_labels.shape == (5, 2)
    assert {t.dtype for t in (batch.text_ids, batch.attention_mask, batch.masked_labels)} == {torch.int64}
    assert batch.keys == tuple(examples.source[n].key for n in range(5))
    # What is masked is masked in the text of the same row.
    rows = torch.arange(5)[:, None]
    valid = batch.masked_labels != -100
    assert torch.equal(batch.text_ids[rows, batch.masked_positions][valid], batch.masked_labels[valid])
    changed = batch.text_ids != batch.masked_ids
    assert changed.sum() <= valid.sum()


def test_one_of_several_captions_is_drawn_per_visit(examples):
    lengths = {len(examples.example(0, random.Random(s)).text.ids) for s in range(20)}
    assert len(lengths) == 2


def test_the_same_draws_give_the_same_example(examples):
    first, second = (examples.example(3, random.Random(5)) for _ in range(2))
    assert torch.equal(first.seen.image, second.seen.image) and first.text == second.text


@pytest.mark.parametrize(
    ("spoil", "cause", "file"),
    [
        (lambda root: (root / "images/00.jpg").unlink(), "missing file", "images/00.jpg"),
        (lambda root: (root / "images/00.jpg").write_bytes(b""), "empty image", "images/00.jpg"),
        (lambda root: (root / "images/00.jpg").write_text("<html>"), "not an image", "images/00.jpg"),
        (lambda root: (root / "lines/part-0").write_text("\n"), "empty line", "lines/part-0:1"),
        (lambda root: (root / "lines/part-0").write_text("{"), "broken line", "lines/part-0:1"),
        (
            lambda root: (root / "lines/part-0").write_text(
                json.dumps({"caption": "!!", "image_rpath": "images/00.jpg"})
            ),
            "empty text",
            "lines/part-0:1",
        ),
    ],
)
def test_unusable_rows_say_what_and_where(image_lines, tokenizer, spoil, cause, file):
    spoil(image_lines)
    source = ImageTextLines(files=(str(image_lines / "lines/part-0"),), root=str(image_lines)).open()
    examples = ImageTextExamples(source=source, tokenizer=tokenizer, image=Squash(size=32))
    got = attempt(examples, 0, random.Random(0))
    assert isinstance(got, Skipped)
    assert (got.cause, got.file) == (cause, str(image_lines / file))


def test_truncated_images_are_an_option(image_lines, tokenizer):
    image = image_lines / "images" / "00.jpg"
    image.write_bytes(image.read_bytes()[:-300])
    source = ImageTextLines(files=(str(image_lines / "lines"),), root=str(image_lines)).open()

    def first(truncated):
        options = Squash(size=32, truncated=truncated)
        examples = ImageTextExamples(source=source, tokenizer=tokenizer, image=options)
        return attempt(examples, 0, random.Random(0))

    assert not isinstance(first(True), Skipped)
    assert first(False).cause == "broken image"


def test_region_batches(tmp_path, region_line, tokenizer):
    (tmp_path / "a").write_text("".join(region_line(n) + "\n" for n in range(4)))
    examples = RegionExamples(
        source=RegionLines(files=(str(tmp_path / "a"),)).open(),
        tokenizer=tokenizer,
        image=Squash(size=32),
        text=TEXT,
        masking=MASKING,
        batch_texts=6,
        patch_size=16,
    )
    batch = examples.collate([examples.example(n, random.Random(n)) for n in range(4)], random.Random(0))
    assert batch.image.shape == (4, 3, 32, 32)
    assert batch.image_index.shape == batch.is_image.shape == (6,)
    assert batch.image_attention_mask.shape == (6, 5) and batch.target_boxes.shape == (6, 4)
    assert batch.text_ids.shape == (6, 8) and len(batch.keys) == 6
    names = [examples.source[n].key for n in range(4)]
    assert [names[i] for i in batch.image_index.tolist()] == list(batch.keys)


def test_coco_instances_make_region_batches(tmp_path, encoded, tokenizer):
    (tmp_path / "1.jpg").write_bytes(encoded(1))
    content = {
        "images": [{"id": 1, "file_name": "1.jpg", "width": 60, "height": 40}],
        "annotations": [
            {"id": 2, "image_id": 1, "category_id": 7, "bbox": [1.5, 2.25, 10, 20], "iscrowd": 0}
        ],
        "categories": [{"id": 7, "name": "dog"}],
    }
    (tmp_path / "instances.json").write_text(json.dumps(content))
    source = CocoInstances(annotations=str(tmp_path / "instances.json"), images=str(tmp_path)).open()
    examples = RegionExamples(
        source=source, tokenizer=tokenizer, image=Squash(size=32), batch_texts=1, patch_size=16
    )
    example = examples.example(0, random.Random(0))
    assert tokenizer.decode(example.pairs[0].text.ids) == "dog"
    assert example.crop[0] <= 1 and example.crop[2] >= 12


def test_sizes_that_do_not_fit_are_refused(tokenizer):
    with pytest.raises(ValueError, match="image size 224 must be a multiple of patch_size=30"):
        RegionExamples(source=[], tokenizer=tokenizer, batch_texts=4, patch_size=30)
    with pytest.raises(ValueError, match="batch_texts=0 must be positive"):
        RegionExamples(source=[], tokenizer=tokenizer, batch_texts=0, patch_size=32)
