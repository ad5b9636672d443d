"""Machines that disagree: on the time, on what files users may write, on who may write at all."""

import os
import stat
import subprocess
import sys
import time
from pathlib import Path

import libfaketime
import pytest

from opdcache.store.cache import Cache
from opdcache.store.claims import Claims
from opdcache.store.upkeep import verify

from ..test_stage import NAMES, assert_each_once, below, tasks
from .worker import work

pytestmark = pytest.mark.slow

HOUR = 3600
ROOT = Path(__file__).parent.parent.parent
OURS, THEIRS, TEAM = 64_001, 64_002, 64_003


def skewed(offset_s: int) -> dict[str, str]:
    """Environment variables of a process whose clock is off; files keep the store's time."""
    if not offset_s:
        return dict(os.environ)
    library = next(Path(libfaketime.__file__).parent.rglob("libfaketime.so.1"))
    faked = {"LD_PRELOAD": str(library), "FAKETIME": f"{offset_s:+d}"}
    return os.environ | faked | {"DONT_FAKE_MONOTONIC": "1", "NO_FAKE_STAT": "1"}


def start(
    cache: Path, names: list[str], offset_s: int, lease_s: float, takes_s: float
) -> "subprocess.Popen[str]":
    """A worker whose clock is off, at its start line."""
    arguments = ["-m", "tests.faults.worker", str(cache), str(lease_s), str(takes_s), *names]
    process = subprocess.Popen(
        [sys.executable, *arguments],
        cwd=ROOT,
        env=skewed(offset_s),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    word, clock = process.stdout.readline().split()
    assert word == "ready"
    assert abs(float(clock) - time.time() - offset_s) < 60, "the clock is not off"
    return process


def go(process: "subprocess.Popen[str]") -> None:
    assert process.stdin is not None
    process.stdin.write("\n")
    process.stdin.flush()


def test_workers_an_hour_before_and_behind_make_each_shard_once(tmp_path: Path) -> None:
    workers = [start(tmp_path, NAMES, offset_s, 60, 0.05) for offset_s in (-HOUR, 0, HOUR)]
    for worker in workers:
        go(worker)
    made = [int(worker.communicate(timeout=120)[0]) for worker in workers]
    assert sum(made) == len(NAMES)
    assert sum(number > 0 for number in made) > 1, "they did not race"
    assert_each_once(Cache(str(tmp_path)))
    assert verify(Cache(str(tmp_path)), deep=True) == []


@pytest.mark.parametrize("offset_s", [-HOUR, HOUR])
def test_a_lease_is_counted_on_the_observer_s_clock_alone(tmp_path: Path, offset_s: int) -> None:
    """A holder that beats is left alone, and one that stands still is not, whatever time it is."""
    holder = start(tmp_path, NAMES[:1], offset_s, 1.0, 3.0)
    go(holder)
    ours, (key,) = Cache(str(tmp_path)), tasks(NAMES[:1])
    claims = Claims(ours.objects, 1.0)
    while not below(ours, "claims"):
        time.sleep(0.01)
    until = time.monotonic() + 2.5
    while time.monotonic() < until:
        with claims.hold("rollouts", key) as mine:
            assert not mine
        time.sleep(0.1)
    assert int(holder.communicate(timeout=60)[0]) == 1

    holder = start(tmp_path, NAMES[1:2], offset_s, 1.0, 60.0)
    go(holder)
    while not below(ours, "claims"):
        time.sleep(0.01)
    holder.kill()
    holder.communicate()
    # As if it had run on another machine: nobody can see that its process is gone.
    (claim,) = below(ours, "claims")
    ours.objects.put(claim, b'{"nonce": "last"}')
    began = time.monotonic()
    assert work(str(tmp_path), NAMES[1:2], lease_s=1.0) == 1
    assert 1.0 <= time.monotonic() - began < 10


@pytest.mark.parametrize("offset_s", [-HOUR, 0, HOUR])
def test_the_age_of_what_may_be_cleaned_up_is_told_by_the_store(
    tmp_path: Path, offset_s: int
) -> None:
    cache = Cache(str(tmp_path))
    work(str(tmp_path), NAMES[:1])
    cache.attempt("a" * 64).put("x", b"fresh")
    command = [sys.executable, "-m", "opdcache.cli.main", "cache", "gc", str(tmp_path)]
    done = subprocess.run(
        [*command, "--grace-hours", "0.5"],
        env=skewed(offset_s),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert len(below(cache, "data")) == 2
    assert len(below(cache, "commits")) == 1


AS_USER = """
import os, sys
from opdcache.store.cache import Cache
from tests.faults.worker import work
from tests.test_stage import NAMES, assert_each_once, tasks
user, team, umask, url, do = sys.argv[1:]
work("memory://", NAMES[:1])  # what is imported late is out of reach for other users
os.setgroups([int(team)])
os.setresgid(*[int(team)] * 3)
os.setresuid(*[int(user)] * 3)
os.umask(int(umask))
try:
    exec(do)
    print("done")
except BaseException as error:
    print(f"{type(error).__name__}: {error}")
"""


def as_user(user: int, umask: int, url: Path, do: str) -> str:
    """What somebody else's process says of doing something to a cache: its error, or ``done``."""
    command = [sys.executable, "-c", AS_USER, *map(str, (user, TEAM, umask, url, do))]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root can be two other users")


@pytest.fixture
def shared(tmp_path: Path) -> Path:
    """A folder of a group's, in which new ones are its too; its parents let everybody through."""
    for folder in (tmp_path, *tmp_path.parents):
        if folder != Path("/") and not folder.stat().st_mode & stat.S_IXOTH:
            folder.chmod(folder.stat().st_mode | stat.S_IXOTH)
    cache = tmp_path / "cache"
    cache.mkdir()
    os.chown(cache, OURS, TEAM)
    cache.chmod(0o2775)
    return cache


@needs_root
@pytest.mark.parametrize("umasks", [(0o022, 0o077), (0o077, 0o002), (0o027, 0o022)])
def test_users_with_different_umasks_share_a_cache_that_their_group_may_write_to(
    shared: Path, umasks: tuple[int, int]
) -> None:
    assert as_user(OURS, umasks[0], shared, "work(url, NAMES[:5])") == "done"
    assert as_user(THEIRS, umasks[1], shared, "work(url, NAMES[:10])") == "done"
    assert as_user(OURS, umasks[0], shared, "work(url, NAMES)") == "done"
    assert_each_once(Cache(str(shared)))
    assert as_user(THEIRS, umasks[1], shared, "assert_each_once(Cache(url))") == "done"
    assert {path.stat().st_uid for path in shared.rglob("*.json")} == {OURS, THEIRS}
    for path in shared.rglob("*"):
        mode = path.stat().st_mode
        assert mode & stat.S_IRGRP, path
        assert path.stat().st_gid == TEAM
        assert not path.is_dir() or mode & stat.S_IWGRP, path


@needs_root
def test_where_the_folder_says_so_nobody_can_overwrite_what_another_committed(
    shared: Path,
) -> None:
    shared.chmod(0o3775)
    assert as_user(OURS, 0o022, shared, "work(url, NAMES[:2])") == "done"
    assert as_user(THEIRS, 0o022, shared, "work(url, NAMES[:4])") == "done"
    ours = [path for path in shared.rglob("*.json") if path.stat().st_uid == OURS]
    ours += [path for path in shared.rglob("*.parquet") if path.stat().st_uid == OURS]
    assert len(ours) == 4
    for path in ours:
        name = str(path.relative_to(shared))
        for do in (
            f"Cache(url).objects.put({name!r}, b'x')",
            f"Cache(url).objects.delete({name!r})",
        ):
            assert "permi" in as_user(THEIRS, 0o022, shared, do)
    assert_each_once(Cache(str(shared)), NAMES[:4])
    # A dead worker's claim is taken over, though it cannot be deleted.
    (key,) = tasks(NAMES[4:5])
    die = f"Cache(url).objects.put('claims/rollouts/{key}.0', b'{{}}')"
    assert as_user(OURS, 0o022, shared, die) == "done"
    assert as_user(THEIRS, 0o022, shared, "work(url, NAMES[:5], lease_s=0.5)") == "done"
    assert len(Cache(str(shared)).committed_rollouts(tasks(NAMES[:5]))) == 5
    # Clean-up takes away what is one's own, and passes over the rest.
    clean = "from opdcache.store import upkeep; from datetime import timedelta; c = Cache(url); "
    clean += "upkeep.collect(c, upkeep.garbage(c, grace=timedelta(seconds=-5)))"
    assert as_user(THEIRS, 0o022, shared, clean) == "done"
    kept = [*NAMES[:2], NAMES[4]]  # a claim is held on the last, as far as a clean-up can see
    assert set(Cache(str(shared)).committed_rollouts(tasks(NAMES[:5]))) == set(tasks(kept))


@needs_root
def test_a_cache_that_is_read_only_serves_what_it_has_and_says_what_it_lacks(
    shared: Path,
) -> None:
    shared.chmod(0o755)
    assert as_user(OURS, 0o022, shared, "work(url, NAMES[:2])") == "done"
    before = {path: path.stat().st_mtime_ns for path in shared.rglob("*")}
    assert as_user(THEIRS, 0o022, shared, "assert_each_once(Cache(url), NAMES[:2])") == "done"
    assert as_user(THEIRS, 0o022, shared, "work(url, NAMES[:2])") == "done"
    refused = as_user(THEIRS, 0o022, shared, "work(url, NAMES[:3])")
    assert refused.startswith("NotAllowed")
    assert refused.endswith("not allowed; check the permissions")
    assert {path: path.stat().st_mtime_ns for path in shared.rglob("*")} == before
