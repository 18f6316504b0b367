"""Batches for one rank, endless, with a position that says where to go on.

What a batch holds depends on (seed, position, rank, number of ranks) alone: not on the number of workers, on
prefetching, or on how often a run was interrupted. The sample at (epoch, index) draws from a generator seeded
by (seed, epoch, index).

Unusable samples (broken image, empty line, box outside the image, missing file, ...) are counted, logged once
per cause with the file's name, and replaced by a sample drawn from (seed, epoch, index, attempt). The loader
stops with `DataError` when more than `max_bad_fraction` of the samples read so far were unusable, judged from
the eleventh unusable one on: so one bad sample early in a run never stops it, and a wrong image root stops it
within the first batches. `max_bad_fraction=0` stops at the first. Each rank judges what it has read itself.

Workers pay no heed to SIGTERM and SIGINT, which a scheduler or a terminal sends to all processes of a job:
they end when the loader closes, or when the process that began them ends. A worker that dies (killed for want
of memory, say) is replaced: new workers make the same batches.
"""

import atexit
import logging
import multiprocessing
import random
import signal
import time
import weakref
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from typing import Any, Generic, NamedTuple, Self, TypeVar

import torch
from torch.utils.data import DataLoader, Dataset

from vlp_data.errors import BadSample, DataError, Skipped, WorkerLost
from vlp_data.examples import Examples
from vlp_data.identity import differences, identity
from vlp_data.order import Order, generator

log = logging.getLogger(__name__)

_Batch = TypeVar("_Batch")
_Example = TypeVar("_Example")

TOLERATED_BAD_SAMPLES = 10
"""Unusable samples before their share is judged."""
ATTEMPTS = 50
"""Samples tried for one place in a batch."""
RESTARTS = 3
"""How often workers are replaced at one position before the loader gives up."""
POLL_SECONDS = 2.0
"""How often it is looked whether all workers live while a batch is waited for."""
LEFT_OUT = "left out: "
"""Begins the causes of what was left out of samples that are used otherwise."""


class _Request(NamedTuple):
    """What to put into one batch: its first position and (epoch, index) of its samples."""

    position: int
    places: list[tuple[int, int]]


class _Answer(NamedTuple):
    """A batch and what was passed over for it; no batch when a place could not be filled."""

    batch: Any
    skipped: list[Skipped]
    left_out: Sequence[Skipped] = ()
    """Parts of the samples of the batch that cannot be used, such as boxes."""


@dataclass(frozen=True)
class _Batches(Dataset):
    """Makes whole batches in a worker."""

    examples: Examples
    seed: int

    def __getitem__(self, request: _Request) -> _Answer:
        skipped: list[Skipped] = []
        made = []
        for epoch, index in request.places:
            example = self._one(epoch, index, skipped)
            if example is None:
                return _Answer(None, skipped)
            made.append(example)
        rng = generator(self.seed, "batch", request.position)
        try:
            left_out = [one for example in made for one in getattr(example, "unusable", ())]
            return _Answer(self.examples.collate(made, rng), skipped, left_out)
        except Exception as error:
            keys = ", ".join(str(getattr(example, "key", "?")) for example in made)
            error.add_note(f"while making the batch at position {request.position} from {keys}")
            raise

    def _one(self, epoch: int, index: int, skipped: list[Skipped]) -> Any:
        """The example of a place or of its first usable replacement; None after too many attempts."""
        length = len(self.examples)
        for turn in range(ATTEMPTS):
            rng = generator(self.seed, epoch, index, *([turn] if turn else []))
            place = rng.randrange(length) if turn else index
            try:
                made = attempt(self.examples, place, rng)
            except Exception as error:
                # A fault of the program or of the machine, not of the data: say where, and stop.
                key = _key(self.examples, place) or "(its key cannot be read)"
                error.add_note(f"while reading sample {place} (epoch {epoch}): {key}")
                raise
            if not isinstance(made, Skipped):
                return made
            skipped.append(made)
        return None


