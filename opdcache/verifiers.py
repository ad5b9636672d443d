"""Verifiers: how right a completion is, from 0 to 1.

Three kinds by name: ``reasoning_gym`` (the scorer of the prompts' own dataset), ``math``
(math-verify) and a function of the user's, ``module:function``.
"""

import re
import threading
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from hashlib import sha256
from importlib.metadata import version
from pathlib import Path
from sys import modules
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .errors import ConfigError, NotInstalled, PromptError
from .prompts import gym_dataset, gym_prompt
from .schemas.config import PromptSource, ReasoningGymSource, RunConfig
from .user_code import find_function, finite

PLACE = "evaluation.verifier"
REASONING_GYM, MATH = "reasoning_gym", "math"
_SAID = re.compile(r"answer\b[^.\n]*?(?:\bis\b|:)[\s:*$]*", re.IGNORECASE)
_MARKED = ("$", "\\boxed", "\\(", "\\[")
_LIMIT_S = 5
"""Longest that math-verify works on one expression, its own default."""

Verify = Callable[[str, str | None, str], float]
"""Score of a completion's text, given its prompt's reference answer and id."""


@dataclass(frozen=True, slots=True)
class Verifier:
    """A verifier, ready.

    Attributes:
        name: as the run file has it.
        version: of the package that verifies, or the SHA-256 of the file of the user's function.
        needs_answers: whether every prompt must have a reference answer.
    """

    name: str
    version: str
    needs_answers: bool
    verify: Verify

    def scores(
        self, completions: Iterable[tuple[str, str | None, str]], where: Callable[[int], str]
    ) -> NDArray[np.float64]:
        """Score of every completion, [N], from 0 to 1.

        Args:
            completions: text, reference answer and prompt id of each.
            where: a completion's place, for errors.

        Raises:
            ConfigError: an answer is missing, or the verifier fails, or what it gives is no number
                from 0 to 1.
            PromptError: the prompt is not one that it knows.
        """
        made = []
        for i, (text, answer, prompt_id) in enumerate(completions):
            self.refuse_unanswered([answer], where(i))
            score = finite(partial(self.verify, text, answer, prompt_id), PLACE, where(i))
            if not 0 <= score <= 1:
                raise ConfigError(
                    f"{PLACE}: a score is from 0 to 1", where=where(i), got=f"{score:g}"
                )
            made.append(score)
        return np.array(made, np.float64)

    def refuse_unanswered(self, answers: Sequence[str | None], where: str | None = None) -> None:
        """Refuse prompts without the reference answers that the verifier needs.

        Raises:
            ConfigError: one has none.
        """
        if self.needs_answers and None in answers:
            raise ConfigError(
                f"{PLACE}: {self.name!r} needs reference answers, and a held-out prompt has none",
                where=where,
                remedy="name the prompts' answers in their source, or leave the verifier out",
            )


def evaluation_verifier(config: RunConfig) -> Verifier | None:
    """The verifier of a run's evaluation; None when it has none.

    Raises:
        ConfigError: there is no such verifier.
        NotInstalled: its package is not there.
    """
    evaluation = config.evaluation
    if evaluation is None or evaluation.verifier is None:
        return None
    return load_verifier(evaluation.verifier, evaluation.source or config.prompts.source)


def load_verifier(name: str, source: PromptSource | None) -> Verifier:
    """The verifier of a name, for prompts of a source; None when that is not known.

    Raises:
        ConfigError: there is none, or it does not know prompts of such a source.
        NotInstalled: its package is not there.
    """
    if name == REASONING_GYM:
        return _reasoning_gym(source)
    if name == MATH:
        return _math()
    function = find_function(name, PLACE)
    file = getattr(modules[name.partition(":")[0]], "__file__", None)
    return Verifier(
        name,
        sha256(Path(file).read_bytes()).hexdigest() if file else "",
        needs_answers=True,
        verify=lambda text, answer, prompt_id: function(text, answer),
    )


def _reasoning_gym(source: PromptSource | None) -> Verifier:
    """The dataset's own scorer. Many need more of an entry than its answer, so the entries are
    generated again, when the first is asked for, and found by the prompt's id."""
    if not isinstance(source, ReasoningGymSource):
        raise ConfigError(
            f"{PLACE}: 'reasoning_gym' scores answers to prompts of a reasoning_gym source",
            got="none" if source is None else source.type,
            remedy="take 'math' or a function of yours",
        )
    release = _release("reasoning-gym", "pip install reasoning-gym")

    @lru_cache(maxsize=1)
    def entries() -> tuple[Any, dict[str, dict[str, Any]]]:
        dataset = gym_dataset(source)
        return dataset, {gym_prompt(source, entry).prompt_id: entry for entry in dataset}

    def verify(text: str, answer: str | None, prompt_id: str) -> float:
        dataset, by_prompt = entries()
        if prompt_id not in by_prompt:
            raise PromptError(
                f"not an entry of {source.dataset!r} as reasoning-gym {release} makes it",
                where=f"prompt {prompt_id}",
                remedy="install the reasoning-gym that made the prompts, or start another run",
            )
        return float(dataset.score_answer(said_answer(text), by_prompt[prompt_id]))

    return Verifier(REASONING_GYM, release, needs_answers=False, verify=verify)


def said_answer(text: str) -> str:
    """What a completion gives as its answer.

    That is what stands in its last ``<answer>…</answer>``; without one, the rest of the line behind
    its last ``answer is``, ``answer to … is`` or ``answer:``, less bold and dollar signs and a full
    stop; else all of it.
    """
    from reasoning_gym.utils import extract_answer

    tagged: str | None = extract_answer(text)
    if tagged is not None:
        return tagged
    *_, last = [0, *(said.end() for said in _SAID.finditer(text))]
    return text[last:].partition("\n")[0].rstrip(".*$ \r") if last else text.strip()


def _math() -> Verifier:
    release = _release("math-verify", "pip install 'opdcache[math]'")
    from math_verify import parse, verify

    @lru_cache(maxsize=1024)
    def gold(answer: str) -> list[Any]:
        read: list[Any] = parse(_as_latex(answer), parsing_timeout=_limit_s())
        if not read:
            raise ConfigError(
                f"{PLACE}: math-verify reads no expression in a reference answer",
                got=repr(answer[:60]),
                remedy="give answers as numbers or LaTeX, or take a function of yours",
            )
        return read

    def right(text: str, answer: str | None, prompt_id: str) -> float:
        said = parse(text, parsing_timeout=_limit_s())
        return float(verify(gold(answer or ""), said, timeout_seconds=_limit_s()))

    return Verifier(MATH, release, needs_answers=True, verify=right)


def _limit_s() -> int | None:
    """math-verify's time limits are signals, which only the main thread can set."""
    return _LIMIT_S if threading.current_thread() is threading.main_thread() else None


def _as_latex(answer: str) -> str:
    r"""A reference answer as LaTeX that math-verify finds: one that is not marked as such is all
    LaTeX (of ``3\sqrt{2}`` it would else read the 3 alone), from ``####`` on where it has that."""
    if any(mark in answer for mark in _MARKED):
        return answer
    return f"${answer.rpartition('####')[2].strip()}$"


def _release(package: str, remedy: str) -> str:
    """Version of a package that is there.

    Raises:
        NotInstalled: it is not.
    """
    try:
        return version(package)
    except ImportError as error:  # what PackageNotFoundError is
        raise NotInstalled(f"{package} is not installed", where=PLACE, remedy=remedy) from error
