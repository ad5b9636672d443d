"""Score shards: teacher log-probs of one rollout shard as a Zarr v3 group.

The group is encoded in memory, object by object, so that every object's hash is known before it is
stored, and ``zarr.open_group`` reads it without this package. ``docs/format.md`` has the layout.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import zarr
from numpy.typing import NDArray
from zarr.abc.buffer import Buffer
from zarr.buffer import cpu
from zarr.codecs import BloscCodec, BloscShuffle, TransposeCodec
from zarr.storage import MemoryStore

from ..schemas.columns import ScoreArray, ScoreColumn, score_arrays
from . import codec

GROUP = "scores.zarr"
CHUNK_TOKENS = 16384


@dataclass(frozen=True, slots=True)
class TopK:
    """The teacher's likeliest entries of every token, ragged within a cap.

    Attributes:
        ids: int32 [T, K], likeliest first.
        logprobs: float32 [T, K], nats, over the full vocabulary.
        num_kept: uint16 [T]; entries past it hold no information.
        tail_logprobs: float32 [T], log of the mass outside the kept entries.
    """

    ids: codec.Ints
    logprobs: codec.Floats
    num_kept: NDArray[np.uint16]
    tail_logprobs: codec.Floats

    @property
    def kept(self) -> NDArray[np.bool_]:
        """[T, K]: which entries are kept ones."""
        return codec.kept_mask(self.num_kept, self.ids.shape[1])

    def at(self, tokens: slice) -> "TopK":
        """The entries of some tokens."""
        return TopK(*(getattr(self, name)[tokens] for name in self.__slots__))

    def cut(self, k: int, mass: float = 1.0) -> "TopK":
        """At most ``k`` entries a token, no more than hold ``mass``; the rest joins the tail."""
        keep = self.kept[:, :k]
        if mass < 1:
            held = np.exp(self.logprobs[:, :k])
            keep = keep & (np.cumsum(held, axis=1) - held < mass)
        num_kept = keep.sum(axis=1).astype(np.uint16)
        gone = self.kept & ~codec.kept_mask(num_kept, self.ids.shape[1])
        tail = _joined(self.logprobs, gone, self.tail_logprobs)
        return TopK(self.ids[:, :k], self.logprobs[:, :k], num_kept, tail)


@dataclass(frozen=True, slots=True)
class StudentTopK:
    """The teacher's view of the ids that the student recorded; the ids are in the rollout shard.

    Attributes:
        logprobs: float32 [T, S], in the order of the recorded ids.
        tail_logprobs: float32 [T], log of the teacher's mass outside them.
    """

    logprobs: codec.Floats
    tail_logprobs: codec.Floats

    def at(self, tokens: slice) -> "StudentTopK":
        """The entries of some tokens."""
        return StudentTopK(self.logprobs[tokens], self.tail_logprobs[tokens])

    def cut(self, k: int) -> "StudentTopK":
        """The first ``k`` entries a token; the rest joins the tail."""
        gone = np.zeros(self.logprobs.shape, np.bool_)
        gone[:, k:] = True
        return StudentTopK(self.logprobs[:, :k], _joined(self.logprobs, gone, self.tail_logprobs))


def _joined(logprobs: codec.Floats, gone: NDArray[np.bool_], tail: codec.Floats) -> codec.Floats:
    """The tail's log-mass with some entries' mass added."""
    if not gone.any():
        return tail
    entries = np.where(gone, logprobs, -np.inf)
    joined: codec.Floats = np.logaddexp(np.logaddexp.reduce(entries, axis=1), tail)
    return joined.astype(np.float32)


@dataclass(frozen=True, slots=True)
class Scores:
    """Decoded scores of a rollout shard; a column that was not stored, or not asked for, is None.

    Token axis: all completions in row order; completion i owns
    ``token_offsets[i]:token_offsets[i + 1]``. Index t is the distribution that predicts token t.

    Attributes:
        token_offsets: int64 [N + 1].
        sampled_logprobs: float32 [T], teacher log-prob of the sampled token, nats.
        entropy: float32 [T], nats.
        topk: the teacher's likeliest entries.
        student_topk: the teacher's view of the recorded student ids.
    """

    token_offsets: NDArray[np.int64]
    sampled_logprobs: codec.Floats | None = None
    entropy: codec.Floats | None = None
    topk: TopK | None = None
    student_topk: StudentTopK | None = None

    @property
    def columns(self) -> frozenset[ScoreColumn]:
        """Which columns are here."""
        held: dict[ScoreColumn, object] = {
            "sampled": self.sampled_logprobs,
            "entropy": self.entropy,
            "topk": self.topk,
            "student_topk": self.student_topk,
        }
        return frozenset(name for name, value in held.items() if value is not None)


def encode_scores(
    scores: Scores, *, step: float, attributes: Mapping[str, object]
) -> dict[str, bytes]:
    """The group's objects by path below ``scores.zarr/``."""
    encoded: dict[str, Buffer] = {}
    group = zarr.create_group(
        MemoryStore(encoded),
        attributes={**attributes, "step": step, "clip_floor": codec.clip_floor(step)},
    )
    values = _to_arrays(scores, step)
    for spec in score_arrays(scores.columns):
        _write(group, spec, values[spec.name])
    return {path: buffer.to_bytes() for path, buffer in encoded.items()}


