"""Plans a round's score shards and makes those that no committed score set serves.

Every rollout shard is scored by its task's teacher, and by every reference.
"""

import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import get_args

import numpy as np
from numpy.typing import NDArray
from pydantic import JsonValue

from ..errors import ConfigError, InputsMissing
from ..identity import digest, key_of, model_fingerprint
from ..resolve import model_arguments
from ..runfolder import RunContext
from ..schemas.columns import ScoreColumn
from ..schemas.manifests import ScoreIdentity, ScoreManifest, ScoreRequirement
from ..schemas.rounds import RolloutRound, RolloutShard, ScoredShard, ScoreRound
from ..schemas.teachers import STUDENT, TeacherConfig
from ..stage import give_up, interrupts, make_shards, provenance
from ..store import codec
from ..store import rollouts as shards
from ..store.arrays import need_compression
from ..store.cache import Attempt, score_commit
from ..store.encoding import ScoreBuilder
from ..store.scores import GROUP
from ..store.upkeep import quarantining
from .backends import load_teacher
from .rendering import Rendering
from .teacher import Ask, Sequences, Teacher


@dataclass(frozen=True, slots=True)
class Model:
    """A scoring model of a round, the ids that it shares with the student (those below
    ``num_ids``), and how it reads prompts."""

    config: TeacherConfig
    fingerprint: str
    num_ids: int
    rendering: Rendering

    @property
    def loaded(self) -> str:
        """What is loaded of it: alike for models that differ in how they read prompts alone."""
        arguments = self.config.model_dump(mode="json", exclude={"prompt"})
        return digest([self.fingerprint, arguments])


@dataclass(frozen=True, slots=True)
class ScoreTask:
    """One score set to be.

    Attributes:
        rollout: the shard that is scored.
        model: what scores it.
        need: what the run needs of any score set.
        identity: of the set that this run would make.
    """

    rollout: RolloutShard
    model: Model
    need: ScoreRequirement
    identity: ScoreIdentity

    @property
    def key(self) -> str:
        """Key of the score set."""
        return key_of(self.identity)


@dataclass(frozen=True, slots=True)
class ScorePlan:
    """A round's score sets: of the tasks' teachers, and of each reference; a task a shard."""

    teachers: tuple[ScoreTask, ...]
    references: Mapping[str, tuple[ScoreTask, ...]]

    @property
    def tasks(self) -> dict[str, ScoreTask]:
        """Every task by key, those of one loaded model together."""
        every = [*self.teachers, *(t for tasks in self.references.values() for t in tasks)]
        every.sort(key=lambda task: task.model.loaded)
        return {task.key: task for task in every}


def run(context: RunContext, round_index: int) -> ScoreRound:
    """Make what is missing of a round's scores, and write its round file.

    Raises:
        InputsMissing: the round has no rollouts yet.
    """
    done = context.folder.find(ScoreRound, round_index)
    if done is not None and context.folder.is_done(
        context.config, "score", round_index, context.cache
    ):
        context.progress.say(f"round {round_index} score: already done, nothing to do")
        return done
    if done is not None:
        context.progress.say(f"round {round_index} score: making anew what was put aside")
    with quarantining(context.cache):
        return _run(context, round_index, anew=done is not None)


