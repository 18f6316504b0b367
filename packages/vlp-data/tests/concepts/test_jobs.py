"""Jobs go on from their finished parts and lose nothing, also when a process dies in the middle."""

import json
import multiprocessing
import os
import signal
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from vlp_data.concepts import jobs
from vlp_data.concepts.extract import CountConcepts, counts_of
from vlp_data.concepts.jobs import Engine
from vlp_data.concepts.tables import read_table
from vlp_data.errors import DataError

WORDS = [f"word {number}" for number in range(23)]


@dataclass(frozen=True, kw_only=True)
class Upper:
    """Work of the tests: texts in capitals; a note of every shard; an end for the process at a chosen text,
    the first time."""

    notes: str
    stop_at: str = ""
    how: str = "error"
    version: int = 1

    def identity(self) -> dict[str, Any]:
        return {"work": "upper", "version": self.version}

    def start(self) -> Callable[[pa.Table], pa.Table]:
        def compute(items: pa.Table) -> pa.Table:
            texts = items["text"].to_pylist()
            with (Path(self.notes) / "shards.txt").open("a") as stream:
                stream.write(f"{texts[0]}\n")
            stopped = Path(self.notes) / "stopped"
            if self.stop_at in texts and self.how == "always error":
                raise ValueError(f"{self.stop_at} cannot be done")
            if self.stop_at in texts and self.how == "always kill":
                os.kill(os.getpid(), signal.SIGKILL)
            if self.stop_at in texts and not stopped.exists():
                stopped.touch()
                if self.how == "kill":
                    os.kill(os.getpid(), signal.SIGKILL)
                raise KeyboardInterrupt
            return pa.table({"text": [text.upper() for text in texts]})

        return compute


def begun(work: Upper) -> list[str]:
    return (Path(work.notes) / "shards.txt").read_text().splitlines()


def job_of(folder: Path, work: jobs.Work, rows: int = 4) -> jobs.Job:
    return jobs.items_job(str(folder), work, pa.table({"text": WORDS}), rows_per_shard=rows)


def test_job_that_was_interrupted_goes_on_from_its_finished_parts(tmp_path: Path) -> None:
    work = Upper(notes=str(tmp_path), stop_at="word 9")
    with pytest.raises(KeyboardInterrupt):
        jobs.run(job_of(tmp_path / "job", work), work, Engine())
    with pytest.raises(DataError, match="2 of 6 parts are finished; run the job again"):
        read_table(str(tmp_path / "job"))
    seen: list[tuple[int, int]] = []
    done = jobs.run(job_of(tmp_path / "job", work), work, Engine(), progress=lambda *now: seen.append(now))
    assert done == (4, 2)
    assert seen == [(3, 6), (4, 6), (5, 6), (6, 6)]
    assert begun(work) == ["word 0", "word 4", "word 8", "word 8", "word 12", "word 16", "word 20"]
    assert read_table(str(tmp_path / "job"))["text"].to_pylist() == [word.upper() for word in WORDS]
    assert jobs.run(job_of(tmp_path / "job", work), work, Engine()) == (0, 6)


def test_job_whose_process_was_killed_goes_on_from_its_finished_parts(tmp_path: Path) -> None:
    work = Upper(notes=str(tmp_path), stop_at="word 9", how="kill")
    job = job_of(tmp_path / "job", work)
    process = multiprocessing.get_context("spawn").Process(target=jobs.run, args=(job, work, Engine()))
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    assert jobs.run(job_of(tmp_path / "job", work), work, Engine()) == (4, 2)
    assert read_table(str(tmp_path / "job"))["text"].to_pylist() == [word.upper() for word in WORDS]


def test_part_that_was_being_written_when_the_process_died_is_done_again(tmp_path: Path) -> None:
    work = Upper(notes=str(tmp_path))
    job = job_of(tmp_path / "job", work)
    jobs.run(job, work, Engine())
    part = Path(job.part(2))
    part.rename(part.with_name(f".{part.name}.123"))
    assert job.unfinished() == [2]
    assert jobs.run(job, work, Engine()) == (1, 5)


def test_folder_of_another_job_is_refused_and_says_why(tmp_path: Path) -> None:
    work = Upper(notes=str(tmp_path))
    job_of(tmp_path / "job", work)
    with pytest.raises(DataError, match=r"parts of another job \(version: 1 there, 2 now\)"):
        job_of(tmp_path / "job", Upper(notes=str(tmp_path), version=2))
    with pytest.raises(DataError, match="rows_per_shard: 4 there, 5 now"):
        job_of(tmp_path / "job", work, rows=5)
    with pytest.raises(DataError, match="items: "):
        jobs.items_job(str(tmp_path / "job"), work, pa.table({"text": WORDS[1:]}), rows_per_shard=4)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").touch()
    with pytest.raises(DataError, match=r"holds files and no job\.json"):
        job_of(tmp_path / "mine", work)
    (tmp_path / "file").touch()
    with pytest.raises(DataError, match="is a file"):
        job_of(tmp_path / "file", work)


def test_job_that_died_before_it_was_signed_begins_anew(tmp_path: Path) -> None:
    work = Upper(notes=str(tmp_path))
    job_of(tmp_path / "job", work)
    (tmp_path / "job" / "job.json").unlink()
    (tmp_path / "job" / jobs.ITEMS).write_bytes(b"half")
    assert jobs.run(job_of(tmp_path / "job", work), work, Engine()) == (6, 0)


def test_job_on_parts_of_another_keeps_their_order(tmp_path: Path) -> None:
    work = Upper(notes=str(tmp_path))
    jobs.run(job_of(tmp_path / "first", work), work, Engine())
    second = jobs.files_job(str(tmp_path / "second"), work, jobs.finished_parts(str(tmp_path / "first")))
    assert jobs.run(second, work, Engine()) == (6, 0)
    assert read_table(str(tmp_path / "second")).equals(read_table(str(tmp_path / "first")))


