"""The audit: every diagnostic that shards can give, and what speaks against them."""

import os
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial

import numpy as np

from ..errors import IntegrityError, ObjectMissing, OpdcacheError
from ..schemas.audit import Audit, AuditLimits, Finding, PartAudit
from ..schemas.comparison import Estimate
from ..store.cache import Cache
from .blocks import blocks
from .checks import Checks
from .sums import Sums
from .tally import Judge, Look, Tally, diagnostics_of
from .targets import Part, Shard, Target
from .verdict import not_judged, verdict
from .worst import Worst

_CORES = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
_THREADS = min(4, _CORES or 1)


def audit(
    target: Target,
    *,
    k: int = 16,
    chunk_tokens: int = 1024,
    limits: AuditLimits | None = None,
    judge: Judge | None = None,
    max_chunks: int | None = None,
    worst: Worst | None = None,
    advance: Callable[[int], None] = lambda num_tokens: None,
) -> Audit:
    """Read every shard of a target once, in bounded memory.

    A shard that cannot be read, or is not what was committed, is a finding, and in no number.

    Args:
        k: entries that the overlap is taken of.
        chunk_tokens: tokens of a position chunk.
        max_chunks: chunks are made twice as long until there are no more of them.
        worst: is given the completions of every shard that can be read.
        judge: tells which completions are correct.
        advance: told the tokens of each shard that is done.
    """
    started, limits = time.monotonic(), limits or AuditLimits()
    look = Look(k, chunk_tokens, target.special, limits.special_outlier_nats, judge)
    total, findings, readers = Sums(), list[Finding](), list[Reader]()
    for part in target.parts:
        reader = Reader(target.cache, look, limits, worst)
        readers.append(reader)
        for num_tokens in reader.read(part):
            advance(num_tokens)
        findings += reader.findings
        findings += _unlike_others(reader.advantages, limits, part.name)
        total.merge(reader.tally.sums)
    together = _together(total.num_chunks, max_chunks)
    read = zip(readers, target.parts, strict=True)
    parts = [reader.summary(part, together) for reader, part in read]
    findings += verdict(parts, limits)
    diagnostics = diagnostics_of(total)
    return Audit(
        of=target.name,
        k=k,
        chunk_tokens=chunk_tokens * together,
        limits=limits,
        parts=tuple(parts),
        total=diagnostics,
        not_judged=tuple(not_judged(diagnostics, parts)),
        findings=tuple(sorted(findings, key=lambda finding: finding.level != "no-go")),
        elapsed_s=round(time.monotonic() - started, 3),
    )


def _together(num_chunks: int, most: int | None) -> int:
    """How many chunks, a power of two, are made one so that there are no more than that."""
    together = 1
    while most is not None and num_chunks > together * most:
        together *= 2
    return together


@dataclass(frozen=True, slots=True)
class _Seen:
    """What was found in one shard; ``error`` says why it could not be read."""

    shard: Shard
    where: str
    tally: Tally
    checks: Checks
    worst: Worst | None
    error: OpdcacheError | None = None


