"""Image-text retrieval: ranks and recall when an image has several captions.

Text retrieval (TR) asks with an image: its rank is that of the best placed of its captions among all texts.
Image retrieval (IR) asks with a text: its rank is that of its one image among all images. R@K is the share of
queries whose rank is at most K: one hit is enough, unlike recall in the sense of information retrieval.

Tied scores. The published evaluators sort, and where scores tie the sort algorithm decides: a collapsed model
(all scores equal) can then score anything up to 100 %. Here the rule is an argument, and no number depends on
a sort:

- "pessimistic" (default): rank = 1 + number of wrong candidates that score at least as high as the best right
    one;
- "index": rank = 1 + number of wrong candidates that score higher, or as high with a smaller index.

Sources: the definition is that of ALBEF, X-VLM and ViCHA (`itm_eval`), FLAIR, ViLT/VLC and CLIP_benchmark
    (`recall > 0`).

Letters: Q queries, C candidates, N images, M texts, P right (query, candidate) pairs.
"""

import math
import warnings
from collections.abc import Mapping, Sequence
from typing import Literal

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

Ties = Literal["pessimistic", "index"]
Ranks = NDArray[np.int64]
Found = NDArray[np.bool_]

# A comparison of this many scores needs about 20 MB beside the scores themselves, and is long enough to hide
# the call overhead.
CHUNK_SCORES = 1 << 22

# Share of queries above which the two tie rules must not differ without a word.
TIE_WARNING = 0.001


class TieWarning(UserWarning):
    """So many scores tie that the metric depends on the tie rule (half precision, or a collapsed model)."""


def text_ranks(
    scores_NM: ArrayLike | Tensor, image_of_text_M: ArrayLike | Tensor, *, ties: Ties = "pessimistic"
) -> Ranks:
    """Rank (from 1) of the best placed caption of each image among all M texts: [N] int64.

    `image_of_text_M[j]` is the index of the image that text j describes. Raises ValueError for an image
    without text, for an index outside the gallery and for a score that is NaN. Warns with `TieWarning` when
    the two tie rules differ on more than 0.1 % of the images.
    """
    scores = _scores(scores_NM)
    image = _images(image_of_text_M, images=scores.shape[0], texts=scores.shape[1])
    return _ranks(scores, image, torch.arange(len(image)), ties=ties, query="image")


def image_ranks(
    scores_MN: ArrayLike | Tensor, image_of_text_M: ArrayLike | Tensor, *, ties: Ties = "pessimistic"
) -> Ranks:
    """Rank (from 1) of the image of each text among all N images: [M] int64. Arguments and errors as in
    `text_ranks`."""
    scores = _scores(scores_MN)
    image = _images(image_of_text_M, images=scores.shape[1], texts=scores.shape[0])
    return _ranks(scores, torch.arange(len(image)), image, ties=ties, query="text")


def candidate_text_ranks(
    candidates_NK: Tensor,
    scores_NK: Tensor,
    image_of_text_M: ArrayLike | Tensor,
    *,
    ties: Ties = "pessimistic",
) -> tuple[Ranks, Found]:
    """`text_ranks` when only K texts of each image were scored: ranks [N] int64, whether a right text was
    among the K [N] bool.

    `candidates_NK` holds indices of texts, none twice in a row. What is no candidate ties behind all
    candidates, as in the matrices filled with -100 of ALBEF and X-VLM: an image with no right candidate has
    rank 1 + all wrong texts with "pessimistic", and with "index" the place that its first right text gets
    when the rest follows in order of index. Of such a rank only "greater than K" has a meaning. The ranks
    equal those of `text_ranks` on the filled matrix; the matrix itself is never made. Ties among the rest are
    no reason for a `TieWarning`, ties among candidates are.
    """
    image = _images(image_of_text_M, images=len(candidates_NK), texts=len(torch.as_tensor(image_of_text_M)))
    candidates = _candidates(candidates_NK, scores_NK, total=len(image))
    query = torch.arange(len(candidates))
    first = torch.full_like(query, len(image)).scatter_reduce(0, image, torch.arange(len(image)), "amin")
    good = image[candidates] == query[:, None]
    return _candidate_ranks(
        candidates, scores_NK, good, torch.bincount(image), first, total=len(image), ties=ties
    )


