"""Tokenizers by kind: what each can, ids of the originals, files that are no vocabulary."""

import builtins
import json
import pickle
import random
import sys

import pytest
import tokenizers
from vlp_data.errors import DataError
from vlp_data.examples import CaptionExamples, ImageTextExamples, RetrievalExamples, VqaExamples
from vlp_data.options import MaskingOptions, SpecialTokens, TextOptions, TokenizerFiles
from vlp_data.text import masked_text
from vlp_data.tokenizer import Special, Tokenizer


@pytest.fixture(scope="module")
def clip_file(shared_data):
    return shared_data / "clip-bpe" / "bpe_simple_vocab_16e6.txt.gz"


@pytest.fixture(scope="module")
def clip(clip_file):
    return Tokenizer.clip(clip_file)


@pytest.fixture
def small_clip(tmp_path):
    """CLIP's kind with three merges."""
    file = tmp_path / "merges.txt"
    file.write_text("#version: 0.2\nd o\ndo g</w>\nc a\n")
    return Tokenizer.clip(file)


@pytest.fixture
def words(tmp_path):
    file = tmp_path / "wordmap.json"
    file.write_text(
        json.dumps({"a": 1, "dog": 2, "cat": 3, "<unk>": 4, "<start>": 5, "<end>": 6, "<pad>": 0})
    )
    return Tokenizer.words(file)


SPECIAL = Special(start="<s>", end="</s>", pad="<pad>", mask="", unknown="<unk>")


@pytest.fixture
def unigram_file(tmp_path):
    pieces = [("<s>", 0.0), ("</s>", 0.0), ("<pad>", 0.0), ("<unk>", -9.0), ("\u2581a", -1.0)]
    pieces += [("\u2581dog", -1.0), ("s", -2.0)]
    backend = tokenizers.Tokenizer(tokenizers.models.Unigram(pieces, unk_id=3))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace()
    backend.decoder = tokenizers.decoders.Metaspace()
    backend.enable_truncation(2)
    backend.enable_padding(length=30)
    file = tmp_path / "tokenizer.json"
    backend.save(str(file))
    return file


# ---------------------------------------------------------------------------------------------------- CLIP


def rows_of(encoded, pad=0):
    """Rows as the fixtures have them: the padding at the end left out."""
    return [row[mask == 1].tolist() for row, mask in zip(*encoded, strict=True)]


def is_clip(case):
    config = case.config
    return {"sot", "eot", "vocab_size"} <= set(config) and case.has("inputs.json", "outputs.json")


@pytest.mark.golden("memclip", is_clip)
def test_ids_of_clip(case, clip, clip_file):
    texts, expected = case.json("inputs"), case.json("outputs")
    assert clip.vocabulary == case.config["vocab_size"]
    assert (clip.cls_id, clip.sep_id, clip.pad_id) == (case.config["sot"], case.config["eot"], 0)
    for context, rows in expected.items():
        tokenizer = clip
        if "LongCLIP" in case.config.get("dtype", "") and context == "248":
            # Long-CLIP and OpenAI write the special words in another way.
            tokenizer = Tokenizer.clip(clip_file, special=("<|startoftext|>", "<|endoftext|>"))
        ids, mask = tokenizer.encode(texts, max_tokens=int(context), separator=True, pad="max")
        assert ids.shape == (len(texts), int(context))
        for row, want, text in zip(ids.tolist(), rows, texts, strict=True):
            want = want + [0] * (int(context) - len(want))
            assert row == want, text
        assert (ids[mask == 0] == 0).all()


def test_ids_of_the_real_vocabulary(shared_data, clip):
    expected = json.loads((shared_data / "clip-bpe" / "expected_ids.json").read_text())
    for row in expected["rows"]:
        context = row.get("context_length", 77)
        encoded = clip.encode([row["text"]], max_tokens=context, separator=True)
        assert rows_of(encoded) == [row["ids"]], row["text"]


def test_clip_equals_open_clip_on_odd_texts(clip):
    import open_clip

    official = open_clip.SimpleTokenizer(context_length=32)
    texts = [
        "a  caf\u00e9, isn't it?  <end_of_text> and on",
        "\u0130stanbul \u1e9eTRA\u00dfE &amp;amp; caf&eacute; 3,141 \U0001f600",
        "don\u00e2\u20ac\u2122t \x1c control\x85signs\u2028 \u3000",
        "",
        "I'LL 's'S \u017ft 'd",
    ]
    ours, _ = clip.encode(texts, max_tokens=32, separator=True, pad="max")
    assert ours.tolist() == official(texts).tolist()
    assert clip.decode(clip.token_ids("A dog, 12 cats")) == "a dog , 1 2 cats"


