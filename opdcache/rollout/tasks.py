"""Shard tasks: the requests of one batch, their seeds, and the identity that they make.

One shard holds one task and is generated as one batch of requests.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

from pydantic import JsonValue

from ..errors import PromptError
from ..identity import derived_seed, digest, key_of
from ..prompts import PromptSet, Request, Tokenizer, render, requests
from ..runfolder import RunContext
from ..schemas.manifests import RolloutIdentity, Sampling
from ..schemas.prompts import PromptsConfig
from ..vllm_engine import RUNTIME_ARGUMENTS

EVALUATION_ROUND = -1
"""Evaluation prompts are seeded alike in every round, and for teachers: all are compared on equal
terms."""


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
class Policy:
    """A model that samples, and how.

    Attributes:
        vocab_size: ids that it can produce are below this.
        topk: recorded entries a token; 0 records none.
        engine: more arguments of its engine.
    """

    folder: Path
    fingerprint: str
    eos_token_id: int | None
    vocab_size: int
    dtype: str
    engine: dict[str, JsonValue]
    topk: int


def requests_of(
    prompts: PromptSet, samples_per_prompt: int, config: PromptsConfig, tokenizer: Tokenizer
) -> tuple[list[Request], dict[str, int]]:
    """Requests of the prompts that are short enough, and counts of what was left out.

    Raises:
        PromptError: none is, or one cannot be rendered.
    """
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


def tasks_of(
    context: RunContext,
    policy: Policy,
    asked: Sequence[Request],
    sampling: Sampling,
    seeded_round: int,
) -> tuple[RolloutTask, ...]:
    """Requests as the shard tasks of one policy."""
    batches = _batches(asked, context.config.rollout.shard_samples)
    return tuple(_task(context, policy, batch, sampling, seeded_round) for batch in batches)


def _batches(asked: Sequence[Request], size: int) -> list[tuple[Request, ...]]:
    """Requests of one task each, at most ``size`` of them, in the order asked."""
    by_task = sorted(asked, key=lambda request: request.rendered.prompt.task)
    grouped = [list(g) for _, g in groupby(by_task, lambda r: r.rendered.prompt.task)]
    return [tuple(g[i : i + size]) for g in grouped for i in range(0, len(g), size)]


def _task(
    context: RunContext,
    policy: Policy,
    batch: tuple[Request, ...],
    sampling: Sampling,
    seeded_round: int,
) -> RolloutTask:
    asked = [(r.rendered.prompt, r) for r in batch]
    seeds = tuple(
        derived_seed(context.config.seed, seeded_round, prompt.prompt_id, r.sample_index)
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
        sampling=sampling,
        engine=policy_arguments(policy.dtype, policy.engine),
        student_topk=policy.topk,
    )
    return RolloutTask(batch, seeds, sampling, identity)


def policy_arguments(dtype: str, engine: dict[str, JsonValue]) -> dict[str, JsonValue]:
    """Engine arguments that change the policy; one that is not known to be harmless counts."""
    return {"dtype": dtype} | {k: v for k, v in engine.items() if k not in RUNTIME_ARGUMENTS}
