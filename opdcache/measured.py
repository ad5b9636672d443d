"""What finished rounds and committed shards tell of the work to come: lengths, bytes, rates.

The newest manifests of a cache are looked at, whoever asked for them. Each answer says what it was
measured on; where nothing is alike enough there is none.
"""

import platform
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TypeVar

from .costs import rollout_bytes_per_token, score_bytes_per_token
from .errors import IntegrityError
from .resolve import model_arguments
from .rollout.tasks import policy_arguments
from .runfolder import RunContext
from .schemas.manifests import RolloutIdentity, RolloutManifest, Sampling, ScoreManifest
from .schemas.plan import Measured
from .schemas.rounds import HeldOutRound, RolloutRound, RoundFile, TrainRound

AnyRound = TypeVar("AnyRound", bound=RoundFile)
MOST_READ = 1000
"""Manifests of a kind that are looked at: the newest ones of a large cache."""


@dataclass(frozen=True, slots=True)
class Evidence:
    """What there is to measure on.

    Attributes:
        left_out: manifests that are not looked at, by reason.
    """

    rollouts: Sequence[RolloutManifest]
    scores: Sequence[ScoreManifest]
    sampled: Sequence[RolloutRound]
    held_out: Sequence[HeldOutRound]
    trained: Sequence[TrainRound]
    left_out: dict[str, int]


@dataclass(frozen=True, slots=True)
class Lengths:
    """Mean completion lengths, in tokens: of all tasks, and of each that was seen."""

    mean: Measured
    by_task: dict[str, float]

    def of(self, task: str, num_rows: int, most_tokens: int) -> float:
        """Tokens of so many completions of a task; never more than the bound."""
        mean = self.by_task.get(task, self.mean.value)
        return most_tokens if mean is None else min(mean * num_rows, most_tokens)


def evidence(context: RunContext) -> Evidence:
    """The cache's newest manifests, and the run's round files."""
    read: list[RolloutManifest | ScoreManifest] = []
    left_out: dict[str, int] = {}
    for kind in ("rollouts", "scores"):
        listed = sorted(
            context.cache.objects.list(f"commits/{kind}"),
            key=lambda info: (info.last_modified, info.path),
            reverse=True,
        )
        taken = [info.path for info in listed[:MOST_READ]]
        found = context.cache.objects.each(_reader(context), taken)
        read += [manifest for manifest in found if manifest is not None]
        counts = {
            f"of {kind}, older than the newest {MOST_READ:,}": len(listed) - len(taken),
            f"of {kind}, unsound: see 'opdcache cache verify'": found.count(None),
        }
        left_out |= {reason: count for reason, count in counts.items() if count}
    return Evidence(
        rollouts=[m for m in read if isinstance(m, RolloutManifest)],
        scores=[m for m in read if isinstance(m, ScoreManifest)],
        sampled=_finished(context, RolloutRound),
        held_out=_finished(context, HeldOutRound),
        trained=_finished(context, TrainRound),
        left_out=left_out,
    )


def _reader(context: RunContext) -> Callable[[str], RolloutManifest | ScoreManifest | None]:
    """Reads a manifest; one that is unsound is none, and somebody else's business."""

    def read(path: str) -> RolloutManifest | ScoreManifest | None:
        try:
            return context.cache.manifest(path)
        except IntegrityError:
            return None

    return read


def _finished(context: RunContext, kind: type[AnyRound]) -> list[AnyRound]:
    files = (context.folder.find(kind, index) for index in range(context.config.rounds + 1))
    return [file for file in files if file is not None]


def lengths(
    found: Evidence,
    finished: Sequence[RolloutRound | HeldOutRound],
    student: str,
    sampling: Sampling,
) -> Lengths:
    """Completion lengths of this run's finished rounds, else of the same student and sampling.

    Args:
        finished: rounds that were sampled so.
        student: fingerprint of the policy that is sampled first.
    """
    if finished:
        shards = [(s.task, s.num_rows, s.num_tokens) for file in finished for s in file.shards]
        source = f"{_counted(len(finished), 'finished round')} of this run"
    else:
        shards = [
            (m.task, m.num_rows, m.num_tokens)
            for m in found.rollouts
            if isinstance(m.identity, RolloutIdentity)
            and (m.identity.student, m.identity.sampling) == (student, sampling)
        ]
        source = f"{_counted(len(shards), 'shard')} of the same student and sampling in the cache"
    if not shards:
        return Lengths(Measured(value=None, source="not measured yet: the upper bound"), {})
    by_task = {
        task: _ratio((tokens, rows) for name, rows, tokens in shards if name == task)
        for task in {task for task, _, _ in shards}
    }
    mean = _ratio((tokens, rows) for _, rows, tokens in shards)
    return Lengths(Measured(value=mean, source=source), by_task)


