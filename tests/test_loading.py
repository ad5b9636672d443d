"""Updates cut into micro-batches for any number of ranks, read ahead, padded or packed."""

import itertools
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from opdcache.models import load_model
from opdcache.train.branches import branch_mask
from opdcache.train.loading import Loading, Share, ahead
from opdcache.train.microbatch import MicroBatch
from opdcache.train.samples import RoundSamples

from .test_alignment import FILLED, FLAT, samples_in, tokens_of

BATCH, SIBLINGS = 5, 3
CPU = torch.device("cpu")


def loading(
    samples: RoundSamples, rank: int = 0, num_ranks: int = 1, max_tokens: int = 30
) -> Loading:
    order = samples.order(0, 0, 2)
    return Loading(
        lambda index: samples,
        order,
        batch_samples=BATCH,
        max_tokens=max_tokens,
        rank=rank,
        num_ranks=num_ranks,
    )


def shares(made: Loading, first_update: int = 0) -> list[Share]:
    return [share for share, waited_s in made.shares(first_update) if waited_s >= 0]


def samples_with_siblings(tmp_path: Path) -> tuple[RoundSamples, RoundSamples]:
    """Samples of which three each have one prompt, laid out with it and each alone."""
    return (
        samples_in(tmp_path / "shared", layout="shared", siblings=SIBLINGS),
        samples_in(tmp_path / "alone", siblings=SIBLINGS),
    )


def states(model: Any, batch: MicroBatch) -> torch.Tensor:
    """Hidden states that predict the batch's tokens."""
    mask = None if batch.branches_BL is None else branch_mask(model, batch.branches_BL)
    with torch.no_grad():
        made = model.base_model(
            input_ids=batch.input_ids_BL % 258,
            attention_mask=mask,
            position_ids=batch.position_ids_BL,
            use_cache=False,
        )
    found: torch.Tensor = made.last_hidden_state[batch.rows_T, batch.columns_T]
    return found


