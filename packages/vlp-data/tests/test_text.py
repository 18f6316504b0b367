"""Clean-up, tokenizers and their golden cases."""

import json
import pickle
import random

import pytest
import torch
from vlp_data.errors import BadSample, DataError
from vlp_data.options import IndependentMasking, MaskingOptions, TextOptions
from vlp_data.text import (
    Reading,
    Tokenizer,
    collate_masked,
    masked_text,
    names_a_side,
    pre_caption,
    pre_question,
)


def rows_of(case, *keys):
    """The one JSON list of a case whose entries have these keys, or None."""
    for file in [case.path] if case.path.is_file() else sorted(case.path.glob("*.json")):
        content = json.loads(file.read_text())
        if (
            isinstance(content, list)
            and content
            and isinstance(content[0], dict)
            and set(keys) <= set(content[0])
        ):
            return content
    return None


def vocab_file(case):
    return next(p / "vocab.txt" for p in (case.path, *case.path.parents) if (p / "vocab.txt").is_file())


@pytest.mark.golden("xvlm", lambda case: rows_of(case, "text", "pre_caption", "pre_question") is not None)
def test_text_normalisation(case):
    for row in rows_of(case, "text", "pre_caption", "pre_question"):
        expected = row["pre_caption"]
        if isinstance(expected, dict):  # {"error": "ValueError"}
            with pytest.raises(ValueError, match="holds no word"):
                pre_caption(row["text"], row["max_words"])
        else:
            assert pre_caption(row["text"], row["max_words"]) == expected
        assert pre_question(row["text"], row["max_words"]) == row["pre_question"]


@pytest.mark.golden("metrics", lambda case: rows_of(case, "input", "xvlm_pre_caption") is not None)
def test_text_cleaning(case):
    for row in rows_of(case, "input", "xvlm_pre_caption"):
        kept = pre_caption(row["input"], row["max_words"], empty="keep")
        assert kept == row["albef_pre_caption"] == row["vicha_pre_caption"]
        if row["albef_pre_caption"]:
            assert pre_caption(row["input"], row["max_words"]) == row["xvlm_pre_caption"]
        else:
            with pytest.raises(ValueError, match="holds no word"):
                pre_caption(row["input"], row["max_words"])
        assert pre_question(row["input"], row["max_words"]) == row["pre_question"]


@pytest.mark.golden(
    "xvlm", lambda case: case.has("tokenization.json") and "no_sep_tokenizer" in case.json("tokenization")
)
def test_tokenization(case):
    expected = case.json("tokenization")
    tokenizer = Tokenizer.wordpiece(vocab_file(case))
    for name, separator in (("no_sep_tokenizer", False), ("standard_tokenizer", True)):
        for padding, want in expected[name].items():
            limit = int(padding.rsplit("_", 1)[1]) if padding.startswith("max_length") else None
            ids, mask = tokenizer.encode(
                expected["texts"], max_tokens=limit, separator=separator, pad="max" if limit else "longest"
            )
            assert ids.tolist() == want["input_ids"]
            assert mask.tolist() == want["attention_mask"]


def is_vicha_text(case):
    return case.has("cases.json", "vocab.txt") and {"pre_caption", "tokenizer"} <= set(case.json("cases"))


@pytest.mark.golden("vicha", is_vicha_text)
def test_cleaning_of_vicha(case):
    cases = case.json("cases")
    for row in cases["pre_caption"]:
        assert pre_caption(row["text"], row["max_words"], empty="keep") == row["result"]
    for row in cases["pre_question"]:
        assert pre_question(row["text"], row["max_words"]) == row["result"]


@pytest.mark.golden("vicha", is_vicha_text)
def test_tokenization_of_vicha(case):
    tokenizer = Tokenizer.wordpiece(vocab_file(case))
    for row in case.json("cases")["tokenizer"]:
        options = row["options"]
        # Answers carry their [SEP] as text there; here the option puts it.
        answers = all(text.endswith("[SEP]") for text in row["texts"])
        ids, mask = tokenizer.encode(
            [text.removesuffix("[SEP]") for text in row["texts"]] if answers else row["texts"],
            max_tokens=options.get("max_length"),
            separator=answers,
            pad="max" if options["padding"] == "max_length" else "longest",
        )
        assert ids.tolist() == row["input_ids"] and mask.tolist() == row["attention_mask"]


