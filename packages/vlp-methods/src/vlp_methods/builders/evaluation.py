"""A benchmark of `vlp_eval` on the validation data while training, and once on the test data with the
selected model.

A benchmark here is a function `measure(model, source, folder) -> {name: number}` that writes its files into
`folder` on rank 0; it is called on every rank. The names get the split in front: val/accuracy, test/accuracy.
"""

import logging
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
from PIL.Image import Image
from torch import nn
from vlp_core import distributed, models
from vlp_data.options import ConceptOptions, ImageTextSource
from vlp_data.schema import Source
from vlp_data.text import Tokenizer, pre_caption
from vlp_data.transforms import eval_view
from vlp_eval import figures, predictions
from vlp_eval.captioning import evaluate_captioning
from vlp_eval.concepts import as_evaluated
from vlp_eval.gallery import Gallery
from vlp_eval.grounding import evaluate_grounding, word_heat
from vlp_eval.inference import Reading, RowOptions
from vlp_eval.report import Scores
from vlp_eval.retrieval import evaluate_retrieval
from vlp_eval.statements import evaluate_entailment, evaluate_nlvr
from vlp_eval.vqa import evaluate_vqa, read_annotations, read_candidates

from vlp_methods.engine.options import Training
from vlp_methods.sections.data import Data, MeasuredData, QuestionSet
from vlp_methods.sections.evaluation import (
    BoxTest,
    CaptionTest,
    HeatTest,
    LabelTest,
    RankedAnswers,
    RetrievalTest,
    RowTest,
    WrittenAnswers,
)
from vlp_methods.sections.training import FineTuning

log = logging.getLogger(__name__)

Measure = Callable[[nn.Module, Any, Path], Mapping[str, float]]


During = Callable[[nn.Module, int, Path], Mapping[str, float]]
After = Callable[[Path, torch.device, Path], Mapping[str, float]]


class Evaluations(NamedTuple):
    """`Job.evaluate` and `Job.test`."""

    during: During | None = None
    after: After | None = None


NONE = Evaluations()


def of_fine_tuning(recipe: FineTuning, data: MeasuredData, measure: Measure) -> Evaluations:
    """On the data that `select` names while training, on `data.test` of the selected model."""
    watched = data.val if recipe.select == "val" else data.test

    def during(task: nn.Module, step: int, folder: Path) -> Mapping[str, float]:
        return _named(recipe.select, measure(task.model, watched, folder))

    def after(export: Path, device: torch.device, folder: Path) -> Mapping[str, float]:
        return _named("test", measure(models.load(export).model.to(device), data.test, folder))

    return Evaluations(None if watched is None else during, None if data.test is None else after)


def of_pretraining(source: Any | None, measure: Measure) -> Evaluations:
    """On data of its own while training; its numbers have no split in front."""
    if source is None:
        return NONE
    return Evaluations(lambda task, step, folder: measure(task.model, source, folder))


def _named(split: str, numbers: Mapping[str, float]) -> dict[str, float]:
    return {f"{split}/{name}": value for name, value in numbers.items()}


def record(scores: Scores, folder: Path) -> None:
    """Write `<benchmark>.json` and say the table, on rank 0."""
    if distributed.is_main():
        (folder / f"{scores.benchmark}.json").write_text(scores.json())
        log.info("%s", scores.table())


RECALLS = ("tr_r1", "tr_r5", "tr_r10", "ir_r1", "ir_r5", "ir_r10", "r_mean")
"""Numbers of retrieval that a run reports; retrieval.json holds all."""


class Made(Protocol):
    recipe: Any
    data: Any
    tokenizer: Any


def retrieval(made: Made, options: RetrievalTest) -> Evaluations:
    """Retrieval in both directions; writes retrieval.json and retrieval.png."""
    return of_fine_tuning(
        made.recipe, made.data, partial(_retrieval, made.recipe, made.data, made.tokenizer, options)
    )


def pretraining(made: Made, options: RetrievalTest) -> Evaluations:
    return of_pretraining(
        made.data.test, partial(_retrieval, made.recipe, made.data, made.tokenizer, options)
    )


def _retrieval(
    recipe: Training,
    data: Data,
    tokenizer: Tokenizer,
    options: RetrievalTest,
    model: nn.Module,
    source: ImageTextSource,
    folder: Path,
) -> Mapping[str, float]:
    gallery = Gallery.from_source(source.open()).map_texts(
        partial(pre_caption, max_words=data.text.max_words)
    )
    scores = evaluate_retrieval(
        model,
        gallery,
        tokenizer,
        view=partial(eval_view, size=data.view.size),
        concepts=_concepts(data, alike=True),
        max_tokens=data.text.max_tokens,
        separator=data.text.separator,
        rerank=options.rerank,
        image_batch=options.image_batch,
        pair_batch=options.pair_batch,
        workers=recipe.workers,
    )
    record(scores, folder)
    if distributed.is_main() and options.figures:
        _save(figures.retrieval_figure(scores, gallery, queries=options.figures), scores, folder)
    return {
        f"{stage}/{name}": value
        for stage, numbers in scores.stages.items()
        for name, value in numbers.items()
        if name in RECALLS
    }


