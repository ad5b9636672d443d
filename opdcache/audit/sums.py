"""Sums that can be added up: what stays of very many tokens."""

from collections import defaultdict
from collections.abc import Hashable

import numpy as np
from numpy.typing import NDArray


class Sums:
    """Sums and counts of values by name and chunk of positions. NaN is no value."""

    def __init__(self) -> None:
        self._sums: dict[Hashable, NDArray[np.float64]] = defaultdict(lambda: np.zeros((2, 0)))

    def add(
        self, name: Hashable, values: NDArray[np.float64], chunks: NDArray[np.int64] | None = None
    ) -> None:
        """Put in values, and the chunk that each is of: the first by default."""
        there = ~np.isnan(values)
        where = np.zeros(int(there.sum()), np.int64) if chunks is None else chunks[there]
        sums = np.bincount(where, weights=values[there])
        self._add(name, np.stack([sums, np.bincount(where)]))

    def merge(self, other: "Sums") -> None:
        """Put in what another one has."""
        for name, both in other._sums.items():
            self._add(name, both)

    def coarser(self, together: int) -> "Sums":
        """The same, so many chunks in a row made one."""
        coarse = Sums()
        for name, both in self._sums.items():
            padded = np.pad(both, ((0, 0), (0, -both.shape[1] % together)))
            coarse._add(name, padded.reshape(2, -1, together).sum(axis=2))
        return coarse

    @property
    def num_chunks(self) -> int:
        """Chunks that anything is of."""
        return max((both.shape[1] for both in self._sums.values()), default=0)

    def names(self) -> list[Hashable]:
        """What was put in."""
        return list(self._sums)

    def total(self, name: Hashable, chunk: int | None = None) -> float:
        """Sum of a chunk, or of all."""
        return float(self._of(name, chunk)[0])

    def num(self, name: Hashable, chunk: int | None = None) -> int:
        """Values of a chunk, or of all."""
        return int(self._of(name, chunk)[1])

    def mean(self, name: Hashable, chunk: int | None = None) -> float | None:
        """Mean of a chunk, or of all; None of no values."""
        total, num = self._of(name, chunk)
        return float(total / num) if num else None

    def _of(self, name: Hashable, chunk: int | None) -> NDArray[np.float64]:
        both = self._sums.get(name, np.zeros((2, 0)))
        if chunk is None:
            return np.asarray(both.sum(axis=1))
        return both[:, chunk] if chunk < both.shape[1] else np.zeros(2)

    def _add(self, name: Hashable, both: NDArray[np.float64]) -> None:
        held = self._sums[name]
        width = max(held.shape[1], both.shape[1])
        self._sums[name] = sum(
            (np.pad(one, ((0, 0), (0, width - one.shape[1]))) for one in (held, both)),
            np.zeros((2, width)),
        )
