"""Reading a cache from any program: samples by index, in order, by threads and by workers."""

import pickle
import re
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

import opdcache
from opdcache.errors import ChecksumMismatch, InputsMissing, StoreError
from opdcache.runfolder import RunFolder
from opdcache.schemas.rounds import RolloutRound
from opdcache.store import codec
from opdcache.store.cache import Cache
from opdcache.store.scores import Scores, TopK
from opdcache.torch_data import StreamedSamples, TorchSamples, as_tensors, collate

from .conftest import TINY_VOCAB
from .handmade import STEP, TEACHER, Row, commit_rollouts, commit_scores, rounds

Ids = tuple[int, ...]
K = 3
LENGTHS = ((4, 0, 2), (1,), (3, 5))


def row(seed: int, num_tokens: int) -> Row:
    rng = np.random.default_rng(seed)
    return Row(
        prompt=rng.integers(TINY_VOCAB, size=2 + seed % 3).tolist(),
        completion=rng.integers(TINY_VOCAB, size=num_tokens).tolist(),
        sampling_T=rng.uniform(-3, 0, num_tokens).astype(np.float32),
        recorded_ids_TS=rng.integers(TINY_VOCAB, size=(num_tokens, 2)).astype(np.int32),
    )


def some_scores(lengths: tuple[int, ...], seed: int) -> Scores:
    """Log-probs of the codec's grid, so that they come back as they are."""
    rng = np.random.default_rng(seed)
    num_tokens = sum(lengths)
    levels = np.sort(rng.integers(1, 2000, (num_tokens, K)), axis=1).astype(np.uint16)
    ids = np.stack([rng.permutation(TINY_VOCAB)[:K] for _ in range(num_tokens)])
    return Scores(
        token_offsets=np.concatenate([[0], np.cumsum(lengths)]),
        entropy=rng.integers(0, 9, num_tokens).astype(np.float32),
        topk=TopK(
            ids=ids.astype(np.int32),
            logprobs=codec.decode_logprobs(levels, STEP),
            num_kept=rng.integers(1, K + 1, num_tokens).astype(np.uint16),
            tail_logprobs=-rng.integers(1, 9, num_tokens).astype(np.float32),
        ),
    )


