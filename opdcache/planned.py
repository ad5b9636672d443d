"""The rounds and shards that a run is made of, and what of them is made: before anything runs.

Prompts are read and rendered for real. What is made is found in the run's folder and the cache; of
the rest the number of prompt tokens is exact, and that of completion tokens estimated. Nothing is
written and no model is loaded.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from . import costs, measured
from .errors import ModelError
from .identity import weight_files
from .measured import Evidence, Lengths
from .resolve import model_folder
from .rollout.stage import Part, RolloutPlan, plan_rounds
from .rollout.tasks import RolloutTask
from .rounds import steps
from .runfolder import RunContext, RunFolder, open_run, stage_files
from .schemas.config import RunConfig
from .schemas.manifests import RolloutManifest
from .schemas.rounds import HeldOutRound, Resolved, RolloutRound, RoundFile, TrainRound
from .schemas.teachers import STUDENT, HttpBackend, ModelRef
from .stage import Silent, Worker
from .store.cache import Cache, as_listed

AnySampled = TypeVar("AnySampled", RolloutRound, HeldOutRound)
_TOKENIZER_FILES = ["*.json", "*.jinja", "*.txt", "*.model"]


@dataclass(frozen=True, slots=True)
class Shard:
    """A rollout shard, and its scores.

    Attributes:
        num_prompt_tokens: each completion's counted.
        num_tokens: completion tokens: exact when it is made, else by the estimate.
        most_tokens: completion tokens by the upper bound; exact when it is made.
        rollout_bytes, score_bytes: what is stored; None while it is not made.
    """

    task: str
    num_rows: int
    num_prompt_tokens: int
    num_tokens: float
    most_tokens: int
    rollout_bytes: int | None = None
    score_bytes: int | None = None


@dataclass(frozen=True, slots=True)
class Round:
    """What a round makes, and how much of it is made.

    Attributes:
        num_updates, updates_done: of the train stage.
        dropped, held_out_dropped: prompts left out, by reason.
    """

    index: int
    training: Sequence[Shard]
    held_out: Sequence[Shard]
    num_updates: int
    updates_done: int
    dropped: dict[str, int]
    held_out_dropped: dict[str, int]


@dataclass(frozen=True, slots=True)
class Look:
    """A run as it would be opened.

    Attributes:
        student: folder of the student's tokenizer, and of its weights where they are here.
        is_blind: the models are not on this machine, so nothing is found in the cache.
    """

    context: RunContext
    student: Path
    is_blind: bool


def look(config: RunConfig) -> Look:
    """Open a run without beginning it.

    Models are fingerprinted, which reads them whole, only where something may be found by it.

    Raises:
        ModelError: a model folder is missing or incomplete.
        RunChanged: the run has begun, with another run file or other models.
    """
    assert config.output is not None
    folder, cache = RunFolder(Path(config.output), writes=False), Cache.there(config.cache)
    is_empty = next(iter(cache.objects.list("commits")), None) is None
    are_here = all(_is_here(ref) for ref in _models(config))
    if folder.resolved() is not None or (are_here and not is_empty):
        context = open_run(config, Silent(), Worker(), writes=False)
        return Look(context, model_folder(config.student), is_blind=False)
    unresolved = Resolved(
        run_id="",
        opdcache="",
        config=config,
        student="",
        teacher="",
        vocabulary="",
        tokenizers="",
        vocab_size=0,
    )
    context = RunContext(unresolved, folder, cache, Silent(), Worker())
    return Look(context, model_folder(config.student, only=_TOKENIZER_FILES), is_blind=not is_empty)


def _models(config: RunConfig) -> list[ModelRef]:
    """The models that have weights of their own."""
    scoring = (config.teacher, *config.teachers.values(), *config.references.values())
    own = [t for t in scoring if t.model != STUDENT and not isinstance(t.backend, HttpBackend)]
    return [config.student, *own]


def _is_here(ref: ModelRef) -> bool:
    """Whether a model's weights are on this machine; those of a folder must be."""
    if Path(ref.model).is_absolute():
        return True
    from huggingface_hub import snapshot_download

    try:
        found = snapshot_download(ref.model, revision=ref.revision, local_files_only=True)
        return bool(weight_files(Path(found)))
    except (OSError, ValueError, ModelError):
        return False


