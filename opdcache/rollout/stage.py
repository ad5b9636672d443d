"""Plans a round's rollout shards and makes those that are not in the cache.

A round's prompts are the schedule's next ones; held-out evaluation prompts are sampled by the same
engine start. One shard holds one task and is generated as one batch of requests.
"""

import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

from pydantic import JsonValue

from ..errors import PromptError
from ..identity import (
    content_hash,
    derived_seed,
    digest,
    key_of,
    model_fingerprint,
)
from ..prompts import (
    Prompt,
    PromptSet,
    Request,
    Tokenizer,
    load_prompts,
    render,
    requests,
    scheduled,
)
from ..runfolder import RunContext, load_tokenizer
from ..schemas.manifests import RolloutIdentity, RolloutManifest, Sampling
from ..schemas.rounds import RolloutRound, RolloutShard, StagePlan
from ..stage import give_up, interrupts, make_shards, provenance
from ..store import rollouts as shards
from ..store.cache import Attempt, rollout_commit
from .engine import Draw, Sampler

_EVALUATION_ROUND = -1
"""Evaluation prompts are seeded alike in every round: students are compared on equal terms."""

_RUNTIME_ARGUMENTS = frozenset(
    {
        "data_parallel_size",
        "disable_log_stats",
        "distributed_executor_backend",
        "download_dir",
        "enable_chunked_prefill",
        "enable_prefix_caching",
        "enforce_eager",
        "gpu_memory_utilization",
        "kv_cache_memory_bytes",
        "max_num_batched_tokens",
        "max_num_seqs",
        "max_parallel_loading_workers",
        "pipeline_parallel_size",
        "tensor_parallel_size",
    }
)
"""Engine arguments that cannot change the policy. Any other is part of the rollout key."""


@dataclass(frozen=True, slots=True)
class RolloutTask:
    """One shard to be: its requests, their seeds, and the identity that they make."""

    requests: tuple[Request, ...]
    seeds: tuple[int, ...]
    sampling: Sampling
    identity: RolloutIdentity

    @property
    def key(self) -> str:
        """Key of the shard."""
        return key_of(self.identity)

    @property
    def task(self) -> str:
        """The one task of the shard's prompts."""
        return self.requests[0].rendered.prompt.task


@dataclass(frozen=True, slots=True)
class RolloutPlan:
    """A round's shards in order, and what was left out."""

    student: Path
    fingerprint: str
    training: tuple[RolloutTask, ...]
    evaluation: tuple[RolloutTask, ...]
    dropped: dict[str, int]


def run(context: RunContext, round_index: int) -> RolloutRound:
    """Make what is missing of a round's rollouts, and write its round file.

    Raises:
        InputsMissing: the round before has not been trained.
        PromptError: the prompts cannot be read, or none is left.
    """
    done = context.folder.find(RolloutRound, round_index)
    if done is not None:
        context.progress.say(f"round {round_index} rollout: already done, nothing to do")
        return done
    started = time.monotonic()
    plan = plan_round(context, round_index)
    tasks = {task.key: task for task in (*plan.training, *plan.evaluation)}
    context.cache.pin(context.resolved.run_id, "rollouts", tasks)
    missing = tuple(rollout_commit(k) for k in tasks if context.cache.rollouts(k) is None)
    context.folder.write_plan(
        "rollout", round_index, StagePlan(num_shards=len(tasks), missing=missing)
    )
    generator = _Generator(context, plan)
    context.progress.begin(f"round {round_index} rollout", len(tasks), "shards")
    try:
        with interrupts(give_up):
            make_shards(
                context.cache,
                "rollouts",
                tasks,
                is_done=lambda task: context.cache.rollouts(task.key) is not None,
                compute=generator.make,
                worker=context.worker,
                progress=context.progress,
            )
    finally:
        context.progress.end()
        generator.close()
    found = context.cache.committed_rollouts(tasks)
    context.folder.write(
        RolloutRound(
            round=round_index,
            student=plan.fingerprint,
            shards=_listed(context, found, plan.training),
            evaluation=_listed(context, found, plan.evaluation),
            dropped=plan.dropped,
            elapsed_s=round(time.monotonic() - started, 3),
        )
    )
    return context.folder.need(RolloutRound, round_index)