def _run(context: RunContext, round_index: int, *, anew: bool) -> ScoreRound:
    started = time.monotonic()
    need_compression(context.config.score.compression)
    sampled = context.folder.need(RolloutRound, round_index)
    for name, reference in context.config.references.items():
        if reference.model == STUDENT:
            _refuse_another_policy(context, sampled, f"references.{name}: {STUDENT}")
    plan = plan_shards(context, sampled.shards, round_index)
    tasks = plan.tasks
    cache = context.cache
    served = cache.objects.each(lambda t: cache.serve(t.rollout.content, t.need), tasks.values())
    found = dict(zip(tasks, served, strict=True))
    serving = [manifest.key for sets in found.values() for manifest, _ in sets or ()]
    context.cache.pin(context.resolved.run_id, "scores", [*tasks, *serving])
    missing = tuple(
        score_commit(task.rollout.content, task.need.teacher, key)
        for key, task in tasks.items()
        if found[key] is None
    )
    contents = [shard.content for shard in sampled.shards]
    context.folder.write_plan(ScoreRound, round_index, tasks, missing, contents)
    where = f"round {round_index} score"
    _make(context, tasks, where)
    failed = _failed(context, tasks)
    most = context.config.max_failed_shards
    context.folder.failures.refuse(failed, most, len(sampled.shards), where)
    references = {
        name: tuple(_served(context, task) for task in of if task.rollout.content not in failed)
        for name, of in plan.references.items()
    }
    listed = tuple(
        _served(context, task) for task in plan.teachers if task.rollout.content not in failed
    )
    every = (listed, *references.values())
    used = [served.key for scored in every for shard in scored for served in shard.served]
    context.cache.pin(context.resolved.run_id, "scores", used)
    context.folder.write(
        ScoreRound(
            round=round_index,
            shards=listed,
            references=references,
            failed=failed,
            elapsed_s=round(time.monotonic() - started, 3),
        ),
        anew=anew,
    )
    return context.folder.need(ScoreRound, round_index)


def run_student(context: RunContext, round_index: int) -> None:
    """Score a round's policy on its own completions, for whoever looks at them: its entropy, and
    likeliest entries. They are in the cache beside the teacher's, and no loss reads them.

    Raises:
        InputsMissing: the round has no rollouts yet.
        ConfigError: they are another policy's.
    """
    sampled = context.folder.need(RolloutRound, round_index)
    _refuse_another_policy(context, sampled, "--student: what scores")
    config = TeacherConfig(
        model=str(context.student(round_index)), dtype=context.config.rollout.dtype
    )
    model = _model(config, sampled.student, context.resolved.vocab_size)
    columns = frozenset[ScoreColumn]({"sampled", "entropy", "topk"})
    planned = (_task(context, shard, model, columns) for shard in sampled.shards)
    tasks = {task.key: task for task in planned}
    context.cache.pin(context.resolved.run_id, "scores", tasks)
    where = f"round {round_index} score of the student"
    with quarantining(context.cache):
        _make(context, tasks, where)
    context.folder.failures.refuse(_failed(context, tasks), 0, len(tasks), where)


def _make(context: RunContext, tasks: Mapping[str, ScoreTask], what: str) -> None:
    """Make every set that nothing serves."""
    teachers = Teachers(context)
    context.progress.begin(what, len(tasks), "shards")
    try:
        with interrupts(give_up):
            make_shards(
                context.cache,
                "scores",
                tasks,
                is_done=lambda task: (
                    context.cache.serve(task.rollout.content, task.need) is not None
                ),
                compute=_Scorer(context, teachers).make,
                prepare=lambda task: teachers.of(task.model),
                renew=teachers.close,
                failures=context.folder.failures,
                worker=context.worker,
                progress=context.progress,
            )
    finally:
        context.progress.end()
        with suppress(Exception):  # an engine that broke may not stop in order
            teachers.close()


def _failed(context: RunContext, tasks: Mapping[str, ScoreTask]) -> dict[str, str]:
    """Contents whose set was set aside, and that no other set serves."""
    aside = context.folder.failures.aside("scores", tasks)
    return {
        task.rollout.content: aside[key]
        for key, task in tasks.items()
        if key in aside and context.cache.serve(task.rollout.content, task.need) is None
    }


def _refuse_another_policy(context: RunContext, sampled: RolloutRound, asked_by: str) -> None:
    """Raise where the policy that sampled is to score, and it is not this run's student."""
    if (policy := context.policy(sampled.round)) != sampled.student:
        raise ConfigError(
            f"{asked_by} is the policy that sampled, and these rollouts are of another one than "
            "this run's student",
            where=f"round {sampled.round}",
            expected=f"policy {policy[:12]}",
            got=sampled.student[:12],
            remedy="name the folder of that policy as a reference",
        )


