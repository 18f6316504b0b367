"""The training loop of every method. Read `train` top to bottom; the rest of the engine is what it calls.

Order of events, at each step boundary first: evaluate, save, stop; then the step itself, then its report. So
a checkpoint of step n holds everything that happened up to n, and a run that is started again does what was
still due at n before it goes on.
"""

import logging
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from vlp_core.distributed import barrier, broadcast_object

from vlp_methods.engine import checkpoint
from vlp_methods.engine.entry import UserError
from vlp_methods.engine.folder import RunFolder, evaluation_folder
from vlp_methods.engine.job import Job, Stream
from vlp_methods.engine.options import Training
from vlp_methods.engine.ranks import Ranks
from vlp_methods.engine.report import Meter, Reporter
from vlp_methods.engine.step import Updater, Wire
from vlp_methods.engine.stop import StopSignals

log = logging.getLogger(__name__)


class TrainState:
    """Everything outside the task and its optimizer that must survive a restart. Randomness needs none: it
    follows from the step."""

    def __init__(self, streams: Mapping[str, Stream], updater: Updater) -> None:
        self.step = 0  # finished steps
        self.evaluated = 0  # step of the last evaluation
        self.saved = 0  # step of the newest checkpoint
        self.meter = Meter()
        self.streams = streams
        self.scaler = updater.scaler

    def state_dict(self) -> dict[str, Any]:
        return {
            "evaluated": self.evaluated,
            "meter": self.meter.state_dict(),
            "streams": {name: stream.state_dict() for name, stream in self.streams.items()},
            "loss_scale": self.scaler.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.step = self.saved = state["step"]
        self.evaluated = state["evaluated"]
        self.meter.load_state_dict(state["meter"])
        for name, stream in self.streams.items():
            stream.load_state_dict(state["streams"][name])
        if self.scaler.is_enabled() and state["loss_scale"]:
            self.scaler.load_state_dict(state["loss_scale"])

    def samples(self) -> dict[str, int]:
        return {name: stream.position for name, stream in self.streams.items()}


def train(
    recipe: Training,
    job: Job,
    state: TrainState,
    updater: Updater,
    reporter: Reporter,
    run: Path,
    keeper: RunFolder | None,
    ranks: Ranks,
    stop: StopSignals,
) -> Literal["done", "stopped"]:
    """Run the steps that are left. `keeper` writes the folder `run` and is given on rank 0 only.

    Raises `NotFiniteError` on every rank, before anything of a failed step is saved.
    """
    wire = Wire(ranks, recipe.precision)
    feeds: dict[str, Iterator[Any]] = {name: iter(stream) for name, stream in state.streams.items()}
    stopping = False
    job.task.train()
    reporter.start(state.step, sum(state.samples().values()))

    def due(every: int | None) -> bool:
        return state.step > 0 and (
            state.step == recipe.steps or (every is not None and state.step % every == 0)
        )

    while True:
        if due(recipe.evaluate.every) and state.evaluated != state.step and not stopping:
            evaluate(recipe, job, state, reporter, run, keeper)
        if (due(recipe.save.every) or (stopping and state.step > 0)) and state.saved != state.step:
            save(recipe, job, state, reporter, keeper)
        if stopping:
            return "stopped"
        if state.step >= recipe.steps:
            return "done"

        factor = job.learning_rate(state.step)
        updater.set_rates(factor)
        for stream in job.mixing.names(recipe.seed, state.step):
            numbers = updater(stream, feeds[stream], state.step)
            wire.send(state.step + 1, numbers, stop.requested)
        state.step += 1

        boundary = due(recipe.report.every) or due(recipe.evaluate.every) or due(recipe.save.every)
        stopping = listen(wire, state, upto=state.step - (0 if boundary else wire.lag))
        if stopping:
            listen(wire, state, upto=state.step)  # the newest step, too, must be checked before it is saved
        if due(recipe.report.every):
            lr = updater.peaks[0] * factor
            reporter.losses(state.step, state.meter.take(), lr, state.samples())


def listen(wire: Wire, state: TrainState, *, upto: int) -> bool:
    """Check and count the numbers of steps up to `upto`; returns whether a rank has been asked to stop."""
    stop = False
    for packet in wire.receive(upto):
        prefix = f"{packet.stream}/" if len(state.streams) > 1 else ""
        state.meter.add({prefix + name: value for name, value in packet.values.items()})
        stop |= packet.stop
    return stop


def evaluate(
    recipe: Training, job: Job, state: TrainState, reporter: Reporter, run: Path, keeper: RunFolder | None
) -> None:
    """Evaluate on all ranks; rank 0 records, and exports the model if it is the best so far."""
    state.evaluated = state.step
    if job.evaluate is None:
        return
    paused = reporter.pause()
    folder = evaluation_folder(run, state.step)
    if keeper:
        folder.mkdir(parents=True, exist_ok=True)
    job.task.eval()
    with torch.no_grad():
        scores: dict[str, float] = broadcast_object(dict(job.evaluate(job.task, state.step, folder)))
    job.task.train()
    best = recipe.evaluate.best
    if best is not None and best not in scores:
        raise UserError(f"evaluate.best={best} is not a number of the evaluation; known: {', '.join(scores)}")
    if keeper:
        keeper.write_scores(folder, scores)
        reporter.evaluation(state.step, scores)
        if best is not None and keeper.is_best(best, scores[best], recipe.evaluate.better):
            assert job.export
            keeper.export(job.export, "export-best")
            keeper.write_best(best, scores[best], state.step)
    reporter.skip(paused)


def save(recipe: Training, job: Job, state: TrainState, reporter: Reporter, keeper: RunFolder | None) -> None:
    """Write a checkpoint on rank 0; the others wait, so that a run that ends right after it has it."""
    paused = reporter.pause()
    if keeper:
        checkpoint.save(keeper.checkpoints, state.step, job.task, job.optimizer, state.state_dict())
        checkpoint.tidy(keeper.checkpoints, keep=recipe.save.keep, keep_every=recipe.save.keep_every)
    state.saved = state.step
    barrier()
    reporter.skip(paused)
