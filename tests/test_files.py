"""Large objects are read in part: the blocks that are needed, each checked."""

import io
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import opdcache
from opdcache.errors import ChecksumMismatch
from opdcache.runfolder import RunFolder
from opdcache.schemas.manifests import BLOCK_BYTES
from opdcache.store.cache import Cache
from opdcache.store.encoding import CHUNK_TOKENS
from opdcache.store.files import CheckedFile, InMemory, Seekable, object_entry
from opdcache.store.objects import ObjectStore
from opdcache.store.scores import Scores, TopK

from .handmade import Row, commit_rollouts, commit_scores, rounds

SIZE = 3 * BLOCK_BYTES + 17
DATA = np.random.default_rng(0).bytes(SIZE)


class Counted:
    """An object store whose transferred bytes are counted."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.num_bytes = self.num_requests = 0
        for name in ("get", "get_range"):
            monkeypatch.setattr(ObjectStore, name, self._counting(getattr(ObjectStore, name)))

    def _counting(self, read: object) -> object:
        def counted(*args: object) -> bytes:
            data: bytes = read(*args)  # type: ignore[operator]
            self.num_bytes += len(data)
            self.num_requests += 1
            return data

        return counted


def stored(objects: ObjectStore, data: bytes = DATA) -> CheckedFile:
    """The file of an object that was committed with other contents than are stored, or the same."""
    objects.put("data/file", data)
    return CheckedFile(objects, "data/file", object_entry("file", DATA))


def flipped(place: int) -> bytes:
    return DATA[:place] + bytes([DATA[place] ^ 1]) + DATA[place + 1 :]


@pytest.fixture
def objects(store_url: str) -> ObjectStore:
    return ObjectStore(store_url)


@pytest.mark.parametrize(
    ("start", "stop"),
    [
        (0, 1),
        (5, BLOCK_BYTES),
        (BLOCK_BYTES - 1, BLOCK_BYTES + 1),
        (2 * BLOCK_BYTES, SIZE),
        (SIZE - 1, SIZE),
        (SIZE, SIZE),
        (0, SIZE),
    ],
)
def test_any_part_of_a_file_is_what_was_stored(objects: ObjectStore, start: int, stop: int) -> None:
    file = stored(objects)
    for _ in range(2):
        assert file.read(start, stop) == DATA[start:stop]


def test_a_part_costs_its_blocks_and_costs_them_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file, counted = stored(ObjectStore(str(tmp_path))), Counted(monkeypatch)
    for _ in range(3):
        assert file.read(BLOCK_BYTES + 3, BLOCK_BYTES + 9) == DATA[BLOCK_BYTES + 3 :][:6]
        assert (counted.num_requests, counted.num_bytes) == (1, BLOCK_BYTES)
    file.read(0, SIZE)
    assert counted.num_bytes <= SIZE + BLOCK_BYTES


@pytest.mark.parametrize("place", [0, BLOCK_BYTES, 2 * BLOCK_BYTES + 5, SIZE - 1])
def test_a_changed_byte_is_met_by_whoever_reads_its_block_and_by_no_other(
    objects: ObjectStore, place: int
) -> None:
    file = stored(objects, flipped(place))
    for block in range(4):
        start, stop = block * BLOCK_BYTES, min((block + 1) * BLOCK_BYTES, SIZE)
        if start <= place < stop:
            with pytest.raises(ChecksumMismatch, match="data/file"):
                file.read(start, start + 1)
        else:
            assert file.read(start, stop) == DATA[start:stop]
    with pytest.raises(ChecksumMismatch, match="data/file"):
        stored(objects, flipped(place)).read(0, SIZE)


@pytest.mark.parametrize("length", [0, BLOCK_BYTES, SIZE - 1])
def test_a_cut_off_file_is_met_where_it_is_cut(objects: ObjectStore, length: int) -> None:
    with pytest.raises(ChecksumMismatch, match=r"data/file.*bytes"):
        stored(objects, DATA[:length]).read(SIZE - 1, SIZE)


@settings(max_examples=60, deadline=None)
@given(
    st.binary(max_size=40),
    st.lists(
        st.one_of(
            st.tuples(st.just("read"), st.integers(-1, 50), st.just(0)),
            st.tuples(st.just("seek"), st.integers(0, 50), st.just(io.SEEK_SET)),
        ),
        max_size=12,
    ),
)
def test_a_file_is_read_as_python_reads_bytes(
    data: bytes, calls: list[tuple[str, int, int]]
) -> None:
    ours, theirs = Seekable(InMemory(data)), io.BytesIO(data)
    for name, number, whence in calls:
        arguments = (number,) if name == "read" else (number, whence)
        assert getattr(ours, name)(*arguments) == getattr(theirs, name)(*arguments)
        assert ours.tell() == theirs.tell()
    assert ours.seek(-len(data), io.SEEK_END) == 0
    assert ours.read() == data


NUM_ROWS, ROW_TOKENS, K = 20, CHUNK_TOKENS // 2, 16


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of one shard whose objects are many blocks long."""
    folder = tmp_path_factory.mktemp("large")
    rng, num_tokens = np.random.default_rng(0), NUM_ROWS * ROW_TOKENS
    recorded = rng.integers(1 << 20, size=(NUM_ROWS, ROW_TOKENS, 8)).astype(np.int32)
    rows = [
        Row(
            prompt=[i],
            completion=rng.integers(1 << 20, size=ROW_TOKENS).tolist(),
            sampling_T=-rng.random(ROW_TOKENS).astype(np.float32),
            recorded_ids_TS=recorded[i],
        )
        for i in range(NUM_ROWS)
    ]
    logprobs = -np.sort(rng.uniform(0, 20, (num_tokens, K)), axis=1).astype(np.float32)
    topk = TopK(
        ids=rng.integers(1 << 17, size=(num_tokens, K)).astype(np.int32),
        logprobs=logprobs,
        num_kept=np.full(num_tokens, K, np.uint16),
        tail_logprobs=logprobs[:, -1],
    )
    scores = Scores(token_offsets=np.arange(NUM_ROWS + 1) * ROW_TOKENS, topk=topk)
    cache = Cache(str(folder / "cache"))
    shard = commit_rollouts(cache, rows)
    for file in rounds([shard], [[commit_scores(cache, shard, scores, ["topk"])]]):
        RunFolder(folder / "run").write(file)
    return folder