def candidate_image_ranks(
    candidates_MK: Tensor,
    scores_MK: Tensor,
    image_of_text_M: ArrayLike | Tensor,
    *,
    images: int,
    ties: Ties = "pessimistic",
) -> tuple[Ranks, Found]:
    """`image_ranks` when only K of the `images` images were scored for each text; as
    `candidate_text_ranks`."""
    image = _images(image_of_text_M, images=images, texts=len(candidates_MK))
    candidates = _candidates(candidates_MK, scores_MK, total=images)
    good = candidates == image[:, None]
    return _candidate_ranks(
        candidates, scores_MK, good, torch.ones_like(image), image, total=images, ties=ties
    )


def recalls(ranks: Ranks, *, at: Sequence[int] = (1, 5, 10)) -> dict[int, float]:
    """Percent of the queries with rank <= K, for each K of `at`."""
    ranks = _not_empty(ranks)
    return {k: 100.0 * hits / len(ranks) for k, hits in hit_counts(ranks, at=at).items()}


def hit_counts(ranks: Ranks, *, at: Sequence[int] = (1, 5, 10)) -> dict[int, int]:
    """Number of queries with rank <= K, for each K of `at`."""
    return {k: int(np.count_nonzero(np.asarray(ranks) <= k)) for k in at}


def summary(text: Ranks, image: Ranks, *, at: Sequence[int] = (1, 5, 10)) -> dict[str, float]:
    """All usual numbers of one evaluation, from the ranks of `text_ranks` and `image_ranks`; recalls in
    percent.

    tr_r1, tr_r5, tr_r10, tr_mean (of the three), ir_..., r_mean (mean of the two means), rsum (sum of the
    six), and tr_rank_mean, tr_rank_median, ir_rank_mean, ir_rank_median (ranks from 1; the median is the
    lower of two middle ones, as FLAIR and open_clip have it: 1 + floor of the median of the ranks from 0).
    """
    numbers: dict[str, float] = {}
    for name, ranks in (("tr", text), ("ir", image)):
        values = recalls(ranks, at=at)
        numbers |= {f"{name}_r{k}": value for k, value in values.items()}
        numbers[f"{name}_mean"] = sum(values.values()) / len(values)
    numbers["r_mean"] = (numbers["tr_mean"] + numbers["ir_mean"]) / 2
    numbers["rsum"] = sum(numbers[f"{name}_r{k}"] for name in ("tr", "ir") for k in at)
    for name, ranks in (("tr", text), ("ir", image)):
        numbers[f"{name}_rank_mean"] = float(np.mean(ranks, dtype=np.float64))
        numbers[f"{name}_rank_median"] = float(np.floor(np.median(np.asarray(ranks) - 1)) + 1)
    return numbers


def folds(
    scores_NM: ArrayLike | Tensor,
    scores_MN: ArrayLike | Tensor,
    image_of_text_M: ArrayLike | Tensor,
    *,
    size: int,
    ties: Ties = "pessimistic",
) -> tuple[dict[str, float], list[dict[str, float]]]:
    """`summary` of consecutive folds of `size` images with their own captions: (mean over the folds, each
    fold).

    "COCO 1k" is size=1000 on the 5,000 images of the Karpathy test split. Raises ValueError when N is no
    multiple of `size`: a last, smaller fold would be an easier one.
    """
    of_image, of_text = _scores(scores_NM), _scores(scores_MN)
    image = _images(image_of_text_M, images=of_image.shape[0], texts=of_image.shape[1])
    if size < 1 or len(of_image) % size:
        raise ValueError(
            f"{len(of_image)} images cannot be cut into folds of {size}; give a size that divides their "
            "number"
        )
    each = []
    for start in range(0, len(of_image), size):
        texts = ((image >= start) & (image < start + size)).nonzero().squeeze(1)
        own, rows = image[texts] - start, texts.to(of_text.device)
        text = text_ranks(
            of_image[start : start + size].index_select(1, texts.to(of_image.device)), own, ties=ties
        )
        each.append(summary(text, image_ranks(of_text[rows, start : start + size], own, ties=ties)))
    return mean_of(each), each


