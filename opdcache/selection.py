"""Prompts chosen by what is cached of them: no model is loaded, and no teacher is asked.

A prompt's likelihood and overlap are means over the supervised tokens of all its completions. What
is held of a prompt meanwhile are their sums; its text is read again where it is needed.
"""

import json
import math
import secrets
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from fractions import Fraction
from itertools import islice
from pathlib import Path
from typing import TextIO

import numpy as np
from numpy.typing import NDArray

from .apart import PROMPT_COLUMNS, Apart, file_source, recorded_prompts
from .audit.blocks import Block, blocks
from .audit.measures import Shared
from .audit.targets import Target, of_run
from .errors import PromptError, UsageError
from .identity import digest
from .prompts import Prompt, PromptSet, load_prompts
from .run_prompts import asked_text
from .schemas.selection import By, Range, Selection

BATCH = 4096
"""Prompts whose texts are held at a time."""
MEASURES: tuple[By, ...] = ("likelihood", "overlap")
_NEEDS: Mapping[By, str] = {
    "likelihood": "the score column 'sampled'",
    "overlap": "the score column 'topk', and recorded student entries",
}


@dataclass(frozen=True, slots=True)
class Choice:
    """What is asked for.

    Attributes:
        by: what the prompts are ordered by, largest first.
        keep: share of those that may be kept, rounded up; one at least.
        task: of the chosen prompts; None leaves each its own.
        apart_from: files of prompts, or run files, of whose prompts none is kept.
        embedder: model folder that tells which prompts are near those; None: copies alone.
        cosine: from which two prompts are near.
        other: file of prompts that are added.
        other_task: their task.
    """

    by: By = "likelihood"
    keep: float = 0.5
    task: str | None = None
    apart_from: tuple[Path, ...] = ()
    embedder: Path | None = None
    cosine: float = 0.6
    other: Path | None = None
    other_task: str = "other"


class Measured:
    """Sums over a prompt's completions.

    Attributes:
        left_out: why the prompt is left out; None while it is not.
    """

    __slots__ = ("_counts", "_sums", "left_out")

    def __init__(self, left_out: str | None) -> None:
        self._sums, self._counts = [0.0] * len(MEASURES), [0] * len(MEASURES)
        self.left_out = left_out

    def add(self, by: By, total: float, count: int) -> None:
        """A completion's sum, and the number of its tokens."""
        self._sums[MEASURES.index(by)] += total
        self._counts[MEASURES.index(by)] += count

    def mean(self, by: By) -> float | None:
        """Mean over the tokens that have a value; None of none."""
        count = self._counts[MEASURES.index(by)]
        return self._sums[MEASURES.index(by)] / count if count else None


def select(run_file: Path, file: Path, choice: Choice, rounds: Sequence[int] = ()) -> Selection:
    """Choose prompts of a run's scored rounds, and write them as a JSONL source, whole or not at
    all.

    Args:
        rounds: to read; every scored one by default.

    Raises:
        InputsMissing: the run has no scored round, or not one that was asked for.
        UsageError: the file is there, or nothing is stored that tells what is asked for.
        PromptError: no prompt is left, or those of a file cannot be read.
        ModelError, NotInstalled: no embeddings can be made.
    """
    _refuse(file)
    target = of_run(run_file, rounds)
    others = PromptSet([], {}) if choice.other is None else load_prompts(file_source(choice.other))
    apart = Apart(choice.apart_from, choice.embedder, choice.cosine)
    found, read = _measured(target, choice, apart)
    _leave_out_unknown(found.values(), choice.by, run_file)
    _leave_out_near(target, found, choice, apart)
    _leave_out_worst(found, choice)
    if all(one.left_out for one in found.values()):
        raise PromptError("no prompt is left", where=run_file, got=_reasons(found.values()))
    with _whole(file) as out:
        written = _Written(out)
        _write_kept(written, target, found, choice)
        num_kept = written.num_rows
        left_out = _write_others(written, others, choice, apart)
    kept = [one for one in found.values() if one.left_out is None]
    return Selection(
        file=str(file),
        rounds=tuple(part.round for part in target.parts if part.round is not None),
        by=choice.by,
        num_completions=read["completions"],
        num_tokens=read["tokens"],
        num_prompts=len(found),
        num_kept=num_kept,
        left_out=_reasons(found.values()),
        likelihood=_range(kept, "likelihood"),
        overlap=_range(kept, "overlap"),
        num_other=written.num_rows - num_kept,
        other_left_out=left_out,
        num_new_ids=written.num_new_ids,
        tasks=dict(written.tasks),
    )


