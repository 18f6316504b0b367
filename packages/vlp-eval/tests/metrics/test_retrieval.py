"""Recall and ranks, against the numbers of five published evaluators and against a plain loop."""

import numpy as np
import pytest
import torch
from vlp_eval.metrics import retrieval as metric

SCORES = {"scores_i2t", "scores_t2i", "txt2img"}


def has_scores(case):
    return case.tensor_names("inputs") >= SCORES and case.has("expected.json")


def expects(*keys):
    return lambda case: has_scores(case) and all(key in case.json("expected") for key in keys)


def ranks(case, ties="pessimistic"):
    inputs = case.tensors("inputs")
    image = inputs["txt2img"]
    return (
        metric.text_ranks(inputs["scores_i2t"], image, ties=ties),
        metric.image_ranks(inputs["scores_t2i"], image, ties=ties),
    )


ignore_ties = pytest.mark.filterwarnings("ignore::vlp_eval.metrics.retrieval.TieWarning")


def naive(scores, right, ties):
    """Rank by the words of the rule, one query at a time."""
    found = []
    for row, good in zip(scores, right, strict=True):
        best = max(row[j] for j in good)
        first = min(j for j in good if row[j] == best)
        wrong = [j for j in range(len(row)) if j not in good]
        if ties == "pessimistic":
            found.append(1 + sum(row[j] >= best for j in wrong))
        else:
            found.append(1 + sum(row[j] > best or (row[j] == best and j < first) for j in wrong))
    return found


@ignore_ties
@pytest.mark.golden("metrics", expects("text_retrieval_bounds", "image_retrieval_bounds"))
def test_recall_equals_the_pessimistic_bound(case):
    expected = case.json("expected")
    for found, key in zip(ranks(case), ("text_retrieval_bounds", "image_retrieval_bounds"), strict=True):
        want = {int(name.removeprefix("R@")): value for name, value in expected[key]["pessimistic"].items()}
        assert metric.recalls(found, at=tuple(want)) == pytest.approx(want, abs=1e-6)


@ignore_ties
@pytest.mark.golden("metrics", expects("text_retrieval_bounds", "image_retrieval_bounds"))
def test_recall_by_index_lies_between_the_bounds(case):
    expected = case.json("expected")
    for found, key in zip(
        ranks(case, "index"), ("text_retrieval_bounds", "image_retrieval_bounds"), strict=True
    ):
        bounds = expected[key]
        for name in bounds["pessimistic"]:
            value = metric.recalls(found, at=(int(name.removeprefix("R@")),)).popitem()[1]
            assert bounds["pessimistic"][name] - 1e-6 <= value <= bounds["optimistic"][name] + 1e-6


@pytest.mark.golden("metrics", expects("itm_eval"))
def test_summary_equals_itm_eval(case):
    want, found = case.json("expected")["itm_eval"], metric.summary(*ranks(case))
    for ours, theirs in (("tr", "txt"), ("ir", "img")):
        for k in (1, 5, 10):
            assert found[f"{ours}_r{k}"] == pytest.approx(want[f"{theirs}_r{k}"], abs=1e-6)
        assert found[f"{ours}_mean"] == pytest.approx(want[f"{theirs}_r_mean"], abs=1e-6)
    assert found["r_mean"] == pytest.approx(want["r_mean"], abs=1e-6)
    assert found["rsum"] == pytest.approx(6 * want["r_mean"], abs=1e-5)


@pytest.mark.golden("metrics", expects("rank_i2t", "rank_t2i"))
def test_ranks_equal_the_published_ones(case):
    text, image = ranks(case)
    assert (text - 1).tolist() == case.json("expected")["rank_i2t"]
    assert (image - 1).tolist() == case.json("expected")["rank_t2i"]


@pytest.mark.golden("metrics", expects("flair"))
def test_summary_equals_flair(case):
    want, found = case.json("expected")["flair"], metric.summary(*ranks(case))
    for ours, theirs in (("tr", "image_to_text"), ("ir", "text_to_image")):
        for k in (1, 5, 10):
            assert found[f"{ours}_r{k}"] / 100 == pytest.approx(want[f"{theirs}_R@{k}"], abs=1e-6)
        assert found[f"{ours}_rank_mean"] == pytest.approx(want[f"{theirs}_mean_rank"], rel=1e-6)
        assert found[f"{ours}_rank_median"] == want[f"{theirs}_median_rank"]


