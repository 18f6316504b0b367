"""Caption metrics and tokens, against pycocoevalcap and its tokenizer."""

import gzip
import json
import math

import pytest
from vlp_eval.metrics import captioning
from vlp_eval.metrics.ptb import caption_tokens, tokenize

NAMES = {**{f"bleu_{n}": f"Bleu_{n}" for n in range(1, 5)}, "rouge_l": "ROUGE_L", "cider": "CIDEr"}


def check(found, expected):
    total, each = found
    for name, published in NAMES.items():
        assert total[name] == pytest.approx(expected["corpus"][published], abs=1e-9), name
    assert {str(one) for one in each} == set(expected["per_image"])
    for one, values in each.items():
        for name, published in NAMES.items():
            want = expected["per_image"][str(one)][published]
            assert values[name] == pytest.approx(want, abs=1e-9), (one, name)


def coco(case):
    references: dict[int, list[str]] = {}
    for one in case.json("references")["annotations"]:
        references.setdefault(one["image_id"], []).append(one["caption"])
    captions = {one["image_id"]: one["caption"] for one in case.json("results")}
    return captions, {one: references[one] for one in captions}


@pytest.mark.golden("metrics", lambda case: case.has("references.json", "results.json", "expected.json"))
def test_metrics_of_texts_equal_pycocoevalcap(case):
    check(captioning.scores(*coco(case)), case.json("expected"))


@pytest.mark.golden("metrics", lambda case: case.has("references.json", "results.json", "tokenized.json"))
def test_tokens_equal_the_java_tokenizer(case):
    captions, references = coco(case)
    expected = case.json("tokenized")
    for texts, key in ((references, "references"), ({k: [v] for k, v in captions.items()}, "results")):
        found = captioning.tokenized(texts)
        for one, own in found.items():
            assert [" ".join(words) for words in own] == expected[key][str(one)]


@pytest.mark.golden(
    "metrics", lambda case: case.has("cases.json") and "tokenized_results" in case.json("cases")
)
def test_edge_cases_equal_pycocoevalcap(case):
    content = case.json("cases")
    captions = {one: own[0] for one, own in content["results"].items()}
    check(captioning.scores(captions, content["references"]), content["expected"])
    for kind in ("references", "results"):
        found = captioning.tokenized(content[kind])
        assert {one: [" ".join(w) for w in own] for one, own in found.items()} == content[f"tokenized_{kind}"]


@pytest.mark.golden("metrics", lambda case: case.has("ptb_tokenizer.json"))
def test_tokenizer_equals_the_java_tokenizer(case):
    rows = case.json("ptb_tokenizer")
    found = caption_tokens([row["input"] for row in rows])
    wrong = {
        row["input"]: (" ".join(words), row["tokens"])
        for row, words in zip(rows, found, strict=True)
        if " ".join(words) != row["tokens"]
    }
    assert not wrong


@pytest.mark.golden("metrics", lambda case: case.has("case.json.gz"))
def test_cider_with_cached_document_frequencies_equals_x_vlm(case):
    content = json.loads(gzip.decompress((case.path / "case.json.gz").read_bytes()))
    found = captioning.cider_d(
        [sample["caption"][0].split() for sample in content["samples"]],
        [[text.split() for text in content["references"][str(s["image_id"])]] for s in content["samples"]],
        frequency=frequency(content),
    )
    assert found.value == pytest.approx(content["expected_mean"], abs=1e-9)
    assert found.each == pytest.approx(content["expected_scores"], abs=1e-9)


@pytest.mark.golden("xvlm", lambda case: case.has("scst_reward.json"))
def test_rewards_equal_x_vlm(case):
    content = case.json("scst_reward")
    own, result = content["references"], content["result"]
    repeated = [refs for refs in own for _ in range(content["samples_per_image"])]
    sampled = captioning.rewards(content["sampled"], repeated, frequency(content))
    assert sampled == pytest.approx(result["scores_sampled"], abs=1e-6)
    greedy = captioning.rewards(content["greedy"], own, frequency(content))
    assert greedy == pytest.approx(result["scores_greedy"], abs=1e-6)


def frequency(content):
    counts = {tuple(gram.split(" ")): count for gram, count in content["document_frequency"].items()}
    return captioning.DocumentFrequency(float(content["ref_len"]), counts)


def test_document_frequencies_are_counted_once_per_image():
    found = captioning.DocumentFrequency.of([[["a", "dog"], ["a", "cat"]], [["a"]]])
    assert found.images == 2
    assert (found.counts["a",], found.counts["dog",], found.counts["a", "dog"]) == (2, 1, 1)
    assert found.weight(("a",)) == 0 < found.weight(("unseen",)) == found.weight(("dog",))


def test_bleu_of_a_single_caption_compares_with_the_mean_length():
    references = [[["a"] * 2, ["a"] * 6]]
    alone = captioning.bleu([["a"] * 2], references)[0].value
    assert alone == pytest.approx(math.exp(1 - 4 / 2), rel=1e-6)
    assert captioning.bleu([["a"] * 2] * 2, references * 2)[0].value == pytest.approx(1.0, rel=1e-6)


def test_a_set_without_ids_in_common_is_refused():
    with pytest.raises(
        ValueError, match="1 of the referenced images are not among the captions, the first is 2"
    ):
        captioning.scores({1: "a"}, {1: ["a"], 2: ["b"]})
    with pytest.raises(ValueError, match="image 0 has no reference caption"):
        captioning.scores({1: "a"}, {1: []})


@pytest.mark.parametrize(
    ("text", "tokens"),
    [
        ("It's 5:30 p.m., isn't it?", "it 's 5:30 p.m. , is n't it ?"),
        ("'twas the dogs' y'all cannot see", "'t was the dogs ' y' all can not see"),
        ("rock'n'roll at 10:30pm for $5 (or 50%)", "rock 'n' roll at 10:30 pm for $ 5 -lrb- or 50 % -rrb-"),
        ("a 2-year-old's T-shirt, and/or 1 1/2 cups", "a 2-year-old 's t-shirt , and/or 1\u00a01/2 cups"),
        ("B&W photo no. 5 -- no. Dr. Who", "b&w photo no. 5 -- no . dr. who"),
        ("U.S.-made &amp; caf\u00e9...", "u.s.-made & caf\u00e9 ..."),
        ("Gov. J. Smith's dog on Elm St.", "gov. j. smith 's dog on elm st."),
        ("Two cats sat. A bird in the sun.The end..", "two cats sat . a bird in the sun . the end ..."),
        ("the '90s I'd've (gotta) 'see'", "the '90s i 'd 've -lrb- got ta -rrb- ` see '"),
        ("$1,000 at 3:30, #5: red,blue-ish\u2014#tag", "$ 1,000 at 3:30 , # 5 : red , blue-ish -- #tag"),
        (
            '<unk> "bird(s)" ;-). w/ -3 http://here.org',
            "<unk> `` bird -lrb- s -rrb- '' ;--rrb- . w / -3 http://here.org",
        ),
    ],
)
def test_treebank_tokens(text, tokens):
    assert " ".join(tokenize([text])[0]) == tokens


def test_tokens_of_a_caption_do_not_depend_on_the_others():
    texts = ["12th Ave S.", "vitamin C.", "a\nb", "", "..."]
    assert caption_tokens(texts) == [["12th", "ave", "s"], ["vitamin", "c"], ["a", "b"], [], []]
