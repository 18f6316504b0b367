"""One process of a run, from a checked recipe to an exit code: connect, build, resume, train, export."""

import logging
import os
import shutil
import sys
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from vlp_core import recipe as recipes
from vlp_core.distributed import barrier, broadcast_object

from vlp_methods.engine import checkpoint, dry, replay
from vlp_methods.engine.build import USER_ERRORS, build, building, open_streams, settle
from vlp_methods.engine.entry import Recipe, UserError
from vlp_methods.engine.folder import RunFolder, final_folder
from vlp_methods.engine.job import Job
from vlp_methods.engine.launch import STOPPED
from vlp_methods.engine.loop import TrainState, kept, train
from vlp_methods.engine.options import Training, in_steps
from vlp_methods.engine.ranks import Ranks
from vlp_methods.engine.report import Logging, Reporter, Screen, open_loggers
from vlp_methods.engine.step import NotFiniteError, Updater, average_of
from vlp_methods.engine.stop import StopNow, StopSignals

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Options:
    """What the command line says beside the recipe."""

    run: Path
    fresh: bool = False
    debug: bool = False
    allow_change: tuple[str, ...] = ()
    dry: bool = False


def configure(recipe: Training, *, debug: bool) -> None:
    """Process-wide switches of torch."""
    torch.backends.cuda.matmul.allow_tf32 = recipe.tf32
    torch.backends.cudnn.allow_tf32 = recipe.tf32  # torch allows it in convolutions by default
    if recipe.deterministic or debug:
        os.environ.setdefault(
            "CUBLAS_WORKSPACE_CONFIG", ":4096:8"
        )  # cuBLAS is deterministic only with a fixed workspace
        torch.use_deterministic_algorithms(True)
    if debug:
        torch.autograd.set_detect_anomaly(True)


def on_main(ranks: Ranks, action: Callable[[], Any]) -> Any:
    """The result of `action` on rank 0, None elsewhere. If it fails there, the other ranks leave with the
    same exit code."""
    result, error = None, None
    if ranks.main:
        try:
            result = action()
        except Exception as failure:
            error = failure
    code = broadcast_object(None if error is None else 2 if isinstance(error, USER_ERRORS) else 1)
    if error is not None:
        raise error
    if code is not None:
        raise SystemExit(code)
    return result


def run(recipe: Recipe, options: Options, stop: StopSignals) -> int:
    """Train (or `dry` run) one recipe in this process; returns the exit code."""
    screen = Screen(sys.stdout)
    with Logging(screen) as logging_:
        try:
            with Ranks(recipe.settings.device) as ranks:
                configure(recipe.settings, debug=options.debug)
                if not ranks.main:
                    screen.setLevel(logging.WARNING)
                if options.dry:
                    dry.run(recipe, build(recipe, ranks), ranks)
                    return 0
                return _train(recipe, options, ranks, stop, logging_)
        except FloatingPointError as error:
            return _fail(error, 1, options, f"{error}{_way_out(options.run)}")
        except USER_ERRORS as error:
            return _fail(error, 2, options, "\n".join([str(error), *getattr(error, "__notes__", [])]))
        except KeyboardInterrupt:
            return _fail(None, 130, options, "interrupted")
        except Exception as error:
            return _fail(error, 1, options, traceback.format_exc())


def _fail(error: BaseException | None, code: int, options: Options, message: str) -> int:
    rank = os.environ.get("RANK", "0")
    if isinstance(error, NotFiniteError) and rank != "0":
        return code  # every rank has the same failure; rank 0 says it
    log.error("%s", message, exc_info=error, extra={"file_only": True})
    print(f"vlp-train: {f'rank {rank}: ' if rank != '0' else ''}{message}", file=sys.stderr)
    if options.debug and error is not None and code != 1:
        traceback.print_exception(error)
    return code


def _way_out(run: Path) -> str:
    last = checkpoint.newest(run / "checkpoints")
    kept = f"last good checkpoint: {last}" if last else "no checkpoint was written before"
    return (
        f"\n  {kept}\n  Nothing of this step was saved; the same command repeats it, and `vlp-train "
        f"replay {run}` says where values stop being finite. Lower optimizer.lr, set clip_norm, use "
        "precision=bf16 instead of fp16, or look at the samples; --debug names the operation."
    )


