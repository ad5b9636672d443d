"""Stored completions with all scores, some consecutive ones at a time, so that memory is bounded.

Legend: N completions, T completion tokens, S recorded student entries a token, K kept ones.
"""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from ..errors import IntegrityError, InvalidShard, ObjectMissing
from ..store import rollouts as tables
from ..store.cache import Cache, ScoreSet, commit_path
from ..store.scores import Scores, TopK
from .targets import Shard

Floats = NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class Entries:
    """A model's likeliest entries of every token.

    Attributes:
        ids: int32 [T, S], likeliest first.
        logprobs: float32 [T, S], nats, over the full vocabulary.
        num_kept: int [T]; entries past it hold no information.
    """

    ids: NDArray[np.int32]
    logprobs: Floats
    num_kept: NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Block:
    """Consecutive completions of a shard. Index t is what predicts completion token t.

    Attributes:
        shard: the start of its rollout key.
        first_row: of the shard.
        table: the completions' rows.
        offsets: int64 [N + 1], of their tokens.
        token_ids: int32 [T].
        supervised: bool [T].
        behavior_logprobs: float32 [T], log p of the sampled token; None when it is not known.
        student: the policy's likeliest entries; None when none were recorded or scored.
        scores: the teacher's.
        own: the policy's scores of its own completions.
        num_ids: ids that the student can produce.
        step: quantisation step of the teacher's log-probs, see ``store.codec``.
        made_by: the score set that each column of ``scores`` is of.
        own_fault: why there is no ``own`` where it should be.
    """

    shard: str
    first_row: int
    table: pa.Table
    offsets: NDArray[np.int64]
    token_ids: NDArray[np.int32]
    supervised: NDArray[np.bool_]
    behavior_logprobs: Floats | None
    student: Entries | None
    scores: Scores
    own: Scores | None
    num_ids: int
    step: float
    made_by: Mapping[str, str] = field(default_factory=dict)
    own_fault: str | None = None

    @property
    def rows(self) -> NDArray[np.int64]:
        """Int64 [T]: the completion, from 0 on, of each token."""
        return np.repeat(np.arange(len(self.offsets) - 1), np.diff(self.offsets))

    @property
    def positions(self) -> NDArray[np.int64]:
        """Int64 [T]: depth of each token in its completion."""
        return np.arange(int(self.offsets[-1])) - np.repeat(
            self.offsets[:-1], np.diff(self.offsets)
        )

    @property
    def advantages(self) -> NDArray[np.float64] | None:
        """Float64 [T]: log q - log p of the sampled token, nats; None when either is not there."""
        if self.behavior_logprobs is None or self.scores.sampled_logprobs is None:
            return None
        return self.scores.sampled_logprobs.astype(np.float64) - self.behavior_logprobs

    @property
    def teacher(self) -> Entries | None:
        """The teacher's likeliest entries; None when they are not stored."""
        return entries(self.scores.topk)

    @property
    def own_entries(self) -> Entries | None:
        """The policy's likeliest entries, of its own scores; None when they are not stored."""
        return None if self.own is None else entries(self.own.topk)

    def is_one_set(self, *columns: str) -> bool:
        """Whether some of the teacher's columns are of one forward: two scorings differ."""
        return len({self.made_by.get(column) for column in columns}) == 1

    @property
    def recorded(self) -> Entries | None:
        """What was recorded with the rollouts; None when nothing was."""
        return self.student if self.has_recorded else None

    @property
    def has_recorded(self) -> bool:
        """Whether ``student`` are the entries that were recorded with the rollouts."""
        return "student_topk_ids" in self.table.column_names


def blocks(cache: Cache, shard: Shard, row: int | None = None) -> Iterator[Block]:
    """A shard's completions in order.

    Args:
        row: give only the block that has this row of the shard; all by default.

    Raises:
        ObjectMissing, ChecksumMismatch, InvalidShard: it is not what was committed, or its scores
            are not of its completions.
    """
    scored = shard.scored
    manifest = cache.need_rollouts(scored.rollouts)
    opened = cache.open_rollouts(manifest, whole=False)
    content = scored.rollouts.content
    scores = cache.open_score_set(content, scored.teacher, scored.served, whole=False)
    own = _Own(cache, shard)
    of = _Of(
        shard.name,
        manifest.vocab_size,
        max(manifest.identity.step for _, _, manifest in scores.parts),
        {column: made.key for columns, _, made in scores.parts for column in columns},
    )
    for number, first_row in enumerate(opened.starts[:-1].tolist()):
        if row is not None and not first_row <= row < opened.starts[number + 1]:
            continue
        table = opened.group(number)
        theirs, ours = _read(scores, table, first_row), own.read(table, first_row)
        assert theirs is not None
        yield _block(of, first_row, table, theirs, ours, own.fault)


