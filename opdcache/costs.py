"""The arithmetic of ``opdcache plan``: small pure functions of tokens, bytes and seconds."""

import heapq
from collections.abc import Collection, Iterable

from .schemas.columns import ScoreColumn
from .schemas.manifests import Sampling
from .schemas.plan import SharedCost, TeacherCost

SHARED_BY = (2, 4, 8)
"""Numbers of experiments that the plan shows the sharing of scores for."""


def makespan(work: Iterable[float], workers: int) -> float:
    """When the last of the workers is done, were each shard taken by the first that is free.

    Equal shards take ``ceil(shards / workers)`` turns.

    Args:
        work: what each shard takes, in plan order.
    """
    free_at = [0.0] * workers
    for one in work:
        heapq.heapreplace(free_at, free_at[0] + one)
    return max(free_at)


def longest_completion(sampling: Sampling, max_model_len: object, num_prompt_tokens: int) -> int:
    """Tokens that a completion has at most: what is asked, within the engine's context.

    Args:
        max_model_len: of the engine, when the run file says; otherwise it is the model's.
    """
    if not isinstance(max_model_len, int):
        return sampling.max_tokens
    room = max_model_len - num_prompt_tokens - (0 if sampling.is_plain else 1)
    return max(0, min(sampling.max_tokens, room))


def num_updates(num_samples: int, epochs: int, batch_samples: int) -> int:
    """Updates of a round; the last may be of fewer samples."""
    return -(-num_samples * epochs // batch_samples)


def rollout_bytes_per_token(student_topk: int, prompt_tokens: float) -> float:
    """Estimated bytes of a rollout shard a completion token.

    Measured on 37,000 completion tokens of a language model at temperature 1 (Parquet, zstd): 1.6
    an id and 5.6 a log-prob of the recorded entries, whose float32 hardly compresses; 14.5 for
    the token's own id, two log-probs and text; 1.1 a prompt token.

    Args:
        prompt_tokens: prompt tokens a completion token.
    """
    return 14.5 + 7.2 * student_topk + 1.1 * prompt_tokens


def score_bytes_per_token(
    columns: Collection[ScoreColumn], *, k: int, student_topk: int, draws: int
) -> float:
    """Estimated bytes of a score shard a completion token, for shards of thousands of tokens.

    Fitted to measured shards (README.md: 32.6, 95.7 and 235 at k = 16, 50 and 128, a float16
    column 1.7 to 1.9): a kept entry takes 1.81, of which the id is two thirds; an id that the
    student recorded 1.25. Drawn ids repeat: 4, 12 and 50 draws a token took 5.8, 13.8 and 39.
    """
    each: dict[ScoreColumn, float] = {
        "sampled": 1.9,
        "entropy": 1.8,
        "topk": 3.7 + 1.81 * k + 1.8,
        "student_topk": 1.25 * student_topk + 1.9,
        "draws": 2 * draws**0.77,
    }
    return sum(each[column] for column in columns)


def checkpoint_bytes_per_parameter(weight_bytes: int, zero_stage: int) -> int:
    """Bytes that the learner's state takes a trained parameter, over all ranks.

    Float32 masters and two moments; with ZeRO 1 and 2 the weights themselves besides, which are
    the masters without ZeRO, and a view of them with ZeRO 3.

    Args:
        weight_bytes: of a weight in the training dtype.
    """
    return 12 + (weight_bytes if zero_stage in (1, 2) else 0)


def reread_samples(batch_samples: int, num_shards: int, held_shards: int) -> float:
    """Samples of an update whose shard is not in memory, samples being drawn from all shards alike.

    A learner that holds the ``held_shards`` it used last misses the share of shards that it does
    not hold; when it holds them all, each is read once a round, which is not counted here.
    """
    if num_shards <= held_shards:
        return 0.0
    return batch_samples * (1 - held_shards / num_shards)


def teacher_cost(
    rollout_s: float, score_s: float, train_s: float, round_0_s: float, num_rounds: int
) -> TeacherCost:
    """The teacher's device time, held beside the learner and as a batch job.

    A resident teacher's device is held for all three; a cached one's for scoring alone, and for
    starting it every round, which breaks even when it takes as long as the other two stages. Of n
    experiments that share all scores each pays ``score_s / n``; of those that share round 0 alone,
    since their students differ after it, ``score_s - round_0_s + round_0_s / n``.

    Args:
        rollout_s, score_s, train_s: seconds of one worker for everything, nothing being there.
        round_0_s: those of ``score_s`` that round 0 takes.
        num_rounds: how often the cached teacher is started.
    """
    resident = rollout_s + score_s + train_s
    return TeacherCost(
        resident_s=resident,
        cached_s=score_s,
        ratio=resident / score_s,
        break_even_start_s=(resident - score_s) / num_rounds,
        shared=tuple(
            SharedCost(
                num_experiments=n,
                all_scores_s=score_s / n,
                round_0_s=score_s - round_0_s + round_0_s / n,
            )
            for n in SHARED_BY
        ),
    )
