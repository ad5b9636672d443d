"""Held-out completions verified: how right each round's student and the teacher are.

The students' completions are those that the divergence is measured on; the teachers' are sampled
here where they are missing. Scores are kept in the run's folder, and taken again while the verifier
and the completions are the same.
"""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from contextlib import closing
from functools import partial
from typing import Any

from .. import documents, quality
from ..accuracy import LEVEL, NUM_RESAMPLES, Answered, accuracies
from ..errors import InputsMissing, RunChanged
from ..rollout import teacher
from ..runfolder import RunContext
from ..schemas.evaluation import Accuracy
from ..schemas.rounds import (
    AccuracyRound,
    HeldOutRound,
    PromptScores,
    RolloutShard,
    TeacherAccuracy,
)
from ..store.upkeep import quarantining
from ..verifiers import PLACE, Verifier, evaluation_verifier

_COLUMNS = ("prompt_id", "sample_index", "task", "text", "answer", "finish_reason")


def run(context: RunContext) -> Accuracy | None:
    """Accuracy of every student whose held-out completions are there, and of the teacher.

    Returns:
        None when the run file names no verifier.

    Raises:
        ConfigError: there is no such verifier; it fails; or a prompt has no answer that it needs.
        InputsMissing: no student has sampled held-out prompts yet.
        RunChanged: rounds have answered different prompts.
    """
    verifier, evaluation = evaluation_verifier(context.config), context.config.evaluation
    if verifier is None or evaluation is None:
        return None
    found = [context.folder.find(HeldOutRound, i) for i in range(context.config.rounds + 1)]
    sampled = [rollouts for rollouts in found if rollouts is not None]
    if not sampled:
        raise InputsMissing(
            "no student has sampled the held-out prompts yet",
            where=context.folder.path,
            remedy="run 'opdcache rollout RUN.yaml --round 0' first",
        )
    with closing(verifier):
        # The students first: what is wrong with the verifier shows before a teacher samples.
        every: dict[int | None, Sequence[PromptScores]] = {
            rollouts.round: _of_round(context, verifier, rollouts).prompts for rollouts in sampled
        }
        if evaluation.teacher:
            every[None] = _of_teacher(context, verifier).prompts
    return summary(verifier, evaluation.samples_per_prompt, every)


def _of_round(context: RunContext, verifier: Verifier, rollouts: HeldOutRound) -> AccuracyRound:
    done = context.folder.find(AccuracyRound, rollouts.round)
    if done is not None and _still_holds(done, verifier, rollouts.shards):
        return done
    made = AccuracyRound(
        round=rollouts.round,
        student=rollouts.student,
        **_verified(context, verifier, rollouts.shards, f"round {rollouts.round}"),
    )
    context.folder.write(made, anew=True)
    return made


def _of_teacher(context: RunContext, verifier: Verifier) -> TeacherAccuracy:
    answered, path = teacher.run(context), context.folder.teacher_path / "accuracy.json"
    done = documents.read(TeacherAccuracy, path)
    if done is not None and _still_holds(done, verifier, answered.shards):
        return done
    made = TeacherAccuracy(
        teachers=answered.teachers, **_verified(context, verifier, answered.shards, "teacher")
    )
    documents.create(path, made, anew=True)
    return made


def _still_holds(
    done: AccuracyRound | TeacherAccuracy, verifier: Verifier, shards: Sequence[RolloutShard]
) -> bool:
    """Whether scores are of the same completions, by the same verifier."""
    same = (done.verifier, done.version) == (verifier.name, verifier.version)
    return same and done.contents == tuple(shard.content for shard in shards)


def _verified(
    context: RunContext, verifier: Verifier, shards: Sequence[RolloutShard], title: str
) -> dict[str, Any]:
    """What the two kinds of files share; a prompt's completions may stand in several shards."""
    context.progress.begin(f"{title} verification", len(shards), "shards")
    try:
        prompts = _scored(context, verifier, shards, title)
    finally:
        context.progress.end()
    contents = tuple(shard.content for shard in shards)
    of = {"verifier": verifier.name, "version": verifier.version}
    return {**of, "contents": contents, "prompts": prompts}


def _scored(
    context: RunContext, verifier: Verifier, shards: Sequence[RolloutShard], title: str
) -> tuple[PromptScores, ...]:
    scored = defaultdict[tuple[str, str], list[tuple[int, float, bool, bool]]](list)
    for shard in shards:
        with quarantining(context.cache):
            manifest = context.cache.need_rollouts(shard)
            rows = context.cache.read_rollouts(manifest, _COLUMNS).to_pylist()
        asked = ((row["text"], row.get("answer"), row["prompt_id"]) for row in rows)
        judged = verifier.judged(asked, partial(_place, title, shard))
        said = zip(judged.scores_N.tolist(), judged.failed_N.tolist(), strict=True)
        for row, (score, failed) in zip(rows, said, strict=True):
            one = row["sample_index"], score, quality.truncated(row["finish_reason"]), failed
            scored[row["task"], row["prompt_id"]].append(one)
        context.progress.advance(1, shard.num_tokens)
    return tuple(
        PromptScores(
            prompt_id=prompt_id,
            task=task,
            scores=tuple(score for _, score, _, _ in sorted(completions)),
            num_truncated=sum(cut for _, _, cut, _ in completions),
            num_failed=sum(failed for *_, failed in completions),
        )
        for (task, prompt_id), completions in sorted(scored.items())
    )


def _place(title: str, shard: RolloutShard, row: int) -> str:
    return f"{title} held out, rollout shard {shard.key[:12]} row {row}"


def summary(
    verifier: Verifier, num_samples: int, every: Mapping[int | None, Sequence[PromptScores]]
) -> Accuracy:
    """Accuracy over all prompts, and by task where there are several.

    Args:
        num_samples: completions a prompt.
        every: scores of each round's student, and of the teacher (None), prompts in order.

    Raises:
        RunChanged: they are not of the same prompts.
    """
    first, *others = ([p.prompt_id for p in prompts] for prompts in every.values())
    if any(other != first for other in others):
        raise RunChanged(
            "the rounds' and the teacher's held-out prompts are not the same",
            where=PLACE,
            remedy="restore the prompts' source, and delete the held_out.json files of the others",
        )
    tasks = sorted({prompt.task for prompts in every.values() for prompt in prompts})
    by_task = {
        task: accuracies(
            [Answered.of(i, [p for p in s if p.task == task]) for i, s in every.items()]
        )
        for task in tasks
    }
    return Accuracy(
        verifier=verifier.name,
        version=verifier.version,
        samples_per_prompt=num_samples,
        num_resamples=NUM_RESAMPLES,
        level=LEVEL,
        overall=accuracies([Answered.of(i, prompts) for i, prompts in every.items()]),
        by_task=by_task if len(tasks) > 1 else {},
    )
