"""A run's folder: what the run resolved to, its round files, its students.

Round files are written when a stage of a round is complete, and again only when a shard that they
pin was put aside. Which stages are done is read from them and the cache's quarantine.
"""

import json
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, TypeVar

from . import documents
from .errors import Held, InputsMissing, RunChanged
from .failures import Failures
from .identity import FileHashes, digest
from .resolve import model_folder, resolve
from .schemas.base import Model
from .schemas.config import RunConfig
from .schemas.rounds import (
    AccuracyRound,
    EvaluationRound,
    HeldOutRound,
    Resolved,
    RolloutRound,
    RoundFile,
    ScoreRound,
    Stage,
    StagePlan,
    TeacherHeldOut,
    TrainRound,
)
from .schemas.teachers import HttpBackend
from .stage import Progress, Worker
from .store.cache import Cache, score_commit
from .store.claims import Claims
from .store.objects import ObjectStore

AnyRound = TypeVar("AnyRound", bound=RoundFile)
_FILES: dict[type[Model], str] = {
    RolloutRound: "rollout.json",
    HeldOutRound: "held_out.json",
    ScoreRound: "score.json",
    TrainRound: "train.json",
    EvaluationRound: "evaluation.json",
    AccuracyRound: "accuracy.json",
}
_SERVICE = {"backend": set(HttpBackend.model_fields) - {"type", "tokenizer"}}
_MAY_CHANGE: Mapping[str, Any] = {
    "rounds": True,
    "output": True,
    "max_failed_shards": True,
    "launch": True,
    "audit": True,
    "teacher": _SERVICE,
    "teachers": {"__all__": _SERVICE},
    "references": {"__all__": _SERVICE},
    "evaluation": {"verifier", "teacher"},
}
"""What may change under way: how many rounds, where things are, how work is launched and a served
teacher is asked, what may fail, who says whether completions are right."""


