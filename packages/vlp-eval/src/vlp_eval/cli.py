"""`vlp-eval`: evaluate a checkpoint.

Exit codes: 0 done, 1 a crash (traceback), 2 user error (said in one line, or one line per mistake), 130
interrupted. Nothing imports torch before the arguments are known to be right.
"""

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from vlp_eval import __version__
from vlp_eval.benchmarks import OWN, Benchmark, benchmarks, find

if TYPE_CHECKING:
    from vlp_core.recipe import Line


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    try:
        rows = _rows(words)
    except ValueError as problem:  # a row of another package that cannot be used
        print(f"vlp-eval: {problem}", file=sys.stderr)
        return 2
    commands = [*rows, "ls", "show"]
    if words and not words[0].startswith("-") and words[0] not in commands:
        from vlp_core.recipe import nearest

        near = nearest(words[0], commands)
        hint = f"did you mean {near}?" if near else f"known: {', '.join(commands)}"
        print(f"vlp-eval: unknown benchmark {words[0]!r}; {hint}", file=sys.stderr)
        return 2
    options = _parse(words, rows)
    try:
        options.run(options)
    except (ValueError, OSError) as error:
        if options.debug:
            raise
        print(f"vlp-eval {options.command}: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"vlp-eval {options.command}: interrupted; nothing was written", file=sys.stderr)
        return 130
    return 0


def _rows(words: Sequence[str]) -> Mapping[str, Benchmark]:
    """The benchmarks that these words may mean; other packages are asked only where our own do not do."""
    named = words[1] if words[:1] == ["show"] and len(words) > 1 else words[0] if words else ""
    return OWN if named in OWN else benchmarks()


def _parser(rows: Mapping[str, Benchmark]) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="vlp-eval", description="Evaluate vision-language models.")
    parser.add_argument("--version", action="version", version=f"vlp-eval {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, benchmark in rows.items():
        command = commands.add_parser(name, help=benchmark.about, description=f"{benchmark.about}.")
        command.add_argument(
            "checkpoint", metavar="CHECKPOINT", help="export folder, or an official checkpoint file"
        )
        command.add_argument(
            "overrides", nargs="*", metavar="key=value", help=f"options, see `vlp-eval show {name}`"
        )
        command.add_argument("--recipe", metavar="FILE", help="YAML file with options to start from")
        command.add_argument("--debug", action="store_true", help="traceback for user errors too")
        command.set_defaults(run=_benchmark)
    listing = commands.add_parser("ls", help="list the benchmarks")
    listing.set_defaults(run=_list, debug=False)
    show = commands.add_parser("show", help="every key of a benchmark with default and meaning")
    show.add_argument("benchmark", choices=list(rows), metavar="BENCHMARK")
    show.set_defaults(run=_show, debug=False)
    return parser


def _parse(words: Sequence[str], rows: Mapping[str, Benchmark]) -> argparse.Namespace:
    # argparse stops taking key=value words at the first --option; the ones behind it come back as unknown.
    parser = _parser(rows)
    options, rest = parser.parse_known_args(words)
    if any(word.startswith("-") for word in rest) or (rest and "overrides" not in options):
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    if rest:
        options.overrides += rest
    return options


def _list(options: argparse.Namespace) -> None:
    for name, benchmark in benchmarks().items():
        print(f"{name:<15} {benchmark.about}")


def _show(options: argparse.Namespace) -> None:
    from vlp_eval.command import keys

    found = keys(find(options.benchmark))
    for line in found.common:
        _show_line(line)
    for name, lines in found.formats.items():
        print(f"\nwith data.format={name}")
        for line in lines:
            _show_line(line)


def _show_line(line: "Line") -> None:
    value = "(must be given)" if line.value == "???" else json.dumps(line.value, ensure_ascii=False)
    print(f"  {line.key} = {value}   {line.kind}")
    if line.doc:
        print(f"      {line.doc}")


def _benchmark(options: argparse.Namespace) -> None:
    from vlp_core.recipe import RecipeError, read

    from vlp_eval.command import load

    benchmark = find(options.command)
    try:
        given = load(benchmark, read(options.recipe) if options.recipe else {}, options.overrides)
    except RecipeError as error:
        lines = [f"{options.recipe}:"] if options.recipe else []
        raise ValueError("\n  ".join([*lines, *error.problems])) from error
    if not Path(options.checkpoint).exists():
        raise FileNotFoundError(f"{options.checkpoint} not found; give an export folder or a checkpoint file")
    from vlp_eval.run import run

    run(benchmark, options.checkpoint, given)


if __name__ == "__main__":
    sys.exit(main())
