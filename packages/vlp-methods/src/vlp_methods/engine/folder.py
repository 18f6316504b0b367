"""The folder of a run.

    RUN/recipe.yaml        what runs, every key written out; itself a valid recipe
        environment.json   versions, git revision, and one entry per start: when, where, on how many ranks,
                           from which step
        log.txt            everything that was said
        metrics.jsonl      one line per report and per evaluation
        checkpoints/       step-00001000/ ...
        nonfinite/         batches of a loss or gradient that was not finite; nonfinite.json says which
        eval/              step-00001000.json, and step-00001000/ where an evaluation writes files
        export/            the last model, export-best/ the best one (best.json says which)

A run folder belongs to one recipe. Opening it again continues there, with what differs named and refused
unless it is free to change.
"""

import fcntl
import hashlib
import importlib.metadata
import json
import platform
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TextIO

from vlp_core import recipe as recipes

from vlp_methods.engine import checkpoint, earlier
from vlp_methods.engine.entry import Recipe, UserError
from vlp_methods.engine.options import Training

RUN_TIME_KEYS = ("about", "save", "report", "evaluate", "device", "workers", "compile")
"""Keys that do not make it another run: left out of the name of the default folder."""


def _under(key: str, heads: Iterable[str]) -> bool:
    return any(key == head or key.startswith(f"{head}.") for head in heads)


def default_folder(recipe: Recipe) -> Path:
    """`runs/<recipe>-<hash of what it computes>`: the same command finds its run again, another setting gets
    another folder. A run of an earlier version is found under the name that it had."""
    settings = {
        key: value for key, value in recipes.dump(recipe.settings).items() if key not in RUN_TIME_KEYS
    }
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:8]
    chosen = Path("runs") / f"{recipe.name.replace('/', '-')}-{digest}"
    return chosen if chosen.exists() else _of_earlier_version(recipe, chosen.parent) or chosen


def _of_earlier_version(recipe: Recipe, runs: Path) -> Path | None:
    """A run of this recipe whose keys had other names when its folder was named."""
    schema, settings = type(recipe.settings), recipes.dump(recipe.settings)
    ignored = {*RUN_TIME_KEYS, *schema.free} - {"steps"}
    for file in sorted(runs.glob(f"{recipe.name.replace('/', '-')}-????????/recipe.yaml")):
        values, renamed = earlier.upgrade(recipes.read(file))
        if not renamed:
            continue
        try:
            recorded = recipes.dump(recipes.build(schema, values, source=str(file)))
        except recipes.RecipeError:
            continue
        if all(_under(change.key, ignored) for change in recipes.differences(recorded, settings)):
            return file.parent
    return None


def git_revision(folder: Path) -> str | None:
    """`<commit>` or `<commit> with changes` of the checkout a folder is in; None outside of one."""

    def git(*arguments: str) -> str | None:
        try:
            done = subprocess.run(
                ["git", "-C", str(folder), *arguments], capture_output=True, text=True, timeout=20
            )
        except (FileNotFoundError, subprocess.TimeoutExpired):
            return None
        return done.stdout.strip() if done.returncode == 0 else None

    commit = git("rev-parse", "HEAD")
    return (
        f"{commit} with changes"
        if commit and git("status", "--porcelain", "--untracked-files=no")
        else commit
    )


