"""Take a benchmark: the same steps for `vlp-eval` and for evaluation during training."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from vlp_core import distributed
from vlp_data.schema import Source

from vlp_eval.benchmarks import Benchmark
from vlp_eval.benchmarks.options import BenchmarkOptions
from vlp_eval.inference import EXECUTION, Execution
from vlp_eval.report import Scores
from vlp_eval.subject import Subject


class Taken(NamedTuple):
    """The scores of a benchmark, and the files that rank 0 wrote: the report, the predictions if there are
    any, and the figure if one was wanted. No files on other ranks."""

    scores: Scores
    files: tuple[Path, ...]


def open_data(
    benchmark: Benchmark, source: Source, options: BenchmarkOptions, files: Any | None = None
) -> Any:
    """What a benchmark is taken on.

    Args:
        benchmark: The benchmark.
        source: Rows that hold what it needs.
        options: How it is taken (`benchmark.part("options")`).
        files: What belongs to the rows (`benchmark.part("files")`); None: no such file.

    Raises:
        ValueError: Options that do not fit the files; FileNotFoundError, DataError: files that cannot be
            read.
    """
    kind, make = benchmark.part("files"), benchmark.part("open")
    if files is None and kind is not None:
        files = kind()
    return source if make is None else make(source, files, options)


def measure(
    benchmark: Benchmark,
    subject: Subject,
    data: Any,
    options: BenchmarkOptions,
    folder: Path,
    *,
    execution: Execution = EXECUTION,
    settings: Mapping[str, Any] | None = None,
) -> Taken:
    """Evaluate, and write the report BENCHMARK.json, the predictions and the figure BENCHMARK.png.

    Called on every rank; the ranks share the work and rank 0 writes.

    Args:
        benchmark: The benchmark.
        subject: What is evaluated.
        data: Made by `open_data`.
        options: How the benchmark is taken.
        folder: Where the files go; it exists.
        execution: How the evaluation runs.
        settings: What the report says beside the evaluation's own settings, ahead of them.

    Raises:
        ValueError, DataError: As the benchmark's evaluate function.
    """
    scores = benchmark.part("evaluate")(subject, data, options, execution)
    if settings is not None:
        scores = replace(scores, settings={**settings, **scores.settings})
    if not distributed.is_main():
        return Taken(scores, ())
    report = folder / f"{benchmark.name}.json"
    report.write_text(scores.json(), encoding="utf-8")
    files = [report]
    if (write := benchmark.part("predictions")) is not None:
        files.append(write(scores, folder))
    if options.figures:
        files.append(folder / f"{benchmark.name}.png")
        benchmark.part("figure")(scores, data, options, subject).save(files[-1])
    return Taken(scores, tuple(files))
