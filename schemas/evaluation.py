"""What ``opdcache evaluate --json`` prints."""

from pydantic import Field

from .base import Model
from .rounds import EvaluationRound


class Estimate(Model):
    """A mean over prompts, with its bootstrap interval."""

    value: float = Field(description="on all prompts")
    low: float = Field(description="lower end of the interval")
    high: float = Field(description="upper end of the interval")


class Recovery(Model):
    """How much of the teacher's lead over round 0 a round has made up, in mean scores."""

    value: float | None = Field(
        description="(this round - round 0) / (teacher - round 0); null: the teacher does not lead"
    )
    low: float | None = Field(
        description="lower end of the interval; null: there is none, since the teacher does not "
        "lead in more resamples than an interval leaves out on a side"
    )
    high: float | None = Field(description="upper end of the interval, or null")
    gap: float = Field(description="the teacher's mean score less round 0's")
    share_without_gap: float = Field(
        description="share of the resamples in which the teacher does not lead"
    )


class ModelAccuracy(Model):
    """How right one model's completions of held-out prompts are."""

    round: int | None = Field(description="whose student it is, before training; null: the teacher")
    num_prompts: int = Field(description="prompts")
    num_completions: int = Field(description="completions")
    num_truncated: int = Field(description="completions cut off at their longest")
    num_failed: int = Field(
        0, description="completions that the verifier could not judge, which count as wrong"
    )
    mean_score: Estimate = Field(
        description="avg@n: mean score of a prompt's n completions, partial credit included"
    )
    pass_at: dict[int, Estimate] = Field(
        description="by k: probability that one of k completions of a prompt is right, which means "
        "a score of 1; unbiased, from n completions"
    )
    recovery: Recovery | None = Field(
        None, description="of rounds from 1 on, when the teacher and round 0 are there"
    )


class Accuracy(Model):
    """Every model's accuracy by one verifier, on the same prompts."""

    verifier: str = Field(description="evaluation.verifier")
    version: str = Field(
        description="of the verifier's package, + a revision of how answers are read here; of a "
        "function, the SHA-256 of its file"
    )
    samples_per_prompt: int = Field(description="n, completions a prompt")
    num_resamples: int = Field(description="bootstrap resamples of the prompts")
    level: float = Field(description="of the intervals")
    overall: tuple[ModelAccuracy, ...] = Field(description="rounds in order, then the teacher")
    by_task: dict[str, tuple[ModelAccuracy, ...]] = Field(
        {}, description="the same of each task's prompts; empty when there is one task"
    )


class Evaluation(Model):
    """Held-out evaluation of a run's students."""

    divergence: tuple[EvaluationRound, ...] | None = Field(
        description="exact divergence from the teacher, a round each; null: it was not asked for"
    )
    accuracy: Accuracy | None = Field(description="null: the run file names no verifier")
