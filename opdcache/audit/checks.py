"""What is wrong with a shard's stored numbers, whatever the models: they contradict themselves.

Legend: T tokens, K kept entries a token.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from ..schemas.audit import AuditLimits, Finding
from .blocks import Block, Entries
from .measures import entropy_bounds

Value = TypeVar("Value", bound=np.generic)
_SHIFTS = (0, -1, 1)
_SURE_NATS = 0.05
"""A log-prob of 0 is believed where the other numbers of the token are within this of it."""
_LEAST_TOKENS = 20
"""Fewer tokens tell nothing of an alignment."""


@dataclass(frozen=True, slots=True)
class Shift:
    """How far stored arrays are from where they belong: 1 when place t holds what is token t + 1's.

    Attributes:
        entries: of the likeliest entries.
        sampled: of the sampled tokens' log-probs.
    """

    entries: int
    sampled: int

    def __str__(self) -> str:
        if self.entries == self.sampled:
            return f"all of them are shifted by {_tokens(self.entries)}"
        parts = [
            f"{name} are shifted by {_tokens(by)}"
            for name, by in (("the top-k entries", self.entries), ("the sampled", self.sampled))
            if by
        ]
        return " and ".join(parts)


def _tokens(shift: int) -> str:
    return f"{shift:+d} token"


class Checks:
    """What is wrong with one shard; its blocks are put in in order."""

    def __init__(self) -> None:
        self._num_tokens = 0
        self._num_zero = self._num_unnormalised = 0
        self._of_scores, self._of_rollouts = Alignment(), Alignment()
        self._of_student_topk = Alignment()
        self._num_other_entropies = 0
        self._are_zeros_sure = False
        self._own_fault: str | None = None
        self._sampled_sum, self._num_sampled = 0.0, 0
        self._num_ids = 0

    def add(self, block: Block) -> None:
        """Put in the next completions."""
        self._num_tokens += len(block.token_ids)
        self._num_ids = block.num_ids
        sampled = block.scores.sampled_logprobs
        # Two scorings differ by more than rounding, so a shift is only told within one.
        if block.is_one_set("sampled", "topk"):
            self._of_scores.add(block, block.teacher, sampled, block.step)
        if block.is_one_set("sampled", "student_topk"):
            self._of_student_topk.add(block, _at_recorded(block), sampled, block.step)
        if "behavior_logprobs" in block.table.column_names:
            self._of_rollouts.add(block, block.recorded, block.behavior_logprobs, 0.0)
        if block.is_one_set("entropy", "topk"):
            self._num_other_entropies += int(impossible_entropies(block).sum())
        self._are_zeros_sure |= block.scores.entropy is not None or block.teacher is not None
        self._own_fault = self._own_fault or block.own_fault
        self._num_zero += int(impossible_zeros(block).sum())
        self._num_unnormalised += int(unnormalised(block).sum())
        if sampled is not None:
            self._sampled_sum += float(sampled.sum(dtype=np.float64))
            self._num_sampled += len(sampled)

    def findings(self, limits: AuditLimits, where: str) -> Iterator[Finding]:
        """Everything that is wrong, each by its name."""
        for check, num, reason in (
            (
                "missing scores",
                self._num_zero,
                "tokens have a log-prob of 0, which means certainty, where the other numbers say "
                "otherwise: zeros stand for scores that were never made; score the shard again",
            ),
            (
                "entropy",
                self._num_other_entropies,
                "tokens have an entropy that no distribution with their entries has: it is of "
                "other tokens, or was filled in; score the shard again",
            ),
            (
                "mass",
                self._num_unnormalised,
                "tokens' entries and tail do not sum to 1: the scores are not of a distribution "
                "over the vocabulary, or were filled in; score the shard again",
            ),
        ):
            share = num / max(1, self._num_tokens)
            if share > limits.max_faulty:
                found = _no_go(check, where, share, limits.max_faulty, f"{num:,} {reason}")
                is_sure = check != "missing scores" or self._are_zeros_sure
                yield found if is_sure else found.model_copy(update={"level": "warning"})
        for what, alignment in (
            ("scores'", self._of_scores),
            ("scores of recorded ids:", self._of_student_topk),
            ("rollouts'", self._of_rollouts),
        ):
            yield from _misaligned(what, alignment, limits, where)
        if self._own_fault is not None:
            yield Finding(
                check="unreadable own scores",
                level="warning",
                where=where,
                reason=f"H(p) is bounded only: {self._own_fault}",
            )
        yield from self._wrong_teacher(where)

    def _wrong_teacher(self, where: str) -> Iterator[Finding]:
        if self._num_sampled < _LEAST_TOKENS:
            return
        mean, blind = self._sampled_sum / self._num_sampled, -float(np.log(self._num_ids))
        if mean < blind:
            yield _no_go(
                "wrong teacher",
                where,
                mean,
                blind,
                "the teacher's mean log-prob of the sampled tokens is below that of a blind guess "
                "among all ids: another teacher, tokenizer or prompt than it should be, or scores "
                "of other tokens; 'opdcache score RUN.yaml --round R --check 8' scores some again",
            )


def _misaligned(
    what: str, alignment: "Alignment", limits: AuditLimits, where: str
) -> Iterator[Finding]:
    if alignment.num < _LEAST_TOKENS:
        return
    share, shift = alignment.share(Shift(0, 0)), alignment.best()
    if share >= limits.min_aligned:
        return
    if shift == Shift(0, 0):
        said = "they agree at no shift either, so they are of different distributions"
    else:
        said = f"{shift} (at that, {alignment.share(shift):.0%} agree)"
    yield _no_go(
        "alignment",
        where,
        share,
        limits.min_aligned,
        f"the {what} sampled log-probs are those of their entries at {share:.1%} of the tokens; "
        f"{said}; index t must hold the log-prob of token t",
    )


def _no_go(check: str, where: str, value: float, limit: float, reason: str) -> Finding:
    return Finding(check=check, level="no-go", where=where, value=value, limit=limit, reason=reason)


class Alignment:
    """How often a sampled token's log-prob is the one that its entries give it, by shift.

    Only tokens are counted whose id is among the entries: there the two must be one number.
    """

    def __init__(self) -> None:
        self._agree = dict.fromkeys(
            [Shift(a, a - b) for a in _SHIFTS for b in _SHIFTS if abs(a - b) <= 1], 0
        )
        self._there = dict.fromkeys(self._agree, 0)

    def add(
        self,
        block: Block,
        entries: Entries | None,
        sampled: NDArray[np.float32] | None,
        step: float,
    ) -> None:
        """Put in the next completions; log-probs are off by ``step`` at most, see ``codec``."""
        if entries is None or sampled is None:
            return
        ids, rows, num = block.token_ids, block.rows, len(block.token_ids)
        kept_TK = np.arange(entries.ids.shape[1]) < entries.num_kept[:, None]
        for a in _SHIFTS:
            held, there = _moved(ids, rows, a)
            found_TK = kept_TK & (entries.ids == held[:, None]) & there[:, None]
            place = found_TK.argmax(axis=1)
            value = entries.logprobs[np.arange(num), place] if entries.ids.shape[1] else sampled
            slack = (step + 0.01) * np.maximum(1, np.abs(value))
            for shift in self._agree:
                if shift.entries != a:
                    continue
                theirs, both = _moved(sampled, rows, a - shift.sampled)
                both = both & found_TK.any(axis=1) & ~np.isnan(theirs)
                near = np.abs(theirs - value) <= slack
                self._there[shift] += int(both.sum())
                self._agree[shift] += int((both & near).sum())

    @property
    def num(self) -> int:
        """Tokens whose id is among some entries, at the shift where most are."""
        return max(self._there.values())

    def share(self, shift: Shift) -> float:
        """Of the tokens that could agree, those that do."""
        return self._agree[shift] / max(1, self._there[shift])

    def best(self) -> Shift:
        """The shift at which most agree."""
        return max(self._agree, key=lambda shift: self._agree[shift])


def _moved(
    values: NDArray[Value], rows: NDArray[np.int64], by: int
) -> tuple[NDArray[Value], NDArray[np.bool_]]:
    """``values[t + by]`` at t, and where that is in the same completion."""
    there = np.zeros(len(values), np.bool_)
    moved = np.roll(values, -by)
    places = slice(max(0, -by), len(values) - max(0, by))
    there[places] = np.roll(rows, -by)[places] == rows[places]
    return moved, there


def impossible_zeros(block: Block) -> NDArray[np.bool_]:
    """[T]: sampled log-probs of exactly 0 where another number of the token says otherwise."""
    sampled = block.scores.sampled_logprobs
    if sampled is None:
        return np.zeros(len(block.token_ids), np.bool_)
    doubts = [np.zeros(len(sampled), np.bool_)]
    if (entropy := block.scores.entropy) is not None:
        doubts.append(entropy > _SURE_NATS)
    if (teacher := block.teacher) is not None and teacher.ids.shape[1]:
        first = (teacher.ids[:, 0] == block.token_ids) & (teacher.logprobs[:, 0] > -_SURE_NATS)
        doubts.append(~first)
    elif block.behavior_logprobs is not None:
        doubts.append(block.behavior_logprobs < -1)
    found: NDArray[np.bool_] = (sampled == 0) & np.logical_or.reduce(doubts)
    return found


def impossible_entropies(block: Block) -> NDArray[np.bool_]:
    """[T]: entropies that are not within what the teacher's entries allow."""
    entropy, teacher = block.scores.entropy, block.teacher
    if entropy is None or teacher is None:
        return np.zeros(len(block.token_ids), np.bool_)
    # The teacher may know more ids than the student, which are outside whatever their mass.
    low, high = entropy_bounds(teacher, 4 * block.num_ids, are_likeliest=False)
    slack = 0.1 + 4 * block.step + 0.02 * entropy
    found: NDArray[np.bool_] = (entropy < low - slack) | (entropy > high + slack)
    return found


def _at_recorded(block: Block) -> Entries | None:
    """The teacher's log-probs of the ids that the student recorded."""
    recorded, theirs = block.recorded, block.scores.student_topk
    if recorded is None or theirs is None:
        return None
    return Entries(recorded.ids, theirs.logprobs, recorded.num_kept)


def unnormalised(block: Block) -> NDArray[np.bool_]:
    """[T]: where kept entries and tail do not sum to 1."""
    slack = 0.01 + 4 * block.step  # what rounding log-probs can do to a mass
    topk, off = block.scores.topk, np.zeros(len(block.token_ids), np.bool_)
    if topk is not None:
        held = np.where(topk.kept, np.exp(topk.logprobs), 0).sum(axis=1)
        off |= np.abs(held + np.exp(topk.tail_logprobs) - 1) > slack
    student = block.scores.student_topk
    if student is not None:
        held = np.exp(student.logprobs).sum(axis=1) + np.exp(student.tail_logprobs)
        off |= np.abs(held - 1) > slack
    return off
