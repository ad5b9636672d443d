"""Keeping a cache: what is in it, whether it is sound, what may go, and copying it elsewhere.

Everything is decided by manifests and pins; nothing here knows a run's folder.
"""

import json
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from typing import NamedTuple

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from ..errors import (
    InputsMissing,
    IntegrityError,
    InvalidShard,
    NotAllowed,
    ObjectMissing,
    OpdcacheError,
    UnknownSchema,
)
from ..schemas.manifests import ImportIdentity, RolloutManifest, ScoreManifest
from . import index, rollouts
from .cache import Cache, commit_path, shard_key
from .index import Summary, summaries
from .objects import ObjectInfo
from .scores import Scores

AnyManifest = RolloutManifest | ScoreManifest
_MASS_SLACK = 0.02
"""Kept log-probs and tail are rounded; their mass may exceed 1 by this."""


class Listed(NamedTuple):
    """A committed shard, when it was committed, and which runs use it."""

    summary: Summary
    committed_at: datetime
    used_by: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Problem:
    """A shard, or what should be one, that is not sound.

    Attributes:
        is_wrong: it is not what was committed; else it is only of no use as things stand.
    """

    path: str
    reason: str
    is_wrong: bool = True


@dataclass(frozen=True, slots=True)
class Garbage:
    """What a clean-up takes away: the commit first, then objects, so that no shard is half there.

    Attributes:
        key: of the shard; empty when it is no shard.
        commit: path of the manifest, when there is one.
    """

    reason: str
    key: str
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
    damaged: list[Problem] = field(default_factory=list)


def listed(cache: Cache) -> list[Listed]:
    """Every committed shard, rollouts first, oldest first.

    Raises:
        IntegrityError: a manifest is not what was committed; ``verify`` names them all.
    """
    users = pinned(cache)
    commits = {info.path: info for info in _commits(cache)}
    found = [
        Listed(
            one, commits[one.path].last_modified, tuple(sorted(users.get((one.kind, one.key), ())))
        )
        for one in summaries(cache, commits.values())
    ]
    return sorted(found, key=lambda one: (one.summary.kind, one.committed_at, one.summary.key))


def with_key(cache: Cache, start: str) -> list[AnyManifest]:
    """Manifests of the shards whose key starts so."""
    named = [info.path for info in _commits(cache) if shard_key(info.path).startswith(start)]
    return [manifest for path in named if (manifest := cache.manifest(path)) is not None]


def pinned(cache: Cache) -> dict[tuple[str, str], set[str]]:
    """Runs that use a shard, by its kind and key."""
    users: dict[tuple[str, str], set[str]] = defaultdict(set)
    for run in _runs(cache):
        for kind, keys in cache.pins(run).items():
            for key in keys:
                users[kind, key].add(run)
    return users


def verify(
    cache: Cache,
    *,
    deep: bool = False,
    quarantine: bool = False,
    advance: Callable[[], None] = lambda: None,
) -> list[Problem]:
    """Everything that is not what was committed.

    Args:
        deep: decode every shard too, and hold it against the format and its rollouts.
        quarantine: put wrong shards aside, so that the next stage makes them anew.
        advance: called after every shard.
    """
    problems = []
    for run in _runs(cache):
        try:
            cache.pins(run)
        except OpdcacheError as error:
            problems.append(Problem(f"runs/{run}", str(error)))
    problems += [
        Problem(path, "not what was written; delete it")
        for folder in ("quarantine", index.FOLDER)
        for path, data in index.objects_below(cache, folder)
        if not index.is_named_by_its_hash(path, data)
    ]
    for path in sorted(info.path for info in _commits(cache)):
        try:
            _check(cache, path, deep)
        except OpdcacheError as error:
            problems.append(
                Problem(path, str(error), is_wrong=not isinstance(error, InputsMissing))
            )
            if quarantine and _is_wrong(error):
                _put_aside(cache, path, deep)
        advance()
    return problems


