"""The cache: committed shards on one store, found by key or by what is needed of them.

Layout (``docs/format.md``)::

    commits/rollouts/<key>.json                    manifest; its presence commits the shard
    commits/scores/<content[:3]>/<content>.<teacher>.<key>.json
    data/<key[:2]>/<key>/<attempt>/...             objects that a manifest names
    claims/<kind>/...                              leases, see ``claims``
    runs/<run id>/<digest>.json                    keys that a run pins
    quarantine/<kind>/<key>.<digest>.json          manifest of a shard that was wrong, and why
    index/<digest>.parquet                         what listings show, see ``index``
"""

import json
import secrets
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TypeVar

import pyarrow as pa
from pydantic import TypeAdapter, ValidationError

from ..errors import (
    ChecksumMismatch,
    IntegrityError,
    InvalidShard,
    ObjectMissing,
    UnknownSchema,
)
from ..identity import HASHED_COLUMNS, canonical_json, content_hash, digest, key_of
from ..schemas import SCHEMA_VERSION
from ..schemas.columns import ScoreColumn
from ..schemas.manifests import (
    Kind,
    Manifest,
    ObjectEntry,
    RolloutManifest,
    ScoreManifest,
    ScoreRequirement,
)
from ..schemas.rounds import RolloutShard, ServedColumns
from . import rollouts, scores
from .claims import Claims
from .files import REMEDY, CheckedFile, begin, object_entry
from .objects import ObjectStore, is_local, local_folder
from .rollouts import OpenRollouts

AnyManifest = TypeVar("AnyManifest", RolloutManifest, ScoreManifest)
_MANIFEST: TypeAdapter[RolloutManifest | ScoreManifest] = TypeAdapter(Manifest)


class Attempt:
    """Objects of one worker's try at a shard, under a prefix that no other worker uses."""

    def __init__(self, objects: ObjectStore, key: str) -> None:
        self.name = secrets.token_hex(8)
        self.entries: list[ObjectEntry] = []
        self._objects = objects
        self._prefix = data_prefix(key, self.name)

    def put(self, path: str, data: bytes) -> None:
        """Store one object, and note its hash for the manifest."""
        self._objects.put(f"{self._prefix}/{path}", data)
        self.entries.append(object_entry(path, data))

    def discard(self) -> None:
        """Delete what was stored."""
        for entry in self.entries:
            self._objects.delete(f"{self._prefix}/{entry.path}")


@dataclass(frozen=True, slots=True)
class ScoreSet:
    """Score sets of one rollout shard that together give what is read, objects at hand."""

    parts: tuple[tuple[frozenset[ScoreColumn], scores.OpenScores, ScoreManifest], ...]

    def read(self, rows: slice | None = None) -> scores.Scores:
        """Every part's columns, of all completions or of consecutive ones."""
        whole: dict[str, object] = {}
        for columns, opened, manifest in self.parts:
            with _at_fault(manifest):
                part = opened.read(columns, rows)
            for name in scores.Scores.__slots__:
                if (value := getattr(part, name)) is not None:
                    whole.setdefault(name, value)
        return scores.Scores(**whole)  # type: ignore[arg-type]


