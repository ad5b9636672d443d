"""The loss registry: which combinations exist, which stored columns each needs, why others do not.

Torch-free, so that a run file is checked before anything starts. The formulas are carried out by
``opdcache.train.losses``; their source is arXiv 2604.13016 unless a cell says otherwise.

Symbols: p student, q teacher, S the support, P and Q their mass on S, p' and q' renormalised on S,
sg[] what no gradient goes through.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from .base import Model
from .columns import ScoreColumn

Support = Literal[
    "sampled",
    "teacher_topk",
    "student_topk",
    "overlap",
    "union",
    "symmetric_difference",
    "draws",
]
Direction = Literal["reverse", "forward", "jsd"]
Normalisation = Literal["none", "tail", "renormalised", "truncated", "reference"]
Weighting = Literal["student", "teacher", "uniform"]


class LossConfig(Model):
    """A loss as orthogonal choices."""

    support: Support = Field(
        "teacher_topk",
        description="ids that the loss looks at: the sampled token (forward: cross-entropy on "
        "completions that something better sampled); the teacher's stored top-k; "
        "the top-k that the student recorded at rollout; the overlap of the teacher's top-k with "
        "the live student's; the union of the teacher's and the recorded top-k, or the ids in one "
        "of them alone; or the teacher's draws",
    )
    direction: Direction = Field(
        "reverse",
        description="reverse: KL(student || teacher); forward: KL(teacher || student); jsd: the "
        "generalised Jensen-Shannon divergence",
    )
    normalisation: Normalisation = Field(
        "tail",
        description="tail: one bucket holds the rest of the vocabulary; renormalised: both sides "
        "are renormalised on the support; truncated: the sum over the support alone, for "
        "comparison: it can be lowered by draining the support; reference: policy gradient with "
        "full-vocabulary log-probs, weighted on the support; none: the sampled token, or draws",
    )
    k: int = Field(
        16, ge=1, description="entries a token of either top-k; not used by sampled and draws"
    )
    beta: float = Field(
        0.5,
        ge=0,
        le=1,
        description="of jsd: the teacher's share of the mixture; at 0 it is forward KL, at 1 "
        "reverse KL",
    )
    weighting: Weighting = Field(
        "student",
        description="of the reference form: the student or the teacher renormalised on the "
        "support, or every id alike",
    )
    stop_gradient: bool = Field(
        False,
        description="of truncated reverse KL: no gradient through the weights, so that the mass "
        "of the support is not trained",
    )
    forward_above: float | None = Field(
        None,
        ge=0,
        allow_inf_nan=False,
        description="of reverse KL: the forward KL is added at tokens whose teacher entropy, in "
        "nats, is above this",
    )
    clamp: float | None = Field(
        None,
        gt=0,
        allow_inf_nan=False,
        description="of policy gradients: log q - log p is clamped to plus or minus this, in nats",
    )
    importance_cap: float | None = Field(
        None,
        gt=0,
        allow_inf_nan=False,
        description="of the sampled support, and of the outcome: every token counts "
        "min(p live / p sampling, this)",
    )
    reference: str | None = Field(
        None,
        description="a model of 'references' that reference_kl and extrapolation compare with",
    )
    reference_kl: float = Field(
        0.0,
        ge=0,
        allow_inf_nan=False,
        description="weight of the reverse KL to the reference, estimated on the sampled token, "
        "that is added to any loss",
    )
    extrapolation: float | None = Field(
        None,
        gt=0,
        allow_inf_nan=False,
        description="of policy gradients: what separates the teacher from the reference counts "
        "this many times; at 1 the reference cancels",
    )
    outcome: str | None = Field(
        None,
        pattern=r"^[A-Za-z_][\w.]*:[A-Za-z_]\w*$",
        description="module:function that gives the reward of a completion's text and the prompt's "
        "reference answer",
    )
    outcome_weight: float = Field(
        0.0,
        ge=0,
        allow_inf_nan=False,
        description="weight of the policy gradient of that reward, less its mean over the prompt's "
        "completions, that is added to any loss",
    )
    sft_weight: float = Field(
        0.0,
        ge=0,
        allow_inf_nan=False,
        description="weight of the mean cross-entropy on the reference answers of an update's "
        "prompts, EOS at their end, that is added to any loss",
    )


class TokensConfig(Model):
    """Which supervised tokens count in the loss, and how much; a loss mask comes first."""

    max_supervised: tuple[Annotated[int, Field(ge=1)], ...] = Field(
        (),
        description="tokens of a completion, from its first, that are supervised: a number a "
        "round, the last of which stands for later rounds; empty: all",
    )
    milestones: tuple[Annotated[int, Field(ge=1)], ...] = Field(
        (),
        description="updates of the run after which the next number of max_supervised takes over, "
        "in place of rounds",
    )
    half_life: float | None = Field(
        None,
        gt=0,
        allow_inf_nan=False,
        description="tokens after which a token's weight is halved; none: all count 1",
    )
    skip_special: bool = Field(
        False, description="the tokenizer's special tokens, EOS among them, are not supervised"
    )
    fraction: float = Field(
        1.0,
        gt=0,
        le=1,
        description="share of a completion's supervised tokens that count, those with the largest "
        "value of 'by'; one at least",
    )
    by: Literal["divergence", "entropy"] = Field(
        "divergence",
        description="divergence: the loss of the live student, where it is a divergence; entropy: "
        "the teacher's, which must be stored",
    )
    mean: Literal["tokens", "sequences"] = Field(
        "tokens",
        description="tokens: the mean over all tokens of an update; sequences: over each "
        "completion's tokens, then over completions",
    )

    @model_validator(mode="after")
    def _a_milestone_between_two(self) -> Self:
        if self.milestones and len(self.milestones) != len(self.max_supervised) - 1:
            raise ValueError("milestones: one fewer than the numbers of max_supervised is wanted")
        if any(a >= b for a, b in pairwise(self.milestones)):
            raise ValueError("milestones: each comes after the one before")
        return self


@dataclass(frozen=True, slots=True)
class LossCell:
    """One allowed combination.

    Attributes:
        columns: score columns that must be stored.
        needs_recorded_topk: whether rollouts must carry the student's top-k.
        formula: loss of one token.
        source: where it is from.
    """

    columns: frozenset[ScoreColumn]
    needs_recorded_topk: bool
    formula: str
    source: str


_COLUMNS: dict[Support, tuple[frozenset[ScoreColumn], bool]] = {
    "sampled": (frozenset({"sampled"}), False),
    "teacher_topk": (frozenset({"topk"}), False),
    "student_topk": (frozenset({"student_topk"}), True),
    "overlap": (frozenset({"topk"}), False),
    "union": (frozenset({"topk", "student_topk"}), True),
    "symmetric_difference": (frozenset({"topk", "student_topk"}), True),
    "draws": (frozenset({"draws"}), False),
}

_TOPK: tuple[Support, ...] = ("teacher_topk", "student_topk", "overlap", "union")
_BUCKET = "divergence after merging the rest of the vocabulary into one bucket"
_COMPARISON = "the sum over the support alone, for comparison"
_GKD = "generalised JSD of arXiv 2306.13649, m = beta q + (1 - beta) p"

_FORMS: dict[tuple[Direction, Normalisation], tuple[tuple[Support, ...], str, str]] = {
    ("reverse", "tail"): (_TOPK, "sum_S p log(p/q) + (1-P) log((1-P)/(1-Q))", _BUCKET),
    ("forward", "tail"): (_TOPK, "sum_S q log(q/p) + (1-Q) log((1-Q)/(1-P))", _BUCKET),
    ("jsd", "tail"): (_TOPK, "beta KL(q || m) + (1-beta) KL(p || m) on S and the rest", _GKD),
    ("reverse", "renormalised"): (_TOPK, "sum_S p' log(p'/q')", "Eq. 5"),
    ("forward", "renormalised"): (_TOPK, "sum_S q' log(q'/p')", "Eq. 5, the other way round"),
    ("jsd", "renormalised"): (_TOPK, "beta KL(q' || m') + (1-beta) KL(p' || m')", _GKD),
    ("reverse", "truncated"): (_TOPK, "sum_S p log(p/q)", _COMPARISON),
    ("forward", "truncated"): (_TOPK, "sum_S q log(q/p)", _COMPARISON),
    ("reverse", "reference"): (
        (*_TOPK, "symmetric_difference"),
        "-sum_S sg[w (log q - log p)] log p, w = p', q' or 1/|S|",
        "the paper's public code; it also trains the mass of the support",
    ),
    ("reverse", "none"): (("sampled",), "-sg[log q(y) - log p(y)] log p(y)", "policy gradient, k1"),
    ("forward", "none"): (
        ("draws",),
        "-sum_v n_v/N log p(v), n_v of N draws",
        "random sampling KD, arXiv 2503.16870: unbiased, as is its gradient",
    ),
}

CELLS: dict[tuple[Support, Direction, Normalisation], LossCell] = {
    (support, direction, normalisation): LossCell(*_COLUMNS[support], formula, source)
    for (direction, normalisation), (supports, formula, source) in _FORMS.items()
    for support in supports
} | {
    ("sampled", "forward", "none"): LossCell(
        frozenset(),
        needs_recorded_topk=False,
        formula="-log p(y)",
        source="supervised fine-tuning: of completions that the teacher sampled, one draw of "
        "forward KL",
    )
}


def _extrapolates(loss: LossConfig) -> bool:
    """Whether a reference's log-probs of the loss's ids can be stored."""
    return _is_sampled_gradient(loss) or (
        loss.support == "student_topk" and loss.normalisation == "reference"
    )


def _is_sampled_gradient(loss: LossConfig) -> bool:
    """Whether the loss is the policy gradient of the sampled token."""
    return loss.support == "sampled" and not imitates(loss)


_OPTIONS: dict[str, tuple[Callable[[LossConfig], bool], str]] = {
    "extrapolation": (
        _extrapolates,
        "policy gradients whose ids the reference scored: support 'sampled', or 'student_topk' "
        "with normalisation 'reference'",
    ),
    "reference_kl": (lambda loss: loss.reference is not None, "a loss with a 'reference'"),
    "reference": (
        lambda loss: bool(loss.reference_kl or loss.extrapolation),
        "reference_kl or extrapolation: nothing else looks at it",
    ),
    "beta": (lambda loss: loss.direction == "jsd", "direction 'jsd'"),
    "weighting": (lambda loss: loss.normalisation == "reference", "normalisation 'reference'"),
    "stop_gradient": (
        lambda loss: (loss.direction, loss.normalisation) == ("reverse", "truncated"),
        "truncated reverse KL: every other loss has the same gradient with and without it, or is "
        "a policy gradient already",
    ),
    "forward_above": (
        lambda loss: loss.direction == "reverse" and loss.normalisation in ("tail", "renormalised"),
        "reverse KL with normalisation 'tail' or 'renormalised'",
    ),
    "clamp": (
        lambda loss: loss.normalisation == "reference" or _is_sampled_gradient(loss),
        "policy gradients: support 'sampled', or normalisation 'reference'",
    ),
    "importance_cap": (
        lambda loss: weighs_samples(loss),
        "reverse KL on support 'sampled', or an 'outcome': no other loss is an estimate from what "
        "the old policy drew",
    ),
    "outcome_weight": (lambda loss: loss.outcome is not None, "a loss with an 'outcome'"),
    "outcome": (lambda loss: bool(loss.outcome_weight), "outcome_weight: it has none"),
}
"""What an option belongs to, and how that is said; elsewhere only its default is accepted."""


def refusal(loss: LossConfig) -> str | None:
    """Why this combination is refused, as a sentence; None when it is allowed."""
    if (loss.support in ("sampled", "draws")) != (loss.normalisation == "none"):
        return "supports 'sampled' and 'draws' go with normalisation 'none', and only with it"
    if loss.support == "draws" and loss.direction != "forward":
        return "draws come from the teacher: they estimate forward KL only"
    if loss.support == "symmetric_difference" and loss.normalisation != "reference":
        return "ids that one side alone finds likely are no support of a divergence: take 'union'"
    if loss.normalisation == "renormalised" and loss.k == 1 and loss.support != "union":
        return "renormalised on one entry both sides are 1 and the loss is identically 0"
    if (loss.support, loss.direction, loss.normalisation) not in CELLS:
        return f"normalisation {loss.normalisation!r} is not defined for direction {loss.direction}"
    for name, (belongs, where) in _OPTIONS.items():
        default = LossConfig.model_fields[name].default
        if getattr(loss, name) != default and not belongs(loss):
            return f"{name} belongs to {where}"
    if loss.extrapolation is not None and loss.reference is None:
        return "extrapolation needs a 'reference' to extrapolate from"
    return None


def is_divergence(loss: LossConfig) -> bool:
    """Whether the loss of a token says how far the two sides are: a policy gradient's value, or a
    cross-entropy, does not."""
    surrogate = loss.normalisation in ("none", "reference") or loss.stop_gradient
    return not surrogate and not loss.reference_kl and not loss.outcome_weight


def tolerates_older(loss: LossConfig) -> bool:
    """Whether rollouts of an older policy can serve the loss: what is stored must be valid for any
    student, or a weight must say how far this one is from the policy that sampled."""
    if loss.reference_kl:
        return False
    weighed = not weighs_samples(loss) or loss.importance_cap is not None
    return weighed and not cell(loss).needs_recorded_topk


def is_local(loss: LossConfig) -> bool:
    """Whether the loss needs the student's logits on the support alone: what they are normalised
    by cancels, and which ids are in the support is stored."""
    stored = loss.normalisation == "renormalised" and loss.support != "overlap"
    return stored and not loss.reference_kl and not loss.outcome_weight


def weighs_samples(loss: LossConfig) -> bool:
    """Whether the loss is a policy gradient of the tokens that were sampled, which is that of the
    policy that sampled them."""
    return _is_sampled_gradient(loss) or bool(loss.outcome_weight)


def imitates(loss: LossConfig) -> bool:
    """Whether the loss is cross-entropy on the completions, which whoever is to be imitated
    sampled: on the student's own its gradient has no direction."""
    return loss.support == "sampled" and loss.direction == "forward"


def reference_columns(loss: LossConfig) -> frozenset[ScoreColumn]:
    """Columns that must be stored of the loss's reference."""
    needed: set[ScoreColumn] = set()
    if loss.reference_kl or (loss.extrapolation and loss.support == "sampled"):
        needed.add("sampled")
    if loss.extrapolation and loss.support == "student_topk":
        needed.add("student_topk")
    return frozenset(needed)


def cell(loss: LossConfig) -> LossCell:
    """The registry's entry for an allowed loss, with the columns that its options need too."""
    entry = CELLS[loss.support, loss.direction, loss.normalisation]
    if loss.forward_above is None:
        return entry
    return replace(entry, columns=entry.columns | {"entropy"})
