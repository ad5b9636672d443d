"""Encodes score shards: scores of completions in, the objects of a Zarr v3 group out.

The group is encoded in memory, so that every object's hash is known before it is stored, and
``zarr.open_group`` reads it without this package. ``scores`` decodes it; ``docs/format.md`` has the
layout.
"""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from ..errors import InvalidShard
from ..schemas.columns import Compression, ScoreArray, ScoreColumn, score_arrays
from . import codec
from .scores import Scores

if TYPE_CHECKING:
    import zarr
    from zarr.abc.buffer import Buffer

CHUNK_TOKENS = 32768
_LEAST_HALF = float(np.finfo(np.float16).min)


class ScoreBuilder:
    """Scores of a shard, put together from its completions' as they come in.

    They are held as they will be stored: a few bytes an entry.

    Args:
        token_offsets: int64 [N + 1], of the shard's completions.
        columns: which columns come in.
        step: quantisation step, see ``codec``.
    """

    def __init__(
        self, token_offsets: NDArray[np.int64], columns: frozenset[ScoreColumn], step: float
    ) -> None:
        self._offsets, self._columns, self._step = token_offsets, columns, step
        self._arrays: dict[str, NDArray[Any]] = {}
        self._id_counts = np.zeros(0, np.int64)
        self._rows_left = set(range(len(token_offsets) - 1))

    def add(self, rows: Sequence[int], scores: Scores) -> None:
        """Put in the scores of some completions, in the order of ``rows``.

        Raises:
            InvalidShard: a completion came before, has another length, or other columns.
        """
        lengths = np.diff(self._offsets)[list(rows)]
        alike = np.array_equal(np.diff(scores.token_offsets), lengths)
        if not self._rows_left.issuperset(rows) or not alike or scores.columns != self._columns:
            raise InvalidShard("scores of other completions than the shard's", got=list(rows))
        self._rows_left -= set(rows)
        places = [slice(int(self._offsets[r]), int(self._offsets[r + 1])) for r in rows]
        for name, values in _narrow(scores, self._step).items():
            _put(self._held(name, values), places, values)
        if scores.topk is not None:
            here = np.bincount(scores.topk.ids[scores.topk.kept])
            self._id_counts = _added(self._id_counts, here)

    def encode(
        self, attributes: Mapping[str, object], compression: Compression = "blosc"
    ) -> dict[str, bytes]:
        """The group's objects by path below ``scores.zarr/``.

        Args:
            attributes: more attributes of the group.
            compression: of the arrays' chunks.

        Raises:
            InvalidShard: a completion's scores are missing.
        """
        import zarr  # what only reads needs a fraction of a second less
        from zarr.storage import MemoryStore

        if self._rows_left:
            raise InvalidShard("completions have no scores", got=f"rows {sorted(self._rows_left)}")
        encoded: dict[str, Buffer] = {}
        floor = codec.clip_floor(self._step)
        group = zarr.create_group(
            MemoryStore(encoded),
            attributes={**attributes, "step": self._step, "clip_floor": floor},
        )
        for spec in score_arrays(self._columns):
            _write(group, spec, self._stored(spec.name), compression)
        return {path: buffer.to_bytes() for path, buffer in encoded.items()}

    def _held(self, name: str, like: NDArray[Any]) -> NDArray[Any]:
        """The shard's array of that name; wider when a batch has more entries a token."""
        held = self._arrays.get(name)
        if held is None or held.shape[1:] < like.shape[1:]:
            wider = np.zeros((int(self._offsets[-1]), *like.shape[1:]), like.dtype)
            if held is not None:
                wider[:, : held.shape[1]] = held
            self._arrays[name] = held = wider
        return held

    def _stored(self, name: str) -> NDArray[Any]:
        """An array as it is stored."""
        match name:
            case "token_offsets":
                return self._offsets
            case "rank_ids":
                return codec.by_frequency(self._id_counts)
            case "topk_ranks":
                ids, num_kept = self._arrays["topk_ids"], self._arrays["num_kept"]
                return codec.encode_ids(ids, num_kept, codec.by_frequency(self._id_counts)).T
            case "draw_ids":
                ids = self._arrays[name]
                return ids.T.astype(np.uint16 if ids.max(initial=0) < 2**16 else np.uint32)
        return self._arrays[name].T


