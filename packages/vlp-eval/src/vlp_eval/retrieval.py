"""Image-text retrieval: by similarity of the two encoders, and re-ranked by the fusion encoder.

Two steps, as in ALBEF, X-VLM and ViCHA (evaluation of ALBEF, arXiv 2107.07651, section 6; X-VLM
`Retrieval.py`):

1. similarity of all images and texts: inner products of the projections, without temperature;
2. for each image the K most similar texts, and for each text the K most similar images, are scored by
   `model.match`; this score alone ranks them (the similarity is not added), and what is no candidate stands
   behind all candidates.

Different from the reference, with the same ranks: a pair wanted in both directions is scored once, many
queries share a batch, padding is cut to the longest text of a batch, scores of ranks are gathered and not
summed (the reference shifts them by -100 per further rank and loses digits), and no sample is evaluated twice
when it does not divide by the number of ranks.

Letters: N images, M texts, K candidates, P pairs, T tokens, E shared embedding.
"""

import contextlib
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import pad
from vlp_core import distributed
from vlp_data.cleaning import cleaned
from vlp_data.options import ConceptOptions
from vlp_data.schema import Source

from vlp_eval.benchmarks.retrieval import RetrievalOptions
from vlp_eval.gallery import Gallery
from vlp_eval.inference import (
    EXECUTION,
    Execution,
    ImageBatch,
    ImageWithWords,
    Progress,
    ViewedRows,
    autocast,
    evaluating,
    image_batches,
    settings_of,
    silent,
    speaker,
)
from vlp_eval.metrics import retrieval as metric
from vlp_eval.protocol import DualEncoder, ImageFeatures, PairScorer, RetrievalModel, TextFeatures
from vlp_eval.report import Scores
from vlp_eval.subject import Subject

AT = (1, 5, 10)
SHOWN = 5


RERANK = 128
"""Candidates of each query where `RetrievalOptions.rerank` is None and there is a fusion encoder."""


def open_gallery(source: Source, files: None, options: RetrievalOptions) -> Gallery:
    """The images and captions of a source that the options name; texts are as in the data."""
    gallery = Gallery.from_source(source, limit=options.limit)
    if options.first_captions is not None:
        gallery = gallery.first_texts(options.first_captions)
    return gallery if options.repeated_captions else gallery.without_repeated_texts()


@torch.no_grad()  # not inference_mode: what a model caches on the way must stay usable in training
def evaluate_retrieval(
    subject: Subject, gallery: Gallery, options: RetrievalOptions, execution: Execution = EXECUTION
) -> Scores:
    """Retrieval in both directions, by similarity and, with `options.rerank`, by the fusion encoder.

    Args:
        subject: Its model is a `vlp_eval.protocol.DualEncoder`, with `match` (a `RetrievalModel`) for
            re-ranking, or a `PairScorer`, which scores all pairs (result "pairs"). Concepts come from the
            gallery; their padding is visible to the model, so `subject.concepts.pad` must be "max".
        gallery: Images and texts, which are cleaned here as the subject reads them.
        options: How retrieval is measured. More candidates than the gallery holds score all pairs, and the
            notes say so. `fold_size` adds the result "dual, folds of ...". Batch sizes change nothing but
            rounding.
        execution: How the evaluation runs. Scores are ranked in fp32 whatever its precision.

    Under torch.distributed each rank encodes its share, each sample exactly once, and all ranks return the
    same Scores. The model is in evaluation mode meanwhile. Tied scores, cut K and the like become `notes` of
    the result, not warnings.

    Raises ValueError for settings that cannot take effect, and for features or scores that are NaN.
    """
    model, (tokenizer, _), reading = subject.model, subject.text(), subject.reads(options)
    world, rank = distributed.world_size(), distributed.rank()
    images, texts = len(gallery.image_ids), len(gallery.texts)
    dual = hasattr(model, "encode_image") and hasattr(model, "encode_text")
    if not dual and not isinstance(model, PairScorer):
        raise ValueError(
            f"{type(model).__name__} can neither encode images and texts (encode_image, encode_text) nor "
            "score pairs of them (score); it cannot retrieve"
        )
    wanted = _candidates(model, options)
    if world > min(images, texts):
        raise ValueError(f"{images} images and {texts} texts cannot be shared by {world} ranks; start fewer")
    reader = subject.concept_reader()
    if reader is not None:
        _require_concepts(gallery, reader.options)
    gallery = gallery.map_texts(partial(cleaned, how=reading.clean, max_words=reading.max_words))
    device = execution.place(model)
    say = speaker(execution.progress)
    result = _Result(gallery, options.ties)
    viewed = _GalleryImages(gallery)
    rows = ViewedRows(viewed, range(rank, images, world), subject.view, viewed.name, reader)
    batches = image_batches(rows, batch=options.image_batch, workers=execution.workers)
    encoded = tokenizer.encode(
        gallery.texts, max_tokens=reading.max_tokens, separator=reading.separator, pad="longest"
    )

    with evaluating(model), autocast(device, execution.precision):
        if dual:
            _by_similarity(cast(DualEncoder, model), batches, *encoded, result, wanted, options, device, say)
        else:
            own = len(rows)
            mine = score_all(
                model,
                batches,
                *encoded,
                pair_batch=options.pair_batch,
                device=device,
                progress=lambda done: say("images with all texts", done, own),
            )
            result.add_all("pairs", _everyone(mine, images), fold_size=options.fold_size)
    settings = {**settings_of(subject, execution, reading), "ties": options.ties}
    return result.scores({**settings, "rerank": wanted} if dual else settings)


