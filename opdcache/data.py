"""Cached completions and teacher scores as samples, for any trainer.

::

    cache = opdcache.open_cache("s3://bucket/opd-cache")
    samples = cache.of_run("runs/first")  # what a run's rounds pinned
    samples = cache.scored_by(teacher)  # every completion that a teacher scored
    samples[17].scores.topk.logprobs  # [T, K], nats

Samples are a plain sequence of records. ``opdcache.torch_data`` makes tensors of them.
"""

from collections import OrderedDict
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from threading import Lock
from typing import Any, get_args, overload

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from .errors import InputsMissing
from .runfolder import RunFolder
from .schemas.columns import ScoreColumn
from .schemas.rounds import RolloutShard, ServedColumns
from .store import rollouts as tables
from .store.cache import Cache, ScoreSet
from .store.scores import Scores

SHARDS_IN_MEMORY = 8


@dataclass(frozen=True, slots=True)
class Sample:
    """One completion with its scores. P prompt tokens, T completion tokens, S recorded entries.

    Index t of every array of T is the distribution that predicts completion token t. Log-probs are
    natural, at temperature 1 (``sampling_logprobs``: under the distribution sampled from).

    Attributes:
        prompt_token_ids: int32 [P].
        completion_token_ids: int32 [T], EOS included.
        behavior_logprobs, sampling_logprobs: float32 [T], the student's, when it sampled; None
            where an import had none, NaN at masked tokens that had none.
        student_topk_ids: int32 [T, S], or None when none are recorded.
        student_topk_logprobs: float32 [T, S], or None.
        messages: the prompt's chat as JSON, a list of [role, content]; None when it is not known.
        loss_mask: bool [T], the tokens that a loss may look at; the others are context.
        scores: the teacher's; columns that are not stored, or not asked for, are None.
    """

    rollout_id: str
    task: str
    answer: str | None
    messages: str | None
    text: str
    finish_reason: str
    prompt_token_ids: NDArray[np.int32]
    completion_token_ids: NDArray[np.int32]
    behavior_logprobs: NDArray[np.float32] | None
    sampling_logprobs: NDArray[np.float32] | None
    student_topk_ids: NDArray[np.int32] | None
    student_topk_logprobs: NDArray[np.float32] | None
    loss_mask: NDArray[np.bool_]
    scores: Scores


@dataclass(frozen=True, slots=True)
class Scored:
    """A rollout shard and the score sets that are read with it."""

    rollouts: RolloutShard
    teacher: str
    served: tuple[ServedColumns, ...]


class OpenCache:
    """A cache opened for reading."""

    def __init__(self, url: str) -> None:
        self._cache = Cache(url)

    def of_run(
        self,
        run: Path | str,
        rounds: Iterable[int] | None = None,
        columns: Iterable[ScoreColumn] = get_args(ScoreColumn),
    ) -> "Samples":
        """The samples that a run's rounds pinned, in the order of its shards.

        Args:
            run: the run's folder (``output`` of its run file).
            rounds: rounds to read; every scored one by default.
            columns: score columns to read, of those that the run stores.

        Raises:
            InputsMissing: the run has no scored round, or not one that was asked for, or none of
                the columns.
        """
        wanted = frozenset(columns)
        listed = [
            replace(scored, served=_only(scored.served, wanted)) for scored in of_run(run, rounds)
        ]
        if not all(scored.served for scored in listed):
            raise InputsMissing(
                f"the run stores none of the columns {', '.join(sorted(wanted))}",
                where=run,
                remedy="ask for others, or add them to score.columns",
            )
        return Samples(self._cache, listed)

    def scored_by(self, teacher: str, columns: Iterable[ScoreColumn] = ("topk",)) -> "Samples":
        """Every sample of the cache that a teacher scored with these columns, by rollout key.

        Args:
            teacher: the teacher's fingerprint (``teacher`` of a run's ``resolved.json``).

        Raises:
            InputsMissing: there is none.
        """
        wanted = frozenset(columns)
        found = self._cache.scored_by(teacher, wanted)
        if not found:
            raise InputsMissing(
                f"no shard is scored by teacher {teacher[:12]} with {', '.join(sorted(wanted))}",
                where=self._cache.objects.url,
            )
        return Samples(self._cache, [Scored(shard, teacher, served) for shard, served in found])


