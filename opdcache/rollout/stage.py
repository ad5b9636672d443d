"""Plans a round's rollout shards and makes those that are not in the cache.

A round's prompts are the schedule's next ones; held-out evaluation prompts are sampled by the same
engine start. One shard holds one task and is generated as one batch of requests.
"""

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

from pydantic import JsonValue

from .. import quality
from ..errors import PromptError
from ..identity import content_hash, derived_seed, digest, key_of, model_fingerprint
from ..outcomes import refuse_unanswered
from ..prompts import PromptSet, Request, Tokenizer, render, requests
from ..resolve import load_tokenizer
from ..run_prompts import RunPrompts
from ..runfolder import RunContext, stage_files
from ..schemas.config import PromptsConfig
from ..schemas.manifests import RolloutIdentity, RolloutManifest, Sampling
from ..schemas.rounds import HeldOutRound, RolloutRound, RolloutShard, RoundFile
from ..stage import give_up, interrupts, make_shards, provenance
from ..store import rollouts as shards
from ..store.cache import Attempt, as_listed, rollout_commit
from ..store.upkeep import quarantining
from ..vllm_engine import RUNTIME_ARGUMENTS
from .engine import Draw, Sampler
from .taken import take

_EVALUATION_ROUND = -1
"""Evaluation prompts are seeded alike in every round: students are compared on equal terms."""


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
class Part:
    """Shard tasks in order, and counts of the prompts that were left out, by reason."""

    tasks: tuple[RolloutTask, ...]
    dropped: dict[str, int]


@dataclass(frozen=True, slots=True)
class RolloutPlan:
    """What a round samples from its policy, by the round file that will pin it."""

    student: Path
    fingerprint: str
    parts: dict[type[RolloutRound] | type[HeldOutRound], Part]

    @property
    def tasks(self) -> dict[str, RolloutTask]:
        """Every shard task by key."""
        return {task.key: task for part in self.parts.values() for task in part.tasks}


def run(context: RunContext, round_index: int) -> None:
    """Make what is missing of a round's rollouts, and write its round files.

    Raises:
        InputsMissing: the round before has not been trained.
        PromptError: the prompts cannot be read, or none is left.
    """
    if context.folder.is_done(context.config, "rollout", round_index, context.cache):
        context.progress.say(f"round {round_index} rollout: already done, nothing to do")
        return
    before = {
        kind: context.folder.find(kind, round_index)
        for kind in stage_files(context.config, "rollout", round_index)
    }
    if all(before.values()):
        context.progress.say(f"round {round_index} rollout: making shards anew that were put aside")
    with quarantining(context.cache):
        _run(context, round_index, before)


