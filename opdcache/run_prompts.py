"""Which prompts a run holds out and which its rounds train on: told by the run file alone."""

from collections.abc import Sequence
from functools import cached_property

from .errors import PromptError
from .identity import digest
from .near_copies import near_copies
from .prompts import Prompt, PromptSet, check_schedule, load_prompts, scheduled
from .schemas.config import RunConfig


def split_point(prompt: Prompt) -> float:
    """Where a prompt's text falls in [0, 1): it is held out by every share above.

    Nothing else plays a part: not its id, task or answer, not the run, nor any other prompt.
    """
    salted = digest(["opdcache held-out split 1", prompt.messages])
    return int(salted[:13], 16) / 16**13  # 52 bits, which a float holds exactly


class RunPrompts:
    """A run's prompts, read when they are first asked for.

    Raises (every attribute and method):
        PromptError: a source cannot be read, or nothing is left of it.
        NotInstalled: an optional package that the run file asks for is not there.
    """

    def __init__(self, config: RunConfig) -> None:
        self._config = config

    @cached_property
    def held_out(self) -> PromptSet:
        """Prompts of the evaluation; none when the run has no evaluation."""
        evaluation = self._config.evaluation
        if evaluation is None:
            return PromptSet([], {})
        if evaluation.source is not None:
            listed = self._evaluation_source
            return PromptSet(listed.prompts[: evaluation.num_prompts], listed.dropped)
        split = sorted(self._split, key=split_point)
        if not split:
            raise PromptError(
                "the hash holds out no prompt",
                where="prompts.held_out_share",
                remedy="raise it, or give evaluation.source",
            )
        taken = split[: evaluation.num_prompts]
        return PromptSet(taken, {"more than evaluation.num_prompts": len(split) - len(taken)})

    @cached_property
    def training(self) -> PromptSet:
        """Prompts that the schedule walks through, and counts of what it does not, by reason."""
        config, pool = self._config.prompts, self._source
        self._check_tasks()
        reserved = [*self._evaluation_source.prompts, *self._split]
        texts = {prompt.messages for prompt in reserved}
        held_out = [prompt.messages in texts for prompt in pool.prompts]
        pool = _without(pool, "held out for evaluation", held_out)
        if config.shares:
            unnamed = [prompt.task not in config.shares for prompt in pool.prompts]
            pool = _without(pool, "task without a share", unnamed)
        if config.near_duplicates is not None:
            ours, theirs = (
                [asked_text(prompt) for prompt in part] for part in (pool.prompts, reserved)
            )
            near = near_copies(ours, theirs, config.near_duplicates.threshold)
            pool = _without(pool, "near copy of an evaluation prompt", near)
        if not pool.prompts:
            raise PromptError(
                "no prompt is left to train on",
                where="prompts.source",
                got=pool.dropped,
                remedy="give more prompts, or evaluate on another source",
            )
        check_schedule(pool.prompts, config, self._config.rounds)
        return pool

    def of_round(self, round_index: int) -> PromptSet:
        """A round's training prompts by the schedule."""
        config, pool = self._config, self.training
        chosen = scheduled(pool.prompts, config.prompts, config.seed, round_index)
        return PromptSet(chosen, pool.dropped)

    @cached_property
    def _source(self) -> PromptSet:
        return load_prompts(self._config.prompts.source)

    @cached_property
    def _evaluation_source(self) -> PromptSet:
        """All prompts of ``evaluation.source``, asked or not: a longer evaluation may ask them."""
        evaluation = self._config.evaluation
        if evaluation is None or evaluation.source is None:
            return PromptSet([], {})
        return load_prompts(evaluation.source)

    @cached_property
    def _split(self) -> list[Prompt]:
        """Prompts that the hash holds out."""
        share = self._config.prompts.held_out_share
        return [p for p in self._source.prompts if split_point(p) < share] if share else []

    def _check_tasks(self) -> None:
        trained = {prompt.task for prompt in self._source.prompts}
        every = trained | {prompt.task for prompt in self.held_out.prompts}
        for where, named, tasks in (
            ("prompts.shares", self._config.prompts.shares.keys(), trained),
            ("teachers", self._config.teachers.keys(), every),
        ):
            unknown = sorted(named - tasks)
            if unknown:
                raise PromptError(
                    f"no prompt has task {unknown[0]!r}",
                    where=where,
                    expected=f"one of {', '.join(sorted(tasks))}",
                )


def _without(pool: PromptSet, reason: str, leaves: Sequence[bool]) -> PromptSet:
    kept = [p for p, leave in zip(pool.prompts, leaves, strict=True) if not leave]
    return PromptSet(kept, pool.dropped | {reason: len(pool.prompts) - len(kept)})


def asked_text(prompt: Prompt) -> str:
    """What is asked; a system message that many share would make them all alike."""
    asked = [content for role, content in prompt.messages if role != "system"]
    return "\n".join(asked or (content for _, content in prompt.messages))
