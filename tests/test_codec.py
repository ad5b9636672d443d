"""Score codec: error bounds, ragged entries, cuts, and Zarr groups that plain zarr reads."""

import math
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import zarr
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from opdcache.errors import InvalidShard
from opdcache.schemas.columns import SCORE_ARRAYS, SCORE_COLUMNS, Compression, ScoreColumn
from opdcache.store import codec
from opdcache.store.arrays import open_arrays
from opdcache.store.encoding import CHUNK_TOKENS, encode_scores
from opdcache.store.files import in_memory
from opdcache.store.scores import Draws, Scores, StudentTopK, TopK, open_scores

STEP = 1 / 256
BIG_ID = 2**17 + 12_345
QUICK = settings(max_examples=40, deadline=None)
ALL = frozenset[ScoreColumn]({*SCORE_COLUMNS, "draws"})

steps = st.sampled_from([1 / 1024, 1 / 256, 1 / 100, 1 / 16, 0.1])
values = st.one_of(
    st.just(-math.inf), st.just(0.0), st.just(-0.0), st.floats(-90, 0), st.floats(-5000, 0)
)


@st.composite
def topks(draw: st.DrawFn) -> TopK:
    """Ragged descending entries with ties, -inf, large ids; noise past ``num_kept``."""
    num_tokens, width = draw(st.integers(0, 6)), draw(st.integers(1, 9))
    ids = np.full((num_tokens, width), -1, np.int32)
    logprobs = np.full((num_tokens, width), np.nan, np.float32)
    num_kept = np.zeros(num_tokens, np.uint16)
    for t in range(num_tokens):
        kept = draw(st.integers(0, width))
        row = draw(st.lists(st.integers(0, BIG_ID), min_size=kept, max_size=kept, unique=True))
        ids[t, :kept] = row
        drawn = draw(st.lists(values, min_size=kept, max_size=kept))
        logprobs[t, :kept] = sorted(drawn, reverse=True)
        num_kept[t] = kept
    tail = np.asarray(
        draw(st.lists(values, min_size=num_tokens, max_size=num_tokens)), np.float32
    ).reshape(num_tokens)
    return TopK(ids, logprobs, num_kept, tail)


def nearest(value: float, step: float) -> tuple[float, float]:
    """What is allowed to come back for a stored log-prob: a closed interval.

    Half a step in nats, or as a share of the value where that is more. Below the floor, the floor;
    half a step of a share is half a step of its logarithm, which is more by its square.
    """
    floor = codec.clip_floor(step)
    if value <= floor:
        return floor * (1 + 1e-6), floor * (1 - 1e-6)
    slack = (math.expm1(step / 2) + 1e-6) * max(1, abs(value))
    return value - slack, value + slack


def assert_within_bound(got: float, value: float, step: float) -> None:
    low, high = nearest(value, step)
    assert low <= got <= high, (got, value, step)


def whole_distribution(logits: NDArray[np.float64]) -> tuple[NDArray[np.int64], list[float]]:
    """Ids by descending probability and their fp64 log-probs, one row."""
    top = float(logits.max())
    total = math.fsum(math.exp(z - top) for z in logits)
    order = np.argsort(-logits, kind="stable")
    return order, [float(logits[i]) - top - math.log(total) for i in order]


def some_topk(num_tokens: int, width: int, vocab: int, seed: int = 0) -> TopK:
    """Exact top-k of random distributions, its tail summed in fp64."""
    rng = np.random.default_rng(seed)
    ids = np.zeros((num_tokens, width), np.int32)
    logprobs = np.zeros((num_tokens, width), np.float32)
    tail = np.zeros(num_tokens, np.float32)
    for t in range(num_tokens):
        order, ranked = whole_distribution(rng.normal(0, 3, vocab))
        ids[t], logprobs[t] = order[:width], ranked[:width]
        rest = math.fsum(math.exp(v) for v in ranked[width:])
        tail[t] = math.log(rest) if rest else -math.inf
    return TopK(ids, logprobs, np.full(num_tokens, width, np.uint16), tail)


