"""Small shards that tests commit: real tables and scores with manifests that fit them."""

import numpy as np
import pyarrow as pa

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
from opdcache.store import rollouts
from opdcache.store.cache import Attempt, Cache
from opdcache.store.scores import GROUP, Scores, StudentTopK, TopK, encode_scores

TEACHER = "7" * 64
PROVENANCE = Provenance(
    versions={"opdcache": "0"},
    host="here",
    run_id="a run",
    created_at="2026-01-01T00:00:00+00:00",
    elapsed_s=1.0,
    tokens_per_s=1.0,
    details={},
)


def table(*completions: list[int]) -> pa.Table:
    """A rollout table of these completions, two recorded entries a token."""
    return rollouts.rollout_table(
        [
            rollouts.Completion(
                prompt_id=str(i),
                sample_index=0,
                prompt_token_ids=[1, 2],
                completion_token_ids=ids,
                behavior_logprobs=-np.ones(len(ids), np.float32),
                sampling_logprobs=-np.ones(len(ids), np.float32),
                topk_ids=np.tile(np.asarray([[3, 4]], np.int32), (len(ids), 1)),
                topk_logprobs=-np.ones((len(ids), 2), np.float32),
                finish_reason="stop",
                text="",
                task="t",
                answer=None,
            )
            for i, ids in enumerate(completions)
        ]
    )


def rollout_identity(name: str = "a") -> RolloutIdentity:
    """An identity of its own for every name."""
    return RolloutIdentity(
        student=name,
        vocabulary="v",
        prompts="p",
        seeds="s",
        num_requests=2,
        sampling=Sampling(),
        engine={"dtype": "float32"},
        student_topk=2,
    )


def write_rollouts(
    attempt: Attempt, identity: RolloutIdentity, rows: pa.Table | None = None
) -> RolloutManifest:
    """Put a rollout shard into an attempt; gives the manifest that commits it."""
    rows = table([5, 6, 7], []) if rows is None else rows
    attempt.put(rollouts.FILE, rollouts.encode_rollouts(rows))
    return RolloutManifest(
        key=key_of(identity),
        attempt=attempt.name,
        objects=tuple(attempt.entries),
        num_rows=rows.num_rows,
        num_tokens=int(rollouts.token_offsets(rows)[-1]),
        dropped={},
        provenance=PROVENANCE,
        identity=identity,
        content=content_hash(rows),
        num_prompt_tokens=2 * rows.num_rows,
        vocab_size=100,
        task="t",
    )


def commit_rollouts(cache: Cache, name: str = "a", rows: pa.Table | None = None) -> RolloutManifest:
    """A committed rollout shard."""
    identity = rollout_identity(name)
    attempt = cache.attempt(key_of(identity))
    manifest = write_rollouts(attempt, identity, rows)
    assert cache.commit(attempt, manifest)
    return manifest


def some_scores(columns: frozenset[ScoreColumn], k: int = 4) -> Scores:
    """Scores of the default shard's three tokens, in two completions."""
    tail = np.full(3, -5, np.float32)
    ids = np.tile(np.arange(k, dtype=np.int32), (3, 1))
    logprobs = -np.tile(np.arange(1, k + 1, dtype=np.float32), (3, 1))
    topk = TopK(ids, logprobs, np.full(3, k, np.uint16), tail)
    student = StudentTopK(np.full((3, 2), -2, np.float32), tail)
    return Scores(
        token_offsets=np.asarray([0, 3, 3]),
        sampled_logprobs=np.asarray([-1, -2, -3], np.float32) if "sampled" in columns else None,
        entropy=np.asarray([1, 2, 3], np.float32) if "entropy" in columns else None,
        topk=topk if "topk" in columns else None,
        student_topk=student if "student_topk" in columns else None,
    )


def commit_scores(
    cache: Cache,
    rollout: RolloutManifest,
    *columns: ScoreColumn,
    teacher: str = TEACHER,
    rendering: str = AS_SAMPLED,
    dtype: str = "float32",
    k: int = 4,
    mass: float = 1.0,
    step: float = 1 / 256,
) -> ScoreManifest:
    """A committed score set."""
    identity = ScoreIdentity(
        content=rollout.content,
        teacher=teacher,
        rendering=rendering,
        dtype=dtype,
        columns=tuple(sorted(columns)),
        k=k,
        mass=mass,
        step=step,
    )
    attempt = cache.attempt(key_of(identity))
    scores = some_scores(frozenset(columns), k)
    for path, data in encode_scores(scores, step=step, attributes={}).items():
        attempt.put(f"{GROUP}/{path}", data)
    manifest = ScoreManifest(
        key=key_of(identity),
        attempt=attempt.name,
        objects=tuple(attempt.entries),
        num_rows=2,
        num_tokens=3,
        dropped={},
        provenance=PROVENANCE,
        identity=identity,
        rollout_key=rollout.key,
        vocab_size=100,
        clip_floor=-65535 * step,
    )
    assert cache.commit(attempt, manifest)
    return manifest
