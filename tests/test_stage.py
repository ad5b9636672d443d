"""What every stage shares: many workers make each shard once, and none twice."""

import itertools
import os
import signal
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from opdcache.errors import Interrupted
from opdcache.identity import key_of
from opdcache.schemas.manifests import RolloutIdentity, RolloutManifest
from opdcache.stage import Silent, Worker, give_up, interrupts, make_shards
from opdcache.store.cache import Attempt, Cache
from opdcache.store.upkeep import verify

from .shards import commit_rollouts, rollout_identity, write_rollouts

NAMES = [f"shard {i}" for i in range(20)]


class Counted(Silent):
    """Progress that adds up."""

    def __init__(self) -> None:
        self.units, self.tokens = 0, 0

    def advance(self, units: int, tokens: int) -> None:
        self.units += units
        self.tokens += tokens


def tasks(names: Sequence[str]) -> dict[str, RolloutIdentity]:
    return {key_of(rollout_identity(name)): rollout_identity(name) for name in names}


def compute(identity: RolloutIdentity, attempt: Attempt) -> RolloutManifest:
    return write_rollouts(attempt, identity)


def make(
    cache: Cache,
    names: list[str],
    *,
    worker: Worker = Worker(),  # noqa: B008
    compute: Callable[[RolloutIdentity, Attempt], RolloutManifest] = compute,
    progress: Silent | None = None,
) -> int:
    """Make the named shards."""
    return make_shards(
        cache,
        "rollouts",
        tasks(names),
        is_done=lambda identity: cache.rollouts(key_of(identity)) is not None,
        compute=compute,
        worker=worker,
        progress=progress or Silent(),
        poll_s=0.01,
    )


def below(cache: Cache, prefix: str) -> list[str]:
    return sorted(info.path for info in cache.objects.list(prefix))


def assert_each_once(cache: Cache, names: Sequence[str] = NAMES) -> None:
    """One manifest and one attempt a key, every one readable, and no claim left."""
    wanted = set(tasks(names))
    assert {Path(path).stem for path in below(cache, "commits/rollouts")} == wanted
    found = cache.committed_rollouts(wanted)
    assert set(found) == wanted
    for manifest in found.values():
        cache.read_rollouts(manifest)
    attempts = {tuple(path.split("/")[2:4]) for path in below(cache, "data")}
    assert attempts == {(key, manifest.attempt) for key, manifest in found.items()}
    assert below(cache, "claims") == []


