"""Scores some completions again, to tell what stored numbers are worth: the noise floor.

Whatever differs is rounding: another batch, another backend, and the store's own step. A loss that
is smaller than this says nothing.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from ..agreement import Matched
from ..runfolder import RunContext
from ..schemas.rounds import ScoredShard
from ..store.scores import Scores, joined
from ..store.upkeep import quarantining
from .stage import ScoreTask, Teachers, plan_shards, read_sequences
from .teacher import Ask, Sequences, in_order


@dataclass(frozen=True, slots=True)
class Noise:
    """How far a second scoring is from what is stored, over some tokens. Nats.

    What a score set does not have is not compared, and nan.

    Attributes:
        sampled_mean, sampled_max: absolute difference of the sampled token's log-prob.
        reverse_kl_sampled: mean of ``r - 1 - log r`` with ``r`` the ratio of the two: what the
            same model is from itself.
        entropy_mean, entropy_max: absolute difference of the entropy.
        topk_mean, topk_max: absolute difference of the log-probs of the entries that both kept.
        same_first: share of tokens with the same likeliest entry.
        same_topk: share of the stored entries that are kept again.
    """

    num_samples: int
    num_tokens: int
    sampled_mean: float
    sampled_max: float
    reverse_kl_sampled: float
    entropy_mean: float
    entropy_max: float
    topk_mean: float
    topk_max: float
    same_first: float
    same_topk: float


def check(context: RunContext, round_index: int, num_samples: int) -> Noise:
    """Score some of a round's completions again, with the run's teachers as they are now.

    Args:
        num_samples: completions, drawn at random; all when there are fewer.

    Raises:
        InputsMissing: the round is not scored, or no score of it is stored.
    """
    sampled, scores = context.folder.with_scores(round_index)
    rollouts, scored = sampled.shards, scores.shards
    tasks = plan_shards(context, rollouts, round_index).teachers
    starts = np.cumsum([0, *(shard.num_rows for shard in rollouts)])
    chosen = np.random.default_rng().permutation(int(starts[-1]))[:num_samples]
    teachers, pairs = Teachers(context), list[tuple[Scores, Scores]]()
    try:
        with quarantining(context.cache):
            for number in sorted(range(len(tasks)), key=lambda i: tasks[i].model.loaded):
                here = chosen[(chosen >= starts[number]) & (chosen < starts[number + 1])]
                if len(here):
                    rows = np.sort(here - starts[number]).tolist()
                    stored = _stored(context, scored[number], tasks[number], rows)
                    pairs.append((stored, _again(context, teachers, tasks[number], rows)))
    finally:
        teachers.close()
    return noise(pairs)


def _stored(context: RunContext, shard: ScoredShard, task: ScoreTask, rows: list[int]) -> Scores:
    """What the run uses of the stored sets, which may hold more."""
    opened = context.cache.open_score_set(shard.content, shard.teacher, shard.served)
    stored = joined([opened.read(slice(row, row + 1)) for row in rows])
    if stored.topk is None:
        return stored
    return replace(stored, topk=stored.topk.cut(task.identity.k, task.identity.mass))


def _again(context: RunContext, teachers: Teachers, task: ScoreTask, rows: list[int]) -> Scores:
    whole = read_sequences(context, task)
    some = Sequences(
        [whole.prompts[row] for row in rows],
        [whole.completions[row] for row in rows],
        whole.recorded_TS[whole.places(rows)],
    )
    columns = frozenset(task.identity.columns) - {"draws"}
    ask = Ask(columns, task.identity.k, task.identity.mass, task.identity.num_ids)
    return in_order(teachers.of(task.model).score(some, ask))


def noise(pairs: Sequence[tuple[Scores, Scores]]) -> Noise:
    """How far second scores are from first ones of the same completions."""
    lengths = [len(first.token_offsets) - 1 for first, _ in pairs]
    log_ratio = _differences(pairs, "sampled_logprobs")
    entropy = np.abs(_differences(pairs, "entropy"))
    both = [Matched.of(a.topk, b.topk) for a, b in pairs if a.topk and b.topk]
    shared = _flat([np.abs(matched.differences_TS[matched.both_TS]) for matched in both])
    same_first = _flat([matched.same_first_T for matched in both])
    same = _flat([matched.both_TS[matched.one.kept] for matched in both])
    return Noise(
        num_samples=sum(lengths),
        num_tokens=sum(int(first.token_offsets[-1]) for first, _ in pairs),
        sampled_mean=_mean(np.abs(log_ratio)),
        sampled_max=_most(np.abs(log_ratio)),
        reverse_kl_sampled=_mean(np.exp(log_ratio) - 1 - log_ratio),
        entropy_mean=_mean(entropy),
        entropy_max=_most(entropy),
        topk_mean=_mean(shared),
        topk_max=_most(shared),
        same_first=_mean(same_first),
        same_topk=_mean(same),
    )


def _differences(pairs: Sequence[tuple[Scores, Scores]], name: str) -> NDArray[np.float64]:
    """Second less first, of the pairs that have the column."""
    held = [(getattr(one, name), getattr(other, name)) for one, other in pairs]
    return _flat([b.astype(np.float64) - a for a, b in held if a is not None and b is not None])


def _flat(parts: Sequence[NDArray[np.generic]]) -> NDArray[np.float64]:
    return np.concatenate([np.zeros(0), *parts])


def _mean(values: NDArray[np.float64]) -> float:
    return float(values.mean()) if len(values) else float("nan")


def _most(values: NDArray[np.float64]) -> float:
    return float(values.max()) if len(values) else float("nan")