@contextmanager
def quarantining(cache: Cache) -> Iterator[None]:
    """A shard that is found wrong within the block, and still is at a second look, is put aside."""
    try:
        yield
    except OpdcacheError as error:
        if error.commit is not None and _is_wrong(error):
            with suppress(NotAllowed):  # another user's to put aside
                _put_aside(cache, error.commit, deep=True)
        raise


def _put_aside(cache: Cache, path: str, deep: bool) -> None:
    """Put a shard aside that is wrong at a second look too, unless somebody makes it anew."""
    with cache.claims.hold(path.split("/")[1], shard_key(path)) as mine:
        if not mine:
            return
        try:
            _check(cache, path, deep)
        except OpdcacheError as error:
            if _is_wrong(error) and error.commit in (None, path):
                cache.put_aside(path, str(error))


def _is_wrong(error: OpdcacheError) -> bool:
    """Whether an error means that a shard is not what was committed; not so a later version's."""
    return isinstance(error, IntegrityError | ObjectMissing) and not isinstance(
        error, UnknownSchema
    )


def _check(cache: Cache, path: str, deep: bool) -> None:
    """One shard against its manifest, and when looking deep against the format.

    Raises:
        OpdcacheError: it is not what was committed, or that cannot be told.
    """
    manifest = cache.manifest(path)
    if manifest is None:
        return
    cache.files_of(manifest)
    if deep:
        _check_contents(cache, manifest)


def garbage(cache: Cache, *, grace: timedelta = timedelta(hours=24)) -> list[Garbage]:
    """What no run uses and nobody is making: unused shards, and attempts that were given up.

    Nothing that a run pins or a claim holds is listed, and nothing younger than the grace period,
    by the store's own clock.

    Raises:
        IntegrityError: a manifest or a pin is damaged, so that it cannot be said what is used.
    """
    now = cache.objects.now()
    users, claimed = pinned(cache), _claimed(cache, now, grace)
    objects: dict[tuple[str, str], list[tuple[str, int]]] = defaultdict(list)
    newest: dict[tuple[str, str], datetime] = {}
    for info in cache.objects.list("data"):
        parts = info.path.split("/", 4)
        if len(parts) < 5:
            continue  # not ours
        key, attempt = parts[2:4]
        objects[key, attempt].append((info.path, info.size_bytes))
        newest[key, attempt] = max(
            info.last_modified, newest.get((key, attempt), info.last_modified)
        )
    found, committed = [], set()
    for info in _commits(cache):
        path, at = info.path, info.last_modified
        manifest = cache.manifest(path)
        if manifest is None:
            continue
        place = (manifest.key, manifest.attempt)
        committed.add(place)
        used = (manifest.kind, manifest.key) in users or manifest.key in claimed
        if not used and at < now - grace:
            found.append(_garbage("no run uses it", manifest.key, path, objects.get(place, [])))
    for place, paths in objects.items():
        if place not in committed and place[0] not in claimed and newest[place] < now - grace:
            found.append(_garbage("an attempt that was not committed", place[0], None, paths))
    found += [
        _garbage("a write that was cut short", "", None, [(left.path, left.size_bytes)])
        for prefix in ("commits", "data", "claims", "runs", "quarantine", index.FOLDER)
        for left in cache.objects.leftovers(prefix)
        if left.last_modified < now - grace
    ]
    kept_up = now - max(grace, timedelta(seconds=4 * cache.claims.lease_s))
    found += [
        _garbage("a claim of a worker that is gone", "", None, [(info.path, info.size_bytes)])
        for info in cache.objects.list("claims")
        if info.last_modified < kept_up
    ]
    return found


def collect(cache: Cache, found: list[Garbage]) -> list[Garbage]:
    """Take garbage away, but for what a run or a worker took up since it was found.

    Returns:
        What was taken away.
    """
    now = cache.objects.now()
    claimed = _claimed(cache, now, timedelta(0))
    taken_up = {key for _, key in pinned(cache)} | claimed
    # An attempt that was not committed is of no use to a run that pins its key.
    free = [i for i in found if i.key not in (taken_up if i.commit is not None else claimed)]
    committed = _attempts(cache) if free else set()
    gone = []
    for item in free:
        if _is_as_found(item, committed):
            with suppress(NotAllowed):  # another user's
                for path in (*([item.commit] if item.commit is not None else []), *item.objects):
                    cache.objects.delete(path)
                gone.append(item)
    return gone


