"""A run's folder: what the run resolved to, its round files, its students.

Round files are written when a stage of a round is complete, and again only when a shard that they
pin was put aside. Which stages are done is read from them and the cache's quarantine.
"""

import json
import os
import secrets
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import TypeVar

from pydantic import ValidationError

from .errors import Held, InputsMissing, InvalidShard, ModelError, RunChanged, TokenizerMismatch
from .identity import (
    FileHashes,
    digest,
    model_config,
    model_fingerprint,
    model_vocab_size,
    tokenizer_files,
    vocabulary_difference,
    vocabulary_fingerprint,
)
from .prompts import Tokenizer
from .schemas.base import Model
from .schemas.config import ModelRef, RunConfig
from .schemas.rounds import (
    EvaluationRound,
    HeldOutRound,
    Resolved,
    RolloutRound,
    RoundFile,
    ScoreRound,
    Stage,
    StagePlan,
    TrainRound,
)
from .stage import Progress, Worker
from .store.cache import Cache, score_commit
from .store.claims import Claims
from .store.objects import ObjectStore

AnyFile = TypeVar("AnyFile", bound=Model)
AnyRound = TypeVar("AnyRound", bound=RoundFile)
_FILES: dict[type[Model], str] = {
    RolloutRound: "rollout.json",
    HeldOutRound: "held_out.json",
    ScoreRound: "score.json",
    TrainRound: "train.json",
    EvaluationRound: "evaluation.json",
}
_MAY_CHANGE = ("rounds", "output")


class RunFolder:
    """Paths and files of one run."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def round_path(self, round_index: int) -> Path:
        """Folder of a round's files."""
        return self.path / "rounds" / f"{round_index:03d}"

    def student_path(self, round_index: int) -> Path:
        """Where the policy of a round, from 1 on, is exported."""
        return self.path / "students" / f"{round_index:03d}"

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

    @property
    def hashes(self) -> FileHashes:
        """Hashes of model files, remembered in this folder."""
        return FileHashes(self.path / "file-hashes.json")

    def find(self, kind: type[AnyRound], round_index: int) -> AnyRound | None:
        """A round's file; None when that stage is not done."""
        return _read(kind, self.round_path(round_index) / _FILES[kind])

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

    def is_done(self, config: RunConfig, stage: Stage, round_index: int, cache: Cache) -> bool:
        """Whether a stage of a round has written its files, and what they pin is still there."""
        files = [self.find(kind, round_index) for kind in stage_files(config, stage, round_index)]
        return all(file is not None and self._is_sound(file, cache) for file in files)

    def _is_sound(self, file: RoundFile, cache: Cache) -> bool:
        """Whether no shard that a round's file pins was put aside, or made anew otherwise."""
        match file:
            case RolloutRound() | HeldOutRound():
                aside = cache.quarantined()
                again = ((s, cache.rollouts(s.key)) for s in file.shards if s.key in aside)
                return all(made and made.content == shard.content for shard, made in again)
            case ScoreRound():
                rollouts = self.need(RolloutRound, file.round).shards
                commits = {
                    item.key: score_commit(shard.content, file.teacher, item.key)
                    for shard in file.shards
                    for item in shard.served
                }
                same = [s.content for s in rollouts] == [s.content for s in file.shards]
                return same and not cache.gone(commits)
            case _:
                return True

    def write(self, value: RoundFile, *, anew: bool = False) -> None:
        """Write a round's file unless it is there: the first worker that finishes a stage does.

        Args:
            anew: replace what is there, which pins a shard that was put aside.
        """
        _create(self.round_path(value.round) / _FILES[type(value)], value, anew=anew)

    def write_plan(self, kind: type[RoundFile], round_index: int, plan: StagePlan) -> None:
        """Note what a stage sets out to make, unless an earlier call did.

        Args:
            kind: the stage's first file, see ``stage_files``.
        """
        _create(self._plan_path(kind, round_index), plan)

    def find_plan(self, kind: type[RoundFile], round_index: int) -> StagePlan | None:
        """What a stage set out to make; None when it has not begun."""
        return _read(StagePlan, self._plan_path(kind, round_index))

    def metrics(self) -> list[dict[str, float]]:
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

    def resolved(self) -> Resolved | None:
        """What the run resolved to when it began; None when it has not begun."""
        return _read(Resolved, self.path / "resolved.json")


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


