"""Concepts of images as input of a model: words, ids, and batches that carry them."""

import json
import pickle
import random

import pytest
import torch
from vlp_data.concept_text import collate_concepts, concept_ids, concept_words, drawn_words, sample_concepts
from vlp_data.errors import BadSample
from vlp_data.examples import (
    BoxExamples,
    CaptionExamples,
    EntailmentExamples,
    ImageTextExamples,
    NlvrExamples,
    RegionExamples,
    RetrievalExamples,
    VqaExamples,
)
from vlp_data.loader import Skipped, attempt
from vlp_data.options import ConceptOptions, Refer, RegionLines, Squash, TaskJson, TextOptions
from vlp_data.schema import Image, Sample, Text
from vlp_data.text import Tokenizer

STILL = Squash(size=32, crop="none", flip=0.0, augment=False)
TEXT = TextOptions(max_tokens=8, pad="longest")
CONCEPTS = ConceptOptions()


def vocab_file(case):
    return next(p / "vocab.txt" for p in (case.path, *case.path.parents) if (p / "vocab.txt").is_file())


def words_of(row):
    """The concepts behind a reference text of 55 tokens, or None for other texts."""
    options = row["options"]
    if options.get("max_length") != 55 or len(row["texts"]) != 1:
        return None
    (text,) = row["texts"]
    return text.split(" [SEP] ") if " [SEP] " in text else [text]


@pytest.mark.golden(
    "vicha",
    lambda case: (
        case.has("cases.json", "vocab.txt")
        and any(words_of(row) is not None for row in case.json("cases").get("tokenizer", ()))
    ),
)
def test_concepts_are_tokenized_as_in_the_reference(case):
    tokenizer = Tokenizer.wordpiece(vocab_file(case))
    seen = set()
    for row in case.json("cases")["tokenizer"]:
        words = words_of(row)
        if words is None:
            continue
        options = ConceptOptions(max_tokens=row["options"]["max_length"], separator=len(words) > 1)
        ids, mask = collate_concepts([concept_ids(words, tokenizer, options)], tokenizer, options)
        assert ids.tolist() == row["input_ids"] and mask.tolist() == row["attention_mask"]
        seen.add(options.separator)
    assert seen == {True, False}


def sample(*words, images=1, extra=()):
    texts = (Text(text="a dog", role="caption"), *(Text(text=w, role="concept") for w in words), *extra)
    return Sample(key="list.json:3", images=(Image(path="a.jpg"),) * images, texts=texts)


def test_words_of_each_image():
    row = sample("dog", "Red Cat", extra=(Text(text="grass", role="concept", image=1),), images=2)
    assert concept_words(row) == ["dog", "Red Cat"]
    assert concept_words(row, image=1) == ["grass"]


@pytest.mark.parametrize(
    ("row", "image", "message"),
    [
        (sample(), 0, r"no concepts: list\.json:3: the row has no concepts.*concepts assign"),
        (sample(" ", ""), 0, "the row has no concepts"),
        (sample("dog", images=2), 1, "image 2 of the row has no concepts"),
    ],
)
def test_an_image_without_concepts_says_the_way_out(row, image, message):
    with pytest.raises(BadSample, match=message):
        concept_words(row, image=image)


def test_ids_end_without_a_separator_and_are_not_cleaned(tokenizer):
    a, dog, red, s = (tokenizer.token_ids(word)[0] for word in ("a", "dog", "red", "dogs"))
    assert s == dog
    plain = concept_ids(["red dog", "a"], tokenizer, ConceptOptions())
    assert plain == [tokenizer.cls_id, red, dog, a]
    apart = concept_ids(["red dog", "a"], tokenizer, ConceptOptions(separator=True))
    assert apart == [tokenizer.cls_id, red, dog, tokenizer.sep_id, a]
    # A caption would lose the stop; a concept keeps it, as a token of its own.
    assert concept_ids(["dog."], tokenizer, ConceptOptions())[2] == tokenizer.unknown_id
    assert concept_ids(["dog"] * 9, tokenizer, ConceptOptions(max_tokens=4)) == [tokenizer.cls_id] + [dog] * 3