def noise(num_tokens: int, width: int, vocab: int) -> TopK:
    """Entries that descend and mean nothing."""
    rng = np.random.default_rng(0)
    logprobs = np.sort(rng.uniform(-20, 0, (num_tokens, width)), axis=1)[:, ::-1]
    return TopK(
        ids=rng.integers(vocab, size=(num_tokens, width)).astype(np.int32),
        logprobs=logprobs.astype(np.float32),
        num_kept=rng.integers(1, width + 1, num_tokens).astype(np.uint16),
        tail_logprobs=rng.uniform(-5, 0, num_tokens).astype(np.float32),
    )


def offsets(*lengths: int) -> NDArray[np.int64]:
    return np.asarray([sum(lengths[:i]) for i in range(len(lengths) + 1)], np.int64)


def round_trip(scores: Scores, step: float = STEP) -> Scores:
    return open_scores(in_memory(encode_scores(scores, step=step, attributes={}))).read(ALL)


@QUICK
@given(st.lists(values, max_size=30), steps)
def test_a_logprob_comes_back_within_its_bound_or_at_the_clip_floor(
    logprobs: list[float], step: float
) -> None:
    encoded = codec.encode_logprobs(np.asarray(logprobs, np.float32), step)

    decoded = codec.decode_logprobs(encoded, step)

    assert decoded.shape == (len(logprobs),)
    for got, value in zip(decoded, logprobs, strict=True):
        assert_within_bound(float(got), value, step)


@QUICK
@given(topks(), steps)
def test_every_kept_entry_comes_back_within_its_bound_at_any_rank(topk: TopK, step: float) -> None:
    drops = codec.encode_descending(topk.logprobs, topk.num_kept, step)

    decoded = codec.decode_descending(drops.T, step).T

    for t, kept in enumerate(topk.num_kept):
        for j in range(int(kept)):
            assert_within_bound(float(decoded[t, j]), float(topk.logprobs[t, j]), step)


def ids_by_frequency(topk: TopK) -> NDArray[np.uint32]:
    return codec.by_frequency(np.bincount(topk.ids[topk.kept]))


@QUICK
@given(topks())
def test_every_kept_id_comes_back_exactly(topk: TopK) -> None:
    rank_ids = ids_by_frequency(topk)
    ranks = codec.encode_ids(topk.ids, topk.num_kept, rank_ids)

    decoded = codec.decode_ids(ranks, rank_ids.astype(np.int32))

    for t, kept in enumerate(topk.num_kept):
        assert decoded[t, :kept].tolist() == topk.ids[t, :kept].tolist()


@QUICK
@given(topks())
def test_the_rank_table_lists_kept_ids_by_falling_count_then_by_id(topk: TopK) -> None:
    rank_ids = ids_by_frequency(topk)

    kept = [int(i) for t, n in enumerate(topk.num_kept) for i in topk.ids[t, :n]]
    assert rank_ids.tolist() == sorted(set(kept), key=lambda i: (-kept.count(i), i))


@QUICK
@given(topks(), steps)
def test_nothing_past_num_kept_reaches_the_stored_arrays(topk: TopK, step: float) -> None:
    drops = codec.encode_descending(topk.logprobs, topk.num_kept, step)
    ranks = codec.encode_ids(topk.ids, topk.num_kept, ids_by_frequency(topk))

    for t, kept in enumerate(topk.num_kept):
        assert not drops[t, kept:].any()
        assert not ranks[t, kept:].any()