def test_ids_of_the_bert_vocabulary_equal_the_original_tokenizer(shared_data):
    folder = shared_data / "bert-base-uncased"
    tokenizer = Tokenizer.wordpiece(folder / "vocab.txt")
    expected = json.loads((folder / "expected_ids.json").read_text())
    for row in expected["rows"]:
        assert tokenizer.tokens(row["text"]) == row["tokens"], row["text"]
        ids, _ = tokenizer.encode([row["text"]], separator=True)
        assert ids[0].tolist() == row["ids"], row["text"]
    for row in expected["padded"]:
        ids, mask = tokenizer.encode([row["text"]], max_tokens=row["max_length"], separator=True, pad="max")
        assert ids[0].tolist() == row["ids"]
        assert mask[0].tolist() == row["mask"]


@pytest.mark.golden(
    "xvlm", lambda case: case.has("text_masking.json") and "preprocess" in case.json("text_masking")
)
def test_masked_text(case):
    tokenizer = Tokenizer.wordpiece(vocab_file(case))
    for row in case.json("text_masking")["preprocess"]:
        options = TextOptions(
            max_words=row["max_words"], max_tokens=row["max_tokens"], separator=row["add_eos"]
        )
        masking = MaskingOptions(
            probability=row["mask_prob"],
            max_masks=row["max_masks"],
            skipgram_probability=row["skipgram_prb"],
            skipgram_size=row["skipgram_size"],
            whole_words=row["mask_whole_word"],
        )
        text = masked_text(row["caption"], tokenizer, options, masking, random.Random(row["seed"]))
        batch = collate_masked([text], tokenizer, options, masking)
        assert batch.text_ids[0].tolist() == row["text_ids"]
        assert batch.attention_mask[0].tolist() == row["text_atts"]
        assert batch.masked_ids[0].tolist() == row["text_ids_masked"]
        assert batch.masked_positions[0].tolist() == row["masked_pos"]
        assert batch.masked_labels[0].tolist() == row["masked_ids"]


@pytest.fixture
def bert(tmp_path):
    file = tmp_path / "vocab.txt"
    file.write_text(
        "\n".join(
            ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "dog", "##s", "run", "##ning", "\u2028"]
        )
    )
    return Tokenizer.wordpiece(file)


@pytest.fixture
def roberta(tmp_path):
    pieces = [
        "<s>",
        "<pad>",
        "</s>",
        "<unk>",
        "<mask>",
        "d",
        "o",
        "g",
        "s",
        "\u0120",
        "do",
        "dog",
        "\u0120d",
        "\u0120dog",
    ]
    (tmp_path / "vocab.json").write_text(json.dumps({p: n for n, p in enumerate(pieces)}))
    (tmp_path / "merges.txt").write_text("#version: 0.2\nd o\ndo g\n\u0120 dog\n")
    return Tokenizer.roberta(tmp_path / "vocab.json", tmp_path / "merges.txt")


def test_a_tokenizer_survives_pickling(bert, roberta):
    for tokenizer, text in ((bert, "a dogs running"), (roberta, "dog dogs")):
        copy = pickle.loads(pickle.dumps(tokenizer))
        assert copy.token_ids(text) == tokenizer.token_ids(text)
        assert copy.continues(copy.token_ids(text)) == tokenizer.continues(tokenizer.token_ids(text))


def test_roberta_marks_words_by_the_blank_before_them(roberta):
    ids = roberta.frame(roberta.token_ids("dogs dogs"), max_tokens=None, separator=True)
    assert roberta.backend.decode(ids, skip_special_tokens=False) == "<s>dogs dogs</s>"
    assert roberta.continues(ids) == [False, False, True, False, True, False]
    assert roberta.pad([ids, ids[:2]]).ids[1].tolist() == [0, ids[1], 1, 1, 1, 1]


