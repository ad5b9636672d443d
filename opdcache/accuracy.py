"""Accuracy of held-out completions, from their scores: pure arithmetic.

Intervals are percentiles of a bootstrap over prompts, the same resamples for every model: prompts
are what another evaluation would draw anew, and models are compared on the same ones. Array names
end in their shape: P prompts, N completions a prompt, M models, A averages, R resamples.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import comb

import numpy as np
from numpy.typing import NDArray

from .schemas.evaluation import Estimate, ModelAccuracy, Recovery
from .schemas.rounds import PromptScores

NUM_RESAMPLES = 10_000
LEVEL = 0.95
CORRECT = 1 - 1e-9
"""A completion with this score or more is right."""

_SEED = 0
_LEAST_GAP = 1e-9
"""A difference of means that is less is rounding."""

_SIDE = (1 - LEVEL) / 2
_HELD = 2**22
"""Resampled prompts in memory at once."""

Floats = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Answered:
    """How one model's completions of the held-out prompts were scored.

    Attributes:
        round: whose student it is; None: the teacher.
        scores_PN: float64 [P, N], from 0 to 1.
        num_truncated_P: int64 [P], completions cut off at their longest.
        num_failed: completions that the verifier could not judge.
    """

    round: int | None
    scores_PN: Floats
    num_truncated_P: NDArray[np.int64]
    num_failed: int = 0

    @classmethod
    def of(cls, round_index: int | None, prompts: Sequence[PromptScores]) -> "Answered":
        """From what a run keeps of them."""
        return cls(
            round_index,
            np.array([prompt.scores for prompt in prompts]),
            np.array([prompt.num_truncated for prompt in prompts]),
            sum(prompt.num_failed for prompt in prompts),
        )


def accuracies(models: Sequence[Answered]) -> tuple[ModelAccuracy, ...]:
    """Every model's accuracy, and how much of the gap each round has made up.

    Args:
        models: rounds and the teacher, with the same prompts in the same order.
    """
    every_k = ks(models[0].scores_PN.shape[1])
    values_PMA = np.stack([_averaged(model.scores_PN, every_k) for model in models], axis=1)
    means_MA, means_RMA = values_PMA.mean(0), resampled_means(values_PMA)
    place = {model.round: i for i, model in enumerate(models)}
    made = []
    for i, model in enumerate(models):
        mean_score, *passes = map(estimate, means_MA[i], means_RMA[:, i].T)
        gained = None
        if model.round and 0 in place and None in place:
            compared = np.array([place[0], i, place[None]])
            gained = recovery(means_MA[compared, 0], means_RMA[:, compared, 0])
        made.append(
            ModelAccuracy(
                round=model.round,
                num_prompts=len(model.scores_PN),
                num_completions=model.scores_PN.size,
                num_truncated=int(model.num_truncated_P.sum()),
                num_failed=model.num_failed,
                mean_score=mean_score,
                pass_at=dict(zip(every_k, passes, strict=True)),
                recovery=gained,
            )
        )
    return tuple(made)


def ks(num_samples: int) -> list[int]:
    """The k of which pass@k is told: 1, 2, 4 and so on, and the number of samples."""
    powers = [2**i for i in range(num_samples.bit_length()) if 2**i < num_samples]
    return [*powers, num_samples]


def pass_at_k(num_correct_P: NDArray[np.int64], num_samples: int, k: int) -> Floats:
    """Probability, [P], that a prompt has a right completion among k, without bias: 1 - C(n - c, k)
    / C(n, k) of n completions of which c are right (arXiv 2107.03374, Eq. 1)."""
    wrong = [comb(num_samples - c, k) / comb(num_samples, k) for c in range(num_samples + 1)]
    return 1 - np.array(wrong)[num_correct_P]


def _averaged(scores_PN: Floats, every_k: Sequence[int]) -> Floats:
    """What is averaged over prompts, [P, A]: the mean score, then pass@k of every k."""
    num_correct_P = (scores_PN >= CORRECT).sum(1)
    passes = [pass_at_k(num_correct_P, scores_PN.shape[1], k) for k in every_k]
    return np.stack([scores_PN.mean(1), *passes], axis=1)


def resampled_means(values: Floats, num_resamples: int = NUM_RESAMPLES) -> Floats:
    """Means over resamples of the prompts, [R, ...] of values [P, ...]: as many prompts, drawn with
    replacement, alike for all values.

    The seed is fixed, so the same scores give the same intervals.
    """
    rng, num_prompts = np.random.default_rng(_SEED), len(values)
    step = max(1, _HELD // num_prompts)
    parts = []
    for first in range(0, num_resamples, step):
        size = min(step, num_resamples - first)
        counts_RP = rng.multinomial(num_prompts, np.full(num_prompts, 1 / num_prompts), size)
        parts.append(np.tensordot(counts_RP, values, axes=1) / num_prompts)
    return np.concatenate(parts)


def recovery(means_3: Floats, means_R3: Floats) -> Recovery:
    """Gap recovery of a round, (after - before) / (teacher - before), and its interval.

    Where the teacher does not lead there is nothing to recover, and a quotient would mislead: such
    resamples are counted and left out. Once they are more than an interval leaves out on a side,
    its end may be anywhere, and there is none.

    Args:
        means_3: mean scores before, after, and of the teacher.
        means_R3: the same of each resample, [R, 3].
    """
    before, after, teacher = map(float, means_3)
    gap_R = means_R3[:, 2] - means_R3[:, 0]
    leads_R = gap_R > _LEAST_GAP
    without_gap = 1 - float(leads_R.mean())
    is_there = teacher - before > _LEAST_GAP
    low = high = None
    if is_there and without_gap <= _SIDE:
        low, high = _interval((means_R3[leads_R, 1] - means_R3[leads_R, 0]) / gap_R[leads_R])
    return Recovery(
        value=(after - before) / (teacher - before) if is_there else None,
        low=low,
        high=high,
        gap=teacher - before,
        share_without_gap=without_gap,
    )


def estimate(mean: float, means_R: Floats) -> Estimate:
    """A mean and its interval, from the means [R] of resamples."""
    low, high = _interval(means_R)
    return Estimate(value=float(mean), low=low, high=high)


def _interval(values_R: Floats) -> tuple[float, float]:
    low, high = np.percentile(values_R, [100 * _SIDE, 100 * (1 - _SIDE)])
    return float(low), float(high)
