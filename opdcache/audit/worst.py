"""Which completions and tokens to look at first, found in one pass and in bounded memory.

Two measures, both over supervised tokens:

- ``advantage``, log q - log p of the sampled token, nats: the least is the worst. A completion's
  is the mean of its tokens'.
- ``disagreement``, of the whole distributions: the total variation distance 1/2 sum |p - q|, from 0
  (the same) to 1 (no token in common), or the least of it that the stored entries allow. A
  completion's is the mean of its tokens'.

Legend: T tokens, S recorded student entries a token, K kept teacher entries, N completions.
"""

import heapq
import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Generic, Literal, TypeVar

import numpy as np
from numpy.typing import NDArray

from .blocks import Block, Entries
from .measures import Shared, Values
from .targets import Shard

Measure = Literal["advantage", "disagreement"]
MEASURES: tuple[Measure, ...] = ("advantage", "disagreement")
Item = TypeVar("Item")


@dataclass(frozen=True, slots=True)
class Place:
    """A token.

    Attributes:
        position: in its completion.
        value: of a measure.
    """

    position: int
    value: float


@dataclass(frozen=True, slots=True)
class Found:
    """A completion, as short as a list wants it.

    Attributes:
        part: name of the round or key.
        row: of the shard.
        num_tokens: supervised or not.
        advantage: mean, nats; None when it is not known of any token.
        disagreement: mean, from 0 to 1; None likewise.
        worst: by measure, the token that is worst by it; without those that are not known.
    """

    part: str
    shard: Shard
    row: int
    rollout_id: str
    prompt_id: str
    num_tokens: int
    advantage: float | None
    disagreement: float | None
    worst: dict[Measure, Place]


class Largest(Generic[Item]):
    """The few items of the largest values among very many; of equal ones, the earlier."""

    def __init__(self, num: int) -> None:
        self._num, self._serial = num, itertools.count()
        self._heap: list[tuple[float, int, Item]] = []

    def takes(self, value: float) -> bool:
        """Whether an item of this value would be one of them."""
        if len(self._heap) < self._num:
            return True
        return self._num > 0 and value > self._heap[0][0]

    def add(self, value: float, item: Item) -> None:
        """Put in the next item."""
        if not self.takes(value):
            return
        entry = (value, -next(self._serial), item)
        push = heapq.heappush if len(self._heap) < self._num else heapq.heapreplace
        push(self._heap, entry)

    def merge(self, other: "Largest[Item]") -> None:
        """Put in what another one, of later items, has."""
        for value, _, item in other._sorted():
            self.add(value, item)

    def items(self) -> tuple[Item, ...]:
        """Largest first."""
        return tuple(item for _, _, item in self._sorted())

    def _sorted(self) -> list[tuple[float, int, Item]]:
        return sorted(self._heap, key=lambda entry: entry[:2], reverse=True)


class Worst:
    """The worst completions, and the worst single tokens, by each measure; and some at random.

    Args:
        num: of each that are kept.
        num_random: completions that are drawn of all, always the same ones.
    """

    def __init__(self, num: int, num_random: int = 0) -> None:
        self._num, self._num_random = num, num_random
        self._drawn = Largest[Found](num_random)
        self._completions: dict[Measure, Largest[Found]] = {m: Largest(num) for m in MEASURES}
        self._tokens: dict[Measure, Largest[tuple[Found, Place]]] = {
            m: Largest(num) for m in MEASURES
        }

    def add(self, block: Block, shard: Shard, part: str) -> None:
        """Put in the next completions of a shard."""
        seen = Seen.of(block)
        for measure in MEASURES:
            completions, tokens = self._completions[measure], self._tokens[measure]
            for row in _first(seen.means[measure], self._num):
                badness = float(seen.means[measure][row])
                if completions.takes(badness):
                    completions.add(badness, seen.found(int(row), shard, part))
            for t in _first(seen.badness[measure], self._num):
                badness = float(seen.badness[measure][t])
                if tokens.takes(badness):
                    row = int(block.rows[t])
                    at = Place(int(t - block.offsets[row]), _value(measure, badness))
                    tokens.add(badness, (seen.found(row, shard, part), at))
        lots = _lots(block, shard)
        for row in _first(lots, self._num_random):
            if self._drawn.takes(float(lots[row])):
                self._drawn.add(float(lots[row]), seen.found(int(row), shard, part))

    def like(self) -> "Worst":
        """An empty one, to be merged into this one."""
        return Worst(self._num, self._num_random)

    def merge(self, other: "Worst") -> None:
        """Put in what another one, of later completions, has."""
        self._drawn.merge(other._drawn)
        for measure in MEASURES:
            self._completions[measure].merge(other._completions[measure])
            self._tokens[measure].merge(other._tokens[measure])

    def completions(self, by: Measure) -> tuple[Found, ...]:
        """Worst first."""
        return self._completions[by].items()

    def tokens(self, by: Measure) -> tuple[tuple[Found, Place], ...]:
        """Worst first, each with its completion."""
        return self._tokens[by].items()

    def drawn(self) -> tuple[Found, ...]:
        """Some at random."""
        return self._drawn.items()


