"""From rows of the fine-tuning tasks to batches."""

import json
import pickle
import random
from functools import partial

import numpy as np
import pytest
import torch
from PIL import Image as Pillow
from vlp_data.errors import BadSample
from vlp_data.examples import (
    BoxExamples,
    CaptionExamples,
    CaptionReferencesExamples,
    EntailmentExamples,
    NlvrExamples,
    RegionExamples,
    RetrievalExamples,
    VqaExamples,
)
from vlp_data.loader import Skipped, attempt
from vlp_data.options import CentreCrop, Detection, Squash, TaskJson, TextOptions
from vlp_data.schema import Image, Region, Sample, Target, Text
from vlp_data.text import Tokenizer
from vlp_data.transforms import flip

STILL = Squash(size=32, crop="none", flip=0.0, augment=False)
"""A view that draws nothing."""
TEXT = TextOptions(max_tokens=8, pad="longest")


@pytest.fixture
def images(tmp_path, encoded):
    for name in range(4):
        (tmp_path / f"{name}.jpg").write_bytes(encoded(name))
    return tmp_path


@pytest.fixture
def rows(images):
    def make(*entries):
        (images / "list.json").write_text(json.dumps(list(entries)))
        return TaskJson(files=(str(images / "list.json"),), root=str(images)).open()

    return make


def batch_of(examples, count=None, seed=0):
    """The batch of the first rows, through a pickled copy as in a worker."""
    examples = pickle.loads(pickle.dumps(examples))
    made = [examples.example(n, random.Random(n + seed)) for n in range(count or len(examples))]
    return examples.collate(made, random.Random(0))


def pixels(folder, name):
    with Pillow.open(folder / f"{name}.jpg") as image:
        return image.convert("RGB")


def test_retrieval_batches_number_images(rows, tokenizer, images):
    source = rows(
        {"image": "0.jpg", "caption": "The dog, on the grass!", "image_id": "coco_5"},
        {"image": "1.jpg", "caption": "a cat", "image_id": "coco_6"},
        {"image": "0.jpg", "caption": "dog", "image_id": "coco_5"},
        {"image": "2.jpg", "text": "red dog", "ref_id": 7},
        {"image": "2.jpg", "text": "red cats", "ref_id": 8},
    )
    batch = batch_of(RetrievalExamples(source=source, tokenizer=tokenizer, image=STILL, text=TEXT))
    first, second, third, fourth, fifth = batch.image_ids.tolist()
    assert first == third and fourth == fifth and len({first, second, fourth}) == 3
    assert batch.image_ids.dtype == torch.int64 and batch.image_ids.min() >= 0
    assert [
        tokenizer.decode(row[mask == 1].tolist())
        for row, mask in zip(batch.text_ids, batch.attention_mask, strict=True)
    ] == ["the dog on the grass", "a cat", "dog", "red dog", "red cats"]
    assert not (batch.text_ids == tokenizer.sep_id).any()
    assert torch.equal(batch.image[1], STILL.evaluate(pixels(images, 1)))


def test_the_number_of_an_image_never_changes(rows, tokenizer):
    source = rows({"image": "0.jpg", "caption": "a dog", "image_id": 5})
    batch = batch_of(RetrievalExamples(source=source, tokenizer=tokenizer, image=STILL, text=TEXT))
    assert batch.image_ids.tolist() == [5019829476155378896]


def test_vqa_batches(rows, tokenizer):
    ten = ["red"] * 6 + ["a dog"] * 4
    source = rows(
        {"image": "0.jpg", "question": "The cat?", "question_id": 1, "answer": ten, "dataset": "vqa"},
        {"image": "1.jpg", "question": "the dogs on the grass", "answer": "bright cat", "dataset": "vg"},
    )
    batch = batch_of(VqaExamples(source=source, tokenizer=tokenizer, image=STILL, text=TEXT))
    ids = {word: tokenizer.token_ids(word)[0] for word in ("the", "cat", "red", "a", "dog", "bright")}
    cls, sep, pad = tokenizer.cls_id, tokenizer.sep_id, tokenizer.pad_id
    assert batch.question_ids[0].tolist()[:4] == [cls, ids["the"], ids["cat"], pad]
    assert batch.question_mask.sum(1).tolist() == [3, 7]
    assert batch.answer_ids.tolist() == [
        [cls, ids["red"], sep, pad],
        [cls, ids["a"], ids["dog"], sep],
        [cls, ids["bright"], ids["cat"], sep],
    ]
    assert batch.answer_mask.sum(1).tolist() == [3, 4, 4]
    torch.testing.assert_close(batch.answer_weights, torch.tensor([0.6, 0.4, 0.5]))
    assert batch.question_index.tolist() == [0, 0, 1]


