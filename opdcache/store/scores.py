"""Score shards: teacher log-probs of one rollout shard, as records, and read from their objects.

``encoding`` makes the objects; ``docs/format.md`` has the layout.
"""

from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..errors import InvalidShard
from ..schemas.columns import SCORE_ARRAYS, ScoreColumn
from . import codec
from .arrays import StoredArray, open_arrays
from .files import File

GROUP = "scores.zarr"


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

    def at(self, tokens: slice | NDArray[np.int64]) -> "TopK":
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

    def at(self, tokens: slice | NDArray[np.int64]) -> "StudentTopK":
        """The entries of some tokens."""
        return StudentTopK(self.logprobs[tokens], self.tail_logprobs[tokens])

    def cut(self, k: int) -> "StudentTopK":
        """The first ``k`` entries a token; the rest joins the tail."""
        gone = np.zeros(self.logprobs.shape, np.bool_)
        gone[:, k:] = True
        return StudentTopK(self.logprobs[:, :k], _joined(self.logprobs, gone, self.tail_logprobs))


@dataclass(frozen=True, slots=True)
class Draws:
    """Ids drawn from the teacher's distribution, with replacement; ``counts / N`` estimates it
    without bias. N draws a token, D distinct ones at most.

    Attributes:
        ids: int32 [T, D], most often drawn first, then by id; 0 past them.
        counts: uint16 [T, D], how often each was drawn; 0 past the last.
    """

    ids: codec.Ints
    counts: NDArray[np.uint16]

    @classmethod
    def of(cls, drawn_TN: NDArray[np.int64]) -> "Draws":
        """Draws counted."""
        num_tokens, draws = drawn_TN.shape
        ordered = np.sort(drawn_TN, axis=1)
        first = np.diff(ordered, axis=1, prepend=-1) != 0
        run = np.cumsum(first, axis=1) - 1 + draws * np.arange(num_tokens)[:, None]
        counts = np.bincount(run.reshape(-1), minlength=drawn_TN.size).reshape(drawn_TN.shape)
        ids = np.zeros(drawn_TN.shape, np.int32)
        ids.reshape(-1)[run[first]] = ordered[first]
        most = np.argsort(-counts, axis=1, kind="stable")[:, : first.sum(axis=1).max(initial=0)]
        return cls(
            np.take_along_axis(ids, most, axis=1),
            np.take_along_axis(counts, most, axis=1).astype(np.uint16),
        )

    def at(self, tokens: slice | NDArray[np.int64]) -> "Draws":
        """The draws of some tokens."""
        return Draws(self.ids[tokens], self.counts[tokens])


def joined(parts: Sequence["Scores"]) -> "Scores":
    """Scores of completions, one part after the other; all have the same columns."""
    lengths = [np.diff(part.token_offsets) for part in parts]
    values: dict[str, Any] = {
        "token_offsets": np.concatenate([[0], np.cumsum(np.concatenate(lengths))]).astype(np.int64)
    }
    for name in Scores.__slots__[1:]:
        held = [value for part in parts if (value := getattr(part, name)) is not None]
        if not held:
            continue
        kind = type(held[0])
        if kind is np.ndarray:
            values[name] = np.concatenate(held)
        else:
            fields = ([getattr(value, field) for value in held] for field in kind.__slots__)
            values[name] = kind(*(np.concatenate(_alike(field)) for field in fields))
    return Scores(**values)