@pytest.mark.golden("metrics", expects("clip_benchmark"))
def test_recall_equals_the_hit_rate_of_clip_benchmark(case):
    # "true_recall", the share of right answers found, is another quantity and not compared.
    want, (text, image) = case.json("expected")["clip_benchmark"], ranks(case)
    checked = 0
    for name, found in (("text", text), ("image", image)):
        for k in (1, 5, 10):
            if (key := f"{name}_retrieval_recall@{k}") in want:
                assert metric.recalls(found, at=(k,))[k] == pytest.approx(want[key], abs=1e-4)
                checked += 1
    assert checked


@pytest.mark.golden("metrics", expects("vlc_vilt"))
def test_recall_equals_vilt_and_vlc(case):
    want, (text, image) = case.json("expected")["vlc_vilt"], ranks(case)
    for name, found in (("tr", text), ("ir", image)):
        for k, value in metric.recalls(found).items():
            assert value == pytest.approx(want[f"{name}_r{k}"], abs=1e-4)


@pytest.mark.golden("metrics", expects("folds", "mean_over_folds", "fold_size"))
def test_folds_equal_itm_eval_of_each_fold(case):
    expected, inputs = case.json("expected"), case.tensors("inputs")
    mean, each = metric.folds(
        inputs["scores_i2t"], inputs["scores_t2i"], inputs["txt2img"], size=expected["fold_size"]
    )
    assert len(each) == len(expected["folds"])
    for found, want in zip([mean, *each], [expected["mean_over_folds"], *expected["folds"]], strict=True):
        for ours, theirs in (("tr", "txt"), ("ir", "img")):
            for k in (1, 5, 10):
                assert found[f"{ours}_r{k}"] == pytest.approx(want[f"{theirs}_r{k}"], abs=1e-6)
        assert found["r_mean"] == pytest.approx(want["r_mean"], abs=1e-6)


@ignore_ties  # the fill value of the matrix ties
@pytest.mark.golden("metrics", expects("k_test"))
def test_two_stage_ranks_from_candidates_equal_those_of_the_filled_matrix(case):
    inputs, k = case.tensors("inputs"), case.json("expected")["k_test"]
    image = inputs["txt2img"]
    of_image, of_text = metric.top(inputs["scores_i2t"], k), metric.top(inputs["scores_t2i"], k)
    for ties in ("pessimistic", "index"):
        want = ranks(case, ties)
        text, found = metric.candidate_text_ranks(
            of_image, inputs["scores_i2t"].gather(1, of_image), image, ties=ties
        )
        assert text.tolist() == want[0].tolist()
        assert found.tolist() == (want[0] <= k).tolist()
        ranks_, found = metric.candidate_image_ranks(
            of_text, inputs["scores_t2i"].gather(1, of_text), image, images=len(of_image), ties=ties
        )
        assert ranks_.tolist() == want[1].tolist()
        assert found.tolist() == (want[1] <= k).tolist()


@pytest.mark.golden(
    "xvlm", lambda case: case.tensor_names("outputs") >= {"score_i2t", "score_t2i", "sims_i2t"}
)
def test_reranked_metrics_equal_x_vlm(case):
    outputs = case.tensors("outputs")
    per_image, k_test = case.config["captions_per_image"], case.config["k_test"]
    image = torch.arange(outputs["score_i2t"].shape[1]) // per_image
    with pytest.warns(metric.TieWarning):
        text, images = (
            metric.text_ranks(outputs["score_i2t"], image),
            metric.image_ranks(outputs["score_t2i"], image),
        )
    checked = 0
    for name, found in (("txt", text), ("img", images)):
        for k, value in metric.recalls(found).items():
            # Beyond the candidates everything ties in the reference's matrix, and its sort decides; see the
            # bounds above.
            gallery = outputs["score_i2t"].shape[1 if name == "txt" else 0]
            if k <= k_test or k >= gallery:
                assert value == pytest.approx(outputs[f"metric_{name}_r{k}"].item(), abs=1e-6)
                checked += 1
            else:
                assert value <= outputs[f"metric_{name}_r{k}"].item() + 1e-6
    assert checked