class RunFolder:
    """Paths and files of one run.

    Args:
        writes: hashes of model files are remembered in the folder.
    """

    def __init__(self, path: Path, *, writes: bool = True) -> None:
        self.path, self._writes = path, writes

    def round_path(self, round_index: int) -> Path:
        """Folder of a round's files."""
        return self.path / "rounds" / f"{round_index:03d}"

    def student_path(self, round_index: int) -> Path:
        """Where the policy of a round, from 1 on, is exported."""
        return self.path / "students" / f"{round_index:03d}"

    @property
    def teacher_path(self) -> Path:
        """Folder of what the teachers did with the held-out prompts."""
        return self.path / "teacher"

    @property
    def checkpoints(self) -> Path:
        """Where the learner's state is."""
        return self.path / "checkpoints"

    @contextmanager
    def alone(self, work: str, lease_s: float = 60.0) -> Iterator[None]:
        """Be the only process on any machine that does some work on this run, for the block.

        A holder that may be dead, on a machine that was lost, is watched for as long as its lease.

        Raises:
            Held: another process does it.
        """
        claims, began = Claims(ObjectStore(str(self.path)), lease_s), time.monotonic()
        while True:
            with claims.hold("run", work) as mine:
                if mine:
                    yield
                    return
            if time.monotonic() - began > 1.2 * lease_s:
                raise Held(
                    f"another process is at this run's {work}",
                    where=self.path / "claims" / "run",
                    remedy="wait for it, or stop it and run the same command again",
                )
            time.sleep(min(1.0, lease_s / 10))

    def finished(self, work: str) -> None:
        """Some work on this run is done: delete the claim of whoever was killed while at it."""
        Claims(ObjectStore(str(self.path))).clear("run", [work], dead_only=True)

    @property
    def hashes(self) -> FileHashes:
        """Hashes of model files, remembered in this folder."""
        return FileHashes(self.path / "file-hashes.json", writes=self._writes)

    def find(self, kind: type[AnyRound], round_index: int) -> AnyRound | None:
        """A round's file; None when that stage is not done."""
        return documents.read(kind, self.round_path(round_index) / _FILES[kind])

    def need(self, kind: type[AnyRound], round_index: int) -> AnyRound:
        """A round's file that a later stage builds on.

        Raises:
            InputsMissing: that stage is not done.
        """
        found = self.find(kind, round_index)
        if found is None:
            stage = _FILES[kind].removesuffix(".json")
            raise InputsMissing(
                f"round {round_index} has no finished {stage} stage",
                where=self.path,
                remedy=f"run 'opdcache {stage} RUN.yaml --round {round_index}' first",
            )
        return found

    def scored(self, round_index: int) -> tuple[RolloutRound, ScoreRound]:
        """A round's rollouts without those that could not be scored, and their scores.

        Raises:
            InputsMissing: the round is not scored.
        """
        rollouts, scores = self.need(RolloutRound, round_index), self.need(ScoreRound, round_index)
        shards = tuple(s for s in rollouts.shards if s.content not in scores.failed)
        return rollouts.model_copy(update={"shards": shards}), scores

    def with_scores(self, round_index: int) -> tuple[RolloutRound, ScoreRound]:
        """The same of a round that has something to look at.

        Raises:
            InputsMissing: the round is not scored, or no column of it is stored.
        """
        rollouts, scores = self.scored(round_index)
        if not all(shard.served for shard in scores.shards):
            raise InputsMissing(
                f"no score of round {round_index} is stored: the run file's score.columns is empty",
                where=self.path,
                remedy="take the same rollouts in another run, with 'rollouts: {from: …}', that "
                "names columns",
            )
        return rollouts, scores

    def scored_rounds(self) -> Iterator[int]:
        """Rounds that are scored, in order."""
        folders = (file.parent.name for file in self.path.glob(f"rounds/*/{_FILES[ScoreRound]}"))
        yield from sorted(int(name) for name in folders if name.isdigit())

    def is_done(self, config: RunConfig, stage: Stage, round_index: int, cache: Cache) -> bool:
        """Whether a stage of a round has written its files, and what they pin is still there."""
        files = [self.find(kind, round_index) for kind in stage_files(config, stage, round_index)]
        return all(file is not None and self.is_sound(file, cache) for file in files)

    def is_sound(self, file: RoundFile | TeacherHeldOut, cache: Cache) -> bool:
        """Whether no shard that a round's file pins was put aside, or made anew otherwise."""
        match file:
            case RolloutRound() | HeldOutRound() | TeacherHeldOut():
                aside = cache.quarantined()
                again = ((s, cache.rollouts(s.key)) for s in file.shards if s.key in aside)
                return all(made and made.content == shard.content for shard, made in again)
            case ScoreRound():
                rollouts = self.need(RolloutRound, file.round).shards
                every = (file.shards, *file.references.values())
                commits = {
                    item.key: score_commit(shard.content, shard.teacher, item.key)
                    for shards in every
                    for shard in shards
                    for item in shard.served
                }
                asked = [s.content for s in rollouts if s.content not in file.failed]
                same = asked == [s.content for s in file.shards]
                return same and not cache.gone(commits)
            case _:
                return True

    def write(self, value: RoundFile, *, anew: bool = False) -> None:
        """Write a round's file unless it is there: the first worker that finishes a stage does.

        Args:
            anew: replace what is there, which pins a shard that was put aside.
        """
        documents.create(self.round_path(value.round) / _FILES[type(value)], value, anew=anew)

    def write_plan(
        self,
        kind: type[RoundFile],
        round_index: int,
        keys: Iterable[str],
        missing: Iterable[str],
        made_from: Sequence[str],
    ) -> None:
        """Note what a stage sets out to make, unless an earlier call did.

        Args:
            kind: the stage's first file, see ``stage_files``.
            keys: of all shards.
            missing: commits that are not there.
            made_from: fingerprints and content hashes of what goes in.

        Raises:
            RunChanged: another worker makes other shards from the same.
        """
        path, every = self._plan_path(kind, round_index), sorted(keys)
        plan = StagePlan(
            num_shards=len(every),
            keys=digest(every),
            inputs=digest(list(made_from)),
            version=version("opdcache"),
            missing=tuple(missing),
        )
        if documents.create(path, plan):
            return
        first = self.find_plan(kind, round_index)
        if first is None or first.inputs != plan.inputs:
            documents.create(path, plan, anew=True)
        elif first.keys != plan.keys:
            raise RunChanged(
                "this worker would make other shards than the one that began the stage",
                where=path,
                expected=f"what opdcache {first.version} plans there",
                got=f"what opdcache {plan.version} plans here",
                remedy="run all workers in the same environment (opdcache, transformers, "
                "tokenizers, data), or delete that file if this one is right",
            )

    def find_plan(self, kind: type[RoundFile], round_index: int) -> StagePlan | None:
        """What a stage set out to make; None when it has not begun."""
        return documents.read(StagePlan, self._plan_path(kind, round_index))

    def metrics(self) -> list[dict[str, Any]]:
        """Metrics of the updates so far; a line that a kill cut short is left out."""
        rows = []
        with suppress(FileNotFoundError, ValueError):
            for line in self.metrics_path.read_text().splitlines():
                rows.append(json.loads(line))  # noqa: PERF401  (keeps the lines before a bad one)
        return rows

    @property
    def metrics_path(self) -> Path:
        """One JSON object an update."""
        return self.path / "metrics.jsonl"

    def _plan_path(self, kind: type[RoundFile], round_index: int) -> Path:
        return self.round_path(round_index) / _FILES[kind].replace(".json", ".plan.json")

    @property
    def failures(self) -> Failures:
        """Failed tries at this run's shards."""
        return Failures(self.path / "failures")

    @property
    def sent_tokens_path(self) -> Path:
        """What was sent to teachers that others serve, a number of tokens a line."""
        return self.path / "sent-teacher-tokens"

    def resolved(self) -> Resolved | None:
        """What the run resolved to when it began; None when it has not begun."""
        return documents.read(Resolved, self.path / "resolved.json")