class Cache:
    """Shards on one store, shared by every run that names the same URL."""

    def __init__(self, url: str) -> None:
        self.objects = ObjectStore(url)
        self.claims = Claims(self.objects)

    @classmethod
    def there(cls, url: str) -> "Cache":
        """The cache of a URL for looking; an empty one where there is no folder, made nowhere."""
        is_there = not is_local(url) or local_folder(url).is_dir()
        return cls(url if is_there else "memory://")

    def rollouts(self, key: str) -> RolloutManifest | None:
        """The committed rollout shard of a key, if there is one."""
        return self._load(rollout_commit(key), RolloutManifest)

    def need_rollouts(self, shard: RolloutShard) -> RolloutManifest:
        """The manifest of a shard that a round pinned.

        Raises:
            ObjectMissing: it is gone.
            InvalidShard: it was generated anew and holds other tokens than the round's.
        """
        where = self.objects.at(rollout_commit(shard.key))
        manifest = self.rollouts(shard.key)
        if manifest is None:
            raise ObjectMissing(
                "a rollout shard that the round uses is gone",
                where=where,
                remedy="run the same command again; if that does not help, delete the round",
            )
        if manifest.content != shard.content:
            raise InvalidShard(
                "the shard was generated anew and holds other tokens",
                where=where,
                expected=f"content {shard.content[:12]}",
                got=manifest.content[:12],
                remedy="run the round's stages again; if that does not help, delete its files",
            )
        return manifest

    def committed_rollouts(self, keys: Iterable[str]) -> dict[str, RolloutManifest]:
        """Those of the keys that are committed."""
        wanted = list(keys)
        found = self.objects.each(self.rollouts, wanted)
        return {key: manifest for key, manifest in zip(wanted, found, strict=True) if manifest}

    def score_sets(self, content: str, teacher: str | None = None) -> list[ScoreManifest]:
        """Every committed score set of a rollout content, oldest first; by one teacher, or all."""
        listed = self.objects.list(f"commits/scores/{content[:3]}")
        named = [(i, *score_names(i.path)[:2]) for i in listed]
        ours = [i for i, of, by in named if of == content and teacher in (None, by)]
        ours.sort(key=lambda info: (info.last_modified, info.path))
        found = [self._load(info.path, ScoreManifest) for info in ours]
        return [manifest for manifest in found if manifest is not None]

    def serve(
        self, content: str, need: ScoreRequirement
    ) -> list[tuple[ScoreManifest, ServedColumns]] | None:
        """Score sets that together give what is needed of a content; None when they do not.

        Sets that give more of the missing columns are taken first, so one set serves where one can.
        """
        missing = set(need.columns)
        sets = {m.key: m for m in self.score_sets(content, need.teacher)}
        served = []
        while missing and sets:
            gives = {key: need.served_by(m.identity) & missing for key, m in sets.items()}
            best = max(gives, key=lambda key: len(gives[key]))
            if not gives[best]:
                return None
            columns = tuple(sorted(gives[best]))
            served.append((sets.pop(best), ServedColumns(key=best, columns=columns)))
            missing -= gives[best]
        return None if missing else served

    def read_rollouts(
        self, manifest: RolloutManifest, columns: Collection[str] | None = None
    ) -> pa.Table:
        """The shard's table, checked against its manifest.

        Args:
            columns: which to decode, beside those with token ids; all by default.

        Raises:
            ObjectMissing, ChecksumMismatch, InvalidShard: it is not what was committed.
        """
        with _at_fault(manifest):
            file = self.files_of(manifest)[rollouts.FILE]
            read = None if columns is None else {*columns, *HASHED_COLUMNS}
            table = rollouts.decode_rollouts(file.read(0, file.size_bytes), read)
            if content_hash(table) != manifest.content:
                raise InvalidShard(
                    "content hash differs from the manifest's",
                    where=self.objects.at(rollout_commit(manifest.key)),
                    remedy=REMEDY,
                )
        return table

    def open_rollouts(self, manifest: RolloutManifest, *, whole: bool) -> OpenRollouts:
        """The shard's table, to be read by row, every byte checked against its manifest.

        Args:
            whole: read all of it at once; a shard that is small is in any case.

        Raises:
            ObjectMissing, ChecksumMismatch, InvalidShard: it is not what was committed.
        """
        (entry,) = manifest.objects
        if whole or not entry.blocks:
            return OpenRollouts.of(self.read_rollouts(manifest))
        return rollouts.open_rollouts(self.files_of(manifest, whole=False)[rollouts.FILE])

    def open_scores(self, manifest: ScoreManifest, *, whole: bool = True) -> scores.OpenScores:
        """The shard's scores, every byte checked against its manifest.

        Args:
            whole: read all of it at once; its large objects are else read as they are needed.

        Raises:
            ObjectMissing, ChecksumMismatch, InvalidShard: it is not what was committed.
        """
        prefix = f"{scores.GROUP}/"
        with _at_fault(manifest):
            files = self.files_of(manifest, whole=whole)
            opened = scores.open_scores({p.removeprefix(prefix): f for p, f in files.items()})
            if int(opened.token_offsets[-1]) != manifest.num_tokens:
                raise InvalidShard(
                    "token count differs from the manifest's",
                    where=self.objects.at(commit_path(manifest)),
                    expected=manifest.num_tokens,
                    got=int(opened.token_offsets[-1]),
                    remedy=REMEDY,
                )
        return opened

    def open_score_set(
        self, content: str, teacher: str, served: Iterable[ServedColumns], *, whole: bool = True
    ) -> ScoreSet:
        """The score sets that a round pinned, see ``open_scores``.

        Raises:
            ObjectMissing, ChecksumMismatch, InvalidShard: a set is not what was committed.
        """
        parts = []
        for item in served:
            path = score_commit(content, teacher, item.key)
            manifest = self._load(path, ScoreManifest)
            if manifest is None:
                raise ObjectMissing(
                    "a score set that the round uses is gone",
                    where=self.objects.at(path),
                    remedy="run the score stage again",
                )
            opened = self.open_scores(manifest, whole=whole)
            parts.append((frozenset(item.columns), opened, manifest))
        return ScoreSet(tuple(parts))

    def scored_by(
        self, teacher: str, columns: frozenset[ScoreColumn]
    ) -> list[tuple[RolloutShard, tuple[ServedColumns, ...]]]:
        """Rollout shards that one committed set of a teacher serves these columns of, by key.

        Of several sets the widest is taken, then the finest.
        """
        best: dict[str, ScoreManifest] = {}
        for info in self.objects.list("commits/scores"):
            if score_names(info.path)[1] != teacher:
                continue
            manifest = self._load(info.path, ScoreManifest)
            if manifest is None or not columns <= set(manifest.identity.columns):
                continue
            content = manifest.identity.content
            if content not in best or _goodness(manifest) > _goodness(best[content]):
                best[content] = manifest
        found: list[tuple[RolloutShard, tuple[ServedColumns, ...]]] = []
        for info in sorted(self.objects.list("commits/rollouts"), key=lambda o: o.path):
            rollout = self._load(info.path, RolloutManifest)
            if rollout is not None and rollout.content in best:
                key = best[rollout.content].key
                served = ServedColumns(key=key, columns=tuple(sorted(columns)))
                found.append((as_listed(rollout, cached=True), (served,)))
        return found

    def attempt(self, key: str) -> Attempt:
        """A new attempt at a shard."""
        return Attempt(self.objects, key)

    def commit(self, attempt: Attempt, manifest: RolloutManifest | ScoreManifest) -> bool:
        """Commit an attempt; the first writer wins, and a loser's objects are deleted.

        Returns:
            Whether this attempt is the shard.
        """
        assert manifest.key == key_of(manifest.identity)
        body = manifest.model_dump(mode="json")
        data = canonical_json({"manifest": body, "sha256": digest(body)})
        path = commit_path(manifest)
        if self.objects.create(path, data):
            return True
        # A store that repeats a create whose answer was lost meets its own manifest.
        if self.objects.get(path) == data:
            return True
        attempt.discard()
        return False

    def pin(self, run_id: str, kind: Kind, keys: Iterable[str]) -> None:
        """Add keys to those that a run uses, so that clean-up leaves them alone.

        Every call is an object of its own, named by what it pins: workers that pin at the same time
        lose nothing.
        """
        data = canonical_json({kind: sorted(set(keys))})
        self.objects.create(f"runs/{run_id}/{digest([kind, sorted(set(keys))])[:16]}.json", data)

    def pins(self, run_id: str) -> dict[Kind, set[str]]:
        """Every key that a run has pinned, by kind.

        Raises:
            ChecksumMismatch: what is stored is not what was pinned.
        """
        pinned: dict[Kind, set[str]] = {}
        for info in self.objects.list(f"runs/{run_id}"):
            try:
                ((kind, keys),) = json.loads(self.objects.get(info.path)).items()
                sound = info.path.endswith(f"/{digest([kind, keys])[:16]}.json")
            except (ValueError, TypeError, AttributeError):
                sound = False
            if not sound:
                raise ChecksumMismatch(
                    "not the keys that a run pinned",
                    where=self.objects.at(info.path),
                    remedy="delete it, and run that run's stages again before any clean-up",
                )
            pinned.setdefault(kind, set()).update(keys)
        return pinned

    def put_aside(self, path: str, reason: str) -> None:
        """Quarantine the shard of a manifest below ``commits/``: the next stage makes it anew.

        What it was and why it was wrong stays on record; its data stays until a clean-up.
        """
        try:
            manifest = self.objects.get(path)
        except ObjectMissing:
            return  # somebody else has
        kind, key = path.split("/")[1], shard_key(path)
        record = {"commit": path, "reason": reason, "manifest": manifest.decode(errors="replace")}
        aside = f"quarantine/{kind}/{key}.{digest(record)[:16]}.json"
        self.objects.put(aside, canonical_json(record))
        self.objects.delete(path)

    def quarantined(self) -> set[str]:
        """Keys of shards that were put aside; some may have been made anew since."""
        return {i.path.rsplit("/", 1)[1].partition(".")[0] for i in self.objects.list("quarantine")}

    def gone(self, commits: Mapping[str, str]) -> list[str]:
        """Those keys whose shard was put aside and has not been made anew.

        Args:
            commits: paths of manifests by key.
        """
        aside = self.quarantined() & set(commits)
        return sorted(key for key in aside if self.objects.info(commits[key]) is None)

    def _load(self, path: str, kind: type[AnyManifest]) -> AnyManifest | None:
        """A manifest, checked against its own checksum, its version and its key."""
        try:
            return self._loaded(path, kind)
        except IntegrityError as error:
            error.commit = path
            raise

    def _loaded(self, path: str, kind: type[AnyManifest]) -> AnyManifest | None:
        try:
            data = self.objects.get(path)
        except ObjectMissing:
            return None
        where = self.objects.at(path)
        try:
            stored = json.loads(data)
            body, sha256 = stored["manifest"], stored["sha256"]
        except (ValueError, TypeError, KeyError) as error:
            raise InvalidShard("not a manifest", where=where, remedy=REMEDY) from error
        if not _is_canonical(stored, data) or digest(body) != sha256:
            raise ChecksumMismatch(
                "manifest does not match its checksum", where=where, remedy=REMEDY
            )
        if body.get("schema_version", 0) > SCHEMA_VERSION:
            raise UnknownSchema(
                "written by a later version",
                where=where,
                expected=f"schema version at most {SCHEMA_VERSION}",
                got=body["schema_version"],
                remedy="upgrade opdcache",
            )
        try:
            manifest = _MANIFEST.validate_python(body)
        except ValidationError as error:
            raise UnknownSchema(
                f"not a manifest of this version: {error.errors()[0]['msg']}",
                where=where,
                remedy="read it with the version that wrote it",
            ) from error
        if (
            not isinstance(manifest, kind)
            or commit_path(manifest) != path
            or digest(body["identity"]) != manifest.key
        ):
            raise InvalidShard("manifest is not of its key", where=where, remedy=REMEDY)
        return manifest

    def manifest(self, path: str) -> RolloutManifest | ScoreManifest | None:
        """The manifest at a path below ``commits/``; None when it is gone.

        Raises:
            IntegrityError: it is not what was committed there.
        """
        if path.startswith("commits/rollouts/"):
            return self._load(path, RolloutManifest)
        return self._load(path, ScoreManifest)

    def files_of(
        self, manifest: RolloutManifest | ScoreManifest, *, whole: bool = True
    ) -> Mapping[str, CheckedFile]:
        """The shard's objects by path, each checked before it is used.

        Args:
            whole: read them all at once, whole.

        Raises:
            ObjectMissing, ChecksumMismatch: one that is read is not what was committed.
        """
        prefix = data_prefix(manifest.key, manifest.attempt)
        files = {
            entry.path: CheckedFile(self.objects, f"{prefix}/{entry.path}", entry)
            for entry in manifest.objects
        }
        self.objects.each(lambda file: begin(file, whole=whole), files.values())
        return files