def _train(recipe: Recipe, options: Options, ranks: Ranks, stop: StopSignals, logging_: Logging) -> int:
    settings: Training = recipe.settings
    keeper: RunFolder | None = on_main(
        ranks, lambda: RunFolder(options.run, recipe, fresh=options.fresh, allow_change=options.allow_change)
    )
    try:
        if keeper:
            logging_.to_file(keeper.log)
        job = build(recipe, ranks)
        streams = open_streams(job)
        settings = settle(settings, job, streams)
        updater = Updater(job, settings, ranks)
        state = TrainState(settings, streams, updater)
        newest: Path | None = broadcast_object(checkpoint.newest(keeper.checkpoints) if keeper else None)
        if newest:
            with building():
                state.load(newest, job)
        if keeper:
            keeper.begin(
                step=state.step, evaluated=state.evaluated, ranks=ranks.world, device=str(ranks.device)
            )
            for key, before, after in keeper.changes:
                log.info("changed: %s: %r -> %r", key, before, after)
            trainable = sum(p.numel() for p in job.task.parameters() if p.requires_grad)
            log.info(
                "%s: %s steps, %s parameters, %d x %s, %s, in %s%s",
                recipe.name,
                settings.steps,
                f"{trainable:,}",
                ranks.world,
                ranks.device.type,
                settings.precision,
                options.run,
                f", resumed at step {state.step}" if newest else "",
            )
        loggers = (
            open_loggers(settings.report, options.run, state.step, recipes.dump(settings)) if keeper else []
        )
        reporter = Reporter(keeper.metrics if keeper else None, loggers, in_steps(settings.steps))
        try:
            outcome = train(settings, job, state, updater, reporter, options.run, keeper, ranks, stop)
            if keeper and state.patience.exhausted and outcome == "done":
                log.info("%s", gave_up(settings, state))
            if keeper and outcome == "done" and job.export:
                with state.average.applied():
                    log.info("done: %s", keeper.export(partial(checkpoint.write_export, job)))
            if outcome == "done":
                measure_selected(settings, job, state.step, reporter, options.run, keeper, ranks, stop)
        except StopNow:
            ranks.clean = False  # each rank has left the evaluation where it was
            outcome = "stopped"
        except NotFiniteError as error:
            replay.keep(options.run, error, ranks)
            raise
        finally:
            reporter.close()
        if keeper and outcome == "stopped":
            log.info("stopped by %s at step %d; the same command continues", stop.name, state.step)
        return STOPPED if outcome == "stopped" else 0
    finally:
        if keeper:
            keeper.close()


def gave_up(settings: Training, state: TrainState) -> str:
    """Why a run has stopped early."""
    options = settings.evaluate
    least = f" by {options.least_gain:g}" if options.least_gain else ""
    return (
        f"stopped early at step {state.step}: {options.best} has not improved{least} in "
        f"{state.patience.failed} evaluations (best {state.patience.best:.4g})"
    )


def measure_selected(
    settings: Training,
    job: Job,
    step: int,
    reporter: Reporter,
    run: Path,
    keeper: RunFolder | None,
    ranks: Ranks,
    stop: StopSignals,
) -> None:
    """Measure the selected model on the test data, unless a run of so many steps has done so already. All
    ranks take part."""
    folder = final_folder(run, step)
    if job.test is None or broadcast_object(folder.with_suffix(".json").is_file()):
        return
    if keeper:
        folder.mkdir(parents=True, exist_ok=True)
    barrier()  # rank 0 has exported
    chosen = run / ("export" if settings.evaluate.best is None else "export-best")
    with kept("The test of the selected model failed", run, step):
        with torch.no_grad(), stop.at_once(ranks.board(), "test"):
            scores: dict[str, float] = broadcast_object(dict(job.test(chosen, ranks.device, folder)))
        if keeper:
            keeper.write_scores(folder, scores)
            reporter.evaluation(step, scores)


def export(recipe: Recipe, run: Path, target: Path) -> Path:
    """Write the newest checkpoint of a run as a model folder, on the CPU. A folder other than RUN/export must
    not exist yet."""
    newest = checkpoint.newest(run / "checkpoints")
    if newest is None:
        raise UserError(f"{run} has no checkpoint yet")
    if target != run / "export" and target.exists():
        raise UserError(f"{target} exists already; delete it or choose another folder")
    try:
        with Ranks("cpu") as ranks:
            job = build(recipe, ranks)
            if job.export is None:
                raise UserError(f"task {recipe.settings.task} of {recipe.settings.method} exports nothing")
            state = checkpoint.load_task(newest, job.task, frozen_from=job.frozen_from)
            average = average_of(job.task, recipe.settings)
            average.load(checkpoint.load_average(newest), state.get("averaged", 0))
            new = target.with_name(f".{target.name}.new")
            shutil.rmtree(new, ignore_errors=True)
            new.mkdir(parents=True)
            with average.applied():
                checkpoint.write_export(job, new)
            checkpoint.replace_folder(new, target)
    except USER_ERRORS as error:
        raise UserError(str(error)) from error
    return target
