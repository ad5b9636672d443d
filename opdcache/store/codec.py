"""Teacher log-probs as small integers, and back, with a declared error bound.

Log-probs are natural, at temperature 1, normalised over the full vocabulary. A value is rounded to
a level of one grid, whose spacing is ``step`` down to -1 nat, and ``step`` times the value's size
below. So an entry is off by at most ``step / 2`` nats or that share of itself, whichever is more:
likely entries, which the losses weigh most, are the exact ones. Values below ``clip_floor(step)``
are stored as the floor.

A token's kept entries descend, so each is stored as its drop in levels from the one before: the
roundings do not add up, since the grid is shared. Ids are stored as their frequency rank in the
shard, which makes the common ones small.

Legend: T tokens, K kept entries a token.
"""

import math
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..errors import InvalidShard

Floats = NDArray[np.float32]
Ints = NDArray[np.int32]
_LOWEST = -1e4
"""Below this, in nats, no log-prob is told from another."""


def clip_floor(step: float) -> float:
    """Log-probs below this, in nats, are stored as this."""
    return float(_grid(step)[-1])


@lru_cache(maxsize=8)
def _grid(step: float) -> Floats:
    """The log-prob of every level: ``-u`` for ``u = level * step`` up to 1, ``-exp(u - 1)`` on."""
    levels = min(2**16, int((1 + math.log(-_LOWEST)) / step) + 1)
    u = step * np.arange(levels)
    grid: Floats = (-np.minimum(u, 1) * np.exp(np.maximum(u - 1, 0))).astype(np.float32)
    return grid


def encode_logprobs(logprobs: Floats, step: float) -> NDArray[np.uint16]:
    """Log-probs of any shape as levels; ``-inf`` becomes the clip floor.

    Raises:
        InvalidShard: a value is NaN or above 0.
    """
    if np.isnan(logprobs).any() or (logprobs > 1e-3).any():
        raise InvalidShard("a log-prob is NaN or above 0", remedy="report the scoring backend")
    x = np.clip(-logprobs.astype(np.float64), 0, -_LOWEST)
    u = np.minimum(x, 1) + np.log(np.maximum(x, 1))
    levels: NDArray[np.uint16] = np.rint(u / step).clip(0, len(_grid(step)) - 1).astype(np.uint16)
    return levels


def decode_logprobs(
    levels: NDArray[np.unsignedinteger[Any]], step: float, out: Floats | None = None
) -> Floats:
    """Inverse of ``encode_logprobs``, within its bound above the clip floor.

    Raises:
        InvalidShard: a level is below the clip floor's.
    """
    grid = _grid(step)
    if levels.max(initial=0) >= len(grid):
        raise InvalidShard("a log-prob is below the clip floor", expected=f"level < {len(grid)}")
    return grid.take(levels, out=out, mode="clip")  # checked above: clipping skips a buffer


def encode_descending(
    logprobs_TK: Floats, num_kept: NDArray[np.uint16], step: float
) -> NDArray[np.uint16]:
    """Kept log-probs, likeliest first, as drops from the entry before; 0 past ``num_kept``.

    Raises:
        InvalidShard: a kept value is NaN or above 0, or a token's values do not descend.
    """
    kept_TK = kept_mask(num_kept, logprobs_TK.shape[1])
    levels_TK = encode_logprobs(np.where(kept_TK, logprobs_TK, 0), step).astype(np.int32)
    drops_TK = np.diff(levels_TK, axis=1, prepend=0)
    drops_TK[~kept_TK] = 0
    if (drops_TK < 0).any():
        row = int(np.argwhere((drops_TK < 0).any(axis=1))[0, 0])
        raise InvalidShard("kept log-probs do not descend", where=f"token {row}")
    return drops_TK.astype(np.uint16)


def decode_descending(
    drops_KT: NDArray[np.uint16], step: float, out: Floats | None = None
) -> Floats:
    """Inverse of ``encode_descending``, rank by rank; past ``num_kept`` the last kept value stands.

    Args:
        drops_KT: uint16 [K, T].
        out: float32 [K, T] to fill and return.

    Raises:
        InvalidShard: drops lead below the clip floor.
    """
    filled = np.empty(drops_KT.shape, np.float32) if out is None else out
    levels_T = np.zeros(drops_KT.shape[1:], np.uint32)
    for rank_T, drops_T in zip(filled, drops_KT, strict=True):
        levels_T += drops_T
        rank_T[:] = decode_logprobs(levels_T, step)
    return filled


def by_frequency(counts: NDArray[np.int64]) -> NDArray[np.uint32]:
    """Ids that are there, most frequent first, ties by id.

    Args:
        counts: how often each id is there, by id.
    """
    distinct = np.flatnonzero(counts)
    order = np.lexsort((distinct, -counts[distinct]))
    ranked: NDArray[np.uint32] = distinct[order].astype(np.uint32)
    return ranked


def encode_ids(
    ids_TK: Ints, num_kept: NDArray[np.uint16], rank_ids: NDArray[np.uint32]
) -> NDArray[np.unsignedinteger[Any]]:
    """Kept ids as ranks [T, K] in ``rank_ids``, which holds them all; 0 past ``num_kept``.

    Ranks are uint16 when that is wide enough, uint32 otherwise.
    """
    width = np.dtype(np.uint16 if len(rank_ids) <= 2**16 else np.uint32)
    rank_of: NDArray[np.unsignedinteger[Any]] = np.zeros(int(rank_ids.max(initial=0)) + 1, width)
    rank_of[rank_ids] = np.arange(len(rank_ids), dtype=width)
    ranks_TK = rank_of.take(ids_TK, mode="clip")
    ranks_TK[~kept_mask(num_kept, ids_TK.shape[1])] = 0
    return ranks_TK


def decode_ids(ranks: NDArray[np.unsignedinteger[Any]], rank_ids: Ints) -> Ints:
    """Inverse of ``encode_ids``, whatever the shape; past ``num_kept`` any valid id stands.

    Raises:
        InvalidShard: a rank is not in the table.
    """
    if len(rank_ids) == 0:
        rank_ids = np.zeros(1, np.int32)
    try:
        return rank_ids.take(ranks)
    except IndexError as error:
        raise InvalidShard("a rank is not in rank_ids", expected=f"< {len(rank_ids)}") from error


def kept_mask(num_kept: NDArray[np.uint16], width: int) -> NDArray[np.bool_]:
    """[T, width]: which entries are kept ones."""
    return np.arange(width) < num_kept[:, None]
