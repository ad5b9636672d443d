"""Committed shards and rounds made from arrays, without an engine: what stages leave in a cache."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from opdcache.identity import content_hash, key_of
from opdcache.schemas.columns import ScoreColumn
from opdcache.schemas.manifests import (
    AS_SAMPLED,
    Provenance,
    RolloutIdentity,
    RolloutManifest,
    Sampling,
    ScoreIdentity,
    ScoreManifest,
)
from opdcache.schemas.rounds import (
    RolloutRound,
    RolloutShard,
    ScoredShard,
    ScoreRound,
    ServedColumns,
)
from opdcache.store import codec, rollouts
from opdcache.store.cache import Cache
from opdcache.store.scores import GROUP, Scores, encode_scores

STEP = 1 / 256
TEACHER = "teacher"


@dataclass(frozen=True)
class Row:
    """One completion: T tokens, S recorded student ids a token."""

    prompt: Sequence[int]
    completion: Sequence[int]
    sampling_T: NDArray[np.float32]
    recorded_ids_TS: NDArray[np.int32]


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
                text="",
                task="task",
                answer=None,
            )
            for i, row in enumerate(rows)
        ]
    )
    identity = RolloutIdentity(
        student="student",
        vocabulary="vocabulary",
        prompts=name,
        seeds="seeds",
        num_requests=len(rows),
        sampling=Sampling(),
        engine={},
        student_topk=int(rows[0].recorded_ids_TS.shape[1]),
    )
    key = key_of(identity)
    num_tokens = sum(len(row.completion) for row in rows)
    attempt = cache.attempt(key)
    attempt.put(rollouts.FILE, rollouts.encode_rollouts(table))
    content = content_hash(table)
    manifest = RolloutManifest(
        key=key,
        attempt=attempt.name,
        objects=tuple(attempt.entries),
        num_rows=len(rows),
        num_tokens=num_tokens,
        dropped={},
        provenance=_provenance(),
        identity=identity,
        content=content,
        num_prompt_tokens=sum(len(row.prompt) for row in rows),
        vocab_size=1 << 20,
        task="task",
    )
    assert cache.commit(attempt, manifest)
    return RolloutShard(
        key=key,
        content=content,
        task="task",
        num_rows=len(rows),
        num_tokens=num_tokens,
        cached=False,
    )


def commit_scores(
    cache: Cache, shard: RolloutShard, scores: Scores, columns: Sequence[ScoreColumn]
) -> ServedColumns:
    """Commit a score set of a shard that stores exactly the columns given in ``scores``."""
    assert scores.columns == set(columns)
    identity = ScoreIdentity(
        content=shard.content,
        teacher=TEACHER,
        rendering=AS_SAMPLED,
        dtype="float32",
        columns=tuple(sorted(columns)),
        k=0 if scores.topk is None else int(scores.topk.ids.shape[1]),
        mass=1.0,
        step=STEP,
    )
    key = key_of(identity)
    attempt = cache.attempt(key)
    for path, data in encode_scores(scores, step=STEP, attributes={}).items():
        attempt.put(f"{GROUP}/{path}", data)
    manifest = ScoreManifest(
        key=key,
        attempt=attempt.name,
        objects=tuple(attempt.entries),
        num_rows=shard.num_rows,
        num_tokens=shard.num_tokens,
        dropped={},
        provenance=_provenance(),
        identity=identity,
        rollout_key=shard.key,
        vocab_size=1 << 20,
        clip_floor=codec.clip_floor(STEP),
    )
    assert cache.commit(attempt, manifest)
    return ServedColumns(key=key, columns=tuple(sorted(columns)))


def rounds(
    shards: Sequence[RolloutShard], served: Sequence[Sequence[ServedColumns]], round_index: int = 0
) -> tuple[RolloutRound, ScoreRound]:
    """The round files that pin the shards and their score sets."""
    listed = tuple(
        ScoredShard(content=shard.content, served=tuple(sets), cached=False)
        for shard, sets in zip(shards, served, strict=True)
    )
    return (
        RolloutRound(
            round=round_index,
            student="student",
            shards=tuple(shards),
            evaluation=(),
            dropped={},
            elapsed_s=0.0,
        ),
        ScoreRound(round=round_index, teacher=TEACHER, shards=listed, elapsed_s=0.0),
    )


def _provenance() -> Provenance:
    return Provenance(
        versions={},
        host="here",
        run_id="run",
        created_at="2020-01-01T00:00:00+00:00",
        elapsed_s=1.0,
        tokens_per_s=1.0,
        details={},
    )
