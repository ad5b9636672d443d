"""Verifiers: how right a completion is, from 0 to 1.

Three kinds by name: ``reasoning_gym`` (the scorer of the prompts' own dataset), ``math``
(math-verify) and a function of the user's, ``module:function``. The first two judge in a process of
their own.
"""

import re
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
from .judging import Judge, Score
from .prompts import gym_dataset, gym_prompt
from .schemas.config import RunConfig
from .schemas.prompts import PromptSource, ReasoningGymSource
from .user_code import find_function, finite

PLACE = "evaluation.verifier"
REASONING_GYM, MATH = "reasoning_gym", "math"
_READING = 2
"""Revision of what is read here as an answer; it is part of the versions, so that scores by another
are not taken again."""

_ASKED = r"(?:\s+(?:to|for|of)\b(?:[^.:\n]|[.:]\d)*?)?"
_SAID = re.compile(
    rf"\b(?:(?:the|my)(?:\s+(?:final|correct|right))?|final)\s+answer{_ASKED}\s+is\b[\s:*$]*"
    rf"|(?:^[^\w\n]*(?:(?:the|my)\s+)?|\bfinal\s+)answer{_ASKED}(?:\s+is\b|\**\s*:)[\s:*$]*",
    re.IGNORECASE | re.MULTILINE,
)
_BEYOND = re.compile(r"\n|\.\s|,?\s+because\b", re.IGNORECASE)
_BOXED = "\\boxed{"
_MARKED = ("$", "\\boxed", "\\(", "\\[")

Completion = tuple[str, str | None, str]
"""Text, and the prompt's reference answer and id."""

Verify = Callable[[Completion, str], float | None]
"""Score of a completion, from 0 to 1, given its place for errors; None: it cannot be judged."""


@dataclass(frozen=True, slots=True)
class Judged:
    """What a verifier says of N completions.

    Attributes:
        scores_N: float64 [N], from 0 to 1.
        failed_N: bool [N], those that it could not judge, whose score is 0.
    """

    scores_N: NDArray[np.float64]
    failed_N: NDArray[np.bool_]


def _nothing() -> None:
    """Nothing to close."""