@dataclass(frozen=True, slots=True)
class Seen:
    """A block by both measures; what is larger is worse. NaN is no value.

    Attributes:
        badness: float64 [T], of tokens.
        means: float64 [N], of completions.
    """

    block: Block
    badness: dict[Measure, Values]
    means: dict[Measure, Values]

    @classmethod
    def of(cls, block: Block) -> "Seen":
        """Every token that is supervised."""
        nothing = np.full(len(block.token_ids), np.nan)
        advantages, apart = block.advantages, disagreement(block)
        badness: dict[Measure, Values] = {
            "advantage": nothing if advantages is None else -advantages,
            "disagreement": nothing if apart is None else apart,
        }
        badness = {m: np.where(block.supervised, v, np.nan) for m, v in badness.items()}
        return cls(block, badness, {m: _means(v, block) for m, v in badness.items()})

    def found(self, row: int, shard: Shard, part: str) -> Found:
        """A completion of the block, by its place in it."""
        tokens = slice(*self.block.offsets[row : row + 2].tolist())
        means: dict[Measure, float | None] = {
            m: None if np.isnan(mean := float(self.means[m][row])) else _value(m, mean)
            for m in MEASURES
        }
        rollout_id, prompt_id = (
            str(self.block.table.column(name)[row].as_py()) for name in ("rollout_id", "prompt_id")
        )
        return Found(
            part=part,
            shard=shard,
            row=self.block.first_row + row,
            rollout_id=rollout_id,
            prompt_id=prompt_id,
            num_tokens=tokens.stop - tokens.start,
            advantage=means["advantage"],
            disagreement=means["disagreement"],
            worst=dict(_worst({m: v[tokens] for m, v in self.badness.items()})),
        )

    def every(self, shard: Shard, part: str) -> Iterator[Found]:
        """All completions of the block, in order."""
        for row in range(len(self.block.offsets) - 1):
            yield self.found(row, shard, part)


def disagreement(block: Block) -> Values | None:
    """Float64 [T]: total variation distance 1/2 sum |p - q|, the least that what is stored allows.

    It is the sum of p - q over the ids where p is larger, and the sum of q - p over the others. Of
    an id that only one model kept, the other's probability is at most its last kept one, and at
    most the mass outside; so each sum has a bound from below, and the larger one is taken. Where
    the teacher's log-probs at all recorded ids are stored, they are used.

    Returns:
        None when either model's entries are not stored.
    """
    student, teacher = block.student, block.teacher
    if student is None or teacher is None:
        return None
    theirs_TS = _at_most(student, teacher)
    given = block.scores.student_topk
    if given is not None and block.has_recorded:
        theirs_TS = np.exp(given.logprobs.astype(np.float64))
    above_T = np.maximum(_masses(student) - theirs_TS, 0).sum(axis=1)
    below_T = np.maximum(_masses(teacher) - _at_most(teacher, student), 0).sum(axis=1)
    return np.asarray(np.clip(np.maximum(above_T, below_T), 0.0, 1.0))


def _masses(entries: Entries) -> Values:
    """[T, S]: probabilities; 0 past the kept ones."""
    kept_TS = np.arange(entries.ids.shape[1]) < entries.num_kept[:, None]
    return np.where(kept_TS, np.exp(entries.logprobs.astype(np.float64)), 0.0)


def _at_most(of: Entries, by: Entries) -> Values:
    """[T, S]: the most that a model can give to the other one's entries: what it kept of them."""
    held_TK = _masses(by)
    last_T = np.where(held_TK > 0, held_TK, np.inf).min(axis=1, initial=1.0)
    outside_T = np.minimum(last_T, np.clip(1 - held_TK.sum(axis=1), 0, 1))
    if not held_TK.shape[1]:
        return np.broadcast_to(outside_T[:, None], of.ids.shape)
    rank_TS = Shared.of(of, by).rank_TS
    place_TS = np.minimum(rank_TS, held_TK.shape[1] - 1)
    known_TS = np.take_along_axis(held_TK, place_TS, axis=1)
    return np.where(rank_TS < held_TK.shape[1], known_TS, outside_T[:, None])


def _means(values: Values, block: Block) -> Values:
    """[N]: means over the tokens that have a value."""
    num, given = len(block.offsets) - 1, ~np.isnan(values)
    rows = block.rows[given]
    with np.errstate(invalid="ignore"):
        sums = np.bincount(rows, weights=values[given], minlength=num)
        return np.asarray(sums / np.bincount(rows, minlength=num))


def _first(badness: Values, num: int) -> NDArray[np.int64]:
    """Where the largest values are, in order; as many as asked for, none of them NaN."""
    order = np.argsort(-badness, kind="stable")[:num]
    return np.asarray(order[~np.isnan(badness[order])])


def _lots(block: Block, shard: Shard) -> Values:
    """[N]: a random number of each completion, the same whenever and with whatever it is read."""
    seed = [int(shard.scored.rollouts.key[:15], 16), block.first_row]
    return np.random.default_rng(seed).random(len(block.offsets) - 1)


def _worst(badness: dict[Measure, Values]) -> Iterator[tuple[Measure, Place]]:
    for measure, values in badness.items():
        for position in _first(values, 1):
            yield measure, Place(int(position), _value(measure, float(values[position])))


def _value(measure: Measure, badness: float) -> float:
    """Of the measure itself."""
    return -badness if measure == "advantage" else badness