def test_a_share_is_drawn_with_replacement():
    words = [f"word{n}" for n in range(15)]
    drawn = [drawn_words(words, ConceptOptions(share=0.3), random.Random(seed)) for seed in range(200)]
    assert {len(each) for each in drawn} == {4}
    assert any(len(set(each)) < 4 for each in drawn)
    assert {word for each in drawn for word in each} == set(words)
    assert drawn_words(words, ConceptOptions(), random.Random(0)) == words
    # int(0.3 * 3) is no word at all; one is drawn.
    assert len(drawn_words(words[:3], ConceptOptions(share=0.3), random.Random(0))) == 1


def test_padding_is_that_of_the_options(tokenizer):
    rows = [[tokenizer.cls_id, 5, 6], [tokenizer.cls_id, 7]]
    longest, mask = collate_concepts(rows, tokenizer, ConceptOptions())
    assert longest.tolist() == [[2, 5, 6], [2, 7, 0]] and mask.tolist() == [[1, 1, 1], [1, 1, 0]]
    full, _ = collate_concepts(rows, tokenizer, ConceptOptions(pad="max"))
    assert full.shape == (2, 55) and torch.equal(full[:, :3], longest) and not full[:, 3:].any()
    assert collate_concepts(rows, tokenizer, None) is None


def test_nothing_is_read_or_drawn_without_options(tokenizer):
    rng = random.Random(0)
    before = rng.getstate()
    assert sample_concepts(sample(), tokenizer, None, rng) == []
    assert rng.getstate() == before


# ------------------------------------------------------------------------------------------------ batches


@pytest.fixture
def rows(tmp_path, encoded):
    for name in range(3):
        (tmp_path / f"{name}.jpg").write_bytes(encoded(name))

    def make(*entries):
        (tmp_path / "list.json").write_text(json.dumps(list(entries)))
        return TaskJson(files=(str(tmp_path / "list.json"),), root=str(tmp_path)).open()

    return make


def batch_of(examples, seed=0):
    examples = pickle.loads(pickle.dumps(examples))
    made = [examples.example(n, random.Random(n + seed)) for n in range(len(examples))]
    return examples.collate(made, random.Random(0))


ONE = {"kwords": ["red dog", "cat"]}
TWO = {"kwords": ["grass"]}
KINDS = {
    "captions": (ImageTextExamples, {"image": "0.jpg", "caption": "a dog"}),
    "retrieval": (RetrievalExamples, {"image": "0.jpg", "caption": "a dog"}),
    "expressions": (RetrievalExamples, {"image": "0.jpg", "text": "a dog", "ref_id": 1}),
    "questions": (VqaExamples, {"image": "0.jpg", "question": "dog", "answer": "cat"}),
    "entailment": (EntailmentExamples, {"image": "0.jpg", "sentence": "dog", "label": "neutral"}),
}


@pytest.mark.parametrize("kind", KINDS)
def test_batches_carry_the_concepts_of_their_images(rows, tokenizer, kind):
    maker, entry = KINDS[kind]
    source = rows({**entry, **ONE}, {**entry, **TWO})
    arguments = {"source": source, "tokenizer": tokenizer, "image": STILL, "text": TEXT}
    batch = batch_of(maker(**arguments, concepts=CONCEPTS))
    ids, mask = batch.concepts
    expected = [concept_ids(words["kwords"], tokenizer, CONCEPTS) for words in (ONE, TWO)]
    assert ids.tolist() == [expected[0], [*expected[1], 0, 0]] and mask.sum(1).tolist() == [4, 2]
    assert ids.dtype == mask.dtype == torch.int64
    assert {x.device.type for x in batch.to("meta").concepts} == {"meta"}
    # Without the option nothing else changes.
    plain = batch_of(maker(**arguments))
    assert plain.concepts is plain.to("meta").concepts is None
    assert torch.equal(plain.image, batch.image)


