"""What a listing shows of every manifest, kept so that the next one need not read them all again.

The index is one object, named by its hash, that anybody may delete: it is derived. An entry holds
as long as the store gives its manifest the same ETag; what is new is read, and added.
"""

import hashlib
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, fields

import pyarrow as pa
import pyarrow.parquet as pq

from ..schemas.manifests import RolloutManifest, ScoreManifest
from .cache import Cache
from .objects import ObjectInfo

FOLDER = "index"


@dataclass(frozen=True, slots=True)
class Summary:
    """What a listing shows of a manifest.

    Attributes:
        made_by: fingerprint of the student that sampled, or of the teacher that scored.
        of: digest of the prompts, or key of the rollouts that were scored.
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
    """A summary of every manifest that is still there, in the order given.

    Raises:
        IntegrityError: one that has not been read before is not what was committed.
    """
    listed = {info.path: info.etag or "" for info in commits}
    known = _load(cache)
    new = [path for path, etag in listed.items() if (path, etag) not in known]
    with ThreadPoolExecutor(max_workers=16) as pool:
        made = list(pool.map(lambda path: _summary(cache, path, listed[path]), new))
    known |= {(one.path, one.etag): one for one in made if one is not None}
    found = [known[item] for item in listed.items() if item in known]
    if new:
        _keep(cache, found)
    return found


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
            made_by, of = manifest.identity.student, manifest.identity.prompts
            k = manifest.identity.student_topk
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


def _load(cache: Cache) -> dict[tuple[str, str], Summary]:
    """Entries of the index by path and ETag; none when it is not there, or not sound."""
    for info in cache.objects.list(FOLDER):
        data = cache.objects.get(info.path)
        if is_named_by_its_hash(info.path, data):
            columns = pq.read_table(pa.BufferReader(data)).to_pydict()
            if list(columns) == [field.name for field in fields(Summary)]:
                rows = zip(*columns.values(), strict=True)
                return {(one.path, one.etag): one for one in (Summary(*row) for row in rows)}
    return {}


def _keep(cache: Cache, found: Iterable[Summary]) -> None:
    old = [info.path for info in cache.objects.list(FOLDER)]
    sink = pa.BufferOutputStream()
    pq.write_table(pa.Table.from_pylist([asdict(one) for one in found]), sink, compression="zstd")
    data = bytes(sink.getvalue())
    path = f"{FOLDER}/{hashlib.sha256(data).hexdigest()[:16]}.parquet"
    cache.objects.put(path, data)
    for other in old:
        if other != path:
            cache.objects.delete(other)
