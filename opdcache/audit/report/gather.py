"""Everything that a report says, in one pass over the shards and a few rows again."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from ...runfolder import RunFolder
from ...schemas.audit import Audit
from ...schemas.rounds import EvaluationRound
from ..rows import Texts
from ..run import audit
from ..targets import Target
from ..worst import Worst
from .sets import Sets, sets_of
from .views import NUM_RANDOM, View, Wanted, chosen, views, worst_first

NUM_WORST = 4
MOST_CHUNKS = 40
_CHUNK_TOKENS = 4
"""Of the finest position chunks; they are put together to as many as a figure can hold."""


@dataclass(frozen=True, slots=True)
class Contents:
    """What a report says.

    Attributes:
        evaluations: of the held-out prompts, by round.
        worst: completions and tokens that are worst by each measure.
        views: these and others, token by token.
    """

    audit: Audit
    evaluations: tuple[EvaluationRound, ...]
    worst: Worst
    views: list[View]
    sets: Sets


def gather(
    target: Target,
    folder: RunFolder,
    *,
    k: int = 16,
    num_worst: int = NUM_WORST,
    rows: Sequence[str] = (),
    only: Iterable[int] = (),
) -> Contents:
    """Look at a run's rounds.

    Args:
        k: entries that the overlap is taken of.
        num_worst: completions, and tokens, of each measure that are shown.
        rows: completions to show besides, ``SHARD:ROW``.
        only: rounds; by default all that there are.

    Raises:
        UsageError: a row is none of these rounds.
        NotInstalled: a tokenizer's package is not there.
    """
    config = target.config
    asked_for = list[Wanted](chosen(target, rows))
    worst = Worst(num_worst, NUM_RANDOM if num_worst else 0)
    limits = None if config is None else config.audit
    found = audit(
        target,
        k=k,
        chunk_tokens=_CHUNK_TOKENS,
        max_chunks=MOST_CHUNKS,
        limits=limits,
        worst=worst,
    )
    rounds = list(only) or range(1 + (0 if config is None else config.rounds))
    evaluations = (folder.find(EvaluationRound, index) for index in rounds)
    wanted = [*asked_for, *worst_first(worst)]
    return Contents(
        audit=found,
        evaluations=tuple(filter(None, evaluations)),
        worst=worst,
        views=views(target.cache, wanted, Texts(target.tokenizer), k),
        sets=sets_of(folder, target.cache, rounds),
    )
