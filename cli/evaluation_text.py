"""A held-out evaluation as text."""

from collections.abc import Iterator, Sequence

from rich import box
from rich.table import Table

from ..schemas.evaluation import Accuracy, Estimate, Evaluation, ModelAccuracy, Recovery
from ..schemas.rounds import EvaluationRound
from .tables import as_text

ESTIMATOR = (
    "exact full-vocabulary KL(student || teacher) in float32, mean over the tokens of fresh "
    "student completions of held-out prompts"
)


def evaluation_lines(evaluation: Evaluation) -> Iterator[str]:
    """The table of divergence, then those of accuracy."""
    if evaluation.divergence is not None:
        yield f"reverse KL: {ESTIMATOR}"
        yield _divergence_table(evaluation.divergence)
    if evaluation.accuracy is not None:
        yield from _accuracy_lines(evaluation.accuracy)


def _divergence_table(rows: Sequence[EvaluationRound]) -> str:
    """One line a student; round 0 is before training."""
    table = Table(
        "round", "reverse KL", "change", "overlap@16", "entropy gap", "tokens", box=box.SIMPLE
    )
    first = next((row.reverse_kl for row in rows if not row.round), 0)
    for row in rows:
        table.add_row(
            str(row.round),
            f"{row.reverse_kl:.4f}",
            f"{row.reverse_kl / first - 1:+.1%}" if row.round and first else "",
            f"{row.overlap:.4f}",
            f"{row.entropy_gap:.4f}",
            f"{row.tokens:,}",
        )
    return as_text(table)


def _accuracy_lines(accuracy: Accuracy) -> Iterator[str]:
    prompts = accuracy.overall[0].num_prompts
    yield (
        f"accuracy: {accuracy.verifier} {accuracy.version[:12]}, mean over {prompts:,} held-out "
        f"prompts of {accuracy.samples_per_prompt:,} completions each; in brackets "
        f"{accuracy.level:.0%} intervals, by a bootstrap over prompts"
    )
    for task, rows in {"": accuracy.overall, **accuracy.by_task}.items():
        if task:
            yield f"task {task}, {rows[0].num_prompts:,} prompts:"
        yield _accuracy_table(rows)
        yield from _gap_lines(rows)
    failed = [f"{_name(row)}: {row.num_failed:,}" for row in accuracy.overall if row.num_failed]
    if failed:
        yield f"completions that could not be judged, counted as wrong: {', '.join(failed)}"


def _name(row: ModelAccuracy) -> str:
    return "teacher" if row.round is None else f"round {row.round}"


def _accuracy_table(rows: Sequence[ModelAccuracy]) -> str:
    """One line a student, and the teacher's last; of pass@k the first and the last."""
    every_k = sorted({1, max(rows[0].pass_at)})
    compared = any(row.recovery for row in rows)
    table = Table(
        *("round", f"avg@{every_k[-1]}", *(f"pass@{k}" for k in every_k)),
        *(["gap recovery"] if compared else []),
        *("truncated", "completions"),
        box=box.SIMPLE,
    )
    for row in rows:
        table.add_row(
            "teacher" if row.round is None else str(row.round),
            _estimate(row.mean_score),
            *(_estimate(row.pass_at[k]) for k in every_k),
            *([_recovery(row.recovery)] if compared else []),
            f"{row.num_truncated / row.num_completions:.1%}",
            f"{row.num_completions:,}",
        )
    return as_text(table)


def _estimate(of: Estimate) -> str:
    return f"{of.value:.3f} [{of.low:.3f}, {of.high:.3f}]"


def _recovery(of: Recovery | None) -> str:
    if of is None:
        return ""
    if of.value is None:
        return "undefined"
    if of.low is None or of.high is None:
        return f"{of.value:.0%} (no bounds)"
    return f"{of.value:.0%} [{of.low:.0%}, {of.high:.0%}]"


def _gap_lines(rows: Sequence[ModelAccuracy]) -> Iterator[str]:
    """How sure the gap itself is, which all rounds are measured by."""
    of = next((row.recovery for row in rows if row.recovery), None)
    if of is None:
        return
    line = f"gap: the teacher is {of.gap:+.3f} from round 0 in avg@n"
    if of.share_without_gap:
        line += f"; it does not lead in {of.share_without_gap:.1%} of the resamples"
    if of.value is None:
        line += ": nothing to recover"
    yield line
