"""A round's updates: which samples each takes, and their micro-batches, read ahead of the learner.

What an update takes depends on the order of the samples alone; how it is cut into micro-batches, on
the number of ranks and the budget too.
"""

import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import TypeVar

from .answers import Answers
from .microbatch import MicroBatch
from .samples import RoundSamples

_AHEAD = 4
"""Micro-batches that wait for the learner."""

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Update:
    """The data of one optimizer update; the same on every rank.

    Attributes:
        index: in the round.
        samples: of all ranks.
        num_tokens: supervised tokens of them.
        weight: what the loss is divided by.
        longest: places of a completion up to the last supervised one, at most.
        num_answer_tokens: tokens of its prompts' reference answers, where they are imitated too.
    """

    index: int
    samples: tuple[int, ...]
    num_tokens: int
    weight: float
    longest: int
    num_answer_tokens: int = 0


@dataclass(frozen=True, slots=True)
class Share:
    """One micro-batch of a rank.

    Attributes:
        update: that it belongs to.
        samples: in the micro-batch.
        batch: None of an update without a supervised token.
        weight: 1; 0 where it only keeps a rank in step with the others.
        is_answers: whether it holds reference answers in the place of samples.
    """

    update: Update
    samples: tuple[int, ...]
    batch: MicroBatch | None
    weight: int
    is_answers: bool = False


class Loading:
    """The updates of a round as micro-batches.

    Args:
        samples_of: the round's samples as an update takes them, by its index in the round.
        order: samples in training order.
        batch_samples: samples an update, over all ranks.
        max_tokens: tokens of one forward and backward at most, padding included.
        pin: put them in memory that an accelerator copies from while it computes.
        answers: to imitate, beside the samples.
    """

    def __init__(
        self,
        samples_of: Callable[[int], RoundSamples],
        order: Sequence[int],
        *,
        batch_samples: int,
        max_tokens: int,
        rank: int = 0,
        num_ranks: int = 1,
        pin: bool = False,
        answers: Answers | None = None,
    ) -> None:
        self._samples_of, self._order = samples_of, order
        self._batch_samples, self._max_tokens = batch_samples, max_tokens
        self._rank, self._num_ranks, self._pin = rank, num_ranks, pin
        self._answers = answers
        self.num_updates = -(-len(order) // batch_samples)

    def shares(self, first_update: int) -> Iterator[tuple[Share, float]]:
        """This rank's micro-batches from an update on, and the seconds each was waited for.

        They are read and put together in a thread of their own while the learner computes.
        """
        return ahead(self._shares(first_update), _AHEAD)

    def _update(self, index: int) -> Update:
        """What an update takes."""
        start = index * self._batch_samples
        batch = self._order[start : start + self._batch_samples]
        samples, answers = self._samples_of(index), self._answers
        return Update(
            index=index,
            samples=tuple(batch),
            num_tokens=samples.num_tokens(batch),
            weight=samples.weight(batch),
            longest=samples.longest(batch),
            num_answer_tokens=answers.num_tokens(answers.of(batch)) if answers else 0,
        )

    def _shares(self, first_update: int) -> Iterator[Share]:
        for update in map(self._update, range(first_update, self.num_updates)):
            samples = self._samples_of(update.index)
            if not update.num_tokens:
                yield Share(update, (), None, 0)
            for mine, weight in self._cut(samples, update.samples):
                yield Share(update, tuple(mine), self._placed(samples.collate(mine)), weight)
            if self._answers is None or not update.num_tokens:
                continue
            for mine, weight in self._cut(self._answers, self._answers.of(update.samples)):
                batch = self._placed(self._answers.collate(mine))
                yield Share(update, tuple(mine), batch, weight, is_answers=True)

    def _placed(self, batch: MicroBatch) -> MicroBatch:
        return batch.pinned() if self._pin else batch

    def _cut(
        self, sequences: RoundSamples | Answers, of: Sequence[int]
    ) -> list[tuple[list[int], int]]:
        """This rank's micro-batches, with weight 1.

        Ranks take the same number of backward passes: the collectives of ZeRO need that. A rank
        with fewer micro-batches repeats a sequence of the update with weight 0.
        """
        dealt = sequences.dealt(of, self._num_ranks)
        ranks = [sequences.micro_batches(mine, self._max_tokens) for mine in dealt]
        most = max(map(len, ranks))
        filler = [micro[-1][-1:] for micro in ranks if micro][:1]
        mine = ranks[self._rank]
        return [(micro, 1) for micro in mine] + [(one, 0) for one in filler] * (most - len(mine))


def ahead(items: Iterator[T], count: int) -> Iterator[tuple[T, float]]:
    """Items of an iterator that runs in a thread of its own, so many ahead of its reader, and the
    seconds that each was waited for. What it raises is raised in its place."""
    end = object()
    waiting = deque[Future[T | object]]()
    with ThreadPoolExecutor(1, "loading") as thread:
        try:
            while True:
                while len(waiting) <= count:
                    waiting.append(thread.submit(next, items, end))
                began = time.perf_counter()
                item = waiting.popleft().result()
                if item is end:
                    return
                yield item, time.perf_counter() - began  # type: ignore[misc]
        finally:
            for future in waiting:
                future.cancel()
