"""`vlp-train`: list, show, copy and run recipes. Nothing here imports torch before a run really starts."""

import argparse
import os
import shutil
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

USAGE = """vlp-train RECIPE [key=value ...] [options]    train; continues a run that has a checkpoint
       vlp-train ls [TEXT]                           recipes, with method, task and what they are
       vlp-train show RECIPE [key=value ...]         every key: value, type, origin, meaning
       vlp-train cp RECIPE FILE                      an editable copy of a recipe
       vlp-train export RUN [FOLDER]                 write the newest checkpoint of a run as a model folder
       vlp-train history RUN                         table of a run's reports and evaluations
       vlp-train replay RUN                          repeat a step that was not finite
       vlp-train --version | --help"""

EPILOG = """RECIPE is a name that `vlp-train ls` shows, or a path ending in .yaml. The value of key=value is
read as YAML; list items are addressed by number (data.sources.0.path=x). Exit codes: 0 done, 2 fault of
recipe, files or data (one message), 75 stopped on a signal after saving (start it again), 1 crash."""


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        """One line instead of the usage text."""
        self.exit(2, f"vlp-train: {message}; see {self.prog} --help\n")


def _parser(name: str, about: str) -> argparse.ArgumentParser:
    return _Parser(prog=f"vlp-train {name}".rstrip(), description=about, allow_abbrev=False)


def _list(arguments: Sequence[str]) -> int:
    """Recipes of the installed methods."""
    from vlp_core import recipe as recipes

    from vlp_methods.engine import entry

    parser = _parser("ls", "List the recipes of all installed methods.")
    parser.add_argument("text", nargs="?", default="", help="show only recipes whose line contains this")
    text = parser.parse_args(arguments).text.lower()
    rows = []
    for name, file in entry.shipped().items():
        head = recipes.read(file)
        rows.append((name, str(head.get("method")), str(head.get("task")), str(head.get("about"))))
    found = [row for row in rows if text in " ".join(row).lower()]
    if not found:
        raise entry.UserError(f"no recipe contains {text!r}" if rows else "no method is installed")
    widths = [max(len(row[column]) for row in found) for column in range(3)]
    for *columns, about in found:
        print(
            "  ".join([*(column.ljust(width) for column, width in zip(columns, widths, strict=True)), about])
        )
    return 0


def _show(arguments: Sequence[str]) -> int:
    """A recipe, resolved and explained."""
    from vlp_core import recipe as recipes

    from vlp_methods.engine import entry

    parser = _parser("show", "Print a resolved recipe with type, origin and meaning of every key.")
    parser.add_argument("recipe")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    options = parser.parse_args(arguments)
    recipe = entry.load(options.recipe, options.overrides)
    print(f"# {recipe.file}")
    for key, kind, value, origin, doc in recipes.describe(recipe.settings, recipe.values, options.overrides):
        shown = recipes.inline(value)
        print(f"{key}: {shown}\n    {kind}; {origin}." + (f" {doc}" if doc else ""))
    return 0


def _copy(arguments: Sequence[str]) -> int:
    """An editable copy of a recipe."""
    from vlp_methods.engine import entry

    parser = _parser("cp", "Copy a recipe to a file of your own.")
    parser.add_argument("recipe")
    parser.add_argument("file", help="path ending in .yaml")
    options = parser.parse_args(arguments)
    target = Path(options.file)
    if target.suffix not in (".yaml", ".yml"):
        raise entry.UserError(
            f"{target}: the copy must end in .yaml, so that `vlp-train {target}.yaml` runs it"
        )
    if target.exists():
        raise entry.UserError(f"{target} exists already; delete it or choose another name")
    shutil.copyfile(entry.locate(options.recipe), target)
    print(f"{target}; run it with: vlp-train {target}")
    return 0


def _history(arguments: Sequence[str]) -> int:
    """Reports of a run as a table."""
    from vlp_methods.engine import folder

    parser = _parser("history", "Print the reports and evaluations of a run.")
    parser.add_argument("run", type=Path)
    print(folder.table(folder.history(folder.open_run(parser.parse_args(arguments).run))))
    return 0


def _replay(arguments: Sequence[str]) -> int:
    """The step of a run that was not finite, again."""
    from vlp_methods.engine import entry, folder

    parser = _parser(
        "replay",
        "Repeat the steps of a run from its newest checkpoint up to the one whose loss or gradient was not "
        "finite, and say where values stop being finite. Writes nothing.",
    )
    parser.add_argument("run", type=Path)
    parser.add_argument(
        "overrides", nargs="*", metavar="key=value", help="changes to the recipe, such as device=cpu"
    )
    options = parser.parse_args(arguments)
    recipe = entry.load(str(folder.open_run(options.run) / "recipe.yaml"), options.overrides)

    from vlp_methods.engine.replay import replay

    replay(recipe, options.run)
    return 0


def _export(arguments: Sequence[str]) -> int:
    """The newest checkpoint of a run as a model folder."""
    from vlp_methods.engine import entry, folder

    parser = _parser(
        "export", "Write the newest checkpoint of a run as a folder that vlp_core.models.load reads."
    )
    parser.add_argument("run", type=Path)
    parser.add_argument("folder", type=Path, nargs="?", help="default: RUN/export")
    options = parser.parse_args(arguments)
    recipe = entry.load(str(folder.open_run(options.run) / "recipe.yaml"))

    from vlp_methods.engine.session import export

    print(export(recipe, options.run, options.folder or options.run / "export"))
    return 0


