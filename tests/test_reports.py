"""What is reported of an update, and what is concluded from it."""

import math
from typing import Any

import pytest
import torch

from opdcache.schemas.training import EndRound
from opdcache.train.loading import Share, Update
from opdcache.train.objective import POSITIONS
from opdcache.train.reports import Report, below, is_spike

UPDATE = Update(index=0, samples=(4, 7, 9), num_tokens=6, weight=6.0, longest=2 * POSITIONS)


class Summed:
    """What a report reads of an objective."""

    def __init__(self, losses: list[float], **sums: list[float]) -> None:
        self.losses_B = torch.tensor(losses, dtype=torch.float64)
        counts = {"num_tokens": [1.0, 2.0], "num_measured": [1.0, 2.0], "objective": [0.5, 0.5]}
        named = counts | {"loss": [3.0, 1.0]} | sums
        self.sums = {name: torch.tensor(of, dtype=torch.float64) for name, of in named.items()}


def report_of(*parts: tuple[Summed, tuple[int, ...], int]) -> Report:
    report = Report()
    for summed, samples, weight in parts:
        objective: Any = summed
        report.add(objective, Share(UPDATE, samples, None, weight))
    return report


def test_micro_batches_add_up_and_what_keeps_a_rank_in_step_counts_for_nothing() -> None:
    one, other = Summed([4.0], entropy_gap=[1.0, 2.0]), Summed([4.0], entropy_gap=[3.0, 4.0])
    filler = Summed([math.nan], entropy_gap=[math.nan, math.inf])
    report = report_of((one, (4,), 1), (other, (7,), 1), (filler, (9,), 0))
    report.sum_over_ranks(lambda sums: 2 * sums)
    values = report.values(grad_norm=0.1, lr=1e-3, num_tokens=12, elapsed_s=4.0)
    assert values["entropy_gap"] == pytest.approx(20 / 12)
    assert values["loss"] == pytest.approx(16 / 12)
    assert values["objective"] == pytest.approx(4)
    assert values["tokens_per_s"] == 3
    assert values["memory_bytes"] > 0
    near, far = report.by_position
    assert (near["from"], far["from"]) == (0, POSITIONS)
    assert (near["num_tokens"], far["num_tokens"]) == (4, 8)
    assert (near["entropy_gap"], far["entropy_gap"]) == (2, 1.5)
    assert (near["loss"], far["loss"]) == (3, 0.5)


def test_the_share_of_time_that_data_was_waited_for_is_reported() -> None:
    report = report_of((Summed([1.0]), (4,), 1))
    report.waited_s = 0.5
    assert report.values(0.1, 1e-3, 6, elapsed_s=4.0)["data_wait"] == 0.125


def num_tokens(samples: Any) -> int:
    return sum({4: 1, 7: 10, 9: 2}[sample] for sample in samples)


def test_the_worst_sample_has_the_largest_mean_loss_and_none_is_worse_than_a_bad_number() -> None:
    fine = Summed([2.0, 15.0]), (4, 7), 1
    assert report_of(fine).worst(num_tokens).tolist() == [4, 2.0]
    filler = Summed([99.0]), (9,), 0
    assert report_of(fine, filler).worst(num_tokens).tolist() == [4, 2.0]
    for bad in (math.nan, math.inf, -math.inf):
        assert report_of(fine, (Summed([bad]), (9,), 1)).worst(num_tokens).tolist() == [9, math.inf]


def test_a_spike_is_far_above_the_median_of_the_updates_before_it() -> None:
    before = [1.0, -1.2, 0.8, 50.0, 1.1, 0.9]
    assert is_spike(3.2, before, 3.0)
    assert not is_spike(3.1, before, 3.0)
    assert not is_spike(1000.0, before[:4], 3.0), "too few to tell"


@pytest.mark.parametrize(
    ("limits", "why"),
    [
        ({}, None),
        ({"ess": 0.5}, None),
        ({"ess": 0.7}, "ess is 0.600, below 0.7"),
        ({"overlap": 0.9, "support_mass": 0.9}, "overlap is 0.800, below 0.9"),
        ({"support_mass": 0.96}, "support_mass is 0.950, below 0.96"),
    ],
)
def test_a_round_ends_below_a_limit(limits: dict[str, float], why: str | None) -> None:
    values = {"ess": 0.6, "overlap": 0.8, "support_mass": 0.95, "loss": 0.0}
    assert below(EndRound(**limits), values) == why


def test_a_metric_that_is_no_number_ends_a_round_too() -> None:
    assert below(EndRound(ess=0.9), {"ess": math.nan}) == "ess is nan, below 0.9"