def plan_shards(
    context: RunContext, rollouts: Sequence[RolloutShard], round_index: int
) -> ScorePlan:
    """The score sets that this run would make of a round's rollouts.

    Raises:
        PromptError: a teacher's prompt cannot be made of a shard's.
    """
    config, resolved = context.config, context.resolved

    absent: set[ScoreColumn] = set()
    if config.rollouts is not None and not _records_topk(context, rollouts):
        absent.add("student_topk")

    def tasks(models: Sequence[Model]) -> tuple[ScoreTask, ...]:
        return tuple(
            _task(context, rollout, model, config.columns_of(model.config) - absent)
            for rollout, model in zip(rollouts, models, strict=True)
        )

    by_task = {
        task: _model(
            config.teacher_of(task), resolved.teacher_of(task), resolved.shared_ids_of(task)
        )
        for task in {shard.task for shard in rollouts}
    }
    references = {name: _reference(context, name, round_index) for name in config.references}
    return ScorePlan(
        tasks([by_task[shard.task] for shard in rollouts]),
        {name: tasks([model] * len(rollouts)) for name, model in references.items()},
    )


def _records_topk(context: RunContext, rollouts: Sequence[RolloutShard]) -> bool:
    """Whether rollouts that were taken from elsewhere record the student's likeliest ids."""
    manifests = context.cache.objects.each(context.cache.need_rollouts, rollouts)
    return all(manifest.identity.student_topk for manifest in manifests)


def _reference(context: RunContext, name: str, round_index: int) -> Model:
    config = context.config.references[name]
    if config.model != STUDENT:
        resolved = context.resolved
        return _model(config, resolved.references[name], resolved.shared_ids[f"references.{name}"])
    student = context.student(round_index)
    fingerprint = model_fingerprint(student, context.folder.hashes)
    named = config.model_copy(update={"model": str(student)})
    return _model(named, fingerprint, context.resolved.vocab_size)


def _model(config: TeacherConfig, fingerprint: str, num_ids: int) -> Model:
    return Model(config, fingerprint, num_ids, Rendering(config))


def _task(
    context: RunContext, rollout: RolloutShard, model: Model, columns: frozenset[ScoreColumn]
) -> ScoreTask:
    score = context.config.score
    need = ScoreRequirement(
        teacher=model.fingerprint,
        rendering=model.rendering.key(context.cache, rollout),
        dtype=model.config.dtype,
        arguments=model_arguments(model.config),
        columns=columns,
        k=score.k,
        mass=score.mass,
        num_ids=model.num_ids,
        step=score.step,
        draws=score.draws,
    )
    identity = ScoreIdentity(
        content=rollout.content,
        draw_seed=score.draw_seed if need.draws else 0,
        **need.model_dump(exclude={"columns"}),
        columns=tuple(sorted(need.columns)),
    )
    return ScoreTask(rollout, model, need, identity)


def _served(context: RunContext, task: ScoreTask) -> ScoredShard:
    content = task.rollout.content
    served = context.cache.serve(content, task.need)
    if served is None:
        raise InputsMissing(
            "a score set went away while the stage ran",
            where=context.cache.objects.at(f"commits/scores/{content[:3]}"),
            remedy="run the same command again",
        )
    return ScoredShard(
        content=content,
        teacher=task.need.teacher,
        served=tuple(columns for _, columns in served),
        cached=bool(served)
        and all(m.provenance.run_id != context.resolved.run_id for m, _ in served),
    )


