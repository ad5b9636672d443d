"""Held-out evaluation: how far each round's student is from the teacher, exactly.

The student's fresh completions of held-out prompts are rollout shards, made by the rollout stage.
Here both models read them, and the full-vocabulary reverse KL is taken at every token.
"""

from pathlib import Path

import numpy as np
import torch

from .errors import ConfigError, InputsMissing
from .heads import Divergence, divergence
from .runfolder import RunContext, model_folder
from .schemas.rounds import EvaluationRound, HeldOutRound
from .score.transformers_scorer import Sequences, TransformersScorer
from .store import rollouts as shards
from .store.upkeep import quarantining

OVERLAP_K = 16
ESTIMATOR = (
    "exact full-vocabulary KL(student || teacher) in float32, mean over the tokens of fresh "
    "student completions of held-out prompts"
)


def run(context: RunContext) -> list[EvaluationRound]:
    """Evaluate every student whose held-out completions are there and that is not evaluated yet.

    Raises:
        ConfigError: the run has no evaluation.
        InputsMissing: no student has sampled held-out prompts yet.
    """
    if context.config.evaluation is None:
        raise ConfigError(
            "the run has no evaluation", where=context.folder.path, remedy="add 'evaluation' to it"
        )
    teacher: TransformersScorer | None = None
    made = []
    for round_index in range(context.config.rounds + 1):
        done = context.folder.find(EvaluationRound, round_index)
        rollouts = context.folder.find(HeldOutRound, round_index)
        if done is None and rollouts is not None:
            teacher = teacher or _model(context, model_folder(context.config.teacher))
            with quarantining(context.cache):
                context.folder.write(_evaluate(context, rollouts, teacher))
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


def _evaluate(
    context: RunContext, rollouts: HeldOutRound, teacher: TransformersScorer
) -> EvaluationRound:
    context.progress.begin(f"round {rollouts.round} evaluation", len(rollouts.shards), "shards")
    student = _model(context, context.student(rollouts.round))
    parts = []
    for shard in rollouts.shards:
        table = context.cache.read_rollouts(context.cache.need_rollouts(shard))
        sequences = Sequences(
            shards.token_lists(table, "prompt_token_ids"),
            shards.token_lists(table, "completion_token_ids"),
            np.zeros((shard.num_tokens, 0), np.int64),
        )
        parts += _compare(student, teacher, sequences)
        context.progress.advance(1, shard.num_tokens)
    context.progress.end()
    reverse_kl, ours, theirs, overlap = (
        torch.cat([getattr(part, name) for part in parts]).double()
        for name in ("reverse_kl_T", "student_entropy_T", "teacher_entropy_T", "overlap_T")
    )
    return EvaluationRound(
        round=rollouts.round,
        student=rollouts.student,
        teacher=context.resolved.teacher,
        contents=tuple(shard.content for shard in rollouts.shards),
        reverse_kl=float(reverse_kl.mean()),
        overlap=float(overlap.mean()),
        entropy_gap=float((theirs - ours).abs().mean()),
        student_entropy=float(ours.mean()),
        teacher_entropy=float(theirs.mean()),
        tokens=len(reverse_kl),
    )


def _compare(
    student: TransformersScorer, teacher: TransformersScorer, sequences: Sequences
) -> list[Divergence]:
    """Both models on the same batches."""
    batches = zip(student.hidden_batches(sequences), teacher.hidden_batches(sequences), strict=True)
    return [
        divergence((ours, student.head_weight), (theirs, teacher.head_weight), k=OVERLAP_K)
        for (ours, _), (theirs, _) in batches
    ]


def _model(context: RunContext, folder: Path) -> TransformersScorer:
    context.progress.say(f"loading {folder.name}")
    return TransformersScorer(
        folder, dtype="float32", batch_tokens=context.config.score.batch_tokens
    )
