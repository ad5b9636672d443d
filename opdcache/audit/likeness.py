"""Two score sets of the same rollouts, token by token: what stays of them, and what it means.

Legend: T tokens.
"""

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from ..agreement import Matched
from ..schemas.columns import ScoreColumn
from ..schemas.comparison import (
    Agreement,
    CompareLimits,
    Estimate,
    LeftOut,
    LimitTest,
    PositionAgreement,
    Verdict,
)
from ..store.scores import Scores, TopK
from .blocks import Block, entries
from .clustered import ClusteredSums
from .measures import Shared, Values

_MEANS = tuple(name for name in Agreement.model_fields if not name.startswith("num_"))
_AT_ONCE = 4096
_COLUMNS: tuple[ScoreColumn, ...] = ("sampled", "entropy", "topk")
_DRIFT = (
    ("kl_ab", "max_drift_kl"),
    ("kl_ba", "max_drift_kl"),
    ("sampled_difference", "max_drift_nats"),
)
_TWO_TEACHERS = (
    ("kl_ab", "max_kl"),
    ("kl_ba", "max_kl"),
    ("argmax_agreement", "min_argmax_agreement"),
    ("overlap", "min_overlap"),
    ("mass_a", "min_mass"),
    ("mass_b", "min_mass"),
)


class Likeness:
    """Sums over completions; those of shards can be merged.

    Attributes:
        largest: the largest value of each difference.
    """

    def __init__(self, k: int, chunk_tokens: int) -> None:
        self._k, self._chunk_tokens = k, chunk_tokens
        self._sums, self._num_chunks = ClusteredSums(), 0
        self._lacking: dict[str, NDArray[np.int64]] = defaultdict(lambda: np.zeros(2, np.int64))
        self.largest: dict[str, float] = {}
        self.num_shards = self.num_completions = 0

    def add(self, block: Block, others: Scores) -> None:
        """Put in completions of a shard, of which ``block`` has A's scores."""
        kept, rows = block.supervised, block.rows[block.supervised]
        chunks = block.positions[kept] // self._chunk_tokens
        found = measures(block, others, self._k) | {"num_tokens": np.ones(len(kept))}
        for name, values in found.items():
            if name.startswith("largest_"):
                most = float(np.fmax.reduce(values[kept], initial=0.0))
                self._put_largest(name.removeprefix("largest_"), most)
                continue
            self._sums.add(name, values[kept], rows)
            for chunk in np.unique(chunks).tolist():
                here = chunks == chunk
                self._sums.add((name, chunk), values[kept][here], rows[here])
        self._num_chunks = max(self._num_chunks, 1 + int(chunks.max(initial=-1)))
        self.num_completions += block.table.num_rows

    def end(self, num_tokens: int, columns: Mapping[str, frozenset[str]]) -> None:
        """Count a shard that is done, and the columns that A's or B's scores of it lack."""
        self.num_shards += 1
        for side, held in columns.items():
            for reason in (
                f"{side} stores no {column}" for column in _COLUMNS if column not in held
            ):
                self._lacking[reason] += np.asarray([1, num_tokens])

    def merge(self, other: "Likeness") -> None:
        """Put in what another one has."""
        self._sums.merge(other._sums)
        self._num_chunks = max(self._num_chunks, other._num_chunks)
        for name, value in other.largest.items():
            self._put_largest(name, value)
        for reason, counts in other._lacking.items():
            self._lacking[reason] += counts
        self.num_shards += other.num_shards
        self.num_completions += other.num_completions

    def _put_largest(self, name: str, value: float) -> None:
        self.largest[name] = max(value, self.largest.get(name, 0.0))

    @property
    def left_out(self) -> tuple[LeftOut, ...]:
        """Columns that one side lacks."""
        return tuple(
            LeftOut(reason=reason, num_shards=int(shards), num_tokens=int(tokens))
            for reason, (shards, tokens) in self._lacking.items()
        )

    def agreement(self) -> Agreement:
        """Over all tokens."""
        return Agreement(**self._counts(None), **self._means(None))

    def by_position(self) -> tuple[PositionAgreement, ...]:
        """Chunk by chunk."""
        return tuple(
            PositionAgreement(
                first=chunk * self._chunk_tokens, **self._counts(chunk), **self._means(chunk)
            )
            for chunk in range(self._num_chunks)
        )

    def _counts(self, chunk: int | None) -> dict[str, int]:
        names = ("num_tokens", "num_narrow")
        return {n: int(self._sums.total(n if chunk is None else (n, chunk))) for n in names}

    def _means(self, chunk: int | None) -> dict[str, Estimate | None]:
        return {n: self._sums.estimate(n if chunk is None else (n, chunk)) for n in _MEANS}


