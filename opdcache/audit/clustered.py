"""Means over tokens, with errors that know that a completion's tokens are no independent ones."""

import math
from collections import defaultdict
from collections.abc import Hashable

import numpy as np
from numpy.typing import NDArray

from ..schemas.comparison import Estimate


class ClusteredSums:
    """Sums over completions, by name, that can be added up. NaN is no value.

    The mean of all tokens is a ratio of two sums over completions, of values and of tokens. Its
    standard error is that ratio's, with completions as the independent draws (Cochran, "Sampling
    Techniques", 6.2), and needs no more than sums of squares and products.
    """

    def __init__(self) -> None:
        self._sums: dict[Hashable, NDArray[np.float64]] = defaultdict(lambda: np.zeros(6))

    def add(self, name: Hashable, values: NDArray[np.float64], rows: NDArray[np.int64]) -> None:
        """Put in tokens' values, and the completion of each.

        Args:
            rows: completions that are in no other call with this name.
        """
        there = ~np.isnan(values)
        counts = np.bincount(rows[there])
        sums = np.bincount(rows[there], weights=values[there])[counts > 0]
        counts = counts[counts > 0].astype(np.float64)
        self._sums[name] += [
            len(counts),
            counts.sum(),
            sums.sum(),
            counts @ counts,
            sums @ counts,
            sums @ sums,
        ]

    def merge(self, other: "ClusteredSums") -> None:
        """Put in what another one has, of other completions."""
        for name, sums in other._sums.items():
            self._sums[name] += sums

    def num(self, name: Hashable) -> int:
        """Tokens with a value."""
        return int(self._of(name)[1])

    def total(self, name: Hashable) -> float:
        """Sum of the values."""
        return float(self._of(name)[2])

    def estimate(self, name: Hashable) -> Estimate | None:
        """The mean over tokens; None of no values."""
        clusters, num, total, counts2, both, sums2 = self._of(name).tolist()
        if not num:
            return None
        mean = total / num
        if clusters < 2:
            return Estimate(mean=mean, standard_error=None)
        squares = max(0.0, sums2 - 2 * mean * both + mean**2 * counts2)
        error = math.sqrt(squares * clusters / (clusters - 1)) / num
        return Estimate(mean=mean, standard_error=error)

    def _of(self, name: Hashable) -> NDArray[np.float64]:
        return self._sums.get(name, np.zeros(6))