class Rounds:
    """Plans rounds, and finds what is made of them.

    Attributes:
        first_unknown: shards from this round on hang on students that do not exist yet.
        lengths: of training completions, and of held-out ones.
    """

    def __init__(self, looked: Look, found: Evidence) -> None:
        self._context, self._tokenizer = looked.context, looked.student
        self._is_blind = looked.is_blind
        config, folder = self._context.config, self._context.folder
        every = sorted({step.round for step in steps(config)})
        self._current = next((i for i in every if not self._is_sampled(i)), every[-1] + 1)
        first = self._context.resolved.student
        trained = folder.find(TrainRound, self._current - 1) if self._current else None
        is_there = self._current == 0 or trained is not None
        self._policy = trained.student if trained else first if is_there else ""
        self.first_unknown = self._current + is_there
        asked = config.rollout.sampling
        held_out = config.evaluation.sampling if config.evaluation else asked
        self.lengths: dict[type[RoundFile], Lengths] = {
            RolloutRound: measured.lengths(found, found.sampled, first, asked),
            HeldOutRound: measured.lengths(found, found.held_out, first, held_out),
        }

    def of(self, indexes: Sequence[int]) -> list[Round]:
        """The rounds of these indexes.

        Raises:
            PromptError: the prompts cannot be read, or none is left.
        """
        plans = plan_rounds(self._context, self._tokenizer, self._policy, indexes)
        return [self._round(i, planned) for i, planned in zip(indexes, plans, strict=True)]

    def _is_sampled(self, index: int) -> bool:
        files = stage_files(self._context.config, "rollout", index)
        return all(self._context.folder.find(kind, index) is not None for kind in files)

    def _round(self, index: int, planned: RolloutPlan) -> Round:
        train, nothing = self._context.config.train, Part((), {})
        training = planned.parts.get(RolloutRound, nothing)
        held_out = planned.parts.get(HeldOutRound, nothing)
        shards = self._shards(RolloutRound, index, training)
        samples = sum(shard.num_rows for shard in shards)
        num_updates = costs.num_updates(samples, train.epochs, train.batch_samples)
        return Round(
            index=index,
            training=shards,
            held_out=self._shards(HeldOutRound, index, held_out),
            num_updates=num_updates,
            updates_done=self._updates_done(index, num_updates),
            dropped=training.dropped,
            held_out_dropped=held_out.dropped,
        )

    def _shards(self, kind: type[AnySampled], index: int, part: Part) -> list[Shard]:
        """The shards of a part of a round: those pinned when it was sampled, else its tasks."""
        shards = {task.key: self._to_make(task, self.lengths[kind]) for task in part.tasks}
        pinned = self._context.folder.find(kind, index) or self._taken(kind, index)
        if pinned is not None:
            listed = {
                s.key: Shard(s.task, s.num_rows, 0, s.num_tokens, s.num_tokens)
                for s in pinned.shards
            }
            shards = {key: shards.get(key, shard) for key, shard in listed.items()}
        elif index != self._current or not self._policy:
            return list(shards.values())
        found = self._context.cache.committed_rollouts(shards)
        scored = self._scored(found.values(), index) if kind is RolloutRound else {}
        return [
            _made(found[key], scored.get(key)) if key in found else shard
            for key, shard in shards.items()
        ]

    def _taken(self, kind: type[AnySampled], index: int) -> AnySampled | None:
        """The round of another run that this one is to train on, if it is there yet."""
        taken = self._context.config.rollouts
        if taken is None or kind is not RolloutRound:
            return None
        return RunFolder(Path(taken.from_), writes=False).find(kind, index)

    def _to_make(self, task: RolloutTask, lengths: Lengths) -> Shard:
        room = self._context.config.rollout.engine.get("max_model_len")
        prompts = [len(request.rendered.token_ids) for request in task.requests]
        most = sum(costs.longest_completion(task.sampling, room, prompt) for prompt in prompts)
        tokens = lengths.of(task.task, len(prompts), most)
        return Shard(task.task, len(prompts), sum(prompts), tokens, most)

    def _scored(self, rollouts: Iterable[RolloutManifest], index: int) -> dict[str, int]:
        """Bytes of a model's score sets that serve rollout shards, by the rollouts' key; of several
        models the mean, where all have scored the shard."""
        made = [as_listed(manifest, cached=True) for manifest in rollouts]
        if not made or self._is_blind:
            return {}
        from .score.stage import plan_shards  # imports torch

        plan = plan_shards(self._context, made, index)
        sizes: dict[str, list[int | None]] = {shard.key: [] for shard in made}
        for task in (*plan.teachers, *(t for tasks in plan.references.values() for t in tasks)):
            served = self._context.cache.serve(task.rollout.content, task.need)
            total = sum(measured.size_bytes(scores) for scores, _ in served or ())
            sizes[task.rollout.key].append(total if served is not None else None)
        return {
            key: sum(filter(None, of)) // len(of) for key, of in sizes.items() if None not in of
        }

    def _updates_done(self, index: int, num_updates: int) -> int:
        if self._context.folder.find(TrainRound, index) is not None:
            return num_updates
        logged = sum(1 for row in self._context.folder.metrics() if row["round"] == index)
        return min(logged, num_updates)


def _made(rollouts: RolloutManifest, score_bytes: int | None) -> Shard:
    return Shard(
        task=rollouts.task,
        num_rows=rollouts.num_rows,
        num_prompt_tokens=rollouts.num_prompt_tokens,
        num_tokens=rollouts.num_tokens,
        most_tokens=rollouts.num_tokens,
        rollout_bytes=measured.size_bytes(rollouts),
        score_bytes=score_bytes,
    )
