"""Held-out evaluation: how far each round's student is from the teacher, exactly.

The student's fresh completions of held-out prompts are rollout shards, made by the rollout stage.
Here both models read them, and the full-vocabulary reverse KL is taken at every token.
"""

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pyarrow as pa
import torch
from numpy.typing import NDArray
from pydantic import JsonValue

from ..errors import ConfigError, InputsMissing
from ..heads import Divergence, Side, divergence
from ..identity import digest
from ..resolve import model_arguments, model_folder
from ..runfolder import RunContext
from ..schemas.rounds import EvaluationRound, HeldOutRound
from ..schemas.teachers import HttpBackend, TransformersBackend, VllmBackend
from ..score.rendering import Rendering
from ..score.teacher import Sequences, by_length
from ..score.transformers_scorer import TransformersScorer
from ..store import rollouts as shards
from ..store.upkeep import quarantining

OVERLAP_K = 16


def run(context: RunContext) -> list[EvaluationRound]:
    """Evaluate every student whose held-out completions are there and that is not evaluated yet.

    Raises:
        ConfigError: the run has no evaluation, or transformers cannot be a teacher that vLLM is.
        InputsMissing: no student has sampled held-out prompts yet.
    """
    refuse(context)
    teachers = _Teachers(context)
    made = []
    for round_index in range(context.config.rounds + 1):
        done = context.folder.find(EvaluationRound, round_index)
        rollouts = context.folder.find(HeldOutRound, round_index)
        if done is None and rollouts is not None:
            with quarantining(context.cache):
                context.folder.write(_evaluate(context, rollouts, teachers))
            done = context.folder.need(EvaluationRound, round_index)
        if done is not None:
            made.append(done)
    if not made:
        raise InputsMissing(
            "no student has sampled the held-out prompts yet",
            where=context.folder.path,
            remedy="run 'opdcache rollout RUN.yaml --round 0' first",
        )
    return made


def refuse(context: RunContext) -> None:
    """Refuse what cannot be compared, before anything is made for it: a run without evaluation, a
    served teacher, which gives no whole distributions, and one that vLLM's engine arguments change,
    of which transformers would make another one.

    Raises:
        ConfigError: it is so.
    """
    config = context.config
    if config.evaluation is None:
        raise ConfigError(
            "the run has no evaluation", where=context.folder.path, remedy="add 'evaluation' to it"
        )
    own = {config.place_of(task): teacher for task, teacher in config.teachers.items()}
    for place, teacher in {"teacher": config.teacher, **own}.items():
        if isinstance(teacher.backend, HttpBackend):
            raise ConfigError(
                f"{place}: evaluation compares whole distributions, which an http teacher does not "
                "give",
                remedy="take --no-divergence",
            )
        changed = model_arguments(teacher) if isinstance(teacher.backend, VllmBackend) else {}
        if changed:
            raise ConfigError(
                f"{place}.backend.engine: {min(changed)!r} may change the teacher, and evaluation "
                "compares with it as transformers loads it",
                remedy="evaluate with a run file that has no such argument, or --no-divergence",
            )


def _evaluate(
    context: RunContext, rollouts: HeldOutRound, teachers: "_Teachers"
) -> EvaluationRound:
    context.progress.begin(f"round {rollouts.round} evaluation", len(rollouts.shards), "shards")
    student = _model(context, context.student(rollouts.round))
    budget_tokens, parts = context.config.score.batch_tokens, list[Divergence]()
    for shard in rollouts.shards:
        table = context.cache.read_rollouts(context.cache.need_rollouts(shard))
        teacher = teachers.of(shard.task)
        rendered = _sequences(table, teachers.rendering_of(shard.task))
        pair = (student, _sequences(table)), (teacher, rendered)
        parts += _compare(*pair, shards.supervised_tokens(table), budget_tokens)
        context.progress.advance(1, shard.num_tokens)
    context.progress.end()
    reverse_kl, ours, theirs, overlap = (
        torch.cat([getattr(part, name) for part in parts]).double()
        for name in ("reverse_kl_T", "student_entropy_T", "teacher_entropy_T", "overlap_T")
    )
    return EvaluationRound(
        round=rollouts.round,
        student=rollouts.student,
        teachers=tuple(context.resolved.teacher_of(shard.task) for shard in rollouts.shards),
        contents=tuple(shard.content for shard in rollouts.shards),
        reverse_kl=float(reverse_kl.mean()),
        overlap=float(overlap.mean()),
        entropy_gap=float((theirs - ours).abs().mean()),
        student_entropy=float(ours.mean()),
        teacher_entropy=float(theirs.mean()),
        tokens=len(reverse_kl),
    )


def _sequences(table: pa.Table, rendering: Rendering | None = None) -> Sequences:
    """A shard as the student reads it, or as a teacher does."""
    completions = shards.token_lists(table, "completion_token_ids")
    prompts = (
        rendering.prompts(table) if rendering else shards.token_lists(table, "prompt_token_ids")
    )
    return Sequences(prompts, completions, np.zeros((sum(map(len, completions)), 0), np.int32))


def _compare(
    student: tuple[TransformersScorer, Sequences],
    teacher: tuple[TransformersScorer, Sequences],
    supervised_T: NDArray[np.bool_],
    budget_tokens: int,
) -> list[Divergence]:
    """Both models on the same completions, in the same batches; tokens that are not supervised are
    left out."""
    for model, sequences in (student, teacher):
        sequences.need_ids_below(model.head_weight.shape[0])
    lengths = np.maximum(student[1].lengths, teacher[1].lengths)

    def side(model: TransformersScorer, sequences: Sequences, rows: list[int]) -> Side:
        kept_T = torch.from_numpy(supervised_T[sequences.places(rows)])
        return model.hidden(sequences, rows)[kept_T], model.head_weight

    return [
        divergence(side(*student, rows), side(*teacher, rows), k=OVERLAP_K)
        for rows in by_length(lengths, budget_tokens)
    ]


class _Teachers:
    """The teachers by task, each loaded when it is first needed: in transformers, whatever the
    backend that scores."""

    def __init__(self, context: RunContext) -> None:
        self._context = context
        self._loaded: dict[str, TransformersScorer] = {}
        self._renderings: dict[str, Rendering] = {}

    def rendering_of(self, task: str) -> Rendering:
        """How the teacher of a task reads prompts."""
        config = self._context.config.teacher_of(task)
        return self._renderings.setdefault(task, Rendering(config))

    def of(self, task: str) -> TransformersScorer:
        """The teacher of a task."""
        config = self._context.config.teacher_of(task)
        backend = config.backend
        arguments = backend.arguments if isinstance(backend, TransformersBackend) else {}
        loaded = digest([self._context.resolved.teacher_of(task), arguments])
        if loaded not in self._loaded:
            self._loaded[loaded] = _model(self._context, model_folder(config), arguments)
        return self._loaded[loaded]


def _model(
    context: RunContext, folder: Path, arguments: Mapping[str, JsonValue] | None = None
) -> TransformersScorer:
    context.progress.say(f"loading {folder.name}")
    return TransformersScorer(
        folder,
        dtype="float32",
        batch_tokens=context.config.score.batch_tokens,
        arguments=arguments,
    )
