"""`vlp-data concepts ...`. What a command needs is imported when it runs, so that the other commands stay
quick."""

import argparse
import os
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vlp_data.concepts.embed import ImageFiles
    from vlp_data.concepts.encoders import Clip
    from vlp_data.concepts.jobs import Done, Engine, Job, Work

Subparsers = Any  # argparse has no public name for what add_subparsers gives
LIST_HELP = "lists {image, caption, ...}: .json, .parquet, or the folder of a job"


def add_commands(kinds: Subparsers, progress: Callable[[str], Callable[[int, int], None] | None]) -> None:
    """Add the family. `progress(unit)` makes what shows a job's progress."""
    _add_build(kinds)
    _add_extract(kinds, progress)
    _add_embed(kinds, progress)
    _add_choose(kinds, progress)
    _add_lists(kinds)


# ------------------------------------------------------------------------------------------- parsers


def _add_build(kinds: Subparsers) -> None:
    build = kinds.add_parser("build", help="caption lists from the raw layout of a data set")
    build.add_argument(
        "what",
        choices=("coco", "flickr30k", "vg", "sbu", "cc3m"),
        metavar="WHAT",
        help=(
            "coco, flickr30k (Karpathy's file), vg (region_descriptions.json), sbu (annot.json), "
            "cc3m (img2dataset's folder)"
        ),
    )
    build.add_argument("source", metavar="SOURCE", help="the file or folder named above")
    build.add_argument("out", metavar="OUT", help="list to write, .json or .parquet")
    build.add_argument(
        "--splits",
        nargs="+",
        metavar="NAME",
        help="coco, flickr30k: default train val; restval is a split of its own",
    )
    build.add_argument(
        "--folder", metavar="DIR", help="coco, flickr30k, cc3m: put before the names of images"
    )
    build.add_argument("--image-data", metavar="FILE", help="vg: image_data.json, for {folder}")
    build.add_argument(
        "--image-name", metavar="PATTERN", help="vg: default image/{id}.jpg; {folder} is VG_100K or VG_100K_2"
    )
    build.add_argument(
        "--root", default="", metavar="DIR", help="leave out rows whose image is not below DIR"
    )
    build.set_defaults(run=_build)


def _add_extract(kinds: Subparsers, progress: Callable[[str], Any]) -> None:
    extract = kinds.add_parser("extract", help="vocabulary of concepts from the captions of lists")
    extract.add_argument(
        "out", metavar="OUT", help="vocabulary to write, .json (names) or .parquet (with counts)"
    )
    extract.add_argument("lists", nargs="+", metavar="LIST", help=LIST_HELP)
    extract.add_argument(
        "--parts", required=True, metavar="DIR", help="folder of the job: what is finished is kept there"
    )
    extract.add_argument(
        "--field", default="", help="field of the texts (default caption, sentence, question or text)"
    )
    extract.add_argument(
        "--model", default="en_core_web_sm", metavar="NAME", help="spaCy model (default en_core_web_sm)"
    )
    extract.add_argument(
        "--parses",
        default="",
        metavar="FILE",
        help="parses made elsewhere, [{caption, words, pos, heads, deps}], instead of a model",
    )
    extract.add_argument(
        "--legacy",
        action="store_true",
        help="the rules of the released vocabularies: pronouns count, compounds are swapped",
    )
    extract.add_argument(
        "--min-count",
        type=int,
        default=2,
        metavar="N",
        help="mentions a concept needs (default 2; CC3M of the reference 4)",
    )
    extract.add_argument("--max-concepts", type=int, metavar="N", help="keep the N most frequent")
    extract.add_argument(
        "--processes",
        type=int,
        default=0,
        metavar="N",
        help="per parser (default: engine local one per core, ray one)",
    )
    _add_job(extract, rows=20000)
    extract.set_defaults(run=lambda options: _extract(options, progress("parts")))


