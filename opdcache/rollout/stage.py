"""Plans a round's rollout shards and makes those that are not in the cache.

A round's prompts are the schedule's next ones; held-out evaluation prompts are sampled by the same
engine start.
"""

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from ..identity import model_fingerprint
from ..outcomes import refuse_unanswered
from ..prompts import PromptSet
from ..resolve import prompt_tokenizer
from ..run_prompts import RunPrompts
from ..runfolder import RunContext, stage_files
from ..schemas.manifests import RolloutManifest, Sampling
from ..schemas.rounds import HeldOutRound, RolloutRound, RolloutShard, RoundFile
from ..store.cache import as_listed, rollout_commit
from ..store.upkeep import quarantining
from ..verifiers import evaluation_verifier
from .generator import generate
from .taken import take
from .tasks import EVALUATION_ROUND, Policy, RolloutTask, requests_of, tasks_of


@dataclass(frozen=True, slots=True)
class Part:
    """Shard tasks in order, and counts of the prompts that were left out, by reason."""

    tasks: tuple[RolloutTask, ...]
    dropped: dict[str, int]


@dataclass(frozen=True, slots=True)
class RolloutPlan:
    """What a round samples from its policy, by the round file that will pin it."""

    policy: Policy
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
    verifier = evaluation_verifier(context.config)
    if verifier is not None and HeldOutRound in plan.parts:
        asked = (r for task in plan.parts[HeldOutRound].tasks for r in task.requests)
        verifier.refuse_unanswered([r.rendered.prompt.answer for r in asked])
    context.cache.pin(context.resolved.run_id, "rollouts", tasks)
    there = context.cache.committed_rollouts(tasks)
    missing = tuple(rollout_commit(key) for key in tasks if key not in there)
    first = stage_files(context.config, "rollout", round_index)[0]
    context.folder.write_plan(first, round_index, tasks, missing, [plan.policy.fingerprint])
    found, failed = generate(context, plan.policy, tasks, f"round {round_index} rollout")
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
            student=plan.policy.fingerprint,
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
    tokenizer = prompt_tokenizer(student, config.prompts)
    policy = Policy(
        folder=student,
        fingerprint=fingerprint,
        eos_token_id=tokenizer.eos_token_id,
        vocab_size=context.resolved.vocab_size,
        dtype=config.rollout.dtype,
        engine=config.rollout.engine,
        topk=config.rollout.student_topk,
    )

    def part(prompts: PromptSet, samples: int, sampling: Sampling, seeded_round: int) -> Part:
        asked, dropped = requests_of(prompts, samples, config.prompts, tokenizer)
        return Part(tasks_of(context, policy, asked, sampling, seeded_round), dropped)

    asked, chosen = config.rollout, RunPrompts(config)
    fresh: dict[type[RolloutRound] | type[HeldOutRound], Part] = {}
    if evaluation is not None:
        fresh[HeldOutRound] = part(
            chosen.held_out, evaluation.samples_per_prompt, evaluation.sampling, EVALUATION_ROUND
        )
    for index in rounds:
        training: dict[type[RolloutRound] | type[HeldOutRound], Part] = {}
        if index < config.rounds and config.rollouts is None:
            prompts = chosen.of_round(index)
            training[RolloutRound] = part(prompts, asked.samples_per_prompt, asked.sampling, index)
        yield RolloutPlan(policy, training | fresh)


def _listed(
    context: RunContext, found: dict[str, RolloutManifest], tasks: Sequence[RolloutTask]
) -> tuple[RolloutShard, ...]:
    return tuple(
        as_listed(manifest, cached=manifest.provenance.run_id != context.resolved.run_id)
        for manifest in (found[task.key] for task in tasks)
    )
