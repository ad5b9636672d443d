"""Makes rollout shards with one engine."""

import time
from collections.abc import Collection, Mapping
from contextlib import suppress

from .. import quality
from ..identity import content_hash
from ..runfolder import RunContext
from ..schemas.manifests import RolloutManifest
from ..stage import give_up, interrupts, make_shards, provenance
from ..store import rollouts as shards
from ..store.cache import Attempt
from .engine import Draw, Sampler
from .tasks import Policy, RolloutTask


def generate(
    context: RunContext,
    policy: Policy,
    tasks: Mapping[str, RolloutTask],
    title: str,
    place: str = "rollout.engine",
) -> tuple[dict[str, RolloutManifest], dict[str, str]]:
    """Make the shards that are not in the cache, by key, together with other workers.

    Args:
        title: of the progress.
        place: of the engine's arguments in the run file.

    Returns:
        Every shard that is there; and those that were set aside, with the last error of each.
    """
    generator = _Generator(context, policy, tasks.values(), place)
    context.progress.begin(title, len(tasks), "shards")
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
    missing = [key for key in tasks if key not in found]
    return found, context.folder.failures.aside("rollouts", missing)


class _Generator:
    """Makes shards with one engine, started when the first shard needs it."""

    def __init__(
        self, context: RunContext, policy: Policy, tasks: Collection[RolloutTask], place: str
    ) -> None:
        self._context, self._policy, self._place = context, policy, place
        self._is_plain = all(task.sampling.is_plain for task in tasks)
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
                details=dict(self._policy.engine),
            ),
            identity=task.identity,
            content=content_hash(table),
            num_prompt_tokens=sum(len(draw.prompt_token_ids) for draw in draws),
            vocab_size=self._policy.vocab_size,
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
            policy = self._policy
            self._context.progress.say(f"starting vLLM for {policy.folder.name}")
            self._sampler = Sampler(
                policy.folder,
                dtype=policy.dtype,
                processed=not self._is_plain,
                topk=policy.topk,
                arguments=policy.engine,
                place=self._place,
            )
        return self._sampler