@settings(max_examples=15, deadline=None)
@given(topks(), steps)
def test_a_stored_group_gives_back_every_column_within_its_bound(topk: TopK, step: float) -> None:
    num_tokens = len(topk.num_kept)
    recorded = np.where(np.isnan(topk.logprobs), -1.5, topk.logprobs).astype(np.float32)[:, ::-1]
    plain = np.linspace(-30, 0, num_tokens, dtype=np.float32)
    drawn = np.random.default_rng(0).choice([3, 70_000, 9, BIG_ID], (num_tokens, 5))
    scores = Scores(
        token_offsets=offsets(0, num_tokens, 0),
        sampled_logprobs=plain,
        entropy=-plain / 3,
        topk=topk,
        student_topk=StudentTopK(recorded, plain / 2),
        draws=Draws.of(drawn),
    )

    got = round_trip(scores, step)

    assert got.columns == ALL
    assert got.topk is not None
    assert got.student_topk is not None
    assert got.token_offsets.tolist() == [0, 0, num_tokens, num_tokens]
    assert got.topk.num_kept.tolist() == topk.num_kept.tolist()
    for t, kept in enumerate(topk.num_kept):
        assert got.topk.ids[t, :kept].tolist() == topk.ids[t, :kept].tolist()
        for j in range(int(kept)):
            assert_within_bound(float(got.topk.logprobs[t, j]), float(topk.logprobs[t, j]), step)
        for j in range(recorded.shape[1]):
            assert_within_bound(float(got.student_topk.logprobs[t, j]), float(recorded[t, j]), step)
    assert got.draws is not None
    for t in range(num_tokens):
        kept_draws = dict(zip(got.draws.ids[t].tolist(), got.draws.counts[t].tolist(), strict=True))
        assert {i: n for i, n in kept_draws.items() if n} == Counter(drawn[t].tolist())
    half = {"rtol": 2**-11, "atol": 1e-7}  # float16 keeps 11 bits
    np.testing.assert_allclose(got.sampled_logprobs, plain, **half)
    np.testing.assert_allclose(got.entropy, -plain / 3, **half)
    np.testing.assert_allclose(got.topk.tail_logprobs, topk.tail_logprobs, **half)
    np.testing.assert_allclose(got.student_topk.tail_logprobs, plain / 2, **half)


@pytest.mark.parametrize("bad", [math.nan, 0.5, math.inf])
def test_a_logprob_that_is_nan_or_above_zero_is_refused(bad: float) -> None:
    with pytest.raises(InvalidShard, match="NaN or above 0"):
        codec.encode_logprobs(np.asarray([-1.0, bad], np.float32), STEP)


def test_a_nan_among_kept_entries_is_refused() -> None:
    with pytest.raises(InvalidShard, match="NaN"):
        codec.encode_descending(
            np.asarray([[-1.0, math.nan]], np.float32), np.asarray([2], np.uint16), STEP
        )


def test_entries_that_do_not_descend_are_refused_with_their_token() -> None:
    logprobs = np.asarray([[-1, -2, -3], [-1, -3, -2]], np.float32)

    with pytest.raises(InvalidShard, match=r"token 1: .*do not descend"):
        codec.encode_descending(logprobs, np.asarray([3, 3], np.uint16), STEP)


def test_a_rise_past_num_kept_is_no_fault() -> None:
    logprobs = np.asarray([[-0.25, -1, -0.5]], np.float32)

    drops = codec.encode_descending(logprobs, np.asarray([2], np.uint16), 0.25)

    assert drops.tolist() == [[1, 3, 0]]


def test_ties_are_stored_as_no_drop() -> None:
    logprobs = np.full((1, 4), -math.e, np.float32)

    drops = codec.encode_descending(logprobs, np.asarray([4], np.uint16), 0.5)

    assert drops.tolist() == [[4, 0, 0, 0]]


def test_entries_below_the_floor_are_ties_at_the_floor() -> None:
    logprobs = np.asarray([[-1.0, -1e6, -math.inf]], np.float32)

    drops = codec.encode_descending(logprobs, np.asarray([3], np.uint16), STEP)

    floor = codec.clip_floor(STEP)
    assert -10_000 <= floor < -9_900
    assert codec.decode_descending(drops.T, STEP).T.tolist() == [[-1.0, floor, floor]]


