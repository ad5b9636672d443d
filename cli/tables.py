"""Tables as text."""

from collections.abc import Iterator, Sequence
from datetime import UTC, datetime
from typing import TYPE_CHECKING

from rich import box
from rich.console import Console
from rich.table import Table

from ..schemas.rounds import EvaluationRound
from ..store.upkeep import Listed

if TYPE_CHECKING:
    from ..score.check import Noise  # imports torch


def as_text(table: Table) -> str:
    """A table as plain text, as wide as it needs."""
    console = Console(width=200, no_color=True, highlight=False, markup=False, emoji=False)
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


def cache_lines(rows: Sequence[Listed]) -> Iterator[str]:
    """One line a shard, and the sum; plain, since there may be very many."""
    yield (
        "kind      key           made by       of                k      rows        tokens"
        "           bytes        age  runs"
    )
    now, total = datetime.now(UTC).timestamp(), 0
    for one, committed_at, used_by in rows:
        total += one.size_bytes
        age = f"{(now - committed_at.timestamp()) / 3600:.1f} h"
        runs = ", ".join(run[:8] for run in used_by)
        yield (
            f"{one.kind:8}  {one.key[:12]:12}  {one.made_by[:12]:12}  {one.of[:12]:12}"
            f"  {one.k:5}  {one.num_rows:8,}  {one.num_tokens:12,}  {one.size_bytes:14,}"
            f"  {age:>9}  {runs}"
        )
    yield f"{len(rows):,} shards, {total:,} bytes"


def noise_lines(noise: "Noise") -> list[str]:
    """What a second scoring says of the first."""
    pairs = (
        ("sampled log-prob", noise.sampled_mean, noise.sampled_max),
        ("entropy", noise.entropy_mean, noise.entropy_max),
        ("top-k log-probs", noise.topk_mean, noise.topk_max),
    )
    lines = [f"{noise.num_samples:,} completions scored again, {noise.num_tokens:,} tokens, nats:"]
    lines += [
        f"  {name}: off by {mean:.2g} on average, {most:.2g} at most"
        for name, mean, most in pairs
        if mean == mean  # what is not stored is nan
    ]
    if noise.same_first == noise.same_first:
        lines.append(
            f"  likeliest entry the same at {noise.same_first:.2%} of the tokens; "
            f"{noise.same_topk:.2%} of the stored entries kept again"
        )
    if noise.sampled_mean == noise.sampled_mean:
        floor = f"{noise.reverse_kl_sampled:.2g}"
        lines.append(f"  noise floor: the teacher is {floor} nats of reverse KL from itself")
    return lines