def plan_round(context: RunContext, round_index: int) -> RolloutPlan:
    """The round's shard tasks, made from the run file, the student and the prompts alone.

    Raises:
        InputsMissing: the round before has not been trained.
        PromptError: the prompts cannot be read, or none is left.
    """
    config = context.config
    student = context.student(round_index)
    fingerprint = model_fingerprint(student, context.folder.hashes)
    tokenizer = load_tokenizer(student)
    held_out = _held_out(context)
    training, dropped = _training_requests(context, round_index, held_out, tokenizer)
    evaluation = config.evaluation

    def tasks(asked: Sequence[Request], sampling: Sampling, seeded: int) -> tuple[RolloutTask, ...]:
        return tuple(
            _task(context, fingerprint, batch, sampling, seeded)
            for batch in _batches(asked, config.rollout.shard_samples)
        )

    held: tuple[RolloutTask, ...] = ()
    if evaluation is not None:
        rendered = render(held_out, config.prompts, tokenizer)
        asked = requests(rendered, evaluation.samples_per_prompt)
        held = tasks(asked, evaluation.sampling, _EVALUATION_ROUND)
    return RolloutPlan(
        student=student,
        fingerprint=fingerprint,
        training=tasks(training, config.rollout.sampling, round_index),
        evaluation=held,
        dropped=dropped,
    )


def _training_requests(
    context: RunContext, round_index: int, held_out: Sequence[Prompt], tokenizer: Tokenizer
) -> tuple[list[Request], dict[str, int]]:
    """The round's requests, and what was left out; none after the last round."""
    config = context.config
    if round_index >= config.rounds:
        return [], {}
    source = load_prompts(config.prompts.source)
    kept, dropped = _without(source, {prompt.content for prompt in held_out})
    chosen = scheduled(kept, config.prompts, config.seed, round_index)
    rendered = render(chosen, config.prompts, tokenizer)
    short = [r for r in rendered if len(r.token_ids) <= config.prompts.max_prompt_tokens]
    dropped["prompt longer than max_prompt_tokens"] = len(rendered) - len(short)
    if not short:
        raise PromptError(
            f"no prompt of round {round_index} is left",
            where="prompts",
            got=dict(+dropped),
            remedy="raise prompts.max_prompt_tokens",
        )
    return requests(short, config.rollout.samples_per_prompt), dict(+dropped)


def _held_out(context: RunContext) -> list[Prompt]:
    evaluation = context.config.evaluation
    if evaluation is None:
        return []
    return load_prompts(evaluation.source).prompts[: evaluation.num_prompts]


def _without(source: PromptSet, held_out: set[str]) -> tuple[list[Prompt], Counter[str]]:
    """Training prompts that are not held out, and counts of what was dropped."""
    kept = [prompt for prompt in source.prompts if prompt.content not in held_out]
    dropped = Counter(source.dropped)
    dropped["held out for evaluation"] = len(source.prompts) - len(kept)
    if not kept:
        raise PromptError(
            "every prompt is held out for evaluation",
            where="prompts.source",
            remedy="evaluate on another source",
        )
    return kept, dropped


def _batches(asked: Sequence[Request], size: int) -> list[tuple[Request, ...]]:
    """Requests of one task each, at most ``size`` of them, in the order asked."""
    by_task = sorted(asked, key=lambda request: request.rendered.prompt.task)
    grouped = [list(g) for _, g in groupby(by_task, lambda r: r.rendered.prompt.task)]
    return [tuple(g[i : i + size]) for g in grouped for i in range(0, len(g), size)]


