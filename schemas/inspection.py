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
