"""``opdcache status`` as text."""

from collections import Counter
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime

from rich import box
from rich.table import Table

from ..schemas.status import RunStatus, StageStatus
from .plan_text import time_text
from .tables import as_text


def status_text(status: RunStatus) -> str:
    """One line a stage of a round, the workers of those under way, and what failed."""
    at_it = [stage for stage in status.stages if stage.state != "done" and stage.workers]
    tables = [_stages_table(status.stages), *map(_workers_table, at_it)]
    return "\n".join([*tables, *_failures(status)])


def _stages_table(stages: Sequence[StageStatus]) -> str:
    heads = ("round", "stage", "state", "progress", "cached", "tokens", "seconds", "tokens/s")
    table = Table(*heads, "left", box=box.SIMPLE)
    for row in stages:
        table.add_row(
            str(row.round),
            row.stage,
            row.state,
            f"{row.done}/{row.total} {row.unit}" if row.total else "",
            str(row.cached) if row.state == "done" and row.unit == "shards" else "",
            f"{row.num_tokens:,}" if row.num_tokens else "",
            f"{row.elapsed_s:.1f}" if row.elapsed_s is not None else "",
            f"{row.tokens_per_s:,.0f}" if row.tokens_per_s else "",
            time_text(row.left_s) if row.left_s is not None else "",
        )
    return as_text(table)


def _workers_table(stage: StageStatus) -> str:
    heads = ("worker", "state", "host", "process", stage.unit, "tokens", "tokens/s", "said")
    title = f"round {stage.round} {stage.stage}"
    table = Table(*heads, "error", box=box.SIMPLE, title=title, title_justify="left")
    for worker in stage.workers:
        said = datetime.now(UTC) - datetime.fromisoformat(worker.said_at)
        table.add_row(
            f"{worker.index}/{worker.count}",
            worker.state,
            worker.host,
            str(worker.pid),
            str(worker.num_units),
            f"{worker.num_tokens:,}",
            f"{worker.tokens_per_s:,.0f}",
            f"{time_text(said.total_seconds())} ago",
            worker.error or "",
        )
    return as_text(table)


def _failures(status: RunStatus) -> Iterator[str]:
    """The last error of each shard that failed, and how often it did."""
    last = {failure.key: failure for failure in status.failures}
    tries = Counter(failure.key for failure in status.failures)
    for key, failure in last.items():
        yield (
            f"{failure.kind} {key[:12]} failed {tries[key]} times, last on {failure.host} at "
            f"{failure.at}: {failure.error}"
        )
