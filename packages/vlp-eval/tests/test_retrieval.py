"""Two-stage retrieval on a toy model whose scores are known, on one rank and on three."""

import itertools
import json
import subprocess
import sys
import zlib
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.functional import normalize
from vlp_core.images import Concepts, Images
from vlp_data.errors import DataError
from vlp_data.options import ConceptOptions, TaskJson
from vlp_data.text import Reading
from vlp_eval import Execution, Subject
from vlp_eval.benchmarks.retrieval import RetrievalOptions
from vlp_eval.gallery import Gallery
from vlp_eval.metrics import retrieval as metric
from vlp_eval.report import Scores
from vlp_eval.retrieval import (
    best_in_order,
    evaluate_retrieval,
    open_gallery,
    rerank,
    score_pairs,
)

IMAGES, WIDTH = 11, 6


class ImageFeatures(NamedTuple):
    embeds: torch.Tensor
    projection: torch.Tensor


class TextFeatures(NamedTuple):
    embeds: torch.Tensor
    attention_mask: torch.Tensor
    projection: torch.Tensor


class Toy(nn.Module):
    """Features are sums over unmasked tokens; a match is a nonlinear function of both. Counts what it is
    asked for."""

    def __init__(self):
        super().__init__()
        rng = torch.Generator().manual_seed(1)
        self.words = nn.Parameter(torch.randn(50, WIDTH, generator=rng))
        self.mix = nn.Parameter(torch.randn(WIDTH, WIDTH, generator=rng))
        self.dropout = nn.Dropout(0.5)
        self.images, self.texts, self.pairs, self.padding = [], [], 0, 0

    def encode_image(self, images):
        image = images.pixels
        self.images += image.flatten(1).sum(1).tolist()
        embeds = self.dropout(image.flatten(2).transpose(1, 2) @ self.mix[:3])
        return ImageFeatures(embeds, normalize(embeds.mean(1), dim=-1))

    def encode_text(self, ids, attention_mask):
        self.texts += [tuple(row[row > 0].tolist()) for row in ids]
        self.padding += int((attention_mask == 0).sum())
        embeds = self.dropout(self.words[ids])
        summed = (embeds * attention_mask[..., None]).sum(1)
        # What a model leaves at masked positions is arbitrary: make it visible if it is used.
        embeds = embeds.masked_fill(attention_mask[..., None] == 0, 1e3)
        return TextFeatures(embeds, attention_mask, normalize(summed, dim=-1))

    def match(self, image, text, image_index, text_index):
        self.pairs += len(image_index)
        words = (text.embeds * text.attention_mask[..., None]).sum(1)[text_index]
        return ((image.embeds.mean(1)[image_index] * words @ self.mix).sin()).sum(1)


class Seeing(Toy):
    """Also sees the words attached to an image, as tokens behind the patches whose padding counts; hides some
    of its tokens."""

    class Features(NamedTuple):
        embeds: torch.Tensor
        projection: torch.Tensor
        attention_mask: torch.Tensor | None = None

    def __init__(self, mask=False):
        super().__init__()
        self.vision = nn.Module()
        self.vision.concepts = nn.Identity()
        self.mask = mask
        self.padded = set()

    def encode_image(self, images):
        self.padded.add(images.concepts.ids.shape[1])
        patches = super().encode_image(images)
        embeds = torch.cat([patches.embeds, self.words[images.concepts.ids]], 1)
        mask = torch.ones(embeds.shape[:2]) if self.mask else None
        return self.Features(embeds, normalize(embeds.mean(1), dim=-1), mask)


class Words:
    pad_id, cls_id = 0, 1

    def token_ids(self, text):
        return [1 + zlib.crc32(word.encode()) % 49 for word in text.split()]

    def frame(self, ids, *, max_tokens, separator):
        return [self.cls_id, *ids][:max_tokens]

    def pad(self, rows, length):
        ids = torch.tensor([[*row, *[0] * (length - len(row))] for row in rows])
        return ids, (ids > 0).long()

    def encode(self, texts, *, max_tokens, separator, pad):
        rows = [[1 + zlib.crc32(word.encode()) % 49 for word in text.split()][:max_tokens] for text in texts]
        longest = max_tokens if pad == "max" else max(map(len, rows))
        ids = torch.tensor([row + [0] * (longest - len(row)) for row in rows])
        return ids, (ids > 0).long()


