"""What stays of a shard's or a round's completions, whatever their number."""

import hashlib
from collections.abc import Callable, Mapping, Set
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from .. import quality
from ..accuracy import CORRECT
from ..costs import score_bytes_per_token
from ..schemas.audit import (
    AtK,
    Completions,
    Diagnostics,
    PositionDiagnostics,
    Repetition,
    Reward,
    SpecialToken,
)
from .blocks import Block
from .clustered import ClusteredSums
from .measures import COUNTS, EXACT, MEANS, Shared, Values, measures, repeated
from .sums import Sums

Judge = Callable[[pa.Table], NDArray[np.float64]]
"""Scores of rows' completions, [N]; NaN where there is none."""


@dataclass(frozen=True, slots=True)
class Look:
    """How completions are looked at.

    Attributes:
        k: entries that the overlap is taken of.
        chunk_tokens: tokens of a position chunk.
        special: special tokens by id.
        outlier_nats: a special token is an outlier where the teacher finds it so much less likely.
        judge: tells which completions are correct; None when nobody does.
    """

    k: int
    chunk_tokens: int
    special: Mapping[int, str | None]
    outlier_nats: float
    judge: Judge | None = None


class Tally:
    """Sums over completions; those of parts can be merged.

    Attributes:
        sums: of tokens' values, by name.
        clustered: the same names, for the errors of their means.
    """

    def __init__(self, look: Look) -> None:
        self._look = look
        self.sums = Sums()
        self.clustered = ClusteredSums()
        self._at_k = Sums()
        self._others = Sums()
        self._lengths: list[NDArray[np.int64]] = []
        self._rewards: list[Values] = []
        self._scores: list[Values] = []
        self._copies: dict[bytes, set[bytes]] = {}
        self._num_copies = 0
        self._faults = {"truncated": 0, "repetitive": 0}

    def add(self, block: Block, faults: Mapping[str, int] | None) -> None:
        """Put in a block's completions.

        Args:
            faults: counts of truncated and repetitive completions, when they are known already.
        """
        kept, chunks = block.supervised, block.positions // self._look.chunk_tokens
        rows = block.rows
        shared = Shared.between(block)
        found = measures(block, shared, self._look.k)
        found["num_tokens"] = np.ones(len(kept))
        for name, values in found.items():
            self.sums.add(name, values[kept], chunks[kept])
            self.clustered.add(name, values[kept], rows[kept])
        self._add_at_k(block, shared, kept)
        self._add_special(block, kept)
        self._add_rows(block)
        if faults is None:
            reasons, texts = (block.table.column(n).to_pylist() for n in ("finish_reason", "text"))
            counted = quality.counted(zip(reasons, texts, strict=True))
            faults = {str(name): num for name, num in counted.items()}
        for name, num in faults.items():
            self._faults[name] += num

    @property
    def prompts(self) -> Set[bytes]:
        """Digests of the prompts' token ids."""
        return self._copies.keys()

    def merge(self, other: "Tally") -> None:
        """Put in what another one has."""
        self.sums.merge(other.sums)
        self.clustered.merge(other.clustered)
        self._at_k.merge(other._at_k)
        self._others.merge(other._others)
        self._lengths += other._lengths
        self._rewards += other._rewards
        self._scores += other._scores
        self._num_copies += other._num_copies
        for prompt, completions in other._copies.items():
            held = self._copies.setdefault(prompt, set())
            self._num_copies += len(held & completions)
            held |= completions
        for name, num in other._faults.items():
            self._faults[name] += num

    def _add_at_k(self, block: Block, shared: Shared | None, kept: NDArray[np.bool_]) -> None:
        """Masses and overlap by the number of entries, in powers of two and at all there are."""
        for name, entries in (("teacher_mass", block.teacher), ("student_mass", block.student)):
            if entries is None:
                continue
            there_TK = np.arange(entries.ids.shape[1]) < entries.num_kept[:, None]
            held_TK = np.where(there_TK, np.exp(entries.logprobs), 0).cumsum(axis=1)[kept]
            for k in _sizes(held_TK.shape[1]):
                self._at_k.add((name, k), held_TK[:, k - 1].astype(np.float64))
        if shared is not None:
            for k in _sizes(min(shared.teacher.ids.shape[1], shared.student.ids.shape[1])):
                self._at_k.add(("overlap", k), shared.overlap(k)[kept])

    def _add_special(self, block: Block, kept: NDArray[np.bool_]) -> None:
        advantages, theirs = block.advantages, block.scores.sampled_logprobs
        if advantages is None or theirs is None:
            return
        again = repeated(block.token_ids, block.rows)
        self._others.add("repeated", advantages[kept & again])
        self._others.add("rest", advantages[kept & ~again])
        for id in self._look.special:
            here = kept & (block.token_ids == id)
            self._others.add(("teacher", id), theirs[here].astype(np.float64))
            self._others.add(("advantage", id), advantages[here])
            below = advantages[here] < -self._look.outlier_nats
            self._others.add(("outlier", id), below.astype(np.float64))

    def _add_rows(self, block: Block) -> None:
        num_rows = block.table.num_rows
        self._lengths.append(np.diff(block.offsets))
        if (advantages := block.advantages) is not None:
            given = block.supervised & ~np.isnan(advantages)
            rows = block.rows[given]
            sums = np.bincount(rows, weights=advantages[given], minlength=num_rows)
            counts = np.bincount(rows, minlength=num_rows)
            with np.errstate(invalid="ignore"):
                self._rewards.append(sums / counts)
            judged = np.full(num_rows, np.nan)
            self._scores.append(judged if (j := self._look.judge) is None else j(block.table))
        prompts = block.table.column("prompt_token_ids")
        for row, prompt in enumerate(prompts):
            ids = block.token_ids[block.offsets[row] : block.offsets[row + 1]]
            held = self._copies.setdefault(_digest(np.asarray(prompt.values)), set())
            completion = _digest(ids)
            self._num_copies += completion in held
            held.add(completion)

    def diagnostics(self, chunk: int | None = None) -> Diagnostics:
        """Over all tokens, or those of a chunk."""
        return diagnostics_of(self.sums, chunk)

    def by_position(self, together: int = 1) -> tuple[PositionDiagnostics, ...]:
        """Chunk by chunk, so many in a row made one."""
        sums, length = self.sums.coarser(together), self._look.chunk_tokens * together
        return tuple(
            PositionDiagnostics(first=chunk * length, **_fields(sums, chunk))
            for chunk in range(sums.num_chunks)
        )

    def by_k(self) -> tuple[AtK, ...]:
        """By the number of entries."""
        names = ("teacher_mass", "student_mass", "overlap")
        sizes = sorted({k for key in self._at_k.names() if isinstance(key, tuple) for k in key[1:]})
        return tuple(
            AtK(
                k=k,
                bytes_per_token=score_bytes_per_token(["topk"], k=k, student_topk=0, draws=0),
                **{name: self._at_k.mean((name, k)) for name in names},
            )
            for k in sizes
        )

    def completions(self) -> Completions:
        """As texts."""
        lengths = np.concatenate([np.zeros(0, np.int64), *self._lengths])
        return Completions(
            num=len(lengths),
            num_tokens=int(lengths.sum()),
            num_prompts=len(self._copies),
            median_tokens=float(np.median(lengths)) if len(lengths) else 0.0,
            longest_tokens=int(lengths.max(initial=0)),
            duplicates=self._num_copies,
            **self._faults,
        )

    def repetition(self) -> Repetition:
        """Of tokens that repeat."""
        return Repetition(
            num_tokens=self._others.num("repeated"),
            advantage=self._others.mean("repeated"),
            rest_advantage=self._others.mean("rest"),
        )

    def reward(self) -> Reward:
        """Of whole completions."""
        rewards = np.concatenate([np.zeros(0), *self._rewards])
        scores = np.concatenate([np.zeros(0), *self._scores])
        given = ~np.isnan(rewards)
        judged = given & ~np.isnan(scores)
        correct = scores[judged] >= CORRECT
        return Reward(
            mean=float(rewards[given].mean()) if given.any() else None,
            deviation=float(rewards[given].std()) if given.any() else None,
            num_labelled=int(judged.sum()),
            num_correct=int(correct.sum()),
            auroc=auroc(rewards[judged], correct),
        )

    def special(self) -> tuple[SpecialToken, ...]:
        """Special tokens that were sampled."""
        return tuple(
            SpecialToken(
                id=id,
                token=token,
                num=num,
                teacher_logprob=self._others.mean(("teacher", id)),
                advantage=self._others.mean(("advantage", id)),
                num_outliers=int(self._others.total(("outlier", id))),
            )
            for id, token in self._look.special.items()
            if (num := self._others.num(("teacher", id)))
        )


