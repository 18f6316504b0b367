"""Seconds to choose the 15 nearest of 30,000 concepts for 100,000 images, against one matrix product of that
size.

    python benchmarks/concepts.py [--images 100000] [--concepts 30000] [--save]

Vectors are random unit vectors of 512 numbers. "Matrix product" multiplies all of them, block after block
into the same memory, and does nothing
else: the least that any exact choice can cost. "Per row" is the procedure of the reference, one image after
the other: normalise all concepts, multiply, take the highest; in float32, since processors have no fast
float16. It is timed on a few rows and multiplied up, because all of them would take hours; the result says
so.
"""

import argparse
import os
import sys
from collections.abc import Callable

import torch
from common import interleaved, machine, median, ratio, save, table
from torch.nn import functional as F
from vlp_data.concepts.select import BLOCK_BYTES, nearest


def product(images: torch.Tensor, concepts: torch.Tensor) -> None:
    """All cosines, nothing kept."""
    columns = concepts.T.contiguous()
    rows = max(1, BLOCK_BYTES // (4 * len(concepts)))
    block = torch.empty(rows, len(concepts))
    for start in range(0, len(images), rows):
        part = images[start : start + rows]
        torch.mm(part, columns, out=block[: len(part)])


def per_row(images: torch.Tensor, concepts: torch.Tensor, k: int) -> list[torch.Tensor]:
    """The reference's procedure."""
    return [
        (F.normalize(image, dim=-1) @ F.normalize(concepts, dim=-1).T).topk(k).indices for image in images
    ]


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--images", type=int, default=100_000)
    parser.add_argument("--concepts", type=int, default=30_000)
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--k", type=int, default=15)
    parser.add_argument("--sample", type=int, default=40, help="rows that the per-row procedure is timed on")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--save", action="store_true", help="write benchmarks/results/concepts.json")
    options = parser.parse_args()
    generator = torch.Generator().manual_seed(0)
    images, concepts = (
        F.normalize(torch.randn(count, options.width, generator=generator), dim=-1)
        for count in (options.images, options.concepts)
    )
    sample = images[: options.sample]
    found = nearest(sample, concepts, k=options.k)
    assert all(
        set(ours.tolist()) == set(theirs.tolist())
        for ours, theirs in zip(found.ids, per_row(sample, concepts, options.k), strict=True)
    )
    runs: dict[str, Callable[[], object]] = {
        "matrix product": lambda: product(images, concepts),
        f"choosing {options.k}": lambda: nearest(images, concepts, k=options.k),
        "per row": lambda: per_row(sample, concepts, options.k),
    }
    seconds = interleaved(runs, repeats=options.repeats, warmup=0)
    seconds["per row"] = [taken * len(images) / len(sample) for taken in seconds["per row"]]
    ours = seconds[f"choosing {options.k}"]
    ratios = {
        "of a matrix product": ratio(ours, seconds["matrix product"]),
        "per row, of ours": ratio(seconds["per row"], ours),
    }
    load = f", load {os.getloadavg()[0]:.1f}" if hasattr(os, "getloadavg") else ""
    print(
        f"{options.k} of {options.concepts} concepts for {options.images} images, width {options.width}, "
        f"{machine()['cores']} cores{load}\n"
    )
    rows = [["", "seconds", "least", "most"]]
    rows += [[name, *(f"{f(taken):.1f}" for f in (median, min, max))] for name, taken in seconds.items()]
    print(table(rows))
    print(f"\n'per row' is extrapolated from {len(sample)} rows")
    print(f"choosing takes {ratios['of a matrix product']:.2f} x a matrix product (at most 2)")
    print(f"per row takes {ratios['per row, of ours']:.0f} x choosing (at least 20)")
    if options.save:
        print(f"{save('concepts', {'options': vars(options), 'seconds': seconds, 'ratios': ratios})} written")
    return 0 if ratios["of a matrix product"] <= 2 and ratios["per row, of ours"] >= 20 else 1


if __name__ == "__main__":
    sys.exit(main())
