"""Chosen prompts as text."""

from collections.abc import Iterator, Mapping

from ..schemas.selection import Range, Selection


def selection_lines(chosen: Selection) -> Iterator[str]:
    """What was read, what was kept, and what was left out, with the reasons."""
    rounds = ", ".join(map(str, chosen.rounds))
    yield (
        f"read: {chosen.num_completions:,} completions of {chosen.num_prompts:,} prompts, "
        f"{chosen.num_tokens:,} supervised tokens (rounds {rounds})"
    )
    yield f"kept: {chosen.num_kept:,} prompts, by {chosen.by}"
    if chosen.likelihood is not None:
        yield f"  likelihood: {_range(chosen.likelihood)} nats a token"
    if chosen.overlap is not None:
        yield f"  overlap: {_range(chosen.overlap)}"
    yield from _left_out("left out", chosen.left_out)
    if chosen.num_other or chosen.other_left_out:
        yield f"other: {chosen.num_other:,} prompts"
        yield from _left_out("other, left out", chosen.other_left_out)
    if chosen.num_new_ids:
        yield f"new ids: {chosen.num_new_ids:,}, where two prompts had the same"
    tasks = ", ".join(f"{name} {count:,}" for name, count in chosen.tasks.items())
    yield f"written: {chosen.file} ({tasks})"


def _range(values: Range) -> str:
    return f"{values.least:.4f} to {values.most:.4f}"


def _left_out(title: str, reasons: Mapping[str, int]) -> Iterator[str]:
    for reason, count in reasons.items():
        yield f"{title}: {count:,} {reason}"
