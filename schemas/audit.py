"""What ``opdcache audit`` says of stored distributions, and the limits of its verdict."""

from typing import Literal

from pydantic import Field

from .base import Model


class AuditLimits(Model):
    """From when on the verdict names something. They are this project's, not the paper's.

    The first group says no-go; the second warns.
    """

    min_overlap: float = Field(
        0.3, ge=0, le=1, description="no-go below: overlap ratio of the round"
    )
    min_overlap_mass: float = Field(
        0.5, ge=0, le=1, description="no-go below: either side's mass on the shared entries"
    )
    max_empty: float = Field(
        0.05, ge=0, le=1, description="no-go above: share of tokens with no shared entry"
    )
    max_special_outliers: float = Field(
        0.5,
        ge=0,
        le=1,
        description="no-go above: share of a special token's places where the teacher finds it at "
        "least special_outlier_nats less likely than the student",
    )
    special_outlier_nats: float = Field(5.0, gt=0, description="see max_special_outliers")
    min_special_places: int = Field(
        10, ge=1, description="a special token in fewer places is a warning at most"
    )
    max_faulty: float = Field(
        0.001,
        ge=0,
        le=1,
        description="no-go above: share of a shard's tokens whose stored mass is not 1, or whose "
        "log-prob is a 0, or whose entropy is one, that no distribution with its entries has",
    )
    min_aligned: float = Field(
        0.95,
        ge=0,
        le=1,
        description="no-go below: share of a shard's tokens whose log-prob is that of their entry",
    )
    max_shard_deviation_nats: float = Field(
        1.0,
        gt=0,
        description="no-go above: how far a shard's mean advantage may be from the median of its "
        "round's, where it is also eight times their usual deviation and six times its own error",
    )
    min_captured_mass: float = Field(
        0.8, ge=0, le=1, description="warning below: teacher's mass in the stored entries"
    )
    min_final_overlap_mass: float = Field(
        0.9, ge=0, le=1, description="warning below: either side's mass on the shared entries"
    )
    max_entropy_gap: float = Field(
        1.0, ge=0, description="warning above: entropy gap of the round, nats"
    )
    max_truncated: float = Field(
        0.5, ge=0, le=1, description="warning above: share of truncated completions"
    )
    max_repetitive: float = Field(
        0.1, ge=0, le=1, description="warning above: share of repetitive completions"
    )
    max_duplicates: float = Field(
        0.1, ge=0, le=1, description="warning above: share of completions that are copies"
    )
    min_overlap_rise: float = Field(
        0.0, ge=-1, le=1, description="warning below: rise of the overlap, first to last round"
    )


class Diagnostics(Model):
    """Over supervised tokens. A mean is over the tokens that have the value; None when none has.

    ``I`` are the entries that are in the student's top k and in the teacher's. Nats.
    """

    num_tokens: int = Field(description="supervised tokens")
    captured_mass: float | None = Field(
        description="mean of the teacher's mass in all its stored entries"
    )
    overlap: float | None = Field(description="mean of |I| / k")
    overlap_mass_student: float | None = Field(description="mean of the student's mass on I")
    overlap_mass_teacher: float | None = Field(description="mean of the teacher's mass on I")
    overlap_advantage: float | None = Field(
        description="mean of 1/|I| sum over I of p (log q - log p), both renormalised on I, at "
        "most 0. Tokens with an empty I are left out"
    )
    num_empty: int = Field(description="tokens with an empty I")
    num_narrow: int = Field(
        description="tokens compared on fewer entries than k, since fewer are stored"
    )
    advantage: float | None = Field(
        description="mean of log q(y) - log p(y) of the sampled token: the reverse KL's negative, "
        "when p sampled it"
    )
    reverse_kl_sampled: float | None = Field(
        description="mean of r - 1 - log r, r = q(y) / p(y): the reverse KL again, never negative"
    )
    teacher_entropy: float | None = Field(description="mean of H(q)")
    student_entropy: float | None = Field(
        description="mean of H(p), where the policy itself was scored on every token"
    )
    entropy_gap: float | None = Field(description="mean of |H(q) - H(p)|, where it was")
    student_entropy_low: float | None = Field(
        description="mean of the least H(p) that the recorded entries allow"
    )
    student_entropy_high: float | None = Field(description="mean of the largest")
    entropy_gap_low: float | None = Field(
        description="mean of the least |H(q) - H(p)| that the recorded entries allow"
    )
    entropy_gap_high: float | None = Field(description="mean of the largest")