def _run(
    context: RunContext,
    round_index: int,
    before: Mapping[type[RoundFile], RoundFile | None],
) -> None:
    started = time.monotonic()
    source = context.config.rollouts
    if source is not None and RolloutRound in before:
        taken = take(context, Path(source.from_), round_index)
        context.folder.write(taken, anew=before[RolloutRound] is not None)
        context.progress.say(f"round {round_index} rollout: those of {source.from_}")
        if HeldOutRound not in before:
            return
    plan = plan_round(context, round_index)
    tasks = plan.tasks
    if RolloutRound in plan.parts:
        asked = (r for task in plan.parts[RolloutRound].tasks for r in task.requests)
        refuse_unanswered(context.config.train.loss, [r.rendered.prompt.answer for r in asked])
    context.cache.pin(context.resolved.run_id, "rollouts", tasks)
    there = context.cache.committed_rollouts(tasks)
    missing = tuple(rollout_commit(key) for key in tasks if key not in there)
    first = stage_files(context.config, "rollout", round_index)[0]
    context.folder.write_plan(first, round_index, tasks, missing, [plan.fingerprint])
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
                prepare=lambda task: generator.start(),
                renew=generator.close,
                failures=context.folder.failures,
                worker=context.worker,
                progress=context.progress,
            )
    finally:
        context.progress.end()
        with suppress(Exception):  # an engine that broke may not stop in order
            generator.close()
    found = context.cache.committed_rollouts(tasks)
    failed = context.folder.failures.aside("rollouts", [key for key in tasks if key not in found])
    elapsed_s = round(time.monotonic() - started, 3)
    left_out: dict[type[RoundFile], dict[str, str]] = {}
    for kind, part in plan.parts.items():
        missed = {task.key: failed[task.key] for task in part.tasks if task.key in failed}
        # Students are compared on the same held-out prompts: none of those may be left out.
        most = context.config.max_failed_shards if kind is RolloutRound else 0
        where = f"round {round_index} rollout"
        context.folder.failures.refuse(missed, most, len(part.tasks), where)
        left_out[kind] = missed
    for kind, part in plan.parts.items():
        missed, then = left_out[kind], before[kind]
        said = {"failed": missed} if missed else {}
        file = kind(
            round=round_index,
            student=plan.fingerprint,
            shards=_listed(context, found, [t for t in part.tasks if t.key not in missed]),
            dropped=part.dropped,
            elapsed_s=elapsed_s,
            **said,
        )
        anew = then is not None and not context.folder.is_sound(then, context.cache)
        context.folder.write(file, anew=anew)


def plan_round(context: RunContext, round_index: int) -> RolloutPlan:
    """The round's shard tasks, made from the run file, the student and the prompts alone.

    Raises:
        InputsMissing: the round before has not been trained.
        PromptError: the prompts cannot be read, or none is left.
    """
    student = context.student(round_index)
    fingerprint = model_fingerprint(student, context.folder.hashes)
    (plan,) = plan_rounds(context, student, fingerprint, [round_index])
    return plan


def plan_rounds(
    context: RunContext, student: Path, fingerprint: str, rounds: Sequence[int]
) -> Iterator[RolloutPlan]:
    """The shard tasks of rounds, were one policy to sample them all; prompts are read once.

    Args:
        student: folder of the policy's tokenizer.
        fingerprint: of the policy. Another one makes other keys and nothing else.

    Raises:
        PromptError: the prompts cannot be read, or none is left.
    """
    config, evaluation = context.config, context.config.evaluation
    tokenizer = load_tokenizer(student)

    def part(prompts: PromptSet, samples: int, sampling: Sampling, seeded_round: int) -> Part:
        asked, dropped = _requests(prompts, samples, config.prompts, tokenizer)
        batches = _batches(asked, config.rollout.shard_samples)
        policy = _Policy(fingerprint, tokenizer.eos_token_id, sampling)
        return Part(tuple(_task(context, policy, b, seeded_round) for b in batches), dropped)

    asked, chosen = config.rollout, RunPrompts(config)
    fresh: dict[type[RolloutRound] | type[HeldOutRound], Part] = {}
    if evaluation is not None:
        fresh[HeldOutRound] = part(
            chosen.held_out, evaluation.samples_per_prompt, evaluation.sampling, _EVALUATION_ROUND
        )
    for index in rounds:
        training: dict[type[RolloutRound] | type[HeldOutRound], Part] = {}
        if index < config.rounds and config.rollouts is None:
            prompts = chosen.of_round(index)
            training[RolloutRound] = part(prompts, asked.samples_per_prompt, asked.sampling, index)
        yield RolloutPlan(student, fingerprint, training | fresh)


def _requests(
    prompts: PromptSet, samples_per_prompt: int, config: PromptsConfig, tokenizer: Tokenizer
) -> tuple[list[Request], dict[str, int]]:
    """Requests of the prompts that are short enough, and counts of what was left out."""
    rendered = render(prompts.prompts, config, tokenizer)
    short = [r for r in rendered if len(r.token_ids) <= config.max_prompt_tokens]
    dropped = {
        **prompts.dropped,
        "prompt longer than max_prompt_tokens": len(rendered) - len(short),
    }
    dropped = {reason: count for reason, count in dropped.items() if count}
    if not short:
        raise PromptError(
            "no prompt is left",
            where="prompts",
            got=dropped,
            remedy="raise prompts.max_prompt_tokens",
        )
    return requests(short, samples_per_prompt), dropped


