"""Which training completions are correct, as far as a verifier says: labels for the reward."""

from contextlib import suppress
from functools import partial

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from ..errors import OpdcacheError, UsageError
from ..schemas.prompts import ReasoningGymSource
from ..verifiers import REASONING_GYM, Verifier, load_verifier
from .tally import Judge
from .targets import Target

NONE = "none"
"""As a verifier's name: nothing is judged."""


def judge_of(target: Target, named: str | None) -> Judge | None:
    """What judges a target's completions; None when nothing does.

    The verifier of the run's evaluation is asked where none is named: then labels are an extra, and
    rows that it cannot judge, or all where it is not installed, have none.

    Raises:
        UsageError: a named verifier is none, its package is not there, or it does not know such
            prompts.
    """
    config = target.config
    source = None if config is None else config.prompts.source
    if named == NONE:
        return None
    if named is not None:
        if named == REASONING_GYM and not isinstance(source, ReasoningGymSource):
            raise UsageError(
                f"--verifier {named}: it scores answers to prompts of a run's reasoning_gym source",
                where=target.name,
                remedy="take 'math', or a function as module:name",
            )
        return partial(_scores, load_verifier(named, source, "--verifier"))
    evaluation = None if config is None else config.evaluation
    if config is None or evaluation is None or evaluation.verifier is None:
        return None
    generated = isinstance(source, ReasoningGymSource) and config.rollouts is None
    if evaluation.verifier == REASONING_GYM and not generated:
        return None
    with suppress(UsageError):
        return partial(_scores_that_can_be_had, load_verifier(evaluation.verifier, source))
    return None


def _scores_that_can_be_had(verifier: Verifier, table: pa.Table) -> NDArray[np.float64]:
    with suppress(OpdcacheError):
        return _scores(verifier, table)
    return np.full(table.num_rows, np.nan)


def _scores(verifier: Verifier, table: pa.Table) -> NDArray[np.float64]:
    """Scores of rows' completions, [N]; NaN of those without an answer that is needed."""
    columns = [n for n in ("text", "answer", "prompt_id", "rollout_id") if n in table.column_names]
    rows = table.select(columns).to_pylist()
    answers = [row.get("answer") for row in rows]
    judged = [i for i, a in enumerate(answers) if a is not None or not verifier.needs_answers]
    asked = ((rows[i]["text"], answers[i], rows[i]["prompt_id"]) for i in judged)
    scores = np.full(len(rows), np.nan)
    scores[judged] = verifier.scores(asked, lambda i: f"rollout {rows[judged[i]]['rollout_id']}")
    return scores
