"""What a run tells: metrics.jsonl, log.txt, a progress line, and the loggers that were asked for."""

import csv
import importlib.util
import json
import logging
import math
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol, TextIO

from vlp_methods.engine.entry import UserError
from vlp_methods.engine.options import ReportOptions

log = logging.getLogger("vlp_methods.engine")


class Meter:
    """Running means of named numbers since the last report; part of a checkpoint, so a resumed run reports
    the same means."""

    def __init__(self) -> None:
        self.sums: dict[str, tuple[float, int]] = {}

    def add(self, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            if math.isfinite(
                value
            ):  # the gradient norm of a skipped fp16 update is not: JSON has no infinity
                total, count = self.sums.get(name, (0.0, 0))
                self.sums[name] = (total + value, count + 1)

    def take(self) -> dict[str, float]:
        """The means; starts anew."""
        means = {name: total / count for name, (total, count) in self.sums.items()}
        self.sums = {}
        return means

    def state_dict(self) -> dict[str, Any]:
        return {name: [total, count] for name, (total, count) in self.sums.items()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.sums = {name: (total, count) for name, (total, count) in state.items()}


def duration(seconds: float) -> str:
    """3725 -> 1:02:05."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"


class Screen(logging.Handler):
    """Log lines and the progress line of a terminal: the progress line is rewritten in place, log lines go
    above it.

    Where the output is no terminal, every progress line is a line of its own.
    """

    def __init__(self, stream: TextIO) -> None:
        super().__init__(logging.INFO)
        self.stream = stream
        self.rewrite = stream.isatty()
        self.line = ""

    def emit(self, record: logging.LogRecord) -> None:
        if hasattr(record, "file_only"):  # said on stderr; log.txt has it with its traceback
            return
        text = self.format(record)
        if self.rewrite and hasattr(record, "progress"):
            self.line = text
            self._write(f"\r\x1b[K{text}")
        else:
            above = "\r\x1b[K" if self.line else ""
            self._write(f"{above}{text}\n{self.line}")

    def close(self) -> None:
        if self.line:
            self._write("\n")
            self.line = ""
        super().close()

    def _write(self, text: str) -> None:
        self.stream.write(text)
        self.stream.flush()


class Logger(Protocol):
    """Somewhere else that numbers go to."""

    def write(self, step: int, values: Mapping[str, float]) -> None: ...

    def close(self) -> None: ...


class _TensorBoard:
    def __init__(self, folder: Path, step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        # Events of steps after the checkpoint that is resumed belong to a run that did not happen.
        self.writer = SummaryWriter(str(folder / "tensorboard"), purge_step=step + 1)

    def write(self, step: int, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            self.writer.add_scalar(name, value, step)

    def close(self) -> None:
        self.writer.close()


class _Csv:
    def __init__(self, folder: Path, step: int) -> None:
        path = folder / "metrics.csv"
        # As for TensorBoard: rows after the checkpoint belong to a run that did not happen.
        lines = path.read_text(encoding="utf-8").splitlines(keepends=True)[1:] if path.is_file() else []
        kept = [line for line in lines if line.endswith("\n") and int(line.partition(",")[0]) <= step]
        self.file = path.open("w", encoding="utf-8", newline="")
        self.file.writelines(["step,name,value\n", *kept])
        self.writer = csv.writer(self.file, lineterminator="\n")

    def write(self, step: int, values: Mapping[str, float]) -> None:
        self.writer.writerows((step, name, repr(float(value))) for name, value in values.items())
        self.file.flush()

    def close(self) -> None:
        self.file.close()


class _Wandb:
    def __init__(self, options: ReportOptions, folder: Path, config: Mapping[str, Any]) -> None:
        import wandb  # pyright: ignore[reportMissingImports] (not of our pins)

        self.run = wandb.init(
            project=options.wandb,
            name=options.name or folder.name,
            id=folder.name,
            dir=folder,
            config=dict(config),
            resume="allow",
            notes=options.notes,
            tags=list(options.tags),
        )

    def write(self, step: int, values: Mapping[str, float]) -> None:
        self.run.log(dict(values), step=step)

    def close(self) -> None:
        self.run.finish()


class _Trackio:
    def __init__(self, options: ReportOptions, folder: Path, config: Mapping[str, Any]) -> None:
        import trackio  # pyright: ignore[reportMissingImports] (not of our pins)

        self.trackio = trackio
        trackio.init(
            project=options.trackio, name=options.name or folder.name, config=dict(config), resume="allow"
        )

    def write(self, step: int, values: Mapping[str, float]) -> None:
        self.trackio.log(dict(values), step=step)

    def close(self) -> None:
        self.trackio.finish()


def check_loggers(options: ReportOptions) -> None:
    """Raise `UserError` if a logger is asked for that is not installed."""
    for asked, key, library, source in (
        (options.tensorboard, "report.tensorboard=true", "tensorboard", "'vlp-methods[tensorboard]'"),
        (options.wandb is not None, f"report.wandb={options.wandb}", "wandb", "'vlp-methods[wandb]'"),
        (options.trackio is not None, f"report.trackio={options.trackio}", "trackio", "trackio"),
    ):
        if asked and importlib.util.find_spec(library) is None:
            raise UserError(f"{key} needs {library}, which is not installed: pip install {source}")


def open_loggers(options: ReportOptions, folder: Path, step: int, config: Mapping[str, Any]) -> list[Logger]:
    """The loggers that were asked for; `step` is where the run starts."""
    loggers: list[Logger] = []
    if options.csv:
        loggers.append(_Csv(folder, step))
    if options.tensorboard:
        loggers.append(_TensorBoard(folder, step))
    if options.wandb is not None:
        loggers.append(_Wandb(options, folder, config))
    if options.trackio is not None:
        loggers.append(_Trackio(options, folder, config))
    return loggers


class Reporter:
    """Writes reports on rank 0; on other ranks it does nothing.

    Rates count the time of training only: `skip` leaves out what lies between it and the last report
    (evaluation, saving).
    """

    def __init__(self, metrics: Path | None, loggers: list[Logger], steps: int) -> None:
        self.file = metrics.open("a", encoding="utf-8") if metrics else None
        self.loggers, self.steps = loggers, steps
        self.width = len(str(steps))
        self.since = time.perf_counter()
        self.seen: tuple[int, int] | None = None  # step and samples at the last report

    def start(self, step: int, samples: int) -> None:
        self.since = time.perf_counter()
        self.seen = (step, samples)

    def pause(self) -> float:
        return time.perf_counter()

    def skip(self, paused: float) -> None:
        """Leave the time since `paused` out of the rates."""
        self.since += time.perf_counter() - paused

    def losses(self, step: int, means: Mapping[str, float], lr: float, samples: Mapping[str, int]) -> None:
        assert self.seen
        total = sum(samples.values())
        seconds = max(time.perf_counter() - self.since, 1e-9)
        steps = step - self.seen[0]
        rate = (total - self.seen[1]) / seconds
        self.start(step, total)
        if self.file is None:
            return
        self._line(
            {
                "step": step,
                "losses": dict(means),
                "lr": lr,
                "samples": dict(samples),
                "samples_per_second": round(rate, 3),
                "seconds_per_step": round(seconds / steps, 6),
                "time": round(time.time(), 3),
            }
        )
        shown = "  ".join(f"{name} {value:.4g}" for name, value in means.items())
        left = duration((self.steps - step) * seconds / steps)
        text = (
            f"step {step:{self.width}}/{self.steps}  {shown}  lr {lr:.3g}  {rate:.4g} samples/s  ETA {left}"
        )
        log.info("%s", text, extra={"progress": True})
        self._send(step, {**means, "lr": lr, "samples_per_second": rate})

    def evaluation(self, step: int, scores: Mapping[str, float]) -> None:
        if self.file is None:
            return
        self._line({"step": step, "evaluation": dict(scores), "time": round(time.time(), 3)})
        log.info(
            "evaluation at step %d: %s",
            step,
            ", ".join(f"{name} {value:.4g}" for name, value in scores.items()),
        )
        self._send(step, {f"evaluation/{name}": value for name, value in scores.items()})

    def _line(self, values: Mapping[str, Any]) -> None:
        assert self.file
        self.file.write(json.dumps(values) + "\n")
        self.file.flush()

    def _send(self, step: int, values: Mapping[str, float]) -> None:
        for logger in self.loggers:
            logger.write(step, values)

    def close(self) -> None:
        if self.file:
            self.file.close()
        for logger in self.loggers:
            logger.close()


class Logging:
    """While open: log lines of all vlp packages and all warnings go to the screen and to log.txt."""

    def __init__(self, screen: Screen) -> None:
        self.root = logging.getLogger()
        self.screen = screen
        self.file: logging.FileHandler | None = None

    def __enter__(self) -> "Logging":
        self.level = self.root.level
        self.root.setLevel(logging.WARNING)
        for name in ("vlp_core", "vlp_data", "vlp_eval", "vlp_methods"):
            logging.getLogger(name).setLevel(logging.INFO)
        self.screen.setFormatter(logging.Formatter("%(message)s"))
        self.root.addHandler(self.screen)
        return self

    def to_file(self, path: Path) -> None:
        self.file = logging.FileHandler(path, encoding="utf-8")
        self.file.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
        self.root.addHandler(self.file)

    def __exit__(self, *_: object) -> None:
        for handler in (self.screen, self.file):
            if handler is not None:
                self.root.removeHandler(handler)
                handler.close()
        self.root.setLevel(self.level)


def stdout_screen() -> Screen:
    return Screen(sys.stdout)
