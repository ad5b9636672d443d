"""Flat tables of a cache for other programs: a row a completion, a part file a shard.

Written for readers that know lists and nothing of this package: DuckDB, Polars, Hugging Face's
``datasets``. A token's list holds its kept entries alone; what was not stored is null.
"""

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from .data import Scored
from .errors import InputsMissing, InvalidShard, UsageError
from .schemas.columns import ScoreColumn, rollout_schema
from .schemas.manifests import ScoreManifest
from .schemas.rounds import RolloutShard, ServedColumns
from .store import rollouts as tables
from .store.cache import Cache, as_listed, score_names, shard_key
from .store.scores import Scores

GROUP_TOKENS = 131072
"""About as many completion tokens are in a Parquet row group, or an Arrow record batch."""

Format = Literal["parquet", "arrow"]


def _list_of(value: pa.DataType) -> pa.DataType:
    return pa.list_(pa.field("element", value, nullable=False))


def _field(name: str, value: pa.DataType, description: str) -> pa.Field:
    return pa.field(name, value, metadata={"description": description})


_FLOATS, _RAGGED_FLOATS = _list_of(pa.float32()), _list_of(_list_of(pa.float32()))
_RAGGED_INTS = _list_of(_list_of(pa.int32()))

SOURCE_FIELDS: tuple[pa.Field, ...] = (
    _field("rollout_key", pa.string(), "key of the rollout shard"),
    _field("teacher", pa.string(), "fingerprint of the teacher"),
    _field("score_keys", _list_of(pa.string()), "keys of the score sets of the teacher's columns"),
)
"""Where a row is from."""

TEACHER_FIELDS: dict[ScoreColumn, tuple[pa.Field, ...]] = {
    "sampled": (
        _field("teacher_sampled_logprobs", _FLOATS, "log-prob of each sampled token, nats"),
    ),
    "entropy": (_field("teacher_entropy", _FLOATS, "entropy of the distribution, nats"),),
    "topk": (
        _field("teacher_topk_ids", _RAGGED_INTS, "kept ids a token, likeliest first"),
        _field(
            "teacher_topk_logprobs",
            _RAGGED_FLOATS,
            "their log-probs over the full vocabulary, nats",
        ),
        _field(
            "teacher_tail_logprobs",
            _FLOATS,
            "log of the mass outside the kept ids, nats; -inf when they hold everything",
        ),
    ),
    "student_topk": (
        _field(
            "teacher_student_topk_logprobs",
            _RAGGED_FLOATS,
            "the teacher's log-prob of each of student_topk_ids, nats",
        ),
        _field(
            "teacher_student_tail_logprobs",
            _FLOATS,
            "log of the teacher's mass outside student_topk_ids, nats",
        ),
    ),
    "draws": (
        _field(
            "teacher_draw_ids",
            _RAGGED_INTS,
            "distinct ids drawn from the distribution, most often drawn first, then by id",
        ),
        _field("teacher_draw_counts", _RAGGED_INTS, "how often each was drawn"),
    ),
}
"""The teacher's fields, by the score column that gives them; a list has an entry a token."""


@dataclass(frozen=True, slots=True)
class Exported:
    """What an export wrote."""

    num_parts: int
    num_rows: int
    num_tokens: int
    size_bytes: int


def of_cache(cache: Cache, teacher: str = "") -> tuple[list[Scored], int]:
    """Every score set with each rollout shard that it is of, by their keys.

    Args:
        teacher: first characters of the fingerprint of the one teacher that is asked for.

    Returns:
        The pairs, and how many score sets are left out because their rollouts are gone.

    Raises:
        UsageError: there is no such teacher, or there are several.
        InputsMissing: there are no scores.
    """
    commits = {path: score_names(path)[1] for path in _commits(cache, "commits/scores")}
    teachers = {name for name in commits.values() if name.startswith(teacher)}
    if teacher and len(teachers) != 1:
        raise UsageError(
            f"{len(teachers)} teachers have a fingerprint that starts with {teacher!r}",
            where=cache.objects.url,
            remedy="'opdcache cache ls' shows who made which scores",
        )
    wanted = [path for path, name in commits.items() if name in teachers]
    shards, pairs, left_out = _by_content(cache), list[Scored](), 0
    for one in cache.objects.each(cache.manifest, wanted):
        if isinstance(one, ScoreManifest):
            served = (ServedColumns(key=one.key, columns=one.identity.columns),)
            of = shards.get(one.identity.content, [])
            pairs += [Scored(shard, one.identity.teacher, served) for shard in of]
            left_out += not of
    if not pairs:
        raise InputsMissing("the cache holds no scored completions", where=cache.objects.url)
    return sorted(pairs, key=lambda pair: (pair.rollouts.key, pair.served[0].key)), left_out


def _commits(cache: Cache, prefix: str) -> list[str]:
    return [info.path for info in cache.objects.list(prefix) if info.path.endswith(".json")]


def _by_content(cache: Cache) -> dict[str, list[RolloutShard]]:
    keys = map(shard_key, _commits(cache, "commits/rollouts"))
    shards: defaultdict[str, list[RolloutShard]] = defaultdict(list)
    for manifest in cache.committed_rollouts(keys).values():
        shards[manifest.content].append(as_listed(manifest, cached=True))
    return shards


