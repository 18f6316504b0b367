"""The training loop of every method. Read `train` top to bottom; the rest of the engine is what it calls.

Order of events, at each step boundary first: save, stop, evaluate; then the step itself, then its report. So
an evaluation that fails or is left costs nothing: the checkpoint before it is of the same step, and a run
that is started again evaluates first.
"""

import contextlib
import logging
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from vlp_core.distributed import barrier, broadcast_object
from vlp_core.momentum import WeightAverage

from vlp_methods.engine import checkpoint
from vlp_methods.engine.entry import UserError
from vlp_methods.engine.folder import RunFolder, evaluation_folder
from vlp_methods.engine.job import Job, Stream
from vlp_methods.engine.options import Length, Training, in_steps
from vlp_methods.engine.patience import Patience
from vlp_methods.engine.ranks import Ranks
from vlp_methods.engine.report import Meter, Reporter
from vlp_methods.engine.step import Updater, Wire
from vlp_methods.engine.stop import StopSignals

log = logging.getLogger(__name__)


class TrainState:
    """Everything outside the task and its optimizer that must survive a restart. Randomness needs none: it
    follows from the step."""

    def __init__(self, recipe: Training, streams: Mapping[str, Stream], updater: Updater) -> None:
        self.step = 0  # finished steps
        self.evaluated = 0  # step of the last evaluation
        self.saved = 0  # step of the newest checkpoint
        self.meter = Meter()
        self.patience = Patience(recipe.evaluate)
        self.streams = streams
        self.scaler = updater.scaler
        self.average: WeightAverage = updater.average

    def after_evaluation(self) -> dict[str, Any]:
        """The part that an evaluation changes."""
        return {"evaluated": self.evaluated, "patience": self.patience.state_dict()}

    def state_dict(self) -> dict[str, Any]:
        return {
            **self.after_evaluation(),
            "meter": self.meter.state_dict(),
            "streams": {name: stream.state_dict() for name, stream in self.streams.items()},
            "loss_scale": self.scaler.state_dict(),
            "averaged": self.average.updates,
        }

    def load(self, path: Path, job: Job) -> None:
        """Restore everything from a checkpoint, the task and its optimizer included. Entries that checkpoints
        of earlier versions lack start anew."""
        state = checkpoint.load(path, job.task, job.optimizer, frozen_from=job.frozen_from)
        state |= checkpoint.read_after(path)
        self.step = self.saved = state["step"]
        self.evaluated = state["evaluated"]
        self.meter.load_state_dict(state["meter"])
        for name, stream in self.streams.items():
            stream.load_state_dict(state["streams"][name])
        if self.scaler.is_enabled() and state["loss_scale"]:
            self.scaler.load_state_dict(state["loss_scale"])
        if "patience" in state:
            self.patience.load_state_dict(state["patience"])
        self.average.load(checkpoint.load_average(path), state.get("averaged", 0))

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

    Raises `NotFiniteError` on every rank, before anything of a failed step is saved, and `StopNow` when an
    evaluation was left because of a stop request.
    """
    wire = Wire(ranks, recipe.precision)
    feeds: dict[str, Iterator[Any]] = {name: iter(stream) for name, stream in state.streams.items()}
    steps, stopping = in_steps(recipe.steps), False
    job.training_mode()
    reporter.start(state.step, sum(state.samples().values()))

    def due(every: int | Length | None) -> bool:
        return state.step > 0 and (
            state.step == steps or (every is not None and state.step % in_steps(every) == 0)
        )

    while True:
        evaluating = due(recipe.evaluate.every) and state.evaluated != state.step
        saving = due(recipe.save.every) or evaluating or (stopping and state.step > 0)
        if saving and state.saved != state.step:
            save(recipe, job, state, reporter, keeper)
        if stopping:
            return "stopped"
        if evaluating:
            evaluate(recipe, job, state, reporter, run, keeper, ranks, stop)
        if state.patience.exhausted or state.step >= steps:
            return "done"

        updater.set_rates(state.step)
        for stream in job.mixing.names(recipe.seed, state.step):
            numbers = updater(stream, feeds[stream], state.step)
            wire.send(state.step + 1, numbers, stop.requested)
        state.step += 1

        boundary = due(recipe.report.every) or due(recipe.evaluate.every) or due(recipe.save.every)
        stopping = listen(wire, state, upto=state.step - (0 if boundary else wire.lag))
        if stopping:
            listen(wire, state, upto=state.step)  # the newest step, too, must be checked before it is saved
        if due(recipe.report.every):
            reporter.losses(state.step, state.meter.take(), updater.lr, state.samples())


def listen(wire: Wire, state: TrainState, *, upto: int) -> bool:
    """Check and count the numbers of steps up to `upto`; returns whether a rank has been asked to stop."""
    stop = False
    for packet in wire.receive(upto):
        prefix = f"{packet.stream}/" if len(state.streams) > 1 else ""
        state.meter.add({prefix + name: value for name, value in packet.values.items()})
        stop |= packet.stop
    return stop


def evaluate(
    recipe: Training,
    job: Job,
    state: TrainState,
    reporter: Reporter,
    run: Path,
    keeper: RunFolder | None,
    ranks: Ranks,
    stop: StopSignals,
) -> None:
    """Evaluate on all ranks; rank 0 records, exports the model if it is the best so far, and notes in the
    checkpoint of this step that it has been evaluated.

    Whatever goes wrong passes through, with a note that says what is kept. Raises `StopNow` when a stop
    request came first.
    """
    if job.evaluate is None:
        state.evaluated = state.step
        return
    paused = reporter.pause()
    folder = evaluation_folder(run, state.step)
    if keeper:
        folder.mkdir(parents=True, exist_ok=True)
    job.task.eval()
    best = recipe.evaluate.best
    with kept(f"The evaluation at step {state.step} failed", run, state.step), state.average.applied():
        with torch.no_grad(), stop.at_once(ranks.board(), f"evaluation-{state.step}"):
            scores: dict[str, float] = broadcast_object(dict(job.evaluate(job.task, state.step, folder)))
        if best is not None and best not in scores:
            raise UserError(
                f"evaluate.best={best} is not a number of the evaluation; known: {', '.join(scores)}"
            )
        if keeper:
            keeper.write_scores(folder, scores)
            reporter.evaluation(state.step, scores)
            if best is not None and keeper.is_best(best, scores[best], recipe.evaluate.better):
                keeper.export(partial(checkpoint.write_export, job), "export-best")
                keeper.write_best(best, scores[best], state.step)
    job.training_mode()
    state.evaluated = state.step
    state.patience.see(scores)
    if keeper:
        checkpoint.write_after(checkpoint.place(keeper.checkpoints, state.step), state.after_evaluation())
    reporter.skip(paused)


@contextlib.contextmanager
def kept(what: str, run: Path, step: int) -> Iterator[None]:
    """Add to an error what is left of the run."""
    try:
        yield
    except Exception as error:
        path = checkpoint.place(run / "checkpoints", step)
        error.add_note(f"{what}; {path} was written before. The same command repeats it, and goes on.")
        raise


def save(recipe: Training, job: Job, state: TrainState, reporter: Reporter, keeper: RunFolder | None) -> None:
    """Write a checkpoint on rank 0; the others wait, so that a run that ends right after it has it."""
    paused = reporter.pause()
    if keeper:
        checkpoint.save(
            keeper.checkpoints,
            state.step,
            job.task,
            job.optimizer,
            state.state_dict(),
            frozen_from=job.frozen_from,
            average=state.average.tensors,
        )
        every = recipe.save.keep_every
        checkpoint.tidy(
            keeper.checkpoints, keep=recipe.save.keep, keep_every=None if every is None else in_steps(every)
        )
    state.saved = state.step
    barrier()
    reporter.skip(paused)
