"""Plans a round's score shards and makes those that no committed score set serves."""

import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ..errors import InputsMissing
from ..heads import TeacherStats
from ..identity import key_of
from ..runfolder import RunContext, model_folder
from ..schemas.manifests import AS_SAMPLED, ScoreIdentity, ScoreManifest, ScoreRequirement
from ..schemas.rounds import RolloutRound, RolloutShard, ScoredShard, ScoreRound, StagePlan
from ..stage import give_up, interrupts, make_shards, provenance
from ..store import codec
from ..store import rollouts as shards
from ..store.arrays import need_compression
from ..store.cache import Attempt, score_commit
from ..store.scores import GROUP, Draws, Scores, StudentTopK, TopK, encode_scores
from ..store.upkeep import quarantining
from .transformers_scorer import Sequences, TransformersScorer


@dataclass(frozen=True, slots=True)
class ScoreTask:
    """One score set to be: a rollout shard, and the identity of its scores."""

    rollout: RolloutShard
    identity: ScoreIdentity

    @property
    def key(self) -> str:
        """Key of the score set."""
        return key_of(self.identity)


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
    rollouts = context.folder.need(RolloutRound, round_index).shards
    need = requirement(context)
    tasks = {task.key: task for task in plan_round(context, rollouts)}
    found = {key: context.cache.serve(t.rollout.content, need) for key, t in tasks.items()}
    serving = [manifest.key for sets in found.values() for manifest, _ in sets or ()]
    context.cache.pin(context.resolved.run_id, "scores", [*tasks, *serving])
    missing = tuple(
        score_commit(task.rollout.content, need.teacher, key)
        for key, task in tasks.items()
        if found[key] is None
    )
    context.folder.write_plan(
        ScoreRound, round_index, StagePlan(num_shards=len(tasks), missing=missing)
    )
    scorer = _Scorer(context)
    context.progress.begin(f"round {round_index} score", len(tasks), "shards")
    try:
        with interrupts(give_up):
            make_shards(
                context.cache,
                "scores",
                tasks,
                is_done=lambda task: context.cache.serve(task.rollout.content, need) is not None,
                compute=scorer.make,
                worker=context.worker,
                progress=context.progress,
            )
    finally:
        context.progress.end()
    listed = tuple(_served(context, rollout, need) for rollout in rollouts)
    used = [served.key for shard in listed for served in shard.served]
    context.cache.pin(context.resolved.run_id, "scores", used)
    context.folder.write(
        ScoreRound(
            round=round_index,
            teacher=need.teacher,
            shards=listed,
            elapsed_s=round(time.monotonic() - started, 3),
        ),
        anew=anew,
    )
    return context.folder.need(ScoreRound, round_index)


def requirement(context: RunContext) -> ScoreRequirement:
    """What this run needs of any score set."""
    config = context.config
    return ScoreRequirement(
        teacher=context.resolved.teacher,
        rendering=AS_SAMPLED,
        dtype=config.teacher.dtype,
        columns=config.score_columns,
        k=config.score.k,
        mass=config.score.mass,
        num_ids=context.resolved.vocab_size,
        step=config.score.step,
        draws=config.score.draws,
    )


def plan_round(context: RunContext, rollouts: Sequence[RolloutShard]) -> list[ScoreTask]:
    """The score set that this run would make of each rollout shard."""
    need = requirement(context)
    return [
        ScoreTask(
            rollout,
            ScoreIdentity(
                content=rollout.content,
                teacher=need.teacher,
                rendering=need.rendering,
                dtype=need.dtype,
                columns=tuple(sorted(need.columns)),
                k=need.k,
                mass=need.mass,
                num_ids=need.num_ids,
                step=need.step,
                draws=need.draws,
                draw_seed=context.config.score.draw_seed if need.draws else 0,
            ),
        )
        for rollout in rollouts
    ]


def _served(context: RunContext, rollout: RolloutShard, need: ScoreRequirement) -> ScoredShard:
    served = context.cache.serve(rollout.content, need)
    if served is None:
        raise InputsMissing(
            "a score set went away while the stage ran",
            where=context.cache.objects.at(f"commits/scores/{rollout.content[:3]}"),
            remedy="run the same command again",
        )
    return ScoredShard(
        content=rollout.content,
        served=tuple(columns for _, columns in served),
        cached=all(m.provenance.run_id != context.resolved.run_id for m, _ in served),
    )


