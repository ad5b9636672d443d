"""Claims: leases without synchronised clocks, and what a late holder loses."""

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from opdcache.identity import canonical_json, key_of
from opdcache.store.cache import Cache
from opdcache.store.claims import ClaimedProcess, Claims
from opdcache.store.objects import ObjectStore

from .shards import rollout_identity, table, write_rollouts

KEY = "ab" * 32


@pytest.fixture
def objects(store_url: str) -> ObjectStore:
    return ObjectStore(store_url)


class Clock:
    """Seconds that pass when told to."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def claim_paths(objects: ObjectStore) -> list[str]:
    return sorted(info.path for info in objects.list("claims"))


def foreign_claim(objects: ObjectStore, generation: int = 0) -> str:
    """The claim of a worker on some other machine."""
    path = f"claims/rollouts/{KEY}.{generation}"
    process = {"machine": "another", "pid": 1, "started": "5"}
    objects.put(path, canonical_json({"nonce": "0", "process": process}))
    return path


def until(true: Callable[[], bool], timeout_s: float = 5) -> None:
    deadline = time.monotonic() + timeout_s
    while not true():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.01)


def test_a_held_claim_is_refused_to_others_and_free_afterwards(objects: ObjectStore) -> None:
    one, two = Claims(objects), Claims(objects)

    with one.hold("rollouts", KEY) as mine, two.hold("rollouts", KEY) as theirs:
        assert (mine, theirs) == (True, False)
    assert claim_paths(objects) == []
    with two.hold("rollouts", KEY) as theirs:
        assert theirs


def test_claims_on_other_keys_and_kinds_do_not_meet(objects: ObjectStore) -> None:
    claims = Claims(objects)

    with (
        claims.hold("rollouts", KEY) as one,
        claims.hold("rollouts", KEY[:-1]) as two,
        claims.hold("scores", KEY) as three,
    ):
        assert (one, two, three) == (True, True, True)


def test_a_claim_is_released_when_its_work_fails(objects: ObjectStore) -> None:
    with pytest.raises(RuntimeError), Claims(objects).hold("rollouts", KEY):
        raise RuntimeError

    assert claim_paths(objects) == []


def test_a_claim_that_stands_still_for_the_lease_is_taken_over(objects: ObjectStore) -> None:
    clock = Clock()
    claims = Claims(objects, lease_s=60, clock=clock)
    foreign_claim(objects, generation=4)

    for passed in (0, 30, 29.9):
        clock.now += passed
        with claims.hold("rollouts", KEY) as mine:
            assert not mine
    clock.now += 0.2
    with claims.hold("rollouts", KEY) as mine:
        assert mine
        assert claim_paths(objects) == [f"claims/rollouts/{KEY}.5"]


def test_the_lease_is_counted_from_when_the_observer_first_looked(objects: ObjectStore) -> None:
    clock = Clock()
    foreign_claim(objects)  # may be days old: no two clocks are compared
    clock.now += 1e6

    with Claims(objects, lease_s=60, clock=clock).hold("rollouts", KEY) as mine:
        assert not mine


def test_a_claim_that_moves_is_never_taken_over(objects: ObjectStore) -> None:
    clock = Clock()
    observer = Claims(objects, lease_s=60, clock=clock)
    path = foreign_claim(objects)

    for beat in range(5):
        with observer.hold("rollouts", KEY) as mine:
            assert not mine
        clock.now += 59
        objects.put(path, canonical_json({"nonce": str(beat)}))
    clock.now += 59
    with observer.hold("rollouts", KEY) as mine:
        assert not mine


def test_a_holder_s_heartbeat_changes_the_claim_s_etag(objects: ObjectStore) -> None:
    clock = Clock()
    observer = Claims(objects, lease_s=60, clock=clock)

    with Claims(objects, lease_s=0.04).hold("rollouts", KEY):
        (path,) = claim_paths(objects)
        for _ in range(3):
            with observer.hold("rollouts", KEY) as mine:
                assert not mine
            before = objects.info(path)
            until(lambda before=before: objects.info(path) != before)  # type: ignore[misc]
            clock.now += 61


def test_only_one_of_many_observers_takes_a_dead_claim_over(tmp_path: Path) -> None:
    objects = ObjectStore(str(tmp_path))
    foreign_claim(objects)
    clocks = [Clock() for _ in range(6)]
    observers = [Claims(objects, lease_s=60, clock=clock) for clock in clocks]
    for observer, clock in zip(observers, clocks, strict=True):
        with observer.hold("rollouts", KEY) as mine:
            assert not mine
        clock.now += 61
    ready, done, won = threading.Barrier(6), threading.Barrier(6), []

    def take(place: int) -> None:
        ready.wait()
        with observers[place].hold("rollouts", KEY) as mine:
            if mine:
                won.append(place)
            done.wait()

    threads = [threading.Thread(target=take, args=(place,)) for place in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    assert len(won) == 1


TAKE_A_CLAIM = """
import sys, time
from opdcache.store.claims import Claims
from opdcache.store.objects import ObjectStore
with Claims(ObjectStore(sys.argv[1])).hold("rollouts", sys.argv[2]) as mine:
    print(mine, flush=True)
    time.sleep(60)
