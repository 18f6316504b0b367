"""A benchmark of `vlp_eval` while training, and once on the test data with the selected model.

The same row of the table of benchmarks as `vlp-eval` takes, with the same options; its files go into the
folder of the evaluation.
"""

import functools
import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
from torch import nn
from vlp_core import models
from vlp_data import views
from vlp_data.text import Reading
from vlp_eval import benchmarks, take
from vlp_eval.benchmarks import Benchmark
from vlp_eval.benchmarks.options import BenchmarkOptions
from vlp_eval.inference import Execution
from vlp_eval.subject import Subject

from vlp_methods.engine.options import Training
from vlp_methods.sections.data import TestedData
from vlp_methods.sections.training import FineTuning

log = logging.getLogger(__name__)

During = Callable[[nn.Module, int, Path], Mapping[str, float]]
After = Callable[[Path, torch.device, Path], Mapping[str, float]]


class Evaluations(NamedTuple):
    """What a task is measured on.

    during, after: `Job.evaluate` and `Job.test`; None: nothing.
    open: Opens the data of both, so that what is missing is found before the first step.
    """

    during: During | None = None
    after: After | None = None
    open: Callable[[], None] = lambda: None


NONE = Evaluations()


class Assembled(Protocol):
    """What an evaluation needs of an `Assembly`."""

    @property
    def recipe(self) -> Any: ...

    @property
    def data(self) -> Any: ...

    @property
    def tokenizer(self) -> Any: ...

    @property
    def reading(self) -> Reading | None: ...


def fine_tuning(made: Assembled, name: str, options: BenchmarkOptions) -> Evaluations:
    """The benchmark `name` on the data that `select` names while training, and on `data.test` of the selected
    model. Its numbers have the split in front: val/accuracy, test/accuracy."""
    recipe: FineTuning = made.recipe
    taken = _Taken(made, name, options)
    watched = recipe.select

    def during(task: nn.Module, step: int, folder: Path) -> Mapping[str, float]:
        return _named(watched, taken(taken.subject(task.model), watched, folder))

    def after(export: Path, device: torch.device, folder: Path) -> Mapping[str, float]:
        loaded = models.load(export, ability=taken.row.ability)
        subject = Subject.of(loaded, taken.row, device=device, name=str(export))
        return _named("test", taken(subject, "test", folder))

    return Evaluations(
        during if taken.has(watched) else None,
        after if taken.has("test") else None,
        lambda: taken.open(watched, "test"),
    )


def pretraining(made: Assembled, name: str, options: BenchmarkOptions) -> Evaluations:
    """The benchmark `name` on `data.test` while training; its numbers have nothing in front."""
    taken = _Taken(made, name, options)
    if not taken.has("test"):
        return NONE
    return Evaluations(
        lambda task, step, folder: taken(taken.subject(task.model), "test", folder),
        open=lambda: taken.open("test"),
    )


class _Taken:
    """A benchmark on the data of a recipe, split by split; the data is opened once."""

    def __init__(self, made: Assembled, name: str, options: BenchmarkOptions) -> None:
        self.made = made
        self.row: Benchmark = benchmarks.find(name)
        self.options = options
        self._opened = functools.cache(self._open)

    def has(self, split: str) -> bool:
        data: TestedData = self.made.data
        return data.rows(split) is not None

    def open(self, *splits: str) -> None:
        for split in splits:
            if self.has(split):
                self._opened(split)

    def _open(self, split: str) -> Any:
        data: TestedData = self.made.data
        rows = data.rows(split)
        assert rows is not None
        return take.open_data(self.row, rows.open(), self.options, data.files(split))

    def subject(self, model: Any) -> Subject:
        """The model as it is trained."""
        data: TestedData = self.made.data
        prompt = getattr(data, "prompt", None)
        return Subject(
            model=model,
            view=views.evaluation(data.view),
            tokenizer=self.made.tokenizer,
            reading=self.made.reading,
            concepts=self.row.concepts(data.concepts),
            settings={} if prompt is None else {"prompt": prompt},
        )

    def __call__(self, subject: Subject, split: str, folder: Path) -> Mapping[str, float]:
        recipe: Training = self.made.recipe
        scores, files = take.measure(
            self.row,
            subject,
            self._opened(split),
            self.options,
            folder,
            execution=Execution(workers=recipe.workers),
        )
        if files:
            log.info("%s", scores.table())
            log.info("files: %s", ", ".join(map(str, files)))
        return self.row.numbers(scores)


def _named(split: str, numbers: Mapping[str, float]) -> dict[str, float]:
    return {f"{split}/{name}": value for name, value in numbers.items()}