def _to_arrays(scores: Scores, step: float) -> dict[str, NDArray[np.generic]]:
    arrays: dict[str, NDArray[np.generic]] = {"token_offsets": scores.token_offsets}
    if scores.sampled_logprobs is not None:
        arrays["sampled_logprobs"] = scores.sampled_logprobs
    if scores.entropy is not None:
        arrays["entropy"] = scores.entropy
    if scores.topk is not None:
        topk = scores.topk
        arrays["num_kept"] = topk.num_kept
        arrays["tail_logprobs"] = topk.tail_logprobs
        arrays["topk_ranks"], arrays["rank_ids"] = codec.encode_ids(topk.ids, topk.num_kept)
        arrays["topk_steps"] = codec.encode_descending(topk.logprobs, topk.num_kept, step)
    if scores.student_topk is not None:
        student = scores.student_topk
        arrays["student_topk_steps"] = codec.encode_logprobs(student.logprobs, step)
        arrays["student_tail_logprobs"] = student.tail_logprobs
    return arrays


def _write(group: zarr.Group, spec: ScoreArray, values: NDArray[np.generic]) -> None:
    """One array: chunks of tokens inside a single object, two-dimensional ones rank by rank."""
    dtype = np.dtype(spec.dtype)
    length, rest = values.shape[0], values.shape[1:]
    chunk = max(1, min(CHUNK_TOKENS, length))
    whole = -(-max(length, 1) // chunk) * chunk
    array = group.create_array(
        spec.name,
        shape=values.shape,
        dtype=dtype,
        chunks=(chunk, *(max(1, n) for n in rest)),
        shards=(whole, *(max(1, n) for n in rest)),
        filters=[TransposeCodec(order=(1, 0))] if rest else None,
        compressors=BloscCodec(
            cname="zstd", clevel=5, shuffle=BloscShuffle.bitshuffle, typesize=dtype.itemsize
        ),
        fill_value=0,
        dimension_names=spec.dims,
        attributes={"unit": spec.unit, "description": spec.description},
    )
    array[...] = values.astype(dtype)


def decode_scores(objects: Mapping[str, bytes], columns: frozenset[ScoreColumn]) -> Scores:
    """The asked-for columns that the group holds; the others are None.

    Args:
        objects: the group's objects by path below ``scores.zarr/``.
        columns: columns to decode.
    """
    encoded: dict[str, Buffer] = {p: cpu.Buffer.from_bytes(data) for p, data in objects.items()}
    group = zarr.open_group(MemoryStore(encoded, read_only=True), mode="r")
    step = float(str(group.attrs["step"]))
    wanted = {spec.name for spec in score_arrays(columns)}
    arrays = {name: np.asarray(array[:]) for name, array in group.arrays() if name in wanted}

    def floats(name: str) -> codec.Floats | None:
        return arrays[name].astype(np.float32) if name in arrays else None

    topk = student = None
    if "topk_steps" in arrays:
        topk = TopK(
            ids=codec.decode_ids(arrays["topk_ranks"], arrays["rank_ids"]),
            logprobs=codec.decode_descending(arrays["topk_steps"], step),
            num_kept=arrays["num_kept"],
            tail_logprobs=arrays["tail_logprobs"].astype(np.float32),
        )
    if "student_topk_steps" in arrays:
        student = StudentTopK(
            logprobs=codec.decode_logprobs(arrays["student_topk_steps"], step),
            tail_logprobs=arrays["student_tail_logprobs"].astype(np.float32),
        )
    return Scores(
        token_offsets=arrays["token_offsets"],
        sampled_logprobs=floats("sampled_logprobs"),
        entropy=floats("entropy"),
        topk=topk,
        student_topk=student,
    )