def _by_similarity(
    model: DualEncoder,
    batches: Iterable[ImageBatch],
    ids: Tensor,
    mask: Tensor,
    result: "_Result",
    wanted: int,
    options: RetrievalOptions,
    device: torch.device,
    say: Progress,
) -> None:
    """Ranks by similarity, and those of the `wanted` best after re-ranking, into `result`; `batches` are the
    images of this rank."""
    world, rank = distributed.world_size(), distributed.rank()
    images, texts = len(result.gallery.image_ids), len(result.gallery.texts)
    image = _encode_images(model, batches, len(range(rank, images, world)), device, say)
    text = _encode_texts(model, ids, mask, range(rank, texts, world), options.text_batch, device, say)
    text = cast(Any, text)._make(
        None if share is None else _everyone(share, texts) for share in cast(Any, text)
    )
    similarity_NM = _everyone(image.projection, images).float() @ text.projection.float().T
    result.add_all("dual", similarity_NM, fold_size=options.fold_size)
    if not wanted:
        return
    of_image = _everyone(metric.top(similarity_NM[rank::world], min(wanted, texts)), images).cpu()
    of_text = _everyone(metric.top(similarity_NM.T[rank::world], min(wanted, images)), texts).cpu()
    del similarity_NM
    scores_NK, scores_MK = _rerank(
        cast(RetrievalModel, model), image, text, of_image, of_text, options.pair_batch, say
    )
    image_of_text = torch.tensor(result.gallery.image_of_text)
    with _caught(result.notes):
        text_ranks, text_found = metric.candidate_text_ranks(
            of_image, scores_NK, image_of_text, ties=options.ties
        )
        image_ranks, image_found = metric.candidate_image_ranks(
            of_text, scores_MK, image_of_text, images=images, ties=options.ties
        )
    result.note_candidates(wanted, text_found, image_found)
    result.add(
        "reranked",
        text_ranks,
        image_ranks,
        of_image.gather(1, best_in_order(scores_NK, SHOWN)),
        of_text.gather(1, best_in_order(scores_MK, SHOWN)),
    )


def score_all(
    model: PairScorer,
    batches: Iterable[ImageBatch],
    ids: Tensor,
    mask: Tensor,
    *,
    pair_batch: int = 256,
    device: torch.device | str = "cpu",
    progress: Callable[[int], None] | None = None,
) -> Tensor:
    """`model.score` of every image of some batches with every text [M,T]: [images,M] fp32 on the CPU.

    Each image is decoded once; texts of like length share a batch, which is cut to its longest text.
    `progress` is told how many images are done.
    """
    length = mask.sum(1)
    order = length.argsort(stable=True)
    parts = []
    for batch in batches:
        images = batch.images.to(device)
        scores = torch.empty(len(images), len(ids))
        pairs = torch.cartesian_prod(order, torch.arange(len(images)))
        for start in range(0, len(pairs), pair_batch):
            text, image = pairs[start : start + pair_batch].T
            tokens = int(length[text].max())
            score = model.score(
                images.rows(image.to(device)), ids[text, :tokens].to(device), mask[text, :tokens].to(device)
            )
            if score.shape != text.shape:
                raise ValueError(f"score returned scores of shape {tuple(score.shape)} for {len(text)} pairs")
            scores[image, text] = score.float().cpu()
        parts.append(scores)
        if progress is not None:
            progress(sum(map(len, parts)))
    return torch.cat(parts)