def _train(arguments: Sequence[str]) -> int:
    """Run a recipe."""
    from vlp_core.recipe import nearest

    from vlp_methods.engine import entry

    parser = _Parser(
        prog="vlp-train",
        usage=USAGE,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("recipe", help="name or path of a recipe")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="changes to the recipe")
    parser.add_argument(
        "--run",
        type=Path,
        metavar="DIR",
        help="run folder (default: runs/<recipe>-<hash of the resolved recipe>)",
    )
    parser.add_argument("--fresh", action="store_true", help="never resume: the run folder must be empty")
    parser.add_argument(
        "--allow-change",
        action="append",
        default=[],
        metavar="KEY",
        help="resume although this key (or all below it) has changed",
    )
    parser.add_argument(
        "--dry-run",
        action="store_true",
        help="build everything, run one update, print shapes and memory; write nothing",
    )
    parser.add_argument(
        "--nproc", type=int, metavar="N", help="start N ranks on this machine; with --sbatch on each node"
    )
    parser.add_argument("--nodes", type=int, metavar="N", help="nodes of the script of --sbatch (default 1)")
    parser.add_argument(
        "--sbatch",
        type=Path,
        metavar="FILE",
        help="write a SLURM script that requeues itself, and do not run",
    )
    parser.add_argument(
        "--debug", action="store_true", help="tracebacks for user errors, anomaly mode, deterministic kernels"
    )
    options = parser.parse_intermixed_args(arguments)

    if (near := nearest(options.recipe, COMMANDS)) and not {"/", "."} & set(options.recipe):
        raise entry.UserError(f"{options.recipe}: no such command or recipe; did you mean vlp-train {near}?")
    recipe = entry.load(options.recipe, options.overrides)

    # OpenMP reads this when torch is imported. By default threads that wait spin for milliseconds and starve
    # loader workers and other ranks of their core (a step took 3 times as long on a busy machine); not
    # spinning at all cost 10 % on a quiet one.
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", "10000")
    from vlp_methods.engine import folder, launch, report

    run = options.run or folder.default_folder(recipe)
    ranks = options.nproc if options.nproc is not None else 1
    if ranks < 1:
        raise entry.UserError(f"--nproc {ranks} must be at least 1")
    if options.nodes is not None and (options.nodes < 1 or options.sbatch is None):
        raise entry.UserError(f"--nodes {options.nodes} must be at least 1 and belongs to --sbatch FILE")
    if options.sbatch:
        kept = _without(arguments, "--sbatch", "--nodes", "--nproc", "--run")
        launch.write_sbatch(
            options.sbatch,
            launch.sbatch(
                kept,
                nodes=1 if options.nodes is None else options.nodes,
                ranks=ranks,
                name=recipe.name.replace("/", "-"),
                run=str(run),
            ),
        )
        print(f"{options.sbatch}; submit it with: sbatch {options.sbatch}")
        return 0
    report.check_loggers(recipe.settings.report)
    if options.nproc is not None and launch.RENDEZVOUS not in os.environ:
        if "WORLD_SIZE" in os.environ:
            raise entry.UserError(
                "--nproc: WORLD_SIZE is set, so a launcher has already started the ranks; leave --nproc out"
            )
        if ranks > 1:
            return launch.spawn(ranks, [*_without(arguments, "--run"), "--run", str(run)])

    from vlp_methods.engine.stop import StopSignals

    with StopSignals() as stop:
        from vlp_methods.engine.session import Options
        from vlp_methods.engine.session import run as run_session

        return run_session(
            recipe,
            Options(
                run=run,
                fresh=options.fresh,
                debug=options.debug,
                allow_change=tuple(options.allow_change),
                dry=options.dry_run,
            ),
            stop,
        )


def _without(arguments: Sequence[str], *names: str) -> list[str]:
    """Arguments without some options and their values."""
    kept: list[str] = []
    skip = False
    for argument in arguments:
        if skip:
            skip = False
        elif argument in names:
            skip = True
        elif not argument.startswith(tuple(f"{name}=" for name in names)):
            kept.append(argument)
    return kept


COMMANDS: dict[str, Callable[[Sequence[str]], int]] = {
    "ls": _list,
    "show": _show,
    "cp": _copy,
    "export": _export,
    "history": _history,
    "replay": _replay,
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point of `vlp-train`; returns the exit code."""
    given: list[Any] = list(sys.argv[1:] if arguments is None else arguments)
    if given[:1] == ["--version"]:
        from vlp_methods import __version__

        print(f"vlp-train {__version__}")
        return 0
    command = COMMANDS.get(given[0], _train) if given else _train
    try:
        return command(given[1:] if command is not _train else given or ["--help"])
    except BrokenPipeError:  # `vlp-train ls | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except Exception as error:
        return _user_error(error, debug="--debug" in given)


def _user_error(error: Exception, *, debug: bool) -> int:
    from vlp_core.recipe import RecipeError

    from vlp_methods.engine.entry import UserError

    if debug or not isinstance(error, (UserError, RecipeError, FileNotFoundError)):
        raise error
    print(f"vlp-train: {error}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main())
