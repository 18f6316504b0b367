"""Samples per second of the training loader, as a share of bare decoding of the same images.

    python benchmarks/loader.py [--pixels 256] [--workers 0 1 2] [--save]

Draws a shapes world in a temporary folder. "Decoding" reads and decodes the files and does nothing else, in
one process: the most that one worker could deliver. The loader crops, resizes, augments, normalises, cleans
and masks the texts, collates, and hands batches over.
"""

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from common import machine, save, table
from vlp_data import shapes
from vlp_data.examples import ImageTextExamples, RegionExamples
from vlp_data.images import open_image
from vlp_data.loader import Loader
from vlp_data.options import ImageTextLines, RegionLines, Squash
from vlp_data.schema import Source
from vlp_data.text import Tokenizer

BATCH, BATCHES, WARMUP = 32, 12, 2


def decoding(source: Source, size: int | None) -> float:
    """Images per second of reading and decoding, and of the resize and normalisation that an evaluation does
    when `size` is given."""
    rows = range(BATCH * BATCHES)
    start = time.perf_counter()
    for row in rows:
        sample = source[row % len(source)]
        image = open_image(sample.images[0], sample.key)
        if size is not None:
            Squash(size=size).evaluate(image)
    return len(rows) / (time.perf_counter() - start)


def loading(make: Callable[[], Loader]) -> float:
    """Lines per second once the workers are running."""
    with make() as loader:
        for _ in range(WARMUP):
            next(loader)
        start = time.perf_counter()
        for _ in range(BATCHES):
            next(loader)
        return BATCH * BATCHES / (time.perf_counter() - start)


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--images", type=int, default=400, help="images to draw")
    parser.add_argument("--pixels", type=int, default=256, help="side of the images and of the model's input")
    parser.add_argument("--workers", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--save", action="store_true", help="write benchmarks/results/loader.json")
    options = parser.parse_args()
    torch.set_num_threads(1)  # as in a worker: one process, one core
    with tempfile.TemporaryDirectory() as folder:
        world = shapes.ensure(Path(folder) / "world", images=options.images, seed=0, size=options.pixels)
        images = ImageTextLines(files=(f"{world}/xvlm/images_train",), root=str(world)).open()
        regions = RegionLines(files=(f"{world}/xvlm/regions_train",), root=str(world)).open()
        common = {
            "tokenizer": Tokenizer.wordpiece(world / "vocab.txt"),
            "image": Squash(size=options.pixels),
        }
        kinds = {
            "images": ImageTextExamples(source=images, **common),
            "regions": RegionExamples(source=regions, batch_texts=2 * BATCH, patch_size=32, **common),
        }
        runs: dict[str, Callable[[], float]] = {
            "decoding": lambda: decoding(images, None),
            "decoding, resize, normalise": lambda: decoding(images, options.pixels),
        }
        for kind, examples in kinds.items():
            for workers in options.workers:
                runs[f"loader, {kind}, {workers} workers"] = lambda examples=examples, workers=workers: (
                    loading(lambda: Loader(examples, global_batch=BATCH, seed=0, workers=workers))
                )
        rates: dict[str, list[float]] = {name: [] for name in runs}
        for _ in range(options.repeats):
            for name, run in runs.items():
                rates[name].append(run())
    bare = rates["decoding"]
    share = {
        name: statistics.median(rate / base for rate, base in zip(found, bare, strict=True))
        for name, found in rates.items()
    }
    rows = [["", "images/s", "of bare decoding"]]
    rows += [[name, f"{statistics.median(found):.0f}", f"{share[name]:.2f}"] for name, found in rates.items()]
    print(f"images of {options.pixels} x {options.pixels}, batches of {BATCH}, {machine()['cores']} cores\n")
    print(table(rows))
    if options.save:
        results = {
            "pixels": options.pixels,
            "images_per_second": {name: statistics.median(found) for name, found in rates.items()},
            "share_of_decoding": share,
        }
        print(f"{save('loader', results)} written")
    return 0


if __name__ == "__main__":
    sys.exit(main())