def _refuse(file: Path) -> None:
    if file.exists():
        raise UsageError("is there already", where=file, remedy="delete it, or give another file")
    if not file.parent.is_dir():
        raise UsageError("no such folder", where=file.parent, remedy="make it, or name another")


def _measured(
    target: Target, choice: Choice, apart: Apart
) -> tuple[dict[str, Measured], Counter[str]]:
    """Every prompt by its key, and counts of what was read."""
    found, read = dict[str, Measured](), Counter[str]()
    for shard in (shard for part in target.parts for shard in part.shards):
        for block in blocks(target.cache, shard):
            read += Counter(completions=block.table.num_rows, tokens=int(block.supervised.sum()))
            sums = {by: _by_row(block, values) for by, values in _values(block).items()}
            for row, (key, prompt) in enumerate(recorded_prompts(block.table, choice.task)):
                if key not in found:
                    found[key] = Measured(_refused(prompt, apart))
                for by, (sums_N, counts_N) in sums.items():
                    found[key].add(by, float(sums_N[row]), int(counts_N[row]))
    return found, read


def _values(block: Block) -> dict[By, NDArray[np.float64]]:
    """What the block's columns give of each token, float64 [T]; NaN is no value."""
    values = dict[By, NDArray[np.float64]]()
    if block.scores.sampled_logprobs is not None:
        values["likelihood"] = block.scores.sampled_logprobs.astype(np.float64)
    shared = Shared.between(block)
    if shared is not None:
        values["overlap"] = shared.overlap(shared.student.ids.shape[1])
    return values


def _by_row(
    block: Block, values_T: NDArray[np.float64]
) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    """Sums, and numbers of values, of each completion's supervised tokens, [N] each."""
    counted, num_rows = block.supervised & ~np.isnan(values_T), block.table.num_rows
    rows = block.rows[counted]
    sums_N = np.bincount(rows, weights=values_T[counted], minlength=num_rows)
    return sums_N.astype(np.float64), np.bincount(rows, minlength=num_rows)


def _refused(prompt: Prompt | None, apart: Apart) -> str | None:
    if prompt is None:
        return "chat not recorded"
    name = apart.copied_from(asked_text(prompt))
    return None if name is None else f"also in {name}"


def _leave_out_unknown(found: Collection[Measured], by: By, run_file: Path) -> None:
    """Leave out prompts without a value.

    Raises:
        UsageError: none has one, since nothing is stored that gives it.
    """
    unknown = [one for one in found if one.mean(by) is None]
    if len(unknown) == len(found):
        raise UsageError(
            f"no {by} is told by what these rounds store",
            where=run_file,
            expected=_NEEDS[by],
            remedy="order by the other with --by, or add what is missing to score.columns",
        )
    for one in unknown:
        one.left_out = one.left_out or f"no {by} stored"


def _leave_out_near(
    target: Target, found: Mapping[str, Measured], choice: Choice, apart: Apart
) -> None:
    if not apart.has_embedder:
        return
    left = {key for key, one in found.items() if one.left_out is None}
    prompts = _prompts(target, left, choice.task)
    while batch := list(islice(prompts, BATCH)):
        near = apart.are_near([asked_text(prompt) for _, prompt in batch])
        for (key, _), is_near in zip(batch, near, strict=True):
            if is_near:
                found[key].left_out = _near(choice)


def _near(choice: Choice) -> str:
    return f"cosine of {choice.cosine:g} or more to one of them"


