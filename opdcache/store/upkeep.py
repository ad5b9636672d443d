"""Keeping a cache: what is in it, whether it is sound, what may go, and copying it elsewhere.

Everything is decided by manifests and pins; nothing here knows a run's folder.
"""

import json
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from datetime import datetime, timedelta

import numpy as np
import pyarrow as pa

from ..errors import InvalidShard, ObjectMissing, OpdcacheError
from ..schemas.manifests import RolloutManifest, ScoreManifest
from . import rollouts
from .cache import Cache, commit_path, data_prefix
from .scores import Scores

AnyManifest = RolloutManifest | ScoreManifest
_MASS_SLACK = 0.02
"""Kept log-probs and tail are rounded; their mass may exceed 1 by this."""


@dataclass(frozen=True, slots=True)
class Listed:
    """A committed shard."""

    manifest: AnyManifest
    committed_at: datetime
    used_by: tuple[str, ...]

    @property
    def size_bytes(self) -> int:
        """Bytes of its objects."""
        return sum(entry.size_bytes for entry in self.manifest.objects)


@dataclass(frozen=True, slots=True)
class Problem:
    """A shard, or what should be one, that is not sound."""

    path: str
    reason: str


@dataclass(frozen=True, slots=True)
class Garbage:
    """What a clean-up takes away: commits first, then objects, so that no shard is half there."""

    reason: str
    commit: str | None
    objects: tuple[str, ...]
    size_bytes: int


@dataclass(slots=True)
class Copied:
    """What a copy did: shards and bytes copied, shards that were there, and what stayed behind."""

    shards: int = 0
    size_bytes: int = 0
    present: int = 0
    left_behind: dict[str, int] = field(default_factory=dict)


def listed(cache: Cache) -> list[Listed]:
    """Every committed shard, rollouts first, oldest first.

    Raises:
        IntegrityError: a manifest is not what was committed; ``verify`` names them all.
    """
    users = pinned(cache)
    found = [
        Listed(manifest, at, tuple(sorted(users.get((manifest.kind, manifest.key), ()))))
        for path, at in _commits(cache)
        if (manifest := cache.manifest(path)) is not None
    ]
    return sorted(found, key=lambda one: (one.manifest.kind, one.committed_at, one.manifest.key))


def pinned(cache: Cache) -> dict[tuple[str, str], set[str]]:
    """Runs that use a shard, by its kind and key."""
    users: dict[tuple[str, str], set[str]] = defaultdict(set)
    for run in {info.path.split("/")[1] for info in cache.objects.list("runs")}:
        for kind, keys in cache.pins(run).items():
            for key in keys:
                users[kind, key].add(run)
    return users


def verify(
    cache: Cache, *, deep: bool = False, advance: Callable[[], None] = lambda: None
) -> list[Problem]:
    """Everything that is not what was committed.

    Args:
        deep: decode every shard too, and hold it against the format and its rollouts.
        advance: called after every shard.
    """
    problems = []
    for path, _ in sorted(_commits(cache)):
        try:
            manifest = cache.manifest(path)
            if manifest is not None:
                cache.check(manifest)
                if deep:
                    _check_contents(cache, manifest)
        except OpdcacheError as error:
            problems.append(Problem(path, str(error)))
        advance()
    return problems


def garbage(cache: Cache, *, grace: timedelta = timedelta(hours=24)) -> list[Garbage]:
    """What no run uses and nobody is making: unused shards, and attempts that were given up.

    Nothing that a run pins or a claim holds is listed, and nothing younger than the grace period,
    by the store's own clock.
    """
    now = cache.objects.now()
    users, claimed = pinned(cache), _claimed(cache, now - grace)
    objects: dict[tuple[str, str], list[tuple[str, int]]] = defaultdict(list)
    newest: dict[tuple[str, str], datetime] = {}
    for info in cache.objects.list("data"):
        _, _, key, attempt, _ = info.path.split("/", 4)
        objects[key, attempt].append((info.path, info.size_bytes))
        newest[key, attempt] = max(
            info.last_modified, newest.get((key, attempt), info.last_modified)
        )
    found, committed = [], set()
    for path, at in _commits(cache):
        manifest = cache.manifest(path)
        if manifest is None:
            continue
        place = (manifest.key, manifest.attempt)
        committed.add(place)
        used = (manifest.kind, manifest.key) in users or manifest.key in claimed
        if not used and at < now - grace:
            found.append(_garbage("no run uses it", path, objects.get(place, [])))
    for place, paths in objects.items():
        if place not in committed and place[0] not in claimed and newest[place] < now - grace:
            found.append(_garbage("an attempt that was not committed", None, paths))
    found += [
        _garbage("a write that was cut short", None, [(left.path, left.size_bytes)])
        for left in cache.objects.leftovers()
        if left.last_modified < now - grace
    ]
    return found


def collect(cache: Cache, found: list[Garbage]) -> None:
    """Take garbage away."""
    for item in found:
        if item.commit is not None:
            cache.objects.delete(item.commit)
        for path in item.objects:
            cache.objects.delete(path)


def copy(source: Cache, destination: Cache, say: Callable[[str], None] = lambda _: None) -> Copied:
    """Bring every shard of a cache to another, checked on the way.

    Where both hold a rollout key with other tokens, the destination's stays, and the scores of the
    other tokens are left behind, counted.

    Raises:
        IntegrityError: a shard of the source is not what was committed.
    """
    done = Copied()
    for path, _ in sorted(_commits(source), key=lambda commit: commit[0]):
        manifest = source.manifest(path)
        if manifest is None:
            continue
        reason = _unwelcome(destination, manifest)
        if reason is not None:
            done.left_behind[reason] = done.left_behind.get(reason, 0) + 1
        elif destination.manifest(path) is not None:
            done.present += 1
        else:
            _copy_shard(source, destination, manifest)
            done.shards += 1
            done.size_bytes += sum(entry.size_bytes for entry in manifest.objects)
            say(f"copied {manifest.kind} {manifest.key[:12]}")
    return done