"""


@pytest.fixture
def holder(tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    """Another process that holds the claim on KEY in ``tmp_path``."""
    process = subprocess.Popen(
        [sys.executable, "-c", TAKE_A_CLAIM, str(tmp_path), KEY],
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "True\n"
    yield process
    process.kill()
    process.wait()
    process.stdout.close()


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="needs Linux's /proc")
def test_the_claim_of_a_killed_process_on_this_machine_is_taken_over_at_once(
    tmp_path: Path, holder: "subprocess.Popen[str]"
) -> None:
    claims = Claims(ObjectStore(str(tmp_path)), clock=Clock())  # time stands still
    with claims.hold("rollouts", KEY) as mine:
        assert not mine

    os.kill(holder.pid, signal.SIGKILL)
    holder.wait()

    with claims.hold("rollouts", KEY) as mine:
        assert mine
        assert claim_paths(claims.objects) == [f"claims/rollouts/{KEY}.1"]


def test_a_process_of_another_machine_is_never_known_to_be_gone() -> None:
    assert not ClaimedProcess(machine="another", pid=2**22 + 1, started="5").is_gone()


def test_a_process_number_that_is_in_use_again_is_not_the_holder() -> None:
    this = ClaimedProcess.this()
    if not this.machine:
        pytest.skip("needs Linux's /proc")

    assert not this.is_gone()
    assert ClaimedProcess(this.machine, this.pid, "an earlier start").is_gone()


def test_a_holder_that_comes_back_loses_the_commit_and_nothing_else(tmp_path: Path) -> None:
    cache, clock, identity = Cache(str(tmp_path)), Clock(), rollout_identity()
    key = key_of(identity)
    sleeper = Claims(cache.objects, lease_s=1e6)
    other = Claims(cache.objects, lease_s=60, clock=clock)

    with sleeper.hold("rollouts", key):
        late = cache.attempt(key)
        manifest = write_rollouts(late, identity, table([1], []))
        with other.hold("rollouts", key) as mine:
            assert not mine
        clock.now += 61
        with other.hold("rollouts", key) as mine:
            assert mine
            winner = cache.attempt(key)
            assert cache.commit(winner, write_rollouts(winner, identity, table([2], [])))
        assert not cache.commit(late, manifest)

    found = cache.rollouts(key)
    assert found is not None
    assert cache.read_rollouts(found).column("completion_token_ids").to_pylist() == [[2], []]
    assert {info.path.split("/")[3] for info in cache.objects.list("data")} == {winner.name}
    assert claim_paths(cache.objects) == []
