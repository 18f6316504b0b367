"""Concepts of captions and vocabularies, against the reference's parser on given parses."""

import subprocess
import sys
from collections import Counter
from functools import partial

import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st
from vlp_data.concepts import extract, grammar
from vlp_data.concepts.grammar import Parse
from vlp_data.concepts.tables import from_rows
from vlp_data.errors import DataError


def is_extraction(case) -> bool:
    return case.has("extraction.json") and {"captions", "extract_keywords"} <= case.json("extraction").keys()


def parse(*words: str) -> Parse:
    """parse("dog/NOUN/2/nsubj", ...)."""
    parts = [word.split("/") for word in words]
    return Parse(
        words=tuple(part[0] for part in parts),
        pos=tuple(part[1] for part in parts),
        heads=tuple(int(part[2]) for part in parts),
        deps=tuple(part[3] for part in parts),
    )


SINK = parse("stainless/ADJ/3/amod", "steel/NOUN/3/compound", "kitchen/NOUN/3/compound", "sink/NOUN/3/ROOT")


@pytest.mark.golden("vicha", is_extraction)
def test_concepts_and_attributes_of_every_caption_equal_the_reference(case) -> None:
    for entry in case.json("extraction")["captions"]:
        found = grammar.parse_of(entry["parse"])
        assert grammar.concepts(found, legacy=True) == entry["objects"], entry["caption"]
        pairs = [list(pair) for pair in grammar.attributes(found, legacy=True)]
        assert pairs == entry["attributes"], entry["caption"]
        spaces = entry["parse"]["spaces"]
        phrases = [
            "".join(
                found.words[n] + " " * (spaces[n] and n < head) for n in range(found.first[head], head + 1)
            )
            for head in grammar.noun_phrases(found)
        ]
        assert phrases == entry["noun_chunks"], entry["caption"]


@pytest.mark.golden("vicha", is_extraction)
def test_default_rules_name_what_the_repaired_parser_names(case) -> None:
    for entry in case.json("extraction")["captions"]:
        found = grammar.parse_of(entry["parse"])
        ours, theirs = grammar.concepts(found), entry["objects_current_parser"]
        # Its compounds are swapped; ours read as in the caption.
        assert [sorted(name.split()) for name in ours] == [sorted(name.split()) for name in theirs]
        assert all(name in entry["caption"] for name in ours)


@pytest.mark.golden("vicha", is_extraction)
def test_vocabularies_equal_the_files_of_the_reference(case) -> None:
    golden = case.json("extraction")
    parses = {entry["caption"]: grammar.parse_of(entry["parse"]) for entry in golden["captions"]}
    captions = extract.captions_of(from_rows(golden["dataset"]))
    found = list(extract.given_parses(parses)(captions.to_pylist()))
    counts = extract.count(name for each in found for name in grammar.concepts(each, legacy=True))
    for entry in golden["extract_keywords"]:
        options, expected = entry["options"], entry["file_content"]
        # The reference looks at the threshold only without a maximum.
        least = 1 if "max_num_keys" in options or "thresh" not in options else options["thresh"] + 2
        kept = extract.vocabulary(counts, min_count=least, max_concepts=options.get("max_num_keys"))
        if isinstance(expected, dict):
            assert {name: number - 1 for name, number in kept.items()} == expected
            assert list(kept) == list(expected)
        else:
            assert list(kept) == expected
        if options.get("extract_att"):
            pairs = Counter(
                " ".join(pair) for each in found for pair in grammar.attributes(each, legacy=True)
            )
            assert {name: number - 1 for name, number in pairs.items()} == entry["attributes"]
    titles = [
        grammar.title(each, caption, legacy=True)
        for each, caption in zip(found, captions.to_pylist(), strict=True)
    ]
    assert titles == golden["titles"]


def test_compounds_read_as_in_the_caption_and_swapped_with_legacy() -> None:
    assert grammar.concepts(SINK) == ["steel kitchen sink"]
    assert grammar.concepts(SINK, legacy=True) == ["kitchen steel sink"]
    nested = parse("fire/NOUN/1/compound", "truck/NOUN/2/compound", "door/NOUN/2/ROOT")
    assert grammar.concepts(nested) == ["fire truck door"]
    assert grammar.concepts(nested, legacy=True) == ["truck door"]


def test_attributes_joined_to_attributes_count_and_only_the_first_with_legacy() -> None:
    cat = parse("black/ADJ/3/amod", "white/ADJ/0/conj", "grey/ADJ/1/conj", "cat/NOUN/3/ROOT")
    assert grammar.attributes(cat) == [("cat", "black"), ("cat", "white"), ("cat", "grey")]
    assert grammar.attributes(cat, legacy=True) == [("cat", "black"), ("cat", "white")]


def test_noun_of_a_phrasal_preposition_stays_where_a_verb_with_a_subject_is_meant() -> None:
    words = ["man/NOUN/1/nsubj", "is/VERB/1/ROOT", "in/ADP/1/prep", "front/NOUN/2/pobj", "of/ADP/3/prep"]
    assert grammar.concepts(parse(*words, "door/NOUN/4/pobj")) == ["man", "door"]
    verb = [word.replace("front/NOUN", "front/VERB") for word in words]
    subject = ["he/PRON/3/nsubj"]
    assert grammar.concepts(parse(*verb, "door/NOUN/4/pobj", *subject)) == ["man", "door"]


