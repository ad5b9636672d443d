"""The cache: commits, damage, what serves a requirement, pins."""

import json
import random
import threading
from pathlib import Path

import pytest

from opdcache.errors import (
    ChecksumMismatch,
    IntegrityError,
    InvalidShard,
    ObjectMissing,
    UnknownSchema,
)
from opdcache.identity import canonical_json, digest, key_of
from opdcache.schemas.columns import SCORE_COLUMNS
from opdcache.schemas.manifests import (
    AS_SAMPLED,
    RolloutManifest,
    ScoreManifest,
    ScoreRequirement,
)
from opdcache.schemas.rounds import RolloutShard
from opdcache.store.cache import Cache, rollout_commit, score_commit

from .shards import (
    TEACHER,
    VOCAB_SIZE,
    commit_rollouts,
    commit_scores,
    rollout_identity,
    table,
    write_rollouts,
)

KEY = "ab" * 32


@pytest.fixture
def cache(store_url: str) -> Cache:
    return Cache(store_url)


def need(*columns: str, **changes: object) -> ScoreRequirement:
    fields: dict[str, object] = {
        "teacher": TEACHER,
        "rendering": AS_SAMPLED,
        "dtype": "float32",
        "columns": columns,
        "k": 4,
        "mass": 1.0,
        "num_ids": VOCAB_SIZE,
        "step": 1 / 256,
    }
    return ScoreRequirement.model_validate(fields | changes)


def paths(cache: Cache, prefix: str) -> set[str]:
    return {info.path for info in cache.objects.list(prefix)}


def files(cache: Cache) -> list[str]:
    """Every object of the cache's shards."""
    prefixes = ("commits", "data")
    return sorted(info.path for prefix in prefixes for info in cache.objects.list(prefix))


def restate(cache: Cache, path: str, **changes: object) -> None:
    """Rewrite a manifest with other fields and a checksum that fits them."""
    body = json.loads(cache.objects.get(path))["manifest"] | changes
    cache.objects.put(path, canonical_json({"manifest": body, "sha256": digest(body)}))


# Commits


def test_a_committed_shard_is_found_and_read_back(cache: Cache) -> None:
    manifest = commit_rollouts(cache, rows=table([5, 6], [7]))

    assert cache.rollouts(manifest.key) == manifest
    rows = cache.read_rollouts(manifest)
    assert rows.column("completion_token_ids").to_pylist() == [[5, 6], [7]]


def test_a_shard_that_was_never_committed_is_not_there(cache: Cache) -> None:
    assert cache.rollouts(KEY) is None
    assert cache.score_sets("content", TEACHER) == []


def test_a_worker_that_dies_before_its_manifest_leaves_no_shard(cache: Cache) -> None:
    identity = rollout_identity()
    write_rollouts(cache.attempt(key_of(identity)), identity)

    assert cache.rollouts(key_of(identity)) is None
    assert cache.committed_rollouts([key_of(identity)]) == {}
    assert paths(cache, "data")


def test_the_first_writer_wins_and_the_loser_s_objects_are_gone(cache: Cache) -> None:
    identity = rollout_identity()
    first, second = cache.attempt(key_of(identity)), cache.attempt(key_of(identity))
    kept = write_rollouts(first, identity, table([1], []))
    lost = write_rollouts(second, identity, table([2], []))

    assert cache.commit(first, kept)
    assert not cache.commit(second, lost)

    assert cache.rollouts(kept.key) == kept
    assert cache.read_rollouts(kept).column("completion_token_ids").to_pylist() == [[1], []]
    assert {path.split("/")[3] for path in paths(cache, "data")} == {first.name}