def _candidates(model: Any, options: RetrievalOptions) -> int:
    """Candidates of each query that are re-ranked."""
    if not hasattr(model, "encode_image"):
        if options.rerank is not None:
            raise ValueError(
                f"rerank={options.rerank}: {type(model).__name__} has no similarity to choose candidates by "
                "and scores all pairs; leave rerank out"
            )
        return 0
    fuses = hasattr(model, "match")
    if options.rerank and not fuses:
        raise ValueError(
            f"rerank={options.rerank}: {type(model).__name__} has no fusion encoder (`match`); use rerank=0"
        )
    return (RERANK if fuses else 0) if options.rerank is None else options.rerank


def rerank(
    model: RetrievalModel,
    image: ImageFeatures,
    text: TextFeatures,
    of_image_NK: Tensor,
    of_text_MK: Tensor,
    *,
    pair_batch: int = 256,
) -> tuple[Tensor, Tensor]:
    """Scores of the candidates of both directions, on one process: [N,K] and [M,K'] fp32 on the CPU.

    `of_image_NK[i]` are the texts to score for image i, `of_text_MK[j]` the images for text j (see
    `metrics.retrieval.top`). A pair that occurs in both is scored once, and nothing but these pairs is.
    """
    return _rerank(model, image, text, of_image_NK, of_text_MK, pair_batch, silent, world=1, rank=0)


def score_pairs(
    model: RetrievalModel,
    image: ImageFeatures,
    text: TextFeatures,
    image_P: Tensor,
    text_P: Tensor,
    *,
    pair_batch: int = 256,
    progress: Progress | None = None,
) -> Tensor:
    """`model.match` of P pairs of indices, in batches: [P] fp32 on the CPU.

    Pairs of one image are scored together, so that the model prepares an image once or a few times, and among
    them texts of like length, so that little padding is computed.
    """
    device = image.embeds.device
    length_M = text.attention_mask.sum(1).cpu()
    image_P, text_P = image_P.cpu(), text_P.cpu()
    longest = int(length_M.max()) + 1
    order = (image_P * longest + length_M[text_P]).argsort(stable=True)
    scores = torch.empty(len(order))
    for start in range(0, len(order), pair_batch):
        chosen = order[start : start + pair_batch]
        few_images, image_index = image_P[chosen].unique(return_inverse=True)
        few_texts, text_index = text_P[chosen].unique(return_inverse=True)
        tokens = int(length_M[few_texts].max())
        part = cast(Any, _rows(text, few_texts.to(device)))
        part = part._replace(embeds=part.embeds[:, :tokens], attention_mask=part.attention_mask[:, :tokens])
        score_R = model.match(
            _rows(image, few_images.to(device)),
            part,
            image_index.to(device),
            text_index.to(device),
        )
        if score_R.shape != chosen.shape:
            raise ValueError(f"match returned scores of shape {tuple(score_R.shape)} for {len(chosen)} pairs")
        scores[chosen] = score_R.float().cpu()
        if progress is not None:
            progress("pairs", min(start + pair_batch, len(order)), len(order))
    return scores


def best_in_order(scores_QC: Tensor, count: int) -> Tensor:
    """Indices of the `count` best candidates (all, when there are fewer), best first, ties in order of index:
    [Q,count]."""
    index = metric.top(scores_QC, min(count, scores_QC.shape[1]))
    order = scores_QC.gather(1, index).argsort(dim=1, descending=True, stable=True)
    return index.gather(1, order).cpu()


def _rerank(
    model: RetrievalModel,
    image: ImageFeatures,
    text: TextFeatures,
    of_image_NK: Tensor,
    of_text_MK: Tensor,
    pair_batch: int,
    say: Progress,
    *,
    world: int | None = None,
    rank: int | None = None,
) -> tuple[Tensor, Tensor]:
    """`image` holds the images rank, rank + world, ... only, `text` all texts: each rank scores the pairs of
    its images."""
    world = distributed.world_size() if world is None else world
    rank = distributed.rank() if rank is None else rank
    texts = len(of_text_MK)
    of_image, of_text = of_image_NK.cpu(), of_text_MK.cpu()
    wanted = torch.cat(
        [
            (torch.arange(len(of_image))[:, None] * texts + of_image).flatten(),
            (of_text * texts + torch.arange(texts)[:, None]).flatten(),
        ]
    )
    pairs, place = wanted.unique(return_inverse=True)
    image_P, text_P = pairs // texts, pairs % texts
    owner_P = image_P % world
    own = owner_P == rank
    mine = score_pairs(
        model, image, text, image_P[own] // world, text_P[own], pair_batch=pair_batch, progress=say
    )
    if world > 1:
        # Every rank knows who scored what, so scores alone travel, in one tensor as long as the longest
        # share.
        counts = torch.bincount(owner_P, minlength=world)
        sent = pad(mine, (0, int(counts.max()) - len(mine))).to(image.embeds.device)
        shares = distributed.gather(sent, "none").cpu().view(world, -1)
        mine = torch.empty(len(pairs))
        for other in range(world):
            mine[owner_P == other] = shares[other, : counts[other]]
    scores = mine[place]
    return scores[: of_image.numel()].view_as(of_image), scores[of_image.numel() :].view_as(of_text)