def answers(made: Made, options: RankedAnswers | WrittenAnswers) -> Evaluations:
    """Visual question answering, of a `QuestionSet`. `candidates`: file of the answers that are ranked."""
    recipe, data, tokenizer, candidates = made.recipe, made.data, made.tokenizer, made.data.candidates
    chosen: dict[str, Any]
    if isinstance(options, WrittenAnswers):
        chosen = {"candidates": None, "beams": options.beams, "answer_tokens": options.max_tokens}
    else:
        listed = read_candidates(candidates)
        chosen = {
            "candidates": listed,
            "k": min(options.candidates, len(listed)),
            "pairs": options.pair_batch,
        }

    def measure(model: nn.Module, questions: QuestionSet, folder: Path) -> Mapping[str, float]:
        measured = _rows(
            evaluate_vqa,
            recipe,
            data,
            tokenizer,
            options,
            reading=Reading(max_words=options.max_words, separator=data.text.separator),
            annotations=read_annotations(questions.annotations) if questions.annotations else None,
            **chosen,
        )
        return measured(model, questions.source, folder)

    return of_fine_tuning(recipe, data, measure)


def sentences(made: Made, options: LabelTest) -> Evaluations:
    """Sentences about two images."""
    recipe, data, tokenizer = made.recipe, made.data, made.tokenizer
    return of_fine_tuning(
        recipe, data, _rows(evaluate_nlvr, recipe, data, tokenizer, options, reading=_reading(data))
    )


def entailment(made: Made, options: LabelTest) -> Evaluations:
    """Hypotheses about an image."""
    recipe, data, tokenizer = made.recipe, made.data, made.tokenizer
    return of_fine_tuning(
        recipe, data, _rows(evaluate_entailment, recipe, data, tokenizer, options, reading=_reading(data))
    )


def boxes(made: Made, options: BoxTest) -> Evaluations:
    """Referring expressions located by the box head."""
    recipe, data, tokenizer = made.recipe, made.data, made.tokenizer

    def draw(model: nn.Module, scores: Scores, source: Source) -> Image:
        return figures.grounding_figure(scores, source, queries=options.figures)

    return of_fine_tuning(
        recipe,
        data,
        _rows(
            evaluate_grounding,
            recipe,
            data,
            tokenizer,
            options,
            by="boxes",
            draw=draw,
            reading=_reading(data),
        ),
    )


def heat(made: Made, options: HeatTest) -> Evaluations:
    """Referring expressions located among detections by heat maps; the image shows the heat of every word."""
    recipe, data, tokenizer = made.recipe, made.data, made.tokenizer
    encoded = {"mode": options.mode, "layer": options.layer, "reading": _reading(data)}
    concepts = _concepts(data, alike=True)

    def draw(model: nn.Module, scores: Scores, source: Source) -> Image:
        view = partial(eval_view, size=data.view.size)
        words = partial(word_heat, model, tokenizer, view=view, concepts=concepts, **encoded)
        return figures.grounding_figure(scores, source, queries=options.figures, heat=words)

    return of_fine_tuning(
        recipe,
        data,
        _rows(
            evaluate_grounding,
            recipe,
            data,
            tokenizer,
            options,
            by="heat",
            draw=draw,
            concepts=concepts,
            **encoded,
        ),
    )


def captions(made: Made, options: CaptionTest, prompt: str) -> Evaluations:
    """Captions."""
    recipe, data, tokenizer = made.recipe, made.data, made.tokenizer
    return of_fine_tuning(
        recipe,
        data,
        _rows(
            evaluate_captioning,
            recipe,
            data,
            tokenizer,
            options,
            prompt=prompt,
            beams=options.beams,
            max_tokens=options.max_tokens,
            min_tokens=options.min_tokens,
            length_penalty=options.length_penalty,
        ),
    )


def _reading(data: Data) -> Reading:
    return Reading(
        max_words=data.text.max_words, max_tokens=data.text.max_tokens, separator=data.text.separator
    )


def _concepts(data: Data, *, alike: bool = False) -> ConceptOptions | None:
    return None if data.concepts is None else as_evaluated(data.concepts, alike=alike)


def _rows(
    evaluate: Callable[..., Scores],
    recipe: Training,
    data: Data,
    tokenizer: Tokenizer,
    common: RowTest,
    *,
    draw: Callable[[nn.Module, Scores, Source], Image] | None = None,
    concepts: ConceptOptions | None = None,
    **arguments: Any,
) -> Measure:
    """A benchmark of rows; writes its report, the predictions and an image of some rows (`draw`, else the
    common one).

    `concepts`: how they are read; None as training does.
    """

    def measure(model: nn.Module, source: Any, folder: Path) -> Mapping[str, float]:
        opened = source.open()
        scores = evaluate(
            model,
            opened,
            tokenizer,
            RowOptions(
                view=partial(eval_view, size=data.view.size),
                concepts=concepts or _concepts(data),
                image_batch=common.image_batch,
                workers=recipe.workers,
            ),
            **arguments,
        )
        record(scores, folder)
        if distributed.is_main():
            log.info("predictions: %s", predictions.write(scores, folder))
            if common.figures:
                if draw is None:
                    image = figures.samples_figure(scores, opened, queries=common.figures)
                else:
                    image = draw(model, scores, opened)
                _save(image, scores, folder)
        return dict(scores.metrics)

    return measure


def _save(image: Image, scores: Scores, folder: Path) -> None:
    file = folder / f"{scores.benchmark}.png"
    image.save(file)
    log.info("a few of them: %s", file)