def _leave_out_worst(found: Mapping[str, Measured], choice: Choice) -> None:
    """All but the best share of what is left; equals go by their digest."""
    values = {
        key: value
        for key, one in found.items()
        if one.left_out is None and (value := one.mean(choice.by)) is not None
    }
    ordered = sorted(values, key=lambda key: (-values[key], key))
    num_kept = max(1, math.ceil(Fraction(str(choice.keep)) * len(ordered)))
    reason = f"not in the best {choice.keep:g} by {choice.by}"
    for key in ordered[num_kept:]:
        found[key].left_out = reason


def _prompts(
    target: Target, wanted: Iterable[str], task: str | None
) -> Iterator[tuple[str, Prompt]]:
    """The prompts of some keys, each once, in the order of the rounds."""
    left = set(wanted)
    for shard in (shard for part in target.parts for shard in part.shards):
        if not left:
            return
        manifest = target.cache.need_rollouts(shard.scored.rollouts)
        for key, prompt in recorded_prompts(
            target.cache.read_rollouts(manifest, PROMPT_COLUMNS), task
        ):
            if key in left and prompt is not None:
                left.remove(key)
                yield key, prompt


class _Written:
    """Rows on their way into a file.

    Attributes:
        tasks: rows by task.
        texts: digests of what they ask.
        num_new_ids: rows whose id another prompt has.
    """

    def __init__(self, out: TextIO) -> None:
        self._out, self._ids = out, set[str]()
        self.tasks, self.texts, self.num_new_ids = Counter[str](), set[str](), 0

    @property
    def num_rows(self) -> int:
        """Rows so far."""
        return self.tasks.total()

    def add(self, prompt: Prompt, values: Mapping[By, float | None]) -> None:
        """Write one; an id that another prompt has is replaced by the start of a digest."""
        name, messages = prompt.prompt_id, prompt.messages
        if name in self._ids:
            name = digest([name, prompt.task, messages, prompt.answer])[:16]
            self.num_new_ids += 1
        self._ids.add(name)
        self.tasks[prompt.task] += 1
        self.texts.add(digest(asked_text(prompt)))
        chat = [{"role": role, "content": content} for role, content in messages]
        row = {"id": name, "task": prompt.task, "messages": chat, "answer": prompt.answer}
        told = {by: values.get(by) for by in MEASURES}
        self._out.write(json.dumps({**row, **told}, ensure_ascii=False) + "\n")


def _write_kept(
    written: _Written, target: Target, found: Mapping[str, Measured], choice: Choice
) -> None:
    kept = {key: one for key, one in found.items() if one.left_out is None}
    for key, prompt in _prompts(target, kept, choice.task):
        written.add(prompt, {by: kept[key].mean(by) for by in MEASURES})


def _write_others(
    written: _Written, others: PromptSet, choice: Choice, apart: Apart
) -> dict[str, int]:
    """Write the other prompts as a task of their own; counts of those that are not, by reason."""
    if others.prompts and choice.other_task in written.tasks:
        raise UsageError(
            f"chosen prompts have the task {choice.other_task!r} too",
            where=choice.other,
            remedy="give another --other-task, so that prompts.shares can tell them apart",
        )
    left_out = Counter(others.dropped)
    near = apart.are_near([asked_text(prompt) for prompt in others.prompts])
    for prompt, is_near in zip(others.prompts, near, strict=True):
        reason = _refused(prompt, apart) or (_near(choice) if is_near else None)
        if reason is None and digest(asked_text(prompt)) in written.texts:
            reason = "copy of a written prompt"
        if reason is None:
            written.add(replace(prompt, task=choice.other_task), {})
        else:
            left_out[reason] += 1
    return dict(left_out)


@contextmanager
def _whole(file: Path) -> Iterator[TextIO]:
    """A draft that takes the file's place when the block ends well."""
    draft = file.with_name(f".{file.name}.{secrets.token_hex(4)}")
    try:
        with draft.open("x", encoding="utf-8") as out:
            yield out
        draft.replace(file)
    finally:
        draft.unlink(missing_ok=True)


def _reasons(found: Iterable[Measured]) -> dict[str, int]:
    return dict(Counter(one.left_out for one in found if one.left_out is not None))


def _range(kept: Iterable[Measured], by: By) -> Range | None:
    values = [value for one in kept if (value := one.mean(by)) is not None]
    return Range(least=min(values), most=max(values)) if values else None
