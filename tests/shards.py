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
from opdcache.store import codec, rollouts
from opdcache.store.cache import Attempt, Cache
from opdcache.store.encoding import encode_scores
from opdcache.store.scores import GROUP, Draws, Scores, StudentTopK, TopK

TEACHER = "7" * 64
STEP = 1 / 256
VOCAB_SIZE = 1 << 20
PROVENANCE = Provenance(
    versions={"opdcache": "0"},
    host="here",
    run_id="a run",
    created_at="2026-01-01T00:00:00+00:00",
    elapsed_s=1.0,
    tokens_per_s=1.0,
    details={},
)


def stored(*logprobs: float) -> list[float]:
    """The log-probs as a shard gives them back; ``test_codec`` holds how far they are off."""
    levels = codec.encode_logprobs(np.asarray(logprobs, np.float32), STEP)
    return [float(value) for value in codec.decode_logprobs(levels, STEP)]


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


def rollout_identity(name: str = "a", student_topk: int = 2) -> RolloutIdentity:
    """An identity of its own for every name."""
    return RolloutIdentity(
        student=name,
        vocabulary="v",
        eos_token_id=None,
        prompts="p",
        labels="l",
        seeds="s",
        num_requests=2,
        sampling=Sampling(),
        engine={"dtype": "float32"},
        student_topk=student_topk,
    )


def write_rollouts(
    attempt: Attempt, identity: RolloutIdentity, rows: pa.Table | None = None
) -> RolloutManifest:
    """Put a rollout shard into an attempt; gives the manifest that commits it."""
    rows = table([5, 6, 7], []) if rows is None else rows
    attempt.put(rollouts.FILE, rollouts.encode_rollouts(rows))
    prompts = rollouts.flat_tokens(rows, "prompt_token_ids", np.int32)
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
        num_prompt_tokens=len(prompts),
        vocab_size=VOCAB_SIZE,
        task="t",
    )


def commit_rollouts(
    cache: Cache, name: str = "a", rows: pa.Table | None = None, student_topk: int = 2
) -> RolloutManifest:
    """A committed rollout shard."""
    identity = rollout_identity(name, student_topk)
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
        draws=Draws.of(np.tile([[5, 4, 5]], (3, 1))) if "draws" in columns else None,
    )


def commit_scores(
    cache: Cache,
    rollout: RolloutManifest,
    *columns: ScoreColumn,
    scores: Scores | None = None,
    teacher: str = TEACHER,
    rendering: str = AS_SAMPLED,
    dtype: str = "float32",
    k: int = 4,
    mass: float = 1.0,
    num_ids: int = VOCAB_SIZE,
    step: float = STEP,
    draws: int = 0,
) -> ScoreManifest:
    """A committed score set; its scores fit the default shard unless others are given."""
    scores = some_scores(frozenset(columns), k) if scores is None else scores
    assert scores.columns == set(columns)
    identity = ScoreIdentity(
        content=rollout.content,
        teacher=teacher,
        rendering=rendering,
        dtype=dtype,
        columns=tuple(sorted(columns)),
        k=k,
        mass=mass,
        num_ids=num_ids,
        step=step,
        draws=draws,
        draw_seed=0,
    )
    attempt = cache.attempt(key_of(identity))
    for path, data in encode_scores(scores, step=step, attributes={}).items():
        attempt.put(f"{GROUP}/{path}", data)
    manifest = ScoreManifest(
        key=key_of(identity),
        attempt=attempt.name,
        objects=tuple(attempt.entries),
        num_rows=rollout.num_rows,
        num_tokens=rollout.num_tokens,
        dropped={},
        provenance=PROVENANCE.model_copy(update={"details": {"backend": "transformers"}}),
        identity=identity,
        rollout_key=rollout.key,
        vocab_size=VOCAB_SIZE,
        clip_floor=codec.clip_floor(step),
    )
    assert cache.commit(attempt, manifest)
    return manifest