def mean_of(each: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Mean of every number over several summaries."""
    return {key: sum(one[key] for one in each) / len(each) for key in each[0]}


def chance(
    image_of_text_M: ArrayLike | Tensor, *, images: int, at: Sequence[int] = (1, 5, 10)
) -> dict[str, float]:
    """Expected recall of random scores in percent: tr_r1, ..., ir_r1, ...

    TR: mean over images of 1 - C(M - c, K) / C(M, K) for an image with c texts; IR: K / N.
    """
    texts = len(torch.as_tensor(image_of_text_M))
    own = torch.bincount(_images(image_of_text_M, images=images, texts=texts)).tolist()
    numbers = {}
    for k in at:
        drawn = min(k, texts)
        misses = (math.comb(texts - count, drawn) / math.comb(texts, drawn) for count in own)
        numbers[f"tr_r{k}"] = 100.0 * (1 - sum(misses) / images)
    return numbers | {f"ir_r{k}": 100.0 * min(k, images) / images for k in at}


def top(scores_QC: Tensor, k: int) -> Tensor:
    """Indices of the `k` best candidates of each query, in order of index: [Q,k] int64.

    Where the k-th and later scores tie the smaller index is taken, so that the choice depends neither on the
    device nor on the number of rows that were computed together (`torch.topk` promises neither).
    """
    queries, candidates = scores_QC.shape
    if not 1 <= k <= candidates:
        raise ValueError(f"k={k} must lie in 1..{candidates}, the number of candidates")
    _refuse_nan(scores_QC)
    rows = max(1, CHUNK_SCORES // candidates)
    chosen = torch.empty(queries, k, dtype=torch.long, device=scores_QC.device)
    for start in range(0, queries, rows):
        part = scores_QC[start : start + rows]
        last = part.topk(k).values[:, -1:]
        above, level = part > last, part == last
        room = k - above.sum(1, keepdim=True)
        taken = above | (level & (level.cumsum(1) <= room))
        chosen[start : start + rows] = taken.nonzero()[:, 1].view(len(part), k)
    return chosen


def _ranks(scores: Tensor, query_P: Tensor, right_P: Tensor, *, ties: Ties, query: str) -> Ranks:
    """Counting instead of sorting: O(QC), a chunk of rows at a time."""
    queries, candidates = scores.shape
    query_P, right_P = query_P.to(scores.device), right_P.to(scores.device)
    # The best right score of each query, the first index that has it, and how many right ones share it.
    values = scores[query_P, right_P]
    best = scores.new_full((queries,), -torch.inf).scatter_reduce(0, query_P, values, "amax")
    at_best = values == best[query_P]
    first = torch.full((queries,), candidates, device=scores.device).scatter_reduce(
        0, query_P[at_best], right_P[at_best], "amin"
    )
    equals = torch.bincount(query_P[at_best], minlength=queries)
    index = torch.arange(candidates, device=scores.device)
    found: dict[str, list[Tensor]] = {"pessimistic": [], "index": []}
    rows = max(1, CHUNK_SCORES // max(1, candidates))
    for start in range(0, queries, rows):
        part, level = scores[start : start + rows], best[start : start + rows, None]
        above = (part > level).sum(1)
        same = part == level
        found["pessimistic"].append(1 + above + same.sum(1) - equals[start : start + rows])
        found["index"].append(1 + above + (same & (index < first[start : start + rows, None])).sum(1))
    answer = {rule: torch.cat(parts).cpu().numpy() for rule, parts in found.items()}
    _warn_of_ties(answer["pessimistic"], answer["index"], query=query)
    return answer[ties]


def _candidate_ranks(
    candidates_QK: Tensor,
    scores_QK: Tensor,
    good_QK: Tensor,
    right_Q: Tensor,
    first_Q: Tensor,
    *,
    total: int,
    ties: Ties,
) -> tuple[Ranks, Found]:
    """`right_Q`: number of right answers of each query, `first_Q`: the smallest index of them."""
    scores = _scores(scores_QK).cpu()
    found = good_QK.any(1)
    best = scores.masked_fill(~good_QK, -torch.inf).amax(1, keepdim=True)
    first_best = candidates_QK.masked_fill(~good_QK | (scores != best), total).amin(1, keepdim=True)
    above, same = (scores > best) & ~good_QK, (scores == best) & ~good_QK
    inside = {
        "pessimistic": 1 + above.sum(1) + same.sum(1),
        "index": 1 + above.sum(1) + (same & (candidates_QK < first_best)).sum(1),
    }
    outside = {
        "pessimistic": 1 + total - right_Q,
        "index": 1 + candidates_QK.shape[1] + first_Q - (candidates_QK < first_Q[:, None]).sum(1),
    }
    _warn_of_ties(inside["pessimistic"][found].numpy(), inside["index"][found].numpy())
    return torch.where(found, inside[ties], outside[ties]).numpy(), found.numpy()


def _warn_of_ties(pessimistic: Ranks, index: Ranks, *, query: str = "query") -> None:
    differ = int(np.count_nonzero(pessimistic != index))
    if differ > TIE_WARNING * len(pessimistic):
        warnings.warn(
            f"tied scores: the rank of {differ} of {len(pessimistic)} queries (by {query}) depends on the "
            "tie rule; scores of half precision or a collapsed model do this",
            TieWarning,
            stacklevel=4,
        )


def _scores(scores: ArrayLike | Tensor) -> Tensor:
    tensor = torch.as_tensor(scores)
    if tensor.ndim != 2:
        raise ValueError(f"scores must be a matrix, not of shape {tuple(tensor.shape)}")
    if not tensor.is_floating_point():
        tensor = tensor.double()
    _refuse_nan(tensor)
    return tensor


def _refuse_nan(scores: Tensor) -> None:
    # Every comparison with NaN is false: a model that returns NaN would be ranked first everywhere.
    bad = scores.isnan().any(1)
    if bad.any():
        raise ValueError(
            f"{int(bad.sum())} rows of the scores hold NaN, the first is row {int(bad.nonzero()[0])}"
        )


def _candidates(candidates: Tensor, scores: Tensor, *, total: int) -> Tensor:
    index = torch.as_tensor(candidates).long().cpu()
    if index.shape != torch.as_tensor(scores).shape or index.ndim != 2:
        raise ValueError(
            f"candidates {tuple(index.shape)} and scores {tuple(scores.shape)} must be matrices of one shape"
        )
    if index.numel() and not 0 <= int(index.min()) <= int(index.max()) < total:
        raise ValueError(f"a candidate lies outside 0..{total - 1}")
    return index


def _images(image_of_text: ArrayLike | Tensor, *, images: int, texts: int) -> Tensor:
    index = torch.as_tensor(image_of_text).long().cpu()
    if index.shape != (texts,):
        raise ValueError(
            f"image_of_text has shape {tuple(index.shape)}, the scores are of {texts} texts and {images} "
            "images"
        )
    if texts and not 0 <= int(index.min()) <= int(index.max()) < images:
        raise ValueError(f"image_of_text names an image outside 0..{images - 1}")
    counts = torch.bincount(index, minlength=images)
    if not bool(counts.all()):
        raise ValueError(f"image {int((counts == 0).nonzero()[0])} has no text; leave it out of the gallery")
    return index


def _not_empty(ranks: Ranks) -> Ranks:
    ranks = np.asarray(ranks)
    if not len(ranks):
        raise ValueError("no queries: a share of nothing is not defined")
    return ranks