def test_levels_below_the_floor_are_refused() -> None:
    with pytest.raises(InvalidShard, match="below the clip floor"):
        codec.decode_descending(np.asarray([[2_000], [1_000]], np.uint16), STEP)
    with pytest.raises(InvalidShard, match="below the clip floor"):
        codec.decode_descending(np.asarray([[10], [2**16 - 6]], np.uint16), STEP)


def test_draws_are_counted_and_the_most_frequent_come_first() -> None:
    draws = Draws.of(np.asarray([[7, 2, 7, 9], [4, 4, 4, 4], [8, 3, 8, 3]]))

    assert draws.ids.tolist() == [[7, 2, 9], [4, 0, 0], [3, 8, 0]]
    assert draws.counts.tolist() == [[2, 1, 1], [4, 0, 0], [2, 2, 0]]


def test_draws_of_no_tokens_are_empty() -> None:
    draws = Draws.of(np.zeros((0, 4), np.int64))

    got = round_trip(Scores(offsets(0), draws=draws)).draws

    assert got is not None
    assert got.ids.shape == (0, 0)


def test_a_rank_outside_the_table_is_refused() -> None:
    with pytest.raises(InvalidShard, match="not in rank_ids"):
        codec.decode_ids(np.asarray([[0, 2]], np.uint32), np.asarray([7, 8], np.int32))


def test_roundings_do_not_add_up_over_512_entries() -> None:
    topk = some_topk(3, 512, vocab=2000)

    drops = codec.encode_descending(topk.logprobs, topk.num_kept, STEP)

    off = np.abs(codec.decode_descending(drops.T, STEP).T - topk.logprobs)
    worst = (off / np.maximum(1, -topk.logprobs)).max()
    assert STEP / 4 < worst <= STEP / 2 * (1 + STEP)


def test_a_shard_that_keeps_the_whole_vocabulary_round_trips() -> None:
    topk = some_topk(4, 40, vocab=40)

    got = round_trip(Scores(offsets(4), topk=topk)).topk

    assert got is not None
    assert got.ids.tolist() == topk.ids.tolist()
    assert np.isneginf(got.tail_logprobs).all()


def test_ids_beyond_17_bits_keep_their_value() -> None:
    ids = np.asarray([[BIG_ID, 2**18 + 1, 151_935]], np.int32)
    logprobs = np.asarray([[-0.5, -1.5, -3.0]], np.float32)
    topk = TopK(ids, logprobs, np.asarray([3], np.uint16), np.asarray([-4.0], np.float32))

    got = round_trip(Scores(offsets(1), topk=topk)).topk

    assert got is not None
    assert got.ids.tolist() == ids.tolist()


def test_a_shard_of_empty_completions_round_trips() -> None:
    empty = TopK(
        np.zeros((0, 4), np.int32),
        np.zeros((0, 4), np.float32),
        np.zeros(0, np.uint16),
        np.zeros(0, np.float32),
    )
    student = StudentTopK(np.zeros((0, 2), np.float32), np.zeros(0, np.float32))

    got = round_trip(Scores(offsets(0, 0), topk=empty, student_topk=student))

    assert got.token_offsets.tolist() == [0, 0, 0]
    assert got.topk is not None
    assert got.topk.ids.shape == (0, 4)
    assert got.student_topk is not None
    assert got.student_topk.logprobs.shape == (0, 2)


def test_a_single_token_round_trips() -> None:
    got = round_trip(Scores(offsets(1), sampled_logprobs=np.asarray([-0.25], np.float32)))

    assert got.sampled_logprobs is not None
    assert got.sampled_logprobs.tolist() == [-0.25]
    assert got.columns == {"sampled"}