def export(
    cache: Cache, shards: Sequence[Scored], out: Path, file_format: Format = "parquet"
) -> Exported:
    """Write ``part-00000.parquet`` (or ``.arrow``) and so on into a folder, one a shard.

    All parts have one schema: it has a column when one of the shards does, null in the others.
    They appear when all are written; an export that is interrupted leaves none.

    Raises:
        UsageError: the folder has part files.
        ObjectMissing, ChecksumMismatch, InvalidShard: a shard is not what was committed.
    """
    if any(out.glob("part-*")):
        raise UsageError(
            "has part files of another export",
            where=out,
            remedy="delete them, or give another folder",
        )
    schema, rows, tokens = _schema(cache, shards), 0, 0
    out.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(prefix=".unfinished-", dir=out) as unfinished:
        for number, shard in enumerate(shards):
            path = Path(unfinished, f"part-{number:05d}.{file_format}")
            with _writer(path, schema) as write:
                for table in _tables(cache, shard, schema):
                    write(table)
                    rows += table.num_rows
                    tokens += int(tables.token_offsets(table)[-1])
        parts = [part.rename(out / part.name) for part in sorted(Path(unfinished).iterdir())]
    return Exported(len(parts), rows, tokens, sum(part.stat().st_size for part in parts))


def _schema(cache: Cache, shards: Sequence[Scored]) -> pa.Schema:
    """Of the columns that one of the shards has."""
    columns = {c for shard in shards for served in shard.served for c in served.columns}
    manifests = cache.committed_rollouts({shard.rollouts.key for shard in shards}).values()

    def held(name: str) -> bool:
        return any(name not in manifest.identity.absent for manifest in manifests)

    student = rollout_schema(
        answer=True,
        messages=True,
        student_topk=held("student_topk_ids"),
        behavior=held("behavior_logprobs"),
        sampling=held("sampling_logprobs"),
        loss_mask=held("loss_mask"),
    )
    teacher = [f for column, fields in TEACHER_FIELDS.items() if column in columns for f in fields]
    return pa.schema([*(f.with_nullable(True) for f in student), *SOURCE_FIELDS, *teacher])


@contextmanager
def _writer(path: Path, schema: pa.Schema) -> Iterator[Callable[[pa.Table], None]]:
    """Arrow files are the seekable format, and not compressed, so that readers can map them."""
    if path.suffix == ".parquet":
        with pq.ParquetWriter(path, schema, compression="zstd") as parquet:
            yield parquet.write_table
    else:
        with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_file(sink, schema) as arrow:
            yield arrow.write_table


def _tables(cache: Cache, shard: Scored, schema: pa.Schema) -> Iterator[pa.Table]:
    """A shard's rows in groups, each decoded when it is asked for."""
    whole = cache.read_rollouts(cache.need_rollouts(shard.rollouts))
    scores = cache.open_score_set(shard.rollouts.content, shard.teacher, shard.served)
    keys = [item.key for item in shard.served]
    source = (shard.rollouts.key, shard.teacher, keys)
    for rows in _groups(tables.token_offsets(whole)):
        table, read = whole.slice(rows.start, rows.stop - rows.start), scores.read(rows)
        if not np.array_equal(read.token_offsets, tables.token_offsets(table)):
            raise InvalidShard("token offsets are not those of the rollouts", where=keys[0])
        held = dict(zip(table.column_names, table.columns, strict=True))
        for field, value in zip(SOURCE_FIELDS, source, strict=True):
            held[field.name] = pa.array([value] * table.num_rows, field.type)
        for name, values in _on_tokens(read).items():
            held[name] = _lists(read.token_offsets, values)
        for field in schema:
            held.setdefault(field.name, pa.nulls(table.num_rows, field.type))
        yield pa.Table.from_arrays([held[name] for name in schema.names], schema=schema)


def _groups(offsets: NDArray[np.int64]) -> Iterator[slice]:
    """Consecutive rows that hold about ``GROUP_TOKENS`` tokens."""
    marks = np.arange(0, int(offsets[-1]) + 1, GROUP_TOKENS)
    starts = np.searchsorted(offsets[:-1], marks)
    bounds = np.unique([*starts.tolist(), len(offsets) - 1]).tolist()
    return (slice(start, stop) for start, stop in pairwise(bounds))


def _on_tokens(scores: Scores) -> dict[str, pa.Array]:
    """The teacher's columns that are here, on the token axis."""
    held: dict[str, pa.Array] = {}
    if scores.sampled_logprobs is not None:
        held["teacher_sampled_logprobs"] = pa.array(scores.sampled_logprobs)
    if scores.entropy is not None:
        held["teacher_entropy"] = pa.array(scores.entropy)
    if (topk := scores.topk) is not None:
        held["teacher_topk_ids"] = _ragged(topk.ids, topk.kept)
        held["teacher_topk_logprobs"] = _ragged(topk.logprobs, topk.kept)
        held["teacher_tail_logprobs"] = pa.array(topk.tail_logprobs)
    if (student := scores.student_topk) is not None:
        every = np.ones(student.logprobs.shape, np.bool_)
        held["teacher_student_topk_logprobs"] = _ragged(student.logprobs, every)
        held["teacher_student_tail_logprobs"] = pa.array(student.tail_logprobs)
    if (draws := scores.draws) is not None:
        drawn = draws.counts > 0
        held["teacher_draw_ids"] = _ragged(draws.ids, drawn)
        held["teacher_draw_counts"] = _ragged(draws.counts.astype(np.int32), drawn)
    return held


def _ragged(values_TK: NDArray[Any], kept_TK: NDArray[np.bool_]) -> pa.ListArray:
    """The kept entries as one list a token."""
    offsets = np.concatenate([[0], np.cumsum(kept_TK.sum(axis=1))])
    return _lists(offsets, pa.array(values_TK[kept_TK]))


def _lists(offsets: NDArray[np.int64], values: pa.Array) -> pa.ListArray:
    """``values[offsets[i]:offsets[i + 1]]`` as list i."""
    starts = pa.array(offsets, pa.int32())
    return pa.ListArray.from_arrays(starts, values, type=_list_of(values.type))
