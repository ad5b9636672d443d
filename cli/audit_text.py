"""``opdcache audit`` as text."""

from collections.abc import Iterator, Sequence

from rich import box
from rich.table import Table

from ..schemas.audit import Audit, Diagnostics, PartAudit
from .screen import visible
from .tables import as_text

_HOW_TO_SCORE_THE_STUDENT = (
    "H(p) is bounded by the recorded entries; 'opdcache score RUN.yaml --round R --student' stores "
    "it exactly"
)


def audit_text(audit: Audit) -> str:
    """The verdict, then tables, a line a round or key."""
    parts = audit.parts
    tables = [
        _agreement(audit),
        _entropies(audit),
        *(_positions(part) for part in parts if len(part.by_position) > 1),
        _masses(parts),
        _texts(parts),
        _special(parts),
    ]
    return "\n".join([f"audit of {audit.of}", *filter(None, tables), *_verdict(audit)])


def _agreement(audit: Audit) -> str:
    table = _table(f"agreement (top {audit.k}, nats)", "", "tokens", "overlap", "mass p", "mass q")
    for heading in ("overlap-token advantage", "empty", "fewer than k", "advantage", "r-1-log r"):
        table.add_column(heading, justify="right")
    for name, found in _rows(audit):
        table.add_row(
            name,
            f"{found.num_tokens:,}",
            _number(found.overlap),
            _number(found.overlap_mass_student),
            _number(found.overlap_mass_teacher),
            _number(found.overlap_advantage),
            f"{found.num_empty:,}",
            f"{found.num_narrow:,}",
            _number(found.advantage),
            _number(found.reverse_kl_sampled),
        )
    return as_text(table)


def _rows(audit: Audit) -> Iterator[tuple[str, Diagnostics]]:
    for part in audit.parts:
        yield part.name, part.diagnostics
    if len(audit.parts) > 1:
        yield "all", audit.total


def _entropies(audit: Audit) -> str:
    table = _table("entropy, nats", "", "H(q)", "H(p)", "gap |H(q) - H(p)|")
    for name, found in _rows(audit):
        table.add_row(
            name,
            _number(found.teacher_entropy),
            _within(found.student_entropy, found.student_entropy_low, found.student_entropy_high),
            _within(found.entropy_gap, found.entropy_gap_low, found.entropy_gap_high),
        )
    lines = [as_text(table)]
    if any(part.num_own < part.num_shards for part in audit.parts):
        lines.append(f"  {_HOW_TO_SCORE_THE_STUDENT}")
    return "\n".join(lines)


def _positions(part: PartAudit) -> str:
    table = _table(f"{part.name} by position", "from token", "tokens", "overlap", "mass p")
    for heading in ("mass q", "H(q)", "H(p)", "gap", "advantage"):
        table.add_column(heading, justify="right")
    for found in part.by_position:
        table.add_row(
            f"{found.first:,}",
            f"{found.num_tokens:,}",
            _number(found.overlap),
            _number(found.overlap_mass_student),
            _number(found.overlap_mass_teacher),
            _number(found.teacher_entropy),
            _within(found.student_entropy, found.student_entropy_low, found.student_entropy_high),
            _within(found.entropy_gap, found.entropy_gap_low, found.entropy_gap_high),
            _number(found.advantage),
        )
    return as_text(table)


def _masses(parts: Sequence[PartAudit]) -> str:
    """What a smaller k would keep, of the last round that says."""
    part = next((p for p in reversed(parts) if p.by_k), None)
    if part is None:
        return ""
    table = _table(f"{part.name} by entries kept", "k", "mass q", "mass p", "overlap", "bytes")
    for at in part.by_k:
        table.add_row(
            str(at.k),
            _number(at.teacher_mass),
            _number(at.student_mass),
            _number(at.overlap),
            f"{at.bytes_per_token:.0f}",
        )
    return as_text(table)


def _texts(parts: Sequence[PartAudit]) -> str:
    table = _table("completions", "", "number", "median tokens", "longest", "truncated")
    for heading in ("repetitive", "copies", "reward", "AUROC", "on repeated tokens", "on others"):
        table.add_column(heading, justify="right")
    for part in parts:
        texts, repetition = part.completions, part.repetition
        table.add_row(
            part.name,
            f"{texts.num:,}",
            f"{texts.median_tokens:,.0f}",
            f"{texts.longest_tokens:,}",
            _share(texts.truncated, texts.num),
            _share(texts.repetitive, texts.num),
            _share(texts.duplicates, texts.num),
            _number(part.reward.mean),
            _number(part.reward.auroc),
            f"{_number(repetition.advantage)} ({repetition.num_tokens:,})",
            _number(repetition.rest_advantage),
        )
    return as_text(table)


def _special(parts: Sequence[PartAudit]) -> str:
    table = _table("special tokens", "", "token", "places", "log q", "advantage", "outliers")
    for part in parts:
        for token in part.special:
            table.add_row(
                part.name,
                visible(token.token or str(token.id)),
                f"{token.num:,}",
                _number(token.teacher_logprob),
                _number(token.advantage),
                f"{token.num_outliers:,}",
            )
    return as_text(table) if table.row_count else ""


def _verdict(audit: Audit) -> Iterator[str]:
    for finding in audit.findings:
        value, limit = finding.value, finding.limit
        numbers = "" if limit is None else f" ({value:.3g}, limit {limit:.3g})"
        reason = visible(finding.reason)
        yield f"{finding.level}: {finding.check} [{finding.where}]{numbers}: {reason}"
    for what in audit.not_judged:
        yield f"not judged: {what}"
    tokens = audit.total.num_tokens
    yield (
        f"verdict: {'go' if audit.is_go else 'no-go'}; {tokens:,} tokens in "
        f"{audit.elapsed_s:.1f} s, {tokens / max(audit.elapsed_s, 1e-3):,.0f} a second"
    )


def _table(title: str, first: str, *rest: str) -> Table:
    table = Table(first, box=box.SIMPLE, title=title, title_justify="left")
    for heading in rest:
        table.add_column(heading, justify="right")
    return table


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"


def _within(exact: float | None, low: float | None, high: float | None) -> str:
    if exact is not None:
        return f"{exact:.4f}"
    if low is None or high is None:
        return "-"
    return f"{low:.3f} to {high:.3f}"


def _share(num: int, of: int) -> str:
    return f"{num / of:.1%}" if of else "-"
