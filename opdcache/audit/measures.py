"""The diagnostics of arXiv 2604.13016, token by token, from what is stored.

Legend: T tokens, S recorded student entries a token, K kept teacher entries, k entries compared.
NaN is no value.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ..agreement import places
from .blocks import Block, Entries

Floats = NDArray[np.float32]
Values = NDArray[np.float64]
MEANS = (
    "captured_mass",
    "overlap",
    "overlap_mass_student",
    "overlap_mass_teacher",
    "overlap_advantage",
    "advantage",
    "reverse_kl_sampled",
    "teacher_entropy",
    "student_entropy",
    "entropy_gap",
    "student_entropy_low",
    "student_entropy_high",
    "entropy_gap_low",
    "entropy_gap_high",
)
"""Values of a token whose mean is a field of ``Diagnostics``."""
EXACT = ("student_entropy", "entropy_gap")
"""Those of them that are told where they are known of every token."""
COUNTS = ("num_empty", "num_narrow")
"""Those whose sum is one."""
REPEATED_TOKENS = 16


def measures(block: Block, shared: "Shared | None", k: int) -> dict[str, Values]:
    """Every value of ``MEANS`` and ``COUNTS`` that the block's columns give, float64 [T] each."""
    found = dict[str, Values]()
    if (advantages := block.advantages) is not None:
        found["advantage"] = advantages
        found["reverse_kl_sampled"] = np.exp(advantages) - 1 - advantages
    if (topk := block.scores.topk) is not None:
        found["captured_mass"] = np.where(topk.kept, np.exp(topk.logprobs), 0).sum(
            axis=1, dtype=np.float64
        )
    if shared is not None:
        found |= shared.measures(k)
    return found | _entropies(block)


@dataclass(frozen=True, slots=True)
class Shared:
    """Which of the student's entries are the teacher's too.

    Attributes:
        student, teacher: the entries.
        rank_TS: int [T, S], the place of each student entry among the teacher's; K when it has
            none.
    """

    student: Entries
    teacher: Entries
    rank_TS: NDArray[np.int64]

    @classmethod
    def between(cls, block: Block) -> "Shared | None":
        """Those of a block; None when either model's entries are not stored."""
        if block.student is None or block.teacher is None:
            return None
        return cls.of(block.student, block.teacher)

    @classmethod
    def of(cls, student: Entries, teacher: Entries) -> "Shared":
        """Both models' entries of the same tokens."""
        rank_TS = places(student.ids, student.num_kept, teacher.ids, teacher.num_kept)
        return cls(student, teacher, rank_TS)

    def compared(self, k: int) -> NDArray[np.int64]:
        """Int [T]: entries that are compared of each token: k, or as many as both have."""
        least: NDArray[np.int64] = np.minimum(self.student.num_kept, self.teacher.num_kept)
        return np.minimum(least, k)

    def within(self, k: int) -> NDArray[np.bool_]:
        """[T, S]: which student entries are in both top k."""
        compared_T1 = self.compared(k)[:, None]
        places_S = np.arange(self.rank_TS.shape[1])
        within: NDArray[np.bool_] = (places_S < compared_T1) & (self.rank_TS < compared_T1)
        return within

    @property
    def _last(self) -> int:
        """The teacher's last place, which there is even of no entries."""
        return max(0, int(self.teacher.ids.shape[1]) - 1)

    def overlap(self, k: int) -> Values:
        """[T]: |I| / k; NaN where nothing can be compared."""
        return _ratio(self.within(k).sum(axis=1), self.compared(k))

    def measures(self, k: int) -> dict[str, Values]:
        """What is said of the shared entries, [T] each."""
        within_TS, compared_T = self.within(k), self.compared(k)
        sizes_T = within_TS.sum(axis=1)
        ours_TS, place_TS = self.student.logprobs, np.minimum(self.rank_TS, self._last)
        theirs_TS = np.take_along_axis(self.teacher.logprobs, place_TS, axis=1)
        p_TS, log_mass_p = _weights(ours_TS, within_TS)
        _, log_mass_q = _weights(theirs_TS, within_TS)
        gains_T = (p_TS * (theirs_TS - ours_TS)).sum(axis=1, dtype=np.float64)
        with np.errstate(invalid="ignore"):  # where nothing is shared; above 0 is rounding
            minus_kl_T = gains_T + log_mass_p - log_mass_q
        there = compared_T > 0
        return {
            "overlap": self.overlap(k),
            "overlap_mass_student": np.where(there, np.exp(log_mass_p), np.nan),
            "overlap_mass_teacher": np.where(there, np.exp(log_mass_q), np.nan),
            "overlap_advantage": _ratio(np.minimum(minus_kl_T, 0), sizes_T),
            "num_empty": (there & (sizes_T == 0)).astype(np.float64),
            "num_narrow": (compared_T < k).astype(np.float64),
        }