@dataclass(frozen=True, slots=True)
class Verifier:
    """A verifier, ready.

    Attributes:
        name: as the run file has it.
        version: of the package that verifies and, behind a plus, of how answers are read here; or
            the SHA-256 of the file of the user's function.
        needs_answers: whether every prompt must have a reference answer.
        place: what named it, for errors.
        close: ends the process that it judges in, where it has one.
    """

    name: str
    version: str
    needs_answers: bool
    verify: Verify
    place: str = PLACE
    close: Callable[[], None] = _nothing

    def judged(self, completions: Iterable[Completion], where: Callable[[int], str]) -> Judged:
        """Scores of completions.

        One that a package cannot judge (it raises, takes too long, or gives no number from 0 to 1)
        is wrong, and told apart; of a function of the user's the same is an error.

        Args:
            where: a completion's place, for errors.

        Raises:
            ConfigError: an answer is missing, or the user's function fails.
            PromptError: the prompt is not one that it knows.
            EngineError: the process that it judges in does not start.
        """
        made = []
        for i, completion in enumerate(completions):
            self.refuse_unanswered([completion[1]], where(i))
            made.append(self.verify(completion, where(i)))
        return Judged(
            np.array([score or 0 for score in made], np.float64),
            np.array([score is None for score in made], np.bool_),
        )

    def scores(
        self, completions: Iterable[Completion], where: Callable[[int], str]
    ) -> NDArray[np.float64]:
        """Score of every completion, [N], from 0 to 1; takes and raises what ``judged`` does."""
        return self.judged(completions, where).scores_N

    def refuse_unanswered(self, answers: Sequence[str | None], where: str | None = None) -> None:
        """Refuse prompts without the reference answers that the verifier needs.

        Raises:
            ConfigError: one has none.
        """
        if self.needs_answers and None in answers:
            raise ConfigError(
                f"{self.place}: {self.name!r} needs reference answers, and a prompt has none",
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


def load_verifier(name: str, source: PromptSource | None, place: str = PLACE) -> Verifier:
    """The verifier of a name, for prompts of a source; None when that is not known.

    Args:
        place: what names it, for errors.

    Raises:
        ConfigError: there is none, or it does not know prompts of such a source.
        NotInstalled: its package is not there.
    """
    if name == REASONING_GYM:
        return _reasoning_gym(source, place)
    if name == MATH:
        release = _release("math-verify", "pip install 'opdcache[math]'", place)
        return _judging(name, release, place, partial(math_scorer, place), needs_answers=True)
    return _users(name, place)


def _users(name: str, place: str) -> Verifier:
    function = find_function(name, place)

    def verify(completion: Completion, where: str) -> float:
        text, answer, _ = completion
        score = finite(partial(function, text, answer), place, where)
        if not 0 <= score <= 1:
            raise ConfigError(f"{place}: a score is from 0 to 1", where=where, got=f"{score:g}")
        return score

    return Verifier(name, _file_version(name), needs_answers=True, verify=verify, place=place)


def _file_version(name: str) -> str:
    """SHA-256 of the file of a function; nothing where it has none, such as in a zipped module."""
    file = getattr(modules[name.partition(":")[0]], "__file__", None)
    try:
        return sha256(Path(file).read_bytes()).hexdigest() if file else ""
    except OSError:
        return ""


def _judging(
    name: str, release: str, place: str, make: Callable[[], Score], *, needs_answers: bool
) -> Verifier:
    judge = Judge(make)
    return Verifier(
        name,
        f"{release}+{_READING}",
        needs_answers,
        verify=lambda completion, where: judge(*completion),
        place=place,
        close=judge.close,
    )


def _reasoning_gym(source: PromptSource | None, place: str) -> Verifier:
    if not isinstance(source, ReasoningGymSource):
        raise ConfigError(
            f"{place}: 'reasoning_gym' scores answers to prompts of a reasoning_gym source",
            got="none" if source is None else source.type,
            remedy="take 'math' or a function of yours",
        )
    release = _release("reasoning-gym", "pip install reasoning-gym", place)
    make = partial(gym_scorer, source, release)
    return _judging(REASONING_GYM, release, place, make, needs_answers=False)


def gym_scorer(source: ReasoningGymSource, release: str) -> Score:
    """The dataset's own scorer. Many need more of an entry than its answer, so the entries are
    generated again, and found by the prompt's id.

    Raises:
        PromptError: reasoning-gym refuses the source; so does the scorer a prompt of another.
    """
    dataset = gym_dataset(source)
    by_prompt = {gym_prompt(source, entry).prompt_id: entry for entry in dataset}

    def score(text: str, answer: str | None, prompt_id: str) -> float:
        if prompt_id not in by_prompt:
            raise PromptError(
                f"not an entry of {source.dataset!r} as reasoning-gym {release} makes it",
                where=f"prompt {prompt_id}",
                remedy="install the reasoning-gym that made the prompts, or start another run",
            )
        return float(dataset.score_answer(said_answer(text), by_prompt[prompt_id]))

    return score


def said_answer(text: str) -> str:
    r"""What a completion gives as its answer.

    That is what stands in its last ``<answer>…</answer>``; without one, in its last ``\boxed{…}``;
    without one, the rest of the sentence behind its last ``the answer is``, ``answer to … is`` or
    ``answer:``, less a reason, bold and dollar signs; else all of it. A colon counts behind
    ``final answer`` and where a line begins so.
    """
    from reasoning_gym.utils import extract_answer

    tagged: str | None = extract_answer(text)
    if tagged is not None:
        return tagged
    boxed = _last_boxed(text)
    if boxed is not None:
        return boxed
    *_, last = [0, *(said.end() for said in _SAID.finditer(text))]
    return _BEYOND.split(text[last:], maxsplit=1)[0].rstrip(".*$ \r") if last else text.strip()


def _last_boxed(text: str) -> str | None:
    """What the last box holds that is closed."""
    first = text.rfind(_BOXED)
    while first >= 0:
        start, depth = first + len(_BOXED), 1
        for end in range(start, len(text)):
            depth += {"{": 1, "}": -1}.get(text[end], 0)
            if not depth:
                return text[start:end].strip()
        first = text.rfind(_BOXED, 0, first)
    return None


def math_scorer(place: str) -> Score:
    """math-verify, without its time limits: those are signals, and whoever judges has one.

    Args:
        place: what named it, for errors.
    """
    from math_verify import parse, verify

    @lru_cache(maxsize=1024)
    def gold(answer: str) -> list[Any]:
        read: list[Any] = parse(_as_latex(answer), parsing_timeout=None)
        if not read:
            raise ConfigError(
                f"{place}: math-verify reads no expression in a reference answer",
                got=repr(answer[:60]),
                remedy="give answers as numbers or LaTeX, or take a function of yours",
            )
        return read

    def score(text: str, answer: str | None, prompt_id: str) -> float:
        said = parse(text, parsing_timeout=None)
        return float(verify(gold(answer or ""), said, timeout_seconds=None))

    return score


def _as_latex(answer: str) -> str:
    r"""A reference answer as LaTeX that math-verify finds: one that is not marked as such is all
    LaTeX (of ``3\sqrt{2}`` it would else read the 3 alone), from ``####`` on where it has that."""
    if any(mark in answer for mark in _MARKED):
        return answer
    return f"${answer.rpartition('####')[2].strip()}$"


def _release(package: str, remedy: str, place: str) -> str:
    """Version of a package that is there.

    Raises:
        NotInstalled: it is not.
    """
    try:
        return version(package)
    except ImportError as error:  # what PackageNotFoundError is
        raise NotInstalled(f"{package} is not installed", where=place, remedy=remedy) from error