class _Scorer:
    """Makes score sets with one teacher, loaded when the first one needs it."""

    def __init__(self, context: RunContext) -> None:
        self._context = context
        self._teacher: TransformersScorer | None = None

    def make(self, task: ScoreTask, attempt: Attempt) -> ScoreManifest:
        """Score one rollout shard into the attempt."""
        teacher, cache = self._load(), self._context.cache
        started = time.monotonic()
        table = cache.read_rollouts(cache.need_rollouts(task.rollout))
        wants_recorded = "student_topk" in task.identity.columns
        num_tokens = int(shards.token_offsets(table)[-1])
        recorded = (
            shards.flat_tokens(table, "student_topk_ids", np.int64)
            if wants_recorded
            else np.zeros((num_tokens, 0), np.int64)
        )
        sequences = Sequences(
            shards.token_lists(table, "prompt_token_ids"),
            shards.token_lists(table, "completion_token_ids"),
            recorded,
        )
        stats = teacher.score(
            sequences,
            k=task.identity.k,
            mass=task.identity.mass,
            num_ids=task.identity.num_ids,
            uniforms_TN=_uniforms(task.identity, num_tokens),
        )
        scores = as_scores(sequences, stats, task.identity)
        attributes = {
            "format": "opdcache scores",
            "identity": task.identity.model_dump(mode="json"),
        }
        encoded = encode_scores(
            scores,
            step=task.identity.step,
            attributes=attributes,
            compression=self._context.config.score.compression,
        )
        for path, data in encoded.items():
            attempt.put(f"{GROUP}/{path}", data)
        return ScoreManifest(
            key=task.key,
            attempt=attempt.name,
            objects=tuple(attempt.entries),
            num_rows=table.num_rows,
            num_tokens=num_tokens,
            dropped={},
            provenance=provenance(
                self._context.resolved.run_id,
                started=started,
                num_tokens=num_tokens,
                details={
                    "backend": "transformers",
                    "batch_tokens": self._context.config.score.batch_tokens,
                },
            ),
            identity=task.identity,
            rollout_key=task.rollout.key,
            vocab_size=self._context.resolved.vocab_size,
            clip_floor=codec.clip_floor(task.identity.step),
        )

    def _load(self) -> TransformersScorer:
        if self._teacher is None:
            config = self._context.config
            folder = model_folder(config.teacher)
            self._context.progress.say(f"loading the teacher {folder.name}")
            self._teacher = TransformersScorer(
                folder, dtype=config.teacher.dtype, batch_tokens=config.score.batch_tokens
            )
        return self._teacher


def _uniforms(identity: ScoreIdentity, num_tokens: int) -> NDArray[np.float64] | None:
    """Numbers that the draws are made of: the shard's own, whatever the batches are."""
    if not identity.draws:
        return None
    seed = np.random.SeedSequence([identity.draw_seed, int(identity.content, 16)])
    return np.random.Generator(np.random.Philox(seed)).random((num_tokens, identity.draws))


def as_scores(sequences: Sequences, stats: TeacherStats, identity: ScoreIdentity) -> Scores:
    """The stored columns of a teacher's statistics."""
    wanted = set(identity.columns)
    topk = TopK(
        ids=stats.topk_ids_TK.numpy().astype(np.int32),
        logprobs=stats.topk_TK.numpy(),
        num_kept=stats.num_kept_T.numpy().astype(np.uint16),
        tail_logprobs=stats.tail_T.numpy(),
    )
    student = StudentTopK(stats.gathered_TS.numpy(), stats.gathered_tail_T.numpy())
    return Scores(
        token_offsets=sequences.offsets,
        sampled_logprobs=stats.sampled_T.numpy() if "sampled" in wanted else None,
        entropy=stats.entropy_T.numpy() if "entropy" in wanted else None,
        topk=topk if "topk" in wanted else None,
        student_topk=student if "student_topk" in wanted else None,
        draws=Draws.of(stats.drawn_TN.numpy()) if "draws" in wanted else None,
    )
