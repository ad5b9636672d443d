"""The losses as pure functions of student and teacher log-probs on a support, a value a token.

Each is one cell of the registry (``opdcache.schemas.losses``), which states its formula and source.
Entries outside the support are masked, never filled with ``-inf``: ``0 * inf`` would make the
gradient NaN. Natural logs.

Legend: T tokens, K entries of the support.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from ..schemas.losses import LossConfig

LEAST_TAIL = -80.0
"""Floor of a tail's log-mass: ``-inf`` on both sides then gives 0, and no NaN."""

_OUTSIDE = -1e30


@dataclass(frozen=True, slots=True)
class OnSupport:
    """Both sides of a loss.

    Attributes:
        student_TK: log-probs over the full vocabulary, differentiable.
        teacher_TK: the teacher's log-probs of the same ids.
        valid_TK: bool, entries that are in the support.
        student_tail_T, teacher_tail_T: log of either's mass outside the valid entries; read by the
            tail forms alone.
    """

    student_TK: Tensor
    teacher_TK: Tensor
    valid_TK: Tensor
    student_tail_T: Tensor
    teacher_tail_T: Tensor


def token_losses(loss: LossConfig, on: OnSupport) -> Tensor:
    """The configured loss of every token, [T], nats.

    A token whose support is empty contributes 0 to the renormalised and reference forms.
    """
    match loss.direction, loss.normalisation:
        case "reverse", "none":
            return sampled_policy_gradient(on)
        case "reverse", "renormalised":
            return renormalised_reverse_kl(on)
        case "reverse", "reference":
            return reference_policy_gradient(on)
        case "reverse", "tail":
            return tail_reverse_kl(on)
        case "forward", "tail":
            return tail_forward_kl(on)
    raise AssertionError(f"the registry lets no other combination through: {loss}")


def sampled_policy_gradient(on: OnSupport) -> Tensor:
    """``-sg[log q(y) - log p(y)] log p(y)``; the support is the sampled token alone."""
    student_T, teacher_T = on.student_TK[:, 0], on.teacher_TK[:, 0]
    return -(teacher_T - student_T).detach() * student_T


def renormalised_reverse_kl(on: OnSupport) -> Tensor:
    """``KL(p' || q')`` of both sides renormalised on the support (arXiv 2604.13016, Eq. 5)."""
    log_p = _renormalised(on.student_TK, on.valid_TK)
    log_q = _renormalised(on.teacher_TK, on.valid_TK)
    return _masked(log_p.exp() * (log_p - log_q), on.valid_TK).sum(dim=1)


def reference_policy_gradient(on: OnSupport) -> Tensor:
    """``-sum sg[p' (log q - log p)] log p``: the form of the paper's public code.

    Its gradient is that of Eq. 5 plus ``[KL(p' || q') + log(P / Q)] grad log P``: it also trains
    the student's mass on the support.
    """
    weight_TK = _renormalised(on.student_TK, on.valid_TK).exp()
    advantage_TK = (weight_TK * (on.teacher_TK - on.student_TK)).detach()
    return -_masked(advantage_TK * on.student_TK, on.valid_TK).sum(dim=1)


def tail_reverse_kl(on: OnSupport) -> Tensor:
    """KL(p || q) after merging everything outside the support into one bucket."""
    inside = _masked(on.student_TK.exp() * (on.student_TK - on.teacher_TK), on.valid_TK).sum(dim=1)
    tail_p, tail_q = _floored(on.student_tail_T), _floored(on.teacher_tail_T)
    return inside + tail_p.exp() * (tail_p - tail_q)


def tail_forward_kl(on: OnSupport) -> Tensor:
    """KL(q || p) after merging everything outside the support into one bucket."""
    inside = _masked(on.teacher_TK.exp() * (on.teacher_TK - on.student_TK), on.valid_TK).sum(dim=1)
    tail_p, tail_q = _floored(on.student_tail_T), _floored(on.teacher_tail_T)
    return inside + tail_q.exp() * (tail_q - tail_p)


def _masked(values_TK: Tensor, valid_TK: Tensor) -> Tensor:
    return values_TK.masked_fill(~valid_TK, 0.0)


def _renormalised(logprobs_TK: Tensor, valid_TK: Tensor) -> Tensor:
    """Log-probs renormalised on the support; entries outside it are far below any other."""
    return torch.log_softmax(logprobs_TK.masked_fill(~valid_TK, _OUTSIDE), dim=1)


def _floored(tail_T: Tensor) -> Tensor:
    return tail_T.clamp(min=LEAST_TAIL)