def _attempts(cache: Cache) -> set[tuple[str, str]]:
    """Key and attempt of every committed shard.

    Raises:
        IntegrityError: a manifest is damaged, so that it cannot be said what is committed.
    """
    found = (cache.manifest(info.path) for info in _commits(cache))
    return {(manifest.key, manifest.attempt) for manifest in found if manifest is not None}


def _is_as_found(item: Garbage, committed: set[tuple[str, str]]) -> bool:
    """Whether nobody committed an attempt, or made a shard anew, since it was found."""
    attempts = {(item.key, path.split("/")[3]) for path in item.objects if item.key}
    if item.commit is None:
        return not attempts & committed
    return attempts <= committed


def copy(source: Cache, destination: Cache, say: Callable[[str], None] = lambda _: None) -> Copied:
    """Bring every shard of a cache to another, checked on the way, and the pins that keep them.

    Where both hold a rollout key with other tokens, the destination's stays, and the scores of the
    other tokens are left behind, counted. A damaged shard is named, and the others are copied.
    """
    done = Copied()
    for run in _runs(source):
        for kind, keys in source.pins(run).items():
            destination.pin(run, kind, keys)  # before the shards: no clean-up comes between
    for path in sorted(info.path for info in _commits(source)):
        try:
            manifest = source.manifest(path)
            if manifest is not None:
                _copy_shard(source, destination, manifest, done, say)
        except (IntegrityError, ObjectMissing) as error:
            done.damaged.append(Problem(path, str(error)))
    return done


def _copy_shard(
    source: Cache,
    destination: Cache,
    manifest: AnyManifest,
    done: Copied,
    say: Callable[[str], None],
) -> None:
    reason = _unwelcome(destination, manifest)
    if reason is not None:
        done.left_behind[reason] = done.left_behind.get(reason, 0) + 1
        return
    if destination.manifest(commit_path(manifest)) is not None:
        done.present += 1
        return
    with destination.claims.hold(manifest.kind, manifest.key):  # against clean-ups
        attempt = destination.attempt(manifest.key)
        for path, file in source.files_of(manifest).items():
            attempt.put(path, file.read(0, file.size_bytes))
        if not destination.commit(attempt, manifest.model_copy(update={"attempt": attempt.name})):
            done.present += 1
            return
    done.shards += 1
    done.size_bytes += sum(entry.size_bytes for entry in manifest.objects)
    say(f"copied {manifest.kind} {manifest.key[:12]}")


def _unwelcome(destination: Cache, manifest: AnyManifest) -> str | None:
    """Why a shard is left behind; rollouts come before their scores."""
    if isinstance(manifest, RolloutManifest):
        there = destination.rollouts(manifest.key)
        if there is not None and there.content != manifest.content:
            return "rollouts whose key has other tokens in the destination"
        return None
    if _scored(destination, manifest) is None:
        return "scores of tokens that the destination does not have"
    return None


def _scored(cache: Cache, scores: ScoreManifest) -> RolloutManifest | None:
    """The rollouts of a score set: those that were scored, or others with the same tokens."""
    there = cache.rollouts(scores.rollout_key)
    if there is not None and there.content == scores.identity.content:
        return there
    for info in cache.objects.list("commits/rollouts"):
        with suppress(IntegrityError):  # a damaged one is named where its turn comes
            other = cache.rollouts(shard_key(info.path))
            if other is not None and other.content == scores.identity.content:
                return other
    return None


def _commits(cache: Cache) -> Iterator[ObjectInfo]:
    return (i for i in cache.objects.list("commits") if i.path.endswith(".json"))


def _runs(cache: Cache) -> list[str]:
    """Ids of the runs that pin something."""
    return sorted({info.path.split("/")[1] for info in cache.objects.list("runs")})