def _add_embed(kinds: Subparsers, progress: Callable[[str], Any]) -> None:
    for name, help_text in (
        ("embed-concepts", "vectors of a vocabulary"),
        ("embed-captions", "vectors of the captions of lists, for filter"),
    ):
        texts = kinds.add_parser(name, help=help_text)
        texts.add_argument("out", metavar="OUT", help="folder of the job, read by choose and filter")
        if name == "embed-concepts":
            texts.add_argument("vocabulary", metavar="VOCABULARY", help=".json or .parquet")
        else:
            texts.add_argument("lists", nargs="+", metavar="LIST", help=LIST_HELP)
        _add_clip(texts, batch=256)
        _add_stored(texts)
        _add_job(texts, rows=20000)
        texts.set_defaults(run=lambda options: _embed_texts(options, progress("parts")))
    images = kinds.add_parser("embed-images", help="vectors of the images of lists, each image once")
    images.add_argument("out", metavar="OUT", help="folder of the job, read by choose and filter")
    images.add_argument("lists", nargs="+", metavar="LIST", help=LIST_HELP)
    _add_clip(images, batch=64)
    _add_images(images)
    _add_stored(images)
    _add_job(images, rows=4096)
    images.set_defaults(run=lambda options: _embed_images(options, progress("parts")))


def _add_choose(kinds: Subparsers, progress: Callable[[str], Any]) -> None:
    choose = kinds.add_parser(
        "choose",
        help="the k concepts nearest to each image, from saved vectors or in one pass over the images",
    )
    choose.add_argument("out", metavar="OUT", help="folder of the job, read by assign")
    choose.add_argument("--concepts", required=True, metavar="VECTORS", help="from embed-concepts")
    source = choose.add_mutually_exclusive_group(required=True)
    source.add_argument("--images", metavar="VECTORS", help="from embed-images, or the reference's .json")
    source.add_argument(
        "--lists", nargs="+", metavar="LIST", help="one pass over the images of these lists; with --clip"
    )
    choose.add_argument("--k", type=int, default=15, help="concepts per image (default 15)")
    _add_clip(choose, batch=64, required=False)
    _add_images(choose)
    _add_job(choose, rows=4096)
    choose.set_defaults(run=lambda options: _choose(options, progress("parts")))


def _add_lists(kinds: Subparsers) -> None:
    assign = kinds.add_parser(
        "assign", help="lists with the concepts of their images: kwords, for pairs kwords1 and kwords2"
    )
    assign.add_argument("out", metavar="OUT", help="list to write, .json or .parquet")
    assign.add_argument("lists", nargs="+", metavar="LIST", help=LIST_HELP)
    assign.add_argument("--choices", required=True, metavar="DIR", help="from choose")
    assign.add_argument(
        "--root",
        default="",
        metavar="DIR",
        help="put before the images of the list to find them among the choices",
    )
    assign.add_argument(
        "--missing",
        choices=("error", "drop", "keep"),
        default="error",
        help="rows whose image has no concepts: stop, leave them out, or keep them without (default error)",
    )
    assign.set_defaults(run=_assign)

    keep = kinds.add_parser("filter", help="keep the captions nearest to their images")
    keep.add_argument("out", metavar="OUT", help="list to write, .json or .parquet")
    keep.add_argument("lists", nargs="+", metavar="LIST", help=LIST_HELP)
    keep.add_argument("--keep", type=float, required=True, metavar="FRACTION", help="above 0, at most 1")
    keep.add_argument(
        "--per-image",
        action="store_true",
        help="the fraction of each image's captions (default: of all rows)",
    )
    keep.add_argument(
        "--legacy",
        action="store_true",
        help="with --per-image: lose images whose share is below one caption, as the reference does",
    )
    keep.add_argument(
        "--images", metavar="VECTORS", help="from embed-images (default: take the scores in the field sim)"
    )
    keep.add_argument("--captions", metavar="VECTORS", help="from embed-captions")
    keep.add_argument(
        "--root", default="", metavar="DIR", help="put before the images of the list to find their vectors"
    )
    keep.add_argument("--scored", metavar="FILE", help="also write all rows with their scores")
    keep.set_defaults(run=_filter)

    convert = kinds.add_parser(
        "convert", help="between the reference's .json and .parquet, and paths of images to another place"
    )
    convert.add_argument(
        "what", choices=("list", "vectors", "vocabulary"), metavar="WHAT", help="list, vectors or vocabulary"
    )
    convert.add_argument("source", metavar="SOURCE", help=".json, .parquet, or the folder of a job")
    convert.add_argument("out", metavar="OUT", help=".json or .parquet")
    _add_prefixes(convert)
    convert.set_defaults(run=_convert)