@contextmanager
def _at_fault(manifest: RolloutManifest | ScoreManifest) -> Iterator[None]:
    """Errors about a shard say which it is."""
    try:
        yield
    except (IntegrityError, ObjectMissing) as error:
        error.commit = commit_path(manifest)
        raise


def _goodness(manifest: ScoreManifest) -> tuple[int, int, float, float, str]:
    """Wider, then finer; the key settles the rest, alike on every machine."""
    identity = manifest.identity
    return identity.k, identity.draws, identity.mass, -identity.step, manifest.key


def as_listed(manifest: RolloutManifest, *, cached: bool) -> RolloutShard:
    """A rollout shard as round files list it."""
    return RolloutShard(
        key=manifest.key,
        content=manifest.content,
        task=manifest.task,
        num_rows=manifest.num_rows,
        num_tokens=manifest.num_tokens,
        cached=cached,
    )


def data_prefix(key: str, attempt: str) -> str:
    """Where the objects of an attempt at a shard are."""
    return f"data/{key[:2]}/{key}/{attempt}"


def rollout_commit(key: str) -> str:
    """Where a rollout shard's manifest is."""
    return f"commits/rollouts/{key}.json"


def score_commit(content: str, teacher: str, key: str) -> str:
    """Where a score set's manifest is: few folders, since those are what a listing costs."""
    return f"commits/scores/{content[:3]}/{content}.{teacher}.{key}.json"


def score_names(path: str) -> tuple[str, str, str]:
    """Content, teacher and key of a path below ``commits/scores/``; empty when it is none."""
    content, _, rest = path.rpartition("/")[2].removesuffix(".json").partition(".")
    teacher, _, key = rest.partition(".")
    return content, teacher, key


def shard_key(path: str) -> str:
    """Key of the shard that a manifest below ``commits/`` commits."""
    return path.removesuffix(".json").replace("/", ".").rpartition(".")[2]


def _is_canonical(value: object, data: bytes) -> bool:
    try:
        return canonical_json(value) == data
    except ValueError:  # a changed byte can make a number infinite
        return False


def commit_path(manifest: RolloutManifest | ScoreManifest) -> str:
    """Where a shard's manifest is."""
    if isinstance(manifest, RolloutManifest):
        return rollout_commit(manifest.key)
    return score_commit(manifest.identity.content, manifest.identity.teacher, manifest.key)
