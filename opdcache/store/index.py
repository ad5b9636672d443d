"""What a listing shows of every manifest, kept so that the next one need not read them all again.

The index is one object, named by its hash, that anybody may delete: it is derived. An entry holds
as long as the store gives its manifest the same ETag; what is new is read, and added.
"""

import hashlib
from collections.abc import Iterable, Iterator
from contextlib import suppress
from typing import NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from ..errors import ObjectMissing, StoreError
from ..schemas.manifests import ImportIdentity, RolloutManifest, ScoreManifest
from .cache import Cache
from .objects import ObjectInfo

FOLDER = "index"


class Summary(NamedTuple):
    """What a listing shows of a manifest; there may be very many.

    Attributes:
        made_by: fingerprint of the student that sampled, or of the teacher that scored.
        of: digest of the prompts, content of an import, or key of the rollouts that were scored.
        k: recorded student entries a token, or kept teacher entries.
    """

    path: str
    etag: str
    kind: str
    key: str
    made_by: str
    of: str
    k: int
    num_rows: int
    num_tokens: int
    size_bytes: int


def summaries(cache: Cache, commits: Iterable[ObjectInfo]) -> list[Summary]:
    """A summary of every manifest that is still there.

    Raises:
        IntegrityError: one that has not been read before is not what was committed.
    """
    listed = {info.path: info.etag or "" for info in commits}
    known = _load(cache)
    found = {path: one for path, etag in listed.items() if (one := known.get((path, etag)))}
    new = [path for path in listed if path not in found]
    made = cache.objects.each(lambda path: _summary(cache, path, listed[path]), new)
    found |= {one.path: one for one in made if one is not None}
    if new:
        with suppress(StoreError):  # who may only read lists all the same
            _keep(cache, [one for one in found.values() if one.etag])
    return list(found.values())


def forget(cache: Cache) -> None:
    """Delete the index; the next listing makes it again."""
    for info in list(cache.objects.list(FOLDER)):
        cache.objects.delete(info.path)


def is_named_by_its_hash(path: str, data: bytes) -> bool:
    """Whether an object is what its name says: index and quarantine objects are named so."""
    return hashlib.sha256(data).hexdigest()[:16] in path.rsplit("/", 1)[1].split(".")


def _summary(cache: Cache, path: str, etag: str) -> Summary | None:
    match cache.manifest(path):
        case RolloutManifest() as manifest:
            identity = manifest.identity
            made_by, k = identity.student, identity.student_topk
            of = identity.content if isinstance(identity, ImportIdentity) else identity.prompts
        case ScoreManifest() as manifest:
            made_by, of = manifest.identity.teacher, manifest.rollout_key
            k = manifest.identity.k
        case _:
            return None
    return Summary(
        path=path,
        etag=etag,
        kind=manifest.kind,
        key=manifest.key,
        made_by=made_by,
        of=of,
        k=k,
        num_rows=manifest.num_rows,
        num_tokens=manifest.num_tokens,
        size_bytes=sum(entry.size_bytes for entry in manifest.objects),
    )


def objects_below(cache: Cache, folder: str) -> Iterator[tuple[str, bytes]]:
    """Objects of a folder that others may delete meanwhile."""
    for info in list(cache.objects.list(folder)):
        with suppress(ObjectMissing):
            yield info.path, cache.objects.get(info.path)


def _load(cache: Cache) -> dict[tuple[str, str], Summary]:
    """Entries of the index by path and ETag; none when it is not there, or not sound."""
    for path, data in objects_below(cache, FOLDER):
        if is_named_by_its_hash(path, data):
            table = pq.read_table(pa.BufferReader(data))
            if tuple(table.column_names) == Summary._fields:
                columns = [column.to_numpy().tolist() for column in table.columns]
                rows = map(Summary._make, zip(*columns, strict=True))
                return {(row.path, row.etag): row for row in rows}
    return {}


def _keep(cache: Cache, found: Iterable[Summary]) -> None:
    old = [info.path for info in cache.objects.list(FOLDER)]
    sink = pa.BufferOutputStream()
    pq.write_table(pa.Table.from_pylist([one._asdict() for one in found]), sink, compression="zstd")
    data = bytes(sink.getvalue())
    path = f"{FOLDER}/{hashlib.sha256(data).hexdigest()[:16]}.parquet"
    cache.objects.put(path, data)
    for other in old:
        if other != path:
            cache.objects.delete(other)
