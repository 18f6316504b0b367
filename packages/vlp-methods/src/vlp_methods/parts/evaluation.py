"""A benchmark of `vlp_eval` on the validation data while training, and once on the test data with the selected model.

A benchmark here is a function `measure(model, source, folder) -> {name: number}` that writes its files into `folder` on rank 0; it is
called on every rank. The names get the split in front: val/accuracy, test/accuracy.
"""

import logging
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn
from vlp_core import distributed, models
from vlp_data.options import ImageTextSource
from vlp_data.text import Tokenizer, pre_caption
from vlp_data.transforms import eval_view
from vlp_eval.figures import retrieval_figure
from vlp_eval.gallery import Gallery
from vlp_eval.report import Scores
from vlp_eval.retrieval import evaluate_retrieval

from vlp_methods.engine.options import Training
from vlp_methods.parts.options import Data, RetrievalTest

log = logging.getLogger(__name__)

Measure = Callable[[nn.Module, Any, Path], Mapping[str, float]]


def while_training(
    measure: Measure, split: str, source: Any | None
) -> Callable[[nn.Module, int, Path], Mapping[str, float]] | None:
    """`Job.evaluate` on a split, for a task that holds its model as `model`; None without data."""
    if source is None:
        return None

    def evaluate(task: nn.Module, step: int, folder: Path) -> Mapping[str, float]:
        return _named(split, measure(task.model, source, folder))

    return evaluate


def of_export(
    measure: Measure, split: str, source: Any | None
) -> Callable[[Path, torch.device, Path], Mapping[str, float]] | None:
    """`Job.test` on a split: measures the model of an export folder; None without data."""
    if source is None:
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
        max_tokens=data.text.max_tokens,
        separator=data.text.separator,
        rerank=options.rerank,
        image_batch=options.image_batch,
        pair_batch=options.pair_batch,
        workers=recipe.workers,
    )
    record(scores, folder)
    if distributed.is_main() and options.figures:
        picture = folder / "retrieval.png"
        retrieval_figure(scores, gallery, queries=options.figures).save(picture)
        log.info("what was retrieved: %s", picture)
    return {
        f"{stage}/{name}": value
        for stage, numbers in scores.stages.items()
        for name, value in numbers.items()
        if name in RECALLS
    }