@pytest.mark.parametrize(
    ("careful", "question", "answer", "mirrored"),
    [
        ("off", "what is left", "a dog", True),
        ("substring", "what is left", "a dog", False),
        ("substring", "what is it", "bright", False),
        ("substring", "what is it", "a dog", True),
        ("word", "what is it", "bright", True),
        ("word", "what is it", "on the right", False),
        ("word", "Left?", "a dog", False),
    ],
)
def test_images_are_not_mirrored_where_sides_are_named(
    rows, tokenizer, images, careful, question, answer, mirrored
):
    source = rows({"image": "0.jpg", "question": question, "answer": answer})
    image = Squash(size=32, crop="none", flip=1.0, augment=False, careful_flip=careful)
    batch = batch_of(VqaExamples(source=source, tokenizer=tokenizer, image=image, text=TEXT))
    stored = pixels(images, 0)
    assert torch.equal(batch.image[0], STILL.evaluate(flip(stored) if mirrored else stored))


def test_nlvr_batches_hold_first_images_before_second_ones(rows, tokenizer, images):
    source = rows(
        {"sentence": "a dog", "label": "True", "images": ["0.jpg", "1.jpg"]},
        {"sentence": "the cat", "label": "False", "images": ["2.jpg", "3.jpg"]},
    )
    batch = batch_of(NlvrExamples(source=source, tokenizer=tokenizer, image=STILL, text=TEXT))
    for row, name in enumerate((0, 2, 1, 3)):
        assert torch.equal(batch.image[row], STILL.evaluate(pixels(images, name)))
    assert batch.labels.tolist() == [1, 0] and len(batch.text_ids) == 2


def test_the_two_images_of_a_pair_are_mirrored_independently(rows, tokenizer, images):
    source = rows({"sentence": "a dog", "label": "True", "images": ["0.jpg", "0.jpg"]})
    image = Squash(size=32, crop="none", augment=False)
    seen = set()
    for seed in range(30):
        batch = batch_of(NlvrExamples(source=source, tokenizer=tokenizer, image=image, text=TEXT), seed=seed)
        seen.add(tuple(torch.equal(view, STILL.evaluate(pixels(images, 0))) for view in batch.image))
    assert len(seen) == 4


def test_entailment_batches(rows, tokenizer):
    source = rows(
        {"image": "0", "sentence": "a dog", "label": "contradiction"},
        {"image": "1", "sentence": "the cat on the grass", "label": "entailment"},
        {"image": "2", "sentence": "a cat", "label": "neutral"},
    )
    text = TextOptions(max_tokens=8, separator=True, pad="longest")
    batch = batch_of(EntailmentExamples(source=source, tokenizer=tokenizer, image=STILL, text=text))
    assert batch.labels.tolist() == [0, 2, 1] and batch.image.shape == (3, 3, 32, 32)
    assert (batch.text_ids == tokenizer.sep_id).sum(1).tolist() == [1, 1, 1]


def test_caption_batches_predict_what_follows_the_prompt(rows, tokenizer):
    source = rows(
        {"image": "0.jpg", "caption": "Dogs on the grass, red cats."}, {"image": "1.jpg", "caption": "cat"}
    )
    text = TextOptions(max_tokens=8, separator=True, pad="longest")
    examples = CaptionExamples(
        source=source, tokenizer=tokenizer, prompt="the bright ", image=STILL, text=text
    )
    batch = batch_of(examples)
    start = [tokenizer.cls_id, *tokenizer.token_ids("the bright")]
    sep = tokenizer.sep_id
    long = [*tokenizer.token_ids("dogs on the grass red cats")[:4], sep]
    short = [*tokenizer.token_ids("cat"), sep]
    assert batch.text_ids.tolist() == [[*start, *long], [*start, *short, *[tokenizer.pad_id] * 3]]
    assert batch.labels.tolist() == [[*[-100] * 3, *long], [*[-100] * 3, *short, *[-100] * 3]]
    plain = batch_of(CaptionExamples(source=source, tokenizer=tokenizer, image=STILL, text=text))
    assert plain.labels[1].tolist() == [-100, *short, *[-100] * 5]


def test_caption_options_that_cannot_work_are_refused(tokenizer):
    with pytest.raises(ValueError, match="separator=false"):
        CaptionExamples(source=[], tokenizer=tokenizer, text=TextOptions())
    with pytest.raises(ValueError, match="max_tokens=4 leaves no room for a word after the 3 tokens"):
        CaptionExamples(
            source=[],
            tokenizer=tokenizer,
            prompt="a dog ",
            text=TextOptions(max_tokens=4, separator=True),
        )
    with pytest.raises(ValueError, match="references=0 must be positive"):
        CaptionReferencesExamples(source=[], references=0)