def _copy_shard(source: Cache, destination: Cache, manifest: AnyManifest) -> None:
    prefix = data_prefix(manifest.key, manifest.attempt)
    for path, data in source.objects_of(manifest).items():
        destination.objects.put(f"{prefix}/{path}", data)
    path = commit_path(manifest)
    destination.objects.create(path, source.objects.get(path))


def _unwelcome(destination: Cache, manifest: AnyManifest) -> str | None:
    """Why a shard is left behind; rollouts come before their scores."""
    if isinstance(manifest, RolloutManifest):
        there = destination.rollouts(manifest.key)
        if there is not None and there.content != manifest.content:
            return "rollouts whose key has other tokens in the destination"
        return None
    there = destination.rollouts(manifest.rollout_key)
    if there is None or there.content != manifest.identity.content:
        return "scores of tokens that the destination does not have"
    return None


def _commits(cache: Cache) -> Iterator[tuple[str, datetime]]:
    for info in cache.objects.list("commits"):
        yield info.path, info.last_modified


def _claimed(cache: Cache, since: datetime) -> set[str]:
    """Keys with a claim that beat since then."""
    claims = cache.objects.list("claims")
    return {i.path.rsplit("/", 1)[1].rpartition(".")[0] for i in claims if i.last_modified >= since}


def _garbage(reason: str, commit: str | None, objects: list[tuple[str, int]]) -> Garbage:
    return Garbage(reason, commit, tuple(p for p, _ in objects), sum(size for _, size in objects))


def _check_contents(cache: Cache, manifest: AnyManifest) -> None:
    """A decoded shard against the format, its manifest and, for scores, its rollouts.

    Raises:
        InvalidShard: it contradicts one of them.
    """
    where = cache.objects.at(commit_path(manifest))
    if isinstance(manifest, RolloutManifest):
        faults = _rollout_faults(cache.read_rollouts(manifest), manifest)
    else:
        rollout = cache.rollouts(manifest.rollout_key)
        if rollout is None or rollout.content != manifest.identity.content:
            raise ObjectMissing("the rollouts of these scores are gone", where=where)
        opened = cache.open_scores(manifest)
        offsets = rollouts.token_offsets(cache.read_rollouts(rollout))
        faults = _score_faults(opened.read(frozenset(manifest.identity.columns)), offsets, manifest)
    for fault, is_so in faults.items():
        if is_so:
            raise InvalidShard(fault, where=where)


def _rollout_faults(table: pa.Table, manifest: RolloutManifest) -> dict[str, bool]:
    offsets = rollouts.token_offsets(table)
    lengths = np.diff(offsets)
    per_token = [f.name for f in table.schema if f.name.endswith(("_logprobs", "topk_ids"))]
    ids = np.concatenate(
        [
            rollouts.flat_tokens(table, name, np.int64).reshape(-1)
            for name in ("prompt_token_ids", "completion_token_ids")
        ]
    )
    counted = (table.num_rows, int(offsets[-1])) == (manifest.num_rows, manifest.num_tokens)
    return {
        "row or token count differs from the manifest's": not counted,
        "a list has not an entry a token": any(
            np.any(np.asarray(table.column(n).combine_chunks().value_lengths()) != lengths)
            for n in per_token
        ),
        "an id is not in the vocabulary": bool(np.any((ids < 0) | (ids >= manifest.vocab_size))),
        "a sampled log-prob is above 0 or not finite": any(
            not bool(np.all(rollouts.flat_tokens(table, n, np.float32) <= 1e-3))
            for n in ("behavior_logprobs", "sampling_logprobs")
        ),
    }


def _score_faults(
    scores: Scores, offsets: "np.ndarray[tuple[int], np.dtype[np.int64]]", manifest: ScoreManifest
) -> dict[str, bool]:
    faults = {
        "token offsets are not those of the rollouts": not np.array_equal(
            scores.token_offsets, offsets
        ),
        "a column of the identity is not stored": scores.columns != set(manifest.identity.columns),
    }
    topk = scores.topk
    if topk is not None:
        kept = topk.kept
        held = np.where(kept, np.exp(topk.logprobs), 0).sum(axis=1) + np.exp(topk.tail_logprobs)
        filled = np.where(kept, topk.ids, -1 - np.arange(kept.shape[1]))
        distinct = np.diff(np.sort(filled, axis=1), axis=1)
        outside = (topk.ids < 0) | (topk.ids >= manifest.vocab_size)
        faults |= {
            "more entries are kept than there are": bool(np.any(topk.num_kept > kept.shape[1])),
            "kept log-probs do not descend": bool(
                np.any((np.diff(topk.logprobs, axis=1) > 0) & kept[:, 1:])
            ),
            "entries and tail hold more than all mass": bool(np.any(held > 1 + _MASS_SLACK)),
            "an id is not in the vocabulary": bool(np.any(outside & kept)),
            "a token keeps an id twice": bool(np.any(distinct == 0)),
        }
    return faults


def preimage(manifest: AnyManifest) -> str:
    """What a shard's key was made of, and who made it, as indented JSON."""
    shown = manifest.model_dump(mode="json", exclude={"objects"})
    return json.dumps(shown, indent=2, ensure_ascii=False)
