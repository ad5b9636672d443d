"""A plan's costs as text."""

from collections.abc import Iterator, Mapping, Sequence

from rich import box
from rich.table import Table

from ..schemas.plan import Disk, Measured, Plan, Reading, StageCost, TeacherCost
from .tables import as_text


def plan_lines(plan: Plan) -> Iterator[str]:
    """The table of stages, and what its numbers rest on."""
    bounded = any(stage.num_tokens != stage.most_tokens for stage in plan.stages)
    yield _stage_table(plan.stages, bounded=bounded)
    if plan.num_workers > 1:
        yield f"time is for {plan.num_workers:,} workers of rollout, then of score"
    yield from _prompt_lines(plan)
    if len(plan.score_tokens) > 1:
        tasks = (f"{task} {tokens:,}" for task, tokens in plan.score_tokens.items())
        yield f"to score by task: {', '.join(tasks)} tokens"
    yield (
        f"stored a token: rollouts {_measured(plan.rollout_bytes_per_token, 'bytes')}, "
        f"scores {_measured(plan.score_bytes_per_token, 'bytes')}"
    )
    rates = (f"{s.stage} {_measured(s.tokens_per_s, 'tokens/s')}" for s in plan.stages)
    yield f"rates: {', '.join(rates)}"
    yield from _reading_lines(plan.reading)
    yield from _disk_lines(plan.disk)
    yield from _teacher_lines(plan.teacher, plan.rounds)
    yield from (f"note: {note}" for note in plan.notes)


def _stage_table(stages: Sequence[StageCost], *, bounded: bool) -> str:
    """One line a stage; the columns of the upper bound only where it is not the estimate."""
    at_most = ["at most"] if bounded else []
    table = Table(
        *("stage", "made", "tokens", *at_most, "to make", *at_most),
        *("size", *at_most, "time left", *at_most),
        box=box.SIMPLE,
    )
    for stage in stages:
        pairs = [
            (f"{stage.num_tokens:,}", f"{stage.most_tokens:,}"),
            (f"{stage.left_tokens:,}", f"{stage.most_left_tokens:,}"),
            (size_text(stage.size_bytes), size_text(stage.most_size_bytes)),
            (time_text(stage.left_s), time_text(stage.most_left_s)),
        ]
        cells = [cell for pair in pairs for cell in (pair if bounded else pair[:1])]
        table.add_row(stage.stage, f"{stage.num_done:,}/{stage.num_units:,} {stage.unit}", *cells)
    return as_text(table)


def _prompt_lines(plan: Plan) -> Iterator[str]:
    asked = plan.prompts
    parts = [("prompts", asked.num_requests, asked.num_tokens, plan.completion_tokens)]
    if asked.num_held_out_requests:
        held_out = asked.num_held_out_requests, asked.num_held_out_tokens
        parts.append(("held out", *held_out, plan.held_out_completion_tokens))
    for name, num_requests, num_tokens, length in parts:
        yield (
            f"{name}: {num_requests:,} completions of {num_tokens:,} prompt tokens; "
            f"mean length {_measured(length, 'tokens')}"
        )
    for name, counts in (
        ("left out a round", _ranges(asked.dropped)),
        ("left out of held-out ones", _ranges([asked.held_out_dropped])),
    ):
        if counts:
            yield f"{name}: {', '.join(f'{n} {reason}' for reason, n in counts.items())}"


def _ranges(counted: Sequence[Mapping[str, int]]) -> dict[str, str]:
    """Counts by reason, from the least of any round to the most."""
    reasons = dict.fromkeys(reason for counts in counted for reason in counts)
    found = {}
    for reason in reasons:
        counts = [each.get(reason, 0) for each in counted]
        least, most = min(counts), max(counts)
        found[reason] = f"{most:,}" if least == most else f"{least:,} to {most:,}"
    return found


def _reading_lines(reading: Reading) -> Iterator[str]:
    rate = "" if reading.bytes_per_s is None else f", {size_text(reading.bytes_per_s)}/s"
    yield f"reading: {size_text(reading.update_bytes)} an update{rate}, on each rank"
    if reading.reread_bytes:
        yield (
            f"  a round's {reading.most_shards:,} shards are more than the {reading.held_shards} "
            f"that the learner holds: it reads at least {size_text(reading.reread_bytes)} an "
            "update, whole shards again; a larger rollout.shard_samples avoids it"
        )


def _disk_lines(disk: Disk) -> Iterator[str]:
    if not disk.num_students:
        return
    students = f"{disk.num_students:,} student{'' if disk.num_students == 1 else 's'}"
    yield (
        f"kept in the run's folder: {students} of {_size(disk.student_bytes)}, and the learner's "
        f"state of {_size(disk.checkpoint_bytes)}, of which there are two while it is saved"
    )
    free = f"{size_text(disk.free_bytes)} free at {disk.free_at}"
    if disk.most_bytes is None or disk.most_left_bytes is None:
        yield f"  {free}"
        return
    most, left = size_text(disk.most_bytes), size_text(disk.most_left_bytes)
    yield f"  {most} at most, {left} of it to come; {free}"
    if disk.most_left_bytes > disk.free_bytes:
        yield (
            "  too little: training would stop at a full disk (OPD202); free some, and the same "
            "command goes on"
        )


def _size(measured: Measured) -> str:
    size = "a size that nothing tells" if measured.value is None else size_text(measured.value)
    return f"{size} ({measured.source})"


def _teacher_lines(teacher: TeacherCost | None, rounds: Sequence[int]) -> Iterator[str]:
    if teacher is None:
        yield "teacher: a stage has no rate, so it is not set against a resident one"
        return
    yield (
        f"teacher: {time_text(teacher.cached_s)} of its device to score everything once, "
        f"{time_text(teacher.resident_s)} if it stayed resident: {teacher.ratio:.1f} times as much"
    )
    yield f"  breaks even where starting it takes {time_text(teacher.break_even_start_s)} a round"
    counts = "/".join(str(each.num_experiments) for each in teacher.shared)
    every = "/".join(time_text(each.all_scores_s) for each in teacher.shared)
    first = "/".join(time_text(each.round_0_s) for each in teacher.shared)
    alone = f"; sharing round 0's alone, {first}" if rounds[0] == 0 and first != every else ""
    yield f"  of {counts} experiments that share every score each pays {every}{alone}"
    yield (
        "  assumed: a device a teacher, a worker a stage; a resident teacher scores at the same "
        "rate, idles meanwhile, and nothing overlaps"
    )


def _measured(measured: Measured, unit: str) -> str:
    if measured.value is None:
        return f"({measured.source})"
    return f"{measured.value:,.1f} {unit} ({measured.source})"


def size_text(size_bytes: float | None) -> str:
    """Bytes in the unit that suits them, powers of 1,000."""
    if size_bytes is None:
        return ""
    for unit in ("bytes", "kB", "MB", "GB", "TB"):
        if size_bytes < 1000 or unit == "TB":
            break
        size_bytes /= 1000
    return f"{size_bytes:,.0f} {unit}" if unit == "bytes" else f"{size_bytes:,.1f} {unit}"


def time_text(seconds: float | None) -> str:
    """Seconds, minutes or hours; never days, which no queue counts in."""
    if seconds is None:
        return "no rate"
    if seconds < 120:
        return f"{seconds:.0f} s" if seconds >= 10 or not seconds else f"{seconds:.1f} s"
    return f"{seconds / 60:,.0f} min" if seconds < 7200 else f"{seconds / 3600:,.1f} h"
