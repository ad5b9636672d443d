"""The seam between the score stage and what runs a teacher.

A backend takes completions as token ids and gives scores of them, some completions at a time, so
that neither needs to hold a shard's distributions. It is asked only for columns that it can give
(``TeacherConfig.can_give``).
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray
from pydantic import JsonValue

from ..errors import InvalidShard
from ..schemas.columns import ScoreColumn
from ..store.scores import Scores, joined


@dataclass(frozen=True, slots=True)
class Sequences:
    """Completions to score, on one token axis. N completions, T tokens, S recorded entries a token.

    Attributes:
        prompts: int32 token ids of each prompt, as the teacher reads it; never empty.
        completions: int32 token ids of each completion; may be empty.
        recorded_TS: int32 [T, S], more ids to look up at each token; S may be 0. One that is not in
            the model's vocabulary, as a student with a larger padded one may record, has no mass.
    """

    prompts: Sequence[NDArray[np.int32]]
    completions: Sequence[NDArray[np.int32]]
    recorded_TS: NDArray[np.int32]

    @property
    def offsets(self) -> NDArray[np.int64]:
        """[N + 1]: where each completion's tokens are on the token axis."""
        return np.concatenate([[0], np.cumsum(self.num_tokens)]).astype(np.int64)

    @property
    def num_tokens(self) -> NDArray[np.int64]:
        """[N], tokens of each completion."""
        return np.asarray([len(c) for c in self.completions], np.int64)

    @property
    def lengths(self) -> NDArray[np.int64]:
        """[N], tokens of each sequence, its prompt's included."""
        return self.num_tokens + np.asarray([len(p) for p in self.prompts], np.int64)

    @property
    def sampled_T(self) -> NDArray[np.int64]:
        """int64 [T], the completion tokens."""
        return np.concatenate([np.zeros(0, np.int64), *self.completions]).astype(np.int64)

    def only(self, rows: Sequence[int]) -> "Sequences":
        """Some of the completions, in this order."""
        prompts, completions = ([of[r] for r in rows] for of in (self.prompts, self.completions))
        return Sequences(prompts, completions, self.recorded_TS[self.places(rows)])

    def places(self, rows: Sequence[int]) -> NDArray[np.int64]:
        """Where some completions' tokens are on the token axis, one completion after the other."""
        offsets = self.offsets
        return np.concatenate([np.arange(offsets[r], offsets[r + 1]) for r in rows])

    def whole(self, row: int) -> NDArray[np.int32]:
        """A prompt and its completion."""
        return np.concatenate([self.prompts[row], self.completions[row]])

    def need_ids_below(self, vocab_size: int) -> None:
        """Check every id that the model reads.

        Raises:
            InvalidShard: one is not in the model's vocabulary.
        """
        read: list[NDArray[Any]] = [*self.prompts, *self.completions]
        largest = max(int(ids.max(initial=0)) for ids in read)
        if largest >= vocab_size:
            raise InvalidShard(
                "a token id is not in the model's vocabulary",
                expected=f"< {vocab_size}",
                got=largest,
            )


@dataclass(frozen=True, slots=True)
class Ask:
    """What is asked of a teacher.

    Attributes:
        columns: what to give; at least these.
        k: kept entries a token at most.
        mass: entries are kept until they hold this.
        num_ids: entries are kept, and drawn, among the ids below this.
        uniforms_TN: float64 [T, N] in [0, 1), each for one draw; None without draws.
    """

    columns: frozenset[ScoreColumn]
    k: int
    mass: float
    num_ids: int
    uniforms_TN: NDArray[np.float64] | None = None


@dataclass(frozen=True, slots=True)
class Batch:
    """Some completions' scores.

    Attributes:
        rows: which completions, in any order.
        scores: of their tokens, one completion after the other.
    """

    rows: Sequence[int]
    scores: Scores


class Teacher(Protocol):
    """A scoring model."""

    def score(self, sequences: Sequences, ask: Ask) -> Iterator[Batch]:
        """Scores of every completion, each in one batch.

        Raises:
            InvalidShard: a token id is not in the model's vocabulary.
            EngineError: the backend gave something unusable.
        """

    def details(self) -> dict[str, JsonValue]:
        """What to remember of how it scored: never part of a key."""

    def close(self) -> None:
        """Give its memory back."""


def in_order(batches: Iterable[Batch]) -> Scores:
    """The scores of all completions, in their order."""
    parts = {
        row: batch.scores.rows(place, place + 1)
        for batch in batches
        for place, row in enumerate(batch.rows)
    }
    return joined([parts[row] for row in sorted(parts)])


def by_length(lengths: NDArray[np.int64], budget_tokens: int) -> Iterator[list[int]]:
    """Rows by falling length, as many at a time as the budget of padded tokens holds; one at
    least."""
    order = sorted(range(len(lengths)), key=lambda row: -int(lengths[row]))
    while order:
        size = max(1, budget_tokens // max(1, int(lengths[order[0]])))
        yield order[:size]
        order = order[size:]
