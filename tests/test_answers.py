"""Reference answers as sequences to imitate."""

from pathlib import Path

import numpy as np
import pytest
import torch

from opdcache.schemas.training import Layout
from opdcache.store.cache import Cache
from opdcache.train.answers import Answers
from opdcache.train.samples import RoundSamples

from .handmade import Row, commit_rollouts, rounds

EOS = 99
ASKED = [([3, 4, 5], "12"), ([3], "7"), ([3, 4, 5], "12"), ([8, 9], None), ([6, 6], "3456")]


def row(prompt: list[int], answer: str | None) -> Row:
    return Row(
        prompt=prompt,
        completion=[1, 2],
        sampling_T=np.full(2, -1, np.float32),
        recorded_ids_TS=np.zeros((2, 0), np.int32),
        answer=answer,
    )


def digits(answer: str) -> list[int]:
    return [*map(int, answer), EOS]


def answers_in(
    tmp_path: Path, asked: list[tuple[list[int], str | None]], layout: Layout = "padded"
) -> Answers:
    cache = Cache(str(tmp_path))
    parts = [[row(*one) for one in part] for part in (asked[:2], asked[2:]) if part]
    listed = [commit_rollouts(cache, rows, name=str(i)) for i, rows in enumerate(parts)]
    samples = RoundSamples(cache, *rounds(listed, [[] for _ in listed]), 1)
    return Answers(samples, digits, layout)


def test_a_prompts_answer_counts_once_and_one_without_is_left_out(tmp_path: Path) -> None:
    answers = answers_in(tmp_path, ASKED)
    found = answers.of(range(5))
    assert len(found) == 3
    assert answers.num_tokens(found) == 3 + 2 + 5
    assert answers.of([2, 0]) == answers.of([0])
    assert answers.of([3]) == []


@pytest.mark.parametrize("layout", ["padded", "packed", "shared"])
def test_an_answer_is_fed_behind_its_prompt_up_to_its_last_token(
    tmp_path: Path, layout: Layout
) -> None:
    answers = answers_in(tmp_path, ASKED, layout)
    batch = answers.collate(answers.of([4, 1]))
    fed = batch.input_ids_BL[batch.rows_T, batch.columns_T]
    assert fed.tolist() == [6, 3, 4, 5, 6, 3, 7]
    assert batch.sampled_T.tolist() == [3, 4, 5, 6, EOS, 7, EOS]
    assert batch.places_T.tolist() == [0, 1, 2, 3, 4, 0, 1]
    assert batch.sequences_T.tolist() == [0] * 5 + [1] * 2
    assert batch.draw_ids_TN is None
    if layout == "packed":
        assert batch.position_ids_BL is not None
        assert batch.position_ids_BL.tolist() == [[0, 1, 2, 3, 4, 5, 0, 1]]
    else:
        assert batch.input_ids_BL.tolist() == [[6, 6, 3, 4, 5, 6], [3, 7, 0, 0, 0, 0]]


def test_the_ranks_answers_are_all_of_them_each_once(tmp_path: Path) -> None:
    answers = answers_in(tmp_path, ASKED)
    every = answers.of(range(5))
    dealt = answers.dealt(every, 2)
    assert sorted(i for mine in dealt for i in mine) == sorted(every)
    assert all(dealt)
    micro = answers.micro_batches(every, 10)
    assert sorted(i for part in micro for i in part) == sorted(every)
    for part in micro:
        assert len(part) == 1 or answers.collate(part).input_ids_BL.numel() <= 10


def test_an_answer_may_come_with_a_later_copy_of_the_prompt(tmp_path: Path) -> None:
    answers = answers_in(tmp_path, [([3], None), ([4], "5"), ([3], "12")])
    assert answers.of([0, 1]) == answers.of([2, 1])
    assert answers.num_tokens(answers.of([0])) == 3


def test_what_an_answer_is_predicted_by_is_what_its_prompt_is(tmp_path: Path) -> None:
    answers = answers_in(tmp_path, ASKED)
    (number,) = answers.of([1])
    batch = answers.collate([number])
    assert torch.equal(batch.columns_T, torch.tensor([0, 1]))
