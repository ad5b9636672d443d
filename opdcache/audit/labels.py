"""Which training completions are correct, as far as a verifier says: labels for the reward."""

from functools import partial

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from ..errors import UsageError
from ..schemas.config import ReasoningGymSource
from ..verifiers import REASONING_GYM, Verifier, load_verifier
from .tally import Judge
from .targets import Target


def judge_of(target: Target, named: str | None) -> Judge | None:
    """What judges a target's completions; None when nothing does.

    Args:
        named: a verifier; by default that of the run's evaluation, where it knows the training
            prompts too.

    Raises:
        UsageError: there is no such verifier, its package is not there, or it does not know such
            prompts.
    """
    config = target.config
    source = None if config is None else config.prompts.source
    name = named
    if name is None and config is not None and config.evaluation is not None:
        name = config.evaluation.verifier
    if name is None:
        return None
    if name == REASONING_GYM and not isinstance(source, ReasoningGymSource):
        if named is None:
            return None
        raise UsageError(
            f"--verifier {name}: it scores answers to prompts of a run's reasoning_gym source",
            where=target.name,
            remedy="take 'math', or a function as module:name",
        )
    return partial(_scores, load_verifier(name, source))


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