def _claimed(cache: Cache, now: datetime, grace: timedelta) -> set[str]:
    """Keys whose claim beat within the grace, or within a few leases, which is longer."""
    since = now - max(grace, timedelta(seconds=4 * cache.claims.lease_s))
    claims = cache.objects.list("claims")
    return {i.path.rsplit("/", 1)[1].rpartition(".")[0] for i in claims if i.last_modified >= since}


def _garbage(reason: str, key: str, commit: str | None, objects: list[tuple[str, int]]) -> Garbage:
    size_bytes = sum(size for _, size in objects)
    return Garbage(reason, key, commit, tuple(path for path, _ in objects), size_bytes)


def _check_contents(cache: Cache, manifest: AnyManifest) -> None:
    """A decoded shard against the format, its manifest and, for scores, its rollouts.

    Raises:
        InvalidShard: it contradicts one of them.
        InputsMissing: they are scores whose rollouts are gone; nothing is wrong with themselves.
    """
    where = cache.objects.at(commit_path(manifest))
    if isinstance(manifest, RolloutManifest):
        faults = _rollout_faults(cache.read_rollouts(manifest), manifest)
    else:
        rollout = _scored(cache, manifest)
        if rollout is None:
            raise InputsMissing("the rollouts of these scores are gone", where=where)
        opened = cache.open_scores(manifest)
        offsets = rollouts.token_offsets(cache.read_rollouts(rollout))
        faults = _score_faults(opened.read(frozenset(manifest.identity.columns)), offsets, manifest)
    for fault, is_so in faults.items():
        if is_so:
            raise InvalidShard(fault, where=where)


def _rollout_faults(table: pa.Table, manifest: RolloutManifest) -> dict[str, bool]:
    identity, masked = manifest.identity, ~rollouts.supervised_tokens(table)
    offsets = rollouts.token_offsets(table)
    lengths = np.diff(offsets)
    suffixes = ("_logprobs", "topk_ids", "loss_mask")
    per_token = [f.name for f in table.schema if f.name.endswith(suffixes)]
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
            not _are_logprobs(rollouts.flat_tokens(table, n, np.float32), masked)
            for n in ("behavior_logprobs", "sampling_logprobs")
            if n in table.column_names
        ),
        "its columns are not those of its identity": bool(
            manifest.identity.absent & set(table.column_names)
        ),
        "its content is not that of its identity": isinstance(identity, ImportIdentity)
        and identity.content != manifest.content,
    }


def _are_logprobs(values_T: NDArray[np.float32], masked_T: NDArray[np.bool_]) -> bool:
    """Whether these can be log-probs of sampled tokens; those of masked tokens may be missing."""
    if len(values_T) != len(masked_T):
        return False
    given = np.isfinite(values_T) & (values_T <= 1e-3)
    return bool(np.all(given | (masked_T & np.isnan(values_T))))


def _score_faults(
    scores: Scores, offsets: "np.ndarray[tuple[int], np.dtype[np.int64]]", manifest: ScoreManifest
) -> dict[str, bool]:
    faults = {
        "token offsets are not those of the rollouts": not np.array_equal(
            scores.token_offsets, offsets
        ),
        "a column of the identity is not stored": scores.columns != set(manifest.identity.columns),
        "a log-prob or an entropy is not finite": any(
            values is not None and not np.isfinite(values).all()
            for values in (scores.sampled_logprobs, scores.entropy)
        ),
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
            "entries and tail hold more than all mass": bool(np.any(held > 1 + _MASS_SLACK)),
            "an id is not in the vocabulary": bool(np.any(outside & kept)),
            "a token keeps an id twice": bool(np.any(distinct == 0)),
        }
    return faults


def preimage(manifest: AnyManifest) -> str:
    """What a shard's key was made of, and who made it, as indented JSON."""
    shown = manifest.model_dump(mode="json", exclude={"objects"})
    return json.dumps(shown, indent=2, ensure_ascii=False)
