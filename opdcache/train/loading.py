"""A round's updates: which samples each takes, and their micro-batches, read ahead of the learner.

What an update takes depends on the order of the samples alone; how it is cut into micro-batches, on
the number of ranks and the budget too.
"""

import time
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import TypeVar

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
    """

    index: int
    samples: tuple[int, ...]
    num_tokens: int
    weight: float
    longest: int


@dataclass(frozen=True, slots=True)
class Share:
    """One micro-batch of a rank.

    Attributes:
        update: that it belongs to.
        samples: in the micro-batch.
        batch: None of an update without a supervised token.
        weight: 1; 0 where it only keeps a rank in step with the others.
    """

    update: Update
    samples: tuple[int, ...]
    batch: MicroBatch | None
    weight: int


class Loading:
    """The updates of a round as micro-batches.

    Args:
        order: samples in training order.
        batch_samples: samples an update, over all ranks.
        max_tokens: tokens of one forward and backward at most, padding included.
        pin: put them in memory that an accelerator copies from while it computes.
    """

    def __init__(
        self,
        samples: RoundSamples,
        order: Sequence[int],
        *,
        batch_samples: int,
        max_tokens: int,
        rank: int = 0,
        num_ranks: int = 1,
        pin: bool = False,
    ) -> None:
        self._samples, self._order = samples, order
        self._batch_samples, self._max_tokens = batch_samples, max_tokens
        self._rank, self._num_ranks, self._pin = rank, num_ranks, pin
        self.num_updates = -(-len(order) // batch_samples)

    def shares(self, first_update: int) -> Iterator[tuple[Share, float]]:
        """This rank's micro-batches from an update on, and the seconds each was waited for.

        They are read and put together in a thread of their own while the learner computes.
        """
        return ahead(self._shares(first_update), _AHEAD)

    def _update(self, index: int) -> Update:
        """What an update takes."""
        start = index * self._batch_samples
        batch, samples = self._order[start : start + self._batch_samples], self._samples
        return Update(
            index=index,
            samples=tuple(batch),
            num_tokens=samples.num_tokens(batch),
            weight=samples.weight(batch),
            longest=samples.longest(batch),
        )

    def _shares(self, first_update: int) -> Iterator[Share]:
        for update in map(self._update, range(first_update, self.num_updates)):
            if not update.num_tokens:
                yield Share(update, (), None, 0)
            for samples, weight in self._cut(update.samples):
                batch = self._samples.collate(samples)
                batch = batch.pinned() if self._pin else batch
                yield Share(update, tuple(samples), batch, weight)

    def _cut(self, samples: Sequence[int]) -> list[tuple[list[int], int]]:
        """This rank's micro-batches, with weight 1.

        Ranks take the same number of backward passes: the collectives of ZeRO need that. A rank
        with fewer micro-batches repeats a sample of the update with weight 0.
        """
        dealt = self._samples.dealt(samples, self._num_ranks)
        ranks = [list(self._samples.micro_batches(mine, self._max_tokens)) for mine in dealt]
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
