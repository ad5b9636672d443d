"""Which tokens count in the loss: the rule of a round, and what is chosen live."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from opdcache.resolve import special_ids
from opdcache.schemas.losses import TokensConfig
from opdcache.train.weights import TokenRule, largest

from .conftest import EOS_ID


@pytest.mark.parametrize(("round_index", "limit"), [(0, 10), (1, 20), (2, 40), (7, 40)])
def test_a_length_curriculum_is_a_limit_a_round_and_the_last_one_stays(
    round_index: int, limit: int
) -> None:
    config = TokensConfig(max_supervised=(10, 20, 40))
    assert TokenRule.of(config, round_index, 0, ()).limit == limit


@pytest.mark.parametrize(
    ("update", "limit"), [(0, 10), (2, 10), (3, 20), (6, 20), (7, 40), (9, 40)]
)
def test_a_length_curriculum_widens_after_so_many_updates_of_the_run(
    update: int, limit: int
) -> None:
    config = TokensConfig(max_supervised=(10, 20, 40), milestones=(3, 7))
    assert TokenRule.of(config, 5, update, ()).limit == limit


@pytest.mark.parametrize(
    ("limits", "milestones", "words"),
    [
        ((), (3,), "one fewer than the numbers of max_supervised"),
        ((10, 20), (3, 7), "one fewer than the numbers of max_supervised"),
        ((10, 20, 40), (7, 7), "each comes after the one before"),
    ],
)
def test_milestones_stand_between_the_numbers(
    limits: tuple[int, ...], milestones: tuple[int, ...], words: str
) -> None:
    with pytest.raises(ValidationError, match=words):
        TokensConfig(max_supervised=limits, milestones=milestones)


def test_without_a_limit_a_round_has_none() -> None:
    assert TokenRule.of(TokensConfig(), 3, 0, (1, 2)) == TokenRule()


def test_special_ids_are_left_out_when_asked() -> None:
    assert TokenRule.of(TokensConfig(skip_special=True), 0, 0, (1, 2)).left_out == (1, 2)


def test_the_fraction_is_taken_in_double_precision() -> None:
    values, rows = torch.arange(50.0), torch.zeros(50, dtype=torch.long)
    assert int(largest(values, rows, 0.3).sum()) == math.ceil(50 * 0.3) == 15


@pytest.mark.parametrize("num_tokens", [0, 1, 3, 100])
def test_the_total_is_what_will_be_chosen(num_tokens: int) -> None:
    places = np.arange(num_tokens)
    assert TokenRule(fraction=0.1).total(places) == math.ceil(num_tokens * 0.1)
    assert TokenRule(fraction=0.1, per_sequence=True).total(places) == min(num_tokens, 1)
    decayed = sum(0.5 ** (t / 7) for t in range(num_tokens))
    assert TokenRule(fraction=0.1, half_life=7).total(places) == pytest.approx(0.1 * decayed)


def test_the_special_ids_of_a_tokenizer_are_those_that_it_marks(tiny_student: Path) -> None:
    assert EOS_ID in special_ids(tiny_student)
    assert 97 not in special_ids(tiny_student)


@given(
    st.lists(st.lists(st.integers(-3, 3), max_size=60), min_size=1, max_size=5),
    st.sampled_from([0.1, 0.2, 0.3, 0.6, 0.7, 0.9, 1.0]) | st.floats(0.01, 1.0),
)
def test_the_largest_of_every_sequence_are_chosen_and_the_earlier_of_equal_ones(
    sequences: list[list[int]], fraction: float
) -> None:
    values = torch.tensor([v for row in sequences for v in row], dtype=torch.float32)
    rows = torch.tensor([i for i, row in enumerate(sequences) for _ in row], dtype=torch.long)
    expected = []
    for row in sequences:
        ranked = sorted(range(len(row)), key=lambda t: (-row[t], t))
        chosen = ranked[: math.ceil(len(row) * fraction)]
        expected += [t in chosen for t in range(len(row))]
    if fraction == 1:
        assert all(expected)
    assert largest(values, rows, fraction).tolist() == expected
