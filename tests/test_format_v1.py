"""The committed cache of format version 1: every later version reads it, and this one writes it."""

import json
from pathlib import Path

import numpy as np
import pytest

import opdcache
from opdcache.identity import digest
from opdcache.schemas.columns import ROLLOUT_COLUMNS, SCORE_ARRAYS
from opdcache.schemas.manifests import ImportIdentity, RolloutManifest, ScoreManifest
from opdcache.store import codec, rollouts
from opdcache.store.cache import Cache, data_prefix
from opdcache.store.encoding import encode_scores
from opdcache.store.scores import GROUP
from opdcache.store.upkeep import verify, with_key

V1 = Path(__file__).parent / "data" / "v1"
EXPECTED = json.loads((V1 / "expected.json").read_text())
KINDS = ("rollouts", "imported")


@pytest.fixture
def cache() -> Cache:
    return Cache(str(V1 / "cache"))


@pytest.fixture
def scored(cache: Cache) -> ScoreManifest:
    (manifest,) = (m for m in with_key(cache, "") if isinstance(m, ScoreManifest))
    return manifest


def stored(name: str) -> np.ndarray:
    return np.asarray(EXPECTED["arrays"][name]["values"])


def test_the_golden_cache_is_sound_and_its_keys_are_made_again_from_their_preimages(
    cache: Cache,
) -> None:
    assert verify(cache, deep=True) == []
    manifests = with_key(cache, "")
    assert {m.kind for m in manifests} == {"rollouts", "scores"}
    for path in (V1 / "cache" / "commits").rglob("*.json"):
        stored_manifest = json.loads(path.read_text())["manifest"]
        # As it is stored: fields that a later release adds are no part of an old key.
        assert digest(stored_manifest["identity"]) == stored_manifest["key"]


def test_the_golden_cache_has_every_array_and_every_column_of_the_format() -> None:
    assert set(EXPECTED["arrays"]) == {spec.name for spec in SCORE_ARRAYS}
    columns = {name for kind in KINDS for row in EXPECTED[kind] for name in row}
    assert columns == {column.name for column in ROLLOUT_COLUMNS}


def rollouts_of(cache: Cache, kind: str) -> RolloutManifest:
    """The golden shard that the rollout stage made, or the one that was imported."""
    found = (m for m in with_key(cache, "") if isinstance(m, RolloutManifest))
    imported = kind == "imported"
    (manifest,) = (m for m in found if isinstance(m.identity, ImportIdentity) == imported)
    return manifest


@pytest.mark.parametrize("kind", KINDS)
def test_the_golden_rollouts_are_read_as_pyarrow_reads_them(cache: Cache, kind: str) -> None:
    manifest = rollouts_of(cache, kind)
    assert cache.read_rollouts(manifest).to_pylist() == EXPECTED[kind]


def test_some_columns_of_rollouts_are_read_beside_those_that_are_hashed(cache: Cache) -> None:
    read = cache.read_rollouts(rollouts_of(cache, "imported"), ["messages", "no such"])
    names = ["prompt_token_ids", "completion_token_ids", "messages"]
    assert read.to_pylist() == [{name: row[name] for name in names} for row in EXPECTED["imported"]]


def test_the_golden_scores_are_read_as_zarr_and_the_documented_lines_read_them(
    scored: ScoreManifest,
) -> None:
    samples = list(opdcache.open_cache(V1 / "cache").scored_by(scored.identity.teacher, ["topk"]))
    offsets, kept = stored("token_offsets"), stored("num_kept")
    u = EXPECTED["attributes"]["step"] * np.cumsum(stored("topk_steps"), axis=0)
    logprobs = -np.where(u < 1, u, np.exp(u - 1))
    ids = stored("rank_ids")[stored("topk_ranks")]
    assert len(samples) == len(offsets) - 1 == 3
    for sample, start, stop in zip(samples, offsets[:-1], offsets[1:], strict=True):
        topk = sample.scores.topk
        assert topk is not None
        for t in range(start, stop):
            n = kept[t]
            assert topk.num_kept[t - start] == n > 0
            assert topk.ids[t - start, :n].tolist() == ids[:n, t].tolist()
            np.testing.assert_allclose(topk.logprobs[t - start, :n], logprobs[:n, t], rtol=1e-6)
            assert topk.tail_logprobs[t - start] == stored("tail_logprobs")[t]


def test_what_is_read_of_the_golden_cache_is_written_again_to_the_byte(
    cache: Cache, scored: ScoreManifest
) -> None:
    opened = cache.open_scores(scored)
    scores = opened.read(frozenset(scored.identity.columns))
    attributes = {k: v for k, v in opened.attributes.items() if k not in ("step", "clip_floor")}
    assert EXPECTED["attributes"]["clip_floor"] == codec.clip_floor(scored.identity.step)
    encoded = encode_scores(scores, step=scored.identity.step, attributes=attributes)
    assert {entry.path for entry in scored.objects} == {f"{GROUP}/{path}" for path in encoded}
    for path, data in encoded.items():
        place = f"{data_prefix(scored.key, scored.attempt)}/{GROUP}/{path}"
        assert data == cache.objects.get(place), path


@pytest.mark.parametrize("kind", KINDS)
def test_the_golden_rollouts_are_written_again_to_the_byte(cache: Cache, kind: str) -> None:
    manifest = rollouts_of(cache, kind)
    place = f"{data_prefix(manifest.key, manifest.attempt)}/{rollouts.FILE}"
    assert rollouts.encode_rollouts(cache.read_rollouts(manifest)) == cache.objects.get(place)