class _Own:
    """The policy's scores of its own completions, as far as they can be read: whoever looks at the
    teacher's can do without.

    Attributes:
        fault: why they cannot be read any more.
    """

    def __init__(self, cache: Cache, shard: Shard) -> None:
        self.fault: str | None = None
        self._scores = ScoreSet(())
        content = shard.scored.rollouts.content
        with self._noted():
            self._scores = cache.open_score_set(content, shard.student, shard.own, whole=False)

    def read(self, table: pa.Table, first_row: int) -> Scores | None:
        """Of a table's completions."""
        with self._noted():
            return _read(self._scores, table, first_row)
        return None

    @contextmanager
    def _noted(self) -> Iterator[None]:
        try:
            yield
        except (IntegrityError, ObjectMissing) as error:
            self.fault, self._scores = str(error), ScoreSet(())


def beside(read: Iterable[Block], scores: ScoreSet) -> Iterator[tuple[Block, Scores]]:
    """Blocks, each with what another score set has of its completions.

    Raises:
        InvalidShard: the set is not of these completions.
    """
    for block in read:
        others = _read(scores, block.table, block.first_row)
        assert others is not None
        yield block, others


def _read(scores: ScoreSet, table: pa.Table, first_row: int) -> Scores | None:
    """Of a table's completions; None of no score set."""
    if not scores.parts:
        return None
    rows = slice(first_row, first_row + table.num_rows)
    lengths = np.diff(tables.token_offsets(table))
    for _, opened, manifest in scores.parts:
        held = np.diff(opened.token_offsets)[rows]
        if not np.array_equal(held, lengths):
            raise InvalidShard(
                "the scores are not of these completions: their lengths differ",
                where=commit_path(manifest),
                expected=f"{int(lengths.sum())} tokens in rows {rows.start} to {rows.stop - 1}",
                got=int(held.sum()),
                remedy="'opdcache cache verify --deep' puts the score set aside; score it again",
            )
    return scores.read(rows)


@dataclass(frozen=True, slots=True)
class _Of:
    """What is alike for a shard's blocks."""

    shard: str
    num_ids: int
    step: float
    made_by: Mapping[str, str]


def _block(
    of: _Of,
    first_row: int,
    table: pa.Table,
    scores: Scores,
    own: Scores | None,
    own_fault: str | None,
) -> Block:
    columns = _columns(table)
    behavior = columns.get("behavior_logprobs")
    if behavior is None and own is not None:
        behavior = own.sampled_logprobs
    return Block(
        shard=of.shard,
        first_row=first_row,
        table=table,
        offsets=tables.token_offsets(table),
        token_ids=columns["completion_token_ids"],
        supervised=tables.supervised_tokens(table),
        behavior_logprobs=behavior,
        student=_recorded(columns) or (None if own is None else entries(own.topk)),
        scores=scores,
        own=own,
        num_ids=of.num_ids,
        step=of.step,
        made_by=of.made_by,
        own_fault=own_fault,
    )


def _columns(table: pa.Table) -> dict[str, NDArray[Any]]:
    """The columns of a value, or of some, a token."""
    return {
        name: tables.flat_tokens(table, name, dtype)
        for name, dtype in (
            ("completion_token_ids", np.int32),
            ("behavior_logprobs", np.float32),
            ("student_topk_ids", np.int32),
            ("student_topk_logprobs", np.float32),
        )
        if name in table.column_names
    }


def _recorded(columns: Mapping[str, NDArray[Any]]) -> Entries | None:
    if "student_topk_ids" not in columns:
        return None
    ids = columns["student_topk_ids"]
    return Entries(ids, columns["student_topk_logprobs"], np.full(len(ids), ids.shape[1]))


def entries(topk: TopK | None) -> Entries | None:
    """Stored entries in the audit's form."""
    if topk is None:
        return None
    return Entries(topk.ids, topk.logprobs, topk.num_kept.astype(np.int64))