def of_run(run: Path | str, rounds: Iterable[int] | None = None) -> list[Scored]:
    """What a run's rounds pinned, in the order of its shards.

    Args:
        rounds: every scored one by default.

    Raises:
        InputsMissing: the run has no scored round, or not one that was asked for, or stores no
            score.
    """
    folder, listed = RunFolder(Path(run)), list[Scored]()
    for index in folder.scored_rounds() if rounds is None else rounds:
        rollouts, scores = folder.with_scores(index)
        listed += [
            Scored(shard, scored.teacher, scored.served)
            for shard, scored in zip(rollouts.shards, scores.shards, strict=True)
        ]
    if not listed:
        raise InputsMissing("the run has no scored round yet", where=run)
    return listed


def open_cache(url: str | Path) -> OpenCache:
    """Open a cache for reading: a folder, or any URL that obstore knows.

    Raises:
        StoreError: it cannot be reached.
    """
    return OpenCache(str(url))


class Samples(Sequence[Sample]):
    """Samples of some shards by index. What is read is checked, and kept for some shards; of a
    shard with large objects, one sample costs the blocks that hold its tokens.

    Threads may read at once. Pickled, as by a ``DataLoader``'s workers, it opens the cache anew.
    """

    def __init__(self, cache: Cache, shards: Sequence[Scored]) -> None:
        self._cache, self._shards = cache, list(shards)
        rows = [shard.rollouts.num_rows for shard in self._shards]
        self._starts = np.concatenate([[0], np.cumsum(rows)]).astype(np.int64)
        self._open: OrderedDict[int, OpenShard] = OrderedDict()
        self._lock = Lock()

    def __len__(self) -> int:
        return int(self._starts[-1])

    @overload
    def __getitem__(self, index: int) -> Sample: ...
    @overload
    def __getitem__(self, index: slice) -> list[Sample]: ...
    def __getitem__(self, index: int | slice) -> Sample | list[Sample]:
        """One sample, or some.

        Raises:
            IndexError: there are not so many.
            ObjectMissing, ChecksumMismatch, InvalidShard: its shard is not what was committed.
        """
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        place = range(len(self))[index]
        shard = int(np.searchsorted(self._starts, place, side="right")) - 1
        return self._shard(shard).sample(place - int(self._starts[shard]))

    def __iter__(self) -> Iterator[Sample]:
        """All samples in order; the next shard is read while one is used."""
        for shard in self.shards():
            yield from shard.samples()

    @property
    def num_shards(self) -> int:
        """Shards that the samples are in."""
        return len(self._shards)

    def shards(self, order: Iterable[int] | None = None) -> Iterator["OpenShard"]:
        """Whole shards in an order, one of them read ahead."""
        numbers = list(range(len(self._shards)) if order is None else order)
        with ThreadPoolExecutor(max_workers=1) as ahead:
            coming: Future[OpenShard] | None = None
            for place, number in enumerate(numbers):
                shard = coming.result() if coming is not None else self._read(number, whole=True)
                rest = numbers[place + 1 : place + 2]
                coming = ahead.submit(self._read, rest[0], whole=True) if rest else None
                yield shard

    def __getstate__(self) -> tuple[str, list[Scored]]:
        return self._cache.objects.url, self._shards

    def __setstate__(self, state: tuple[str, list[Scored]]) -> None:
        url, shards = state
        self.__init__(Cache(url), shards)  # type: ignore[misc]

    def _shard(self, number: int) -> "OpenShard":
        with self._lock:
            held = self._open.get(number)
            if held is not None:
                self._open.move_to_end(number)
                return held
        read = self._read(number, whole=False)
        with self._lock:
            self._open[number] = read
            while len(self._open) > SHARDS_IN_MEMORY:
                self._open.popitem(last=False)
        return read

    def _read(self, number: int, *, whole: bool) -> "OpenShard":
        listed, cache = self._shards[number], self._cache
        manifest = cache.need_rollouts(listed.rollouts)
        scores = cache.open_score_set(
            listed.rollouts.content, listed.teacher, listed.served, whole=whole
        )
        return OpenShard(cache.open_rollouts(manifest, whole=whole), scores)


