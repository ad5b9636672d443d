"""Updates cut into micro-batches for any number of ranks, read ahead, padded or packed."""

import itertools
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from opdcache.models import load_model
from opdcache.train.loading import Loading, Share, ahead
from opdcache.train.microbatch import MicroBatch
from opdcache.train.samples import RoundSamples

from .test_alignment import FILLED, FLAT, samples_in, tokens_of

BATCH = 5
CPU = torch.device("cpu")


def loading(
    samples: RoundSamples, rank: int = 0, num_ranks: int = 1, max_tokens: int = 30
) -> Loading:
    order = samples.order(0, 0, 2)
    return Loading(
        samples, order, batch_samples=BATCH, max_tokens=max_tokens, rank=rank, num_ranks=num_ranks
    )


def shares(made: Loading, first_update: int = 0) -> list[Share]:
    return [share for share, waited_s in made.shares(first_update) if waited_s >= 0]


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
    (share,) = shares(Loading(samples, empty, batch_samples=BATCH, max_tokens=30))
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
    samples = samples_in(tmp_path, packed=True)
    made = list(samples.micro_batches(FILLED, max_tokens))
    assert sorted(i for micro in made for i in micro) == FILLED
    for micro in made:
        batch = samples.collate(micro)
        lengths = [samples.collate([i]).input_ids_BL.shape[1] for i in micro]
        assert batch.input_ids_BL.shape == (1, sum(lengths))
        assert len(micro) == 1 or sum(lengths) <= max_tokens
        assert batch.position_ids_BL is not None
        assert batch.position_ids_BL[0].tolist() == [t for n in lengths for t in range(n)]


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_packed_sequences_do_not_see_one_another(
    tmp_path: Path, tiny_student: Path, attention: str, one_thread: None
) -> None:
    model = load_model(tiny_student, "float32", CPU, {"attn_implementation": attention})
    chosen = FILLED[:4]
    padded = samples_in(tmp_path / "padded").collate(chosen)
    packed = samples_in(tmp_path / "packed", packed=True).collate(chosen)

    def states(batch: MicroBatch) -> torch.Tensor:
        with torch.no_grad():
            made = model.base_model(  # type: ignore[operator]
                input_ids=batch.input_ids_BL % 258,
                position_ids=batch.position_ids_BL,
                use_cache=False,
            )
        found: torch.Tensor = made.last_hidden_state[batch.rows_T, batch.columns_T]
        return found

    assert len(tokens_of(chosen)) == packed.num_tokens
    assert torch.equal(padded.sequences_T, packed.sequences_T)
    assert float((states(padded) - states(packed)).abs().max()) <= 1e-5
    blind = packed.to(CPU)
    object.__setattr__(blind, "position_ids_BL", None)
    assert float((states(padded) - states(blind)).abs().max()) > 1e-2
