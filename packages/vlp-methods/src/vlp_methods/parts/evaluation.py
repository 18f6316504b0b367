"""A benchmark of `vlp_eval` on the validation data while training, and once on the test data with the
selected model.

A benchmark here is a function `measure(model, source, folder) -> {name: number}` that writes its files into
`folder` on rank 0; it is called on every rank. The names get the split in front: val/accuracy, test/accuracy.
"""

import logging
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

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
from vlp_methods.parts.options import (
    BoxTest,
    CaptionTest,
    Data,
    HeatTest,
    LabelTest,
    QuestionSet,
    RankedAnswers,
    RetrievalTest,
    RowTest,
    WrittenAnswers,
)

log = logging.getLogger(__name__)

Measure = Callable[[nn.Module, Any, Path], Mapping[str, float]]


def while_training(
    measure: Measure | None, split: str, source: Any | None
) -> Callable[[nn.Module, int, Path], Mapping[str, float]] | None:
    """`Job.evaluate` on a split, for a task that holds its model as `model`; None without benchmark or
    data."""
    if measure is None or source is None:
        return None

    def evaluate(task: nn.Module, step: int, folder: Path) -> Mapping[str, float]:
        return _named(split, measure(task.model, source, folder))

    return evaluate


def of_export(
    measure: Measure | None, split: str, source: Any | None
) -> Callable[[Path, torch.device, Path], Mapping[str, float]] | None:
    """`Job.test` on a split: measures the model of an export folder; None without benchmark or data."""
    if measure is None or source is None:
        return None

    def test(export: Path, device: torch.device, folder: Path) -> Mapping[str, float]:
        return _named(split, measure(models.load(export).model.to(device), source, folder))

    return test


def _named(split: str, numbers: Mapping[str, float]) -> dict[str, float]:
    return {f"{split}/{name}": value for name, value in numbers.items()}


def record(scores: Scores, folder: Path) -> None:
    """Write `<benchmark>.json` and say the table, on rank 0."""
    if distributed.is_main():
        (folder / f"{scores.benchmark}.json").write_text(scores.json())
        log.info("%s", scores.table())


RECALLS = ("tr_r1", "tr_r5", "tr_r10", "ir_r1", "ir_r5", "ir_r10", "r_mean")
"""Numbers of retrieval that a run reports; retrieval.json holds all."""


def retrieval(recipe: Training, data: Data, tokenizer: Tokenizer, options: RetrievalTest) -> Measure:
    """Retrieval in both directions; writes retrieval.json and retrieval.png."""
    return partial(_retrieval, recipe, data, tokenizer, options)


def retrieval_test(
    recipe: Training, data: Any, tokenizer: Tokenizer, options: RetrievalTest
) -> Callable[[nn.Module, int, Path], Mapping[str, float]] | None:
    """`Job.evaluate` of a pre-training: retrieval on `data.test`, if there is one."""
    if data.test is None:
        return None
    measure = retrieval(recipe, data, tokenizer, options)
    return lambda task, step, folder: measure(task.model, data.test, folder)


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


def answers(
    recipe: Training,
    data: Data,
    tokenizer: Tokenizer,
    options: RankedAnswers | WrittenAnswers,
    candidates: str,
) -> Measure:
    """Visual question answering, of a `QuestionSet`. `candidates`: file of the answers that are ranked."""
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

    return measure


def sentence_labels(recipe: Training, data: Data, tokenizer: Tokenizer, options: LabelTest) -> Measure:
    """Sentences about two images."""
    return _rows(evaluate_nlvr, recipe, data, tokenizer, options, reading=_reading(data))


def entailment(recipe: Training, data: Data, tokenizer: Tokenizer, options: LabelTest) -> Measure:
    """Hypotheses about an image."""
    return _rows(evaluate_entailment, recipe, data, tokenizer, options, reading=_reading(data))


def boxes(recipe: Training, data: Data, tokenizer: Tokenizer, options: BoxTest) -> Measure:
    """Referring expressions located by the box head."""

    def draw(model: nn.Module, scores: Scores, source: Source) -> Image:
        return figures.grounding_figure(scores, source, queries=options.figures)

    return _rows(
        evaluate_grounding, recipe, data, tokenizer, options, by="boxes", draw=draw, reading=_reading(data)
    )


def heat(recipe: Training, data: Data, tokenizer: Tokenizer, options: HeatTest) -> Measure:
    """Referring expressions located among detections by heat maps; the image shows the heat of every word."""
    encoded = {"mode": options.mode, "layer": options.layer, "reading": _reading(data)}
    concepts = _concepts(data, alike=True)

    def draw(model: nn.Module, scores: Scores, source: Source) -> Image:
        view = partial(eval_view, size=data.view.size)
        words = partial(word_heat, model, tokenizer, view=view, concepts=concepts, **encoded)
        return figures.grounding_figure(scores, source, queries=options.figures, heat=words)

    return _rows(
        evaluate_grounding,
        recipe,
        data,
        tokenizer,
        options,
        by="heat",
        draw=draw,
        concepts=concepts,
        **encoded,
    )


def captions(
    recipe: Training, data: Data, tokenizer: Tokenizer, options: CaptionTest, prompt: str
) -> Measure:
    """Captions."""
    return _rows(
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