ROWS = [[row(10 * s + i, n) for i, n in enumerate(lengths)] for s, lengths in enumerate(LENGTHS)]
SCORES = [some_scores(lengths, seed) for seed, lengths in enumerate(LENGTHS)]
EXPECTED = [
    (r, scores.rows(i, i + 1))
    for rows, scores in zip(ROWS, SCORES, strict=True)
    for i, r in enumerate(rows)
]


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run of two rounds, two shards and one, in ``cache`` beside it."""
    cache, folder = Cache(str(tmp_path / "cache")), RunFolder(tmp_path / "run")
    shards = [commit_rollouts(cache, r, name=f"shard-{i}") for i, r in enumerate(ROWS)]
    served = [
        [commit_scores(cache, shard, s, ["entropy", "topk"])]
        for shard, s in zip(shards, SCORES, strict=True)
    ]
    for index, part in enumerate((slice(0, 2), slice(2, 3))):
        for file in rounds(shards[part], served[part], index):
            folder.write(file)
    return folder.path


def opened(run: Path, **asked: object) -> opdcache.Samples:
    return opdcache.open_cache(run.parent / "cache").of_run(run, **asked)  # type: ignore[arg-type]


def assert_is(sample: opdcache.Sample, expected: tuple[Row, Scores]) -> None:
    made, scores = expected
    assert sample.prompt_token_ids.tolist() == made.prompt
    assert sample.completion_token_ids.tolist() == made.completion
    assert np.array_equal(sample.sampling_logprobs, made.sampling_T)
    assert sample.student_topk_ids is not None
    assert sample.student_topk_ids.tolist() == made.recorded_ids_TS.tolist()
    assert sample.scores.entropy is not None
    assert np.array_equal(sample.scores.entropy, scores.entropy)
    ours, theirs = sample.scores.topk, scores.topk
    assert ours is not None
    assert theirs is not None
    assert ours.kept.tolist() == theirs.kept.tolist()
    assert np.array_equal(ours.ids[ours.kept], theirs.ids[theirs.kept])
    assert np.array_equal(ours.logprobs[ours.kept], theirs.logprobs[theirs.kept])
    assert np.array_equal(ours.tail_logprobs, theirs.tail_logprobs)


def test_every_sample_is_found_by_its_index_and_in_order(run: Path) -> None:
    samples = opened(run)
    assert len(samples) == len(EXPECTED)
    for i, expected in enumerate(EXPECTED):
        assert_is(samples[i], expected)
        assert_is(samples[i - len(EXPECTED)], expected)
    for sample, expected in zip(samples, EXPECTED, strict=True):
        assert_is(sample, expected)
    assert [s.rollout_id for s in samples[1:3]] == [s.rollout_id for s in list(samples)[1:3]]
    with pytest.raises(IndexError):
        samples[len(EXPECTED)]


def test_one_round_and_some_columns_can_be_asked_for(run: Path) -> None:
    last = opened(run, rounds=[1], columns=["entropy"])
    assert len(last) == len(ROWS[2])
    assert last[0].scores.topk is None
    assert last[0].scores.entropy is not None


def test_columns_that_the_run_does_not_store_are_refused(run: Path) -> None:
    with pytest.raises(InputsMissing, match="stores none of the columns sampled"):
        opened(run, columns=iter(["sampled"]))
    every = opened(run, columns=iter(["topk"]))
    assert all(sample.scores.topk is not None for sample in every)


def test_of_several_sets_of_one_teacher_the_widest_is_read(run: Path) -> None:
    cache = Cache(str(run.parent / "cache"))
    shard = RunFolder(run).need(RolloutRound, 0).shards[0]
    narrow = SCORES[0]
    assert narrow.topk is not None
    commit_scores(cache, shard, Scores(narrow.token_offsets, topk=narrow.topk.cut(1)), ["topk"])
    for sample in opdcache.open_cache(run.parent / "cache").scored_by(TEACHER):
        assert sample.scores.topk is not None
        assert sample.scores.topk.ids.shape[1] == K


def test_what_a_teacher_scored_is_found_without_a_run(run: Path) -> None:
    cache = opdcache.open_cache(str(run.parent / "cache"))
    found = {tuple(sample.prompt_token_ids) for sample in cache.scored_by(TEACHER)}
    assert found == {tuple(made.prompt) for made, _ in EXPECTED}
    with pytest.raises(InputsMissing, match="no shard is scored"):
        cache.scored_by("f" * 64)
    with pytest.raises(InputsMissing, match="no shard is scored"):
        cache.scored_by(TEACHER, columns=["sampled"])


def test_a_run_without_scores_says_so(tmp_path: Path) -> None:
    with pytest.raises(InputsMissing, match="no scored round"):
        opdcache.open_cache(tmp_path / "cache").of_run(tmp_path / "run")


def test_a_changed_byte_is_met_when_its_shard_is_read(run: Path) -> None:
    file = next((run.parent / "cache" / "data").rglob("topk_steps/c/0/0"))
    data = bytearray(file.read_bytes())
    data[3] ^= 1
    file.write_bytes(data)
    with pytest.raises(ChecksumMismatch, match="topk_steps"):
        list(opened(run))


def test_no_more_shards_are_held_than_is_said(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("opdcache.data.SHARDS_IN_MEMORY", 1)
    samples = opened(run)
    for i in (0, 3, 5, 0):
        assert_is(samples[i], EXPECTED[i])
    assert len(samples._open) == 1


def test_threads_read_what_one_reader_reads(run: Path) -> None:
    samples = opened(run)
    order = [int(i) for i in np.random.default_rng(0).integers(len(samples), size=200)]
    with ThreadPoolExecutor(8) as pool:
        for i, sample in zip(order, pool.map(samples.__getitem__, order), strict=True):
            assert_is(sample, EXPECTED[i])


def test_samples_survive_pickling(run: Path) -> None:
    again = pickle.loads(pickle.dumps(opened(run)))
    assert_is(again[3], EXPECTED[3])


def test_a_batch_points_every_token_at_the_logits_that_predict_it(run: Path) -> None:
    chosen = [0, 5, 2]
    batch = collate([TorchSamples(opened(run))[i] for i in chosen])
    assert batch["attention_mask"].sum(1).tolist() == [
        len(EXPECTED[i][0].prompt) + len(EXPECTED[i][0].completion) for i in chosen
    ]
    t = 0
    for place, i in enumerate(chosen):
        made, scores = EXPECTED[i]
        assert scores.topk is not None
        for j, token in enumerate(made.completion):
            assert batch["rows"][t] == place
            assert batch["columns"][t] == len(made.prompt) + j - 1
            assert batch["input_ids"][place, len(made.prompt) + j] == token
            assert batch["sampled_ids"][t] == token
            kept = int(batch["topk_kept"][t].sum())
            assert batch["topk_ids"][t, :kept].tolist() == scores.topk.ids[j, :kept].tolist()
            t += 1
    assert t == len(batch["rows"])


def test_samples_of_other_columns_are_not_put_into_one_batch(run: Path) -> None:
    whole, part = opened(run)[0], opened(run, columns=["entropy"])[0]
    with pytest.raises(InputsMissing, match="different score columns"):
        collate([as_tensors(whole), as_tensors(part)])


def streamed(samples: opdcache.Samples, epoch: int, ranks: int = 1, workers: int = 0) -> list[Ids]:
    seen = []
    for rank in range(ranks):
        part = StreamedSamples(samples, seed=5, rank=rank, world_size=ranks)
        part.set_epoch(epoch)
        context = "spawn" if workers else None
        loader = DataLoader(
            part, batch_size=None, num_workers=workers, multiprocessing_context=context
        )
        seen += [tuple(tensors["input_ids"].tolist()) for tensors in loader]
    return seen


@pytest.mark.parametrize(("ranks", "workers"), [(1, 0), (2, 0), (1, 2)])
def test_ranks_and_workers_share_out_every_sample_once(run: Path, ranks: int, workers: int) -> None:
    seen = streamed(opened(run), 0, ranks, workers)
    assert sorted(seen) == sorted((*r.prompt, *r.completion) for r, _ in EXPECTED)


def test_an_epoch_s_order_follows_from_its_seed(run: Path) -> None:
    orders = [streamed(opened(run), epoch) for epoch in (0, 0, 1, 2, 3)]
    assert orders[0] == orders[1]
    assert len({tuple(order) for order in orders}) > 1


def test_a_forked_worker_is_told_to_start_afresh_and_does_not_hang(run: Path) -> None:
    samples = opened(run)
    assert samples[0]
    loader = DataLoader(
        TorchSamples(samples), num_workers=1, batch_size=None, multiprocessing_context="fork"
    )
    with pytest.raises(StoreError, match="multiprocessing_context='spawn'"):
        list(loader)


@pytest.mark.engine
def test_the_documented_examples_run(
    run: Path, tiny_student: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    document = Path(__file__).parents[1] / "docs" / "data.md"
    reading = document.read_text().partition("\n## Exporting flat tables\n")[0]
    blocks = re.findall(r"```python\n(.*?)```", reading, flags=re.DOTALL)
    assert len(blocks) == 3
    (run.parent / "student").symlink_to(tiny_student)
    monkeypatch.chdir(run.parent)
    names: dict[str, object] = {"__name__": "document"}
    for block in blocks:
        exec(block, names)  # the examples share their names, as a reader's session would
    assert names["trainer"].state.global_step == 2  # type: ignore[attr-defined]


def test_a_mask_is_read_with_its_sample_and_joined_in_a_batch(tmp_path: Path) -> None:
    cache, folder = Cache(str(tmp_path / "cache")), RunFolder(tmp_path / "run")
    mask = np.array([True, False, True, False])
    rows = [replace(ROWS[0][0], loss_mask=mask), *ROWS[0][1:]]
    shard = commit_rollouts(cache, rows)
    for file in rounds([shard], [[commit_scores(cache, shard, SCORES[0], ["entropy", "topk"])]]):
        folder.write(file)
    samples = opened(folder.path)
    assert [samples[i].loss_mask.tolist() for i in range(3)] == [mask.tolist(), [], [True, True]]
    joined = collate([as_tensors(samples[i]) for i in (2, 0)])["loss_mask"]
    assert joined.dtype == torch.bool
    assert joined.tolist() == [True, True, *mask.tolist()]
