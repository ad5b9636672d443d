"""What ``opdcache prompts`` says of the prompts that it chose."""

from typing import Literal

from pydantic import Field

from .base import Model

By = Literal["likelihood", "overlap"]
"""What prompts are ordered by."""


class Range(Model):
    """Least and largest of some values."""

    least: float = Field(description="the least")
    most: float = Field(description="the largest")


class Selection(Model):
    """A set of prompts that was chosen and written."""

    file: str = Field(description="the file that was written")
    rounds: tuple[int, ...] = Field(description="rounds whose completions were read")
    by: By = Field(description="what the prompts are ordered by")
    num_completions: int = Field(description="completions that were read")
    num_tokens: int = Field(description="their supervised tokens")
    num_prompts: int = Field(description="distinct prompts: text, task and answer")
    num_kept: int = Field(description="those of them that were written")
    left_out: dict[str, int] = Field(description="those of them that were not, by reason")
    likelihood: Range | None = Field(
        description="of the written prompts: mean over their tokens of the teacher's log-prob of "
        "the sampled token, nats; None where it is not stored"
    )
    overlap: Range | None = Field(
        description="of the written prompts: mean over their tokens of the share of both models' "
        "likeliest entries that are the same; None where it is not stored"
    )
    num_other: int = Field(description="prompts of --other that were written")
    other_left_out: dict[str, int] = Field(description="those that were not, by reason")
    num_new_ids: int = Field(
        description="written prompts whose id another one has, and that got one of their own"
    )
    tasks: dict[str, int] = Field(description="written prompts by task, for prompts.shares")