@pytest.mark.parametrize("num_ranks", [1, 2, 3, 8])
def test_the_ranks_micro_batches_are_the_updates_samples_each_once(
    tmp_path: Path, num_ranks: int
) -> None:
    samples = samples_in(tmp_path)
    order = samples.order(0, 0, 2)
    ranks = [shares(loading(samples, rank, num_ranks)) for rank in range(num_ranks)]
    for index in range(-(-len(order) // BATCH)):
        whole = order[index * BATCH : (index + 1) * BATCH]
        mine = [[s for s in rank if s.update.index == index] for rank in ranks]
        assert len({len(each) for each in mine}) == 1, "ranks take as many backward passes"
        counted = [i for each in mine for share in each if share.weight for i in share.samples]
        assert sorted(counted) == sorted(i for i in whole if FLAT[i])
        for share in itertools.chain(*mine):
            assert share.update == mine[0][0].update
            assert share.update.samples == tuple(whole)
            assert share.update.num_tokens == sum(FLAT[i] for i in whole)
            assert share.update.longest == max(FLAT[i] for i in whole)
            assert share.weight or len(share.samples) == 1


def test_ranks_are_dealt_about_as_many_tokens(tmp_path: Path) -> None:
    samples = samples_in(tmp_path)
    dealt = samples.dealt([*FILLED, *FILLED], 3)
    assert sorted(i for mine in dealt for i in mine) == sorted([*FILLED, *FILLED])
    fed = [sum(samples.collate([i]).input_ids_BL.numel() for i in mine) for mine in dealt]
    longest = max(samples.collate([i]).input_ids_BL.numel() for i in FILLED)
    assert max(fed) - min(fed) <= longest


def test_a_resumed_round_sees_what_the_whole_one_would_have_seen(tmp_path: Path) -> None:
    made = loading(samples_in(tmp_path))
    whole = shares(made)
    for first in range(made.num_updates + 1):
        left = [(s.update, s.samples) for s in shares(made, first)]
        assert left == [(s.update, s.samples) for s in whole if s.update.index >= first]


def test_an_update_without_a_token_is_there_and_has_no_micro_batch(tmp_path: Path) -> None:
    samples = samples_in(tmp_path)
    empty = [i for i, length in enumerate(FLAT) if not length]
    (share,) = shares(Loading(lambda index: samples, empty, batch_samples=BATCH, max_tokens=30))
    assert (share.update.num_tokens, share.batch, share.weight) == (0, None, 0)


def test_items_are_made_ahead_in_another_thread_and_come_in_order() -> None:
    made: list[int] = []

    def items() -> Iterator[int]:
        assert threading.current_thread() is not threading.main_thread()
        for number in range(10):
            made.append(number)
            yield number

    reader = ahead(items(), 3)
    assert next(reader)[0] == 0
    deadline = time.monotonic() + 10
    while len(made) < 4 and time.monotonic() < deadline:
        time.sleep(0.01)
    time.sleep(0.05)
    assert made == [0, 1, 2, 3], "so many ahead, and no more"
    assert [number for number, _ in reader] == list(range(1, 10))


def test_what_the_thread_raises_is_raised_in_its_place() -> None:
    def items() -> Iterator[int]:
        yield 1
        raise ValueError("the second")

    reader = ahead(items(), 2)
    assert next(reader)[0] == 1
    with pytest.raises(ValueError, match="the second"):
        next(reader)


def test_a_reader_that_stops_leaves_no_thread_behind() -> None:
    reader = ahead(iter(range(100)), 2)
    next(reader)
    reader.close()
    assert not [t for t in threading.enumerate() if t.name.startswith("loading")]


@pytest.mark.parametrize("max_tokens", [13, 40, 1000])
def test_packed_micro_batches_hold_the_same_samples_and_no_padding(
    tmp_path: Path, max_tokens: int
) -> None:
    samples = samples_in(tmp_path, layout="packed")
    made = list(samples.micro_batches(FILLED, max_tokens))
    assert sorted(i for micro in made for i in micro) == FILLED
    for micro in made:
        batch = samples.collate(micro)
        lengths = [samples.collate([i]).input_ids_BL.shape[1] for i in micro]
        assert batch.input_ids_BL.shape == (1, sum(lengths))
        assert len(micro) == 1 or sum(lengths) <= max_tokens
        assert batch.position_ids_BL is not None
        assert batch.position_ids_BL[0].tolist() == [t for n in lengths for t in range(n)]


@pytest.mark.parametrize("max_tokens", [13, 30, 1000])
def test_a_row_of_a_prompt_has_it_once_and_its_completions_behind_it(
    tmp_path: Path, max_tokens: int
) -> None:
    samples, alone = samples_with_siblings(tmp_path)
    made = list(samples.micro_batches(FILLED, max_tokens))
    assert sorted(i for micro in made for i in micro) == FILLED
    for micro in made:
        batch = samples.collate(micro)
        if len({i // SIBLINGS for i in micro}) == len(micro):
            assert batch.branches_BL is None, "nothing shares a row"
            assert torch.equal(batch.input_ids_BL, alone.collate(micro).input_ids_BL)
            continue
        assert batch.position_ids_BL is not None
        assert batch.branches_BL is not None
        assert len(micro) == 1 or batch.input_ids_BL.numel() <= max_tokens
        assert len(batch.input_ids_BL) == len({i // SIBLINGS for i in micro})
        for number, sample in enumerate(micro):
            one = alone.collate([sample])
            (row,) = set(batch.rows_T[batch.sequences_T == number].tolist())
            branch = [i for i in micro if i // SIBLINGS == sample // SIBLINGS].index(sample) + 1
            seen = (batch.branches_BL[row] == 0) | (batch.branches_BL[row] == branch)
            assert batch.input_ids_BL[row][seen].tolist() == one.input_ids_BL[0].tolist()
            positions = batch.position_ids_BL[row][seen]
            assert positions.tolist() == list(range(one.input_ids_BL.shape[1]))


def test_completions_of_a_prompt_are_in_one_update_and_on_one_rank(tmp_path: Path) -> None:
    samples, _ = samples_with_siblings(tmp_path)
    order = samples.order(0, 0, 2)
    epochs = [order[: len(FLAT)], order[len(FLAT) :]]
    for epoch in epochs:
        assert sorted(epoch) == list(range(len(FLAT)))
        prompts = [prompt for prompt, _ in itertools.groupby(i // SIBLINGS for i in epoch)]
        assert len(prompts) == len(set(prompts)), "a prompt's completions follow one another"
    assert epochs[0] != epochs[1], "a new permutation an epoch"
    dealt = samples.dealt(FILLED, 2)
    assert sorted(i for mine in dealt for i in mine) == FILLED
    where = {(i // SIBLINGS, rank) for rank, mine in enumerate(dealt) for i in mine}
    assert len(where) == len({i // SIBLINGS for i in FILLED})
    assert all(dealt)
    one_prompt = [i for i in FILLED if i // SIBLINGS == 1]
    assert all(samples.dealt(one_prompt, 2)), "no rank is idle for a prompt's sake"


@pytest.mark.parametrize("attention", ["sdpa", "eager", "flex_attention"])
def test_completions_of_a_prompt_do_not_see_one_another(
    tmp_path: Path, tiny_student: Path, attention: str, one_thread: None
) -> None:
    model = load_model(tiny_student, "float32", CPU, {"attn_implementation": attention})
    shared, alone = samples_with_siblings(tmp_path)
    padded, ours = (one.collate(FILLED) for one in (alone, shared))
    assert ours.branches_BL is not None
    assert float((states(model, padded) - states(model, ours)).abs().max()) <= 1e-5
    blind = ours.to(CPU)
    object.__setattr__(blind, "branches_BL", blind.branches_BL.clamp(max=0))
    assert float((states(model, padded) - states(model, blind)).abs().max()) > 1e-2


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_packed_sequences_do_not_see_one_another(
    tmp_path: Path, tiny_student: Path, attention: str, one_thread: None
) -> None:
    model = load_model(tiny_student, "float32", CPU, {"attn_implementation": attention})
    chosen = FILLED[:4]
    padded = samples_in(tmp_path / "padded").collate(chosen)
    packed = samples_in(tmp_path / "packed", layout="packed").collate(chosen)

    assert len(tokens_of(chosen)) == packed.num_tokens
    assert torch.equal(padded.sequences_T, packed.sequences_T)
    assert float((states(model, padded) - states(model, packed)).abs().max()) <= 1e-5
    blind = packed.to(CPU)
    object.__setattr__(blind, "position_ids_BL", None)
    assert float((states(model, padded) - states(model, blind)).abs().max()) > 1e-2