def _task(
    context: RunContext,
    fingerprint: str,
    batch: tuple[Request, ...],
    sampling: Sampling,
    seeded_round: int,
) -> RolloutTask:
    config = context.config
    seeds = tuple(
        derived_seed(config.seed, seeded_round, r.rendered.prompt.prompt_id, r.sample_index)
        for r in batch
    )
    identity = RolloutIdentity(
        student=fingerprint,
        vocabulary=context.resolved.vocabulary,
        prompts=digest([list(r.rendered.token_ids) for r in batch]),
        seeds=digest(seeds),
        num_requests=len(batch),
        sampling=sampling,
        engine=policy_arguments(config.rollout.dtype, config.rollout.engine),
        student_topk=config.rollout.student_topk,
    )
    return RolloutTask(batch, seeds, sampling, identity)


def policy_arguments(dtype: str, engine: dict[str, JsonValue]) -> dict[str, JsonValue]:
    """Engine arguments that change the policy; one that is not known to be harmless counts."""
    return {"dtype": dtype} | {k: v for k, v in engine.items() if k not in _RUNTIME_ARGUMENTS}


def _listed(
    context: RunContext, found: dict[str, RolloutManifest], tasks: Sequence[RolloutTask]
) -> tuple[RolloutShard, ...]:
    return tuple(
        RolloutShard(
            key=manifest.key,
            content=manifest.content,
            task=manifest.task,
            num_rows=manifest.num_rows,
            num_tokens=manifest.num_tokens,
            cached=manifest.provenance.run_id != context.resolved.run_id,
        )
        for manifest in (found[task.key] for task in tasks)
    )


class _Generator:
    """Makes shards with one engine, started when the first shard needs it."""

    def __init__(self, context: RunContext, plan: RolloutPlan) -> None:
        self._context, self._plan = context, plan
        self._sampler: Sampler | None = None

    def make(self, task: RolloutTask, attempt: Attempt) -> RolloutManifest:
        """Generate one shard into the attempt."""
        sampler = self._start()
        started = time.monotonic()
        draws = [
            Draw(request.rendered.token_ids, seed)
            for request, seed in zip(task.requests, task.seeds, strict=True)
        ]
        drawn = sampler.sample(draws, task.sampling)
        table = shards.rollout_table(
            [
                shards.Completion(
                    prompt_id=request.rendered.prompt.prompt_id,
                    sample_index=request.sample_index,
                    prompt_token_ids=request.rendered.token_ids,
                    completion_token_ids=one.token_ids,
                    behavior_logprobs=one.behavior_logprobs,
                    sampling_logprobs=one.sampling_logprobs,
                    topk_ids=one.topk_ids,
                    topk_logprobs=one.topk_logprobs,
                    finish_reason=one.finish_reason,
                    text=one.text,
                    task=request.rendered.prompt.task,
                    answer=request.rendered.prompt.answer,
                )
                for request, one in zip(task.requests, drawn, strict=True)
            ]
        )
        attempt.put(shards.FILE, shards.encode_rollouts(table))
        num_tokens = sum(len(one.token_ids) for one in drawn)
        return RolloutManifest(
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
                details=dict(self._context.config.rollout.engine),
            ),
            identity=task.identity,
            content=content_hash(table),
            num_prompt_tokens=sum(len(draw.prompt_token_ids) for draw in draws),
            vocab_size=self._context.resolved.vocab_size,
            task=task.task,
        )

    def close(self) -> None:
        """Stop the engine, if it was started."""
        if self._sampler is not None:
            self._sampler.close()

    def _start(self) -> Sampler:
        if self._sampler is None:
            config = self._context.config
            self._context.progress.say(f"starting vLLM for {self._plan.student.name}")
            planned = (*self._plan.training, *self._plan.evaluation)
            self._sampler = Sampler(
                self._plan.student,
                dtype=config.rollout.dtype,
                processed=not all(task.sampling.is_plain for task in planned),
                topk=config.rollout.student_topk,
                arguments=config.rollout.engine,
            )
        return self._sampler