def measures(block: Block, others: Scores, k: int) -> dict[str, Values]:
    """Every value of ``Agreement`` that both sides' columns give, float64 [T] each.

    Of each difference the largest too, as ``largest_...``: of a token's entries, or its only one.
    """
    found = dict[str, Values]()
    if (ours := block.advantages) is not None:
        found["student_kl_a"] = -ours
    a, b = block.scores.sampled_logprobs, others.sampled_logprobs
    if b is not None and block.behavior_logprobs is not None:
        found["student_kl_b"] = block.behavior_logprobs.astype(np.float64) - b
    if "student_kl_a" in found and "student_kl_b" in found:
        found["student_kl_change"] = found["student_kl_b"] - found["student_kl_a"]
    if a is not None and b is not None:
        log_ratio = b.astype(np.float64) - a
        found["sampled_difference"] = found["largest_sampled_difference"] = np.abs(log_ratio)
        found["sampled_k3"] = np.exp(log_ratio) - 1 - log_ratio
    if block.scores.entropy is not None and others.entropy is not None:
        apart = np.abs(others.entropy.astype(np.float64) - block.scores.entropy)
        found["entropy_difference"] = found["largest_entropy_difference"] = apart
    return found | _entries(block, others, k)


def _entries(block: Block, others: Scores, k: int) -> dict[str, Values]:
    """What the likeliest entries say, some tokens at a time: there are K values of each."""
    one, other = block.scores.topk, others.topk
    if one is None or other is None:
        return {}
    starts = range(0, max(1, len(block.token_ids)), _AT_ONCE)
    parts = [slice(start, start + _AT_ONCE) for start in starts]
    found = [_of_entries(one.at(part), other.at(part), k) for part in parts]
    return {name: np.concatenate([each[name] for each in found]) for name in found[0]}


def _of_entries(one: TopK, other: TopK, k: int) -> dict[str, Values]:
    matched = Matched.of(one, other)
    local, top = matched.local(), _overlap(matched, k)
    apart_TS, num_T = np.abs(matched.differences_TS), matched.both_TS.sum(axis=1)
    mean_T = np.where(num_T > 0, np.nansum(apart_TS, axis=1) / np.maximum(num_T, 1), np.nan)
    return {
        "kl_ab": local.kl,
        "kl_ba": local.kl_back,
        "mass_a": local.mass,
        "mass_b": local.other_mass,
        "kept_by_both": matched.kept_by_both_T,
        "overlap": top["overlap"],
        "overlap_mass_a": top["overlap_mass_student"],
        "overlap_mass_b": top["overlap_mass_teacher"],
        "num_narrow": top["num_narrow"],
        "argmax_agreement": matched.same_first_T.astype(np.float64),
        "topk_difference": mean_T,
        "largest_topk_difference": np.fmax.reduce(apart_TS, axis=1, initial=0.0),
    }


def _overlap(matched: Matched, k: int) -> dict[str, Values]:
    """The audit's measures of two top k, A in the student's place."""
    one, other = entries(matched.one), entries(matched.other)
    assert one is not None
    assert other is not None
    return Shared(one, other, matched.place_TS).measures(k)


def tests(found: Agreement, limits: CompareLimits, *, same_model: bool) -> Iterator[LimitTest]:
    """The means that the verdict rests on, each against its limit."""
    for name, limit_name in _DRIFT if same_model else _TWO_TEACHERS:
        value: Estimate | None = getattr(found, name)
        if value is None:
            continue
        limit: float = getattr(limits, limit_name)
        above = value.mean - limit if limit_name.startswith("max_") else limit - value.mean
        clear = _is_clear(value, above, limits.num_errors)
        beyond = above > 0 and limit_name != "min_mass"  # little stored is no difference
        outcome = "beyond" if beyond else "within" if above <= 0 else "undecided"
        yield LimitTest(
            name=name, value=value, limit=limit, outcome=outcome if clear else "undecided"
        )


def _is_clear(value: Estimate, away: float, num_errors: float) -> bool:
    return value.standard_error is not None and abs(away) >= num_errors * value.standard_error


def verdict(found: Sequence[LimitTest], *, same_model: bool) -> Verdict:
    """What the tests say together; a difference that one of them finds is one."""
    outcomes = {test.outcome for test in found}
    if "beyond" in outcomes:
        return "different"
    if "undecided" in outcomes or not found:
        return "undecided"
    return "the same within rounding" if same_model else "indistinguishable"