def test_of_many_writers_at_once_exactly_one_wins(cache: Cache) -> None:
    identity, barrier, won = rollout_identity(), threading.Barrier(8), []
    attempts = [cache.attempt(key_of(identity)) for _ in range(8)]
    manifests = [write_rollouts(attempt, identity) for attempt in attempts]

    def write(place: int) -> None:
        barrier.wait()
        if cache.commit(attempts[place], manifests[place]):
            won.append(place)

    threads = [threading.Thread(target=write, args=(place,)) for place in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    assert len(won) == 1
    assert cache.rollouts(key_of(identity)) == manifests[won[0]]
    assert {path.split("/")[3] for path in paths(cache, "data")} == {attempts[won[0]].name}


def test_committed_rollouts_are_those_of_the_keys_that_are_there(cache: Cache) -> None:
    one, two = commit_rollouts(cache, "one"), commit_rollouts(cache, "two")

    assert cache.committed_rollouts([two.key, KEY, one.key]) == {one.key: one, two.key: two}


def test_a_second_process_sees_what_the_first_committed(tmp_path: Path) -> None:
    cache = Cache(str(tmp_path))
    manifest = commit_rollouts(cache)

    assert Cache(cache.objects.url).rollouts(manifest.key) == manifest


def test_a_commit_whose_answer_was_lost_on_the_way_is_still_the_shard(
    cache: Cache, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A store that tries again after a lost answer meets its own first write."""
    identity = rollout_identity()
    attempt = cache.attempt(key_of(identity))
    manifest = write_rollouts(attempt, identity)
    create = cache.objects.create

    def twice(path: str, data: bytes) -> bool:
        create(path, data)
        return create(path, data)

    monkeypatch.setattr(cache.objects, "create", twice)

    assert cache.commit(attempt, manifest)
    assert cache.read_rollouts(manifest).num_rows == 2


# Damage


def shard(manifest: RolloutManifest, **changes: object) -> RolloutShard:
    fields: dict[str, object] = {
        "key": manifest.key,
        "content": manifest.content,
        "task": "t",
        "num_rows": 2,
        "num_tokens": 3,
        "cached": False,
    }
    return RolloutShard.model_validate(fields | changes)


def read_everything(cache: Cache, rollout: RolloutManifest, scores: ScoreManifest) -> None:
    """What a stage does with a shard and its scores, from their pinned names alone."""
    cache.read_rollouts(cache.need_rollouts(shard(rollout)))
    served = cache.serve(rollout.content, need(*SCORE_COLUMNS))
    if served is None:
        raise ObjectMissing("no score set")
    assert served[0][0].key == scores.key
    cache.open_score_set(rollout.content, TEACHER, [columns for _, columns in served]).read()


def test_a_flipped_bit_in_any_file_of_a_shard_is_detected(cache: Cache) -> None:
    rollout = commit_rollouts(cache)
    scores = commit_scores(cache, rollout, *SCORE_COLUMNS)
    read_everything(cache, rollout, scores)
    rng = random.Random(0)

    assert len(files(cache)) > 15
    for file in files(cache):
        original = cache.objects.get(file)
        for _ in range(4):
            damaged = bytearray(original)
            damaged[rng.randrange(len(damaged))] ^= 1 << rng.randrange(8)
            cache.objects.put(file, bytes(damaged))
            with pytest.raises((IntegrityError, ObjectMissing)) as caught:
                read_everything(cache, rollout, scores)
            assert len(str(caught.value).splitlines()) == 1
        cache.objects.put(file, original)
    read_everything(cache, rollout, scores)


def test_a_flipped_bit_anywhere_in_a_manifest_is_detected(cache: Cache) -> None:
    manifest = commit_rollouts(cache)
    file = rollout_commit(manifest.key)
    original = cache.objects.get(file)

    for place in range(0, len(original), 3):
        damaged = bytearray(original)
        damaged[place] ^= 1 << (place % 8)
        cache.objects.put(file, bytes(damaged))
        with pytest.raises(IntegrityError):
            cache.rollouts(manifest.key)


@pytest.mark.parametrize("extra", [b"\n", b" "])
def test_a_byte_added_to_a_manifest_is_detected(cache: Cache, extra: bytes) -> None:
    manifest = commit_rollouts(cache)
    path = rollout_commit(manifest.key)
    cache.objects.put(path, cache.objects.get(path) + extra)

    with pytest.raises(ChecksumMismatch):
        cache.rollouts(manifest.key)


def test_a_number_in_a_manifest_that_became_infinite_is_detected(cache: Cache) -> None:
    manifest = commit_rollouts(cache)
    path = rollout_commit(manifest.key)
    restate(cache, path, num_tokens=12345)
    sound = cache.objects.get(path)
    damaged = sound.replace(b'"num_tokens":12345', b'"num_tokens":1e345')  # one byte
    assert sum(a != b for a, b in zip(sound, damaged, strict=True)) == 1
    cache.objects.put(path, damaged)

    with pytest.raises(IntegrityError):
        cache.rollouts(manifest.key)


def test_a_cut_off_file_is_detected(cache: Cache) -> None:
    rollout = commit_rollouts(cache)
    scores = commit_scores(cache, rollout, *SCORE_COLUMNS)

    for file in files(cache):
        original = cache.objects.get(file)
        for length in (0, len(original) // 2, len(original) - 1):
            cache.objects.put(file, original[:length])
            with pytest.raises((IntegrityError, ObjectMissing)):
                read_everything(cache, rollout, scores)
        cache.objects.put(file, original)


def test_a_missing_file_of_a_shard_is_detected(cache: Cache) -> None:
    rollout = commit_rollouts(cache)
    scores = commit_scores(cache, rollout, *SCORE_COLUMNS)

    for file in files(cache):
        original = cache.objects.get(file)
        cache.objects.delete(file)
        with pytest.raises(ObjectMissing):
            read_everything(cache, rollout, scores)
        cache.objects.put(file, original)


def test_a_changed_object_is_named_with_both_checksums(cache: Cache) -> None:
    manifest = commit_rollouts(cache)
    path = f"data/{manifest.key[:2]}/{manifest.key}/{manifest.attempt}/rollouts.parquet"
    cache.objects.put(path, b"other bytes")

    with pytest.raises(ChecksumMismatch) as caught:
        cache.read_rollouts(manifest)

    said = str(caught.value)
    assert path in said
    assert manifest.objects[0].sha256[:12] in said
    assert "11 bytes" in said


def test_a_manifest_of_a_later_version_is_refused(cache: Cache) -> None:
    manifest = commit_rollouts(cache)
    restate(cache, rollout_commit(manifest.key), schema_version=2, novelty=1)

    with pytest.raises(UnknownSchema, match=r"got 2\); upgrade opdcache"):
        cache.rollouts(manifest.key)


def test_a_manifest_with_an_unknown_field_is_refused(cache: Cache) -> None:
    manifest = commit_rollouts(cache)
    restate(cache, rollout_commit(manifest.key), novelty=1)

    with pytest.raises(UnknownSchema):
        cache.rollouts(manifest.key)


def test_a_manifest_whose_key_is_not_its_identity_s_is_refused(cache: Cache) -> None:
    manifest = commit_rollouts(cache)
    restate(cache, rollout_commit(manifest.key), key=KEY)

    with pytest.raises(InvalidShard, match="not of its key"):
        cache.rollouts(manifest.key)


def test_a_manifest_that_lies_under_another_key_is_refused(cache: Cache) -> None:
    one, two = commit_rollouts(cache, "one"), commit_rollouts(cache, "two")
    cache.objects.put(rollout_commit(one.key), cache.objects.get(rollout_commit(two.key)))

    with pytest.raises(IntegrityError):
        cache.rollouts(one.key)


def test_a_score_manifest_in_place_of_a_rollout_one_is_refused(cache: Cache) -> None:
    rollout = commit_rollouts(cache)
    scores = commit_scores(cache, rollout, "sampled")
    data = cache.objects.get(score_commit(rollout.content, TEACHER, scores.key))
    cache.objects.put(rollout_commit(rollout.key), data)

    with pytest.raises(InvalidShard):
        cache.rollouts(rollout.key)


def test_a_table_with_other_tokens_than_the_manifest_states_is_refused(cache: Cache) -> None:
    manifest = commit_rollouts(cache)
    restate(cache, rollout_commit(manifest.key), content="0" * 64)
    stated = cache.rollouts(manifest.key)
    assert stated is not None

    with pytest.raises(InvalidShard, match="content hash"):
        cache.read_rollouts(stated)


def test_scores_of_another_number_of_tokens_than_stated_are_refused(cache: Cache) -> None:
    rollout = commit_rollouts(cache)
    scores = commit_scores(cache, rollout, "sampled")
    restate(cache, score_commit(rollout.content, TEACHER, scores.key), num_tokens=4)
    (stated,) = cache.score_sets(rollout.content, TEACHER)

    with pytest.raises(InvalidShard, match=r"expected 4, got 3"):
        cache.open_scores(stated)


def test_a_shard_that_was_generated_anew_is_not_the_pinned_one(cache: Cache) -> None:
    manifest = commit_rollouts(cache)

    with pytest.raises(InvalidShard, match="other tokens"):
        cache.need_rollouts(shard(manifest, content="0" * 64))


def test_a_pinned_shard_that_is_gone_is_named(cache: Cache) -> None:
    manifest = commit_rollouts(cache)
    cache.objects.delete(rollout_commit(manifest.key))

    with pytest.raises(ObjectMissing, match=manifest.key):
        cache.need_rollouts(shard(manifest))


# What serves a requirement


@pytest.fixture
def rollout(cache: Cache) -> RolloutManifest:
    return commit_rollouts(cache)


def served_by(cache: Cache, rollout: RolloutManifest, asked: ScoreRequirement) -> list[str] | None:
    served = cache.serve(rollout.content, asked)
    return None if served is None else [manifest.key for manifest, _ in served]


def test_the_very_set_serves(cache: Cache, rollout: RolloutManifest) -> None:
    scores = commit_scores(cache, rollout, "sampled", "topk")

    assert served_by(cache, rollout, need("sampled", "topk")) == [scores.key]


@pytest.mark.parametrize("better", [{"k": 9}, {"step": 1 / 1024}])
def test_a_richer_set_serves(
    cache: Cache, rollout: RolloutManifest, better: dict[str, float]
) -> None:
    scores = commit_scores(cache, rollout, *SCORE_COLUMNS, **better)  # type: ignore[arg-type]

    assert served_by(cache, rollout, need("topk", "student_topk")) == [scores.key]


def test_entries_kept_among_other_ids_do_not_serve(cache: Cache) -> None:
    rollout = commit_rollouts(cache)
    scores = commit_scores(cache, rollout, *SCORE_COLUMNS)

    assert served_by(cache, rollout, need("topk", num_ids=VOCAB_SIZE - 1)) is None
    assert served_by(cache, rollout, need("sampled", num_ids=VOCAB_SIZE - 1)) == [scores.key]


def test_a_set_with_a_higher_mass_threshold_serves(cache: Cache, rollout: RolloutManifest) -> None:
    scores = commit_scores(cache, rollout, "topk", mass=0.99)

    assert served_by(cache, rollout, need("topk", mass=0.9)) == [scores.key]
    assert served_by(cache, rollout, need("topk", mass=1.0)) is None


@pytest.mark.parametrize("poorer", [{"k": 3}, {"step": 1 / 128}, {"mass": 0.9}])
def test_a_poorer_set_does_not_serve(
    cache: Cache, rollout: RolloutManifest, poorer: dict[str, float]
) -> None:
    commit_scores(cache, rollout, "topk", **poorer)  # type: ignore[arg-type]

    assert served_by(cache, rollout, need("topk")) is None


def test_more_draws_serve_and_fewer_do_not(cache: Cache, rollout: RolloutManifest) -> None:
    scores = commit_scores(cache, rollout, "draws", draws=3)

    assert served_by(cache, rollout, need("draws", draws=2)) == [scores.key]
    assert served_by(cache, rollout, need("draws", draws=4)) is None
    assert served_by(cache, rollout, need("draws", draws=2, num_ids=VOCAB_SIZE - 1)) is None


def test_k_and_mass_matter_to_the_top_k_alone(cache: Cache, rollout: RolloutManifest) -> None:
    scores = commit_scores(cache, rollout, *SCORE_COLUMNS, k=1, mass=0.5)

    asked = need("sampled", "entropy", "student_topk", k=4, mass=1.0)
    assert served_by(cache, rollout, asked) == [scores.key]


@pytest.mark.parametrize(
    "other", [{"teacher": "8" * 64}, {"dtype": "bfloat16"}, {"rendering": "own template"}]
)
def test_another_teacher_s_set_does_not_serve(
    cache: Cache, rollout: RolloutManifest, other: dict[str, str]
) -> None:
    commit_scores(cache, rollout, *SCORE_COLUMNS, **other)  # type: ignore[arg-type]

    assert served_by(cache, rollout, need("sampled")) is None


def test_a_set_of_other_tokens_does_not_serve(cache: Cache, rollout: RolloutManifest) -> None:
    other = commit_rollouts(cache, "b", table([9], []))
    commit_scores(cache, other, "sampled")

    assert served_by(cache, rollout, need("sampled")) is None


def test_a_set_that_lacks_a_column_does_not_serve(cache: Cache, rollout: RolloutManifest) -> None:
    commit_scores(cache, rollout, "sampled")

    assert served_by(cache, rollout, need("sampled", "entropy")) is None


def test_columns_can_come_from_different_sets(cache: Cache, rollout: RolloutManifest) -> None:
    one = commit_scores(cache, rollout, "sampled", "entropy")
    two = commit_scores(cache, rollout, "topk", k=9)

    served = cache.serve(rollout.content, need("entropy", "topk"))

    assert served is not None
    assert {(columns.key, columns.columns) for _, columns in served} == {
        (one.key, ("entropy",)),
        (two.key, ("topk",)),
    }
    scores = cache.open_score_set(
        rollout.content, TEACHER, [columns for _, columns in served]
    ).read()
    assert scores.columns == {"entropy", "topk"}
    assert scores.topk is not None
    assert scores.topk.ids.shape == (3, 9)


def test_one_set_serves_where_one_can(cache: Cache, rollout: RolloutManifest) -> None:
    commit_scores(cache, rollout, "sampled")
    commit_scores(cache, rollout, "topk")
    both = commit_scores(cache, rollout, "sampled", "topk")

    assert served_by(cache, rollout, need("sampled", "topk")) == [both.key]


# Pins


def test_pins_of_a_run_accumulate(cache: Cache) -> None:
    cache.pin("run", "rollouts", ["b"])
    cache.pin("run", "rollouts", ["a"])
    cache.pin("run", "scores", ["s"])
    cache.pin("other", "rollouts", ["z"])

    assert cache.pins("run") == {"rollouts": {"a", "b"}, "scores": {"s"}}
    assert cache.pins("other") == {"rollouts": {"z"}}
