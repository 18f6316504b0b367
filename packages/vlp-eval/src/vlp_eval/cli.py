"""`vlp-eval`: evaluate a checkpoint.

Exit codes: 0 done, 1 a crash (traceback), 2 user error (said in one line, or one line per mistake), 130
interrupted. Nothing imports torch before the arguments are known to be right.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from vlp_eval import __version__

if TYPE_CHECKING:
    from vlp_core.recipe import Line

RECIPES = Path(__file__).parent / "recipes"


class Benchmark(NamedTuple):
    """What the command line knows of a benchmark before torch is imported."""

    about: str
    schema: str
    """Class of `vlp_eval.options`."""
    sources: tuple[str, ...]
    """Classes of `vlp_data.options` that its `data` may be."""


BENCHMARKS = {
    "retrieval": Benchmark(
        "Image-text retrieval, by similarity and re-ranked",
        "Retrieval",
        ("Karpathy", "CocoCaptions", "TaskJson", "ImageTextLines"),
    ),
    "vqa": Benchmark("Visual question answering, chosen or written answers", "Vqa", ("TaskJson",)),
    "nlvr": Benchmark("NLVR2: sentences about two images", "Nlvr", ("TaskJson",)),
    "entailment": Benchmark("SNLI-VE: does a hypothesis follow from an image?", "Entailment", ("TaskJson",)),
    "grounding": Benchmark(
        "Referring expressions, by boxes or by heat of attention", "Grounding", ("Refer",)
    ),
    "captioning": Benchmark(
        "Image captioning", "Captioning", ("TaskJson", "CocoCaptions", "Karpathy", "ImageTextLines")
    ),
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    commands = [*BENCHMARKS, "ls", "show"]
    if words and not words[0].startswith("-") and words[0] not in commands:
        from vlp_core.recipe import nearest

        near = nearest(words[0], commands)
        hint = f"did you mean {near}?" if near else f"known: {', '.join(commands)}"
        print(f"vlp-eval: unknown benchmark {words[0]!r}; {hint}", file=sys.stderr)
        return 2
    options = _parse(words)
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


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="vlp-eval", description="Evaluate vision-language models.")
    parser.add_argument("--version", action="version", version=f"vlp-eval {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, benchmark in BENCHMARKS.items():
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
    show.add_argument("benchmark", choices=list(BENCHMARKS), metavar="BENCHMARK")
    show.set_defaults(run=_show, debug=False)
    return parser


def _parse(words: Sequence[str]) -> argparse.Namespace:
    # argparse stops taking key=value words at the first --option; the ones behind it come back as unknown.
    parser = _parser()
    options, rest = parser.parse_known_args(words)
    if any(word.startswith("-") for word in rest) or (rest and "overrides" not in options):
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    if rest:
        options.overrides += rest
    return options


def _list(options: argparse.Namespace) -> None:
    for name, benchmark in BENCHMARKS.items():
        print(f"{name:<12} {benchmark.about}")


def _show(options: argparse.Namespace) -> None:
    from vlp_core.recipe import describe

    for number, (choice, example) in enumerate(_examples(options.benchmark)):
        section = choice.partition(".")[0] + "."
        lines = describe(example, {})
        for line in lines if number == 0 else ():
            if not line.key.startswith(section):
                _show_line(line)
        print(f"\nwith {choice}")
        for line in lines:
            if line.key.startswith(section):
                _show_line(line)


def _show_line(line: "Line") -> None:
    value = (
        "(must be given)" if line.value in ("???", ["???"]) else json.dumps(line.value, ensure_ascii=False)
    )
    print(f"  {line.key} = {value}   {line.kind}")
    if line.doc:
        print(f"      {line.doc}")


def _benchmark(options: argparse.Namespace) -> None:
    from vlp_core.recipe import RecipeError, load

    start = options.recipe or RECIPES / f"{options.command}.yaml"
    try:
        recipe = load(start, _schema(options.command), options.overrides)
    except RecipeError as error:
        # The file that holds no more than "data: ???" is none of the user's business.
        lines = [f"{options.recipe}:"] if options.recipe else []
        raise ValueError("\n  ".join([*lines, *error.problems])) from error
    if not Path(options.checkpoint).exists():
        raise FileNotFoundError(f"{options.checkpoint} not found; give an export folder or a checkpoint file")
    from vlp_eval import run

    getattr(run, options.command)(options.checkpoint, recipe)


def _schema(name: str) -> type:
    from vlp_eval import options

    return getattr(options, BENCHMARKS[name].schema)


def _examples(name: str) -> list[tuple[str, Any]]:
    """Options with placeholders for what the user has to give, each with the choice it stands for, to list
    all keys."""
    from dataclasses import MISSING, fields

    from vlp_data import options as data

    found = []
    for kind in BENCHMARKS[name].sources:
        source = getattr(data, kind)
        required = [
            field.name
            for field in fields(source)
            if field.default is MISSING and field.default_factory is MISSING
        ]
        # `files` is a list of paths, everything else one path; a split is whatever the user says.
        given = {key: ("???",) if key == "files" else "test" if key == "split" else "???" for key in required}
        example = source(**given)
        found.append((f"data.format={example.format}", _schema(name)(data=example)))
    return found


if __name__ == "__main__":
    sys.exit(main())