def _add_job(parser: argparse.ArgumentParser, *, rows: int) -> None:
    group = parser.add_argument_group("where it runs; what is finished is kept, and the same command goes on")
    group.add_argument("--engine", choices=("local", "ray"), default="local", help="default local")
    group.add_argument("--rows-per-shard", type=int, default=rows, metavar="N", help=f"default {rows}")
    group.add_argument("--address", default="", help="ray: cluster to join (default: this machine)")
    group.add_argument(
        "--actors", type=int, default=1, metavar="N", help="ray: processes with a model each (default 1)"
    )
    group.add_argument("--cpus-per-actor", type=float, default=1, metavar="N", help="ray: default 1")
    group.add_argument("--gpus-per-actor", type=float, default=0, metavar="N", help="ray: default 0")


def _add_clip(parser: argparse.ArgumentParser, *, batch: int, required: bool = True) -> None:
    parser.add_argument(
        "--clip",
        required=required,
        metavar="NAME",
        help="local folder, name of open_clip (ViT-B-16), or owner/model of the hub",
    )
    parser.add_argument("--weights", default="", metavar="TAG", help="open_clip: tag (openai) or file")
    parser.add_argument(
        "--library",
        choices=("auto", "open_clip", "transformers"),
        default="auto",
        help="default: told by the name",
    )
    parser.add_argument("--device", default="auto", help="default: the GPU if there is one")
    parser.add_argument(
        "--dtype",
        choices=("float32", "float16", "bfloat16"),
        default="float32",
        help="of the model (default float32)",
    )
    parser.add_argument("--batch", type=int, default=batch, metavar="N", help=f"default {batch}")


def _add_stored(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--stored", choices=("float16", "float32"), default="float16", help="of the vectors (default float16)"
    )


def _add_images(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--suffix", default="", metavar=".EXT", help="of images named without one (SNLI-VE: .jpg)"
    )
    parser.add_argument(
        "--threads",
        type=int,
        default=0,
        metavar="N",
        help="images decoded at a time (default: one per core; ray: the cpus of an actor)",
    )
    parser.add_argument(
        "--scheme",
        action="append",
        default=[],
        metavar="NAME",
        help="images may be URLs of this scheme (s3, https, ...); may be repeated",
    )
    _add_prefixes(parser)