def test_tokens_of_several_chunks_keep_their_places() -> None:
    num_tokens = 2 * CHUNK_TOKENS + 7_000  # three chunks
    sampled = -(np.arange(num_tokens) % 2000).astype(np.float32)

    got = round_trip(Scores(offsets(num_tokens), sampled_logprobs=sampled))

    np.testing.assert_array_equal(got.sampled_logprobs, sampled)


def test_consecutive_completions_are_read_alone_wherever_their_chunks_are() -> None:
    lengths = [5, 0, CHUNK_TOKENS, 3, 2 * CHUNK_TOKENS, 1]
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    scores = Scores(token_offsets=offsets, topk=noise(int(offsets[-1]), 3, vocab=50))
    objects = encode_scores(scores, step=STEP, attributes={})
    opened = open_scores(in_memory(objects))
    whole = opened.read(ALL).topk
    assert whole is not None
    for first, last in [(0, 1), (1, 2), (2, 4), (3, 5), (5, 6), (0, 6)]:
        part = opened.read(ALL, slice(first, last))
        tokens = slice(int(offsets[first]), int(offsets[last]))
        assert part.token_offsets.tolist() == (offsets[first : last + 1] - offsets[first]).tolist()
        assert part.topk is not None
        for name in ("ids", "logprobs", "num_kept", "tail_logprobs"):
            expected = getattr(whole, name)[tokens]
            assert np.array_equal(getattr(part.topk, name), expected), (name, first)


def test_a_shard_of_zeros_alone_round_trips_though_zarr_stores_no_chunk_of_them() -> None:
    num_tokens = 4
    topk = TopK(
        ids=np.full((num_tokens, 1), 9, np.int32),
        logprobs=np.zeros((num_tokens, 1), np.float32),
        num_kept=np.ones(num_tokens, np.uint16),
        tail_logprobs=np.zeros(num_tokens, np.float32),
    )
    scores = Scores(token_offsets=np.asarray([0, num_tokens]), topk=topk)
    objects = encode_scores(scores, step=STEP, attributes={})
    assert not [path for path in objects if path.startswith("topk_ranks/c")]
    decoded = open_scores(in_memory(objects)).read(ALL).topk
    assert decoded is not None
    for name in TopK.__slots__:
        assert np.array_equal(getattr(decoded, name), getattr(topk, name)), name


@pytest.mark.parametrize("compression", ["blosc", "pcodec"])
@pytest.mark.filterwarnings("ignore:Numcodecs codecs are not in the Zarr version 3 spec")
def test_the_reader_gives_what_zarr_gives(tmp_path: Path, compression: Compression) -> None:
    offsets = np.asarray([0, 7, 2 * CHUNK_TOKENS + 7])
    scores = Scores(
        token_offsets=offsets,
        entropy=np.linspace(0, 9, int(offsets[-1]), dtype=np.float32),
        topk=noise(int(offsets[-1]), 5, vocab=200_000),
    )
    encoded = encode_scores(scores, step=STEP, attributes={}, compression=compression)
    for path, data in encoded.items():
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_bytes(data)
    objects = {
        str(f.relative_to(tmp_path)): f.read_bytes() for f in tmp_path.rglob("*") if f.is_file()
    }
    _, arrays = open_arrays(in_memory(objects))
    group = zarr.open_group(tmp_path, mode="r")
    assert set(arrays) == set(group.array_keys())
    for name, array in group.arrays():
        ours = arrays[name].read(0, array.shape[-1])
        assert ours.dtype == array.dtype
        assert np.array_equal(ours, array[:])


def test_objects_that_are_no_score_shard_are_refused() -> None:
    objects = encode_scores(Scores(token_offsets=np.asarray([0])), step=STEP, attributes={})
    for path in ("zarr.json", "token_offsets/zarr.json"):
        with pytest.raises(InvalidShard):
            open_scores(in_memory({n: data for n, data in objects.items() if n != path}))
        with pytest.raises(InvalidShard):
            open_scores(in_memory(objects | {path: b"{}"}))


