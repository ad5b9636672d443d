"""Diagnostics of stored entries are those of the whole distributions, token by token."""

import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from opdcache.audit.blocks import Block, Entries
from opdcache.audit.measures import (
    COUNTS,
    MEANS,
    Shared,
    entropy_bounds,
    measures,
    repeated,
)
from opdcache.audit.tally import auroc
from opdcache.schemas.audit import Diagnostics

from .dense import Distributions, block_of, distributions, entropy


def found_of(block: Block, k: int = 16) -> dict[str, np.ndarray]:
    return measures(block, Shared.between(block), k)


def by_hand(given: Distributions, k: int) -> dict[str, list[float]]:
    """One token at a time, from whole distributions and Python's sets."""
    told: dict[str, list[float]] = {name: [] for name in ("overlap", "p", "q", "advantage")}
    for p, q in zip(given.p.tolist(), given.q.tolist(), strict=True):
        ours, theirs = (
            set(sorted(range(len(v)), key=lambda i, v=v: -v[i])[:k])  # type: ignore[misc]
            for v in (p, q)
        )
        both = ours & theirs
        mass_p, mass_q = (sum(math.exp(v[i]) for i in both) for v in (p, q))
        told["overlap"].append(len(both) / k)
        told["p"].append(mass_p)
        told["q"].append(mass_q)
        terms = [
            math.exp(p[i]) / mass_p * math.log(math.exp(q[i]) / mass_q / (math.exp(p[i]) / mass_p))
            for i in both
        ]
        told["advantage"].append(sum(terms) / len(both) if both else math.nan)
    return told


def test_every_mean_and_count_is_a_field_of_what_is_reported() -> None:
    assert {*MEANS, *COUNTS, "num_tokens"} == set(Diagnostics.model_fields)
    assert set(found_of(block_of(distributions(3), own=True))) == {*MEANS, *COUNTS}


@pytest.mark.parametrize("k", [1, 4, 16])
def test_overlap_masses_and_overlap_advantage_are_those_of_the_distributions(k: int) -> None:
    given = distributions(7, 1, 12, apart=3)
    found, told = found_of(block_of(given), k), by_hand(given, k)
    assert found["overlap"] == pytest.approx(told["overlap"])
    assert found["overlap_mass_student"] == pytest.approx(told["p"], abs=1e-6)
    assert found["overlap_mass_teacher"] == pytest.approx(told["q"], abs=1e-6)
    assert found["overlap_advantage"] == pytest.approx(told["advantage"], abs=1e-6, nan_ok=True)
    assert found["num_empty"].tolist() == [float(math.isnan(a)) for a in told["advantage"]]
    assert np.nanmax(found["overlap_advantage"]) <= 1e-9


def test_no_shared_entry_is_counted_and_is_no_overlap_advantage() -> None:
    given = distributions(2, num_ids=8)
    p, q = given.p.copy(), given.q.copy()
    p[0], q[0] = np.log(np.arange(1, 9) / 36), np.log(np.arange(8, 0, -1) / 36)
    found = found_of(block_of(Distributions((2,), given.ids, p, q), k=4, recorded=4), 4)
    assert found["num_empty"].tolist() == [1, 0]
    assert found["overlap"][0] == found["overlap_mass_student"][0] == 0
    assert np.isnan(found["overlap_advantage"]).tolist() == [True, False]


def test_fewer_kept_entries_are_compared_with_as_many_and_counted() -> None:
    given = distributions(3)
    block = block_of(given)
    assert block.scores.topk is not None
    block.scores.topk.num_kept[:] = [16, 5, 0]
    found = found_of(block)
    assert found["num_narrow"].tolist() == [0, 1, 1]
    assert found["overlap"][:2] == pytest.approx(
        [by_hand(given, 16)["overlap"][0], by_hand(given, 5)["overlap"][1]]
    )
    assert math.isnan(found["overlap"][2])
    assert found["num_empty"][2] == 0


def test_the_advantage_is_of_the_sampled_token_and_the_estimate_is_never_negative() -> None:
    given = distributions(40)
    found = found_of(block_of(given))
    exact = given.at(given.q) - given.at(given.p)
    assert found["advantage"] == pytest.approx(exact, abs=1e-6)
    assert found["reverse_kl_sampled"] == pytest.approx(np.exp(exact) - 1 - exact, abs=1e-5)
    assert (found["reverse_kl_sampled"] >= 0).all()


