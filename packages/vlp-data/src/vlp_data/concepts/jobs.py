"""Work in shards, kept part by part: a job that was stopped, or that lost a machine, goes on from the parts
that are finished.

A job is a folder (local or an fsspec URL that all machines reach):

  job.json                       what the job is; another job cannot go on in the same folder
  items-00000.parquet            what it works on, one row group per shard, unless other files hold that
  part-00007-of-00120.parquet    result of shard 7, complete under this name or absent

`engine="local"` does one shard after the other, each with all cores and one device. `engine="ray"` is Ray
Data with a pool of actors, each of which sets the work up once; Ray starts an actor again whose process died,
and repeats its shard. Both call the same functions, so the parts are the same.
"""

import hashlib
import json
import os
import posixpath
import re
import uuid
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple, Protocol

import pyarrow as pa

from vlp_data import files
from vlp_data.concepts.tables import count_row_groups, encoded, read_row_group, remove, write_bytes
from vlp_data.errors import DataError
from vlp_data.identity import checksum
from vlp_data.sources.rows import parse_json

PART = re.compile(r"part-(\d{5,})-of-(\d{5,})\.parquet")
ITEMS = "items-00000.parquet"


class Work(Protocol):
    """What a job does: plain data that can be sent to another process."""

    def identity(self) -> dict[str, Any]:
        """JSON that says what the parts depend on: work with another identity must not go on in the same
        folder."""
        ...

    def start(self) -> Callable[[pa.Table], pa.Table]:
        """Set up (load a model, say), once per process; returns what turns the items of a shard into its
        part."""
        ...


class Shard(NamedTuple):
    """Where the items of a shard are: a row group of a Parquet file."""

    file: str
    group: int


