"""What the builder of a task calls: the sections of a recipe become data, tokenizer and model, and these with
a task become a job."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from torch import nn
from vlp_core import models
from vlp_core.optim import ParameterRule
from vlp_data.cleaning import Clean
from vlp_data.examples import Examples
from vlp_data.loader import Loader
from vlp_data.text import Reading

from vlp_methods.builders import evaluation
from vlp_methods.builders.data import ALWAYS, TRAIN, Streams, open_loader, settle
from vlp_methods.builders.export import exporter
from vlp_methods.builders.model import Made, derived_arguments, make
from vlp_methods.builders.teacher import TaughtTask
from vlp_methods.engine.job import Job, Mixing, Stream
from vlp_methods.engine.optimizers import make_optimizer
from vlp_methods.sections.data import SourceOptions
from vlp_methods.sections.training import StartedTraining

NOTHING_UNUSED: Mapping[str, Sequence[nn.Parameter]] = {}

_Recipe = TypeVar("_Recipe", bound=Any)
_Data = TypeVar("_Data", bound=Any)


@dataclass(frozen=True, kw_only=True)
class Assembly(Generic[_Recipe, _Data]):
    """What the sections of a recipe have become, before there is a task."""

    recipe: _Recipe
    data: _Data
    """Its data section, every path in full."""
    tokenizer: Any
    """A `vlp_data.text.Tokenizer`; None where the recipe has none."""
    reading: Reading | None
    """How texts become ids, beside the tokenizer; None without one."""
    made: Made
    """The model with its initial values; `job` starts it from the recipe's checkpoint."""

    @property
    def model(self) -> Any:
        """The model itself."""
        return self.made.model

    def open(
        self, kind: Callable[..., Examples[Any]], source: SourceOptions, name: str, batch: int
    ) -> Loader[Any]:
        """This rank's share of a source, read as examples of a `kind`; `batch` counts samples over all
        ranks."""
        examples = kind(
            source=source.open(),
            tokenizer=self.tokenizer,
            image=self.data.view,
            text=self.data.text,
            concepts=self.data.concepts,
        )
        return open_loader(self.recipe, self.data, name, examples, global_batch=batch)

    def stream(self, kind: Callable[..., Examples[Any]]) -> Streams:
        """`Job.streams` of a task that reads `data.train` as examples of a `kind`, and nothing else."""
        train = self.data.train
        return lambda: {TRAIN: self.open(kind, train.source, TRAIN, train.batch)}

    def job(
        self,
        task: nn.Module,
        streams: Streams,
        rules: Sequence[ParameterRule],
        *,
        mixing: Mixing = ALWAYS,
        unused: Mapping[str, Sequence[nn.Parameter]] = NOTHING_UNUSED,
        evaluations: evaluation.Evaluations = evaluation.NONE,
        prompt: str | None = None,
    ) -> Job:
        """Start model, teacher and queue from the recipe's checkpoint, and hand over what the engine needs.

        Args:
            task: Objective around the model.
            streams: Opens the data.
            rules: Of the optimizer's parameter groups.
            mixing: Of the streams.
            unused: Parameters that a stream has no part in, by stream.
            evaluations: While training, and at the end.
            prompt: Words that captions begin with, for the export.
        """
        taught = task if isinstance(task, TaughtTask) else None
        if checkpoint := self.recipe.model.weights.model:
            teacher = None if taught is None else taught.started_teacher()
            queue = None if taught is None else taught.queue
            models.start_from(
                self.model,
                checkpoint,
                family=self.made.family,
                stage=self.made.stage,
                teacher=teacher,
                queue=queue,
            )
        momentum: Mapping[str, nn.Module] | None = None
        if taught is not None and taught.momentum is not None and taught.queue is not None:
            # A later stage goes on with both; a teacher alone ends with its task.
            momentum = {"teacher": taught.momentum.teacher, "queue": taught.queue}

        def opened() -> Mapping[str, Stream]:
            evaluations.open()
            return streams()

        return Job(
            task=task,
            streams=opened,
            mixing=mixing,
            optimizer=make_optimizer(self.model, self.recipe.optimizer, rules),
            unused=unused,
            evaluate=evaluations.during,
            export=exporter(
                self.made,
                self.data,
                tokenizer=self.tokenizer,
                reading=self.reading,
                momentum=momentum,
                prompt=prompt,
            ),
            test=evaluations.after,
        )


def assemble(
    recipe: _Recipe,
    family: str,
    stage: str,
    arguments: Callable[[Any], dict[str, Any]] | None = None,
    *,
    clean: Clean = "caption",
) -> Assembly[_Recipe, Any]:
    """Data, tokenizer and model of a recipe.

    Args:
        recipe: Recipe.
        family: Family of models (`vlp_core.models`).
        stage: Stage of the family.
        arguments: Arguments of the model from the tokenizer; None: a stage after pre-training, whose model is
            derived from that of pre-training.
        clean: Clean-up of the texts that the model reads, where `data.text.clean` leaves it open.
    """
    data = settle(recipe.data)
    tokenizer: Any = None if data.tokenizer is None else data.tokenizer.open()
    reading = None if data.tokenizer is None else Reading.of(data.text, clean=clean)
    if arguments is None:
        assert isinstance(recipe, StartedTraining)
        chosen = derived_arguments(family, stage, recipe.model, tokenizer)
    else:
        chosen = arguments(tokenizer)
    made = make(family, stage, chosen)
    return Assembly(recipe=recipe, data=data, tokenizer=tokenizer, reading=reading, made=made)
