"""The loss registry: which combinations exist, which stored columns each needs, why others do not.

Torch-free, so that a run file is checked before anything starts. The formulas are carried out by
``opdcache.train.losses``; their source is arXiv 2604.13016 unless a cell says otherwise.

Symbols: p student, q teacher, S the support, P and Q their mass on S, p' and q' renormalised on S.
"""

from dataclasses import dataclass
from typing import Literal

from pydantic import Field

from .base import Model
from .columns import ScoreColumn

Support = Literal["sampled", "teacher_topk", "student_topk", "overlap"]
Direction = Literal["reverse", "forward"]
Normalisation = Literal["none", "tail", "renormalised", "reference"]


class LossConfig(Model):
    """A loss as orthogonal choices."""

    support: Support = Field(
        "teacher_topk",
        description="ids that the loss looks at: the sampled token, the teacher's stored top-k, "
        "the top-k that the student recorded at rollout, or the overlap of the teacher's top-k "
        "with the live student's",
    )
    direction: Direction = Field(
        "reverse", description="reverse: KL(student || teacher); forward: KL(teacher || student)"
    )
    normalisation: Normalisation = Field(
        "tail",
        description="tail: one bucket holds the rest of the vocabulary; renormalised: both sides "
        "are renormalised on the support; reference: policy gradient with full-vocabulary "
        "log-probs, weighted by the student renormalised on the support; none: the sampled token",
    )
    k: int = Field(16, ge=1, description="entries a token; not used by the sampled support")


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


_FORMS: dict[tuple[Direction, Normalisation], tuple[str, str]] = {
    ("reverse", "renormalised"): ("sum_S p' log(p'/q')", "Eq. 5"),
    ("reverse", "tail"): (
        "sum_S p log(p/q) + (1-P) log((1-P)/(1-Q))",
        "KL after merging the rest of the vocabulary into one bucket",
    ),
    ("forward", "tail"): (
        "sum_S q log(q/p) + (1-Q) log((1-Q)/(1-P))",
        "KL after merging the rest of the vocabulary into one bucket",
    ),
    ("reverse", "reference"): (
        "-sum_S sg[p' (log q - log p)] log p",
        "the paper's public code; it also trains the mass of the support",
    ),
}

_COLUMNS: dict[Support, tuple[frozenset[ScoreColumn], bool]] = {
    "teacher_topk": (frozenset({"topk"}), False),
    "student_topk": (frozenset({"student_topk"}), True),
    "overlap": (frozenset({"topk"}), False),
}

CELLS: dict[tuple[Support, Direction, Normalisation], LossCell] = {
    (support, direction, normalisation): LossCell(columns, recorded, formula, source)
    for support, (columns, recorded) in _COLUMNS.items()
    for (direction, normalisation), (formula, source) in _FORMS.items()
}
CELLS["sampled", "reverse", "none"] = LossCell(
    frozenset({"sampled"}), False, "-sg[log q(y) - log p(y)] log p(y)", "policy gradient, k1"
)


def refusal(loss: LossConfig) -> str | None:
    """Why this combination is refused, as a sentence; None when it is allowed."""
    if (loss.support == "sampled") != (loss.normalisation == "none"):
        return "support 'sampled' goes with normalisation 'none', and only with it"
    if loss.support == "sampled" and loss.direction == "forward":
        return "the sampled token comes from the student: it estimates reverse KL only"
    if loss.normalisation == "renormalised" and loss.k == 1:
        return "renormalised on one entry both sides are 1 and the loss is identically 0"
    if (loss.support, loss.direction, loss.normalisation) not in CELLS:
        return f"normalisation {loss.normalisation!r} is not defined for {loss.direction} KL"
    return None


def cell(loss: LossConfig) -> LossCell:
    """The registry's entry for an allowed loss."""
    return CELLS[loss.support, loss.direction, loss.normalisation]