def test_clip_reads_the_files_of_transformers_too(tmp_path, clip, clip_file):
    vocabulary = clip.backend.get_vocab()
    names = {"<start_of_text>": "<|startoftext|>", "<end_of_text>": "<|endoftext|>"}
    (tmp_path / "vocab.json").write_text(
        json.dumps({names.get(piece, piece): number for piece, number in vocabulary.items()})
    )
    import gzip

    lines = gzip.decompress(clip_file.read_bytes()).decode().split("\n")[1 : 48894 + 1]
    (tmp_path / "merges.txt").write_text("\n".join(["#version: 0.2", *lines]) + "\n")
    other = Tokenizer.clip(tmp_path / "vocab.json", tmp_path / "merges.txt")
    texts = ["A photo of 3 dogs' tails!", "na\u00efve \u2014 fa\u00e7ade"]
    assert [other.token_ids(text) for text in texts] == [clip.token_ids(text) for text in texts]
    assert (other.cls_id, other.sep_id, other.vocabulary) == (49406, 49407, 49408)


def test_the_end_of_a_cut_text_stays(small_clip):
    ids, mask = small_clip.encode(["dog dog dog dog", "dog"], max_tokens=4, separator=True)
    dog, end = small_clip.token_ids("dog")[0], small_clip.sep_id
    assert ids.tolist() == [[small_clip.cls_id, dog, dog, end], [small_clip.cls_id, dog, end, 0]]
    assert mask.tolist() == [[1, 1, 1, 1], [1, 1, 1, 0]]


def test_clip_marks_the_ends_of_words(small_clip):
    ids = small_clip.frame(small_clip.token_ids("cat dog"), max_tokens=None, separator=True)
    assert small_clip.backend.decode(ids, skip_special_tokens=False)
    # start, ca, t</w>, dog</w>, end
    assert small_clip.continues(ids) == [False, False, True, False, False]


def test_a_missing_ftfy_is_said_with_the_way_out(small_clip, tmp_path, monkeypatch):
    real, expected = builtins.__import__, small_clip.token_ids("dog & dog")

    def without(name, *arguments, **named):
        if name == "ftfy":
            raise ImportError("No module named 'ftfy'")
        return real(name, *arguments, **named)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(DataError, match=r"`pip install 'vlp-data\[clip\]'`, or mend=false"):
        Tokenizer.clip(tmp_path / "merges.txt")
    plain = Tokenizer.clip(tmp_path / "merges.txt", mend=False)
    assert plain.token_ids(" DOG &amp; dog") == expected


def test_tokenizing_without_ftfy_takes_texts_as_they_are(tmp_path, small_clip):
    plain = Tokenizer.clip(tmp_path / "merges.txt", mend=False)
    damaged = "don\u00e2\u20ac\u2122t"
    assert plain.token_ids(damaged) != small_clip.token_ids(damaged) == small_clip.token_ids("don't")
    assert "ftfy" in sys.modules


def test_files_that_hold_no_merges_are_named(tmp_path):
    file = tmp_path / "merges.txt"
    for content in ("", "#version\na b c\n"):
        file.write_text(content)
        with pytest.raises(DataError, match=r"merges\.txt holds no merges"):
            Tokenizer.clip(file)
    file.write_bytes(b"\x1f\x8bbroken")
    with pytest.raises(DataError, match=r"merges\.txt cannot be read"):
        Tokenizer.clip(file)
    with pytest.raises(DataError, match=r"gone\.gz not found; CLIP needs"):
        Tokenizer.clip(tmp_path / "gone.gz")


# --------------------------------------------------------------------------------------------------- words


def test_words_are_what_stands_between_blanks(words):
    ids, mask = words.encode(["a  dog", "a Cat dogs"], separator=True)
    assert ids.tolist() == [[5, 1, 2, 6, 0], [5, 1, 4, 4, 6]] and mask.sum(1).tolist() == [4, 5]
    assert words.continues(ids[0].tolist()) == [False] * 5
    assert words.decode([5, 1, 2, 6]) == "a dog" and words.vocabulary == 7