def test_only_the_asked_for_columns_are_decoded() -> None:
    plain = np.asarray([-1.0], np.float32)
    objects = encode_scores(
        Scores(offsets(1), sampled_logprobs=plain, entropy=-plain), step=STEP, attributes={}
    )

    got = open_scores(in_memory(objects)).read(frozenset[ScoreColumn]({"entropy", "topk"}))

    assert got.columns == {"entropy"}


def test_a_cut_to_k_moves_the_mass_of_the_rest_into_the_tail() -> None:
    topk = some_topk(5, 20, vocab=300, seed=3)
    rng = np.random.default_rng(3)

    cut = topk.cut(6)

    assert cut.ids.tolist() == topk.ids[:, :6].tolist()
    assert cut.num_kept.tolist() == [6] * 5
    for t in range(5):
        _, ranked = whole_distribution(rng.normal(0, 3, 300))
        rest = math.fsum(math.exp(v) for v in ranked[6:])
        assert math.isclose(float(cut.tail_logprobs[t]), math.log(rest), abs_tol=1e-5)


@QUICK
@given(st.integers(0, 2**32 - 1), st.integers(1, 12), st.floats(0.05, 0.999))
def test_a_cut_to_a_mass_keeps_the_fewest_entries_that_hold_it(
    seed: int, k: int, mass: float
) -> None:
    topk = some_topk(1, 10, vocab=30, seed=seed)
    _, ranked = whole_distribution(np.random.default_rng(seed).normal(0, 3, 30))
    held = [math.fsum(math.exp(v) for v in ranked[:n]) for n in range(11)]
    if min(abs(h - mass) for h in held) < 1e-5:
        return  # the threshold itself, where fp32 may fall on either side
    fewest = next((n for n in range(1, 11) if held[n] >= mass), 10)
    expected = min(fewest, k)

    cut = topk.cut(k, mass)

    assert cut.num_kept.tolist() == [expected]
    assert cut.ids.shape == (1, min(k, 10))
    assert math.isclose(
        float(np.exp(cut.tail_logprobs[0])), 1 - held[expected], rel_tol=1e-4, abs_tol=1e-6
    )


def test_a_cut_joins_only_entries_that_were_kept() -> None:
    topk = TopK(
        np.asarray([[5, 6, 7]], np.int32),
        np.log(np.asarray([[0.5, 0.25, 0.2]], np.float32)),
        np.asarray([2], np.uint16),  # the third is noise
        np.log(np.asarray([0.25], np.float32)),
    )

    cut = topk.cut(1)

    assert cut.num_kept.tolist() == [1]
    assert math.isclose(float(cut.tail_logprobs[0]), math.log(0.5), abs_tol=1e-6)


def test_a_cut_that_takes_nothing_away_changes_nothing() -> None:
    topk = some_topk(3, 8, vocab=50)

    cut = topk.cut(64)

    assert cut.ids.tolist() == topk.ids.tolist()
    assert cut.tail_logprobs.tolist() == topk.tail_logprobs.tolist()


def test_a_cut_of_a_tailless_token_gives_it_a_tail() -> None:
    topk = some_topk(1, 6, vocab=6)
    _, ranked = whole_distribution(np.random.default_rng(0).normal(0, 3, 6))

    cut = topk.cut(4)

    expected = math.log(math.exp(ranked[4]) + math.exp(ranked[5]))
    assert math.isclose(float(cut.tail_logprobs[0]), expected, abs_tol=1e-5)


def test_a_cut_of_the_recorded_ids_moves_their_mass_into_the_tail() -> None:
    rng = np.random.default_rng(8)
    masses = rng.dirichlet(np.ones(9), size=4)
    student = StudentTopK(
        np.log(masses[:, :8]).astype(np.float32), np.log(masses[:, 8]).astype(np.float32)
    )

    cut = student.cut(3)

    np.testing.assert_allclose(np.exp(cut.logprobs), masses[:, :3], rtol=1e-5)
    np.testing.assert_allclose(np.exp(cut.tail_logprobs), 1 - masses[:, :3].sum(1), rtol=1e-5)