def test_references_of_an_image(rows):
    source = rows(
        {"image": "0.jpg", "caption": ["A dog.", "A cat.", "Grass."]}, {"image": "1.jpg", "caption": "One."}
    )
    examples = CaptionReferencesExamples(source=source, references=2, image=STILL)
    drawn = {batch_of(examples, seed=seed).references for seed in range(40)}
    assert {len(first) for first, _ in drawn} == {2} and {second for _, second in drawn} == {("One.",)}
    assert {caption for first, _ in drawn for caption in first} == {"A dog.", "A cat.", "Grass."}
    assert all(len(set(first)) == 2 for first, _ in drawn)


class Rows(list):
    """A source of given samples."""


def expression(box, *, size=(60, 40), text="red dog"):
    """An image in which only the pixels of `box` are red."""
    array = np.zeros((size[1], size[0], 3), dtype=np.uint8)
    x0, y0, x1, y1 = box
    array[y0:y1, x0:x1, 0] = 255
    return Sample(
        key="k",
        images=(Image(array=array),),
        texts=(Text(text=text, role="expression"),),
        regions=(Region(box=(1, 2, 3, 4)), Region(box=box)),
        target=Target(box=1),
    )


@pytest.mark.parametrize("crop", ["random", "none"])
def test_boxes_follow_crop_and_flip(tokenizer, crop):
    sample = expression((10, 8, 34, 29))
    image = Squash(size=64, crop=crop, augment=False)
    examples = BoxExamples(source=Rows([sample]), tokenizer=tokenizer, image=image, text=TEXT)
    boxes = set()
    for seed in range(30):
        batch = batch_of(examples, seed=seed)
        ((x, y, w, h),) = (batch.target_boxes * 64).tolist()
        red = batch.image[0, 0] > batch.image[0, 0].mean() + 0.2
        columns, lines = red.any(0).nonzero().flatten(), red.any(1).nonzero().flatten()
        got = torch.tensor([x - w / 2, y - h / 2, x + w / 2, y + h / 2])
        seen = torch.tensor([columns[0], lines[0], columns[-1] + 1, lines[-1] + 1])
        assert (got - seen).abs().max() <= 2, (got, seen)
        boxes.add(tuple(batch.target_boxes[0].tolist()))
    assert len(boxes) == 2 if crop == "none" else len(boxes) > 20


def test_boxes_mind_the_sides_of_the_expression(tokenizer):
    sample = expression((10, 8, 34, 29), text="the left dog")
    image = Squash(size=32, crop="none", flip=1.0, augment=False, careful_flip="word")
    batch = batch_of(BoxExamples(source=Rows([sample]), tokenizer=tokenizer, image=image, text=TEXT))
    whole = Pillow.fromarray(sample.images[0].array)
    assert torch.equal(batch.image[0], STILL.evaluate(whole))
    torch.testing.assert_close(
        batch.target_boxes[0], torch.tensor([22 / 60, 18.5 / 40, 24 / 60, 21 / 40]), atol=1e-6, rtol=0
    )


@pytest.mark.parametrize(("box", "usable"), [((50, 5, 60.4, 20), True), ((50, 5, 61.5, 20), False)])
def test_boxes_that_stick_out(tokenizer, box, usable):
    sample = Sample(
        key="k",
        images=expression((1, 1, 2, 2)).images,
        texts=(Text(text="dog", role="expression"),),
        regions=(Region(box=box),),
        target=Target(box=0),
    )
    examples = BoxExamples(source=Rows([sample]), tokenizer=tokenizer, image=STILL, text=TEXT)
    got = attempt(examples, 0, random.Random(0))
    if usable:
        assert got.box == pytest.approx((55 / 60, 12.5 / 40, 10 / 60, 15 / 40))
    else:
        assert (got.cause, got.file) == ("box outside the image", "k")


@pytest.mark.parametrize(
    ("kind", "entry", "cause"),
    [
        (RetrievalExamples, {"image": "0.jpg", "question": "dog", "answer": "a"}, "no caption or expression"),
        (RetrievalExamples, {"image": "9.jpg", "caption": "dog"}, "missing file"),
        (RetrievalExamples, {"image": "0.jpg", "caption": "!"}, "empty text"),
        (VqaExamples, {"image": "0.jpg", "question": "dog"}, "no answer"),
        (VqaExamples, {"image": "0.jpg", "question": "?", "answer": "a"}, "empty text"),
        (NlvrExamples, {"image": "0", "sentence": "dog", "label": "neutral"}, "no sentence"),
        (EntailmentExamples, {"image": "0.jpg", "caption": "dog"}, "no label"),
        (CaptionExamples, {"image": "0.jpg", "text": "dog", "ref_id": 1}, "no caption"),
        (BoxExamples, {"image": "0.jpg", "text": "dog", "ref_id": 1}, "no box"),
    ],
)
def test_rows_that_do_not_fit_the_task_say_so(rows, tokenizer, kind, entry, cause):
    examples = kind(source=rows(entry), tokenizer=tokenizer, image=STILL)
    got = attempt(examples, 0, random.Random(0))
    assert isinstance(got, Skipped) and got.cause == cause and got.file


