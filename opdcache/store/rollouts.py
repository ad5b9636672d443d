"""Rollout shards: completions of one task as a Parquet file, a row each."""

import json
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from ..errors import InvalidShard
from ..schemas.columns import ROLLOUT_COLUMNS, rollout_schema
from .files import File, Seekable

FILE = "rollouts.parquet"
GROUP_TOKENS = 32768
Scalar = TypeVar("Scalar", bound=np.generic)


@dataclass(frozen=True, slots=True)
class Completion:
    """One completion on its way into a shard. T completion tokens, S recorded entries a token.

    Attributes:
        behavior_logprobs: float32 [T], raw model log-probs at temperature 1, nats; None when they
            are not known, alike for all completions of a shard. NaN at masked tokens may be.
        sampling_logprobs: the same, under the distribution sampled from.
        topk_ids: int32 [T, S]; S = 0 when none are recorded.
        topk_logprobs: float32 [T, S], raw, descending, nats.
        messages: the prompt's chat, (role, content) each; None when only token ids are known.
        loss_mask: bool [T], which tokens are supervised; None when all are.
    """

    prompt_id: str
    sample_index: int
    prompt_token_ids: Sequence[int]
    completion_token_ids: Sequence[int]
    behavior_logprobs: NDArray[np.float32] | None
    sampling_logprobs: NDArray[np.float32] | None
    topk_ids: NDArray[np.int32]
    topk_logprobs: NDArray[np.float32]
    finish_reason: str
    text: str
    task: str
    answer: str | None
    messages: tuple[tuple[str, str], ...] | None = None
    loss_mask: NDArray[np.bool_] | None = None

    @property
    def supervised(self) -> NDArray[np.bool_]:
        """Bool [T]: which tokens are supervised."""
        every = np.ones(len(self.completion_token_ids), np.bool_)
        return every if self.loss_mask is None else self.loss_mask


def rollout_table(completions: Sequence[Completion]) -> pa.Table:
    """The shard's table; optional columns are there when a completion has them."""
    schema = rollout_schema(
        answer=any(c.answer is not None for c in completions),
        messages=any(c.messages is not None for c in completions),
        student_topk=any(c.topk_ids.shape[1] for c in completions),
        behavior=all(c.behavior_logprobs is not None for c in completions),
        sampling=all(c.sampling_logprobs is not None for c in completions),
        loss_mask=not all(c.supervised.all() for c in completions),
    )
    columns: dict[str, list[object]] = {
        "rollout_id": [f"{c.prompt_id}/{c.sample_index}" for c in completions],
        "messages": [None if c.messages is None else _json(c.messages) for c in completions],
        "loss_mask": [c.supervised for c in completions],
        "student_topk_ids": [list(c.topk_ids) for c in completions],
        "student_topk_logprobs": [list(c.topk_logprobs) for c in completions],
    }
    arrays = [
        pa.array(columns.get(f.name) or [getattr(c, f.name) for c in completions], type=f.type)
        for f in schema
    ]
    return pa.Table.from_arrays(arrays, schema=schema)


def _json(value: object) -> str:
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"))


def encode_rollouts(table: pa.Table) -> bytes:
    """The table as a Parquet file, zstd, in groups of consecutive rows."""
    sink = pa.BufferOutputStream()
    mean_tokens = int(token_offsets(table)[-1]) / max(1, table.num_rows)
    rows = max(1, int(GROUP_TOKENS / max(1, mean_tokens)))
    pq.write_table(table, sink, compression="zstd", row_group_size=rows)
    return bytes(sink.getvalue())


def decode_rollouts(data: bytes, columns: Collection[str] | None = None) -> pa.Table:
    """Inverse of ``encode_rollouts``.

    Args:
        columns: which to decode, where the shard has them; all by default.

    Raises:
        InvalidShard: not a Parquet file, or one without a rollout's columns.
    """
    with _decoding():
        parquet = pq.ParquetFile(pa.BufferReader(data))
        names = parquet.schema_arrow.names
        _check_columns(names)
        wanted = [name for name in names if columns is None or name in columns]
        return parquet.read(columns=wanted, use_threads=False)


class OpenRollouts:
    """A rollout shard that is read in groups of consecutive rows.

    Attributes:
        starts: int64 [groups + 1], the first row of each group.
    """

    def __init__(self, starts: NDArray[np.int64], read: Callable[[int], pa.Table]) -> None:
        self.starts, self._read = starts, read

    @classmethod
    def of(cls, table: pa.Table) -> "OpenRollouts":
        """A table at hand, as one group."""
        return cls(np.asarray([0, table.num_rows]), lambda _: table)

    def group(self, number: int) -> pa.Table:
        """The rows ``starts[number]:starts[number + 1]``.

        Raises:
            InvalidShard: they cannot be decoded.
        """
        with _decoding():
            return self._read(number)


def open_rollouts(file: File) -> OpenRollouts:
    """Open a shard; of a file that is not in memory the end is read, which says where rows are.

    Raises:
        InvalidShard: not a Parquet file, or one without a rollout's columns.
    """
    with _decoding():
        parquet = pq.ParquetFile(pa.PythonFile(Seekable(file), mode="r"), pre_buffer=False)
        metadata = parquet.metadata
        counts = [metadata.row_group(i).num_rows for i in range(metadata.num_row_groups)]
    _check_columns(parquet.schema_arrow.names)
    starts = np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)
    return OpenRollouts(starts, lambda number: parquet.read_row_group(number, use_threads=False))


def _check_columns(names: Sequence[str]) -> None:
    needed = {column.name for column in ROLLOUT_COLUMNS if not column.optional}
    absent = needed - set(names)
    if absent:
        raise InvalidShard(f"not a rollout shard: no column {sorted(absent)[0]}")


@contextmanager
def _decoding() -> Iterator[None]:
    """Whatever a file's bytes make pyarrow say, as one error."""
    try:
        yield
    except (pa.ArrowException, OSError) as error:
        raise InvalidShard(f"not a rollout shard: {error}") from error


def token_lists(table: pa.Table, column: str) -> list[NDArray[np.int32]]:
    """A list column of ids as one int32 array a row."""
    return [np.asarray(row.values, np.int32) for row in table.column(column)]


def token_offsets(table: pa.Table) -> NDArray[np.int64]:
    """[N + 1]: where each completion's tokens are on the shard's token axis."""
    lengths = np.asarray(table.column("completion_token_ids").combine_chunks().value_lengths())
    return np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)


def supervised_tokens(table: pa.Table) -> NDArray[np.bool_]:
    """Bool [T]: which tokens of the shard's token axis are supervised."""
    if "loss_mask" in table.column_names:
        return flat_tokens(table, "loss_mask", np.bool_)
    return np.ones(int(token_offsets(table)[-1]), np.bool_)


def flat_tokens(table: pa.Table, column: str, dtype: type[Scalar]) -> NDArray[Scalar]:
    """A list column on the shard's token axis: [T], or [T, S] for the recorded entries.

    It may be a view of the table's memory, which is not to be written to.
    """
    values = table.column(column).combine_chunks().flatten()
    shape: tuple[int, ...] = (len(values),)
    if pa.types.is_list(values.type):
        shape = (len(values), len(values[0]) if len(values) else 0)
        values = values.flatten()
    flat: NDArray[Scalar] = values.to_numpy(zero_copy_only=False).astype(dtype, copy=False)
    return flat.reshape(shape)