def image(i):
    return torch.randn(3, 2, 2, generator=torch.Generator().manual_seed(i))


def as_is(image):
    return image


def gallery():
    rng = torch.Generator().manual_seed(0)
    image_of_text = [*range(IMAGES), *torch.randint(0, IMAGES, (12,), generator=rng).tolist()]
    words = [f"w{int(n)}" for n in torch.randint(0, 40, (200,), generator=rng)]
    texts = [
        " ".join(words[start : start + 1 + j % 7])
        for j, start in zip(range(len(image_of_text)), itertools.count(0, 5), strict=False)
    ]
    return Gallery(
        image=image,
        image_ids=tuple(f"image{i}" for i in range(IMAGES)),
        texts=tuple(texts),
        text_ids=tuple(f"text{j}" for j in range(len(texts))),
        image_of_text=tuple(image_of_text),
        concepts=tuple(tuple(f"c{n}" for n in range(i, 2 * i % 7 + i + 1)) for i in range(IMAGES)),
    )


def brute_force(model, own, k):
    """The reference's way: one query at a time, a filled matrix per direction, ranks by the filled
    matrices."""
    model.eval()
    image = model.encode_image(every_image(own))
    text = model.encode_text(*Words().encode(own.texts, max_tokens=40, separator=False, pad="max"))
    similarity = image.projection @ text.projection.T
    filled = []
    for direction in ("image", "text"):
        matrix = similarity if direction == "image" else similarity.T
        scores = torch.full_like(matrix, -100)
        for q in range(len(matrix)):
            chosen = matrix[q].topk(min(k, matrix.shape[1])).indices
            query = torch.full_like(chosen, q)
            pair = (query, chosen) if direction == "image" else (chosen, query)
            scores[q, chosen] = model.match(image, text, *pair)
        filled.append(scores)
    return similarity, *filled


def every_image(own):
    return Images(torch.stack([own.image(i) for i in range(IMAGES)]))


def evaluate(model, own=None, *, concepts=None, workers=0, precision="fp32", **options):
    """Texts are read as they are, and nothing is re-ranked unless `options` say so."""
    subject = Subject(
        model=model,
        view=as_is,
        tokenizer=Words(),
        reading=Reading(clean="none", max_tokens=40),
        concepts=concepts,
    )
    return evaluate_retrieval(
        subject,
        gallery() if own is None else own,
        RetrievalOptions(**{"rerank": 0, **options}),
        Execution(workers=workers, precision=precision),
    )


def ranks_of(scores, result):
    return [[one["rank"][result] for one in scores.samples[kind]] for kind in ("images", "texts")]


@pytest.mark.filterwarnings("ignore::vlp_eval.metrics.retrieval.TieWarning")
@pytest.mark.parametrize("k", [1, 4, 11, 15, 23])
def test_both_results_equal_one_query_at_a_time(k):
    model, own = Toy(), gallery()
    found = evaluate(model, rerank=k, image_batch=4, text_batch=5, pair_batch=7)
    with torch.no_grad():
        similarity, of_image, of_text = brute_force(Toy(), own, k)
    for result, left, right in (("dual", similarity, similarity.T), ("reranked", of_image, of_text)):
        text = metric.text_ranks(left, torch.tensor(own.image_of_text))
        image = metric.image_ranks(right, torch.tensor(own.image_of_text))
        assert ranks_of(found, result) == [text.tolist(), image.tolist()]
        assert found.results[result] == metric.summary(text, image)
    assert found.metrics == found.results["reranked"]


def test_every_sample_is_encoded_once_and_every_wanted_pair_scored_once():
    model, own = Toy(), gallery()
    evaluate(model, rerank=4, image_batch=3, text_batch=4, pair_batch=6)
    assert sorted(model.images) == pytest.approx(
        sorted(image(i).sum().item() for i in range(IMAGES)), abs=1e-5
    )
    ids, _ = Words().encode(own.texts, max_tokens=40, separator=False, pad="longest")
    assert sorted(model.texts) == sorted(tuple(row[row > 0].tolist()) for row in ids)
    with torch.no_grad():
        _, of_image, of_text = brute_force(Toy(), own, 4)
    assert model.pairs == int(((of_image > -100) | (of_text.T > -100)).sum())
    assert model.pairs < int((of_image > -100).sum() + (of_text > -100).sum())