class OpenShard:
    """One shard: rows and scores are decoded as they are asked for."""

    def __init__(self, rows: tables.OpenRollouts, scores: ScoreSet) -> None:
        self._rows, self._scores = rows, scores
        self._groups: dict[int, _Rows] = {}

    def sample(self, row: int) -> Sample:
        """One completion; what holds its tokens alone is read and decoded."""
        number = int(np.searchsorted(self._rows.starts, row, side="right")) - 1
        group = self._group(number)
        within = row - int(self._rows.starts[number])
        return group.sample(within, self._scores.read(slice(row, row + 1)))

    def samples(self) -> Iterator[Sample]:
        """Every completion, decoded at once."""
        scores = self._scores.read()
        for number, start in enumerate(self._rows.starts[:-1].tolist()):
            group = self._group(number)
            for row in range(group.num_rows):
                yield group.sample(row, scores.rows(start + row, start + row + 1))

    def _group(self, number: int) -> "_Rows":
        if number not in self._groups:
            self._groups[number] = _Rows(self._rows.group(number))
        return self._groups[number]


class _Rows:
    """Consecutive rows of a rollout shard, decoded."""

    def __init__(self, table: pa.Table) -> None:
        self.num_rows = table.num_rows
        self._table = table
        self._prompts = tables.token_lists(table, "prompt_token_ids")
        self._offsets = tables.token_offsets(table)
        self._per_token: dict[str, NDArray[Any]] = {
            name: tables.flat_tokens(table, name, dtype)
            for name, dtype in (
                ("completion_token_ids", np.int32),
                ("behavior_logprobs", np.float32),
                ("sampling_logprobs", np.float32),
                ("student_topk_ids", np.int32),
                ("student_topk_logprobs", np.float32),
            )
            if name in table.column_names
        } | {"loss_mask": tables.supervised_tokens(table)}

    def sample(self, row: int, scores: Scores) -> Sample:
        """A row with its scores."""
        tokens = slice(int(self._offsets[row]), int(self._offsets[row + 1]))
        here = {name: values[tokens] for name, values in self._per_token.items()}
        own = self._table.slice(row, 1).select(
            [
                n
                for n in ("rollout_id", "task", "answer", "messages", "text", "finish_reason")
                if n in self._table.column_names
            ]
        )
        return Sample(
            **{"answer": None, "messages": None, **own.to_pylist()[0]},
            prompt_token_ids=self._prompts[row],
            completion_token_ids=here["completion_token_ids"],
            behavior_logprobs=here.get("behavior_logprobs"),
            sampling_logprobs=here.get("sampling_logprobs"),
            student_topk_ids=here.get("student_topk_ids"),
            student_topk_logprobs=here.get("student_topk_logprobs"),
            loss_mask=here["loss_mask"],
            scores=scores,
        )


def _only(
    served: Iterable[ServedColumns], wanted: frozenset[ScoreColumn]
) -> tuple[ServedColumns, ...]:
    """The sets that give asked-for columns, and what each gives of them."""
    kept = ((item.key, tuple(c for c in item.columns if c in wanted)) for item in served)
    return tuple(ServedColumns(key=key, columns=left) for key, left in kept if left)
