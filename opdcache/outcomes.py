"""Reference answers in the loss: rewards of whole completions, by a function of the user's."""

from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from functools import partial

import numpy as np
from numpy.typing import NDArray

from .errors import ConfigError
from .schemas.losses import LossConfig
from .user_code import find_function, finite

_ANSWERS = "name the prompts' answers (prompts.source), or leave it out"
_PLACE = "train.loss.outcome"

Outcome = Callable[[str, str], float]
"""Reward of a completion's text, given the prompt's reference answer."""


def outcome_function(name: str) -> Outcome:
    """The function behind ``module:name``.

    Raises:
        ConfigError: there is none.
    """
    return find_function(name, _PLACE)


def refuse_unanswered(loss: LossConfig, answers: Sequence[str | None]) -> None:
    """Refuse a loss that looks at reference answers where there are none, or at an outcome that
    cannot be had, before anything is made for it.

    Args:
        answers: of the round's prompts.

    Raises:
        ConfigError: as ``outcome_function``; or an answer is missing.
    """
    if loss.outcome is not None:
        outcome_function(loss.outcome)
        if None in answers:
            raise ConfigError(f"{_PLACE}: a prompt has no reference answer", remedy=_ANSWERS)
    if loss.sft_weight and not any(answer is not None for answer in answers):
        raise ConfigError(
            "train.loss.sft_weight: no prompt has a reference answer", remedy=_ANSWERS
        )


def rewards(
    outcome: Outcome, completions: Iterable[tuple[str, str | None]], where: Callable[[int], str]
) -> NDArray[np.float64]:
    """Reward of every completion, [N].

    Args:
        completions: text and reference answer of each.
        where: a completion's place, for errors.

    Raises:
        ConfigError: an answer is missing, or the function fails, or what it gives is no number.
    """
    made = []
    for i, (text, answer) in enumerate(completions):
        if answer is None:
            raise ConfigError(
                f"{_PLACE}: the prompt has no reference answer",
                where=where(i),
                remedy=_ANSWERS,
            )
        made.append(finite(partial(outcome, text, answer), _PLACE, where(i)))
    return np.array(made)


def advantages(rewards_N: NDArray[np.float64], prompts: Sequence[int]) -> NDArray[np.float64]:
    """Rewards less their mean over the completions of the same prompt, [N]: not divided by their
    deviation, which would weigh prompts by how alike their completions fare (arXiv 2503.20783).

    Args:
        prompts: number of each completion's prompt.

    Raises:
        ConfigError: no prompt has two completions, so that all would be 0.
    """
    by_prompt = defaultdict[int, list[float]](list)
    for prompt, reward in zip(prompts, rewards_N.tolist(), strict=True):
        by_prompt[prompt].append(reward)
    if len(by_prompt) == len(rewards_N):
        raise ConfigError(
            f"{_PLACE}: no prompt has two completions to compare",
            remedy="raise rollout.samples_per_prompt, or leave it out",
        )
    means = {prompt: float(np.mean(values)) for prompt, values in by_prompt.items()}
    baseline_N = np.array([means[prompt] for prompt in prompts])
    return np.asarray(rewards_N - baseline_N, np.float64)