def test_the_entropy_gap_is_of_each_token_and_lies_within_its_bounds() -> None:
    given = distributions(60, apart=2)
    found = found_of(block_of(given, own=True))
    ours, theirs = entropy(given.p), entropy(given.q)
    assert found["student_entropy"] == pytest.approx(ours, abs=1e-5)
    assert found["teacher_entropy"] == pytest.approx(theirs, abs=1e-5)
    assert found["entropy_gap"] == pytest.approx(np.abs(theirs - ours), abs=1e-5)
    for name, exact in (("student_entropy", ours), ("entropy_gap", np.abs(theirs - ours))):
        assert (found[f"{name}_low"] <= exact + 1e-5).all()
        assert (found[f"{name}_high"] >= exact - 1e-5).all()
    assert found["entropy_gap_low"].min() >= 0


def entries(p: np.ndarray, k: int) -> Entries:
    ordered = np.sort(p)[::-1][:k]
    logprobs = np.log(ordered)[None].astype(np.float32)
    return Entries(np.arange(k, dtype=np.int32)[None], logprobs, np.array([k]))


@settings(deadline=None)
@given(
    st.lists(st.floats(1e-6, 1), min_size=2, max_size=12).map(lambda v: np.array(v) / sum(v)),
    st.data(),
)
def test_no_distribution_with_these_entries_has_an_entropy_outside_the_bounds(
    p: np.ndarray, data: st.DataObject
) -> None:
    k = data.draw(st.integers(1, len(p)))
    low, high = entropy_bounds(entries(p, k), len(p))
    exact = float(-(p * np.log(p)).sum())
    assert low[0] - 1e-5 <= exact <= high[0] + 1e-5


def test_the_bounds_of_an_entropy_are_reached() -> None:
    """By all of the rest alike, and by as few ids as the last entry's probability allows."""
    alike = np.array([0.4, 0.3, 0.1, 0.1, 0.1])
    fewest = np.array([0.4, 0.3, 0.3, 0.0, 0.0]) + 1e-12
    low, high = entropy_bounds(entries(alike, 2), 5)
    assert high[0] == pytest.approx(-(alike * np.log(alike)).sum(), abs=1e-6)
    assert low[0] == pytest.approx(-(fewest * np.log(fewest)).sum(), abs=1e-6)
    fewest = np.array([0.4, 0.4, 0.2, 0.0, 0.0]) + 1e-12
    assert entropy_bounds(entries(np.array([0.4, 0.15, 0.15, 0.15, 0.15]), 1), 5)[0][
        0
    ] == pytest.approx(-(fewest * np.log(fewest)).sum(), abs=1e-6)


def test_a_teacher_less_sure_than_the_student_can_be_is_at_least_so_far_away() -> None:
    sure = np.log(np.array([[0.9, *([0.1 / 59] * 59)]]))
    blind = np.full((1, 60), -np.log(60))
    given = Distributions((1,), np.zeros(1, np.int32), sure, blind)
    found = found_of(block_of(given))
    assert found["entropy_gap_low"][0] == pytest.approx(
        np.log(60) - found["student_entropy_high"][0], abs=1e-5
    )
    assert found["entropy_gap_low"][0] > 1


def test_a_repeated_token_ends_sixteen_that_stood_in_the_same_completion_before() -> None:
    run = list(range(100, 120))
    first = [1, 2, *run, 3, *run[:17], 9]
    second = [*run, 5]  # stands in the first completion, not in this one
    ids = np.array([*first, *second], np.int32)
    rows = np.repeat([0, 1], [len(first), len(second)])
    start = 2 + len(run) + 1
    assert np.flatnonzero(repeated(ids, rows)).tolist() == [start + 15, start + 16]


def test_a_token_that_repeats_at_once_is_repeated_from_the_seventeenth_on() -> None:
    same = np.full(20, 7, np.int32)
    assert np.flatnonzero(repeated(same, np.zeros(20, np.int64))).tolist() == [16, 17, 18, 19]
    assert not repeated(same[:3], np.zeros(3, np.int64)).any()
    two = np.concatenate([same, same])
    rows = np.repeat([0, 1], 20)
    assert np.flatnonzero(repeated(two, rows)).tolist() == [*range(16, 20), *range(36, 40)]


@given(st.lists(st.tuples(st.integers(0, 5), st.booleans()), max_size=30))
def test_auroc_is_the_share_of_pairs_in_order(drawn: list[tuple[int, bool]]) -> None:
    values = np.array([float(v) for v, _ in drawn])
    labels = np.array([label for _, label in drawn], np.bool_)
    pairs = [
        (a > b) + (a == b) / 2 for (a, x), (b, y) in itertools.product(drawn, drawn) if x and not y
    ]
    found = auroc(values, labels)
    assert found == (pytest.approx(sum(pairs) / len(pairs)) if pairs else None)