def _weights(logprobs_TS: Floats, within_TS: NDArray[np.bool_]) -> tuple[Floats, Values]:
    """Probabilities renormalised on the entries within, float32 [T, S], 0 outside; and the log of
    what these held, [T], -inf of none."""
    held_TS = np.where(within_TS, logprobs_TS, -np.inf)
    most_T = held_TS.max(axis=1, initial=-np.inf, keepdims=True)
    weights_TS = np.exp(held_TS - np.where(np.isfinite(most_T), most_T, 0))
    total_T = weights_TS.sum(axis=1, dtype=np.float64)
    weights_TS /= np.maximum(total_T, 1e-30, dtype=np.float32)[:, None]
    with np.errstate(divide="ignore"):
        return weights_TS, np.log(total_T) + most_T[:, 0]


def _ratio(above: NDArray[np.generic], below: NDArray[np.int64]) -> Values:
    """Quotient; NaN where it has none."""
    return np.where(below > 0, above / np.maximum(below, 1), np.nan)


def _entropies(block: Block) -> dict[str, Values]:
    """Both models' entropies, and how far they are apart, as far as what is stored tells."""
    found = dict[str, Values]()
    theirs = None if (h := block.scores.entropy) is None else h.astype(np.float64)
    if theirs is not None:
        found["teacher_entropy"] = theirs
    if block.own is not None and block.own.entropy is not None:
        ours = found["student_entropy"] = block.own.entropy.astype(np.float64)
        if theirs is not None:
            found["entropy_gap"] = np.abs(theirs - ours)
    if block.student is not None:
        low, high = entropy_bounds(block.student, block.num_ids)
        found |= {"student_entropy_low": low, "student_entropy_high": high}
        if theirs is not None:
            found["entropy_gap_low"] = np.maximum(0, np.maximum(low - theirs, theirs - high))
            found["entropy_gap_high"] = np.maximum(high - theirs, theirs - low)
    return found


def entropy_bounds(
    entries: Entries, num_ids: int, *, are_likeliest: bool = True
) -> tuple[Values, Values]:
    """Least and largest entropy, nats, [T] each, of distributions over ``num_ids`` ids whose
    likeliest entries are these.

    What is outside has the mass that they leave, and no probability above their last. Least: as
    few ids as can hold that mass; largest: all of them alike.

    Args:
        are_likeliest: else one id outside may hold all that is left.
    """
    logprobs_TS = entries.logprobs
    kept_TS = np.arange(logprobs_TS.shape[1]) < entries.num_kept[:, None]
    p_TS = np.where(kept_TS, np.exp(logprobs_TS), 0)
    head_T = -np.where(kept_TS, p_TS * logprobs_TS, 0).sum(axis=1, dtype=np.float64)
    rest_T = np.clip(1 - p_TS.sum(axis=1, dtype=np.float64), 0, 1)
    last_T = np.where(kept_TS & are_likeliest, p_TS, 1).min(axis=1, initial=1.0)
    last_T = last_T.astype(np.float64)
    full_T = np.floor(rest_T / np.maximum(last_T, 1e-300))
    left_T = np.maximum(rest_T - full_T * last_T, 0.0)
    least_T = head_T + full_T * _surprise(last_T) + _surprise(left_T)
    num_T = np.maximum(num_ids - entries.num_kept, 1)
    most_T = head_T + num_T * _surprise(rest_T / num_T)
    return np.minimum(least_T, most_T), most_T


def _surprise(p: Values) -> Values:
    """``-p log p``, 0 at 0."""
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(p > 0, -p * np.log(p), 0.0)


def repeated(token_ids: NDArray[np.int32], rows: NDArray[np.int64]) -> NDArray[np.bool_]:
    """[T]: at which tokens 16 in a row end that ended at an earlier token of the completion too.

    Args:
        token_ids: int32 [T], of completions one after the other.
        rows: int64 [T], the completion of each.
    """
    found = np.zeros(len(token_ids), np.bool_)
    first = REPEATED_TOKENS - 1
    if len(token_ids) <= first:
        return found
    windows = np.lib.stride_tricks.sliding_window_view(token_ids, REPEATED_TOKENS)
    whole = rows[first:] == rows[:-first]
    keyed = np.column_stack([rows[first:], windows])[whole]
    _, earliest, which = np.unique(_digests(keyed), return_index=True, return_inverse=True)
    found[np.flatnonzero(whole) + first] = earliest[which] < np.arange(len(keyed))
    return found


def _digests(rows: NDArray[np.int64]) -> NDArray[np.uint64]:
    """A number a row, alike for rows that are; for others with a chance of 2^-64 a pair."""
    with np.errstate(over="ignore"):
        digest = np.zeros(len(rows), np.uint64)
        for column in rows.astype(np.uint64).T:
            digest = (digest ^ column) * np.uint64(0x9E3779B97F4A7C15)
            digest ^= digest >> np.uint64(29)
    return digest
