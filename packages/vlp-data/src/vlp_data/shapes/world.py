"""A folder of scenes: written at once or not at all, made on first use, checked by hashes."""

import fcntl
import hashlib
import json
import multiprocessing
import os
import shutil
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from PIL import Image

from vlp_data.shapes.annotations import annotate, file_name, pair, pair_records, record
from vlp_data.shapes.layouts import write_layouts
from vlp_data.shapes.scene import Difficulty, Layout, check_arguments, draw
from vlp_data.shapes.tasks import write_tasks

FORMAT = "vlp-shapes"
VERSION = 4
"""Version of scenes, sentences and files together; folders of older versions are written anew. 4: concepts of
images."""

SPLITS = ("train", "val", "test")
MANIFEST = "manifest.json"

Progress = Callable[[int, int], None]


def split_ranges(images: int, *, val: int | None = None, test: int | None = None) -> dict[str, range]:
    """Scene indices of each split: train first, then val, then test.

    Args:
        images: scenes of all splits together, at least 3.
        val, test: scenes of these splits; None is a tenth of all, at least one.

    Raises:
        ValueError: a split would be empty.
    """
    val = max(1, images // 10) if val is None else val
    test = max(1, images // 10) if test is None else test
    train = images - val - test
    if min(train, val, test) < 1:
        raise ValueError(
            f"images={images} leaves train={train}, val={val}, test={test}; "
            "each split needs at least one scene"
        )
    return {"train": range(train), "val": range(train, train + val), "test": range(train + val, images)}


def write(
    folder: str | os.PathLike[str],
    *,
    images: int = 2000,
    seed: int = 0,
    size: int = 96,
    val: int | None = None,
    test: int | None = None,
    difficulty: Difficulty = "full",
    workers: int = 1,
    progress: Progress | None = None,
) -> Path:
    """Draw the scenes and write images and annotations into a new folder.

    Everything is written beside `folder` under a temporary name, which is renamed at the end, so that
    `folder` is complete or absent. The result does not depend on `workers`.

    Args:
        folder: must not exist, or be empty.
        images: scenes of all splits together.
        seed: the world; scene k of a world is always the same image with the same texts.
        size: side of the images in pixels, 32 to 2048.
        val, test: scenes of these splits (default: a tenth of all each); the rest is train.
        difficulty: as for `scene.draw`.
        workers: processes that draw.
        progress: called with (scenes done, scenes in all).

    Returns:
        The folder.

    Raises:
        ValueError: an argument is out of range.
        FileExistsError: `folder` has content.
    """
    path = _local(folder)
    parameters = _parameters(images=images, seed=seed, size=size, val=val, test=test, difficulty=difficulty)
    if workers < 1:
        raise ValueError(f"workers={workers} must be at least 1")
    with _locked(path):
        if path.exists() and (not path.is_dir() or any(path.iterdir())):
            raise FileExistsError(f"{folder} is not empty; choose another folder or delete it")
        _write(path, parameters, workers, progress)
    return path


def ensure(
    folder: str | os.PathLike[str],
    *,
    images: int = 2000,
    seed: int = 0,
    size: int = 96,
    val: int | None = None,
    test: int | None = None,
    difficulty: Difficulty = "full",
    workers: int = 1,
    progress: Progress | None = None,
) -> Path:
    """The folder of these scenes, written now if it is not there yet or was written by an older version.

    Safe to call from several processes at once: one writes, all wait. A folder of an older version is
    replaced only if it holds nothing but what was written into it.

    Arguments as for `write`.

    Raises:
        ValueError: `folder` holds something else: other parameters, a newer format version, files of somebody
        else, files missing, or no manifest at all.
    """
    path = _local(folder)
    parameters = _parameters(images=images, seed=seed, size=size, val=val, test=test, difficulty=difficulty)
    if workers < 1:
        raise ValueError(f"workers={workers} must be at least 1")
    if not (path / MANIFEST).is_file() or _is_older(_manifest(path), parameters):
        with _locked(path):
            # Another process may have written it while this one waited.
            if not (path / MANIFEST).is_file():
                if path.exists() and (not path.is_dir() or any(path.iterdir())):
                    raise ValueError(
                        f"{folder} has content but no {MANIFEST}: not a shapes folder; choose another folder"
                    )
                _write(path, parameters, workers, progress)
            elif _is_older(found := _manifest(path), parameters):
                own = {MANIFEST, *found["files"]}
                names = (file.relative_to(path).as_posix() for file in path.rglob("*") if not file.is_dir())
                if foreign := sorted(set(names) - own):
                    raise ValueError(
                        f"{folder} was written by version {found['parameters']['version']} and must be drawn "
                        f"again, but holds {len(foreign)} files of somebody else, first {foreign[0]}; "
                        "move them away"
                    )
                _write(path, parameters, workers, progress)
    found = _manifest(path)
    wrong = [
        f"{key} is {found['parameters'].get(key)}, wanted {value}"
        for key, value in parameters.items()
        if found["parameters"].get(key) != value
    ]
    if wrong:
        raise ValueError(
            f"{folder} holds another shapes world ({'; '.join(wrong)}); choose another folder or delete it"
        )
    missing = [name for name in found["files"] if not (path / name).is_file()]
    if missing:
        raise ValueError(
            f"{folder} lacks {len(missing)} of its files, first {missing[0]}; delete the folder, "
            "it will be made again"
        )
    return path


def _is_older(found: dict[str, Any], parameters: dict[str, Any]) -> bool:
    """Whether a manifest describes the same world in an older version."""
    version = found["parameters"].get("version")
    return (
        isinstance(version, int)
        and version < parameters["version"]
        and {**found["parameters"], "version": None} == {**parameters, "version": None}
    )


def verify(folder: str | os.PathLike[str]) -> list[str]:
    """Compare every file with its hash in the manifest.

    Returns:
        One line per missing or changed file; empty when all is as written.

    Raises:
        ValueError: the folder has no usable manifest.
    """
    path = _local(folder)
    problems = []
    for name, expected in _manifest(path)["files"].items():
        if not (path / name).is_file():
            problems.append(f"{name}: missing")
        elif _hash(path / name) != expected:
            problems.append(f"{name}: changed since it was written")
    return problems


def _local(folder: str | os.PathLike[str]) -> Path:
    if "://" in os.fspath(folder):
        raise ValueError(f"{folder} is a URL; shapes are written to a local folder, copy it from there")
    return Path(folder).expanduser().resolve()


def _parameters(
    *, images: int, seed: int, size: int, val: int | None, test: int | None, difficulty: Difficulty
) -> dict[str, Any]:
    check_arguments(seed=seed, size=size, difficulty=difficulty)
    splits = {name: len(indices) for name, indices in split_ranges(images, val=val, test=test).items()}
    return {
        "format": FORMAT,
        "version": VERSION,
        "seed": seed,
        "size": size,
        "difficulty": difficulty,
        "splits": splits,
    }


def _manifest(path: Path) -> dict[str, Any]:
    try:
        found = json.loads((path / MANIFEST).read_text(encoding="ascii"))
    except FileNotFoundError:
        raise ValueError(
            f"{path / MANIFEST} not found; `vlp-data shapes {path}` writes a shapes folder"
        ) from None
    except ValueError as error:
        raise ValueError(
            f"{path / MANIFEST} cannot be read ({error}); delete the folder, it will be made again"
        ) from None
    if not isinstance(found, dict) or not all(
        isinstance(found.get(key), dict) for key in ("parameters", "files")
    ):
        raise ValueError(f"{path / MANIFEST} is not the manifest of a shapes folder; choose another folder")
    # Folders that were written before there was a choice.
    found["parameters"].setdefault("difficulty", "full")
    return found


def _write(path: Path, parameters: dict[str, Any], workers: int, progress: Progress | None) -> None:
    """Write the folder; the caller holds its lock."""
    for stale in path.parent.glob(f".{path.name}.writing-*"):
        # Left by a writer that was killed: no other one can be at work while the lock is held.
        shutil.rmtree(stale)
    part = path.parent / f".{path.name}.writing-{os.getpid()}"
    try:
        (part / "images").mkdir(parents=True)
        content = _fill(part, parameters, workers, progress)
        names = sorted(str(file.relative_to(part).as_posix()) for file in part.rglob("*") if file.is_file())
        manifest = {
            "parameters": parameters,
            "content": content,
            "files": {name: _hash(part / name) for name in names},
        }
        (part / MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n", encoding="ascii")
        if path.exists():  # empty, or of an older version
            shutil.rmtree(path)
        part.rename(path)
    finally:
        shutil.rmtree(part, ignore_errors=True)


def _fill(part: Path, parameters: dict[str, Any], workers: int, progress: Progress | None) -> str:
    """Write images and annotations; returns a hash of pixels and records that no PNG encoder changes."""
    seed, sizes = parameters["seed"], parameters["splits"]
    total = sum(sizes.values())
    ranges = split_ranges(total, val=sizes["val"], test=sizes["test"])
    split_of = {index: split for split, indices in ranges.items() for index in indices}
    job = partial(_scene, part, seed, parameters["size"], parameters["difficulty"])
    records: list[dict[str, Any]] = []
    layouts: dict[int, Layout] = {}
    digest = hashlib.sha256()
    with _mapper(workers, total) as run:
        for done, (index, entry, layout, pixels) in enumerate(run(job, list(split_of.items())), start=1):
            records.append(entry)
            layouts[index] = layout
            digest.update(pixels)
            if progress:
                progress(done, total)
    for entry in records:
        entry["pairs"] = pair_records(pair(seed, entry["index"], ranges[entry["split"]], layouts))
        digest.update(json.dumps(entry, sort_keys=True).encode("ascii"))
    write_layouts(part, records, SPLITS)
    write_tasks(part, records, layouts, ranges)
    return digest.hexdigest()


@contextmanager
def _mapper(workers: int, total: int) -> Iterator[Callable[..., Any]]:
    if workers == 1 or total == 1:
        yield map
        return
    # Spawned, not forked: the caller may have threads (torch, a data loader) that a fork would copy in an
    # undefined state.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(min(workers, total), mp_context=context) as pool:
        yield partial(pool.map, chunksize=max(1, min(32, total // workers)))


def _scene(
    part: Path, seed: int, size: int, difficulty: Difficulty, job: tuple[int, str]
) -> tuple[int, dict[str, Any], Layout, bytes]:
    index, split = job
    scene = draw(seed, index, size=size, difficulty=difficulty)
    Image.fromarray(scene.image).save(part / file_name(index), format="PNG", compress_level=6)
    return (
        index,
        record(scene, annotate(scene), split),
        scene.layout,
        hashlib.sha256(scene.image.tobytes()).digest(),
    )


def _hash(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Hold the lock file beside `path`; the system frees it when a process dies, so a killed one blocks
    nobody."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with (path.parent / f".{path.name}.lock").open("w") as stream:
        fcntl.flock(stream, fcntl.LOCK_EX)
        yield