@ignore_ties
@pytest.mark.parametrize("ties", ["pessimistic", "index"])
@pytest.mark.parametrize("chunk", [1, 7, 1 << 20])
def test_counting_equals_the_rule_in_any_chunk(ties, chunk, monkeypatch):
    monkeypatch.setattr(metric, "CHUNK_SCORES", chunk)
    rng = np.random.default_rng(3)
    image = rng.permutation(
        np.concatenate([np.arange(9), rng.integers(0, 9, 14)])
    )  # captions in any order, at least one each
    of_image, of_text = rng.integers(-3, 3, (9, 23)), rng.integers(-3, 3, (23, 9))
    right = [np.flatnonzero(image == i).tolist() for i in range(9)]
    assert metric.text_ranks(of_image, image, ties=ties).tolist() == naive(of_image, right, ties)
    assert metric.image_ranks(of_text, image, ties=ties).tolist() == naive(
        of_text, [[i] for i in image], ties
    )


def test_collapsed_model_scores_nothing_and_warns():
    with pytest.warns(metric.TieWarning, match=r"11 of 12 queries \(by image\)"):
        found = metric.text_ranks(np.zeros((12, 36)), np.arange(36) // 3)
    assert found.tolist() == [34] * 12


def test_ties_below_the_limit_do_not_warn():
    scores = np.eye(2000)
    scores[0, 1] = 1  # one row in 2000
    assert metric.text_ranks(scores, np.arange(2000))[0] == 2


@pytest.mark.parametrize("k", [1, 3, 11, 23])
def test_top_takes_the_smaller_index_of_ties(k, monkeypatch):
    monkeypatch.setattr(metric, "CHUNK_SCORES", 50)
    scores = torch.from_numpy(np.random.default_rng(0).integers(-3, 3, (9, 23)).astype(np.float32))
    want = [sorted(sorted(range(23), key=lambda j: (-row[j], j))[:k]) for row in scores.tolist()]
    assert metric.top(scores, k).tolist() == want


def test_candidate_ranks_equal_the_filled_matrix_with_ties_and_ragged_captions():
    rng = np.random.default_rng(5)
    image = torch.from_numpy(np.concatenate([np.arange(9), rng.integers(0, 9, 14)]))
    scores = torch.from_numpy(rng.integers(-3, 3, (9, 23)).astype(np.float32))
    candidates = metric.top(torch.from_numpy(rng.normal(size=(9, 23))), 6)
    filled = torch.full_like(scores, -100).scatter(1, candidates, scores.gather(1, candidates))
    for ties in ("pessimistic", "index"):
        with pytest.warns(metric.TieWarning):
            want = metric.text_ranks(filled, image, ties=ties)
        with pytest.warns(metric.TieWarning):
            found, _ = metric.candidate_text_ranks(candidates, scores.gather(1, candidates), image, ties=ties)
        assert found.tolist() == want.tolist()


def test_median_is_the_lower_of_two_middle_ranks():
    found = metric.summary(np.array([1, 2, 5, 9]), np.array([3, 3]))
    assert found["tr_rank_median"] == 3  # 0-based 0, 1, 4, 8: floor(2.5) + 1
    assert found["tr_rank_mean"] == 4.25


@pytest.mark.parametrize(
    ("scores", "image", "message"),
    [
        (np.zeros((2, 3)), [0, 0, 0], "image 1 has no text"),
        (np.zeros((2, 3)), [0, 1], "image_of_text has shape"),
        (np.zeros((2, 3)), [0, 1, 2], r"outside 0\.\.1"),
        (np.array([[0.0, 1], [np.nan, 0]]), [0, 1], "NaN, the first is row 1"),
        (np.zeros(3), [0, 1, 2], "must be a matrix"),
    ],
)
def test_bad_scores_are_refused(scores, image, message):
    with pytest.raises(ValueError, match=message):
        metric.text_ranks(scores, image)


def test_folds_refuse_a_smaller_last_fold():
    with pytest.raises(ValueError, match="5 images cannot be cut into folds of 2"):
        metric.folds(np.eye(5), np.eye(5), np.arange(5), size=2)


def test_shares_of_nothing_are_refused():
    with pytest.raises(ValueError, match="no queries"):
        metric.recalls(np.array([], np.int64))
