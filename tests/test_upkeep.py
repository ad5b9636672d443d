"""Keeping a cache: verifying, cleaning, copying, on every kind of store."""

import json
import random
import subprocess
import sys
import threading
from datetime import timedelta
from pathlib import Path

import numpy as np
import pytest

from opdcache.errors import ChecksumMismatch, InvalidShard, StoreError
from opdcache.identity import canonical_json, digest, key_of
from opdcache.schemas.columns import SCORE_COLUMNS
from opdcache.schemas.manifests import RolloutManifest
from opdcache.store.cache import Cache, data_prefix, rollout_commit
from opdcache.store.objects import ObjectStore
from opdcache.store.scores import Scores, TopK
from opdcache.store.upkeep import (
    Garbage,
    collect,
    copy,
    garbage,
    listed,
    pinned,
    quarantining,
    verify,
    with_key,
)

from .s3_server import BUCKET, S3Server, s3_server
from .shards import (
    commit_rollouts,
    commit_scores,
    rollout_identity,
    some_scores,
    table,
    write_rollouts,
)

NO_GRACE = timedelta(seconds=-5)


@pytest.fixture
def cache(store_url: str) -> Cache:
    return Cache(store_url)


def filled(cache: Cache, *names: str) -> list[RolloutManifest]:
    """Rollouts by name, each with two score sets."""
    made = []
    for i, name in enumerate(names):
        rollout = commit_rollouts(cache, name, table([5 + i, 6, 7], []))
        commit_scores(cache, rollout, *SCORE_COLUMNS)
        commit_scores(cache, rollout, "entropy")
        made.append(rollout)
    return made


def paths(cache: Cache) -> set[str]:
    return {info.path for top in ("commits", "data", "claims") for info in cache.objects.list(top)}


def reasons(found: list[Garbage]) -> list[str]:
    return sorted(item.reason for item in found)


def test_a_listing_says_what_there_is_and_who_uses_it(cache: Cache) -> None:
    one, two = filled(cache, "one", "two")
    cache.pin("run-1", "rollouts", [one.key])
    cache.pin("run-2", "rollouts", [one.key, two.key])

    found = {item.summary.key: item for item in listed(cache)}

    assert len(found) == 6
    assert found[one.key].used_by == ("run-1", "run-2")
    assert found[two.key].used_by == ("run-2",)
    assert found[one.key].summary.size_bytes == one.objects[0].size_bytes


def test_a_second_listing_reads_no_manifest_but_new_ones_and_notices_what_is_gone(
    cache: Cache, monkeypatch: pytest.MonkeyPatch
) -> None:
    one, two = filled(cache, "one", "two")
    first = listed(cache)
    cache.objects.delete(rollout_commit(one.key))
    three = commit_rollouts(cache, "three", table([9]))
    read, manifest = [], Cache.manifest
    monkeypatch.setattr(Cache, "manifest", lambda c, path: read.append(path) or manifest(c, path))
    second = listed(cache)
    assert read == [rollout_commit(three.key)]
    changed = {row.summary.key for row in {*first} ^ {*second}}
    assert changed == {one.key, three.key}
    assert {row.summary.of for row in second if row.summary.made_by == "7" * 64} == {
        one.key,
        two.key,
    }
    assert listed(cache) == second
    cache.objects.delete(rollout_commit(three.key))
    commit_rollouts(cache, "three", table([9, 9, 9, 9]))
    rows = {row.summary.key: row.summary for row in listed(cache)}
    assert rows[three.key].num_tokens == 4


