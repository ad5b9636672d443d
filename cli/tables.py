"""Tables as text."""

from collections.abc import Sequence
from datetime import UTC, datetime

from rich import box
from rich.console import Console
from rich.table import Table

from ..rounds import StageStatus
from ..schemas.manifests import ScoreManifest
from ..schemas.rounds import EvaluationRound
from ..store.upkeep import Listed


def as_text(table: Table) -> str:
    """A table as plain text, as wide as it needs."""
    console = Console(width=200, no_color=True, highlight=False)
    with console.capture() as capture:
        console.print(table)
    return capture.get().rstrip()


def evaluation_table(rows: Sequence[EvaluationRound]) -> str:
    """One line a student; round 0 is before training."""
    table = Table(
        "round", "reverse KL", "change", "overlap@16", "entropy gap", "tokens", box=box.SIMPLE
    )
    for row in rows:
        change = row.reverse_kl / rows[0].reverse_kl - 1
        table.add_row(
            str(row.round),
            f"{row.reverse_kl:.4f}",
            f"{change:+.1%}" if row.round else "",
            f"{row.overlap:.4f}",
            f"{row.entropy_gap:.4f}",
            f"{row.tokens:,}",
        )
    return as_text(table)


def cache_table(rows: Sequence[Listed]) -> str:
    """One line a shard, and the sum."""
    table = Table(
        "kind",
        "key",
        "made by",
        "of",
        "k",
        "rows",
        "tokens",
        "bytes",
        "age",
        "runs",
        box=box.SIMPLE,
    )
    now = datetime.now(UTC)
    for row in rows:
        manifest = row.manifest
        if isinstance(manifest, ScoreManifest):
            made_by, of, k = manifest.identity.teacher, manifest.rollout_key, manifest.identity.k
        else:
            made_by, of, k = manifest.identity.student, "", manifest.identity.student_topk
        table.add_row(
            manifest.kind,
            manifest.key[:12],
            made_by[:12],
            of[:12],
            str(k),
            f"{manifest.num_rows:,}",
            f"{manifest.num_tokens:,}",
            f"{row.size_bytes:,}",
            f"{(now - row.committed_at).total_seconds() / 3600:.1f} h",
            ", ".join(run[:8] for run in row.used_by),
        )
    rows_bytes = sum(row.size_bytes for row in rows)
    return f"{as_text(table)}\n{len(rows):,} shards, {rows_bytes:,} bytes"


def status_table(rows: Sequence[StageStatus]) -> str:
    """One line a stage of a round."""
    table = Table(
        "round", "stage", "state", "progress", "cached", "tokens", "seconds", box=box.SIMPLE
    )
    for row in rows:
        table.add_row(
            str(row.step.round),
            row.step.stage,
            row.state,
            f"{row.done}/{row.total} {row.unit}" if row.total else "",
            str(row.cached) if row.state == "done" and row.unit == "shards" else "",
            f"{row.num_tokens:,}" if row.num_tokens else "",
            f"{row.elapsed_s:.1f}" if row.elapsed_s is not None else "",
        )
    return as_text(table)