@pytest.fixture(scope="module")
def document():
    """document(words=, pos=, heads=, deps=) -> a parsed document of spaCy."""
    spacy = pytest.importorskip("spacy", reason="spaCy is not installed")
    from spacy.tokens import Doc

    return partial(Doc, spacy.blank("en").vocab)


@given(data=st.data())
def test_noun_phrases_are_those_of_spacy(document, data: st.DataObject) -> None:
    count = data.draw(st.integers(1, 9))
    # Heads before or after, without cycles: each word hangs on one drawn earlier in a random order.
    order = data.draw(st.permutations(range(count)))
    heads = list(range(count))
    for place, word in enumerate(order[1:], 1):
        heads[word] = order[data.draw(st.integers(0, place - 1))]
    labels = ["nsubj", "dobj", "pobj", "conj", "prep", "compound", "ROOT", "attr", "amod", "oprd", "pcomp"]
    deps = [data.draw(st.sampled_from(labels)) for _ in range(count)]
    pos = [data.draw(st.sampled_from(["NOUN", "PROPN", "PRON", "VERB", "ADP", "ADJ"])) for _ in range(count)]
    words = [f"w{n}" for n in range(count)]
    doc = document(words=words, pos=pos, heads=heads, deps=deps)
    ours = Parse(words=tuple(words), pos=tuple(pos), heads=tuple(t.head.i for t in doc), deps=tuple(deps))
    expected = [(chunk.start, chunk.end - 1) for chunk in doc.noun_chunks]
    assert [(ours.first[head], head) for head in grammar.noun_phrases(ours)] == expected


def test_counts_of_parts_add_up_in_the_order_of_first_mention() -> None:
    assert extract.count(["Dog", "cat", "dog"]) == {"dog": 2, "cat": 1}
    total = extract.add([{"dog": 2, "cat": 1}, {"cat": 1, "bird": 2}])
    assert list(extract.vocabulary(total).items()) == [("dog", 2), ("cat", 2), ("bird", 2)]
    assert extract.vocabulary(total, max_concepts=1) == {"dog": 2}
    with pytest.raises(ValueError, match="min_count=0"):
        extract.vocabulary(total, min_count=0)


def test_captions_may_be_single_or_lists_or_both() -> None:
    for rows in (
        [{"caption": "a"}, {"caption": "b"}],
        [{"caption": ["a", "b"]}],
        [{"caption": "a"}, {"caption": ["b"]}],
        [{"sentence": "a", "label": "True"}, {"sentence": "b", "label": "False"}],
    ):
        assert extract.captions_of(from_rows(rows)).to_pylist() == ["a", "b"]
    with pytest.raises(DataError, match="the list has none of the fields caption"):
        extract.captions_of(from_rows([{"image": "x"}]))
    with pytest.raises(DataError, match="no `title`, only image"):
        extract.captions_of(from_rows([{"image": "x"}]), "title")


def test_missing_spacy_model_names_the_command() -> None:
    pytest.importorskip("spacy", reason="spaCy is not installed")
    with pytest.raises(DataError, match="python -m spacy download no_such_model"):
        extract.spacy_parser("no_such_model")


def test_missing_spacy_names_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "spacy", None)
    with pytest.raises(DataError, match=r"pip install 'vlp-data\[spacy\]'"):
        extract.spacy_parser()


def test_spacy_pipeline_gives_parses(tmp_path) -> None:
    spacy = pytest.importorskip("spacy", reason="spaCy is not installed")
    # A pipeline of two rules stands in for a trained model.
    nlp = spacy.blank("en")
    ruler = nlp.add_pipe("attribute_ruler")
    ruler.add([[{"LOWER": "dog"}]], {"POS": "NOUN", "DEP": "ROOT"})
    nlp.to_disk(tmp_path / "model")
    (found,) = extract.spacy_parser(str(tmp_path / "model"))(["a dog"])
    assert (found.words, found.pos, found.deps) == (("a", "dog"), ("", "NOUN"), ("", "ROOT"))
    assert grammar.concepts(found) == ["dog"]


def test_parses_are_checked(tmp_path) -> None:
    with pytest.raises(DataError, match="2 words, 1 pos"):
        Parse(words=("a", "b"), pos=("X",), heads=(0, 0), deps=("x", "y"))
    with pytest.raises(DataError, match=r"must lie in 0\.\.0"):
        Parse(words=("a",), pos=("X",), heads=(3,), deps=("x",))
    with pytest.raises(DataError, match="heads is missing"):
        grammar.parse_of({"words": [], "pos": [], "deps": []})
    with pytest.raises(DataError, match="no parse was given for the caption 'x'"):
        list(extract.given_parses({})(["x"]))


def test_parses_of_a_file(tmp_path) -> None:
    file = tmp_path / "parses.json"
    file.write_text('[{"caption": "dog", "words": ["dog"], "pos": ["NOUN"], "heads": [0], "deps": ["ROOT"]}]')
    work = extract.CountConcepts(parses=str(file))
    table = work.start()(pa.table({"text": ["dog", "dog"]}))
    assert extract.counts_of(table) == {"dog": 2}
    file.write_text('[{"caption": "dog"}]')
    with pytest.raises(DataError, match=r"parses\.json: entry 0: a parse needs"):
        work.start()


def test_importing_the_package_and_its_command_loads_nothing_heavy() -> None:
    code = (
        "import sys, vlp_data, vlp_data.concepts, vlp_data.cli\n"
        "heavy = {'torch', 'pyarrow', 'ray', 'spacy', 'open_clip', 'transformers', "
        "'numpy'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