class Teachers:
    """The scoring models of a run, one of them loaded at a time, when it is needed."""

    def __init__(self, context: RunContext) -> None:
        self._context = context
        self._teacher: Teacher | None = None
        self._loaded: str | None = None

    def of(self, model: Model) -> Teacher:
        """The model, ready to score."""
        if self._teacher is None or self._loaded != model.loaded:
            self.close()
            self._teacher = load_teacher(self._context, model.config)
            self._loaded = model.loaded
        return self._teacher

    def close(self) -> None:
        """Give the loaded model's memory back."""
        teacher, self._teacher, self._loaded = self._teacher, None, None
        if teacher is not None:
            teacher.close()


class _Scorer:
    """Makes score sets."""

    def __init__(self, context: RunContext, teachers: Teachers) -> None:
        self._context, self._teachers = context, teachers

    def make(self, task: ScoreTask, attempt: Attempt) -> ScoreManifest:
        """Score one rollout shard into the attempt."""
        context, identity = self._context, task.identity
        teacher = self._teachers.of(task.model)
        started = time.monotonic()
        sequences = read_sequences(context, task)
        builder = ScoreBuilder(sequences.offsets, frozenset(identity.columns), identity.step)
        for batch in teacher.score(sequences, ask_for(identity, sequences)):
            builder.add(batch.rows, batch.scores)
        attributes = {"format": "opdcache scores", "identity": identity.model_dump(mode="json")}
        encoded = builder.encode(attributes, context.config.score.compression)
        for path, data in encoded.items():
            attempt.put(f"{GROUP}/{path}", data)
        num_tokens = int(sequences.offsets[-1])
        return ScoreManifest(
            key=task.key,
            attempt=attempt.name,
            objects=tuple(attempt.entries),
            num_rows=len(sequences.completions),
            num_tokens=num_tokens,
            dropped={},
            provenance=provenance(
                context.resolved.run_id,
                started=started,
                num_tokens=num_tokens,
                details=teacher.details() | _told_of(task.model.config),
            ),
            identity=identity,
            rollout_key=task.rollout.key,
            vocab_size=identity.num_ids,
            clip_floor=codec.clip_floor(identity.step),
        )


def read_sequences(context: RunContext, task: ScoreTask) -> Sequences:
    """A rollout shard as the task's model reads it."""
    cache = context.cache
    table = cache.read_rollouts(cache.need_rollouts(task.rollout), Rendering.COLUMNS)
    num_tokens = int(shards.token_offsets(table)[-1])
    recorded = (
        shards.flat_tokens(table, "student_topk_ids", np.int32)
        if "student_topk" in task.identity.columns
        else np.zeros((num_tokens, 0), np.int32)
    )
    return Sequences(
        task.model.rendering.prompts(table),
        shards.token_lists(table, "completion_token_ids"),
        recorded,
    )


def ask_for(identity: ScoreIdentity, sequences: Sequences) -> Ask:
    """What a score set asks of its model."""
    num_tokens = int(sequences.offsets[-1])
    return Ask(
        columns=frozenset(identity.columns),
        k=identity.k,
        mass=identity.mass,
        num_ids=identity.num_ids,
        uniforms_TN=_uniforms(identity, num_tokens),
    )


def _uniforms(identity: ScoreIdentity, num_tokens: int) -> NDArray[np.float64] | None:
    """Numbers that the draws are made of: the shard's own, whatever the batches are."""
    if not identity.draws:
        return None
    seed = np.random.SeedSequence([identity.draw_seed, int(identity.content, 16)])
    return np.random.Generator(np.random.Philox(seed)).random((num_tokens, identity.draws))


def _told_of(config: TeacherConfig) -> dict[str, JsonValue]:
    """What the prompt was made of, which the key has a digest of; and the columns that no set of
    this backend has, for whoever misses one."""
    lacking = sorted(set(get_args(ScoreColumn)) - config.can_give)
    told: dict[str, JsonValue] = {"cannot_give": list(lacking)} if lacking else {}
    if config.prompt is not None:
        told["prompt"] = config.prompt.model_dump(mode="json", exclude_none=True)
    return told
