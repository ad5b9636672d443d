"""Completions with both models' whole distributions, and shards that store what a run would."""

from dataclasses import dataclass

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from opdcache.audit.blocks import Block, Entries
from opdcache.store import rollouts
from opdcache.store.scores import Scores, StudentTopK, TopK

Dense = NDArray[np.float64]
STEP = 1 / 4096


@dataclass(frozen=True)
class Distributions:
    """What a student and a teacher say of the same completions. T tokens, V ids.

    Attributes:
        lengths: tokens of each completion.
        ids: sampled, [T].
        p, q: log-probs, float64 [T, V].
    """

    lengths: tuple[int, ...]
    ids: NDArray[np.int32]
    p: Dense
    q: Dense

    @property
    def offsets(self) -> NDArray[np.int64]:
        """[N + 1]."""
        return np.concatenate([[0], np.cumsum(self.lengths)]).astype(np.int64)

    def at(self, values: Dense) -> Dense:
        """Of the sampled tokens, [T]."""
        return values[np.arange(len(self.ids)), self.ids]


def distributions(
    *lengths: int, num_ids: int = 60, seed: int = 0, apart: float = 1.0
) -> Distributions:
    """Random ones, the teacher's around the student's; tokens are drawn from the student's."""
    random = np.random.default_rng(seed)
    logits = random.normal(size=(sum(lengths), num_ids)) * 2.5
    p = logits - np.logaddexp.reduce(logits, axis=1)[:, None]
    logits = logits + apart * random.normal(size=logits.shape)
    q = logits - np.logaddexp.reduce(logits, axis=1)[:, None]
    ids = np.array([random.choice(num_ids, p=np.exp(row)) for row in p], np.int32)
    return Distributions(lengths, ids, p, q)


def top(logprobs: Dense, k: int) -> tuple[NDArray[np.int32], NDArray[np.float32]]:
    """Ids and log-probs of the likeliest, [T, k] each."""
    ids = np.argsort(-logprobs, axis=1, kind="stable")[:, :k].astype(np.int32)
    return ids, np.take_along_axis(logprobs, ids, axis=1).astype(np.float32)


def outside(logprobs: Dense, ids: NDArray[np.int32]) -> NDArray[np.float32]:
    """Log of the mass outside some ids, [T]."""
    rest = logprobs.copy()
    np.put_along_axis(rest, ids, -np.inf, axis=1)
    return np.logaddexp.reduce(rest, axis=1).astype(np.float32)


def entropy(logprobs: Dense) -> Dense:
    """[T], nats."""
    return -(np.exp(logprobs) * logprobs).sum(axis=1)


def scores_of(logprobs: Dense, given: Distributions, k: int, recorded: int = 0) -> Scores:
    """Every column that a model with these distributions gives."""
    ids, values = top(logprobs, k)
    kept = np.full(len(ids), k, np.uint16)
    seen, _ = top(given.p, recorded)
    student = np.take_along_axis(logprobs, seen, axis=1).astype(np.float32)
    return Scores(
        given.offsets,
        sampled_logprobs=given.at(logprobs).astype(np.float32),
        entropy=entropy(logprobs).astype(np.float32),
        topk=TopK(ids, values, kept, outside(logprobs, ids)),
        student_topk=StudentTopK(student, outside(logprobs, seen)) if recorded else None,
    )


def rows_of(
    given: Distributions,
    recorded: int,
    *,
    texts: tuple[str, ...] = (),
    answers: tuple[str | None, ...] = (),
    masks: tuple[NDArray[np.bool_], ...] = (),
) -> pa.Table:
    """A rollout table of them; ids and log-probs of the student's likeliest are recorded."""
    ids, values = top(given.p, recorded)
    behavior, offsets = given.at(given.p).astype(np.float32), given.offsets
    parts = [slice(a, b) for a, b in zip(offsets[:-1].tolist(), offsets[1:].tolist(), strict=True)]
    return rollouts.rollout_table(
        [
            rollouts.Completion(
                prompt_id=f"prompt-{i}",
                sample_index=0,
                prompt_token_ids=[1, 2, i],
                completion_token_ids=given.ids[part].tolist(),
                behavior_logprobs=behavior[part],
                sampling_logprobs=behavior[part],
                topk_ids=ids[part],
                topk_logprobs=values[part],
                finish_reason="length" if i % 2 else "stop",
                text=texts[i] if texts else "",
                task="task",
                answer=answers[i] if answers else None,
                loss_mask=masks[i] if masks else None,
            )
            for i, part in enumerate(parts)
        ]
    )


def block_of(
    given: Distributions, *, k: int = 16, recorded: int = 16, own: bool = False, first_row: int = 0
) -> Block:
    """As the audit sees them, nothing rounded but to float32."""
    table = rows_of(given, recorded)
    ids, values = top(given.p, recorded)
    return Block(
        shard="shard",
        first_row=first_row,
        table=table,
        offsets=given.offsets,
        token_ids=given.ids,
        supervised=rollouts.supervised_tokens(table),
        behavior_logprobs=given.at(given.p).astype(np.float32),
        student=Entries(ids, values, np.full(len(ids), recorded)),
        scores=scores_of(given.q, given, k, recorded),
        own=scores_of(given.p, given, k) if own else None,
        num_ids=given.p.shape[1],
        step=STEP,
    )