def diagnostics_of(sums: Sums, chunk: int | None = None) -> Diagnostics:
    """What sums over tokens tell, of all of them or of a chunk."""
    return Diagnostics(**_fields(sums, chunk))


def _fields(sums: Sums, chunk: int | None) -> dict[str, float | None]:
    counts = {name: int(sums.total(name, chunk)) for name in ("num_tokens", *COUNTS)}
    means = {name: sums.mean(name, chunk) for name in MEANS}
    for name in EXACT:  # of some tokens alone they would be set against other tokens' values
        if sums.num(name, chunk) < counts["num_tokens"]:
            means[name] = None
    return {**counts, **means}


def auroc(values: Values, is_positive: NDArray[np.bool_]) -> float | None:
    """Chance that a positive's value is larger than another's, ties counted half; None without
    both kinds. It is the Mann-Whitney statistic over the number of pairs."""
    num, others = int(is_positive.sum()), int((~is_positive).sum())
    if not num or not others:
        return None
    _, which, counts = np.unique(values, return_inverse=True, return_counts=True)
    ranks = (np.cumsum(counts) - (counts - 1) / 2)[which]
    return float((ranks[is_positive].sum() - num * (num + 1) / 2) / (num * others))


def _sizes(most: int) -> list[int]:
    """Powers of two up to the most, and it."""
    return sorted({2**i for i in range(most.bit_length())} | {most}) if most else []


def _digest(ids: NDArray[np.int32]) -> bytes:
    return hashlib.blake2b(ids.astype("<i4").tobytes(), digest_size=16).digest()
