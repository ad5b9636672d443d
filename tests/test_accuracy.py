"""Accuracy, intervals and gap recovery, against ways of computing them that take longer."""

from collections.abc import Sequence
from itertools import combinations, product

import numpy as np
import pytest
from scipy.stats import bootstrap

from opdcache.accuracy import (
    NUM_RESAMPLES,
    Answered,
    accuracies,
    ks,
    pass_at_k,
    recovery,
    resampled_means,
)
from opdcache.schemas.evaluation import ModelAccuracy
from opdcache.schemas.rounds import PromptScores

RNG = np.random.default_rng(7)


def answered(index: int | None, scores: Sequence[Sequence[float]], truncated: int = 0) -> Answered:
    cut = np.zeros(len(scores), np.int64)
    cut[0] = truncated
    return Answered(index, np.array(scores, float), cut)


def graded(num_prompts: int, num_samples: int, share: float) -> list[list[float]]:
    """Scores of prompts that differ in how hard they are."""
    right = RNG.beta(2 * share, 2 * (1 - share), (num_prompts, 1))
    return (RNG.random((num_prompts, num_samples)) < right).astype(float).tolist()


def by_round(models: Sequence[Answered]) -> dict[int | None, ModelAccuracy]:
    return {one.round: one for one in accuracies(models)}


@pytest.mark.parametrize("num_samples", [1, 2, 5, 8])
def test_pass_at_k_is_the_share_of_subsets_that_hold_a_right_completion(num_samples: int) -> None:
    for num_correct, k in product(range(num_samples + 1), range(1, num_samples + 1)):
        right = [i < num_correct for i in range(num_samples)]
        subsets = [any(chosen) for chosen in combinations(right, k)]
        (found,) = pass_at_k(np.array([num_correct]), num_samples, k)
        assert found == pytest.approx(sum(subsets) / len(subsets), abs=1e-12)


def test_pass_at_k_is_exact_for_many_samples() -> None:
    (found,) = pass_at_k(np.array([1]), 4096, 2048)
    assert found == pytest.approx(0.5, abs=1e-12)


@pytest.mark.parametrize(
    ("num_samples", "expected"), [(1, [1]), (2, [1, 2]), (6, [1, 2, 4, 6]), (8, [1, 2, 4, 8])]
)
def test_pass_at_k_is_told_of_powers_of_two_and_of_all(
    num_samples: int, expected: list[int]
) -> None:
    assert ks(num_samples) == expected


def test_partial_credit_counts_in_the_mean_and_is_not_right() -> None:
    (row,) = accuracies([answered(0, [[0.5, 1.0], [0.999, 0.0], [1 - 1e-12, 0.2]], truncated=2)])
    assert row.mean_score.value == pytest.approx((0.75 + 0.4995 + 0.6) / 3)
    assert row.pass_at[1].value == pytest.approx((0.5 + 0 + 0.5) / 3)
    assert row.pass_at[2].value == pytest.approx(2 / 3)
    assert (row.num_prompts, row.num_completions, row.num_truncated) == (3, 6, 2)
    assert row.recovery is None


def test_completions_that_could_not_be_judged_are_summed() -> None:
    of = {"task": "t", "num_truncated": 0}
    prompts = [PromptScores(prompt_id=str(n), scores=(0, 0), num_failed=n, **of) for n in (0, 2, 1)]
    (row,) = accuracies([Answered.of(0, prompts)])
    assert row.num_failed == 3


def test_an_interval_is_that_of_scipy_s_bootstrap() -> None:
    scores = RNG.random((60, 4))
    scores[scores > 0.7] = 1
    (row,) = accuracies([Answered(0, scores, np.zeros(60, np.int64))])
    is_any_right = (scores == 1).any(1).astype(float)
    step = 1 / 60  # of a mean of such
    for values, found, within in (
        (scores.mean(1), row.mean_score, 0.003),
        (is_any_right, row.pass_at[4], step + 1e-9),
    ):
        exact = bootstrap(
            (values,), np.mean, n_resamples=40_000, method="percentile", rng=1
        ).confidence_interval
        assert found.value == pytest.approx(values.mean())
        assert found.low == pytest.approx(exact.low, abs=within)
        assert found.high == pytest.approx(exact.high, abs=within)


def test_prompts_are_resampled_and_not_completions() -> None:
    """Completions of a prompt that are alike tell no more than one of them."""
    once = [[float(i % 3 == 0)] for i in range(30)]
    (one,), (many,) = (
        accuracies([answered(0, [row * times for row in once])]) for times in (1, 16)
    )
    assert (many.mean_score.low, many.mean_score.high) == (one.mean_score.low, one.mean_score.high)


def test_resamples_of_two_prompts_are_those_that_can_be_listed() -> None:
    means = resampled_means(np.array([[0.0, 5.0], [1.0, 3.0]]))
    assert len(means) == NUM_RESAMPLES
    shares = [(means[:, 0] == value).mean() for value in (0, 0.5, 1)]
    assert shares == pytest.approx([0.25, 0.5, 0.25], abs=0.02)
    np.testing.assert_allclose(means[:, 1], 5 - 2 * means[:, 0])  # the same prompts in both