def test_whole_words_are_masked_with_roberta(roberta):
    masking = MaskingOptions(probability=0.3, max_masks=4, skipgram_probability=0.0)
    options = TextOptions(max_tokens=8)
    words = {(1, 2), (3, 4)}
    for seed in range(20):
        text = masked_text("dogs dogs", roberta, options, masking, random.Random(seed))
        # Two of five tokens are to be predicted: one word, never halves of two.
        if len(text.positions) == 2:
            assert tuple(sorted(text.positions)) in words


def test_padding_to_the_longest_text_changes_the_length_alone(bert):
    masking = MaskingOptions(max_masks=2)
    texts = [
        masked_text(t, bert, TextOptions(), masking, random.Random(0)) for t in ("a dog", "a dogs running")
    ]
    full = collate_masked(texts, bert, TextOptions(max_tokens=12), masking)
    short = collate_masked(texts, bert, TextOptions(max_tokens=12, pad="longest"), masking)
    assert full.text_ids.shape == (2, 12) and short.text_ids.shape == (2, 6)
    assert torch.equal(full.text_ids[:, :6], short.text_ids) and not full.attention_mask[:, 6:].any()
    assert torch.equal(full.masked_labels, short.masked_labels)


def test_independent_masks_are_as_wide_as_they_must_be(bert):
    masking = IndependentMasking(probability=0.5)
    options, longest = TextOptions(max_tokens=12), TextOptions(max_tokens=12, pad="longest")
    texts = [masked_text("a dogs running" * 2, bert, options, masking, random.Random(n)) for n in range(20)]
    full, short = (collate_masked(texts, bert, each, masking) for each in (options, longest))
    assert full.masked_positions.shape == full.masked_labels.shape == (20, 11)
    counts = [len(text.positions) for text in texts]
    width = max(counts)
    assert short.masked_positions.shape == (20, width) and width < 11
    assert torch.equal(full.masked_labels[:, :width], short.masked_labels)
    assert (short.masked_labels != -100).sum(1).tolist() == counts
    rows = torch.arange(20)[:, None]
    valid = short.masked_labels != -100
    assert torch.equal(short.text_ids[rows, short.masked_positions][valid], short.masked_labels[valid])
    assert (short.masked_ids[:, 0] == bert.cls_id).all() and (short.masked_ids == bert.mask_id).any()
    assert torch.equal(short.masked_ids[short.attention_mask == 0], short.text_ids[short.attention_mask == 0])


def test_a_batch_without_a_masked_token_has_one_unused_place(bert):
    masking, options = IndependentMasking(probability=0.0), TextOptions(pad="longest")
    texts = [masked_text("a dog", bert, options, masking, random.Random(n)) for n in range(2)]
    batch = collate_masked(texts, bert, options, masking)
    assert batch.masked_labels.tolist() == [[-100], [-100]] and batch.masked_positions.tolist() == [[0], [0]]
    assert torch.equal(batch.masked_ids, batch.text_ids)


def test_tokenized_captions_are_taken_piece_by_piece(bert):
    options = TextOptions(tokenized=True, max_tokens=6)
    text = masked_text("a dog ##s zebra", bert, options, MaskingOptions(), random.Random(0))
    assert text.ids == [2, 5, 6, 7, 1]


@pytest.mark.parametrize("caption", ["", " .,!? ", "\n"])
def test_a_text_without_words_is_a_bad_sample(bert, caption):
    with pytest.raises(BadSample, match="empty text"):
        masked_text(caption, bert, TextOptions(), MaskingOptions(), random.Random(0))


def test_left_and_right_as_substring_or_word():
    assert names_a_side("a bright room", whole_word=False)
    assert not names_a_side("a bright room", whole_word=True)
    assert names_a_side("the Left one", whole_word=True)


def test_vocabulary_errors_name_the_file(tmp_path):
    with pytest.raises(DataError, match=r"nowhere\.txt not found"):
        Tokenizer.wordpiece(tmp_path / "nowhere.txt")
    file = tmp_path / "vocab.txt"
    file.write_text("[PAD]\n[UNK]\na\n")
    with pytest.raises(DataError, match=r"vocab\.txt lacks the special tokens \[CLS\], \[SEP\], \[MASK\]"):
        Tokenizer.wordpiece(file)
    file.write_text("[PAD]\na\na\n")
    with pytest.raises(DataError, match="the piece 'a' occurs twice"):
        Tokenizer.wordpiece(file)


