"""From a checkpoint and the options of a benchmark to files: what `vlp-eval BENCHMARK` does."""

import os
import platform
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path

import torch
import torch.distributed as dist
from vlp_core import distributed, models, recipe

from vlp_eval import take
from vlp_eval.benchmarks import Benchmark
from vlp_eval.command import Options
from vlp_eval.inference import Execution
from vlp_eval.report import Scores
from vlp_eval.subject import Subject


def run(benchmark: Benchmark, checkpoint: str, given: Options) -> Scores:
    """Evaluate a checkpoint: print a table, and write `BENCHMARK.json`, the predictions and `BENCHMARK.png`
    into `given.command.out`.

    Started by torchrun, the ranks share the work and rank 0 prints and writes. Raises ValueError,
    FileNotFoundError, `DataError` or `CheckpointError` for what a user can put right.
    """
    start, command = time.monotonic(), given.command
    out = Path(command.out)
    out.mkdir(parents=True, exist_ok=True)  # now, not after an hour of work
    device = _device(command.device)
    with _ranks(device):
        data = take.open_data(benchmark, given.source.open(), given.options, given.files)
        subject = Subject.of(
            models.load(checkpoint, ability=benchmark.ability),
            benchmark,
            tokenizer=command.tokenizer,
            concepts=command.concepts,
            device=device,
            name=checkpoint,
        )
        execution = Execution(workers=command.workers, precision=command.precision, progress=_progress())
        settings = {
            "checkpoint": checkpoint,
            "options": recipe.dump(given.flat),
            "versions": _versions(),
        }
        scores, files = take.measure(
            benchmark, subject, data, given.options, out, execution=execution, settings=settings
        )
        if distributed.is_main():
            print(scores.table())
            *first, last = map(str, files)
            names = f"{', '.join(first)} and {last}" if first else last
            print(f"{names} written, {time.monotonic() - start:.1f} s on {device}")
        return scores


def _device(name: str) -> torch.device:
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ValueError(f"device={name}: {str(error).splitlines()[0]}") from None
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"device={name}: torch finds no CUDA device; use device=cpu")
    if device.type == "cuda" and device.index is None:
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    return device


@contextmanager
def _ranks(device: torch.device) -> Iterator[None]:
    """Join the ranks that torchrun started, and leave them again."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1 or dist.is_initialized():
        yield
        return
    if device.type == "cuda":
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    try:
        yield
        dist.barrier()
    finally:
        dist.destroy_process_group()


def _progress() -> Callable[[str, int, int], None] | None:
    """A line on the terminal that counts; nothing where no terminal is."""
    if not sys.stderr.isatty():
        return None
    shown = 0.0

    def say(what: str, done: int, total: int) -> None:
        nonlocal shown
        now = time.monotonic()
        if done == total:
            print("\r\033[K", end="", file=sys.stderr, flush=True)
        elif now - shown > 0.2:
            shown = now
            print(f"\r\033[K{what} {done}/{total}", end="", file=sys.stderr, flush=True)

    return say


def _versions() -> dict[str, str]:
    packages = ("vlp-eval", "vlp-core", "vlp-data", "torch")
    return {"python": platform.python_version(), **{name: version(name) for name in packages}}