def test_result_does_not_depend_on_batch_sizes_or_padding():
    settings = [
        {"image_batch": 1, "text_batch": 1, "pair_batch": 1},
        {"image_batch": 4, "text_batch": 5, "pair_batch": 9},
        {},
    ]
    results = [evaluate(Toy(), rerank=5, **one).json() for one in settings]
    assert results[0] == results[1] == results[2]


def test_texts_of_like_length_share_a_batch():
    own, model = gallery(), Toy()
    evaluate(model, text_batch=4)
    lengths = sorted(len(text.split()) for text in own.texts)
    parts = [lengths[start : start + 4] for start in range(0, len(lengths), 4)]
    assert model.padding == sum(max(part) * len(part) - sum(part) for part in parts)


def test_worker_processes_change_nothing_and_random_state_stays():
    torch.manual_seed(5)
    before = torch.get_rng_state()
    assert evaluate(Toy(), workers=2, image_batch=3).json() == evaluate(Toy()).json()
    assert torch.equal(torch.get_rng_state(), before)


def test_modes_of_the_model_are_restored_part_by_part():
    model = nn.ModuleDict({"frozen": nn.Dropout(), "toy": Toy()}).train()
    model["frozen"].eval()
    model.encode_image, model.encode_text = model["toy"].encode_image, model["toy"].encode_text
    evaluate(model)
    assert model.training and model["toy"].dropout.training and not model["frozen"].training


def test_rerank_of_chosen_candidates_and_pairs():
    own, model = gallery(), Toy().eval()
    with torch.no_grad():
        image = model.encode_image(every_image(own))
        text = model.encode_text(*Words().encode(own.texts, max_tokens=40, separator=False, pad="longest"))
        everything = torch.cartesian_prod(torch.arange(IMAGES), torch.arange(len(own.texts)))
        whole = score_pairs(model, image, text, *everything.T, pair_batch=13).view(IMAGES, -1)
        direct = model.match(image, text, *everything.T).view(IMAGES, -1)
        torch.testing.assert_close(whole, direct)
        of_image = metric.top(torch.randn(IMAGES, len(own.texts)), 3)
        of_text = metric.top(torch.randn(len(own.texts), IMAGES), 2)
        left, right = rerank(model, image, text, of_image, of_text, pair_batch=5)
    torch.testing.assert_close(left, direct.gather(1, of_image))
    torch.testing.assert_close(right, direct.T.gather(1, of_text))


CONCEPTS = ConceptOptions(max_tokens=6, pad="max")


@pytest.mark.parametrize("mask", [False, True])
def test_images_are_compared_with_their_concepts(mask):
    own, model = gallery(), Seeing(mask)
    found = evaluate(model, concepts=CONCEPTS, rerank=4, image_batch=3, workers=1)
    assert model.padded == {6} and found.settings["concepts"]["max_tokens"] == 6
    model = Seeing(mask).eval()
    words = Words()
    with torch.no_grad():
        ids = [words.frame(words.token_ids(" ".join(c)), max_tokens=6, separator=False) for c in own.concepts]
        image = model.encode_image(replace(every_image(own), concepts=Concepts(*words.pad(ids, 6))))
        text = model.encode_text(*words.encode(own.texts, max_tokens=40, separator=False, pad="longest"))
        similarity = image.projection @ text.projection.T
        of_image, of_text = metric.top(similarity, 4), metric.top(similarity.T, 4)
        left, right = rerank(model, image, text, of_image, of_text)
    of = torch.tensor(own.image_of_text)
    text_ranks, _ = metric.candidate_text_ranks(of_image, left, of)
    image_ranks, _ = metric.candidate_image_ranks(of_text, right, of, images=IMAGES)
    assert ranks_of(found, "reranked") == [text_ranks.tolist(), image_ranks.tolist()]
    assert ranks_of(found, "dual")[0] == metric.text_ranks(similarity, of).tolist()
    assert ranks_of(found, "dual") != ranks_of(evaluate(Toy()), "dual")