def stage_files(config: RunConfig, stage: Stage, round_index: int) -> tuple[type[RoundFile], ...]:
    """The files that a finished stage of a round has written.

    The rollout stage samples the round's prompts, of which there are none after the last round,
    and the held-out ones of an evaluation.
    """
    if stage == "score":
        return (ScoreRound,)
    if stage == "train":
        return (TrainRound,)
    training = (RolloutRound,) if round_index < config.rounds else ()
    held_out = (HeldOutRound,) if config.evaluation is not None else ()
    return (*training, *held_out)


@dataclass(frozen=True, slots=True)
class RunContext:
    """A run as the stages see it."""

    resolved: Resolved
    folder: RunFolder
    cache: Cache
    progress: Progress
    worker: Worker

    @property
    def config(self) -> RunConfig:
        """The run file's configuration."""
        return self.resolved.config

    def student(self, round_index: int) -> Path:
        """Folder of the policy that samples in a round.

        Raises:
            InputsMissing: the round before has not been trained.
        """
        if round_index == 0:
            return model_folder(self.config.student)
        self.folder.need(TrainRound, round_index - 1)
        return self.folder.student_path(round_index)

    def policy(self, round_index: int) -> str:
        """Fingerprint of the policy that a round starts from.

        Raises:
            InputsMissing: the round before has not been trained.
        """
        if round_index == 0:
            return self.resolved.student
        return self.folder.need(TrainRound, round_index - 1).student


def open_run(
    config: RunConfig, progress: Progress, worker: Worker, *, writes: bool = True
) -> RunContext:
    """Resolve a run file, or check it against what the run resolved to when it began.

    Args:
        writes: the run begins; else it is looked at, and nothing is written.

    Raises:
        ModelError: a model is missing or incomplete.
        TokenizerMismatch: teacher and student do not share token ids.
        PromptError: there is no chat template where the prompts' is said to be.
        RunChanged: the run file, a model or the chat template is not what the run began with.
    """
    assert config.output is not None
    folder = RunFolder(Path(config.output), writes=writes)
    began = folder.resolved()
    if began is not None:
        _same(began.config, config, folder)
    now = resolve(config, folder.hashes, began)
    if began is None:
        if writes:
            documents.create(folder.path / "resolved.json", now)
        began = folder.resolved() if writes else now
        assert began is not None
    for name, then in _identities(began).items():
        if then != (found := _identities(now).get(name)):
            raise RunChanged(
                f"{name}: not what this run began with",
                where=folder.path,
                expected=then[:12],
                got=(found or "nothing")[:12],
                remedy="restore it, or give the run another output folder",
            )
    update = {"config": config, "vocab_size": now.vocab_size, "shared_ids": now.shared_ids}
    resolved = began.model_copy(update=update)  # of the same models, whoever wrote the file
    cache = Cache(config.cache) if writes else Cache.there(config.cache)
    return RunContext(resolved, folder, cache, progress, worker)


def _identities(resolved: Resolved) -> dict[str, str]:
    """What a run began with and may not change, by its name for people."""
    return {
        "student": resolved.student,
        "teacher": resolved.teacher,
        **{f"teacher of {task}": print for task, print in resolved.teachers.items()},
        **{f"reference {name}": print for name, print in resolved.references.items()},
        "tokenizer's files": resolved.tokenizers,
        **({"chat template": resolved.chat_template} if resolved.chat_template else {}),
    }


def _same(began: RunConfig, now: RunConfig, folder: RunFolder) -> None:
    """A run that is under way keeps its meaning; only what cannot change it may change.

    The learning rate of a schedule with an end depends on the number of rounds.
    """
    may: dict[str, Any] = dict(_MAY_CHANGE)
    if began.train.optimizer.schedule != "constant":
        del may["rounds"]
    old, new = (_flat(c.model_dump(mode="json", exclude=may, by_alias=True)) for c in (began, now))
    changed = [name for name in {**new, **old} if old.get(name) != new.get(name)]
    if changed:
        raise RunChanged(
            f"{', '.join(changed[:3])} changed since this run began",
            where=folder.path,
            expected=old.get(changed[0], "nothing"),
            got=new.get(changed[0], "nothing"),
            remedy="restore it, or set 'output' to another folder (the cache is shared)",
        )


def _flat(value: object, prefix: str = "") -> dict[str, object]:
    if not isinstance(value, dict) or not value:
        return {prefix: value}
    return {
        name: leaf
        for key, inner in value.items()
        for name, leaf in _flat(inner, f"{prefix}.{key}" if prefix else key).items()
    }