def _versions() -> dict[str, str]:
    names = (
        "torch",
        "numpy",
        "safetensors",
        "tokenizers",
        "pillow",
        "vlp-ops",
        "vlp-core",
        "vlp-data",
        "vlp-eval",
        "vlp-methods",
    )
    installed = {"python": platform.python_version()}
    for name in names:
        try:
            installed[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            installed[name] = "not installed"
    return installed


class RunFolder:
    """A run folder opened for training by rank 0, locked against a second process.

    Raises `UserError` when the folder is in use, holds another recipe, or is not empty under `fresh`.
    """

    def __init__(
        self, path: Path, recipe: Recipe, *, fresh: bool = False, allow_change: tuple[str, ...] = ()
    ) -> None:
        self.path = path
        self.checkpoints = path / "checkpoints"
        self.metrics = path / "metrics.jsonl"
        self.log = path / "log.txt"
        self.changes: list[recipes.Difference] = []
        present = [entry.name for entry in path.iterdir() if entry.name != ".lock"] if path.is_dir() else []
        if fresh and present:
            raise UserError(
                f"{path} is not empty and --fresh does not resume; delete it or choose another --run DIR"
            )
        if present and not (path / "recipe.yaml").is_file():
            raise UserError(
                f"{path} is not empty and holds no recipe.yaml, so it is not a run; choose another --run DIR"
            )
        path.mkdir(parents=True, exist_ok=True)
        self._lock = self._locked()
        try:
            if present:
                self.changes = self._compare(recipe, allow_change)
        except BaseException:
            self.close()
            raise
        checkpoint.sweep(self.checkpoints)
        for name in ("export", "export-best"):
            checkpoint.restore_folder(path / name)
        checkpoint.write_text(path / "recipe.yaml", recipes.dumps(recipe.settings))

    def _locked(self) -> TextIO:
        lock = (self.path / ".lock").open("w")
        try:
            # Ends with this process, however it ends; flock would live on in loader workers that survive a
            # kill for some seconds.
            fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            lock.close()
            raise UserError(
                f"{self.path} is in use by another vlp-train; wait for it or choose another --run DIR"
            ) from None
        return lock

    def close(self) -> None:
        self._lock.close()

    def _compare(self, recipe: Recipe, allow_change: tuple[str, ...]) -> list[recipes.Difference]:
        file = self.path / "recipe.yaml"
        schema = type(recipe.settings)
        recorded, renamed = earlier.upgrade(recipes.read(file))
        try:
            recorded = recipes.dump(recipes.build(schema, recorded, source=str(file)))
        except recipes.RecipeError:
            if not allow_change:
                raise
            # The schema has changed since: what was written is compared.
        earlier.announce(file, renamed)
        changes = recipes.differences(recorded, recipes.dump(recipe.settings))
        free = schema.free if issubclass(schema, Training) else ()
        refused = [change for change in changes if not _under(change.key, (*free, *allow_change))]
        if refused and self._started():
            lines = "\n".join(
                f"  {key}: {_short(before)} -> {_short(after)}" for key, before, after in refused
            )
            allow = " ".join(f"--allow-change {change.key}" for change in refused)
            raise UserError(
                f"{self.path} was started with another recipe:\n{lines}\n"
                f"Choose another --run DIR, or continue with the new values: {allow}"
            )
        return changes

    def _started(self) -> bool:
        return checkpoint.newest(self.checkpoints) is not None

    def begin(self, *, step: int, evaluated: int, ranks: int, device: str) -> None:
        """Record a start, and forget reports of steps after the checkpoint: they will be made again."""
        self.keep_metrics(
            lambda line: (
                line["step"] < step
                or (line["step"] == step and ("evaluation" not in line or evaluated == step))
            )
        )
        file = self.path / "environment.json"
        starts = json.loads(file.read_text())["starts"] if file.is_file() else []
        start = {
            "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
            "command": shlex.join(sys.argv),
            "host": platform.node(),
            "platform": platform.platform(),
            "ranks": ranks,
            "device": device,
            "step": step,
            "changed": {key: [_json(before), _json(after)] for key, before, after in self.changes},
        }
        checkpoint.write_json(
            file,
            {
                "versions": _versions(),
                "git": {
                    "code": git_revision(Path(__file__).parent),
                    "working_folder": git_revision(Path.cwd()),
                },
                "starts": [*starts, start],
            },
        )

    def keep_metrics(self, keep: Callable[[dict[str, Any]], bool]) -> None:
        kept = [json.dumps(line) + "\n" for line in history(self.path) if keep(line)]
        checkpoint.write_text(self.metrics, "".join(kept))

    def export(self, write: Callable[[Path], None], name: str = "export") -> Path:
        """Let `write` fill a folder and put it in the place of `name` when it is complete."""
        new = self.path / f".{name}.new"
        shutil.rmtree(new, ignore_errors=True)
        new.mkdir()
        write(new)
        checkpoint.replace_folder(new, self.path / name)
        return self.path / name

    def write_scores(self, folder: Path, scores: Mapping[str, float]) -> None:
        """Write `<folder>.json` and drop the folder if the evaluation has put nothing into it."""
        checkpoint.write_json(folder.with_suffix(".json"), dict(scores))
        if not any(folder.iterdir()):
            folder.rmdir()

    def best(self) -> dict[str, Any] | None:
        """Name, value and step of the best evaluation so far."""
        file = self.path / "best.json"
        return json.loads(file.read_text()) if file.is_file() else None

    def is_best(self, name: str, value: float, better: str) -> bool:
        """Whether a value is better than the best of the same number so far."""
        best = self.best()
        if best is None or best["name"] != name:
            return True
        return value > best["value"] if better == "higher" else value < best["value"]

    def write_best(self, name: str, value: float, step: int) -> None:
        checkpoint.write_json(self.path / "best.json", {"name": name, "value": value, "step": step})


def _json(value: Any) -> Any:
    return None if value is recipes.ABSENT else value


def _short(value: Any) -> str:
    return repr(value) if value is recipes.ABSENT else json.dumps(value)


def evaluation_folder(path: Path, step: int) -> Path:
    """Where the evaluation at a step may write."""
    return path / "eval" / f"step-{step:08d}"


def final_folder(path: Path, steps: int) -> Path:
    """Where the test at the end of a run of so many steps may write."""
    return path / "eval" / f"test-{steps:08d}"


def history(path: Path) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl; a last line cut off by a crash is left out."""
    file = path / "metrics.jsonl"
    if not file.is_file():
        return []
    lines = file.read_text(encoding="utf-8").splitlines(keepends=True)
    return [json.loads(line) for line in lines if line.endswith("\n")]


def open_run(path: Path) -> Path:
    """Check that a folder is a run."""
    if not (path / "recipe.yaml").is_file():
        raise UserError(
            f"{path} holds no recipe.yaml; give the folder of a run (--run DIR, default runs/...)"
        )
    return path


def table(lines: Sequence[Mapping[str, Any]]) -> str:
    """The lines of metrics.jsonl as two tables: reports, evaluations."""
    reports = [
        (line["step"], {**line["losses"], "lr": line["lr"], "samples/s": line["samples_per_second"]})
        for line in lines
        if "losses" in line
    ]
    evaluations = [(line["step"], line["evaluation"]) for line in lines if "evaluation" in line]
    return "\n\n".join(_columns(rows) for rows in (reports, evaluations) if rows) or "no report yet"


def _columns(rows: Sequence[tuple[int, Mapping[str, float]]]) -> str:
    names = list(dict.fromkeys(name for _, values in rows for name in values))
    cells = [["step", *names]]
    cells += [
        [str(step), *(f"{row[name]:.5g}" if name in row else "-" for name in names)] for step, row in rows
    ]
    widths = [max(len(row[column]) for row in cells) for column in range(len(names) + 1)]
    return "\n".join(
        "  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in cells
    )
