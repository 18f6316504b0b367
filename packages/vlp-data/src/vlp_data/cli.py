"""`vlp-data`: make, look at and check data.

Exit codes: 0 done, 1 a check found something, 2 user error (one line on stderr).
"""

import argparse
import os
import sys
import time
from collections.abc import Callable, Sequence

from vlp_data.concepts.command import add_commands as add_concept_commands
from vlp_data.errors import BadSample, shown
from vlp_data.sources import FORMATS


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code."""
    options = _parser().parse_args(arguments)
    try:
        return options.run(options)
    except (ValueError, OSError, BadSample) as error:
        print(f"vlp-data {options.command}: {shown(error)}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"vlp-data {options.command}: interrupted; nothing was kept", file=sys.stderr)
        return 130


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="vlp-data", description="Make, look at and check data for vision-language training."
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    shapes = commands.add_parser("shapes", help="draw a folder of scenes with all annotations")
    shapes.add_argument("out", metavar="OUT", help="new or empty folder")
    shapes.add_argument(
        "--images", type=int, default=2000, metavar="N", help="scenes of all splits together (default 2000)"
    )
    shapes.add_argument("--seed", type=int, default=0, metavar="S", help="which world (default 0)")
    shapes.add_argument(
        "--size", type=int, default=96, metavar="PX", help="side of the images in pixels (default 96)"
    )
    shapes.add_argument(
        "--difficulty",
        choices=("full", "easy"),
        default="full",
        help="easy: few things, each in a field of its own, for models that have minutes to learn",
    )
    shapes.add_argument("--val", type=int, metavar="N", help="scenes for validation (default: a tenth)")
    shapes.add_argument("--test", type=int, metavar="N", help="scenes for test (default: a tenth)")
    shapes.add_argument(
        "--workers",
        type=int,
        metavar="W",
        help="processes (default: one per core, at most 8; few scenes need one)",
    )
    shapes.set_defaults(run=_shapes)

    sheet = commands.add_parser("sheet", help="images and captions of a shapes folder on one page")
    sheet.add_argument("out", metavar="OUT", help="folder written by `vlp-data shapes`")
    sheet.add_argument("--first", type=int, default=16, metavar="N", help="scenes to show (default 16)")
    sheet.add_argument("--split", choices=("train", "val", "test"), help="only scenes of this split")
    sheet.add_argument("--boxes", action="store_true", help="draw boxes and list referring expressions")
    sheet.add_argument("--to", default="sheet.png", metavar="FILE", help="image to write (default sheet.png)")
    sheet.set_defaults(run=_sheet)

    verify = commands.add_parser("verify", help="compare the files of a shapes folder with their hashes")
    verify.add_argument("out", metavar="OUT", help="folder written by `vlp-data shapes`")
    verify.set_defaults(run=_verify)

    inspect = commands.add_parser(
        "inspect", help="what is in data files of any known format, and what of it cannot be used"
    )
    inspect.add_argument("files", nargs="+", metavar="FILE", help="files or folders; paths or fsspec URLs")
    inspect.add_argument(
        "--root", default="", metavar="DIR", help="folder or URL that images are relative to"
    )
    known = ", ".join(row.name for row in FORMATS)
    inspect.add_argument(
        "--format",
        metavar="NAME",
        help=f"{known}, or a format of another package (default: told by the content)",
    )
    inspect.add_argument(
        "--split",
        default="train",
        metavar="SPLIT",
        help="of a file that holds several, such as Karpathy's (default train)",
    )
    inspect.add_argument(
        "--option",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="a further option of the format, as in a recipe; may be repeated",
    )
    inspect.add_argument("--rows", type=int, metavar="N", help="look at the first N rows only")
    inspect.add_argument("--no-images", action="store_true", help="do not open the images")
    inspect.set_defaults(run=_inspect)

    plan = commands.add_parser(
        "plan", help="which lines of line files each rank and worker reads in an epoch"
    )
    plan.add_argument("files", nargs="+", metavar="FILE", help="files or folders; paths or fsspec URLs")
    plan.add_argument(
        "--batch", type=int, required=True, metavar="N", help="samples per step, all ranks together"
    )
    plan.add_argument("--ranks", type=int, default=1, metavar="N", help="default 1")
    plan.add_argument("--workers", type=int, default=1, metavar="N", help="per rank (default 1)")
    plan.add_argument("--order", choices=("shuffled", "files"), default="shuffled", help="default shuffled")
    plan.add_argument("--buffer", type=int, default=0, metavar="N", help="with --order files (default 0)")
    plan.add_argument("--seed", type=int, default=0, metavar="S", help="default 0")
    plan.add_argument("--epoch", type=int, default=0, metavar="E", help="default 0")
    plan.set_defaults(run=_plan)

    convert = commands.add_parser(
        "convert", help="annotation files of others to the formats that are trained on"
    )
    _add_conversions(convert.add_subparsers(dest="what", required=True, metavar="WHAT"))

    concepts = commands.add_parser("concepts", help="words for images: from captions to lists with kwords")
    add_concept_commands(concepts.add_subparsers(dest="step", required=True, metavar="STEP"), _progress)
    return parser


def _add_conversions(kinds: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    refer = kinds.add_parser("refer", help="REFER's refs(...).p to JSON; nothing in the pickle is executed")
    refer.add_argument("refs", metavar="FILE", help="refs(unc).p")
    refer.add_argument("out", metavar="OUT", help="JSON file to write")
    refer.set_defaults(run=_convert_refs)

    coco = kinds.add_parser("coco", help="COCO instances to region lines; the category is the text of a box")
    coco.add_argument("annotations", metavar="FILE", help="instances_*.json")
    coco.add_argument("--captions", default="", metavar="FILE", help="captions_*.json for the whole images")
    coco.add_argument(
        "--images", default="", metavar="DIR", help="put before the file names, such as train2014"
    )

    vg = kinds.add_parser("vg", help="Visual Genome to region lines")
    vg.add_argument(
        "annotations", metavar="FILE", help="objects.json, attributes.json or region_descriptions.json"
    )
    vg.add_argument("--image-data", required=True, metavar="FILE", help="image_data.json")
    vg.add_argument(
        "--image-name",
        default="image/{id}.jpg",
        metavar="PATTERN",
        help="file of an image; {id} its id, {folder} VG_100K or VG_100K_2 (default image/{id}.jpg)",
    )
    vg.add_argument(
        "--exclude-flickr", nargs="+", default=[], metavar="FILE", help="as --exclude, for files of Flickr30k"
    )
    for parser in (coco, vg):
        parser.add_argument("out", metavar="OUT", help="new or empty folder")
        parser.add_argument(
            "--exclude",
            nargs="+",
            default=[],
            metavar="FILE",
            help=(
                "annotation files whose COCO images are left out: all of a list or a COCO file, "
                "val and test of Karpathy's file"
            ),
        )
        parser.add_argument(
            "--files",
            type=int,
            default=8,
            metavar="N",
            help="files to write (default 8)",
        )
        parser.set_defaults(run=_convert_regions)


def _shapes(options: argparse.Namespace) -> int:
    from vlp_data import shapes

    start = time.monotonic()
    # Starting a process costs about as much as drawing fifty scenes.
    workers = (
        max(1, min(8, os.cpu_count() or 1, options.images // 250))
        if options.workers is None
        else options.workers
    )
    shapes.write(
        options.out,
        images=options.images,
        seed=options.seed,
        size=options.size,
        val=options.val,
        test=options.test,
        difficulty=options.difficulty,
        workers=workers,
        progress=_progress("scenes"),
    )
    print(
        f"{options.out}: {options.images} scenes of {options.size} x {options.size} pixels in "
        f"{time.monotonic() - start:.1f} s"
    )
    return 0


def _sheet(options: argparse.Namespace) -> int:
    from vlp_data.shapes.sheet import sheet

    shown = sheet(options.out, options.to, first=options.first, split=options.split, boxes=options.boxes)
    print(f"{options.to}: {shown} scenes")
    return 0


def _verify(options: argparse.Namespace) -> int:
    from vlp_data import shapes

    problems = shapes.verify(options.out)
    for problem in problems[:20]:
        print(problem)
    print(
        f"{options.out}: "
        f"{f'{len(problems)} files are not as written' if problems else 'all files are as written'}"
    )
    return 1 if problems else 0


def _inspect(options: argparse.Namespace) -> int:
    from vlp_data import tools
    from vlp_data.sources.given import source_options

    wrong = next((word for word in options.option if "=" not in word), None)
    if wrong is not None:
        raise ValueError(f"--option {wrong}: expected KEY=VALUE")
    source = source_options(
        tuple(options.files),
        format=options.format,
        root=options.root,
        split=options.split,
        given={key: value for key, _, value in (word.partition("=") for word in options.option)},
    ).open()
    report = tools.inspect(
        source, rows=options.rows, images=not options.no_images, progress=_progress("rows")
    )
    print("\n".join(report.lines()))
    return 1 if report.counts else 0


def _plan(options: argparse.Namespace) -> int:
    from vlp_data import tools
    from vlp_data.options import ImageTextLines
    from vlp_data.sources.lines import open_image_text_lines

    # Lines are counted, not parsed, so region lines are as good.
    source = open_image_text_lines(
        ImageTextLines(files=tuple(options.files), order=options.order, buffer=options.buffer)
    )
    parts = tools.plan(
        source,
        global_batch=options.batch,
        world=options.ranks,
        workers=options.workers,
        seed=options.seed,
        epoch=options.epoch,
    )
    for part in parts:
        print(part.line())
    print(f"together: {sum(part.samples for part in parts)} of {len(source)} lines, none twice")
    return 0


def _convert_refs(options: argparse.Namespace) -> int:
    from vlp_data.sources.refer import write_refs_json

    print(f"{options.out}: {write_refs_json(options.refs, options.out)} references")
    return 0


def _convert_regions(options: argparse.Namespace) -> int:
    from vlp_data import convert
    from vlp_data.options import CocoInstances, VisualGenome

    excluded: dict[convert.Collection, set[int]] = {"coco": convert.held_out(options.exclude)}
    if options.what == "coco":
        source = CocoInstances(
            annotations=options.annotations, images=options.images, captions=options.captions
        ).open()
    else:
        excluded["flickr"] = convert.held_out(options.exclude_flickr)
        source = VisualGenome(
            annotations=options.annotations, image_data=options.image_data, image_name=options.image_name
        ).open()
    done = convert.write_region_lines(
        source, options.out, excluded=excluded, shards=options.files, progress=_progress("images")
    )
    print(f"{options.out}: {done.regions} boxes of {done.images} images in {options.files} files")
    for cause, count in {**source.describe()["notes"], **done.left_out}.items():
        print(f"{cause}: {count}")
    return 0


def _progress(unit: str) -> Callable[[int, int], None] | None:
    """A line on stderr that is rewritten about ten times a second; None where stderr is no terminal."""
    if not sys.stderr.isatty():
        return None
    last = 0.0

    def show(done: int, total: int) -> None:
        nonlocal last
        now = time.monotonic()
        if done == total or now - last > 0.1:
            last = now
            end = "\n" if done == total else ""
            print(f"\r{unit} {done}/{total} ({100 * done // total} %)", end=end, file=sys.stderr, flush=True)

    return show
