"""Rounds made from arrays, without an engine: what rollout and score stages leave behind."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from opdcache.schemas.columns import ScoreColumn
from opdcache.schemas.rounds import (
    RolloutRound,
    RolloutShard,
    ScoredShard,
    ScoreRound,
    ServedColumns,
)
from opdcache.store import rollouts
from opdcache.store.cache import Cache, as_listed
from opdcache.store.scores import Scores

from . import shards
from .shards import STEP, TEACHER

__all__ = ["STEP", "TEACHER", "Row", "commit_rollouts", "commit_scores", "rounds"]


@dataclass(frozen=True)
class Row:
    """One completion: T tokens, S recorded student ids a token."""

    prompt: Sequence[int]
    completion: Sequence[int]
    sampling_T: NDArray[np.float32]
    recorded_ids_TS: NDArray[np.int32]
    loss_mask: NDArray[np.bool_] | None = None
    text: str = ""
    answer: str | None = None


def commit_rollouts(cache: Cache, rows: Sequence[Row], *, name: str = "shard") -> RolloutShard:
    """Commit the rows as a rollout shard; its key depends on the name alone."""
    table = rollouts.rollout_table(
        [
            rollouts.Completion(
                prompt_id=f"prompt-{i}",
                sample_index=0,
                prompt_token_ids=list(row.prompt),
                completion_token_ids=list(row.completion),
                behavior_logprobs=row.sampling_T,
                sampling_logprobs=row.sampling_T,
                topk_ids=row.recorded_ids_TS,
                topk_logprobs=np.full(row.recorded_ids_TS.shape, -1, np.float32),
                finish_reason="stop",
                text=row.text,
                task="task",
                answer=row.answer,
                loss_mask=row.loss_mask,
            )
            for i, row in enumerate(rows)
        ]
    )
    width = int(rows[0].recorded_ids_TS.shape[1])
    manifest = shards.commit_rollouts(cache, name, table, student_topk=width)
    return as_listed(manifest, cached=False)


def commit_scores(
    cache: Cache, shard: RolloutShard, scores: Scores, columns: Sequence[ScoreColumn]
) -> ServedColumns:
    """Commit a score set of a shard that stores exactly the columns given in ``scores``."""
    rollout = cache.need_rollouts(shard)
    k = 0 if scores.topk is None else int(scores.topk.ids.shape[1])
    draws = 0 if scores.draws is None else int(scores.draws.counts.sum(axis=1).max(initial=0))
    manifest = shards.commit_scores(cache, rollout, *columns, scores=scores, k=k, draws=draws)
    return ServedColumns(key=manifest.key, columns=manifest.identity.columns)


def rounds(
    shards: Sequence[RolloutShard], served: Sequence[Sequence[ServedColumns]], round_index: int = 0
) -> tuple[RolloutRound, ScoreRound]:
    """The round files that pin the shards and their score sets."""
    listed = tuple(
        ScoredShard(content=shard.content, teacher=TEACHER, served=tuple(sets), cached=False)
        for shard, sets in zip(shards, served, strict=True)
    )
    return (
        RolloutRound(
            round=round_index,
            student="student",
            shards=tuple(shards),
            dropped={},
            elapsed_s=0.0,
        ),
        ScoreRound(round=round_index, shards=listed, elapsed_s=0.0),
    )
