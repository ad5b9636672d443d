"""What ``opdcache compare`` says of two sets of scores, and the limits of its verdict."""

from typing import Literal

from pydantic import Field

from .audit import PartAudit
from .base import Model


class CompareLimits(Model):
    """From when on the verdict names something. They are this project's, not the paper's.

    The first group is for scores of one teacher under one prompt rendering, the second for two
    teachers.
    """

    max_drift_kl: float = Field(
        0.005, ge=0, description="drift above: local KL of a teacher from itself, either way, nats"
    )
    max_drift_nats: float = Field(
        0.05, ge=0, description="drift above: mean change of the sampled tokens' log-probs, nats"
    )
    max_kl: float = Field(
        0.1, ge=0, description="different above: local KL of two teachers, either way, nats"
    )
    min_argmax_agreement: float = Field(
        0.9, ge=0, le=1, description="different below: share of tokens with one likeliest entry"
    )
    min_overlap: float = Field(
        0.8, ge=0, le=1, description="different below: overlap of the two top k"
    )
    min_mass: float = Field(
        0.7,
        ge=0,
        le=1,
        description="undecided below: either's mass on the entries that both keep, without which "
        "the local KL bounds little",
    )
    num_errors: float = Field(
        2.0, ge=0, description="standard errors that a mean must be clear of a limit"
    )


class Estimate(Model):
    """A mean over tokens."""

    mean: float = Field(description="over the tokens that have the value")
    standard_error: float | None = Field(
        description="of the mean, completions being the independent draws; None when there are "
        "fewer than two"
    )


class Agreement(Model):
    """Two models' scores of the same supervised tokens, whose distributions are A and B. Nats.

    ``I`` are the entries that are in both top k. A value is None where its column is not stored.
    """

    num_tokens: int = Field(description="supervised tokens")
    num_narrow: int = Field(
        description="tokens whose overlap is of fewer entries than k, since fewer are stored"
    )
    kl_ab: Estimate | None = Field(
        description="local KL(A || B): every entry that both keep is an outcome, all the rest is "
        "one more. At most the full KL"
    )
    kl_ba: Estimate | None = Field(description="local KL(B || A)")
    mass_a: Estimate | None = Field(description="A's mass on the entries that both keep")
    mass_b: Estimate | None = Field(description="B's")
    kept_by_both: Estimate | None = Field(
        description="entries that both keep, as a share of those of whoever keeps fewer"
    )
    overlap: Estimate | None = Field(description="|I| / k")
    overlap_mass_a: Estimate | None = Field(description="A's mass on I")
    overlap_mass_b: Estimate | None = Field(description="B's")
    argmax_agreement: Estimate | None = Field(
        description="share of tokens whose likeliest entries are the same"
    )
    topk_difference: Estimate | None = Field(
        description="|log A - log B| of the entries that both keep, a token's mean first"
    )
    sampled_difference: Estimate | None = Field(description="|log A(y) - log B(y)|, y as sampled")
    sampled_k3: Estimate | None = Field(
        description="r - 1 - log r, r = B(y) / A(y): never negative, 0 only where the two agree. "
        "The KL of the two only if A sampled y; here the student did"
    )
    entropy_difference: Estimate | None = Field(description="|H(A) - H(B)|")
    student_kl_a: Estimate | None = Field(
        description="log p(y) - log A(y): the student's reverse KL from A, when p sampled y"
    )
    student_kl_b: Estimate | None = Field(description="the same from B")
    student_kl_change: Estimate | None = Field(description="the second less the first")


class PositionAgreement(Agreement):
    """Of the tokens at some depth of their completions."""

    first: int = Field(description="position of the chunk's first token")


class LimitTest(Model):
    """A mean against a limit."""

    name: str = Field(description="of the mean")
    value: Estimate = Field(description="the mean")
    limit: float = Field(description="what the limits say")
    outcome: Literal["within", "beyond", "undecided"] = Field(
        description="undecided: the mean is not clear of the limit by num_errors standard errors"
    )


class LeftOut(Model):
    """What was not compared."""

    reason: str = Field(description="why")
    num_shards: int = Field(description="rollout shards")
    num_tokens: int = Field(description="their completion tokens")


Verdict = Literal["the same within rounding", "indistinguishable", "different", "undecided"]


class SharedRollouts(Model):
    """Two models' scores of rollouts that both scored, token by token."""

    teacher_a: str = Field(description="fingerprint of A's model")
    teacher_b: str = Field(description="fingerprint of B's")
    same_rendering: bool = Field(description="whether both read the same prompt tokens")
    num_shards: int = Field(description="rollout shards")
    num_completions: int = Field(description="completions")
    made_otherwise: tuple[str, ...] = Field(
        description="how the score sets were made, where A's and B's differ"
    )
    agreement: Agreement = Field(description="over all tokens")
    by_position: tuple[PositionAgreement, ...] = Field(description="by depth")
    largest: dict[str, float] = Field(description="the largest value of a difference, by its name")
    left_out: tuple[LeftOut, ...] = Field(description="columns that one of them lacks")
    tests: tuple[LimitTest, ...] = Field(description="what the verdict rests on")
    verdict: Verdict = Field(
        description="of one teacher and rendering: the same within rounding, or different, which "
        "is drift; of two: indistinguishable, or different; undecided when a test is"
    )

    @property
    def same_model(self) -> bool:
        """Whether the two can differ by rounding, an engine or its settings alone."""
        return self.teacher_a == self.teacher_b and self.same_rendering


class Difference(Model):
    """A mean of the audits, side by side."""

    name: str = Field(description="of the mean, as in the audit")
    a: Estimate | None = Field(description="A's")
    b: Estimate | None = Field(description="B's")
    change: Estimate | None = Field(
        description="B's less A's; without an error when the two share rollouts, whose tokens are "
        "not independent draws"
    )


class SideBySide(Model):
    """The audits of two parts that are not of the same rollouts throughout."""

    a: PartAudit = Field(description="A's")
    b: PartAudit = Field(description="B's")
    num_shared_shards: int = Field(description="rollout shards that both have")
    num_shared_prompts: int = Field(description="different prompts that both have")
    differences: tuple[Difference, ...] = Field(description="mean by mean")


class Comparison(Model):
    """``opdcache compare --json``."""

    a: str = Field(description="the first, as it was named")
    b: str = Field(description="the second")
    k: int = Field(description="entries that the overlap is taken of")
    chunk_tokens: int = Field(description="tokens of a position chunk")
    limits: CompareLimits = Field(description="of the verdict")
    shared: tuple[SharedRollouts, ...] = Field(
        description="rollouts that both scored, for each pair of models"
    )
    side_by_side: tuple[SideBySide, ...] = Field(description="parts of other rollouts, in pairs")
    left_out: tuple[LeftOut, ...] = Field(description="shards not compared token by token")
    unpaired: tuple[str, ...] = Field(description="parts that the other has no counterpart of")
    unreadable: tuple[str, ...] = Field(
        description="what is wrong with shards that could not be read, and are in no number"
    )
    elapsed_s: float = Field(description="wall time of reading and computing")

    @property
    def is_sound(self) -> bool:
        """Whether every shard could be read, and no teacher has drifted from itself."""
        drifted = any(each.same_model and each.verdict == "different" for each in self.shared)
        return not drifted and not self.unreadable