def _alike(entries: Sequence[NDArray[Any]]) -> Sequence[NDArray[Any]]:
    """Entries of equal width: what is added is not kept."""
    if entries[0].ndim == 1:
        return entries
    width = max(e.shape[1] for e in entries)
    return [np.pad(e, ((0, 0), (0, width - e.shape[1]))) for e in entries]


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
        draws: ids drawn from the teacher's distribution.
    """

    token_offsets: NDArray[np.int64]
    sampled_logprobs: codec.Floats | None = None
    entropy: codec.Floats | None = None
    topk: TopK | None = None
    student_topk: StudentTopK | None = None
    draws: Draws | None = None

    def rows(self, start: int, stop: int) -> "Scores":
        """The scores of completions ``start:stop``; views, not copies."""
        offsets = self.token_offsets[start : stop + 1]
        tokens = slice(int(offsets[0]), int(offsets[-1]))
        return Scores(
            token_offsets=offsets - offsets[0],
            sampled_logprobs=None if (s := self.sampled_logprobs) is None else s[tokens],
            entropy=None if (e := self.entropy) is None else e[tokens],
            topk=None if self.topk is None else self.topk.at(tokens),
            student_topk=None if self.student_topk is None else self.student_topk.at(tokens),
            draws=None if self.draws is None else self.draws.at(tokens),
        )

    @property
    def columns(self) -> frozenset[ScoreColumn]:
        """Which columns are here."""
        held: dict[ScoreColumn, object] = {
            "sampled": self.sampled_logprobs,
            "entropy": self.entropy,
            "topk": self.topk,
            "student_topk": self.student_topk,
            "draws": self.draws,
        }
        return frozenset(name for name, value in held.items() if value is not None)


@dataclass(frozen=True, slots=True)
class OpenScores:
    """A score shard whose objects are at hand; what is asked for is decoded when it is.

    Attributes:
        attributes: of the group.
        token_offsets: int64 [N + 1].
    """

    attributes: Mapping[str, Any]
    token_offsets: NDArray[np.int64]
    _arrays: Mapping[str, StoredArray]
    _rank_ids: codec.Ints

    def read(self, columns: frozenset[ScoreColumn], rows: slice | None = None) -> Scores:
        """The asked-for columns that the shard holds, of all completions or of consecutive ones.

        Only the chunks that hold the completions' tokens are decoded.

        Args:
            rows: completions, ``start`` and ``stop`` given; all by default.

        Raises:
            InvalidShard: an array is missing, or cannot be decoded.
        """
        rows = rows or slice(0, len(self.token_offsets) - 1)
        offsets = self.token_offsets[rows.start : rows.stop + 1]
        self._fetch(columns, int(offsets[0]), int(offsets[-1]))
        with _decoding():
            return self._read(columns, offsets)

    def _fetch(self, columns: frozenset[ScoreColumn], start: int, stop: int) -> None:
        """Read what is not in memory yet of the columns' arrays, at once."""
        far = [
            self._arrays[spec.name]
            for spec in SCORE_ARRAYS
            if spec.column in columns and spec.name in self._arrays and spec.name != "rank_ids"
            if not self._arrays[spec.name].at_hand(start, stop)
        ]
        if far:
            with ThreadPoolExecutor(max_workers=len(far)) as pool:
                list(pool.map(lambda array: array.fetch(start, stop), far))

    def _read(self, columns: frozenset[ScoreColumn], offsets: NDArray[np.int64]) -> Scores:
        start, stop = int(offsets[0]), int(offsets[-1])
        have = {spec.column for spec in SCORE_ARRAYS if spec.name in self._arrays} & columns
        topk = student = draws = None
        if "topk" in have:
            topk = TopK(
                ids=self._ids(start, stop),
                logprobs=self._descending(start, stop),
                num_kept=self._arrays["num_kept"].read(start, stop),
                tail_logprobs=self._floats("tail_logprobs", start, stop),
            )
        if "student_topk" in have:
            steps = self._arrays["student_topk_steps"].read(start, stop)
            student = StudentTopK(
                logprobs=codec.decode_logprobs(steps, self.step).T,
                tail_logprobs=self._floats("student_tail_logprobs", start, stop),
            )
        if "draws" in have:
            ids, counts = (self._arrays[n].read(start, stop).T for n in ("draw_ids", "draw_counts"))
            draws = Draws(ids.astype(np.int32), counts)
        return Scores(
            token_offsets=offsets - start,
            sampled_logprobs=(
                self._floats("sampled_logprobs", start, stop) if "sampled" in have else None
            ),
            entropy=self._floats("entropy", start, stop) if "entropy" in have else None,
            topk=topk,
            student_topk=student,
            draws=draws,
        )

    @property
    def step(self) -> float:
        """Quantisation step, see ``codec``."""
        return float(self.attributes["step"])

    def _floats(self, name: str, start: int, stop: int) -> codec.Floats:
        return self._arrays[name].read(start, stop).astype(np.float32)

    def _ids(self, start: int, stop: int) -> codec.Ints:
        """[T, K], laid out rank by rank."""
        ranks = self._arrays["topk_ranks"]
        ids_KT = np.empty((ranks.shape[0], stop - start), np.int32)
        for place, ranks_KC in ranks.chunks(start, stop):
            ids_KT[:, place] = codec.decode_ids(ranks_KC, self._rank_ids)
        return ids_KT.T

    def _descending(self, start: int, stop: int) -> codec.Floats:
        """[T, K], laid out rank by rank."""
        drops = self._arrays["topk_steps"]
        logprobs_KT = np.empty((drops.shape[0], stop - start), np.float32)
        for place, drops_KC in drops.chunks(start, stop):
            codec.decode_descending(drops_KC, self.step, out=logprobs_KT[:, place])
        return logprobs_KT.T


def open_scores(files: Mapping[str, File]) -> OpenScores:
    """Open a shard from its objects, by path below ``scores.zarr/``.

    Raises:
        InvalidShard: they are no score shard.
    """
    attributes, arrays = open_arrays(files)

    def whole(name: str) -> NDArray[Any]:
        return arrays[name].read(0, arrays[name].shape[0])

    with _decoding():
        rank_ids = whole("rank_ids").astype(np.int32) if "rank_ids" in arrays else None
        return OpenScores(
            attributes,
            whole("token_offsets").astype(np.int64),
            arrays,
            np.zeros(0, np.int32) if rank_ids is None else rank_ids,
        )


@contextmanager
def _decoding() -> Iterator[None]:
    """Whatever an array's bytes make numpy and Blosc say, as one error."""
    try:
        yield
    except (KeyError, ValueError, IndexError, TypeError, RuntimeError) as error:
        raise InvalidShard(f"not a score shard: {error!r}") from error