def test_resampling_in_parts_makes_as_many_resamples(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("opdcache.accuracy._HELD", 70)
    means = resampled_means(RNG.random(20), num_resamples=500)
    assert means.shape == (500,)
    assert len(set(means.tolist())) > 400


def test_gap_recovery_and_its_interval_are_those_of_a_plain_loop() -> None:
    before, after, teacher = (graded(80, 2, share) for share in (0.2, 0.4, 0.7))
    rows = by_round([answered(0, before), answered(1, after), answered(None, teacher)])
    found = rows[1].recovery
    assert found is not None
    assert found.value is not None
    b, a, t = (np.mean(scores, axis=1) for scores in (before, after, teacher))
    assert found.value == pytest.approx((a.mean() - b.mean()) / (t.mean() - b.mean()))
    assert found.gap == pytest.approx(t.mean() - b.mean())
    assert found.share_without_gap == 0
    loop, rng = [], np.random.default_rng(3)
    for _ in range(20_000):
        i = rng.integers(80, size=80)
        loop.append((a[i].mean() - b[i].mean()) / (t[i].mean() - b[i].mean()))
    assert found.low == pytest.approx(np.percentile(loop, 2.5), abs=0.015)
    assert found.high == pytest.approx(np.percentile(loop, 97.5), abs=0.015)
    assert rows[0].recovery is None
    assert rows[None].recovery is None


def test_gap_recovery_is_paired_so_that_hard_prompts_do_not_blur_it() -> None:
    """A round that is as right as the teacher on every prompt has recovered all, surely."""
    before, teacher = graded(60, 2, 0.2), graded(60, 2, 0.7)
    rows = by_round([answered(0, before), answered(1, teacher), answered(None, teacher)])
    assert rows[1].recovery is not None
    assert (rows[1].recovery.low, rows[1].recovery.high) == pytest.approx((1, 1))


@pytest.mark.parametrize("teacher", [[[0.0], [1.0], [0.0], [0.0]], [[1.0], [0.0], [0.0], [1.0]]])
def test_a_teacher_that_does_not_lead_leaves_nothing_to_recover(teacher: list[list[float]]) -> None:
    before, after = [[1.0], [0.0], [1.0], [0.0]], [[1.0], [1.0], [1.0], [1.0]]
    rows = by_round([answered(0, before), answered(1, after), answered(None, teacher)])
    found = rows[1].recovery
    assert found is not None
    assert (found.value, found.low, found.high) == (None, None, None)
    assert found.gap <= 0
    assert found.share_without_gap > 0.5


def test_a_lead_that_resamples_lose_has_no_interval_and_says_how_often() -> None:
    before, after, teacher = ([[v] for v in values] for values in ("0101", "1101", "1110"))
    scores = [np.array(one, float).tolist() for one in (before, after, teacher)]
    rows = by_round([answered(i, s) for i, s in zip((0, 1, None), scores, strict=True)])
    found = rows[1].recovery
    assert found is not None
    assert found.value == pytest.approx(1)
    assert (found.low, found.high) == (None, None)
    gaps = np.array([1, 0, 1, -1])  # of the four prompts
    lost = [sum(gaps[list(i)]) <= 0 for i in product(range(4), repeat=4)]
    assert found.share_without_gap == pytest.approx(np.mean(lost), abs=0.02)


def test_few_resamples_without_a_lead_are_left_out_of_the_interval_and_counted() -> None:
    means = np.zeros((1000, 3))
    means[:, 1], means[:, 2] = np.linspace(0.2, 0.6, 1000), 1.0
    means[:20, 2] = 0.0
    found = recovery(np.array([0.0, 0.4, 1.0]), means)
    assert found.share_without_gap == pytest.approx(0.02)
    assert found.low == pytest.approx(np.percentile(means[20:, 1], 2.5))
    assert found.high == pytest.approx(np.percentile(means[20:, 1], 97.5))


def test_the_same_scores_give_the_same_intervals() -> None:
    models = [answered(i, graded(10, 2, 0.5)) for i in (0, 1, None)]
    assert accuracies(models) == accuracies(models)


def test_without_a_teacher_or_round_0_there_is_no_gap() -> None:
    low, high = graded(10, 1, 0.1), graded(10, 1, 0.9)
    without_teacher = [answered(0, low), answered(1, high), answered(2, high)]
    without_round_0 = [answered(1, low), answered(2, high), answered(None, high)]
    for models in (without_teacher, without_round_0):
        assert [row.recovery for row in accuracies(models)] == [None] * 3
    both = by_round([*without_teacher, answered(None, high)])
    assert [both[i].recovery is None for i in (0, 1, 2, None)] == [True, False, False, True]
