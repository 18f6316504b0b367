"""The order of samples: a pure function of (seed, position), the same on every rank and for every number of
workers.

Position counts samples since the start of training, over all ranks and epochs. Epoch e is positions [e*N,
(e+1)*N); global batch t of size G is positions [t*G, (t+1)*G), of which rank r takes the r-th part. Batches
run across epoch ends, so nothing is dropped, and a run resumes on another number of ranks with the same
global batches.

Samples are shuffled one by one, or file by file (`Runs`): then the files come in random order and the samples
of a file in theirs, so that a rank reads its part of every global batch in one piece. X-VLM gives each rank
and worker whole files instead (specification 5.4), which needs as many files as ranks times workers, reads
lines twice or never where workers shuffle by themselves (8.4), and gives other batches on another number of
ranks.
"""

import random
from typing import NamedTuple

import numpy as np


def generator(*parts: int | str) -> random.Random:
    """A generator whose state depends on `parts` alone (Python hashes strings with SHA-512 here, on every
    platform)."""
    return random.Random("/".join(str(part) for part in parts))


def share(count: int, part: int, parts: int) -> range:
    """Part `part` of `count` things split evenly over `parts`: [count*part//parts, count*(part+1)//parts)."""
    return range(count * part // parts, count * (part + 1) // parts)


class Runs(NamedTuple):
    """Samples that lie in files and are read file after file."""

    lengths: tuple[int, ...]
    """Samples of each file; they have consecutive indices."""
    buffer: int = 0
    """Samples are mixed with those up to so many places away, as a shuffle buffer of this size does; 0 keeps
    their order."""


class Order:
    """Endless order over `length` samples: one permutation per epoch, drawn from (seed, epoch). `runs`: file
    after file."""

    def __init__(self, length: int, seed: int, *, runs: Runs | None = None) -> None:
        if length <= 0:
            raise ValueError("the source holds no samples")
        if runs is not None and sum(runs.lengths) != length:
            raise ValueError(f"the runs hold {sum(runs.lengths)} samples, the source {length}")
        self.length, self.seed, self.runs = length, seed, runs
        self._epoch, self._permutation = -1, np.empty(0, dtype=np.int64)

    def permutation(self, epoch: int) -> np.ndarray:
        """Indices of the samples in the order of this epoch, int64 [length]."""
        if epoch != self._epoch:
            self._epoch = epoch
            self._permutation = (
                _shuffled(self.length, self.seed, epoch)
                if self.runs is None
                else _file_by_file(self.runs, self.seed, epoch)
            )
        return self._permutation

    def indices(self, position: int, count: int) -> list[tuple[int, int]]:
        """(epoch, index) of positions [position, position + count)."""
        taken: list[tuple[int, int]] = []
        while count > 0:
            epoch, start = divmod(position, self.length)
            part = self.permutation(epoch)[start : start + count].tolist()
            taken += [(epoch, index) for index in part]
            position, count = position + len(part), count - len(part)
        return taken


def _words(count: int, *key: int) -> np.ndarray:
    """Uniform 64-bit words. NumPy promises stable raw streams, not stable methods of its generators."""
    return np.random.Philox(np.random.SeedSequence(key)).random_raw(count)


def _shuffled(count: int, *key: int) -> np.ndarray:
    return np.argsort(_words(count, *key), kind="stable")


def _file_by_file(runs: Runs, seed: int, epoch: int) -> np.ndarray:
    lengths = np.array(runs.lengths, dtype=np.int64)
    starts = np.cumsum(lengths) - lengths
    files = _shuffled(len(lengths), seed, epoch, 1)
    order = np.concatenate([np.arange(starts[f], starts[f] + lengths[f]) for f in files])
    if runs.buffer > 0:
        words = _words(len(order), seed, epoch, 2)
        moved = ((words >> np.uint64(32)) * np.uint64(runs.buffer)) >> np.uint64(32)
        order = order[np.argsort(np.arange(len(order)) + moved.astype(np.int64), kind="stable")]
    return order
