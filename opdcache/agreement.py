"""How far two models' stored entries of the same tokens are apart, as far as both are stored.

Legend: T tokens, S entries that the one keeps, K that the other keeps.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from .store.scores import TopK

Values = NDArray[np.float64]
_LEAST = -1e4
"""Log-masses below this, in nats, are taken for this, as the store takes log-probs."""


def places(
    ids_TS: NDArray[np.int32],
    num_T: NDArray[np.integer],
    other_ids_TK: NDArray[np.int32],
    other_num_T: NDArray[np.integer],
) -> NDArray[np.int64]:
    """Int [T, S]: the place of each kept entry among the other's kept ones; K when it has none.

    Args:
        num_T, other_num_T: how many entries of each token are kept ones.
    """
    num_tokens, most = other_ids_TK.shape
    there_TK = np.arange(most) < other_num_T[:, None]
    named_TK = np.where(there_TK, other_ids_TK, -1)
    place_TS = np.full(ids_TS.shape, most, np.int64)
    for place in range(ids_TS.shape[1]):
        same_TK = named_TK == ids_TS[:, place, None]
        first_T = same_TK.argmax(axis=1) if most else np.zeros(num_tokens, np.int64)
        held_T = same_TK.any(axis=1) & (place < num_T)
        place_TS[held_T, place] = first_T[held_T]
    return place_TS


@dataclass(frozen=True, slots=True)
class Local:
    """Two models on the entries that both keep, float64 [T] each.

    A KL is that of two distributions whose outcomes are these entries and one more for all the
    rest, which has the mass of either's other entries and of its stored tail. What that leaves out
    of the full KL is never negative, since no KL grows when outcomes are put together. Both are
    made to sum to 1 first: rounded log-probs do so within half a step only.

    Attributes:
        kl, kl_back: KL(one || other) and KL(other || one), nats, at most the full ones.
        mass, other_mass: each one's mass on the entries.
    """

    kl: Values
    kl_back: Values
    mass: Values
    other_mass: Values


@dataclass(frozen=True, slots=True)
class Matched:
    """Two models' likeliest entries of the same tokens, matched by id.

    Attributes:
        place_TS: int [T, S], where each entry of the one is among the other's; K where it is not.
    """

    one: TopK
    other: TopK
    place_TS: NDArray[np.int64]

    @classmethod
    def of(cls, one: TopK, other: TopK) -> "Matched":
        """Match them."""
        return cls(one, other, places(one.ids, one.num_kept, other.ids, other.num_kept))

    @property
    def both_TS(self) -> NDArray[np.bool_]:
        """Which entries of the one the other keeps too."""
        both: NDArray[np.bool_] = self.place_TS < self.other.ids.shape[1]
        return both

    @property
    def differences_TS(self) -> Values:
        """The other's log-prob less the one's, nats; NaN at entries that one of them lacks."""
        return np.where(self.both_TS, self._theirs_TS - self.one.logprobs, np.nan)

    @property
    def same_first_T(self) -> NDArray[np.bool_]:
        """Whether the likeliest entries are the same."""
        same: NDArray[np.bool_] = (self.place_TS[:, :1] == 0).any(axis=1)
        return same

    @property
    def kept_by_both_T(self) -> Values:
        """Entries that both keep, as a share of those of whoever keeps fewer; NaN of none."""
        fewer = np.minimum(self.one.num_kept, self.other.num_kept)
        return np.where(fewer > 0, self.both_TS.sum(axis=1) / np.maximum(fewer, 1), np.nan)

    def local(self) -> Local:
        """Both as distributions over the entries that both keep and one bucket for the rest."""
        ours, theirs = self._buckets()
        masses = [np.exp(np.logaddexp.reduce(v[:, :-1], axis=1)) for v in (ours, theirs)]
        ours, theirs = _normalised(ours), _normalised(theirs)
        return Local(_kl(ours, theirs), _kl(theirs, ours), *masses)

    @property
    def _theirs_TS(self) -> Values:
        """The other's log-probs at the one's entries; anything where it has none."""
        place_TS = np.minimum(self.place_TS, max(0, self.other.ids.shape[1] - 1))
        return np.take_along_axis(self.other.logprobs, place_TS, axis=1).astype(np.float64)

    def _buckets(self) -> tuple[Values, Values]:
        """Log-masses [T, S + 1] of either: entries that both keep, the others -inf; the rest."""
        both_TS = self.both_TS
        theirs_TK = np.zeros((len(both_TS), self.other.ids.shape[1] + 1), np.bool_)
        np.put_along_axis(theirs_TK, self.place_TS, True, axis=1)
        ours = np.where(both_TS, self.one.logprobs.astype(np.float64), -np.inf)
        theirs = np.where(both_TS, self._theirs_TS, -np.inf)
        rests = _rest(self.one, both_TS), _rest(self.other, theirs_TK[:, :-1])
        one, other = (np.column_stack([v, r]) for v, r in zip((ours, theirs), rests, strict=True))
        return one, other


def _rest(topk: TopK, shared_TK: NDArray[np.bool_]) -> Values:
    """Log-mass, [T], of all but the shared entries."""
    alone = np.where(topk.kept & ~shared_TK, topk.logprobs.astype(np.float64), -np.inf)
    alone_T: Values = np.logaddexp.reduce(alone, axis=1)
    rest: Values = np.logaddexp(alone_T, topk.tail_logprobs.astype(np.float64))
    return np.maximum(rest, _LEAST)


def _normalised(logs_TB: Values) -> Values:
    total_T: Values = np.logaddexp.reduce(logs_TB, axis=1)
    return logs_TB - total_T[:, None]


def _kl(log_p_TB: Values, log_q_TB: Values) -> Values:
    """KL of distributions over the same buckets, [T]; a bucket of no mass adds nothing."""
    p_TB = np.exp(log_p_TB)
    with np.errstate(invalid="ignore"):
        terms_TB = np.where(p_TB > 0, p_TB * (log_p_TB - log_q_TB), 0.0)
    kl_T: Values = terms_TB.sum(axis=1)
    return np.maximum(kl_T, 0.0)  # what is below 0 is float64's own rounding
