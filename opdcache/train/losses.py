"""The losses as pure functions of student and teacher log-probs on a support, a value a token.

Each is one cell of the registry (``opdcache.schemas.losses``), which states its formula and source.
Entries outside the support are masked, never filled with ``-inf``: ``0 * inf`` would make the
gradient NaN. Natural logs.

Legend: T tokens, K entries of the support.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ..schemas.losses import LossConfig, Weighting, imitates

LEAST_TAIL = -80.0
"""Floor of a tail's log-mass: ``-inf`` on both sides then gives 0, and no NaN."""

_OUTSIDE = -1e30


@dataclass(frozen=True, slots=True)
class OnSupport:
    """Both sides of a loss.

    Attributes:
        student_TK: log-probs over the full vocabulary, differentiable.
        teacher_TK: the teacher's log-probs of the same ids; of drawn ids, the logs of their shares
            of the draws.
        valid_TK: bool, entries that are in the support.
        student_tail_T, teacher_tail_T: log of either's mass outside the valid entries; read by the
            tail forms alone.
        sampling_T: log-prob of the sampled token under the distribution sampled from; None where
            it is not known.
        teacher_entropy_T: nats; None where it is not stored.
        reference_TK: a reference's log-probs of the same ids; None unless the loss extrapolates.
        student_sampled_T, reference_sampled_T: log-probs of the sampled token; None unless the
            loss looks at them.
        advantage_T: the outcome's, of the completion; None unless the loss has one.
    """

    student_TK: Tensor
    teacher_TK: Tensor
    valid_TK: Tensor
    student_tail_T: Tensor
    teacher_tail_T: Tensor
    sampling_T: Tensor | None = None
    teacher_entropy_T: Tensor | None = None
    reference_TK: Tensor | None = None
    student_sampled_T: Tensor | None = None
    reference_sampled_T: Tensor | None = None
    advantage_T: Tensor | None = None


@dataclass(frozen=True, slots=True)
class Entries:
    """Both sides of a divergence, as log-masses of the same entries, [T, K]; those that are not
    valid are left out."""

    log_p: Tensor
    log_q: Tensor
    valid: Tensor


def token_losses(loss: LossConfig, on: OnSupport) -> Tensor:
    """The configured loss of every token, [T], nats.

    A token whose support is empty contributes 0 to all forms but the tail's.
    """
    losses_T, student_T = _teachers_losses(loss, on), on.student_sampled_T
    if loss.reference_kl:
        assert student_T is not None
        assert on.reference_sampled_T is not None
        away_T = (on.reference_sampled_T - student_T).detach()
        losses_T = losses_T - loss.reference_kl * away_T * student_T
    if loss.outcome_weight:
        assert student_T is not None
        assert on.advantage_T is not None
        weight_T = _share(student_T, on.sampling_T, loss.importance_cap) * on.advantage_T
        losses_T = losses_T - loss.outcome_weight * weight_T * student_T
    return losses_T


def _teachers_losses(loss: LossConfig, on: OnSupport) -> Tensor:
    match loss.normalisation:
        case "none" if imitates(loss):
            return -on.student_TK[:, 0]
        case "none" if loss.support == "sampled":
            cap, factor = loss.importance_cap, loss.extrapolation
            return sampled_policy_gradient(on, loss.clamp, cap, factor)
        case "none":
            return draws_cross_entropy(on)
        case "reference":
            return reference_policy_gradient(on, loss.weighting, loss.clamp, loss.extrapolation)
        case "tail":
            entries = with_tail(on)
        case "renormalised":
            entries = renormalised(on)
        case "truncated":
            entries = Entries(on.student_TK, on.teacher_TK, on.valid_TK)
    match loss.direction:
        case "forward":
            return forward_kl(entries)
        case "jsd":
            return jsd(entries, loss.beta)
        case "reverse" if loss.stop_gradient:
            return stopped_reverse_kl(entries)
    losses_T = reverse_kl(entries)
    if loss.forward_above is None:
        return losses_T
    assert on.teacher_entropy_T is not None
    return losses_T + forward_kl(entries) * (on.teacher_entropy_T > loss.forward_above)


def sampled_policy_gradient(
    on: OnSupport,
    clamp: float | None = None,
    importance_cap: float | None = None,
    extrapolation: float | None = None,
) -> Tensor:
    """``-sg[log q(y) - log p(y)] log p(y)``; the support is the sampled token alone.

    Args:
        clamp: bound of the advantage, nats.
        importance_cap: a token counts ``min(p / p_sampling, importance_cap)``; once by default.
        extrapolation: how far from the reference, in teachers, the student is drawn.
    """
    student_T = on.student_TK[:, 0]
    weight_T = _clamped(_goal(on, extrapolation)[:, 0] - student_T, clamp).detach()
    return -_share(student_T, on.sampling_T, importance_cap) * weight_T * student_T