def opened(folder: Path) -> opdcache.Samples:
    return opdcache.open_cache(folder / "cache").of_run(folder / "run")


def test_one_sample_of_a_large_shard_is_the_same_and_costs_a_bounded_part_of_it(
    large: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    every = list(opened(large))
    size = sum(f.stat().st_size for f in (large / "cache" / "data").rglob("*") if f.is_file())
    assert size > 30 * BLOCK_BYTES
    for row in (0, 5, NUM_ROWS - 1):
        counted = Counted(monkeypatch)
        sample = opened(large)[row]
        assert counted.num_bytes < min(size / 3, 10 * BLOCK_BYTES)
        assert counted.num_requests < 60
        monkeypatch.undo()
        assert sample.rollout_id == every[row].rollout_id
        for name in ("completion_token_ids", "sampling_logprobs", "student_topk_ids"):
            assert np.array_equal(getattr(sample, name), getattr(every[row], name)), name
        ours, theirs = sample.scores.topk, every[row].scores.topk
        assert ours is not None
        assert theirs is not None
        for name in ("ids", "logprobs", "num_kept", "tail_logprobs"):
            assert np.array_equal(getattr(ours, name), getattr(theirs, name)), name


def test_a_changed_byte_of_a_large_object_is_met_by_the_samples_near_it(large: Path) -> None:
    (file,) = (large / "cache" / "data").rglob("topk_ranks/c/0/0")
    sound = file.read_bytes()
    data = bytearray(sound)
    data[len(data) // 2] ^= 1
    try:
        file.write_bytes(data)
        assert opened(large)[0].scores.topk is not None
        with pytest.raises(ChecksumMismatch, match="topk_ranks"):
            opened(large)[:]
    finally:
        file.write_bytes(sound)