def rollout_bytes(found: Evidence, student_topk: int, prompt_tokens: float) -> Measured:
    """Bytes of a rollout shard a completion token.

    Args:
        prompt_tokens: prompt tokens a completion token of what is planned.
    """
    alike = [m for m in found.rollouts if m.identity.student_topk == student_topk]
    return _stored(alike, rollout_bytes_per_token(student_topk, prompt_tokens))


def score_bytes(found: Evidence, context: RunContext) -> Measured:
    """Bytes of a score shard a completion token; alike are those of the same columns and widths.

    What the teacher of no task of its own stores stands for all.
    """
    config = context.config
    asked, columns = config.score, config.columns_of(config.teacher)
    widths = {m.key: m.identity.student_topk for m in found.rollouts}
    alike = [
        m
        for m in found.scores
        if set(m.identity.columns) == columns
        and ("topk" not in columns or (m.identity.k, m.identity.mass) == (asked.k, asked.mass))
        and (m.identity.draws, m.identity.step) == (asked.draws, asked.step)
        and ("student_topk" not in columns or _width(widths, m) == config.rollout.student_topk)
    ]
    estimate = score_bytes_per_token(
        columns, k=asked.k, student_topk=config.rollout.student_topk, draws=asked.draws
    )
    return _stored(alike, estimate)


def _width(widths: dict[str, int], scores: ScoreManifest) -> int | None:
    return widths.get(scores.rollout_key)


def _stored(alike: Sequence[RolloutManifest | ScoreManifest], estimate: float) -> Measured:
    num_tokens = sum(m.num_tokens for m in alike)
    if not num_tokens:
        return Measured(value=round(estimate, 1), source="estimated: no such shard in the cache")
    return Measured(
        value=sum(size_bytes(m) for m in alike) / num_tokens,
        source=f"{_counted(len(alike), 'shard')} alike in the cache",
    )


def size_bytes(manifest: RolloutManifest | ScoreManifest) -> int:
    """Bytes of a shard's objects."""
    return sum(entry.size_bytes for entry in manifest.objects)


def rollout_rate(found: Evidence, context: RunContext) -> Measured:
    """Completion tokens a second of one worker: this machine, engine arguments and model size.

    A later student is as fast as the first, so whatever this run sampled counts.
    """
    config, host = context.config.rollout, platform.node()
    engine = policy_arguments(config.dtype, config.engine)
    return _rate(
        m
        for m in found.rollouts
        if isinstance(m.identity, RolloutIdentity)
        and m.provenance.host == host
        and (m.identity.engine, m.provenance.details) == (engine, config.engine)
        and (
            m.identity.student == context.resolved.student
            or m.provenance.run_id == context.resolved.run_id
        )
    )


def score_rate(found: Evidence, context: RunContext) -> Measured:
    """Completion tokens a second of one worker: this machine, and one of the teachers as it runs.

    References are taken to be as fast.
    """
    config, resolved = context.config, context.resolved
    teachers = [(resolved.teacher, config.teacher)]
    teachers += [(resolved.teachers[task], config.teachers[task]) for task in resolved.teachers]
    prints = {fingerprint for fingerprint, _ in teachers}
    here = [
        m
        for m in found.scores
        if m.identity.teacher in prints and m.provenance.host == platform.node()
    ]
    if not here:
        return _NO_RATE
    asked = [(f, t.dtype, model_arguments(t), t.backend.type) for f, t in teachers]

    def runs_as(m: ScoreManifest) -> tuple[object, ...]:
        identity, backend = m.identity, m.provenance.details.get("backend")
        return identity.teacher, identity.dtype, identity.arguments, backend

    return _rate(m for m in here if runs_as(m) in asked)


def train_rate(found: Evidence) -> Measured:
    """Completion tokens a second of the learner in this run's rounds, starting it included."""
    rounds = [file for file in found.trained if file.elapsed_s and file.num_tokens]
    if not rounds:
        return _NO_RATE
    value = _ratio((file.num_tokens, file.elapsed_s) for file in rounds)
    return Measured(value=value, source=f"{_counted(len(rounds), 'train round')} of this run")


_NO_RATE = Measured(value=None, source="no rate: give --rates")


def _rate(alike: Iterable[RolloutManifest | ScoreManifest]) -> Measured:
    made = [(m.num_tokens, m.provenance.elapsed_s) for m in alike]
    if not sum(tokens for tokens, _ in made) or not sum(seconds for _, seconds in made):
        return _NO_RATE
    source = f"{_counted(len(made), 'shard')} made on {platform.node()}"
    return Measured(value=_ratio(made), source=source)


def _ratio(pairs: Iterable[tuple[float, float]]) -> float:
    """The sum of the first over the sum of the second."""
    above, below = zip(*pairs, strict=True)
    return float(sum(above) / sum(below))


def _counted(count: int, noun: str) -> str:
    return f"{count:,} {noun}{'' if count == 1 else 's'}"
