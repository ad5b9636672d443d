"""What the diagnostics mean for spending teacher tokens: go or no-go, with reasons in words."""

from collections.abc import Iterator, Sequence
from typing import Literal

from ..schemas.audit import AuditLimits, Diagnostics, Finding, PartAudit

Level = Literal["no-go", "warning"]


def verdict(parts: Sequence[PartAudit], limits: AuditLimits) -> Iterator[Finding]:
    """Every limit that a round or key does not keep."""
    for part in parts:
        if not part.diagnostics.num_tokens:
            yield Finding(
                check="no tokens",
                level="no-go",
                where=part.name,
                reason="nothing could be read, so nothing speaks for it",
            )
        yield from _agreement(part, limits)
        yield from _special(part, limits)
        yield from _completions(part, limits)
    yield from _rise(parts, limits)


def not_judged(total: Diagnostics, parts: Sequence[PartAudit]) -> Iterator[str]:
    """What the limits speak of, and what is stored does not tell."""
    if total.captured_mass is None:
        yield "captured mass (the teacher's top-k is not stored)"
    if total.overlap is None:
        yield "overlap, overlap mass, empty intersections (both models' top-k are needed)"
    if total.entropy_gap is None and total.entropy_gap_low is None:
        yield "entropy gap (both entropies are needed)"
    if total.advantage is None:
        yield "special tokens, shards unlike the others (both sampled log-probs are needed)"
    elif not any(part.special for part in parts):
        yield "special tokens (none was sampled, or they are not known)"


def _agreement(part: PartAudit, limits: AuditLimits) -> Iterator[Finding]:
    found = part.diagnostics
    yield from _at_least(
        part,
        "overlap",
        found.overlap,
        limits.min_overlap,
        "no-go",
        "student and teacher share few of their likeliest tokens: the student's prefixes mean "
        "little to this teacher; a cold start on teacher completions brings them together",
    )
    if found.overlap_mass_student is not None and found.overlap_mass_teacher is not None:
        both = found.overlap_mass_student, found.overlap_mass_teacher
        is_low = min(both) < limits.min_overlap_mass
        yield from _at_least(
            part,
            "overlap mass",
            min(both),
            limits.min_overlap_mass if is_low else limits.min_final_overlap_mass,
            "no-go" if is_low else "warning",
            f"the shared entries hold {both[0]:.1%} of the student and {both[1]:.1%} of the "
            "teacher, and a loss on them alone sees no more; take more entries, or a loss with the "
            "tail in it",
        )
    if found.num_tokens and found.overlap is not None:
        yield from _at_most(
            part,
            "empty intersections",
            found.num_empty / found.num_tokens,
            limits.max_empty,
            "no-go",
            f"{found.num_empty:,} tokens have no shared entry: the overlap support has nothing to "
            "say there",
        )
    yield from _at_least(
        part,
        "captured mass",
        found.captured_mass,
        limits.min_captured_mass,
        "warning",
        "the stored entries hold too little of the teacher: raise score.k, or take a loss with the "
        "tail bucket or draws",
    )
    gap = found.entropy_gap if found.entropy_gap is not None else found.entropy_gap_low
    yield from _at_most(
        part,
        "entropy gap",
        gap,
        limits.max_entropy_gap,
        "warning",
        "the two are not sure of the same tokens; the gap should fall from round to round",
    )


def _special(part: PartAudit, limits: AuditLimits) -> Iterator[Finding]:
    for token in part.special:
        yield from _at_most(
            part,
            "special tokens",
            token.num_outliers / token.num,
            limits.max_special_outliers,
            "no-go" if token.num >= limits.min_special_places else "warning",
            f"{token.num_outliers:,} of {token.num:,} places of token {token.token or token.id} "
            "are nearly impossible to the teacher: its chat template ends or structures "
            "completions otherwise; give it its own with teacher.prompt, or mask the token",
        )


def _completions(part: PartAudit, limits: AuditLimits) -> Iterator[Finding]:
    texts = part.completions
    for check, num, limit, reason in (
        (
            "truncated",
            texts.truncated,
            limits.max_truncated,
            "completions are cut off: the teacher never sees how they end; raise "
            "rollout.sampling.max_tokens, or read the numbers as of prefixes",
        ),
        (
            "repetitive",
            texts.repetitive,
            limits.max_repetitive,
            "completions repeat themselves; train.drop leaves them out",
        ),
        (
            "duplicates",
            texts.duplicates,
            limits.max_duplicates,
            "completions are copies of another of the same prompt: their teacher tokens buy "
            "nothing; sample fewer, or at a higher temperature",
        ),
    ):
        if texts.num:
            said = f"{num:,} of {texts.num:,} {reason}"
            yield from _at_most(part, check, num / texts.num, limit, "warning", said)


def _rise(parts: Sequence[PartAudit], limits: AuditLimits) -> Iterator[Finding]:
    rounds = [p for p in parts if p.round is not None and p.diagnostics.overlap is not None]
    if len(rounds) < 2:
        return
    first, last = rounds[0].diagnostics.overlap, rounds[-1].diagnostics.overlap
    assert first is not None
    assert last is not None
    yield from _at_least(
        rounds[-1],
        "overlap over rounds",
        last - first,
        limits.min_overlap_rise,
        "warning",
        f"the overlap went from {first:.3f} to {last:.3f}; where distillation works it climbs",
    )


def _at_least(
    part: PartAudit, check: str, value: float | None, limit: float, level: Level, reason: str
) -> Iterator[Finding]:
    if value is not None and value < limit:
        yield _finding(part, check, value, limit, level, reason)


def _at_most(
    part: PartAudit, check: str, value: float | None, limit: float, level: Level, reason: str
) -> Iterator[Finding]:
    if value is not None and value > limit:
        yield _finding(part, check, value, limit, level, reason)


def _finding(
    part: PartAudit, check: str, value: float, limit: float, level: Level, reason: str
) -> Finding:
    return Finding(
        check=check, level=level, where=part.name, value=value, limit=limit, reason=reason
    )
