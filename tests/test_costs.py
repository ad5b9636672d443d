"""The planner's arithmetic against numbers worked by hand, measured shards, and a simulation."""

import random
from collections import OrderedDict

import pytest

from opdcache import costs
from opdcache.schemas.manifests import Sampling
from opdcache.schemas.plan import TeacherCost


@pytest.mark.parametrize(
    ("work", "workers", "expected"),
    [
        ([10] * 5, 1, 50),
        ([10] * 5, 2, 30),  # three turns
        ([10] * 5, 8, 10),  # a shard is one worker's
        ([5, 1, 1, 1], 2, 5),  # the other one takes the three short ones meanwhile
        ([], 3, 0),
    ],
)
def test_workers_share_shards_whole(work: list[float], workers: int, expected: float) -> None:
    assert costs.makespan(work, workers) == expected


def test_the_last_update_may_be_of_fewer_samples() -> None:
    assert costs.num_updates(10, 3, 4) == 8


@pytest.mark.parametrize(
    ("sampling", "max_model_len", "expected"),
    [
        (Sampling(max_tokens=24), None, 24),
        (Sampling(max_tokens=24), 100, 24),
        (Sampling(max_tokens=24), 32, 22),
        (Sampling(max_tokens=24, top_p=0.9), 32, 21),  # the raw pass wants room for one more
        (Sampling(max_tokens=24), 8, 0),
    ],
)
def test_a_completion_ends_where_the_engine_s_context_does(
    sampling: Sampling, max_model_len: int | None, expected: int
) -> None:
    assert costs.longest_completion(sampling, max_model_len, num_prompt_tokens=10) == expected


@pytest.mark.parametrize(("k", "measured"), [(16, 32.6), (50, 95.7), (128, 235)])
def test_estimated_score_bytes_are_near_the_measured_ones(k: int, measured: float) -> None:
    """README.md, "Measured": ids and log-probs with their tables; the tail's 1.7 apart."""
    estimate = costs.score_bytes_per_token({"topk"}, k=k, student_topk=0, draws=0)
    assert estimate == pytest.approx(measured + 1.7, rel=0.03)


def test_score_columns_add_up() -> None:
    def size(*columns: str) -> float:
        return costs.score_bytes_per_token(columns, k=16, student_topk=16, draws=12)  # type: ignore[arg-type]

    every = ("sampled", "entropy", "topk", "student_topk", "draws")
    assert size(*every) == pytest.approx(sum(size(column) for column in every))
    assert size("student_topk") == pytest.approx(19.7 + 1.9, rel=0.02)  # 869 tokens of a real run


@pytest.mark.parametrize(("draws", "measured"), [(4, 5.77), (12, 13.76), (50, 39.0)])
def test_estimated_bytes_of_draws_are_near_the_measured_ones(draws: int, measured: float) -> None:
    """22,164 tokens of a real teacher, encoded as a shard."""
    estimate = costs.score_bytes_per_token({"draws"}, k=0, student_topk=0, draws=draws)
    assert estimate == pytest.approx(measured, rel=0.06)


def test_estimated_rollout_bytes_are_near_the_measured_ones() -> None:
    """7,310 completion and 6,812 prompt tokens of SmolLM2-135M, 131.7 bytes a token."""
    assert costs.rollout_bytes_per_token(16, 6812 / 7310) == pytest.approx(131.7, rel=0.03)


@pytest.mark.parametrize(("num_shards", "batch"), [(33, 4), (100, 8), (100, 32)])
def test_shards_that_are_read_again_are_those_that_a_least_recently_used_store_misses(
    num_shards: int, batch: int
) -> None:
    held: OrderedDict[int, None] = OrderedDict.fromkeys(range(32))
    draw, misses, samples = random.Random(0), 0, 100_000
    for _ in range(samples):
        shard = draw.randrange(num_shards)
        misses += shard not in held
        held[shard] = None
        held.move_to_end(shard)
        if len(held) > 32:
            held.popitem(last=False)
    expected = costs.reread_samples(batch, num_shards, 32)
    assert misses / samples * batch == pytest.approx(expected, rel=0.1)


def test_nothing_is_read_again_of_a_round_that_is_held_whole() -> None:
    assert costs.reread_samples(64, 32, 32) == 0


def teacher_cost(**changes: int) -> TeacherCost:
    usual = {"rollout_s": 3600, "score_s": 1800, "train_s": 5400, "round_0_s": 600, "num_rounds": 3}
    return costs.teacher_cost(**{**usual, **changes})


def test_a_resident_teacher_is_held_while_the_student_samples_and_trains() -> None:
    cost = teacher_cost()
    assert (cost.resident_s, cost.cached_s, cost.ratio) == (10800, 1800, 6)


@pytest.mark.parametrize("num_rounds", [1, 3, 10])
def test_a_teacher_that_takes_long_to_start_breaks_even_with_a_resident_one(
    num_rounds: int,
) -> None:
    cost = teacher_cost(num_rounds=num_rounds)
    assert cost.cached_s + num_rounds * cost.break_even_start_s == cost.resident_s


def test_experiments_pay_their_part_of_the_scores_that_they_share() -> None:
    two, four, _ = teacher_cost().shared
    assert (two.num_experiments, two.all_scores_s, two.round_0_s) == (2, 900, 1500)
    assert (four.num_experiments, four.all_scores_s, four.round_0_s) == (4, 450, 1350)