@pytest.mark.parametrize("kind", KINDS)
def test_a_row_without_concepts_is_passed_over_where_they_are_read(rows, tokenizer, kind):
    maker, entry = KINDS[kind]
    source = rows({**entry, **ONE}, entry)
    examples = maker(source=source, tokenizer=tokenizer, image=STILL, text=TEXT, concepts=CONCEPTS)
    made = attempt(examples, 1, random.Random(0))
    assert isinstance(made, Skipped)
    assert made.cause == "no concepts" and made.file.endswith("list.json:1")


def test_captions_to_be_written_carry_concepts(rows, tokenizer):
    source = rows({"image": "0.jpg", "caption": "a dog", **ONE})
    batch = batch_of(CaptionExamples(source=source, tokenizer=tokenizer, image=STILL, concepts=CONCEPTS))
    assert batch.concepts.ids.tolist() == [concept_ids(ONE["kwords"], tokenizer, CONCEPTS)]


def test_the_two_sides_of_a_pair_are_padded_apart(rows, tokenizer):
    entry = {"sentence": "a dog", "label": "True", "images": ["0.jpg", "1.jpg"]}
    source = rows(
        {**entry, "kwords1": ["cat"], "kwords2": ["a red dog", "grass"]},
        {**entry, "kwords1": ["red dog"], "kwords2": ["a"]},
    )
    arguments = {"source": source, "tokenizer": tokenizer, "image": STILL, "text": TEXT}
    batch = batch_of(NlvrExamples(**arguments, concepts=CONCEPTS))
    cls, cat, red, dog, grass, a = (
        tokenizer.cls_id,
        *(tokenizer.token_ids(w)[0] for w in ("cat", "red", "dog", "grass", "a")),
    )
    assert batch.concepts.ids.tolist() == [[cls, cat, 0], [cls, red, dog]]
    assert batch.second_concepts.ids.tolist() == [[cls, a, red, dog, grass], [cls, a, 0, 0, 0]]
    assert batch.concepts[1].sum(1).tolist() == [2, 3] and batch.second_concepts[1].sum(1).tolist() == [5, 2]
    plain = batch_of(NlvrExamples(**arguments))
    assert plain.concepts is plain.second_concepts is None


def test_a_share_changes_from_visit_to_visit(rows, tokenizer):
    source = rows({"image": "0.jpg", "caption": "a dog", "kwords": ["a", "dog", "cat", "red", "grass", "on"]})
    examples = ImageTextExamples(
        source=source, tokenizer=tokenizer, image=STILL, concepts=ConceptOptions(share=0.5)
    )
    drawn = {tuple(batch_of(examples, seed).concepts.ids[0].tolist()) for seed in range(10)}
    assert len(drawn) > 5 and {len(ids) for ids in drawn} == {4}


def test_region_batches_have_one_row_of_concepts_per_image(tmp_path, region_line, tokenizer):
    words = [["red dog", "cat"], ["grass"], ["a"]]
    lines = [region_line(n, kwords=each) for n, each in enumerate(words)]
    (tmp_path / "a").write_text("\n".join(lines) + "\n")
    source = RegionLines(files=(str(tmp_path / "a"),)).open()
    arguments = {"source": source, "tokenizer": tokenizer, "image": Squash(size=32)}
    batch = batch_of(RegionExamples(**arguments, batch_texts=7, patch_size=16, concepts=CONCEPTS))
    assert batch.concepts.attention_mask.sum(1).tolist() == [4, 2, 2] and len(batch.image) == 3
    plain = batch_of(RegionExamples(**arguments, batch_texts=7, patch_size=16))
    assert plain.concepts is None and torch.equal(plain.text_ids, batch.text_ids)


def test_expressions_with_boxes_carry_concepts(tmp_path, encoded, tokenizer):
    (tmp_path / "0.jpg").write_bytes(encoded(0))
    entry = {"image": "0.jpg", "text": "red dog", "bbox": [5, 5, 20, 20], **ONE}
    (tmp_path / "list.json").write_text(json.dumps([entry]))
    source = Refer(files=(str(tmp_path / "list.json"),), root=str(tmp_path)).open()
    batch = batch_of(BoxExamples(source=source, tokenizer=tokenizer, image=STILL, concepts=CONCEPTS))
    assert batch.concepts.ids.tolist() == [concept_ids(ONE["kwords"], tokenizer, CONCEPTS)]