def _require_concepts(gallery: Gallery, concepts: ConceptOptions) -> None:
    """Raise ValueError where the images of a gallery have no concepts, or their padding would differ between
    batches."""
    if concepts.pad != "max":
        raise ValueError(
            f"concepts.pad={concepts.pad}: the features of an image would depend on its batch, and all "
            "images of a gallery are compared; give pad=max"
        )
    if not gallery.concepts:
        raise ValueError(
            "the images of the gallery have no concepts; `vlp-data concepts assign` writes lists with them"
        )
    for name, words in zip(gallery.image_ids, gallery.concepts, strict=True):
        if not words:
            raise ValueError(f"image {name!r} of the gallery has no concepts, others have")


class _GalleryImages:
    """Image i of a gallery, and its name; picklable."""

    def __init__(self, gallery: Gallery) -> None:
        self.gallery = gallery

    def __call__(self, i: int) -> list[ImageWithWords]:
        words = self.gallery.concepts[i] if self.gallery.concepts else ()
        return [ImageWithWords(self.gallery.image(i), words)]

    def name(self, i: int) -> str:
        return f"image {self.gallery.image_ids[i]!r} of the gallery"


def _encode_images(
    model: DualEncoder, batches: Iterable[ImageBatch], total: int, device: torch.device, say: Progress
) -> ImageFeatures:
    parts = []
    for batch in batches:
        parts.append(model.encode_image(batch.images.to(device)))
        if parts[0].projection is None:
            raise ValueError(
                f"{type(model).__name__} has no projection into a shared space; it cannot retrieve"
            )
        say("images", sum(len(part.projection) for part in parts), total)
    return _join(parts)


def _encode_texts(
    model: DualEncoder,
    ids: Tensor,
    mask: Tensor,
    indices: Sequence[int],
    batch: int,
    device: torch.device,
    say: Progress,
) -> TextFeatures:
    """Features in order of `indices`, padded to the longest of all texts (`ids`), so that all ranks agree on
    the shape."""
    own = torch.tensor(indices)
    length = mask.sum(1)
    order = own[length[own].argsort(stable=True)]
    parts = []
    for start in range(0, len(order), batch):
        chosen = order[start : start + batch]
        tokens = int(length[chosen].max())
        part = cast(Any, model.encode_text(ids[chosen, :tokens].to(device), mask[chosen, :tokens].to(device)))
        missing = ids.shape[1] - tokens
        parts.append(
            part._replace(
                embeds=pad(part.embeds, (0, 0, 0, missing)),
                attention_mask=pad(part.attention_mask, (0, missing)),
            )
        )
        say("texts", start + len(chosen), len(order))
    back = torch.empty_like(order)
    back[length[own].argsort(stable=True)] = torch.arange(len(order))
    return _rows(_join(parts), back.to(device))