def test_workers_that_race_on_the_same_keys_make_each_shard_once(tmp_path: Path) -> None:
    url, computed, made = str(tmp_path), Counter[str](), []

    def counted(identity: RolloutIdentity, attempt: Attempt) -> RolloutManifest:
        computed[identity.student] += 1
        return compute(identity, attempt)

    threads = [
        threading.Thread(target=lambda: made.append(make(Cache(url), NAMES, compute=counted)))
        for _ in range(5)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    assert len(made) == 5
    assert sum(made) == 20
    assert computed == Counter(NAMES)
    assert_each_once(Cache(url))


IN_ANOTHER_PROCESS = """
import sys
from opdcache.stage import Worker
from opdcache.store.cache import Cache
from tests.test_stage import FORTY, make
cache = Cache(sys.argv[1])
print("ready", flush=True)
sys.stdin.readline()  # all begin together, at the same key
print(make(cache, FORTY, worker=Worker()))
"""
FORTY = [f"key {number}" for number in range(40)]


@pytest.mark.slow
@pytest.mark.parametrize(
    "store_url", ["local", pytest.param("s3", marks=pytest.mark.s3)], indirect=True
)
def test_eight_processes_that_race_on_the_same_forty_keys_commit_forty(store_url: str) -> None:
    workers = [
        subprocess.Popen(
            [sys.executable, "-c", IN_ANOTHER_PROCESS, store_url],
            cwd=Path(__file__).parent.parent,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for _ in range(8)
    ]
    for worker in workers:
        assert worker.stdout is not None
        assert worker.stdout.readline() == "ready\n"
    for worker in workers:
        assert worker.stdin is not None
        worker.stdin.write("\n")
        worker.stdin.flush()
    made = [int(worker.communicate(timeout=120)[0]) for worker in workers]

    assert [worker.returncode for worker in workers] == [0] * 8
    assert sum(made) == 40
    assert sum(number > 0 for number in made) > 1, "they did not race"
    cache = Cache(store_url)
    assert_each_once(cache, FORTY)
    assert verify(cache, deep=True) == []


def test_a_second_call_does_nothing(tmp_path: Path) -> None:
    cache = Cache(str(tmp_path))
    assert make(cache, NAMES) == 20
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*") if path.is_file()}

    def refuse(identity: RolloutIdentity, attempt: Attempt) -> RolloutManifest:
        raise AssertionError("computed again")

    assert make(cache, NAMES, compute=refuse) == 0
    after = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*") if path.is_file()}
    assert after == before


def test_only_what_is_missing_is_made(tmp_path: Path) -> None:
    cache = Cache(str(tmp_path))
    commit_rollouts(cache, "shard 3")
    computed = []

    def noted(identity: RolloutIdentity, attempt: Attempt) -> RolloutManifest:
        computed.append(identity.student)
        return compute(identity, attempt)

    assert make(cache, NAMES[:5], compute=noted) == 4
    assert computed == ["shard 0", "shard 1", "shard 2", "shard 4"]


def test_a_shard_that_was_committed_before_the_claim_was_taken_is_not_made_again(
    tmp_path: Path,
) -> None:
    cache, looks, computed = Cache(str(tmp_path)), [], []

    def is_done(identity: RolloutIdentity) -> bool:
        looks.append(identity)
        done = cache.rollouts(key_of(identity)) is not None
        if len(looks) == 1:  # another worker finishes right after the first look
            commit_rollouts(cache, identity.student)
        return done

    def noted(identity: RolloutIdentity, attempt: Attempt) -> RolloutManifest:
        computed.append(identity)
        return compute(identity, attempt)

    made = make_shards(
        cache,
        "rollouts",
        tasks(NAMES[:1]),
        is_done=is_done,
        compute=noted,
        worker=Worker(),
        progress=Silent(),
    )

    assert (made, computed) == (0, [])


def test_progress_counts_every_shard_once_and_the_tokens_that_were_made(tmp_path: Path) -> None:
    cache, progress = Cache(str(tmp_path)), Counted()
    commit_rollouts(cache, "shard 3")

    make(cache, NAMES[:5], progress=progress)

    assert (progress.units, progress.tokens) == (5, 4 * 3)


def test_a_failing_shard_discards_its_attempt_and_releases_its_claim(tmp_path: Path) -> None:
    cache = Cache(str(tmp_path))

    def fail(identity: RolloutIdentity, attempt: Attempt) -> RolloutManifest:
        compute(identity, attempt)
        assert below(cache, "data")
        assert below(cache, "claims")
        raise RuntimeError("the engine broke")

    with pytest.raises(RuntimeError, match="the engine broke"):
        make(cache, NAMES[:1], compute=fail)

    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []
    assert make(cache, NAMES[:1]) == 1


def test_shards_made_before_a_failure_stay(tmp_path: Path) -> None:
    cache = Cache(str(tmp_path))

    def fail_third(identity: RolloutIdentity, attempt: Attempt) -> RolloutManifest:
        if identity.student == "shard 2":
            raise KeyboardInterrupt
        return compute(identity, attempt)

    with pytest.raises(KeyboardInterrupt):
        make(cache, NAMES, compute=fail_third)

    assert len(below(cache, "commits")) == 2
    assert make(cache, NAMES) == 18


def test_claims_that_killed_workers_left_on_finished_shards_are_deleted(tmp_path: Path) -> None:
    cache = Cache(str(tmp_path))
    (key, *_) = tasks(NAMES)
    commit_rollouts(cache, "shard 0")
    cache.objects.put(f"claims/rollouts/{key}.0", b"{}")
    cache.objects.put("claims/rollouts/of-another-run.0", b"{}")
    assert make(cache, NAMES) == 19
    assert below(cache, "claims") == ["claims/rollouts/of-another-run.0"]


def test_a_waiting_worker_asks_less_and_less_often(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mine, theirs = Cache(str(tmp_path)), Cache(str(tmp_path))
    (key,) = tasks(NAMES[:1])
    slept: list[float] = []

    def sleep(seconds: float) -> None:
        slept.append(round(seconds, 3))
        if len(slept) == 6:
            commit_rollouts(theirs, "shard 0")

    monkeypatch.setattr("opdcache.stage.time.sleep", sleep)
    with theirs.claims.hold("rollouts", key):
        assert make(mine, NAMES[:1]) == 0
    assert slept == [0.01, 0.02, 0.04, 0.08, 0.08, 0.08]


def test_a_worker_waits_for_a_shard_that_another_holds(tmp_path: Path) -> None:
    mine, theirs = Cache(str(tmp_path)), Cache(str(tmp_path))
    (key,) = tasks(NAMES[:1])
    made: list[int] = []
    waiter = threading.Thread(target=lambda: made.append(make(mine, NAMES[:1])))

    with theirs.claims.hold("rollouts", key) as held:
        assert held
        waiter.start()
        waiter.join(timeout=0.1)
        assert waiter.is_alive()
        commit_rollouts(theirs, "shard 0")
    waiter.join(timeout=5)

    assert made == [0]


def test_a_worker_makes_a_shard_that_another_gave_up(tmp_path: Path) -> None:
    mine, theirs = Cache(str(tmp_path)), Cache(str(tmp_path))
    (key,) = tasks(NAMES[:1])
    made: list[int] = []
    waiter = threading.Thread(target=lambda: made.append(make(mine, NAMES[:1])))

    with theirs.claims.hold("rollouts", key):
        waiter.start()
        waiter.join(timeout=0.1)
    waiter.join(timeout=5)

    assert made == [1]


def test_a_worker_goes_past_a_held_shard_to_the_next(tmp_path: Path) -> None:
    mine, theirs = Cache(str(tmp_path)), Cache(str(tmp_path))
    first, *_ = tasks(NAMES)
    waiter = threading.Thread(target=lambda: make(mine, NAMES))

    with theirs.claims.hold("rollouts", first):
        waiter.start()
        for _ in range(500):
            waiter.join(timeout=0.01)
            if len(below(theirs, "commits")) == 19:
                break
        assert len(below(theirs, "commits")) == 19
        assert waiter.is_alive()
    waiter.join(timeout=5)

    assert_each_once(mine)


def test_no_tasks_are_done_at_once(tmp_path: Path) -> None:
    assert make(Cache(str(tmp_path)), []) == 0


@given(st.integers(0, 30), st.integers(1, 8))
def test_workers_begin_with_shares_that_cover_the_tasks_once(num_tasks: int, count: int) -> None:
    listed = list(range(num_tasks))
    orders = [Worker(index, count).ordered(listed) for index in range(count)]

    assert all(sorted(order) == listed for order in orders)
    starts = [index * num_tasks // count for index in range(count + 1)]
    shares = [order[: starts[i + 1] - starts[i]] for i, order in enumerate(orders)]
    assert [task for share in shares for task in share] == listed


@pytest.mark.parametrize("index", range(8))
def test_a_worker_goes_through_tasks_that_are_alike_one_after_the_other(index: int) -> None:
    """Each kind stands for a model that is loaded: by turns, each would be loaded many times."""
    kinds = Worker(index, 8).ordered("A" * 8 + "B" * 9 + "C" * 3)

    assert len([kind for kind, _ in itertools.groupby(kinds)]) <= 4


def test_the_only_worker_keeps_the_order_of_the_plan() -> None:
    assert Worker().ordered(["c", "a", "b"]) == ["c", "a", "b"]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1])
def test_a_stop_signal_gives_the_shard_up_and_leaves_the_rest(
    tmp_path: Path, number: signal.Signals
) -> None:
    cache = Cache(str(tmp_path))
    before = signal.getsignal(number)

    def stopped(identity: RolloutIdentity, attempt: Attempt) -> RolloutManifest:
        manifest = compute(identity, attempt)
        if identity.student == "shard 1":
            os.kill(os.getpid(), number)
        return manifest

    with pytest.raises(Interrupted) as caught, interrupts(give_up):
        make(cache, NAMES, compute=stopped)

    assert caught.value.exit_code == 75
    assert signal.getsignal(number) is before
    assert len(below(cache, "commits")) == 1
    assert len(below(cache, "data")) == 1
    assert below(cache, "claims") == []