def test_concepts_of_a_gallery_are_complete_and_padded_alike():
    own = gallery()
    with pytest.raises(ValueError, match=r"concepts\.pad=longest: .* give pad=max"):
        evaluate(Seeing(), concepts=ConceptOptions(pad="longest"))
    with pytest.raises(ValueError, match="sees the words attached to each image; give concepts"):
        evaluate(Seeing())
    with pytest.raises(ValueError, match="has no concept encoder; leave concepts out"):
        evaluate(Toy(), concepts=CONCEPTS)
    run = partial(evaluate, Seeing(), concepts=CONCEPTS)
    with pytest.raises(ValueError, match="the images of the gallery have no concepts"):
        run(replace(own, concepts=()))
    with pytest.raises(ValueError, match="image 'image2' of the gallery has no concepts, others have"):
        run(replace(own, concepts=(*own.concepts[:2], (), *own.concepts[3:])))
    with pytest.raises(ValueError, match="11 images and the concepts of 2"):
        replace(own, concepts=own.concepts[:2])


def test_a_gallery_takes_the_concepts_of_its_rows(tmp_path):
    def source(*words):
        rows = [{"image": "a.png", "caption": f"text {n}", "kwords": own} for n, own in enumerate(words)]
        rows.append({"image": "b.png", "caption": ["text"], "kwords": ["tree"]})
        (tmp_path / "rows.json").write_text(json.dumps(rows))
        return TaskJson(files=(str(tmp_path / "rows.json"),)).open()

    own = Gallery.from_source(source(["cat", "big dog"], ["cat", "big dog"]))
    assert own.concepts == (("cat", "big dog"), ("tree",)) and len(own.texts) == 3
    assert own.first_texts(1).map_texts(str.upper).concepts == own.concepts
    with pytest.raises(DataError, match=r"the concepts of a\.png differ from those of"):
        Gallery.from_source(source(["cat"], ["dog"]))


def test_samples_name_the_best_five_in_order():
    own, found = gallery(), evaluate(Toy(), rerank=6)
    with torch.no_grad():
        similarity, of_image, _ = brute_force(Toy(), own, 6)
    first = found.samples["images"][0]
    assert first["best"]["dual"] == [f"text{j}" for j in similarity[0].argsort(descending=True)[:5].tolist()]
    assert first["best"]["reranked"] == [
        f"text{j}" for j in of_image[0].argsort(descending=True)[:5].tolist()
    ]
    assert first["texts"] == [f"text{j}" for j, i in enumerate(own.image_of_text) if i == 0]
    assert found.samples["texts"][3]["image"] == f"image{own.image_of_text[3]}"
    assert found.samples["texts"][3]["text"] == own.texts[3]


def test_best_in_order_puts_the_smaller_index_of_ties_first():
    assert best_in_order(torch.tensor([[0.0, 2, 1, 2, 2]]), 4).tolist() == [[1, 3, 4, 2]]
    assert best_in_order(torch.tensor([[0.0, 2, 1]]), 5).tolist() == [[1, 2, 0]]


def test_candidates_beyond_the_gallery_are_cut_with_a_note():
    found = evaluate(Toy(), rerank=15)
    assert "image retrieval: rerank=15 covers all 11 images; every one was scored" in found.notes
    assert not any(note.startswith("text retrieval") for note in found.notes)
    assert found.counts["images without a right candidate"] == sum(
        rank > 15 for rank in ranks_of(found, "reranked")[0]
    )


def test_collapsed_model_becomes_a_note_and_scores_nothing():
    model = Toy()
    nn.init.zeros_(model.words)
    found = evaluate(model)
    assert found.metrics["tr_r10"] == found.metrics["ir_r10"] == 0
    assert any("tied scores" in note for note in found.notes)


def test_folds_are_a_result_of_their_own():
    own = gallery().first_texts(1)
    found = evaluate(Toy(), own, fold_size=1)
    assert found.results["dual, folds of 1"]["r_mean"] == 100
    assert found.results["dual"]["r_mean"] < 100


def test_half_precision_is_ranked_in_fp32():
    exact, half = evaluate(Toy(), rerank=4), evaluate(Toy(), rerank=4, precision="bf16")
    assert half.settings["precision"] == "bf16"
    assert half.metrics["r_mean"] == pytest.approx(exact.metrics["r_mean"], abs=15)