def test_job_in_remote_storage(tmp_path: Path) -> None:
    work = Upper(notes=str(tmp_path), stop_at="word 9")
    folder = f"memory://{tmp_path.name}/job"
    for _ in range(2):
        job = jobs.items_job(folder, work, pa.table({"text": WORDS}), rows_per_shard=4)
        if len(job.unfinished()) == 6:
            with pytest.raises(KeyboardInterrupt):
                jobs.run(job, work, Engine())
        else:
            assert jobs.run(job, work, Engine()) == (4, 2)
    assert read_table(folder)["text"].to_pylist() == [word.upper() for word in WORDS]


def test_empty_jobs_and_bad_numbers_are_refused(tmp_path: Path) -> None:
    work = Upper(notes=str(tmp_path))
    with pytest.raises(DataError, match="nothing to do"):
        jobs.items_job(
            str(tmp_path / "job"), work, pa.table({"text": pa.array([], pa.string())}), rows_per_shard=4
        )
    with pytest.raises(ValueError, match="rows_per_shard=0"):
        job_of(tmp_path / "job", work, rows=0)
    with pytest.raises(ValueError, match="actors=0"):
        Engine(actors=0)
    with pytest.raises(FileNotFoundError, match="holds no parts of a job"):
        read_table(str(tmp_path))


def test_ray_that_is_not_installed_names_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "ray", None)
    work = Upper(notes=str(tmp_path))
    with pytest.raises(DataError, match=r"pip install 'vlp-data\[ray\]'"):
        jobs.run(job_of(tmp_path / "job", work), work, Engine(engine="ray"))


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory):
    """Ray on two cores of this machine."""
    ray = pytest.importorskip("ray", reason="Ray is not installed: pip install 'vlp-data[ray]'")
    with pytest.MonkeyPatch.context() as patch:
        # Actors import this module, by its path from the root of the workspace, to know its work.
        patch.setenv("PYTHONPATH", str(Path(__file__).parents[4]))
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False)
        yield
        ray.shutdown()


@pytest.mark.slow
@pytest.mark.filterwarnings("default")
def test_ray_loses_nothing_when_a_worker_is_killed_in_the_middle(tmp_path: Path, cluster: None) -> None:
    work = Upper(notes=str(tmp_path), stop_at="word 9", how="kill")
    job = job_of(tmp_path / "job", work)
    done = jobs.run(job, work, Engine(engine="ray", actors=2, cpus_per_actor=0.5))
    assert done == (6, 0)
    assert (tmp_path / "stopped").exists()
    # The shard that the process died of was begun again, and the result is that of one process that ran
    # through.
    assert begun(work).count("word 8") >= 2
    through = Upper(notes=str(tmp_path))
    jobs.run(job_of(tmp_path / "local", through), through, Engine())
    for part in jobs.finished_parts(str(tmp_path / "local")):
        assert Path(part).read_bytes() == (tmp_path / "job" / Path(part).name).read_bytes()
    assert not [file for file in (tmp_path / "job").iterdir() if file.name.startswith(".")]


@pytest.mark.slow
@pytest.mark.filterwarnings("default")
def test_ray_job_that_was_stopped_goes_on_from_its_finished_parts(tmp_path: Path, cluster: None) -> None:
    work = Upper(notes=str(tmp_path), stop_at="word 9", how="always error")
    engine = Engine(engine="ray", actors=1, cpus_per_actor=0.5)
    job = job_of(tmp_path / "job", work)
    with pytest.raises(DataError, match="word 9 cannot be done"):
        jobs.run(job, work, engine)
    left = job.unfinished()
    assert 2 in left
    assert jobs.run(job, Upper(notes=str(tmp_path)), engine) == (len(left), 6 - len(left))
    assert json.loads((tmp_path / "job" / "job.json").read_text())["work"] == "upper"
    assert read_table(str(tmp_path / "job"))["text"].to_pylist() == [word.upper() for word in WORDS]


@pytest.mark.slow
@pytest.mark.filterwarnings("default")
def test_ray_job_gives_up_on_a_shard_that_kills_every_process(tmp_path: Path, cluster: None) -> None:
    work = Upper(notes=str(tmp_path), stop_at="word 9", how="always kill")
    job = job_of(tmp_path / "job", work)
    with pytest.raises(DataError, match="shard 2 was begun 2 times and its process died each time"):
        jobs.run(job, work, Engine(engine="ray", actors=1, cpus_per_actor=0.5, attempts=2))
    assert begun(work).count("word 8") == 2
    assert 2 in job.unfinished()


@pytest.mark.slow
@pytest.mark.filterwarnings("default")
def test_ray_counts_the_concepts_that_one_machine_counts(tmp_path: Path, cluster: None) -> None:
    parses = [
        {
            "caption": word,
            "words": ["a", word],
            "pos": ["DET", "NOUN"],
            "heads": [1, 1],
            "deps": ["det", "ROOT"],
        }
        for word in ("dog", "cat", "Dog")
    ]
    (tmp_path / "parses.json").write_text(json.dumps(parses))
    work = CountConcepts(parses=str(tmp_path / "parses.json"))
    captions = pa.table({"text": ["dog", "cat", "Dog", "dog", "cat"]})
    counts = []
    for engine in (Engine(), Engine(engine="ray", actors=2, cpus_per_actor=0.5)):
        folder = str(tmp_path / engine.engine)
        jobs.run(jobs.items_job(folder, work, captions, rows_per_shard=2), work, engine)
        counts.append(counts_of(read_table(folder)))
    assert counts == [{"dog": 3, "cat": 2}] * 2