def test_a_damaged_index_is_not_believed(cache: Cache) -> None:
    filled(cache, "one")
    first = listed(cache)
    (info,) = cache.objects.list("index")
    data = bytearray(cache.objects.get(info.path))
    data[len(data) // 2] ^= 1
    cache.objects.put(info.path, bytes(data))
    assert [problem.path for problem in verify(cache)] == [info.path]
    assert listed(cache) == first
    assert verify(cache) == []


def test_a_sound_cache_verifies(cache: Cache) -> None:
    filled(cache, "one", "two")
    assert verify(cache) == verify(cache, deep=True) == []


@pytest.mark.slow
def test_two_hundred_flipped_bits_are_all_detected(tmp_path: Path) -> None:
    cache = Cache(str(tmp_path))
    filled(cache, "one", "two", "three")
    rng = random.Random(0)
    cache.pin("run", "rollouts", [item.summary.key for item in listed(cache)])
    objects = sorted({*paths(cache), *(info.path for info in cache.objects.list("runs"))})
    for number in range(200):
        path = objects[number % len(objects)]
        sound = cache.objects.get(path)
        damaged = bytearray(sound)
        damaged[rng.randrange(len(damaged))] ^= 1 << rng.randrange(8)
        cache.objects.put(path, bytes(damaged))
        problems = verify(cache)
        assert problems, path
        assert all(len(problem.reason.splitlines()) == 1 for problem in problems)
        cache.objects.put(path, sound)
    assert verify(cache) == []


def test_a_missing_object_is_named(cache: Cache) -> None:
    filled(cache, "one")
    gone = next(path for path in sorted(paths(cache)) if path.endswith("topk_steps/zarr.json"))
    cache.objects.delete(gone)
    assert [gone in problem.reason for problem in verify(cache)] == [True]


def broken_topk(**changes: object) -> Scores:
    scores = some_scores(frozenset(SCORE_COLUMNS))
    assert scores.topk is not None
    fields = {name: getattr(scores.topk, name).copy() for name in TopK.__slots__}
    for name, change in changes.items():
        change(fields[name])  # type: ignore[operator]
    return Scores(
        scores.token_offsets,
        scores.sampled_logprobs,
        scores.entropy,
        TopK(**fields),
        scores.student_topk,
    )


def put(place: object, value: float) -> object:
    def change(values: np.ndarray) -> None:  # type: ignore[type-arg]
        values[place] = value

    return change


@pytest.mark.parametrize(
    ("scores", "said"),
    [
        (broken_topk(ids=put((1, 2), 1 << 21)), "an id is not in the vocabulary"),
        (broken_topk(ids=put((1, 2), 1)), "a token keeps an id twice"),
        (broken_topk(tail_logprobs=put(2, 0.0)), "entries and tail hold more than all mass"),
        (broken_topk(num_kept=put(0, 9)), "more entries are kept than there are"),
    ],
)
def test_a_deep_look_finds_contents_that_contradict_the_format(scores: Scores, said: str) -> None:
    cache = Cache("memory://")
    rollout = commit_rollouts(cache)
    commit_scores(cache, rollout, *SCORE_COLUMNS, scores=scores)
    assert verify(cache) == []
    problems = verify(cache, deep=True)
    assert len(problems) == 1
    assert said in problems[0].reason


def test_a_deep_look_holds_scores_against_their_rollouts() -> None:
    cache = Cache("memory://")
    rollout = commit_rollouts(cache)
    scores = some_scores(frozenset(SCORE_COLUMNS))
    shifted = Scores(np.asarray([0, 2, 3]), scores.sampled_logprobs)
    commit_scores(cache, rollout, "sampled", scores=shifted)
    assert ["token offsets" in p.reason for p in verify(cache, deep=True)] == [True]
    cache.objects.delete(rollout_commit(rollout.key))
    assert ["rollouts of these scores are gone" in p.reason for p in verify(cache, deep=True)] == [
        True
    ]


def damage(cache: Cache, manifest: RolloutManifest) -> None:
    path = f"{data_prefix(manifest.key, manifest.attempt)}/{manifest.objects[0].path}"
    cache.objects.put(path, b"damaged")


def test_a_wrong_shard_is_put_aside_with_its_reason_and_can_be_made_anew(cache: Cache) -> None:
    sound, wrong = filled(cache, "sound", "wrong")
    damage(cache, wrong)
    committed = cache.objects.get(rollout_commit(wrong.key))
    assert len(verify(cache)) == 1
    assert cache.quarantined() == set()
    (problem,) = verify(cache, quarantine=True)
    assert problem.path == rollout_commit(wrong.key)
    assert cache.rollouts(wrong.key) is None
    assert cache.read_rollouts(sound).num_rows == 2
    (info,) = cache.objects.list("quarantine")
    record = json.loads(cache.objects.get(info.path))
    assert record["commit"] == problem.path
    assert record["manifest"].encode() == committed
    assert "not what was committed" in record["reason"]
    commits = {m.key: rollout_commit(m.key) for m in (sound, wrong)}
    assert cache.gone(commits) == [wrong.key]
    assert verify(cache, quarantine=True) == []
    commit_rollouts(cache, "wrong", table([6, 6, 7], []))
    assert cache.gone(commits) == []
    assert verify(cache, deep=True) == []


def test_a_damaged_manifest_is_put_aside_too(cache: Cache) -> None:
    (rollout,) = filled(cache, "one")
    cache.objects.put(rollout_commit(rollout.key), b"\xff{")
    assert len(verify(cache, quarantine=True)) == 1
    assert cache.gone({rollout.key: rollout_commit(rollout.key)}) == [rollout.key]


def test_what_is_not_wrong_in_itself_is_named_and_left_alone(cache: Cache) -> None:
    (rollout,) = filled(cache, "one")
    path = rollout_commit(rollout.key)
    body = json.loads(cache.objects.get(path))["manifest"] | {"schema_version": 9}
    later = canonical_json({"manifest": body, "sha256": digest(body)})
    cache.objects.put(path, later)
    assert ["later version" in problem.reason for problem in verify(cache, quarantine=True)] == [
        True
    ]
    assert cache.objects.get(path) == later
    cache.objects.delete(path)
    found = verify(cache, deep=True, quarantine=True)
    assert {problem.reason.split(": ")[1] for problem in found} == {
        "the rollouts of these scores are gone"
    }
    assert not any(problem.is_wrong for problem in found)
    assert cache.quarantined() == set()


def test_a_shard_that_somebody_makes_anew_meanwhile_is_not_put_aside(cache: Cache) -> None:
    (rollout,) = filled(cache, "one")
    damage(cache, rollout)
    with pytest.raises(ChecksumMismatch) as met:
        cache.read_rollouts(rollout)
    other = Cache(cache.objects.url) if "memory" not in cache.objects.url else cache
    held = other.claims.hold("rollouts", rollout.key)
    with held, pytest.raises(ChecksumMismatch), quarantining(cache):
        raise met.value
    assert cache.quarantined() == set()
    verify(cache, quarantine=True)
    anew = commit_rollouts(cache, "one", table([5, 6, 7], []))
    with pytest.raises(ChecksumMismatch), quarantining(cache):
        raise met.value
    assert cache.rollouts(rollout.key) == anew


def test_a_stage_that_meets_a_damaged_manifest_puts_it_aside(cache: Cache) -> None:
    (rollout,) = filled(cache, "one")
    cache.objects.put(rollout_commit(rollout.key), b"{}")
    with pytest.raises(InvalidShard), quarantining(cache):
        cache.rollouts(rollout.key)
    assert cache.quarantined() == {rollout.key}


def test_who_may_only_read_lists_all_the_same(
    cache: Cache, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(*_: object) -> None:
        raise StoreError("not allowed")

    filled(cache, "one")
    monkeypatch.setattr(ObjectStore, "put", refused)
    assert len(listed(cache)) == 3


def test_an_index_that_another_listing_replaces_is_no_fault(
    cache: Cache, monkeypatch: pytest.MonkeyPatch
) -> None:
    filled(cache, "one")
    listed(cache)
    read = ObjectStore.get

    def vanished(store: ObjectStore, path: str) -> bytes:
        if path.startswith("index/"):
            store.delete(path)
        return read(store, path)

    monkeypatch.setattr(ObjectStore, "get", vanished)
    assert len(listed(cache)) == 3
    assert verify(cache) == []


def test_a_stage_that_reads_a_wrong_shard_puts_it_aside(cache: Cache) -> None:
    (rollout,) = filled(cache, "one")
    damage(cache, rollout)
    with pytest.raises(ChecksumMismatch), quarantining(cache):
        cache.read_rollouts(rollout)
    assert cache.quarantined() == {rollout.key}


def test_a_shard_that_is_sound_at_a_second_look_stays(
    cache: Cache, monkeypatch: pytest.MonkeyPatch
) -> None:
    (rollout,) = filled(cache, "one")
    read = ObjectStore.get
    with monkeypatch.context() as patched:
        patched.setattr(ObjectStore, "get", lambda *a: read(*a)[:-1])
        with pytest.raises(ChecksumMismatch) as met:
            cache.files_of(rollout)
        with pytest.raises(ChecksumMismatch) as seen:
            cache.read_rollouts(rollout)
    assert met.value.commit is None
    with pytest.raises(ChecksumMismatch), quarantining(cache):
        raise seen.value
    assert cache.quarantined() == set()


def test_what_a_killed_worker_left_of_a_pinned_key_goes(cache: Cache) -> None:
    (rollout,) = filled(cache, "one")
    cache.pin("run", "rollouts", [rollout.key])
    left = cache.attempt(rollout.key)
    write_rollouts(left, rollout.identity)
    collect(cache, garbage(cache, grace=NO_GRACE))
    assert not [p for p in paths(cache) if left.name in p]
    assert cache.read_rollouts(rollout).num_rows == 2


def test_what_a_run_uses_or_somebody_makes_stays_and_the_rest_goes(cache: Cache) -> None:
    used, unused = filled(cache, "used", "unused")
    scored = [i.summary.key for i in listed(cache) if i.summary.kind == "scores"]
    cache.pin("run", "rollouts", [used.key])
    cache.pin("run", "scores", scored)
    given_up, under_way = (rollout_identity(name) for name in ("given up", "under way"))
    for identity in (given_up, under_way):
        write_rollouts(cache.attempt(key_of(identity)), identity)
    with cache.claims.hold("rollouts", key_of(under_way)):
        assert garbage(cache) == []  # all of it is young
        found = garbage(cache, grace=NO_GRACE)
        assert reasons(found) == ["an attempt that was not committed", "no run uses it"]
        before = paths(cache)
        assert collect(cache, found) == found
        gone = before - paths(cache)
    assert {path.split("/")[2] for path in gone if path.startswith("data")} == {
        unused.key,
        key_of(given_up),
    }
    assert rollout_commit(unused.key) in gone
    assert rollout_commit(used.key) not in gone
    assert cache.read_rollouts(used).num_rows == 2


def test_what_is_taken_up_between_the_look_and_the_deed_stays(cache: Cache) -> None:
    pinned, claimed, unused = filled(cache, "pinned", "claimed", "unused")
    found = [item for item in garbage(cache, grace=NO_GRACE) if "rollouts" in str(item.commit)]
    assert len(found) == 3
    cache.pin("a new run", "rollouts", [pinned.key])
    with cache.claims.hold("rollouts", claimed.key):
        assert [item.key for item in collect(cache, found)] == [unused.key]
    assert cache.read_rollouts(pinned).num_rows == cache.read_rollouts(claimed).num_rows == 2


def test_an_attempt_that_is_committed_between_the_look_and_the_deed_stays(cache: Cache) -> None:
    identity = rollout_identity("late")
    cache.pin("run", "rollouts", [key_of(identity)])
    attempt = cache.attempt(key_of(identity))
    manifest = write_rollouts(attempt, identity)
    found = garbage(cache, grace=NO_GRACE)
    assert reasons(found) == ["an attempt that was not committed"]
    assert cache.commit(attempt, manifest)
    assert collect(cache, found) == []
    assert verify(cache, deep=True) == []


def test_a_shard_that_is_made_anew_between_the_look_and_the_deed_stays(cache: Cache) -> None:
    commit_rollouts(cache, "one")
    found = garbage(cache, grace=NO_GRACE)
    assert len(collect(cache, found)) == 1
    anew = commit_rollouts(cache, "one")
    assert collect(cache, found) == []
    assert cache.read_rollouts(anew).num_rows == 2


def test_a_damaged_pin_stops_a_clean_up_and_is_named(cache: Cache) -> None:
    (rollout,) = filled(cache, "one")
    cache.pin("run", "rollouts", [rollout.key])
    path = next(info.path for info in cache.objects.list("runs"))
    sound = cache.objects.get(path)
    other = b"0" if sound[20:21] != b"0" else b"1"
    for damaged in (sound[:20] + other + sound[21:], sound[:-3], b"[]"):
        cache.objects.put(path, damaged)
        with pytest.raises(ChecksumMismatch, match="not the keys that a run pinned"):
            garbage(cache, grace=NO_GRACE)
        assert [problem.path for problem in verify(cache)] == ["runs/run"]


def test_objects_of_others_are_left_alone(tmp_path: Path) -> None:
    cache = Cache(str(tmp_path))
    (rollout,) = filled(cache, "one")
    cache.pin("run", "rollouts", [rollout.key])
    for place in ("notes#12", "data/.DS_Store", "commits/README"):
        (tmp_path / place).write_text("mine")
    (tmp_path / "data" / "folder#1").mkdir()
    assert len(listed(cache)) == 3
    collect(cache, garbage(cache, grace=NO_GRACE))
    for place in ("notes#12", "data/.DS_Store", "commits/README"):
        assert (tmp_path / place).read_text() == "mine"


def test_files_that_a_killed_writer_left_are_swept(tmp_path: Path) -> None:
    cache = Cache(str(tmp_path))
    rollout = commit_rollouts(cache)
    cache.pin("run", "rollouts", [rollout.key])
    left = tmp_path / "data" / "ab" / "x#1"
    left.parent.mkdir(parents=True)
    left.write_bytes(b"half")
    assert garbage(cache) == []
    found = garbage(cache, grace=NO_GRACE)
    assert reasons(found) == ["a write that was cut short"]
    collect(cache, found)
    assert not left.exists()
    assert cache.read_rollouts(rollout).num_rows == 2


def test_a_claim_that_nobody_keeps_up_is_cleaned_up_and_a_live_one_is_not(cache: Cache) -> None:
    filled(cache, "one")
    cache.objects.put("claims/rollouts/abc.3", b"{}")
    assert "abc" not in str(garbage(cache, grace=NO_GRACE))  # it may be beating
    cache.claims.lease_s = -5
    found = [item for item in garbage(cache, grace=NO_GRACE) if "claim" in item.reason]
    assert reasons(found) == ["a claim of a worker that is gone"]
    collect(cache, found)
    assert list(cache.objects.list("claims")) == []


def test_a_copy_has_every_shard_and_a_second_one_does_nothing(cache: Cache, tmp_path: Path) -> None:
    one, _ = filled(cache, "one", "two")
    cache.pin("run", "rollouts", [one.key])
    there = Cache(str(tmp_path / "copy"))

    done = copy(cache, there)

    assert (done.shards, done.present, done.left_behind) == (6, 0, {})
    assert verify(there, deep=True) == []
    assert pinned(there) == pinned(cache)
    ours, theirs = (
        {m.key: m.model_copy(update={"attempt": ""}) for m in with_key(c, "")}
        for c in (cache, there)
    )
    assert ours == theirs
    again = copy(cache, there)
    assert (again.shards, again.present, again.left_behind) == (0, 6, {})
    back = copy(there, cache)
    assert (back.shards, back.present) == (0, 6)


def test_where_both_hold_a_key_with_other_tokens_the_destination_s_stays(tmp_path: Path) -> None:
    ours, theirs = (Cache(str(tmp_path / name)) for name in ("ours", "theirs"))
    filled(ours, "same key", "another")
    kept = commit_rollouts(theirs, "same key", table([9, 9, 9], []))

    done = copy(ours, theirs)

    assert done.shards == 3
    assert done.left_behind == {
        "rollouts whose key has other tokens in the destination": 1,
        "scores of tokens that the destination does not have": 2,
    }
    assert theirs.rollouts(kept.key) == kept
    assert verify(theirs, deep=True) == []


def test_a_damaged_shard_is_named_and_the_others_are_copied(tmp_path: Path) -> None:
    ours, theirs = (Cache(str(tmp_path / name)) for name in ("ours", "theirs"))
    rollout, _ = filled(ours, "one", "two")
    path = next(p for p in paths(ours) if rollout.key in p and p.startswith("data"))
    ours.objects.put(path, ours.objects.get(path)[:-1] + b"?")
    done = copy(ours, theirs)
    assert [problem.path for problem in done.damaged] == [rollout_commit(rollout.key)]
    assert done.left_behind == {"scores of tokens that the destination does not have": 2}
    assert done.shards == len(listed(theirs)) == 3
    assert verify(theirs, deep=True) == []


def test_a_shard_that_cannot_be_decoded_is_one_problem_among_others() -> None:
    cache = Cache("memory://")
    identity = rollout_identity("no parquet")
    attempt = cache.attempt(key_of(identity))
    whole = write_rollouts(attempt, identity)
    attempt.put("rollouts.parquet", b"not Parquet")
    entries = tuple(attempt.entries[-1:])
    assert cache.commit(attempt, whole.model_copy(update={"objects": entries}))
    filled(cache, "sound")
    assert verify(cache) == []
    problems = verify(cache, deep=True)
    assert [problem.path for problem in problems] == [rollout_commit(whole.key)]
    assert "not a rollout shard" in problems[0].reason


KILLED_WRITERS = """
import os, random, signal, sys, time
sys.path.insert(0, sys.argv[2])
from opdcache.schemas.columns import SCORE_COLUMNS
from opdcache.store.cache import Cache
from opdcache.store.encoding import encode_scores
from tests.shards import commit_rollouts, commit_scores, some_scores, table

def write(writer):
    cache = Cache(sys.argv[1])  # opened here: nothing of a store survives a fork
    for number in range(10**6):
        rows = table([writer, number, 7], [])
        rollout = commit_rollouts(cache, f"{writer} {number}", rows)
        commit_scores(cache, rollout, *SCORE_COLUMNS)
        os.write(begun, b"!")

encode_scores(some_scores(frozenset(SCORE_COLUMNS)), step=0.01, attributes={})  # imports
moments, (ready, begun) = random.Random(0), os.pipe()
for writer in range(50):
    child = os.fork()
    if child == 0:
        write(writer)
    os.read(ready, 1)  # one shard is whole, however busy the machine is
    time.sleep(moments.uniform(0, 0.2))
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    os.set_blocking(ready, False)
    while True:
        try:
            os.read(ready, 1000)
        except BlockingIOError:
            break
    os.set_blocking(ready, True)
"""


@pytest.mark.slow
def test_a_cache_is_sound_after_fifty_killed_writers(tmp_path: Path) -> None:
    root, url = str(Path(__file__).parents[1]), str(tmp_path / "cache")
    command = [sys.executable, "-c", KILLED_WRITERS, url, root]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stderr == ""  # no writer ended before it was killed
    cache = Cache(url)
    before = listed(cache)
    assert len(before) > 20
    assert verify(cache, deep=True) == []
    for item in before:
        cache.pin("run", item.summary.kind, [item.summary.key])
    left = garbage(cache, grace=NO_GRACE)
    assert left, "no kill fell into a shard"
    collect(cache, left)
    assert garbage(cache, grace=NO_GRACE) == []
    assert [row.summary for row in listed(cache)] == [row.summary for row in before]
    assert verify(cache, deep=True) == []


@pytest.mark.s3
def test_a_server_that_dies_and_comes_back_in_the_middle_of_a_write_loses_nothing(
    tmp_path: Path,
) -> None:
    with s3_server(tmp_path) as server:
        cache = Cache(f"s3://{BUCKET}/cache")
        filled(cache, "before")
        identity = rollout_identity("during")
        attempt = cache.attempt(key_of(identity))
        server.kill()
        back = threading.Timer(1, server.start)
        back.start()
        try:
            manifest = write_rollouts(attempt, identity)  # waits, and goes on
            assert cache.commit(attempt, manifest)
        finally:
            back.join()
        assert verify(cache, deep=True) == []
        assert len(listed(cache)) == 4


@pytest.mark.s3
def test_a_store_s_credentials_are_in_no_manifest_and_no_error(
    s3: S3Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = Cache(f"s3://{BUCKET}/credentials")
    filled(cache, "one")
    secrets = [s3.environment[f"AWS_{name}"] for name in ("ACCESS_KEY_ID", "SECRET_ACCESS_KEY")]
    stored = b"".join(cache.objects.get(path) for path in paths(cache))
    with pytest.raises(StoreError) as refused:
        list(Cache("s3://no-such-bucket/cache").objects.list("commits"))
    for secret in secrets:
        assert secret.encode() not in stored
        assert secret not in str(refused.value)


def opdcache(*arguments: object) -> "subprocess.CompletedProcess[str]":
    command = [sys.executable, "-m", "opdcache.cli.main", "cache", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


@pytest.mark.slow
def test_the_commands_list_show_verify_copy_and_clean(tmp_path: Path) -> None:
    ours, theirs = tmp_path / "ours", tmp_path / "theirs"
    cache = Cache(str(ours))
    (rollout,) = filled(cache, "one")
    cache.pin("a-run", "rollouts", [rollout.key])

    shown = opdcache("ls", ours)
    assert rollout.key[:12] in shown.stdout
    assert "a-run" in shown.stdout
    assert "3 shards" in shown.stdout
    assert f'"student": "{rollout.identity.student}"' in opdcache("show", ours, rollout.key).stdout
    refused = opdcache("show", ours, "no such key")
    assert (refused.returncode, refused.stderr.count("\n")) == (2, 1)
    assert opdcache("copy", ours, theirs).stdout.startswith("copied 3 shards")
    assert opdcache("verify", theirs, "--deep").stdout == "3 shards checked, 0 wrong\n"
    before = paths(cache)
    said = opdcache("gc", ours, "--dry-run", "--grace-hours", 0).stdout
    assert "would free" in said
    assert paths(cache) == before
    assert "of 2 shards" in opdcache("gc", ours, "--grace-hours", 0).stdout
    assert [item.summary.key for item in listed(cache)] == [rollout.key]
    path = next(p for p in paths(cache) if p.startswith("data"))
    cache.objects.put(path, b"damaged")
    assert opdcache("verify", ours, "--dry-run").returncode == 3
    wrong = opdcache("verify", ours)
    assert wrong.returncode == 3
    assert opdcache("verify", ours).returncode == 0
    assert "not what was committed" in wrong.stderr
    missing = opdcache("ls", tmp_path / "nowhere")
    assert (missing.returncode, missing.stderr.count("\n")) == (2, 1)
