"""One completion token by token: what ``opdcache inspect`` and reports show."""

from pydantic import Field

from .base import Model


class Entry(Model):
    """One of a model's likeliest ids at a token; its place in the list is its rank."""

    id: int = Field(description="the token id")
    text: str = Field(description="of the id, or <id> where no tokenizer is at hand")
    shared: bool = Field(description="whether it is among the compared entries of both models")
    student_logprob: float | None = Field(
        description="nats; null where the student's log-prob of this id is not stored"
    )
    teacher_logprob: float | None = Field(
        description="nats; null where the teacher's log-prob of this id is not stored"
    )


class Token(Model):
    """One completion token, and the distributions that predict it. Null is what is not stored."""

    position: int = Field(description="in the completion, from 0")
    id: int = Field(description="the token id")
    text: str = Field(description="of the id; bytes of part of a character as \\xNN")
    supervised: bool = Field(description="whether a loss may look at it")
    student_logprob: float | None = Field(description="log p of this token, nats")
    teacher_logprob: float | None = Field(description="log q of this token, nats")
    advantage: float | None = Field(description="log q - log p of this token, nats")
    student_entropy: float | None = Field(
        description="H(p), nats; null unless the student was scored on its own completions"
    )
    student_entropy_low: float | None = Field(
        description="least H(p) that the student's stored entries allow, nats"
    )
    student_entropy_high: float | None = Field(description="largest H(p) that they allow, nats")
    teacher_entropy: float | None = Field(description="H(q), nats")
    overlap: float | None = Field(description="share of the compared entries that is shared")
    mass_student: float | None = Field(description="p of the shared entries")
    mass_teacher: float | None = Field(description="q of the shared entries")
    student: tuple[Entry, ...] = Field(description="the student's likeliest, at most k")
    student_tail: float | None = Field(description="p of all ids that are not in that list")
    teacher: tuple[Entry, ...] = Field(description="the teacher's likeliest, at most k")
    teacher_tail: float | None = Field(description="q of all ids that are not in that list")


class Row(Model):
    """One completion, token by token. Log-probs are natural, over the full vocabulary."""

    shard: str = Field(description="start of its rollout shard's key")
    row: int = Field(description="of the shard, from 0")
    rollout_id: str = Field(description="the prompt's id / which completion of it")
    prompt: str = Field(
        description="text of the prompt's ids; the chat, or <id>s, where no tokenizer is at hand"
    )
    task: str = Field(description="of the prompt")
    answer: str | None = Field(description="the prompt set's reference answer")
    finish_reason: str = Field(description="stop or length")
    text: str = Field(description="the completion as it was stored, special tokens left out")
    tokens: tuple[Token, ...] = Field(description="of the completion")
    reward: float | None = Field(description="mean advantage of the supervised tokens, nats")


class TokenValue(Model):
    """A token of a completion, and what a measure says of it."""

    position: int = Field(description="in the completion, from 0")
    id: int = Field(description="the token id")
    text: str = Field(description="of the id, as in a row")
    value: float = Field(description="of the measure")


class Listed(Model):
    """A completion of a list. Means are over the supervised tokens; null is what is not stored."""

    row: str = Field(description="what --row takes: its shard, and the row of it")
    part: str = Field(description="its round, or the key")
    rollout_id: str = Field(description="the prompt's id / which completion of it")
    num_tokens: int = Field(description="of the completion")
    advantage: float | None = Field(description="mean log q - log p, nats")
    worst: TokenValue | None = Field(description="the token of the least advantage")
    disagreement: float | None = Field(
        description="mean total variation distance, the least that what is stored allows: 0 to 1"
    )
    farthest: TokenValue | None = Field(description="the token of the largest distance")


class Listing(Model):
    """What ``opdcache inspect --json`` prints where it is not asked for one completion."""

    of: str = Field(description="the run file or key")
    rows: tuple[Listed, ...] = Field(description="in the order that was asked for")