class _Result:
    """Collects the results of one evaluation."""

    def __init__(self, gallery: Gallery, ties: metric.Ties) -> None:
        self.gallery, self.ties = gallery, ties
        self.notes: list[str] = []
        self.results: dict[str, dict[str, float]] = {}
        self.hits: dict[str, dict[str, int]] = {}
        self.counts = {"images": len(gallery.image_ids), "texts": len(gallery.texts)}
        texts: list[list[str]] = [[] for _ in gallery.image_ids]
        for j, i in enumerate(gallery.image_of_text):
            texts[i].append(gallery.text_ids[j])
        self.images: list[dict[str, Any]] = [
            {"id": name, "texts": own, "rank": {}, "best": {}}
            for name, own in zip(gallery.image_ids, texts, strict=True)
        ]
        self.texts: list[dict[str, Any]] = [
            {"id": name, "image": gallery.image_ids[i], "text": words, "rank": {}, "best": {}}
            for name, i, words in zip(gallery.text_ids, gallery.image_of_text, gallery.texts, strict=True)
        ]

    def add_all(self, name: str, scores_NM: Tensor, *, fold_size: int | None) -> None:
        """A result of the scores of all images and texts."""
        image_of_text = torch.tensor(self.gallery.image_of_text)
        with _caught(self.notes):
            self.add(
                name,
                metric.text_ranks(scores_NM, image_of_text, ties=self.ties),
                metric.image_ranks(scores_NM.T, image_of_text, ties=self.ties),
                best_in_order(scores_NM, SHOWN),
                best_in_order(scores_NM.T, SHOWN),
            )
            if fold_size is not None:
                mean, _ = metric.folds(scores_NM, scores_NM.T, image_of_text, size=fold_size, ties=self.ties)
                self.results[f"{name}, folds of {fold_size}"] = mean
                self.hits[f"{name}, folds of {fold_size}"] = {}

    def add(
        self,
        result: str,
        text_ranks: metric.Ranks,
        image_ranks: metric.Ranks,
        texts_NS: Tensor,
        images_MS: Tensor,
    ) -> None:
        self.results[result] = metric.summary(text_ranks, image_ranks, at=AT)
        self.hits[result] = {
            f"{name}_r{k}": count
            for name, ranks in (("tr", text_ranks), ("ir", image_ranks))
            for k, count in metric.hit_counts(ranks, at=AT).items()
        }
        for samples, ranks, best, ids in (
            (self.images, text_ranks, texts_NS, self.gallery.text_ids),
            (self.texts, image_ranks, images_MS, self.gallery.image_ids),
        ):
            for sample, one, places in zip(samples, ranks.tolist(), best.tolist(), strict=True):
                sample["rank"][result] = one
                sample["best"][result] = [ids[place] for place in places]

    def note_candidates(self, wanted: int, text_found: metric.Found, image_found: metric.Found) -> None:
        for name, queries, gallery, found in (
            ("text", "images", "texts", text_found),
            ("image", "texts", "images", image_found),
        ):
            total = self.counts[gallery]
            if wanted >= total:
                self.notes.append(
                    f"{name} retrieval: rerank={wanted} covers all {total} {gallery}; every one was scored"
                )
                continue
            self.counts[f"{queries} without a right candidate"] = int(np.count_nonzero(~found))
            if wanted < max(AT) < total:
                self.notes.append(
                    f"{name} retrieval: rerank={wanted} leaves R@{max(AT)} nothing to find beyond the "
                    f"{wanted} candidates"
                )

    def scores(self, settings: dict[str, Any]) -> Scores:
        return Scores(
            benchmark="retrieval",
            settings=settings,
            counts=self.counts,
            results=self.results,
            hits=self.hits,
            chance=metric.chance(self.gallery.image_of_text, images=len(self.gallery.image_ids), at=AT),
            samples={"images": self.images, "texts": self.texts},
            notes=tuple(dict.fromkeys(self.notes)),
            shown=(*(f"{name}_r{k}" for name in ("tr", "ir") for k in AT), "r_mean", "rsum"),
        )


def _rows(features: Any, index: Tensor) -> Any:
    return features._make(None if field is None else field[index] for field in features)


def _join(parts: Sequence[Any]) -> Any:
    return parts[0]._make(
        None if fields[0] is None else torch.cat(fields) for fields in zip(*parts, strict=True)
    )


def _everyone(share: Tensor, total: int) -> Tensor:
    """Rows of all ranks in order: rank r holds rows r, r + world, ... of `total`."""
    world = distributed.world_size()
    if world == 1:
        return share
    longest = -(-total // world)
    filled = torch.cat([share, share.new_zeros(longest - len(share), *share.shape[1:])])
    shares = distributed.gather(filled, "none").view(world, longest, *share.shape[1:])
    return shares.transpose(0, 1).reshape(world * longest, *share.shape[1:])[:total]


@contextlib.contextmanager
def _caught(notes: list[str]) -> Iterator[None]:
    """Turn warnings about ties into notes of the result."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", metric.TieWarning)
        yield
    for warning in caught:
        if issubclass(warning.category, metric.TieWarning):
            notes.append(str(warning.message))
        else:
            warnings.warn_explicit(warning.message, warning.category, warning.filename, warning.lineno)
