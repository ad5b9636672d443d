"""How an update's sequences are dealt to the ranks, and cut into micro-batches."""

from collections.abc import Callable, Sequence
from heapq import heapreplace

import numpy as np

from ..schemas.training import Layout

Length = Callable[[Sequence[int]], int]
"""Tokens fed of the sequences that stand in one row."""


def deal(rows: Sequence[Sequence[int]], length: Length, num_ranks: int) -> list[list[int]]:
    """To each rank about as many tokens to feed: the longest row first, each to the rank that has
    least."""
    ranks = [(0, rank, list[int]()) for rank in range(num_ranks)]
    for row in by_length(rows, length):
        num_tokens, rank, mine = ranks[0]
        mine.extend(row)
        heapreplace(ranks, (num_tokens + length(row), rank, mine))
    return [mine for _, _, mine in sorted(ranks, key=lambda held: held[1])]


def cut(
    rows: Sequence[Sequence[int]], length: Length, max_tokens: int, layout: Layout
) -> list[list[int]]:
    """Rows of like length together, under a budget of tokens fed, padding included."""
    left, made = by_length(rows, length), []
    while left:
        size = max(1, max_tokens // length(left[0]))
        if layout == "packed":
            fed = np.cumsum([length(row) for row in left])
            size = max(1, int(np.searchsorted(fed, max_tokens, side="right")))
        made.append([sequence for row in left[:size] for sequence in row])
        left = left[size:]
    return made


def by_length(rows: Sequence[Sequence[int]], length: Length) -> list[Sequence[int]]:
    """The longest first."""
    return sorted(rows, key=lambda row: (-length(row), *row))