def test_table_and_json_hold_the_numbers():
    found = evaluate(Toy(), rerank=4)
    again = Scores.read(found.json())
    assert (again.results, again.samples, again.hits) == (found.results, found.samples, found.hits)
    lines = found.table().splitlines()
    assert lines[0].startswith("retrieval: 11 images, 23 texts")
    assert lines[1].split() == ["TR@1", "TR@5", "TR@10", "IR@1", "IR@5", "IR@10", "r_mean", "rsum"]
    rows = {line.split()[0]: line.split()[1:] for line in lines[2:] if not line.startswith("note")}
    assert rows["reranked"][0] == f"{found.metrics['tr_r1']:.2f}"
    assert rows["chance"][3:] == ["9.09", "45.45", "90.91"]


def test_chance_is_the_mean_of_random_scores():
    own, rng = gallery(), torch.Generator().manual_seed(0)
    image = torch.tensor(own.image_of_text)
    sums = dict.fromkeys((1, 5, 10), 0.0)
    for _ in range(400):
        ranks = metric.text_ranks(torch.rand(IMAGES, len(image), generator=rng), image)
        sums = {
            k: total + value / 400
            for (k, total), value in zip(sums.items(), metric.recalls(ranks).values(), strict=True)
        }
    for k, value in sums.items():
        assert metric.chance(image, images=IMAGES)[f"tr_r{k}"] == pytest.approx(value, abs=2)


class Pairs(nn.Module):
    """Scores pairs and encodes nothing by itself; keeps how many it scored at a time."""

    def __init__(self):
        super().__init__()
        self.toy, self.batches = Toy(), []

    def score(self, images, ids, mask):
        self.batches.append(len(images))
        assert len(images) == len(ids) == len(mask)
        index = torch.arange(len(ids))
        return self.toy.match(self.toy.encode_image(images), self.toy.encode_text(ids, mask), index, index)


def test_a_model_without_encoders_is_ranked_by_the_scores_of_all_pairs():
    own, model = gallery(), Pairs()
    found = evaluate(model, rerank=None, image_batch=4, pair_batch=13, fold_size=1)
    assert list(found.results) == ["pairs", "pairs, folds of 1"] and "rerank" not in found.settings
    assert sum(model.batches) == IMAGES * len(own.texts) and max(model.batches) == 13
    with torch.no_grad():
        plain = Toy().eval()
        image = plain.encode_image(every_image(own))
        text = plain.encode_text(*Words().encode(own.texts, max_tokens=40, separator=False, pad="max"))
        every = torch.cartesian_prod(torch.arange(IMAGES), torch.arange(len(own.texts)))
        expected = plain.match(image, text, *every.T).view(IMAGES, -1)
    of = torch.tensor(own.image_of_text)
    assert ranks_of(found, "pairs") == [
        metric.text_ranks(expected, of).tolist(),
        metric.image_ranks(expected.T, of).tolist(),
    ]


def test_scores_of_pairs_have_the_shape_of_the_pairs():
    model = Pairs()
    model.score = lambda images, ids, mask: torch.zeros(len(ids), 2)
    with pytest.raises(ValueError, match=r"score returned scores of shape \(253, 2\) for 253 pairs"):
        evaluate(model, rerank=None)


def test_candidates_are_as_many_as_the_model_has_use_for():
    class Dual(nn.Module):
        encode_image, encode_text = Toy.encode_image, Toy.encode_text

        def __init__(self):
            super().__init__()
            vars(self).update(vars(Toy()))

    assert evaluate(Toy(), rerank=None).settings["rerank"] == 128
    found = evaluate(Dual(), rerank=None)
    assert found.settings["rerank"] == 0 and list(found.results) == ["dual"]


def test_settings_that_cannot_take_effect_are_refused():
    class Dual(nn.Module):
        encode_image, encode_text = Toy.encode_image, Toy.encode_text

    with pytest.raises(ValueError, match="Dual has no fusion encoder"):
        evaluate(Dual(), rerank=3)
    with pytest.raises(ValueError, match="Dropout can neither encode images and texts"):
        evaluate(nn.Dropout())
    with pytest.raises(ValueError, match="Pairs has no similarity to choose candidates by"):
        evaluate(Pairs(), rerank=3)
    with pytest.raises(ValueError, match="rerank=-1 must not be negative"):
        evaluate(Toy(), rerank=-1)


