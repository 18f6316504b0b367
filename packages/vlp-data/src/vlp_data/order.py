"""The order of samples: a pure function of (seed, position), the same on every rank and for every number of workers.

Position counts samples since the start of training, over all ranks and epochs. Epoch e is positions [e*N, (e+1)*N); global batch t
of size G is positions [t*G, (t+1)*G), of which rank r takes the r-th part. Batches run across epoch ends, so nothing is dropped,
and a run resumes on another number of ranks with the same global batches.
"""

import random

import numpy as np


def generator(*parts: int | str) -> random.Random:
    """A generator whose state depends on `parts` alone (Python hashes strings with SHA-512 here, on every platform)."""
    return random.Random("/".join(str(part) for part in parts))


class Order:
    """Endless shuffled order over `length` samples: one permutation per epoch, drawn from (seed, epoch)."""

    def __init__(self, length: int, seed: int) -> None:
        if length <= 0:
            raise ValueError("the source holds no samples")
        self.length, self.seed = length, seed
        self._epoch, self._permutation = -1, np.empty(0, dtype=np.int64)

    def permutation(self, epoch: int) -> np.ndarray:
        """Indices of the samples in the order of this epoch, int64 [length]."""
        if epoch != self._epoch:
            # Sorting raw counter-based numbers, not Generator.permutation: NumPy promises stable raw streams, not stable methods.
            words = np.random.Philox(np.random.SeedSequence((self.seed, epoch))).random_raw(self.length)
            self._epoch, self._permutation = epoch, np.argsort(words, kind="stable")
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