def _add_prefixes(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--root", default="", metavar="DIR", help="folder or URL that images are relative to")
    parser.add_argument(
        "--prefix",
        action="append",
        default=[],
        metavar="OLD=NEW",
        help=(
            "replace the beginning of paths (where none fits, and with --root, "
            "/data/USER/data/ of the released lists is dropped)"
        ),
    )


# ---------------------------------------------------------------------------------------------- options


def _prefixes(texts: list[str]) -> dict[str, str]:
    bad = [text for text in texts if "=" not in text or text.startswith("=")]
    if bad:
        raise ValueError(f"--prefix {bad[0]}: expected OLD=NEW")
    return {old: new for old, _, new in (text.partition("=") for text in texts)}


def _clip(options: argparse.Namespace) -> "Clip":
    from vlp_data.concepts.encoders import Clip

    return Clip(
        name=options.clip,
        weights=options.weights,
        library=options.library,
        device=options.device,
        dtype=options.dtype,
    )


def _images(options: argparse.Namespace) -> "ImageFiles":
    from vlp_data.concepts.embed import ImageFiles

    return ImageFiles(
        root=options.root,
        prefixes=_prefixes(options.prefix),
        suffix=options.suffix,
        schemes=tuple(options.scheme),
        batch=options.batch,
        # Actors share a machine.
        threads=options.threads or (0 if options.engine == "local" else max(1, int(options.cpus_per_actor))),
    )


def _engine(options: argparse.Namespace) -> "Engine":
    from vlp_data.concepts.jobs import Engine

    return Engine(
        engine=options.engine,
        address=options.address,
        actors=options.actors,
        cpus_per_actor=options.cpus_per_actor,
        gpus_per_actor=options.gpus_per_actor,
    )


def _run(options: argparse.Namespace, job: "Job", work: "Work", progress: Any) -> "Done":
    from vlp_data.concepts.jobs import run

    try:
        done = run(job, work, _engine(options), progress=progress)
    except KeyboardInterrupt:
        left = len(job.unfinished())
        raise OSError(
            f"interrupted with {len(job.shards) - left} of {len(job.shards)} parts finished in {job.folder}; "
            "the same command goes on from there"
        ) from None
    print(f"{job.folder}: {done.computed} parts computed, {done.found} were finished before")
    return done


def _report_problems(folder: str, column: str) -> int:
    """Print what could not be read; returns how many."""
    from vlp_data.concepts.tables import read_table

    table = read_table(folder, [column, "problem"])
    bad = table.filter(table["problem"].is_valid())
    for problem in bad["problem"].to_pylist()[:10]:
        print(problem, file=sys.stderr)
    print(f"{folder}: {table.num_rows - bad.num_rows} images, {bad.num_rows} that cannot be used")
    return bad.num_rows


# --------------------------------------------------------------------------------------------- commands


def _build(options: argparse.Namespace) -> int:
    from vlp_data.concepts import build, tables

    given = {
        name: value
        for name in ("splits", "folder", "image_data", "image_name")
        if (value := getattr(options, name)) is not None
    }
    takes = {"coco": ("splits", "folder"), "vg": ("image_data", "image_name"), "sbu": (), "cc3m": ("folder",)}
    takes["flickr30k"] = takes["coco"]
    unused = [f"--{name.replace('_', '-')}" for name in given if name not in takes[options.what]]
    if unused:
        raise ValueError(f"build {options.what} takes no {', '.join(unused)}")
    if "splits" in given:
        given["splits"] = tuple(given["splits"])
    make: dict[str, Callable[..., build.Built]] = {
        "coco": build.karpathy,
        "flickr30k": build.karpathy,
        "vg": build.visual_genome,
        "sbu": build.sbu,
        "cc3m": build.cc3m,
    }
    found = make[options.what](options.source, root=options.root, **given)
    tables.write_list(options.out, found.rows)
    print(f"{options.out}: {found.rows.num_rows} captions")
    for cause, number in found.left_out.items():
        print(f"{cause}: {number}")
    return 0


def _extract(options: argparse.Namespace, progress: Any) -> int:
    import pyarrow as pa

    from vlp_data.concepts import extract, jobs, tables

    # Checked before hours of parsing.
    extract.vocabulary({}, min_count=options.min_count, max_concepts=options.max_concepts)
    captions = extract.captions_of(tables.read_list(options.lists), options.field)
    cores = os.cpu_count() or 1
    work = extract.CountConcepts(
        model=options.model,
        parses=options.parses,
        legacy=options.legacy,
        processes=options.processes or (cores if options.engine == "local" else 1),
    )
    job = jobs.items_job(
        options.parts, work, pa.table({"text": captions}), rows_per_shard=options.rows_per_shard
    )
    _run(options, job, work, progress)
    counts = extract.counts_of(tables.read_table(options.parts))
    kept = extract.vocabulary(counts, min_count=options.min_count, max_concepts=options.max_concepts)
    tables.write_vocabulary(options.out, kept)
    print(f"{options.out}: {len(kept)} of {len(counts)} concepts in {len(captions)} captions")
    return 0


def _embed_texts(options: argparse.Namespace, progress: Any) -> int:
    import pyarrow as pa

    from vlp_data.concepts import embed, extract, jobs, tables

    if hasattr(options, "vocabulary"):
        keys = pa.array(list(tables.read_vocabulary(options.vocabulary)), pa.string())
    else:
        keys = extract.captions_of(tables.read_list(options.lists), "caption").unique()
    work = embed.EmbedTexts(clip=_clip(options), batch=options.batch, stored=options.stored)
    job = jobs.items_job(options.out, work, pa.table({"key": keys}), rows_per_shard=options.rows_per_shard)
    _run(options, job, work, progress)
    return 0


def _keys_of_lists(lists: list[str]) -> Any:
    import pyarrow as pa

    from vlp_data.concepts import select, tables

    return pa.table({"key": select.distinct_images(tables.read_list(lists))})


def _embed_images(options: argparse.Namespace, progress: Any) -> int:
    from vlp_data.concepts import embed, jobs

    work = embed.EmbedImages(clip=_clip(options), images=_images(options), stored=options.stored)
    items = _keys_of_lists(options.lists)
    job = jobs.items_job(options.out, work, items, rows_per_shard=options.rows_per_shard)
    _run(options, job, work, progress)
    return 1 if _report_problems(options.out, "key") else 0


def _choose(options: argparse.Namespace, progress: Any) -> int:
    from vlp_data.concepts import jobs, select, tables

    if options.lists:
        if not options.clip:
            raise ValueError("--lists needs --clip: the images have to be embedded")
        work: Work = select.ChooseInOnePass(
            concepts=options.concepts, clip=_clip(options), images=_images(options), k=options.k
        )
        items = _keys_of_lists(options.lists)
        job = jobs.items_job(options.out, work, items, rows_per_shard=options.rows_per_shard)
    else:
        if options.clip or options.root or options.prefix or options.scheme:
            raise ValueError(
                "--clip, --root, --prefix and --scheme belong to --lists: saved vectors need no images"
            )
        work = select.ChooseSaved(concepts=options.concepts, k=options.k, device=options.device)
        if options.images.endswith((".json", ".json.gz")):
            items = tables.read_vector_table(options.images)
            job = jobs.items_job(options.out, work, items, rows_per_shard=options.rows_per_shard)
        else:
            single = options.images.endswith(".parquet")
            parts = [options.images] if single else jobs.finished_parts(options.images)
            job = jobs.files_job(options.out, work, parts)
    _run(options, job, work, progress)
    return 1 if _report_problems(options.out, "image") else 0


def _assign(options: argparse.Namespace) -> int:
    from vlp_data.concepts import select, tables

    found = select.assign(
        tables.read_list(options.lists),
        tables.read_table(options.choices),
        root=options.root,
        missing=options.missing,
    )
    tables.write_list(options.out, found.rows)
    print(f"{options.out}: {found.rows.num_rows} rows")
    if found.without:
        what = "left out" if options.missing == "drop" else "kept without concepts"
        print(f"{what}: the rows of {len(found.without)} images")
    return 0


def _filter(options: argparse.Namespace) -> int:
    from vlp_data.concepts import filtering, tables

    if bool(options.images) != bool(options.captions):
        raise ValueError("--images and --captions belong together")
    if options.legacy and not options.per_image:
        raise ValueError("--legacy changes --per-image alone")
    rows = tables.read_list(options.lists)
    if options.images:
        images, captions = (tables.read_vectors(path) for path in (options.images, options.captions))
        rows = filtering.score(rows, images, captions, root=options.root)
    elif options.root:
        raise ValueError("--root belongs to --images: stored scores need no images")
    if options.per_image:
        kept = filtering.best_per_image(rows, options.keep, keep_one=not options.legacy)
    else:
        kept = filtering.best(rows, options.keep)
    if options.scored:
        tables.write_list(options.scored, rows)
    tables.write_list(options.out, kept)
    print(f"{options.out}: {kept.num_rows} of {rows.num_rows} rows")
    return 0


def _convert(options: argparse.Namespace) -> int:
    from vlp_data import paths
    from vlp_data.concepts import tables

    moved = bool(options.root or options.prefix)
    if options.what == "vocabulary":
        if moved:
            raise ValueError("--root and --prefix are for lists and vectors of images")
        tables.write_vocabulary(options.out, tables.read_vocabulary(options.source))
        return 0
    prefixes = _prefixes(options.prefix)

    def move(path: str) -> str:
        return paths.rebase(path, prefixes=prefixes, root=options.root)

    if options.what == "list":
        table = tables.read_list(options.source)
        tables.write_list(options.out, tables.with_images(table, move) if moved else table)
    else:
        vectors = tables.read_vectors(options.source)
        tables.write_vectors(options.out, vectors.renamed(move) if moved else vectors)
    return 0