@pytest.mark.parametrize("workers", [0, 1])
def test_broken_image_is_named(workers):
    def broken(i):
        raise OSError("cannot identify image file")

    own = gallery()
    with pytest.raises(ValueError, match=r"^image 'image0' of the gallery: cannot identify image file$"):
        evaluate(Toy(), Gallery(**{**vars(own), "image": broken}), workers=workers)


def test_nan_of_the_fusion_encoder_is_refused():
    model = Toy()
    model.match = lambda image, text, image_index, text_index: torch.full((len(image_index),), torch.nan)
    with pytest.raises(ValueError, match="NaN"):
        evaluate(model, rerank=3)


def test_a_gallery_is_opened_as_the_options_say(tmp_path):
    rows = [{"image": f"{name}.png", "caption": ["one", "one", f"of {name}"]} for name in ("a", "b", "c")]
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    source = TaskJson(files=(str(tmp_path / "rows.json"),)).open()
    own = open_gallery(source, None, RetrievalOptions(limit=2, repeated_captions=False))
    assert own.texts == ("one", "of a", "one", "of b") and len(own.image_ids) == 2
    assert open_gallery(source, None, RetrievalOptions(first_captions=1)).texts == ("one",) * 3


def test_gallery_options():
    def refuse_y(text):
        if text == "y":
            raise ValueError("no y")
        return text

    own = Gallery(
        image=image,
        image_ids=("a", "b"),
        texts=("x", "x", "y", "x", "z"),
        text_ids=tuple("12345"),
        image_of_text=(0, 0, 0, 1, 1),
    )
    assert own.without_repeated_texts().text_ids == ("1", "3", "4", "5")
    assert own.first_texts(1).text_ids == ("1", "4")
    assert own.map_texts(str.upper).texts == ("X", "X", "Y", "X", "Z")
    with pytest.raises(ValueError, match="text '3' of the gallery: no y"):
        own.map_texts(refuse_y)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"image_ids": ("a", "a")}, "image id 'a' occurs twice"),
        ({"text_ids": ("1",)}, "2 texts, 1 text ids"),
        ({"image_of_text": (0, 0)}, "every image of a gallery needs a text"),
        ({"image_of_text": (0, 2)}, "every image of a gallery needs a text"),
        ({"image_ids": (), "texts": (), "text_ids": (), "image_of_text": ()}, "the gallery is empty"),
    ],
)
def test_bad_galleries_are_refused(change, message):
    fields = {"image_ids": ("a", "b"), "texts": ("x", "y"), "text_ids": ("1", "2"), "image_of_text": (0, 1)}
    with pytest.raises(ValueError, match=message):
        Gallery(image=image, **(fields | change))


def test_three_ranks_give_the_result_of_one(tmp_path):
    ranks = [
        subprocess.Popen([sys.executable, __file__, str(tmp_path), str(rank), "3"], stderr=subprocess.PIPE)
        for rank in range(3)
    ]
    errors = [rank.communicate(timeout=240)[1].decode() for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0, 0, 0], errors
    found = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(3)]
    assert found[0]["scores"] == found[1]["scores"] == found[2]["scores"] == evaluate(Toy(), rerank=5).json()
    assert sum(one["images"] for one in found) == IMAGES
    assert sum(one["texts"] for one in found) == len(gallery().texts)
    alone = Toy()
    evaluate(alone, rerank=5)
    assert sum(one["pairs"] for one in found) == alone.pairs
    seeing = evaluate(Seeing(True), rerank=5, concepts=CONCEPTS).json()
    assert all(one["seeing"] == seeing for one in found)
    every_pair = evaluate(Pairs(), rerank=None).json()
    assert all(one["all"] == every_pair for one in found)


def _one_rank(folder, rank, world):
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=world)
    model = Toy()
    scores = evaluate(model, rerank=5, pair_batch=6)
    done = {
        "scores": scores.json(),
        "images": len(model.images),
        "texts": len(model.texts),
        "pairs": model.pairs,
        "seeing": evaluate(Seeing(True), rerank=5, concepts=CONCEPTS, image_batch=2).json(),
        "all": evaluate(Pairs(), rerank=None, image_batch=2).json(),
    }
    (Path(folder) / f"{rank}.json").write_text(json.dumps(done))
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    _one_rank(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))