def stored_group(folder: Path) -> tuple[TopK, StudentTopK, zarr.Group]:
    """A ragged shard's objects as files, opened by zarr alone."""
    topk = some_topk(7, 12, vocab=400, seed=5)
    topk.num_kept[:] = [12, 0, 1, 7, 12, 3, 11]
    rng = np.random.default_rng(6)
    student = StudentTopK(
        -rng.exponential(5, (7, 3)).astype(np.float32), -np.ones(7, dtype=np.float32)
    )
    scores = Scores(
        offsets(3, 0, 4),
        sampled_logprobs=-np.arange(7, dtype=np.float32),
        entropy=np.arange(7, dtype=np.float32),
        topk=topk,
        student_topk=student,
        draws=Draws.of(np.tile([[9, 2, 9]], (7, 1))),
    )
    attributes = {"format": "opdcache scores"}
    for path, data in encode_scores(scores, step=STEP, attributes=attributes).items():
        file = folder / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(data)
    return topk, student, zarr.open_group(folder, mode="r")


def test_plain_zarr_reads_a_stored_group_with_the_documented_lines(tmp_path: Path) -> None:
    topk, student, group = stored_group(tmp_path)

    def unscaled(u: NDArray[np.float64]) -> NDArray[np.float64]:
        return -np.where(u < 1, u, np.exp(u - 1))

    step = group.attrs["step"]
    ids = group["rank_ids"][:][group["topk_ranks"][:]].T
    logprobs = unscaled(step * np.cumsum(group["topk_steps"][:], axis=0)).T
    recorded = unscaled(step * group["student_topk_steps"][:]).T

    kept = np.arange(12) < group["num_kept"][:][:, None]
    assert kept.sum() == topk.num_kept.sum() == 46
    np.testing.assert_array_equal(ids[kept], topk.ids[kept])
    for got, exact in ((logprobs[kept], topk.logprobs[kept]), (recorded, student.logprobs)):
        assert (np.abs(got - exact) <= STEP / 2 * (1 + STEP) * np.maximum(1, -exact)).all()
    assert group["draw_ids"][:].tolist() == [[9] * 7, [2] * 7]
    assert group["draw_counts"][:].tolist() == [[2] * 7, [1] * 7]
    assert group["token_offsets"][:].tolist() == [0, 3, 3, 7]
    assert group["sampled_logprobs"][:].tolist() == [0, -1, -2, -3, -4, -5, -6]
    assert group["entropy"][:].tolist() == [0, 1, 2, 3, 4, 5, 6]


def test_stored_arrays_say_their_unit_meaning_and_dimensions(tmp_path: Path) -> None:
    _, _, group = stored_group(tmp_path)

    arrays = dict(group.arrays())

    assert set(arrays) == {spec.name for spec in SCORE_ARRAYS}
    for name, array in arrays.items():
        assert array.attrs["unit"], name
        assert array.attrs["description"], name
        assert len(array.metadata.dimension_names) == array.ndim, name
    assert arrays["topk_steps"].attrs["unit"] == "step"
    assert arrays["sampled_logprobs"].attrs["unit"] == "nats"


def test_a_stored_group_says_its_step_floor_and_attributes(tmp_path: Path) -> None:
    _, _, group = stored_group(tmp_path)

    assert group.attrs["format"] == "opdcache scores"
    assert group.attrs["step"] == STEP
    assert group.attrs["clip_floor"] == codec.clip_floor(STEP)


def test_encoding_the_same_scores_twice_gives_the_same_bytes() -> None:
    scores = Scores(offsets(5), topk=some_topk(5, 8, vocab=64))

    first, second = (encode_scores(scores, step=STEP, attributes={"a": 1}) for _ in range(2))

    assert first == second
