"""Held-out evaluation as a whole: what ``opdcache evaluate`` tells."""

from ..errors import UsageError
from ..runfolder import RunContext
from ..schemas.evaluation import Evaluation
from .verified import run as accuracy


def run(context: RunContext, *, divergence: bool = True) -> Evaluation:
    """Evaluate every student that has sampled the held-out prompts; what is known is kept.

    Accuracy comes first: a teacher that has to sample does so in vLLM, which is gone before
    transformers loads models.

    Args:
        divergence: take the exact divergence from the teacher; without it no model is loaded for
            comparing.

    Raises:
        UsageError: there is nothing to evaluate, or not so.
        InputsMissing: no student has sampled held-out prompts yet.
    """
    if not divergence:
        found = accuracy(context)
        if found is None:
            raise UsageError(
                "without a verifier nothing but the divergence is evaluated",
                where=context.folder.path,
                remedy="add evaluation.verifier to the run file, or leave out --no-divergence",
            )
        return Evaluation(divergence=None, accuracy=found)
    from . import divergence as exact  # torch

    exact.refuse(context)
    found = accuracy(context)
    return Evaluation(divergence=tuple(exact.run(context)), accuracy=found)