def open_run(config: RunConfig, progress: Progress, worker: Worker) -> RunContext:
    """Resolve a run file, or check it against what the run resolved to when it began.

    Raises:
        ModelError: a model is missing or incomplete.
        TokenizerMismatch: teacher and student do not share token ids.
        RunChanged: the run file or a model is not what the run began with.
    """
    assert config.output is not None
    folder = RunFolder(Path(config.output))
    began = folder.resolved()
    if began is not None:
        _same(began.config, config, folder)
    now = _resolve(config, folder, began)
    if began is None:
        _create(folder.path / "resolved.json", now)
        began = folder.resolved()
        assert began is not None
    said = {"student": "student", "teacher": "teacher", "tokenizers": "tokenizer's files"}
    for name, what in said.items():
        if getattr(began, name) != getattr(now, name):
            raise RunChanged(
                f"{what}: not what this run began with",
                where=folder.path,
                expected=getattr(began, name)[:12],
                got=getattr(now, name)[:12],
                remedy="restore it, or give the run another output folder",
            )
    resolved = began.model_copy(update={"config": config})
    return RunContext(resolved, folder, Cache(config.cache), progress, worker)


def load_tokenizer(folder: Path) -> Tokenizer:
    """The tokenizer beside a model.

    Raises:
        ModelError: there is none.
    """
    from transformers import AutoTokenizer

    try:
        tokenizer: Tokenizer = AutoTokenizer.from_pretrained(folder)
    except (OSError, ValueError, KeyError) as error:
        raise ModelError(
            "no tokenizer beside the model",
            where=folder,
            remedy="save it there with tokenizer.save_pretrained",
        ) from error
    return tokenizer


def model_folder(ref: ModelRef) -> Path:
    """The model's folder; a hub id is downloaded, or found in the hub's cache.

    Raises:
        ModelError: neither a folder nor a model of the hub.
    """
    if Path(ref.model).is_absolute():
        return Path(ref.model)
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(ref.model, revision=ref.revision))
    except (OSError, ValueError) as error:
        raise ModelError(
            "neither a model folder nor a model that the hub gives",
            where=ref.model,
            remedy="check the path, relative to the run file",
        ) from error


def _resolve(config: RunConfig, folder: RunFolder, began: Resolved | None) -> Resolved:
    """What the run file means now; ``began`` saves reading tokenizers whose files are the same."""
    student, teacher = model_folder(config.student), model_folder(config.teacher)
    sizes = [model_vocab_size(model_config(path)) for path in (student, teacher)]
    hashes = folder.hashes
    prints = [model_fingerprint(path, hashes) for path in (student, teacher)]
    files = [file for path in (student, teacher) for file in tokenizer_files(path)]
    tokenizers = digest(hashes.of(files))
    known = began is not None and began.tokenizers == tokenizers
    vocabulary = began.vocabulary if began and known else _shared_vocabulary(student, teacher)
    return Resolved(
        run_id=began.run_id if began else secrets.token_hex(8),
        opdcache=version("opdcache"),
        config=config,
        student=prints[0],
        teacher=prints[1],
        vocabulary=vocabulary,
        tokenizers=tokenizers,
        vocab_size=min(sizes),
    )


def _shared_vocabulary(student: Path, teacher: Path) -> str:
    """Fingerprint of the token ids that both models share.

    Raises:
        TokenizerMismatch: they do not.
    """
    vocabularies = [load_tokenizer(path).get_vocab() for path in (student, teacher)]
    difference = vocabulary_difference(*vocabularies)
    if difference is not None:
        raise TokenizerMismatch(
            f"teacher and student do not share token ids: {difference}",
            where=teacher,
            remedy="choose a teacher with the student's tokenizer",
        )
    return vocabulary_fingerprint(vocabularies[0])


def _same(began: RunConfig, now: RunConfig, folder: RunFolder) -> None:
    """A run that is under way keeps its meaning; only what cannot change it may change.

    The learning rate of a schedule with an end depends on the number of rounds.
    """
    may = set(_MAY_CHANGE)
    if began.train.optimizer.schedule != "constant":
        may.remove("rounds")
    old, new = (_flat(c.model_dump(mode="json", exclude=may)) for c in (began, now))
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


def _read(kind: type[AnyFile], path: Path) -> AnyFile | None:
    try:
        return kind.model_validate_json(path.read_bytes())
    except FileNotFoundError:
        return None
    except ValidationError as error:
        raise InvalidShard(
            f"not a {kind.__name__} file", where=path, remedy="delete it and run the stage again"
        ) from error


def _create(path: Path, value: Model, *, anew: bool = False) -> None:
    """Write a file whole, unless it is there or is to be written anew."""
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    draft.write_text(value.model_dump_json(indent=1) + "\n")
    if anew:
        draft.replace(path)
        return
    try:
        os.link(draft, path)
    except FileExistsError:
        pass
    finally:
        draft.unlink()