def test_the_word_map_of_visft(shared_data):
    folder = shared_data / "formats" / "visft_hdf5"
    tokenizer = Tokenizer.words(next(folder.glob("WORDMAP_*.json")))
    captions = json.loads(next(folder.glob("TRAIN_CAPTIONS_*.json")).read_text())
    lengths = json.loads(next(folder.glob("TRAIN_CAPLENS_*.json")).read_text())
    for row, length in zip(captions, lengths, strict=True):
        text = tokenizer.decode(row[1 : length - 1])
        known = [number for number in row[1 : length - 1] if number != tokenizer.unknown_id]
        assert tokenizer.token_ids(text) == known
        assert row[0] == tokenizer.cls_id and row[length - 1] == tokenizer.sep_id
        assert set(row[length:]) <= {tokenizer.pad_id}


@pytest.mark.parametrize("content", ["[]", '{"a": "b"}', "{", '{"a": 1, "b": 1}', '{"a": 0}'])
def test_a_file_that_is_no_word_map_is_named(tmp_path, content):
    (tmp_path / "wordmap.json").write_text(content)
    with pytest.raises(DataError, match=r"wordmap\.json (is|gives|lacks)"):
        Tokenizer.words(tmp_path / "wordmap.json")


# ---------------------------------------------------------------------------------------------------- file


def test_any_tokenizer_json(unigram_file):
    tokenizer = Tokenizer.file(unigram_file, special=SPECIAL)
    ids, mask = tokenizer.encode(["a dogs", "dog"], max_tokens=5, separator=True)
    # Neither the cutting nor the padding of the file counts.
    assert ids.tolist() == [[0, 4, 5, 6, 1], [0, 5, 1, 2, 2]] and mask.sum(1).tolist() == [5, 3]
    assert tokenizer.continues(ids[0].tolist()) == [False, False, False, True, False]
    assert tokenizer.decode(ids[0].tolist()) == "a dogs"


def test_a_tokenizer_json_without_such_tokens_is_refused(unigram_file, tmp_path):
    with pytest.raises(DataError, match=r"tokenizer\.json lacks the special tokens \[CLS\]"):
        Tokenizer.file(unigram_file, special=SPECIAL._replace(start="[CLS]"))
    (tmp_path / "other.json").write_text("{}")
    with pytest.raises(DataError, match=r"other\.json is no tokenizer\.json"):
        Tokenizer.file(tmp_path / "other.json", special=SPECIAL)


def test_words_that_cannot_be_told_are_refused(tmp_path):
    backend = tokenizers.Tokenizer(
        tokenizers.models.BPE(vocab={"<s>": 0, "<pad>": 1, "a": 2, "[M]": 3}, merges=[])
    )
    backend.save(str(tmp_path / "tokenizer.json"))
    special = Special(start="<s>", end="", pad="<pad>", mask="[M]", unknown="")
    tokenizer = Tokenizer.file(tmp_path / "tokenizer.json", special=special)
    with pytest.raises(DataError, match="whole words cannot be told"):
        ImageTextExamples(source=[], tokenizer=tokenizer)
    pieces = MaskingOptions(whole_words=False, probability=1.0)
    ImageTextExamples(source=[], tokenizer=tokenizer, masking=pieces)
    masked = masked_text("aaa", tokenizer, TextOptions(), pieces, random.Random(0))
    assert masked.ids == [0, 2, 2, 2] and sorted(masked.positions) == [1, 2, 3]
    with pytest.raises(DataError, match="the vocabulary lacks the piece 'b'"):
        tokenizer.piece_ids(["a", "b"])


# -------------------------------------------------------------------------------------------- what it can


def test_every_kind_survives_pickling(small_clip, words, unigram_file):
    for tokenizer in (small_clip, words, Tokenizer.file(unigram_file, special=SPECIAL)):
        ids = tokenizer.token_ids("a dog")
        tokenizer.continues(ids)
        copy = pickle.loads(pickle.dumps(tokenizer))
        assert copy.token_ids("a dog") == ids and copy.continues(ids) == tokenizer.continues(ids)
        assert copy.sep_id == tokenizer.sep_id


def test_a_task_that_masks_refuses_a_tokenizer_without_mask(small_clip, words):
    for tokenizer in (small_clip, words):
        assert not tokenizer.can_mask and tokenizer.can_end
        with pytest.raises(
            DataError, match=f"kind {tokenizer.kind} has no mask token, which masked language"
        ):
            ImageTextExamples(source=[], tokenizer=tokenizer)
        with pytest.raises(DataError, match="has no mask token"):
            masked_text("a dog", tokenizer, TextOptions(), MaskingOptions(), random.Random(0))
        RetrievalExamples(source=[], tokenizer=tokenizer)


