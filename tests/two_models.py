"""Shards whose two models are known at every id: an oracle for all that can be said of them."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from opdcache.schemas.columns import ScoreColumn
from opdcache.schemas.manifests import RolloutIdentity, RolloutManifest
from opdcache.schemas.rounds import ServedColumns
from opdcache.store import rollouts
from opdcache.store.cache import Cache
from opdcache.store.scores import Scores, StudentTopK, TopK

from . import shards

V, S, K = 256, 6, 9
Logprobs = NDArray[np.float64]


@dataclass(frozen=True)
class Completion:
    """One completion: T tokens.

    Attributes:
        p_TV, q_TV: log-probs of the student and of the teacher.
    """

    prompt_id: str
    ids: list[int]
    p_TV: Logprobs
    q_TV: Logprobs
    text: str = ""
    masked: tuple[int, ...] = ()
    answer: str | None = None
    messages: tuple[tuple[str, str], ...] | None = None
    prompt: tuple[int, ...] = (72, 105, 10)

    def largest(self, logprobs_TV: Logprobs, k: int) -> NDArray[np.int32]:
        """[T, k]: ids, likeliest first."""
        return np.argsort(-logprobs_TV, axis=1, kind="stable")[:, :k].astype(np.int32)

    def advantage(self, t: int) -> float:
        """Log q - log p of a token."""
        return float(self.q_TV[t, self.ids[t]] - self.p_TV[t, self.ids[t]])


def completion(prompt_id: str, ids: Sequence[int], seed: int, **changes: object) -> Completion:
    """Random models that are alike, but not the same."""
    rng = np.random.default_rng(seed)
    base_TV = 2.5 * rng.normal(size=(len(ids), V))
    p_TV, q_TV = (normal(base_TV + rng.normal(size=(len(ids), V))) for _ in range(2))
    return Completion(prompt_id, list(ids), p_TV, q_TV, **changes)  # type: ignore[arg-type]


def normal(logits_TV: Logprobs) -> Logprobs:
    """Log-probs of logits."""
    return np.asarray(logits_TV - np.logaddexp.reduce(logits_TV, axis=1, keepdims=True))


def commit(
    cache: Cache, completions: Sequence[Completion], *, name: str = "shard", recorded: bool = True
) -> RolloutManifest:
    """Commit them as one rollout shard."""
    width = S if recorded else 0
    rows = []
    for i, one in enumerate(completions):
        ids_TS = one.largest(one.p_TV, width)
        sampled = one.p_TV[np.arange(len(one.ids)), one.ids].astype(np.float32)
        mask = np.ones(len(one.ids), np.bool_)
        mask[list(one.masked)] = False
        rows.append(
            rollouts.Completion(
                prompt_id=one.prompt_id,
                sample_index=i,
                prompt_token_ids=one.prompt,
                completion_token_ids=one.ids,
                behavior_logprobs=sampled,
                sampling_logprobs=sampled,
                topk_ids=ids_TS,
                topk_logprobs=np.take_along_axis(one.p_TV, ids_TS, axis=1).astype(np.float32),
                finish_reason="stop",
                text=one.text,
                task="t",
                answer=one.answer,
                messages=one.messages,
                loss_mask=mask,
            )
        )
    return shards.commit_rollouts(cache, name, rollouts.rollout_table(rows), student_topk=width)


def score(
    cache: Cache,
    rollout: RolloutManifest,
    completions: Sequence[Completion],
    *columns: ScoreColumn,
    by_student: bool = False,
    teacher: str = shards.TEACHER,
) -> ServedColumns:
    """Commit a score set of them; entries are from K - 3 to K a token."""
    ids = np.concatenate([one.ids for one in completions]).astype(np.int64)
    q_TV = np.concatenate([one.p_TV if by_student else one.q_TV for one in completions])
    num_tokens = len(ids)
    topk_ids = np.argsort(-q_TV, axis=1, kind="stable")[:, :K].astype(np.int32)
    num_kept = (K - np.arange(num_tokens) % 4).astype(np.uint16)
    logprobs_TK = np.take_along_axis(q_TV, topk_ids, axis=1)
    kept_TK = np.arange(K) < num_kept[:, None]
    recorded_TS = np.concatenate([one.largest(one.p_TV, S) for one in completions])
    theirs_TS = np.take_along_axis(q_TV, recorded_TS, axis=1)

    def tail(logprobs: Logprobs) -> NDArray[np.float32]:
        return np.asarray(np.log1p(-np.exp(logprobs).sum(axis=1)), np.float32)

    every = {
        "sampled": ("sampled_logprobs", q_TV[np.arange(num_tokens), ids].astype(np.float32)),
        "entropy": ("entropy", entropy(q_TV).astype(np.float32)),
        "topk": (
            "topk",
            TopK(
                topk_ids,
                logprobs_TK.astype(np.float32),
                num_kept,
                tail(np.where(kept_TK, logprobs_TK, -np.inf)),
            ),
        ),
        "student_topk": (
            "student_topk",
            StudentTopK(theirs_TS.astype(np.float32), tail(theirs_TS)),
        ),
    }
    offsets = np.concatenate([[0], np.cumsum([len(one.ids) for one in completions])])
    scores = Scores(offsets.astype(np.int64), **dict(every[c] for c in columns))
    identity = rollout.identity
    assert isinstance(identity, RolloutIdentity)
    scorer = identity.student if by_student else teacher
    k = 0 if scores.topk is None else K
    manifest = shards.commit_scores(cache, rollout, *columns, scores=scores, k=k, teacher=scorer)
    return ServedColumns(key=manifest.key, columns=manifest.identity.columns)


def entropy(logprobs_TV: Logprobs) -> Logprobs:
    """[T], nats."""
    return np.asarray(-(np.exp(logprobs_TV) * logprobs_TV).sum(axis=1))


def byte_tokenizer(folder: Path) -> Path:
    """A tokenizer's file: id i is byte i."""
    from tokenizers import Tokenizer, decoders, models

    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [b for b in range(256) if b not in printable]
    vocabulary = {chr(b): b for b in printable} | {chr(256 + i): b for i, b in enumerate(others)}
    tokenizer = Tokenizer(models.BPE(vocabulary, []))
    tokenizer.decoder = decoders.ByteLevel()
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder / "tokenizer.json"
