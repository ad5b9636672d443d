"""Everything that a report says, in one pass over the shards and a few rows again."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from ... import documents
from ...accuracy import Answered, accuracies
from ...runfolder import RunFolder
from ...schemas.audit import Audit
from ...schemas.config import RunConfig
from ...schemas.evaluation import ModelAccuracy
from ...schemas.rounds import AccuracyRound, EvaluationRound, TeacherAccuracy
from ..labels import judge_of
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
        accuracies: of the same, where a verifier has judged them, and of the teacher.
        worst: completions and tokens that are worst by each measure.
        views: these and others, token by token.
    """

    audit: Audit
    evaluations: tuple[EvaluationRound, ...]
    accuracies: tuple[ModelAccuracy, ...]
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
    verifier: str | None = None,
) -> Contents:
    """Look at a run's rounds.

    Args:
        k: entries that the overlap is taken of.
        num_worst: completions, and tokens, of each measure that are shown.
        rows: completions to show besides, ``SHARD:ROW``.
        only: rounds; by default all that there are.
        verifier: that labels completions; by default that of the run's evaluation.

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
        judge=judge_of(target, verifier),
        worst=worst,
    )
    rounds = list(only) or range(1 + (0 if config is None else config.rounds))
    evaluations = (folder.find(EvaluationRound, index) for index in rounds)
    wanted = [*asked_for, *worst_first(worst)]
    return Contents(
        audit=found,
        evaluations=tuple(filter(None, evaluations)),
        accuracies=_accuracies(folder, rounds, config),
        worst=worst,
        views=views(target.cache, wanted, Texts(target.tokenizer), k),
        sets=sets_of(folder, target, rounds),
    )


def _accuracies(
    folder: RunFolder, rounds: Iterable[int], config: RunConfig | None
) -> tuple[ModelAccuracy, ...]:
    """Of the rounds that the run file's verifier has judged, and of the teacher where that is asked
    for: what 'opdcache evaluate' told last. Those that it would judge anew are left out."""
    evaluation = None if config is None else config.evaluation
    if evaluation is None:
        return ()
    found = [folder.find(AccuracyRound, index) for index in rounds]
    judged: list[AccuracyRound | TeacherAccuracy] = [one for one in found if one is not None]
    teacher = documents.read(TeacherAccuracy, folder.teacher_path / "accuracy.json")
    if evaluation.teacher and teacher is not None:
        judged.append(teacher)
    judged = [one for one in judged if one.verifier == evaluation.verifier]
    if not judged:
        return ()
    newest = _asked(judged[0])
    judged = [one for one in judged if _asked(one) == newest]
    return accuracies([Answered.of(getattr(one, "round", None), one.prompts) for one in judged])


def _asked(one: AccuracyRound | TeacherAccuracy) -> tuple[str, ...]:
    """What was judged, and by what."""
    return one.version, *(prompt.prompt_id for prompt in one.prompts)