def _batches(asked: Sequence[Request], size: int) -> list[tuple[Request, ...]]:
    """Requests of one task each, at most ``size`` of them, in the order asked."""
    by_task = sorted(asked, key=lambda request: request.rendered.prompt.task)
    grouped = [list(g) for _, g in groupby(by_task, lambda r: r.rendered.prompt.task)]
    return [tuple(g[i : i + size]) for g in grouped for i in range(0, len(g), size)]


@dataclass(frozen=True, slots=True)
class _Policy:
    """A student, and how it is sampled."""

    fingerprint: str
    eos_token_id: int | None
    sampling: Sampling


def _task(
    context: RunContext, policy: _Policy, batch: tuple[Request, ...], seeded_round: int
) -> RolloutTask:
    config, asked = context.config, [(r.rendered.prompt, r) for r in batch]
    seeds = tuple(
        derived_seed(config.seed, seeded_round, prompt.prompt_id, r.sample_index)
        for prompt, r in asked
    )
    identity = RolloutIdentity(
        student=policy.fingerprint,
        vocabulary=context.resolved.vocabulary,
        eos_token_id=policy.eos_token_id,
        prompts=digest([list(r.rendered.token_ids) for r in batch]),
        labels=digest(
            [[p.prompt_id, r.sample_index, p.task, p.answer, p.messages] for p, r in asked]
        ),
        seeds=digest(seeds),
        num_requests=len(batch),
        sampling=policy.sampling,
        engine=policy_arguments(config.rollout.dtype, config.rollout.engine),
        student_topk=config.rollout.student_topk,
    )
    return RolloutTask(batch, seeds, policy.sampling, identity)


def policy_arguments(dtype: str, engine: dict[str, JsonValue]) -> dict[str, JsonValue]:
    """Engine arguments that change the policy; one that is not known to be harmless counts."""
    return {"dtype": dtype} | {k: v for k, v in engine.items() if k not in RUNTIME_ARGUMENTS}


def _listed(
    context: RunContext, found: dict[str, RolloutManifest], tasks: Sequence[RolloutTask]
) -> tuple[RolloutShard, ...]:
    return tuple(
        as_listed(manifest, cached=manifest.provenance.run_id != context.resolved.run_id)
        for manifest in (found[task.key] for task in tasks)
    )


class _Generator:
    """Makes shards with one engine, started when the first shard needs it."""

    def __init__(self, context: RunContext, plan: RolloutPlan) -> None:
        self._context, self._plan = context, plan
        self._sampler: Sampler | None = None

    def make(self, task: RolloutTask, attempt: Attempt) -> RolloutManifest:
        """Generate one shard into the attempt."""
        sampler = self.start()
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
                    messages=request.rendered.prompt.messages,
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
            quality=quality.counted((one.finish_reason, one.text) for one in drawn),
        )

    def close(self) -> None:
        """Stop the engine, if it was started."""
        sampler, self._sampler = self._sampler, None
        if sampler is not None:
            sampler.close()

    def start(self) -> Sampler:
        """The engine, started when it is first needed."""
        if self._sampler is None:
            config = self._context.config
            self._context.progress.say(f"starting vLLM for {self._plan.student.name}")
            planned = self._plan.tasks.values()
            self._sampler = Sampler(
                self._plan.student,
                dtype=config.rollout.dtype,
                processed=not all(task.sampling.is_plain for task in planned),
                topk=config.rollout.student_topk,
                arguments=config.rollout.engine,
            )
        return self._sampler