class Reader:
    """Reads the shards of one part.

    Attributes:
        tally: of the shards that could be read.
        findings: what is wrong with shards.
        advantages: each shard's mean advantage and its error, by its task, teacher and name.
    """

    def __init__(
        self, cache: Cache, look: Look, limits: AuditLimits, worst: Worst | None = None
    ) -> None:
        self._cache, self._look, self._limits, self._worst = cache, look, limits, worst
        self.tally, self.findings = Tally(look), list[Finding]()
        self.advantages: dict[tuple[str, str], dict[str, Estimate]] = {}
        self._num_unreadable = 0

    def read(self, part: Part) -> Iterator[int]:
        """Put in every shard, or say why not; gives the tokens of each that is done, in order.

        Shards are read by several threads. What judges completions may be the user's code, or want
        the main thread, and is asked there.
        """
        see = partial(self._see, part=part.name)
        if self._look.judge is not None or _THREADS == 1 or len(part.shards) == 1:
            yield from map(self._put, map(see, part.shards))
            return
        with ThreadPoolExecutor(_THREADS) as pool:
            yield from map(self._put, pool.map(see, part.shards))

    def _see(self, shard: Shard, part: str) -> _Seen:
        where = f"{part}, shard {shard.name}"
        tally, checks = Tally(self._look), Checks()
        worst = None if self._worst is None else self._worst.like()
        seen = _Seen(shard, where, tally, checks, worst)
        try:
            faults = _counted(self._cache, shard)
            for block in blocks(self._cache, shard):
                checks.add(block)
                tally.add(block, faults)
                if worst is not None:
                    worst.add(block, shard, part)
                faults = {} if faults is not None else None
        except (IntegrityError, ObjectMissing) as error:
            return replace(seen, error=error)
        return seen

    def _put(self, seen: _Seen) -> int:
        shard, where = seen.shard, seen.where
        self.findings += _other_teacher(shard, where)
        if seen.error is not None:
            self._num_unreadable += 1
            reason = str(seen.error)
            self.findings.append(
                Finding(check="unreadable shard", level="no-go", where=where, reason=reason)
            )
            return shard.scored.rollouts.num_tokens
        self.findings += seen.checks.findings(self._limits, where)
        advantage = seen.tally.clustered.estimate("advantage")
        if advantage is not None and advantage.standard_error is not None:
            group = shard.scored.rollouts.task, shard.scored.teacher
            self.advantages.setdefault(group, {})[where] = advantage
        self.tally.merge(seen.tally)
        if self._worst is not None and seen.worst is not None:
            self._worst.merge(seen.worst)
        return shard.scored.rollouts.num_tokens

    def summary(self, part: Part, together: int = 1) -> PartAudit:
        """What is said of the part, so many position chunks made one."""
        return PartAudit(
            name=part.name,
            round=part.round,
            students=_distinct(shard.student for shard in part.shards),
            teachers=_distinct(shard.scored.teacher for shard in part.shards),
            num_shards=len(part.shards),
            num_unreadable=self._num_unreadable,
            num_own=sum(bool(shard.own) for shard in part.shards),
            diagnostics=self.tally.diagnostics(),
            by_position=self.tally.by_position(together),
            by_k=self.tally.by_k(),
            completions=self.tally.completions(),
            repetition=self.tally.repetition(),
            reward=self.tally.reward(),
            special=self.tally.special(),
        )


def _distinct(names: Iterator[str]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(names))


def _counted(cache: Cache, shard: Shard) -> Mapping[str, int] | None:
    """Truncated and repetitive completions, as the manifest counts them; None when it does not."""
    quality = cache.need_rollouts(shard.scored.rollouts).quality
    return {str(name): num for name, num in quality.items()} or None


def _other_teacher(shard: Shard, where: str) -> Iterator[Finding]:
    expected = shard.expected_teacher
    if expected is not None and expected != shard.scored.teacher:
        yield Finding(
            check="wrong teacher",
            level="no-go",
            where=where,
            reason=f"the scores are of model {shard.scored.teacher[:12]}, and the run's teacher is "
            f"{expected[:12]}; score the round again",
        )


def _unlike_others(
    advantages: Mapping[tuple[str, str], Mapping[str, Estimate]],
    limits: AuditLimits,
    part: str,
) -> Iterator[Finding]:
    """Shards of one task and teacher that are far from the others: by the median deviation, and by
    the error that a mean over so few completions has."""
    for by_shard in advantages.values():
        if len(by_shard) < 4:
            continue
        values = np.array([found.mean for found in by_shard.values()])
        away = np.abs(values - np.median(values))
        usual = max(limits.max_shard_deviation_nats, 8 * float(np.median(away)))
        for (where, found), far in zip(by_shard.items(), away.tolist(), strict=True):
            limit = max(usual, 6 * (found.standard_error or 0.0))
            if far > limit:
                yield Finding(
                    check="wrong teacher",
                    level="no-go",
                    where=where,
                    value=far,
                    limit=limit,
                    reason=f"its mean advantage of {found.mean:.2f} nats is {far:.2f} away from "
                    f"the median of {part}: scored by another model, or under another prompt, than "
                    "the other shards; score it again",
                )