def attempt(examples: Examples[_Example], index: int, rng: random.Random) -> _Example | Skipped:
    """The example of a row, or why the row cannot be used. A fault without a file is named by the row's
    key."""
    try:
        return examples.example(index, rng)
    except BadSample as error:
        file = error.file or _key(examples, index) or f"sample {index}"
        return Skipped(error.cause, file, error.detail)


def _key(examples: Examples, index: int) -> str:
    """What the source calls a sample; "" where there is no source, or it cannot say."""
    try:
        return str(examples.source[index].key)  # type: ignore[attr-defined]  # examples need no source
    except Exception:
        return ""


class Loader(Generic[_Batch]):
    """An endless iterator over the batches of one rank; use it as a context manager, or `close()` it, to end
    its workers.

    `global_batch` counts samples over all ranks (for region batches: lines). `position` counts samples
    consumed by all ranks; it moves when a batch is handed out, so a checkpoint written after the step holds
    where to go on.
    """

    def __init__(
        self,
        examples: Examples,
        *,
        global_batch: int,
        seed: int,
        rank: int = 0,
        world: int = 1,
        workers: int = 0,
        position: int = 0,
        max_bad_fraction: float = 0.01,
        prefetch: int = 2,
        timeout_seconds: float = 900.0,
        pin_memory: bool = False,
        start_method: str | None = None,
    ) -> None:
        """Starts nothing; workers begin with the first batch.

        `timeout_seconds`: stop when workers deliver nothing for this long (0: wait for ever). `start_method`:
        how workers are started, None for Python's default. Raises ValueError for an impossible split and for
        an empty source.
        """
        self._iterator: Iterator[_Answer] | None = None
        self._processes: list[BaseProcess] = []
        self._lost = 0
        if global_batch <= 0 or global_batch % world:
            raise ValueError(
                f"the global batch {global_batch} must be a positive multiple of the {world} ranks"
            )
        if not 0 <= rank < world:
            raise ValueError(f"rank {rank} is not one of {world}")
        if not 0 <= max_bad_fraction <= 1:
            raise ValueError(f"max_bad_fraction={max_bad_fraction} must lie in 0..1")
        # Examples need no source, and a source has runs only where it is read file after file.
        runs = getattr(getattr(examples, "source", None), "runs", None)
        self.examples, self.order = examples, Order(len(examples), seed, runs=runs)
        self.global_batch, self.rank, self.world = global_batch, rank, world
        self.max_bad_fraction = max_bad_fraction
        self.position = position
        self.counts: Counter[str] = Counter()
        """Per cause, how many samples could not be used; with `LEFT_OUT` before the cause, how many parts of
        samples; `padded_pairs` of region batches."""
        self.read = 0
        """Samples read by this rank, unusable ones included."""
        self._bad_files: dict[str, list[str]] = {}
        self._logged: set[str] = set()
        self._identity = identity(getattr(examples, "source", None))
        self._timeout = timeout_seconds
        self._arguments: dict[str, Any] = {"num_workers": workers, "pin_memory": pin_memory}
        if workers:
            self._arguments |= {
                "prefetch_factor": prefetch,
                "timeout": min(POLL_SECONDS, timeout_seconds or POLL_SECONDS),
                "worker_init_fn": prepare_worker,
                "multiprocessing_context": multiprocessing.get_context(start_method),
            }

    @property
    def length(self) -> int:
        """Samples of one pass over the data, over all ranks."""
        return self.order.length

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> _Batch:
        try:
            batch, skipped, left_out = self._fetch()
        except BaseException:
            self.close()
            raise
        self._account(batch, skipped)
        self._note(left_out)
        if batch is None:
            self.close()
            last = skipped[-1]
            raise DataError(
                f"{ATTEMPTS} samples in a row cannot be used; "
                f"the last one: {last.cause}: {last.file}: {last.detail}"
            )
        self.position += self.global_batch
        return batch

    def _fetch(self) -> _Answer:
        """The answer of the next request; workers that died are replaced. Raises WorkerLost, and DataError
        when nothing comes."""
        begun = time.monotonic()
        while True:
            if self._iterator is None:
                self._iterator = self._start()
            try:
                answer = next(self._iterator)
            except RuntimeError as error:
                if self._replaced(error):
                    continue
                if "DataLoader timed out" not in str(error) or error.__cause__ is not None:
                    error.add_note(f"while fetching the batch at position {self.position}")
                    raise
                if self._timeout and time.monotonic() - begun >= self._timeout:
                    raise DataError(
                        f"no batch within {self._timeout:g} s at position {self.position}: "
                        "storage hangs, or the workers starve"
                    ) from error
            else:
                self._lost = 0
                return answer

    def _replaced(self, error: RuntimeError) -> bool:
        """Whether workers have died and new ones may be begun. Raises WorkerLost when that was tried often
        enough."""
        dead = [process for process in self._processes if not process.is_alive()]
        if not dead:
            return False
        how = ", ".join(sorted({_end_of(process.exitcode) for process in dead}))
        self._lost += 1
        self.close()
        if self._lost > RESTARTS:
            raise WorkerLost(
                f"workers of the loader died {self._lost} times at position {self.position} ({how}); "
                "take fewer workers, less prefetch or smaller batches"
            ) from error
        log.warning("a worker of the loader died (%s) and is replaced; the batches stay the same", how)
        return True

    def _start(self) -> Iterator[_Answer]:
        loader = DataLoader(
            _Batches(self.examples, self.order.seed),
            batch_size=None,
            sampler=_Requests(self.order, self.position, self.global_batch, self.rank, self.world),
            collate_fn=_as_it_is,
            generator=torch.Generator(),  # its own, because the global one belongs to the training step
            **self._arguments,
        )
        before = multiprocessing.active_children()
        # Blocked in the workers from their first moment on; here what came meanwhile is delivered afterwards.
        mask = signal.pthread_sigmask(signal.SIG_BLOCK, _UNHEEDED)
        try:
            iterator = iter(loader)
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        _watch_ourselves(iterator)
        self._processes = [child for child in multiprocessing.active_children() if child not in before]
        if self._processes:
            # Before multiprocessing itself ends its children at exit by a signal that they do not heed.
            atexit.register(_close, weakref.ref(self))
        return iterator

    def _account(self, batch: Any, skipped: list[Skipped]) -> None:
        self.read += len(skipped) + (0 if batch is None else self.global_batch // self.world)
        if padded := getattr(batch, "padded_pairs", 0):
            self.counts["padded_pairs"] += padded
        for cause, file, detail in skipped:
            files = self._bad_files.setdefault(cause, [])
            if not files:
                log.warning(
                    "skipped a sample: %s: %s: %s (more of this kind are counted, not logged)",
                    cause,
                    file,
                    detail,
                )
            if len(files) < 5 and file not in files:
                files.append(file)
            self.counts[cause] += 1
        if skipped and self._too_many():
            self.close()
            raise DataError(self._complaint())

    def _note(self, left_out: Sequence[Skipped]) -> None:
        for cause, file, detail in left_out:
            self.counts[LEFT_OUT + cause] += 1
            if cause not in self._logged:
                self._logged.add(cause)
                log.warning(
                    "left out of a sample: %s: %s: %s (more of this kind are counted, not logged)",
                    cause,
                    file,
                    detail,
                )

    @property
    def bad(self) -> int:
        """Samples of this rank that could not be used."""
        return sum(count for cause, count in self.counts.items() if cause in self._bad_files)

    def _too_many(self) -> bool:
        if self.max_bad_fraction == 0:
            return self.bad > 0
        return self.bad > TOLERATED_BAD_SAMPLES and self.bad > self.max_bad_fraction * self.read

    def _complaint(self) -> str:
        causes = "; ".join(
            f"{cause}: {self.counts[cause]} "
            f"({', '.join(files)}{', ...' if self.counts[cause] > len(files) else ''})"
            for cause, files in self._bad_files.items()
        )
        return (
            f"{self.bad} of {self.read} samples cannot be used, "
            f"more than max_bad_fraction={self.max_bad_fraction:g}: {causes}. "
            "Repair the data or raise the limit."
        )

    def describe(self) -> dict[str, Any]:
        """What this rank reads, for logs: of every `global_batch` samples in the order of all ranks, which
        ones."""
        own = self.global_batch // self.world
        return {
            "rank": f"{self.rank} of {self.world}",
            "samples": self.order.length,
            "order": _order_name(self.order),
            "reads": f"places {self.rank * own} to {(self.rank + 1) * own - 1} of every {self.global_batch}",
            "position": self.position,
        }

    def state_dict(self) -> dict[str, Any]:
        """Everything to go on from here, as JSON values."""
        return {
            "position": self.position,
            "seed": self.order.seed,
            "length": self.order.length,
            "order": _order_name(self.order),
            "data": self._identity,
            "read": self.read,
            "counts": dict(self.counts),
            "bad_files": {cause: list(files) for cause, files in self._bad_files.items()},
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where `state` was taken, perhaps on another number of ranks. Raises DataError when seed,
        length or kind of order differ, because the order would be another one, and when the annotation files
        hold something else by their checksums (states of earlier versions have none)."""
        for name, now in (
            ("seed", self.order.seed),
            ("length", self.order.length),
            ("order", _order_name(self.order)),
        ):
            if state[name] != now:
                raise DataError(
                    f"cannot go on in the data: {name} was {state[name]} when the state was saved "
                    f"and is {now} now"
                )
        if changed := differences(state.get("data", {}), self._identity):
            raise DataError(
                f"cannot go on in the data: {', '.join(changed)} changed since the state was saved; "
                "bring the old files back, or begin a new run"
            )
        self.close()
        self.position, self.read = state["position"], state["read"]
        self.counts = Counter(state["counts"])
        self._bad_files = {cause: list(files) for cause, files in state["bad_files"].items()}

    def close(self) -> None:
        """End the workers. The next batch starts new ones at the current position."""
        iterator, self._iterator = self._iterator, None
        if self._processes and iterator is not None:
            # Dropping the iterator would do, but the traceback of an error may hold it.
            iterator._shutdown_workers()  # type: ignore[attr-defined]  # torch offers no public way
        for process in self._processes:
            if process.is_alive():
                process.kill()
            process.join()
        self._processes = []

    def __del__(self) -> None:
        self.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


@dataclass(frozen=True)
class _Requests:
    """The batches of one rank from a position on, for ever."""

    order: Order
    position: int
    global_batch: int
    rank: int
    world: int

    def __iter__(self) -> Iterator[_Request]:
        own = self.global_batch // self.world
        position = self.position + self.rank * own
        while True:
            yield _Request(position, self.order.indices(position, own))
            position += self.global_batch


def _order_name(order: Order) -> str:
    if order.runs is None:
        return "shuffled"
    return f"{len(order.runs.lengths)} files one after the other, buffer {order.runs.buffer}"


def _close(loader: weakref.ref[Loader]) -> None:
    if (open_still := loader()) is not None:
        open_still.close()


def _as_it_is(answer: Any) -> Any:
    return answer


_UNHEEDED = (signal.SIGTERM, signal.SIGINT)


def prepare_worker(_: int) -> None:
    """`worker_init_fn` of a `DataLoader`: the worker pays no heed to SIGTERM, SIGINT and SIGUSR1, which mean
    the process that began it and saves; the loader ends its workers itself."""
    import cv2

    cv2.setNumThreads(0)  # OpenCV's thread pool does not survive a fork
    for number in (*_UNHEEDED, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)


def _watch_ourselves(iterator: Any) -> None:
    """Keep torch from raising the death of a worker anywhere in the process, in the middle of a step or of
    saving: it is noticed when the next batch is fetched."""
    if getattr(iterator, "_worker_pids_set", False):
        torch.utils.data._utils.signal_handling._remove_worker_pids(id(iterator))
        iterator._worker_pids_set = False


def _end_of(code: int | None) -> str:
    """How a process ended, in the words of a message."""
    if code is None or code >= 0:
        return f"exit code {code}"
    if -code == signal.SIGKILL:
        return "killed, mostly for want of memory"
    if -code == signal.SIGBUS:
        return "bus error, mostly because /dev/shm is full"
    return f"signal {signal.Signals(-code).name}"