class PositionDiagnostics(Diagnostics):
    """Of the tokens at some depth of their completions."""

    first: int = Field(description="position of the chunk's first token")


class AtK(Model):
    """What smaller k would keep."""

    k: int = Field(description="entries a token")
    teacher_mass: float | None = Field(description="mean mass in the teacher's k likeliest entries")
    student_mass: float | None = Field(description="mean mass in the student's")
    overlap: float | None = Field(description="mean of |I| / k")
    bytes_per_token: float = Field(description="estimated size of the entries and their tail")


class Completions(Model):
    """Completions as texts."""

    num: int = Field(description="completions")
    num_tokens: int = Field(description="completion tokens, supervised or not")
    num_prompts: int = Field(description="different prompts")
    median_tokens: float = Field(description="median length, tokens")
    longest_tokens: int = Field(description="longest, tokens")
    truncated: int = Field(description="cut off at their longest")
    repetitive: int = Field(description="that repeat themselves, by any of the three signs")
    duplicates: int = Field(description="that are the same tokens as an earlier one of the prompt")


class Repetition(Model):
    """Tokens at which 16 tokens in a row end that stood in the same completion before."""

    num_tokens: int = Field(description="such tokens")
    advantage: float | None = Field(description="mean advantage of these, nats")
    rest_advantage: float | None = Field(description="mean advantage of the other tokens, nats")


class Reward(Model):
    """Mean advantage of a completion: reported, never a gate, since it does not tell success."""

    mean: float | None = Field(description="mean over completions, nats")
    deviation: float | None = Field(description="standard deviation over completions, nats")
    num_labelled: int = Field(0, description="completions that a verifier has judged")
    num_correct: int = Field(0, description="of these, correct ones")
    auroc: float | None = Field(
        None,
        description="chance that a correct completion has a larger reward than another; None "
        "without both kinds",
    )


class SpecialToken(Model):
    """A token that ends or structures a completion, where the student sampled it."""

    id: int = Field(description="token id")
    token: str | None = Field(description="its text; None when no tokenizer is at hand")
    num: int = Field(description="places")
    teacher_logprob: float | None = Field(description="mean log q, nats")
    advantage: float | None = Field(description="mean log q - log p, nats")
    num_outliers: int = Field(description="places where log q - log p is below the limit")


class PartAudit(Model):
    """A round of a run, or the shard of a key."""

    name: str = Field(description="of the round or key")
    round: int | None = Field(description="index of the round; None for a key")
    students: tuple[str, ...] = Field(description="fingerprints of the policies that sampled")
    teachers: tuple[str, ...] = Field(description="fingerprints of the teachers")
    num_shards: int = Field(description="rollout shards")
    num_unreadable: int = Field(description="of these, those that are in no number below")
    num_own: int = Field(description="shards whose policy was scored itself, which gives H(p)")
    diagnostics: Diagnostics = Field(description="over all tokens")
    by_position: tuple[PositionDiagnostics, ...] = Field(description="by depth")
    by_k: tuple[AtK, ...] = Field(description="by entries kept")
    completions: Completions = Field(description="as texts")
    repetition: Repetition = Field(description="tokens that repeat")
    reward: Reward = Field(description="of whole completions")
    special: tuple[SpecialToken, ...] = Field(description="special tokens that were sampled")


class Finding(Model):
    """Something that the verdict names."""

    check: str = Field(description="name of the check")
    level: Literal["no-go", "warning"] = Field(description="what it means")
    where: str = Field(description="round, key or shard")
    value: float | None = Field(None, description="what was found")
    limit: float | None = Field(None, description="what the limits say")
    reason: str = Field(description="in words, with what to do")


class Audit(Model):
    """``opdcache audit --json``."""

    of: str = Field(description="run file, or keys")
    k: int = Field(description="entries that the overlap is taken of")
    chunk_tokens: int = Field(description="tokens of a position chunk")
    limits: AuditLimits = Field(description="of the verdict")
    parts: tuple[PartAudit, ...] = Field(description="rounds or keys, in order")
    total: Diagnostics = Field(description="over all of them")
    findings: tuple[Finding, ...] = Field(description="no-go ones first")
    not_judged: tuple[str, ...] = Field(
        description="limits that nothing is said of, and what they would need"
    )
    elapsed_s: float = Field(description="wall time of reading and computing")

    @property
    def is_go(self) -> bool:
        """Whether nothing speaks against spending more teacher tokens on this."""
        return all(finding.level != "no-go" for finding in self.findings)
