"""From a checked recipe to a job that can train, and whose fault it is when that fails."""

import contextlib
from collections.abc import Iterator, Mapping

import torch
from vlp_core.recipe import RecipeError
from vlp_core.weights import CheckpointError
from vlp_data.errors import DataError

from vlp_methods.engine.entry import Recipe, UserError, attribute
from vlp_methods.engine.job import Job, Stream
from vlp_methods.engine.options import Training
from vlp_methods.engine.ranks import Ranks

USER_ERRORS = (
    UserError,
    RecipeError,
    DataError,
    CheckpointError,
    FileNotFoundError,
    NotADirectoryError,
    IsADirectoryError,
    PermissionError,
)
"""Faults of recipe, files and data: one message, exit code 2. Everything else is a crash and shows its
traceback."""


@contextlib.contextmanager
def building() -> Iterator[None]:
    """While a job is made from a recipe, `ValueError` is a fault of the recipe: `UserError` instead.

    Later it is a fault of the code, which must show where it is.
    """
    try:
        yield
    except USER_ERRORS:
        raise
    except ValueError as error:
        raise UserError(str(error)) from error


def build(recipe: Recipe, ranks: Ranks) -> Job:
    """The job of a recipe, on this rank's device."""
    torch.manual_seed(recipe.settings.seed)
    with building():
        job: Job = attribute(recipe.entry.build)(recipe.settings)
    settings: Training = recipe.settings
    if job.evaluate is None and (settings.evaluate.every is not None or settings.evaluate.best is not None):
        raise UserError("evaluate: this task has no evaluation; leave evaluate.every and evaluate.best null")
    if job.export is None and settings.evaluate.best is not None:
        raise UserError(
            "evaluate.best: this task exports nothing, so there is no best model to keep; leave it null"
        )
    job.task.to(ranks.device)
    return job


def open_streams(job: Job) -> Mapping[str, Stream]:
    """The data of a job."""
    with building():
        streams = job.streams()
    assert set(streams) == {name for name, _ in job.mixing.streams}, "streams are those of the mixing"
    return streams