@dataclass(frozen=True, kw_only=True)
class Engine:
    """Where a job runs."""

    engine: Literal["local", "ray"] = "local"
    address: str = ""
    """Ray cluster to join ("auto", "ray://host:10001"); "" is the one this process belongs to, else a new one
    on this machine."""
    actors: int = 1
    """Ray: processes that hold a model each."""
    cpus_per_actor: float = 1
    gpus_per_actor: float = 0
    attempts: int = 4
    """Ray: how often a shard is begun before the job gives up, when every process that begins it dies."""

    def __post_init__(self) -> None:
        for name in ("actors", "attempts"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1")


@dataclass(frozen=True)
class Job:
    """A job's folder and the shards behind its parts."""

    folder: str
    shards: tuple[Shard, ...]
    identity: dict[str, Any] = field(default_factory=dict)

    def part(self, number: int) -> str:
        return posixpath.join(self.folder, f"part-{number:05d}-of-{len(self.shards):05d}.parquet")

    def unfinished(self) -> list[int]:
        present = set(_names(self.folder))
        return [n for n in range(len(self.shards)) if posixpath.basename(self.part(n)) not in present]


class Done(NamedTuple):
    """Shards of a job that this call did, and those it found finished."""

    computed: int
    found: int


def items_job(folder: str, work: Work, items: pa.Table, *, rows_per_shard: int) -> Job:
    """A job on the rows of a table, which are written into its folder. Raises DataError when the folder holds
    another job."""
    if rows_per_shard < 1:
        raise ValueError(f"rows_per_shard={rows_per_shard} must be at least 1")
    if not items.num_rows:
        raise DataError("there is nothing to do: the list of items is empty")
    items = items.combine_chunks()
    identity = {**work.identity(), "items": _digest(items), "rows_per_shard": rows_per_shard}
    shards = -(-items.num_rows // rows_per_shard)
    file = posixpath.join(folder, ITEMS)
    job = Job(folder, tuple(Shard(file, group) for group in range(shards)), identity)
    if _claim(job):
        write_bytes(file, encoded(items, row_group_size=rows_per_shard))
        _sign(job)
    return job


def _digest(items: pa.Table) -> str:
    # Not of the Parquet file, which names the version that wrote it.
    stream = pa.BufferOutputStream()
    with pa.ipc.new_stream(stream, items.schema) as writer:
        writer.write_table(items)
    return hashlib.sha256(stream.getvalue()).hexdigest()


def files_job(folder: str, work: Work, paths: Sequence[str]) -> Job:
    """A job on the row groups of Parquet files, which stay where they are. Raises DataError when the folder
    holds another job."""
    shards = []
    for path in paths:
        shards += [Shard(path, group) for group in range(count_row_groups(path))]
    items = [[posixpath.basename(path), checksum(path)] for path in paths]
    job = Job(folder, tuple(shards), {**work.identity(), "items": items})
    if _claim(job):
        _sign(job)
    return job


def _claim(job: Job) -> bool:
    """Whether the folder is new. Raises DataError when it holds something else."""
    present = _names(job.folder)
    if "job.json" in present:
        place = posixpath.join(job.folder, "job.json")
        try:
            there = parse_json(files.read(place))
        except ValueError as error:
            raise DataError(f"{place} is damaged: {error}; delete the folder and begin again") from error
        if not isinstance(there, dict):
            raise DataError(f"{place} is no description of a job; choose another folder")
        here = json.loads(json.dumps(job.identity))
        different = sorted(k for k in there.keys() | here.keys() if there.get(k) != here.get(k))
        if different:
            listed = "; ".join(
                f"{k}: {_short(there.get(k))} there, {_short(here.get(k))} now" for k in different
            )
            raise DataError(
                f"{job.folder} holds the parts of another job ({listed}); choose another folder, "
                "or delete this one"
            )
        return False
    if set(present) - {ITEMS}:
        raise DataError(f"{job.folder} holds files and no job.json; choose another folder")
    return True


def _sign(job: Job) -> None:
    # Written last: a folder with this file has all that a job needs to go on.
    write_bytes(posixpath.join(job.folder, "job.json"), (json.dumps(job.identity, indent=1) + "\n").encode())


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 40 else f"{text[:37]}..."


def _names(folder: str) -> list[str]:
    # Files that begin with a dot are unfinished ones of a process that died.
    return [name for name in _entries(folder) if not name.startswith(".")]


def _entries(folder: str) -> list[str]:
    if not files.is_url(folder):
        where = files.local(folder)
        if where.exists() and not where.is_dir():
            raise DataError(f"{folder} is a file; a job needs a folder")
        return [entry.name for entry in where.iterdir()] if where.is_dir() else []
    import fsspec.core

    filesystem, inner = fsspec.core.url_to_fs(folder)
    filesystem.invalidate_cache()
    found = filesystem.ls(inner, detail=False) if filesystem.isdir(inner) else []
    return [posixpath.basename(name) for name in found]


def finished_parts(folder: str) -> list[str]:
    """Paths of a job's parts, in order. Raises FileNotFoundError, or DataError when the job is not
    finished."""
    found = {
        (int(match[1]), int(match[2])): match[0] for name in _names(folder) if (match := PART.fullmatch(name))
    }
    if not found:
        raise FileNotFoundError(f"{folder} holds no parts of a job, and is no .parquet or .json file")
    totals = {total for _, total in found}
    if len(totals) != 1:
        raise DataError(f"{folder} holds parts of several jobs; delete it and run the job again")
    if len(found) < (total := totals.pop()):
        raise DataError(
            f"{folder}: {len(found)} of {total} parts are finished; run the job again, it goes on from there"
        )
    return [posixpath.join(folder, found[place]) for place in sorted(found)]


def run(job: Job, work: Work, engine: Engine, *, progress: Callable[[int, int], None] | None = None) -> Done:
    """Do the shards that are not finished. `progress` is told the number of finished ones and of all."""
    todo = job.unfinished()
    found = len(job.shards) - len(todo)
    if todo:
        steps = _run_local(job, work, todo) if engine.engine == "local" else _run_ray(job, work, todo, engine)
        for number, _ in enumerate(steps, 1):
            if progress is not None:
                progress(found + number, len(job.shards))
    if left := job.unfinished():
        raise DataError(
            f"{job.folder}: {len(left)} parts were not written; run the job again, it goes on from there"
        )
    return Done(len(todo), found)


class _Worker:
    """Does whole shards. A part is written before its shard counts as done."""

    def __init__(self, job: Job, work: Work) -> None:
        self.job, self.compute = job, work.start()

    def do(self, number: int) -> None:
        shard = self.job.shards[number]
        items = read_row_group(shard.file, shard.group)
        write_bytes(self.job.part(number), encoded(self.compute(items)))


def _run_local(job: Job, work: Work, todo: list[int]) -> Iterator[int]:
    worker = _Worker(job, work)
    for number in todo:
        worker.do(number)
        yield number


class _Actor:
    """A worker inside Ray. Errors of the user are returned as text, because Ray would wrap them beyond
    recognition.

    Ray begins a shard again without end when its process dies of it, so every beginning leaves a mark until
    the part is there.
    """

    def __init__(self, job: Job, work: Work, attempts: int, token: str, folder: str) -> None:
        self.job, self.attempts, self.token = job, attempts, token
        self.problem = ""
        # Without the folder, paths are absolute, or the message about the first missing one says enough.
        if Path(folder).is_dir():
            os.chdir(folder)
        try:
            self.worker = _Worker(job, work)
        except (ValueError, OSError) as error:
            self.problem = str(error)

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        return {"problem": [self.problem or self._do(int(number)) for number in batch["shard"]]}

    def _do(self, number: int) -> str:
        mark = f".begun-{number:05d}-{self.token}-"
        begun = [name for name in _entries(self.job.folder) if name.startswith(mark)]
        if len(begun) == self.attempts:
            return (
                f"shard {number} was begun {self.attempts} times and its process died each time "
                "(of memory?); what is finished is kept"
            )
        begun.append(f"{mark}{len(begun)}")
        write_bytes(posixpath.join(self.job.folder, begun[-1]), b"")
        try:
            self.worker.do(number)
        except (ValueError, OSError) as error:
            return str(error) or type(error).__name__
        finally:
            for name in begun:
                remove(posixpath.join(self.job.folder, name))
        return ""


def _run_ray(job: Job, work: Work, todo: list[int], engine: Engine) -> Iterator[int]:
    try:
        import ray
        import ray.data
    except ImportError as error:
        raise DataError(
            f"engine=ray needs Ray Data, which is not installed ({error}); `pip install 'vlp-data[ray]'`"
        ) from error
    if not ray.is_initialized():
        ray.init(address=engine.address or None, log_to_driver=False)
    elif engine.address:
        raise DataError(f"address={engine.address}: this process is connected to a Ray cluster already")
    # One block per shard, so that shards go to whichever actor is free. Ray Data restarts actors and repeats
    # their calls by default.
    shards = ray.data.from_items([{"shard": number} for number in todo], override_num_blocks=len(todo))
    finished = shards.map_batches(
        _Actor,
        fn_constructor_kwargs={
            "job": job,
            "work": work,
            "attempts": engine.attempts,
            "token": uuid.uuid4().hex,
            "folder": str(Path.cwd()),
        },
        batch_size=1,
        compute=ray.data.ActorPoolStrategy(size=min(engine.actors, len(todo))),
        num_cpus=engine.cpus_per_actor,
        num_gpus=engine.gpus_per_actor,
    )
    for number, row in enumerate(finished.iter_rows()):
        if row["problem"]:
            raise DataError(row["problem"])
        yield number