def test_images_of_different_sizes_share_a_batch(rows, tokenizer, images, encoded):
    (images / "1.jpg").write_bytes(encoded(1, size=(40, 60)))
    source = rows({"image": "0.jpg", "caption": "a dog"}, {"image": "1.jpg", "caption": "cat"})
    view = Detection(size=20, longest=60, scales=(20,), crop="none", flip=0.0)
    batch = batch_of(RetrievalExamples(source=source, tokenizer=tokenizer, image=view, text=TEXT))
    assert batch.image.shape == (2, 3, 30, 30) and batch.padding.shape == (2, 30, 30)
    assert torch.equal(batch.image[0, :, :20], view.evaluate(pixels(images, 0)))
    assert torch.equal(batch.image[1, :, :, :20], view.evaluate(pixels(images, 1)))
    assert batch.padding[0, 20:].all() and not batch.padding[0, :20].any()
    assert [part.padding.shape for part in batch.split(2)] == [(1, 30, 30)] * 2
    plain = batch_of(RetrievalExamples(source=source, tokenizer=tokenizer, image=STILL, text=TEXT))
    assert plain.padding is None


@pytest.mark.parametrize("kind", [BoxExamples, partial(RegionExamples, batch_texts=4, patch_size=16)])
def test_boxes_need_a_view_that_squashes(tokenizer, kind):
    with pytest.raises(
        ValueError, match="kind=centre_crop: images with boxes are seen by a view of kind=squash"
    ):
        kind(source=[], tokenizer=tokenizer, image=CentreCrop(size=32))


def test_references_need_captions(rows):
    examples = CaptionReferencesExamples(
        source=rows({"image": "0.jpg", "text": "dog", "ref_id": 1}), image=STILL
    )
    got = attempt(examples, 0, random.Random(0))
    assert got.cause == "no caption"


def test_broken_rows_of_the_source_are_passed_on(tokenizer):
    class Broken(Rows):
        def __getitem__(self, index):
            raise BadSample("broken entry", "list.json:3", "x")

    for kind in (RetrievalExamples, VqaExamples, NlvrExamples, EntailmentExamples, BoxExamples):
        got = attempt(kind(source=Broken(), tokenizer=tokenizer), 3, random.Random(0))
        assert (got.cause, got.file) == ("broken entry", "list.json:3")


def real(folder, *names, **options):
    """Rows of real task lists with the images of the COCO sample."""
    paths = tuple(str(folder / "formats" / "albef_json" / name) for name in names)
    return TaskJson(files=paths, root=str(folder / "coco-mini"), **options).open()


def test_real_task_lists_make_batches(shared_data):
    words = Tokenizer.wordpiece(shared_data / "bert-base-uncased" / "vocab.txt")
    image = Squash(size=32, min_scale=0.5, careful_flip="substring")

    def batch(kind, source, **options):
        return batch_of(kind(source=source, image=image, **options))

    retrieval = batch(RetrievalExamples, real(shared_data, "coco_train.json"), tokenizer=words)
    rows = json.loads((shared_data / "formats" / "albef_json" / "coco_train.json").read_text())
    stated = [row["image_id"] for row in rows]
    assert len(retrieval.image_ids) == len(rows)
    for first, number in zip(stated, retrieval.image_ids.tolist(), strict=True):
        same = [n == number for n in retrieval.image_ids.tolist()]
        assert same == [other == first for other in stated]
    questions = batch(VqaExamples, real(shared_data, "vqa_train.json", "vg_qa.json"), tokenizer=words)
    weights = torch.zeros(len(questions.question_ids)).index_add(
        0, questions.question_index, questions.answer_weights
    )
    assert weights.tolist() == pytest.approx([1.0] * (len(weights) - 1) + [0.5])
    captions = batch(
        CaptionExamples, real(shared_data, "coco_train.json"), tokenizer=words, prompt="a picture of "
    )
    assert (captions.labels[:, :4] == -100).all() and (captions.labels[:, 4] != -100).all()
    assert (captions.text_ids == words.sep_id).sum(1).tolist() == [1] * len(rows)
    grouped = batch(CaptionReferencesExamples, real(shared_data, "coco_train.json", group_captions=True))
    assert [len(found) for found in grouped.references] == [
        min(5, stated.count(i)) for i in dict.fromkeys(stated)
    ]
    entailed = TaskJson(files=(str(shared_data / "snli-ve-sample" / "ve_sample.json"),)).open()
    examples = EntailmentExamples(source=entailed, tokenizer=words, image=image)
    made = attempt(examples, 0, random.Random(0))
    assert made.cause == "missing file" and made.file == "2248275918.jpg"  # Flickr's images are not passed on
