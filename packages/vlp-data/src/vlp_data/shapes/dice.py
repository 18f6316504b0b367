"""Random numbers that are the same on every machine and with every library version.

NumPy promises that the raw words of a bit generator never change (NEP 19); it does not promise that for
`Generator.integers`, `choice` or `shuffle`. So only raw 64-bit words are taken from NumPy, and everything
else is integer arithmetic done here.
"""

from collections.abc import Sequence
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

T = TypeVar("T")


class Dice:
    """A stream of random choices that is a pure function of `key`.

    Args:
        key: non-negative integers below 2**32, for example (seed, index, purpose). Other keys give
            independent streams.
    """

    def __init__(self, *key: int) -> None:
        self._bits = np.random.PCG64(np.random.SeedSequence(key))

    def words(self, count: int) -> NDArray[np.uint64]:
        """`count` uniform 64-bit words."""
        return self._bits.random_raw(count)

    def below(self, bound: int) -> int:
        """An integer in [0, bound). The bias is below bound / 2**64."""
        return (int(self._bits.random_raw()) * bound) >> 64

    def between(self, low: int, high: int) -> int:
        """An integer in [low, high], both ends included."""
        return low + self.below(high - low + 1)

    def chance(self, percent: int) -> bool:
        """True in `percent` of 100 calls."""
        return self.below(100) < percent

    def choice(self, items: Sequence[T]) -> T:
        return items[self.below(len(items))]

    def weighted(self, items: Sequence[tuple[T, int]]) -> T:
        """One of the first members of `items`, with the integer weights that stand second."""
        rest = self.below(sum(weight for _, weight in items))
        for item, weight in items:
            if rest < weight:
                return item
            rest -= weight
        raise AssertionError("weights must be positive")

    def shuffled(self, items: Sequence[T]) -> list[T]:
        """A new list in random order (Fisher-Yates)."""
        out = list(items)
        for last in range(len(out) - 1, 0, -1):
            other = self.below(last + 1)
            out[last], out[other] = out[other], out[last]
        return out

    def sample(self, items: Sequence[T], count: int) -> list[T]:
        """`count` different members in random order."""
        return self.shuffled(items)[:count]