def test_roberta_files_are_checked(tmp_path, roberta):
    with pytest.raises(DataError, match=r"gone\.json not found; RoBERTa needs"):
        Tokenizer.roberta(tmp_path / "gone.json", tmp_path / "merges.txt")
    for vocabulary, merges in (("{", ""), ("{}", "one\n"), ('{"a": 0}', "b c\n")):
        (tmp_path / "v.json").write_text(vocabulary)
        (tmp_path / "m.txt").write_text(merges)
        with pytest.raises(DataError, match=r"v\.json and .*m\.txt are no vocabulary with its merges"):
            Tokenizer.roberta(tmp_path / "v.json", tmp_path / "m.txt")


def test_padding_to_max_needs_a_number(bert):
    with pytest.raises(ValueError, match="needs max_tokens"):
        bert.encode(["a"], separator=False, pad="max")


# ------------------------------------------------------------------------------------------------- reading


def test_a_reading_cleans_and_frames(bert):
    texts = ["A dog -- running!", "dogs"]
    ids, mask = Reading(separator=True).encode(bert, texts, "cpu")
    assert ids.tolist() == [[2, 5, 6, 8, 9, 3], [2, 6, 7, 3, 0, 0]] and mask.sum(1).tolist() == [6, 4]
    cut = Reading(max_tokens=4, separator=True).encode(bert, texts, "cpu").ids
    assert cut.tolist() == [[2, 5, 6, 3], [2, 6, 7, 3]]
    assert Reading(max_words=1).encode(bert, texts, "cpu").ids.tolist() == [[2, 5, 0], [2, 6, 7]]
    # Double blanks are words of a question; a text that is not cleaned keeps its signs and all of its words.
    assert Reading(clean="question", max_words=2).encode(bert, ["a  dog"], "cpu").ids.tolist() == [[2, 5]]
    raw = Reading(clean="none", max_words=1).encode(bert, ["a dog!"], "cpu").ids
    assert raw.tolist() == [[2, 5, 6, bert.unknown_id]]


def test_a_reading_refuses_a_caption_without_a_word(bert):
    with pytest.raises(ValueError, match="holds no word"):
        Reading().encode(bert, ["!"], "cpu")
    assert Reading(clean="none", separator=True).encode(bert, [""], "cpu").ids.tolist() == [[2, 3]]


def test_a_reading_is_stored_with_an_export():
    reading = Reading(clean="question", max_words=50, max_tokens=12, separator=True)
    config = json.loads(json.dumps(reading.config()))
    assert Reading.from_config(config) == reading
    assert Reading.from_config({"tokenizer": {"kind": "wordpiece"}, **config}) == reading
    assert Reading.from_config({"max_tokens": None}) == Reading()
    for broken, message in (
        ({"cleaning": "none"}, "reading: unknown key 'cleaning'; known here: clean, max_words"),
        ({"clean": "words"}, "clean='words' must be one of caption, question, none"),
        ({"max_words": 0}, "reading: max_words=0 must be positive"),
        ({"max_tokens": 2, "separator": True}, "max_tokens=2 leaves no room"),
    ):
        with pytest.raises(ValueError, match=message):
            Reading.from_config(broken)


def test_the_reading_of_a_training():
    options = TextOptions(max_words=7, max_tokens=9, separator=True)
    assert Reading.of(options) == Reading(max_words=7, max_tokens=9, separator=True)
    assert Reading.of(options, clean="question").clean == "question"
    assert Reading.of(TextOptions(clean="none"), clean="question").clean == "none"


@pytest.mark.parametrize(
    ("clean", "words"),
    [
        (None, ["a", "dog"]),
        ("caption", ["a", "dog"]),
        ("question", ["a", "dog"]),
        ("none", ["a", "dog", "!"]),
    ],
)
def test_texts_are_cleaned_as_the_options_say(bert, clean, words):
    options = TextOptions(clean=clean, max_tokens=9)
    ids = masked_text("a dog!", bert, options, MaskingOptions(), random.Random(0)).ids
    assert ids == [bert.cls_id, *bert.piece_ids(words)]