def _share(student_T: Tensor, sampling_T: Tensor | None, cap: float | None) -> Tensor:
    """``sg[min(p / p_sampling, cap)]``; 1 without a cap."""
    if cap is None:
        return torch.ones_like(student_T)
    assert sampling_T is not None
    return (student_T.detach() - sampling_T).exp().clamp(max=cap)


def draws_cross_entropy(on: OnSupport) -> Tensor:
    """``-sum_v n_v/N log p(v)`` over the teacher's N draws."""
    return -_summed(on.teacher_TK.exp() * on.student_TK, on.valid_TK)


def reference_policy_gradient(
    on: OnSupport,
    weighting: Weighting = "student",
    clamp: float | None = None,
    extrapolation: float | None = None,
) -> Tensor:
    """``-sum sg[w (log q - log p)] log p``: the form of the paper's public code.

    With the student's weights its gradient is that of Eq. 5 plus
    ``[KL(p' || q') + log(P / Q)] grad log P``: it also trains the student's mass on the support.

    Args:
        weighting: whose probabilities, renormalised on the support, are w.
        clamp: bound of ``log q - log p``, nats.
        extrapolation: how far from the reference, in teachers, the student is drawn.
    """
    match weighting:
        case "student":
            weight_TK = _renormalised(on.student_TK, on.valid_TK).exp()
        case "teacher":
            weight_TK = _renormalised(on.teacher_TK, on.valid_TK).exp()
        case "uniform":
            weight_TK = 1 / on.valid_TK.sum(dim=1, keepdim=True).clamp(min=1)
    goal_TK = _goal(on, extrapolation)
    advantage_TK = (weight_TK * _clamped(goal_TK - on.student_TK, clamp)).detach()
    return -_summed(advantage_TK * on.student_TK, on.valid_TK)


def _goal(on: OnSupport, extrapolation: float | None) -> Tensor:
    """What a policy gradient draws ``log p`` to: ``log q``, or as far from the reference r as says
    ``extrapolation (log q - log r) + log r`` (G-OPD's reward)."""
    if extrapolation is None:
        return on.teacher_TK
    assert on.reference_TK is not None
    return torch.lerp(on.reference_TK, on.teacher_TK, extrapolation)


def with_tail(on: OnSupport) -> Entries:
    """The support's entries, and one bucket that holds everything else."""
    tails = (on.student_tail_T, on.teacher_tail_T)
    tail_p, tail_q = (tail_T.clamp(min=LEAST_TAIL)[:, None] for tail_T in tails)
    return Entries(
        torch.cat([on.student_TK, tail_p], dim=1),
        torch.cat([on.teacher_TK, tail_q], dim=1),
        torch.cat([on.valid_TK, torch.ones_like(tail_p, dtype=torch.bool)], dim=1),
    )


def renormalised(on: OnSupport) -> Entries:
    """Both sides renormalised on the support."""
    log_p, log_q = (_renormalised(side, on.valid_TK) for side in (on.student_TK, on.teacher_TK))
    return Entries(log_p, log_q, on.valid_TK)


def reverse_kl(on: Entries) -> Tensor:
    """``sum p log(p/q)``, [T]."""
    return _summed(on.log_p.exp() * (on.log_p - on.log_q), on.valid)


def stopped_reverse_kl(on: Entries) -> Tensor:
    """``sum sg[p log(p/q)] log p``, [T]: where p sums to 1, the gradient of ``reverse_kl``; where
    it does not, that less the gradient of its sum."""
    return _summed((on.log_p.exp() * (on.log_p - on.log_q)).detach() * on.log_p, on.valid)


def forward_kl(on: Entries) -> Tensor:
    """``sum q log(q/p)``, [T]."""
    return _summed(on.log_q.exp() * (on.log_q - on.log_p), on.valid)


def jsd(on: Entries, beta: float) -> Tensor:
    """``beta KL(q || m) + (1 - beta) KL(p || m)``, ``m = beta q + (1 - beta) p``, [T].

    At its ends, where that is 0, it is the KL that it tends to when divided by the distance to the
    end: forward at 0, reverse at 1 (arXiv 2306.13649).
    """
    if beta in (0, 1):
        return reverse_kl(on) if beta == 1 else forward_kl(on)
    log_m = torch.logaddexp(on.log_q + math.log(beta), on.log_p + math.log1p(-beta))
    mixed = Entries(log_m, on.log_q, on.valid), Entries(on.log_p, log_m, on.valid)
    return beta * forward_kl(mixed[0]) + (1 - beta) * reverse_kl(mixed[1])


def _summed(values_TK: Tensor, valid_TK: Tensor) -> Tensor:
    return values_TK.masked_fill(~valid_TK, 0.0).sum(dim=1)


def _renormalised(logprobs_TK: Tensor, valid_TK: Tensor) -> Tensor:
    """Log-probs renormalised on the support; entries outside it are far below any other."""
    return torch.log_softmax(logprobs_TK.masked_fill(~valid_TK, _OUTSIDE), dim=1)


def _clamped(advantage: Tensor, bound: float | None) -> Tensor:
    return advantage if bound is None else advantage.clamp(min=-bound, max=bound)