def encode_scores(
    scores: Scores,
    *,
    step: float,
    attributes: Mapping[str, object],
    compression: Compression = "blosc",
) -> dict[str, bytes]:
    """A whole shard's objects from its scores; see ``ScoreBuilder``."""
    builder = ScoreBuilder(scores.token_offsets, scores.columns, step)
    builder.add(range(len(scores.token_offsets) - 1), scores)
    return builder.encode(attributes, compression)


def _narrow(scores: Scores, step: float) -> dict[str, NDArray[Any]]:
    """Arrays [T] or [T, K] in the types that are stored, but ids as they are."""
    arrays: dict[str, NDArray[Any]] = {}
    if scores.sampled_logprobs is not None:
        arrays["sampled_logprobs"] = _half(
            "sampled_logprobs", scores.sampled_logprobs, _LEAST_HALF, 1e-3
        )
    if scores.entropy is not None:
        arrays["entropy"] = _half("entropy", scores.entropy, -1e-3, -_LEAST_HALF)
    if (topk := scores.topk) is not None:
        arrays["num_kept"] = topk.num_kept
        arrays["tail_logprobs"] = _half("tail_logprobs", topk.tail_logprobs, -np.inf, 1e-3)
        arrays["topk_ids"] = topk.ids.astype(np.int32)
        arrays["topk_steps"] = codec.encode_descending(topk.logprobs, topk.num_kept, step)
    if (student := scores.student_topk) is not None:
        arrays["student_topk_steps"] = codec.encode_logprobs(student.logprobs, step)
        arrays["student_tail_logprobs"] = _half(
            "student_tail_logprobs", student.tail_logprobs, -np.inf, 1e-3
        )
    if (draws := scores.draws) is not None:
        arrays["draw_ids"] = draws.ids.astype(np.int32)
        arrays["draw_counts"] = draws.counts
    return arrays


def _half(name: str, values: codec.Floats, least: float, most: float) -> NDArray[np.float16]:
    """Values as float16.

    Raises:
        InvalidShard: one is NaN, or not within the bounds.
    """
    wrong = np.flatnonzero(~((values >= least) & (values <= most)))
    if len(wrong):
        raise InvalidShard(
            f"{name}: no log-prob or entropy that a distribution has",
            expected=f"{least:g} to {most:g}",
            got=float(values[wrong[0]]),
            remedy="report the scoring backend; a float16 teacher that overflows needs bfloat16",
        )
    return values.astype(np.float16)


def _put(held: NDArray[Any], places: Sequence[slice], values: NDArray[Any]) -> None:
    """Values of consecutive tokens, into their places."""
    start = 0
    for place in places:
        stop = start + place.stop - place.start
        held[place, *(slice(width) for width in values.shape[1:])] = values[start:stop]
        start = stop


def _added(one: NDArray[np.int64], other: NDArray[np.int64]) -> NDArray[np.int64]:
    """Counts by id, added."""
    total = np.zeros(max(len(one), len(other)), np.int64)
    total[: len(one)] += one
    total[: len(other)] += other
    return total


def _write(
    group: "zarr.Group", spec: ScoreArray, values: NDArray[np.generic], compression: Compression
) -> None:
    """One array: chunks of tokens inside a single object."""
    dtype = np.dtype(spec.dtype) if spec.dtype != "uint" else values.dtype
    *ranks, length = values.shape
    chunks = max(1, -(-length // CHUNK_TOKENS))
    chunk = max(1, -(-length // chunks))  # of equal size: what the last one lacks is filled up
    array = group.create_array(
        spec.name,
        shape=values.shape,
        dtype=dtype,
        chunks=(*(max(1, n) for n in ranks), chunk),
        shards=(*(max(1, n) for n in ranks), chunk * chunks),
        **_codecs(compression, dtype),
        fill_value=0,
        dimension_names=spec.dims,
        attributes={"unit": spec.unit, "description": spec.description},
    )
    array[...] = values.astype(dtype)


def _codecs(compression: Compression, dtype: np.dtype[Any]) -> dict[str, Any]:
    from zarr.codecs import BloscCodec, BloscShuffle
    from zarr.codecs.numcodecs import PCodec

    if compression == "pcodec":
        return {"serializer": PCodec(), "compressors": None}
    byte_planes = BloscShuffle.shuffle
    blosc = BloscCodec(cname="zstd", clevel=6, shuffle=byte_planes, typesize=dtype.itemsize)
    return {"compressors": blosc}