def test_a_task_that_ends_texts_refuses_a_tokenizer_without_end(unigram_file):
    tokenizer = Tokenizer.file(unigram_file, special=SPECIAL._replace(end=""))
    assert not tokenizer.can_end
    RetrievalExamples(source=[], tokenizer=tokenizer)
    for make in (
        lambda: VqaExamples(source=[], tokenizer=tokenizer),
        lambda: CaptionExamples(source=[], tokenizer=tokenizer),
        lambda: RetrievalExamples(source=[], tokenizer=tokenizer, text=TextOptions(separator=True)),
    ):
        with pytest.raises(DataError, match="has no token that ends a text"):
            make()


# ------------------------------------------------------------------------------------------------- options


def test_options_open_every_kind(tmp_path, unigram_file, words):
    merges = tmp_path / "merges.txt"
    merges.write_text("#version: 0.2\nd o\ndo g</w>\n")
    special = SpecialTokens(start="<s>", end="</s>", pad="<pad>", unknown="<unk>")
    cases = [
        TokenizerFiles(kind="clip", files=(str(merges),)),
        TokenizerFiles(kind="clip", files=(str(merges),), mend=False),
        TokenizerFiles(kind="clip", files=(str(merges),), special=SpecialTokens(start="<|a|>", end="<|b|>")),
        TokenizerFiles(kind="words", files=(str(tmp_path / "wordmap.json"),)),
        TokenizerFiles(kind="file", files=(str(unigram_file),), special=special),
    ]
    for options in cases:
        opened = options.open()
        assert opened.kind == options.kind and opened.mend == (options.kind == "clip" and options.mend)
        config = json.loads(json.dumps(options.config()))
        assert config["files"] == [options.files[0].rsplit("/", 1)[1]]
        again = TokenizerFiles.from_config({**config, "files": list(options.files)})
        assert again == options
    assert cases[2].open().token_ids("<|a|> dog <|b|>")[0] == cases[2].open().cls_id


def test_the_old_name_of_wordpiece_is_accepted(tmp_path):
    (tmp_path / "vocab.txt").write_text("[PAD]\n[UNK]\n[CLS]\n[SEP]\n[MASK]\na\n")
    options = TokenizerFiles(kind="bert", files=(str(tmp_path / "vocab.txt"),))
    assert options.kind == "wordpiece" and options == TokenizerFiles(files=options.files)
    tokenizer = options.open()
    assert tokenizer.kind == "wordpiece" and tokenizer.can_mask and tokenizer.can_end
    assert options.config() == {"kind": "wordpiece", "files": ["vocab.txt"]}


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: TokenizerFiles(kind="bert", files=("a", "b")),
            "a wordpiece tokenizer takes vocab.txt, got 2 files",
        ),
        (
            lambda: TokenizerFiles(kind="roberta", files=("a",)),
            "takes vocab.json and merges.txt, got 1 files",
        ),
        (lambda: TokenizerFiles(kind="clip", files=()), "takes bpe_simple_vocab_16e6.txt.gz or vocab.json"),
        (
            lambda: TokenizerFiles(kind="file", files=("a",)),
            "kind=file needs the names of its special tokens",
        ),
        (
            lambda: TokenizerFiles(files=("a",), special=SpecialTokens(start="x")),
            "special tokens of kind=wordpiece are fixed",
        ),
        (
            lambda: TokenizerFiles(kind="clip", files=("a",), special=SpecialTokens(start="x")),
            "give special.start and special.end alone",
        ),
        (lambda: TokenizerFiles(files=("a",), mend=False), "only kind=clip mends texts, not wordpiece"),
        (lambda: TokenizerFiles.from_config({"kind": "clip"}), "tokenizer: files must be given"),
        (lambda: TokenizerFiles.from_config({"files": ["a"], "bpe": 1}), "tokenizer: unknown key 'bpe'"),
        (lambda: TokenizerFiles.from_config({"files": ["a"], "kind": "bpe"}), "kind='bpe' must be one of"),
    ],
)
def test_impossible_options_are_named(make, message):
    with pytest.raises(ValueError, match=message):
        make()
