"""LM-head operations that never hold [T, V]: what scoring, learning and evaluation share.

Logits are made for a chunk of tokens at a time, in float32 whatever the weights' dtype, and used up
before the next chunk. Log-probs are natural, at temperature 1, over the full vocabulary.

Legend: T tokens, V vocabulary (rows of the head, padding included), D width, K support, S recorded.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .errors import ModelError

CHUNK_TOKENS = 512
_CACHED_ENTRIES = 2**20
"""Logits of a block on a CPU: 4 MiB of them, and as much again of their exponentials."""
_GROUP = 32
"""Entries of a group, when the likeliest are looked for and draws are placed."""
_TINY = 1e-30
"""Sums of exponentials below this have lost bits: float32 ends at 1e-38."""

Side = tuple[Tensor, Tensor]
"""A model's distributions: hidden states [T, D], and the weight of its head [V, D]."""


@dataclass(frozen=True, slots=True)
class StudentView:
    """What a loss sees of the student's distributions.

    Attributes:
        logprobs_TK: float32 [T, K], of the ids asked for; differentiable.
        tail_T: float32 [T], log of the mass outside the ids marked as within; differentiable, and
            summed over what it covers, so that it holds where it is small. Zeros unless asked for.
        entropy_T: float32 [T], nats; no gradient.
        threshold_T: float32 [T], log-prob of the k-th likeliest id: an id is in the student's top-k
            when its log-prob reaches this; no gradient.
    """

    logprobs_TK: Tensor
    tail_T: Tensor
    entropy_T: Tensor
    threshold_T: Tensor


@dataclass(frozen=True, slots=True)
class TeacherStats:
    """What a scorer takes from a teacher's distributions.

    Attributes:
        sampled_T: float32 [T], log-prob of the sampled token.
        entropy_T: float32 [T], nats.
        topk_ids_TK: int64 [T, K], likeliest first.
        topk_TK: float32 [T, K], their log-probs.
        num_kept_T: int64 [T], entries kept under the mass threshold.
        tail_T: float32 [T], log of the mass outside the kept entries, summed over those.
        gathered_TS: float32 [T, S], log-probs of the ids asked for.
        gathered_tail_T: float32 [T], log of the mass outside those, summed over it.
        drawn_TN: int64 [T, N], ids drawn from the distribution, with replacement.
    """

    sampled_T: Tensor
    entropy_T: Tensor
    topk_ids_TK: Tensor
    topk_TK: Tensor
    num_kept_T: Tensor
    tail_T: Tensor
    gathered_TS: Tensor
    gathered_tail_T: Tensor
    drawn_TN: Tensor


@dataclass(frozen=True, slots=True)
class Divergence:
    """Exact full-vocabulary comparison of a student p and a teacher q, a value a token.

    Attributes:
        reverse_kl_T: KL(p || q), nats.
        student_entropy_T: H(p), nats.
        teacher_entropy_T: H(q), nats.
        overlap_T: share of the k likeliest ids of p that are among those of q.
    """

    reverse_kl_T: Tensor
    student_entropy_T: Tensor
    teacher_entropy_T: Tensor
    overlap_T: Tensor


def support_logprobs(
    hidden_TD: Tensor, weight_VD: Tensor, ids_TK: Tensor, *, chunk_tokens: int = CHUNK_TOKENS
) -> Tensor:
    """Log-probs of the ids in each token's support, differentiable, without holding [T, V].

    Since ``log p(v) = z_v - logsumexp(z)``, the gradient of any loss on these values is
    ``scatter(g) - softmax(z) * sum(g)`` on the logits, which the backward pass makes again.

    Args:
        hidden_TD: hidden states that predict the tokens.
        weight_VD: LM head.
        ids_TK: int64, ids to gather; the same id may stand more than once.
        chunk_tokens: tokens whose logits are held at a time.

    Returns:
        float32 [T, K], nats.
    """
    return support_view(hidden_TD, weight_VD, ids_TK, chunk_tokens=chunk_tokens).logprobs_TK


def support_view(
    hidden_TD: Tensor,
    weight_VD: Tensor,
    ids_TK: Tensor,
    *,
    within_TK: Tensor | None = None,
    topk: int = 1,
    chunk_tokens: int = CHUNK_TOKENS,
) -> StudentView:
    """``support_logprobs``, with more of the same distributions from the same pass.

    Args:
        within_TK: bool, the ids whose outside mass is ``StudentView.tail_T``.
        topk: the k of ``StudentView.threshold_T``.
    """
    topk = min(topk, weight_VD.shape[0])
    return StudentView(
        *_SupportView.apply(hidden_TD, weight_VD, ids_TK, within_TK, topk, chunk_tokens)  # type: ignore[no-untyped-call]
    )


class _SupportView(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden_TD: Tensor,
        weight_VD: Tensor,
        ids_TK: Tensor,
        within_TK: Tensor | None,
        topk: int,
        chunk_tokens: int,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        num_tokens = hidden_TD.shape[0]
        logprobs_TK = hidden_TD.new_empty(ids_TK.shape, dtype=torch.float32)
        lse_T, tail_T, entropy_T, threshold_T = hidden_TD.new_zeros(
            (4, num_tokens), dtype=torch.float32
        )
        weight = _matmul_ready(weight_VD)
        for part in _chunks(num_tokens, chunk_tokens):
            logits_CV = _matmul(hidden_TD[part], weight.t())
            for block, at in _blocks(logits_CV, part):
                dense, ids_BK = _Dense.of(logits_CV[block]), ids_TK[at]
                logprobs_TK[at] = dense.logprobs(dense.shifted_BV.gather(1, ids_BK))
                threshold_T[at] = dense.logprobs(_topk(dense.shifted_BV, topk)[0])[:, -1]
                entropy_T[at] = dense.entropy()
                lse_T[at] = dense.most_B + dense.total_B.log()
                if within_TK is not None:
                    tail_T[at] = dense.tail(ids_BK, within_TK[at])
        ctx.save_for_backward(hidden_TD, weight_VD, ids_TK, within_TK, lse_T, tail_T)
        ctx.chunk_tokens = chunk_tokens
        ctx.mark_non_differentiable(entropy_T, threshold_T)
        return logprobs_TK, tail_T, entropy_T, threshold_T

    @staticmethod
    def backward(
        ctx: Any, grad_TK: Tensor, grad_tail_T: Tensor, *_: Tensor
    ) -> tuple[Tensor | None, ...]:
        hidden_TD, weight_VD, ids_TK, within_TK, lse_T, tail_T = ctx.saved_tensors
        needs_hidden, needs_weight = ctx.needs_input_grad[:2]
        weight = _matmul_ready(weight_VD)
        grad_hidden_TD = torch.empty_like(hidden_TD) if needs_hidden else None
        grad_weight_VD = torch.zeros_like(weight_VD, dtype=torch.float32) if needs_weight else None
        total_T = grad_TK.sum(dim=1)
        if within_TK is not None:
            total_T = total_T + grad_tail_T
        for part in _chunks(hidden_TD.shape[0], ctx.chunk_tokens):
            grad_CV = _matmul(hidden_TD[part], weight.t())
            for block, at in _blocks(grad_CV, part):
                logits_BV, ids_BK = grad_CV[block], ids_TK[at]
                if within_TK is None:
                    _probs(logits_BV, lse_T[at]).mul_(-total_T[at, None])
                else:
                    tail = ids_BK, within_TK[at], tail_T[at], grad_tail_T[at]
                    _probs_and_outside(logits_BV, lse_T[at], -total_T[at], *tail)
                logits_BV.scatter_add_(1, ids_BK, grad_TK[at])
            if grad_hidden_TD is not None:
                grad_hidden_TD[part] = _matmul(grad_CV, weight).to(hidden_TD.dtype)
            if grad_weight_VD is not None:
                grad_weight_VD += _matmul(grad_CV.t(), hidden_TD[part])
        if grad_weight_VD is not None:
            grad_weight_VD = grad_weight_VD.to(weight_VD.dtype)
        return grad_hidden_TD, grad_weight_VD, None, None, None, None


@torch.no_grad()
def teacher_statistics(
    hidden_TD: Tensor,
    weight_VD: Tensor,
    sampled_T: Tensor,
    gather_TS: Tensor,
    *,
    k: int,
    mass: float,
    num_ids: int | None = None,
    uniforms_TN: Tensor | None = None,
    chunk_tokens: int = CHUNK_TOKENS,
) -> TeacherStats:
    """Everything that is stored of a teacher's distributions, in one pass over the head.

    The tail is summed over what is outside the kept entries; ``1 - sum(kept)`` would lose it to
    rounding where it is small.

    Args:
        sampled_T: int64 [T], the tokens that were sampled.
        gather_TS: int64 [T, S], more ids to look up; S may be 0. One that the head has no row for
            has log-prob ``-inf``.
        k: kept entries at most; fewer when the vocabulary is smaller.
        num_ids: entries are kept among the ids below this alone, such as those that a student with
            a smaller padded vocabulary has; the others' mass is tail. All by default.
        uniforms_TN: float64 in [0, 1); each becomes one draw from the distribution over these ids.
        mass: entries are kept until they hold this mass; 1 keeps k.
    """
    weight = _matmul_ready(weight_VD)
    num_ids = min(num_ids or weight_VD.shape[0], weight_VD.shape[0])
    k = min(k, num_ids)
    rows = []
    for part in _chunks(hidden_TD.shape[0], chunk_tokens):
        logits_CV = _matmul(hidden_TD[part], weight.t())
        for block, at in _blocks(logits_CV, part):
            dense = _Dense.of(logits_CV[block])
            sampled_B, gather_BS = sampled_T[at], gather_TS[at]
            uniforms_BN = None if uniforms_TN is None else uniforms_TN[at]
            rows.append(_statistics(dense, sampled_B, gather_BS, uniforms_BN, k, mass, num_ids))
    return TeacherStats(*(torch.cat(column) for column in zip(*rows, strict=True)))


@dataclass(frozen=True, slots=True)
class _Dense:
    """Whole distributions of some tokens, relative to each one's likeliest entry.

    Attributes:
        most_B: the likeliest entry's logit.
        shifted_BV: logits less that; at most 0.
        weights_BV: their exponentials, in (0, 1].
        total_B: the sum of those; at least 1.
    """

    most_B: Tensor
    shifted_BV: Tensor
    weights_BV: Tensor
    total_B: Tensor

    @classmethod
    def of(cls, logits_BV: Tensor) -> "_Dense":
        """Takes the logits' place in memory."""
        most_B = logits_BV.amax(dim=1)
        shifted_BV = logits_BV.sub_(most_B[:, None])
        weights_BV = shifted_BV.exp()
        return cls(most_B, shifted_BV, weights_BV, weights_BV.sum(dim=1))

    def logprobs(self, shifted_BK: Tensor) -> Tensor:
        """Log-probs of some entries' shifted logits."""
        return shifted_BK - self.total_B.log()[:, None]

    def entropy(self) -> Tensor:
        """Nats. Both terms are at least 0, so nothing cancels."""
        return self.total_B.log() - (self.weights_BV * self.shifted_BV).sum(dim=1) / self.total_B

    def tail(self, ids_BK: Tensor, within_BK: Tensor) -> Tensor:
        """Log of the mass of all but the ids within, summed over it.

        Mass too small for float32's exponentials is summed in logs.
        """
        held_BK = self.weights_BV.gather(1, ids_BK)
        self.weights_BV.scatter_reduce_(1, ids_BK, held_BK.masked_fill(within_BK, 0), "amin")
        rest_B = self.weights_BV.sum(dim=1)
        self.weights_BV.scatter_(1, ids_BK, held_BK)
        log_B = rest_B.log()
        tiny = (rest_B < _TINY).nonzero()[:, 0]
        if len(tiny):
            log_B[tiny] = _log_mass_without(self.shifted_BV[tiny], ids_BK[tiny], within_BK[tiny])
        return log_B - self.total_B.log()


def _statistics(
    dense: _Dense,
    sampled_B: Tensor,
    gather_BS: Tensor,
    uniforms_BN: Tensor | None,
    k: int,
    mass: float,
    num_ids: int,
) -> tuple[Tensor, ...]:
    """The columns of ``TeacherStats`` for some tokens."""
    there_BS = gather_BS < dense.shifted_BV.shape[1]
    gather_BS = gather_BS.where(there_BS, 0)
    gathered_BS = dense.logprobs(dense.shifted_BV.gather(1, gather_BS))
    values_BK, ids_BK = _topk(dense.shifted_BV[:, :num_ids], k)
    topk_BK = dense.logprobs(values_BK)
    kept_BK = _within_mass(topk_BK, mass)
    drawn_BN = (
        sampled_B.new_zeros((len(sampled_B), 0))
        if uniforms_BN is None
        else _draw(dense.weights_BV[:, :num_ids], uniforms_BN)
    )
    return (
        dense.logprobs(dense.shifted_BV.gather(1, sampled_B[:, None]))[:, 0],
        dense.entropy(),
        ids_BK,
        topk_BK,
        kept_BK.sum(1),
        dense.tail(ids_BK, kept_BK),
        gathered_BS.masked_fill(~there_BS, -torch.inf),
        dense.tail(gather_BS, there_BS),
        drawn_BN,
    )


@torch.no_grad()
def divergence(
    student: Side,
    teacher: Side,
    *,
    k: int,
    chunk_tokens: int = 256,
) -> Divergence:
    """Student against teacher over the full vocabulary; each is (hidden [T, D], weight [V, D]).

    Where the padded sizes differ, only the ids that both have are compared.
    """
    vocab = min(student[1].shape[0], teacher[1].shape[0])
    weights = [_matmul_ready(weight[:vocab]) for _, weight in (student, teacher)]
    rows = []
    for part in _chunks(student[0].shape[0], chunk_tokens):
        p, q = (
            torch.log_softmax(_matmul(hidden[part], weight.t()), dim=1)
            for (hidden, _), weight in zip((student, teacher), weights, strict=True)
        )
        mass = p.exp()
        top_p, top_q = p.topk(k, dim=1).indices, q.topk(k, dim=1).indices
        shared = (top_p[:, :, None] == top_q[:, None, :]).any(dim=2).float().mean(dim=1)
        kl, entropy_q = (mass * (p - q)).sum(dim=1), -(q.exp() * q).sum(dim=1)
        rows.append((kl, -(mass * p).sum(dim=1), entropy_q, shared))
    return Divergence(*(torch.cat(column) for column in zip(*rows, strict=True)))


def split_head(model: nn.Module, where: Path) -> tuple[nn.Module, nn.Linear]:
    """A causal LM as (body, head), checked: head(body's last hidden state) are its logits.

    Raises:
        ModelError: they are not (a bias, a soft cap, a scale), so log-probs would be wrong.
    """
    body: nn.Module = model.base_model  # type: ignore[assignment]
    head = model.get_output_embeddings()  # type: ignore[operator]
    if not isinstance(head, nn.Linear) or head.bias is not None:
        raise ModelError("the LM head is not a plain linear map", where=where)
    if head.weight.is_meta or getattr(model, "hf_device_map", {}).get("lm_head") == "disk":
        raise ModelError(
            "the LM head is offloaded", where=where, remedy="keep lm_head on a device in device_map"
        )
    probe = torch.arange(16, device=head.weight.device)[None] % head.weight.shape[0]
    with torch.no_grad():
        ours = head(body(input_ids=probe).last_hidden_state).float()
        theirs = model(input_ids=probe).logits.float()
    if not torch.allclose(ours, theirs, rtol=1e-3, atol=1e-3):
        raise ModelError(
            "logits are not the LM head applied to the last hidden state",
            where=where,
            remedy="models with a logit soft cap or scale are not supported",
        )
    return body, head


def _blocks(logits_CV: Tensor, part: slice) -> Iterator[tuple[slice, slice]]:
    """Tokens of a chunk that are looked at together: on a CPU, as many as stay in its caches.

    Gives where they are in the chunk, and on the token axis of which the chunk is a part.
    """
    on_cpu = logits_CV.device.type == "cpu"
    size = max(1, _CACHED_ENTRIES // logits_CV.shape[1] if on_cpu else len(logits_CV))
    for block in _chunks(len(logits_CV), size):
        yield block, slice(part.start + block.start, part.start + block.stop)


def _topk(values_BV: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """``values_BV.topk(k)``, values and ids. The k largest stand in the k groups of entries that
    have the largest maxima, so only those groups are sorted.
    """
    size = values_BV.shape[1] // _GROUP
    if 2 * k > size:
        top = values_BV.topk(k, dim=1)
        return top.values, top.indices
    grouped_BGM = values_BV[:, : _GROUP * size].view(len(values_BV), _GROUP, size)
    best_BK = grouped_BGM.amax(dim=1).topk(k, dim=1, sorted=False).indices
    steps_G = torch.arange(0, _GROUP * size, size, device=values_BV.device)
    rest_R = torch.arange(_GROUP * size, values_BV.shape[1], device=values_BV.device)
    ids_BC = torch.cat(
        [
            (best_BK[:, :, None] + steps_G).flatten(1),
            rest_R.expand(len(values_BV), -1),
        ],
        dim=1,
    )
    top = values_BV.gather(1, ids_BC).topk(k, dim=1)
    return top.values, ids_BC.gather(1, top.indices)


def _draw(weights_BV: Tensor, uniforms_BN: Tensor) -> Tensor:
    """Ids [B, N] where the cumulative weight passes each uniform number: first of groups of
    entries, then within one. In float64, since float32 sums lose the smallest probabilities.
    """
    size = -(-weights_BV.shape[1] // _GROUP)
    padded_BV = torch.nn.functional.pad(weights_BV, (0, _GROUP * size - weights_BV.shape[1]))
    cdf_BM = (
        padded_BV.view(len(padded_BV), _GROUP, size).sum(dim=1, dtype=torch.float64).cumsum(dim=1)
    )
    total_B1 = cdf_BM[:, -1:]
    goals_BN = torch.minimum(uniforms_BN * total_B1, total_B1.nextafter(total_B1.new_zeros(())))
    groups_BN = torch.searchsorted(cdf_BM, goals_BN, right=True)
    above_BN = cdf_BM.gather(1, groups_BN)
    below_BN = torch.where(groups_BN > 0, cdf_BM.gather(1, (groups_BN - 1).clamp(min=0)), 0.0)
    steps_G = torch.arange(0, _GROUP * size, size, device=weights_BV.device)
    ids_BNG = groups_BN[:, :, None] + steps_G
    within_BNG = padded_BV.gather(1, ids_BNG.flatten(1)).view(ids_BNG.shape).double().cumsum(dim=2)
    share_BN = ((goals_BN - below_BN) / (above_BN - below_BN)).clamp(0, 1 - 1e-12)
    passed_BN = (within_BNG <= (share_BN * within_BNG[:, :, -1])[:, :, None]).sum(dim=2)
    return ids_BNG.gather(2, passed_BN[:, :, None])[:, :, 0]


def _within_mass(topk_CK: Tensor, mass: float) -> Tensor:
    """Entries needed to hold the mass: those before which less than it is held."""
    if mass >= 1:
        return torch.ones_like(topk_CK, dtype=torch.bool)
    held = topk_CK.exp()
    return held.cumsum(dim=1) - held < mass


def _log_mass_without(logits_CV: Tensor, ids_CK: Tensor, within_CK: Tensor) -> Tensor:
    """``logsumexp`` over all but the ids within; the logits are as before when it returns.

    An id may stand more than once, within and not: the least value counts, so it is left out.
    """
    values_CK = logits_CV.gather(1, ids_CK)
    left_out_CK = values_CK.masked_fill(within_CK, -torch.inf)
    logits_CV.scatter_reduce_(1, ids_CK, left_out_CK, "amin")
    rest_C = torch.logsumexp(logits_CV, dim=1)
    logits_CV.scatter_(1, ids_CK, values_CK)
    return rest_C


def _probs(logits_BV: Tensor, log_total_B: Tensor) -> Tensor:
    """``exp(logits - log_total)``, in the place of the logits; 0 of a total of nothing."""
    some_B = log_total_B.masked_fill(log_total_B.isneginf(), torch.inf)
    return logits_BV.sub_(some_B[:, None]).exp_()


def _probs_and_outside(
    logits_BV: Tensor,
    lse_B: Tensor,
    scale_B: Tensor,
    ids_BK: Tensor,
    within_BK: Tensor,
    tail_B: Tensor,
    grad_tail_B: Tensor,
) -> None:
    """``scale * p + grad_tail * p'`` in the place of the logits; p' is p renormalised outside the
    ids within, whose log-mass is ``tail``.

    As p' is p times ``exp(-tail)``, one exponential serves both, but where the tail is so small
    that float32 has lost bits of p.
    """
    tiny = (tail_B < math.log(_TINY)).nonzero()[:, 0]
    rest_B, small_BV = (tail_B + lse_B)[tiny], logits_BV[tiny]
    probs_BV = _probs(logits_BV, lse_B)
    outside_BV = _outside(probs_BV.clone(), ids_BK, within_BK)
    ratio_B = (-tail_B).exp().index_fill(0, tiny, 0)
    probs_BV.mul_(scale_B[:, None]).addcmul_(outside_BV, (grad_tail_B * ratio_B)[:, None])
    if len(tiny):
        small_BV = _outside(_probs(small_BV, rest_B), ids_BK[tiny], within_BK[tiny])
        probs_BV[tiny] += small_BV * grad_tail_B[tiny, None]


def _outside(probs_BV: Tensor, ids_BK: Tensor, within_BK: Tensor) -> Tensor:
    """Probabilities, in their place, with 0 at the ids within."""
    inside_BK = probs_BV.gather(1, ids_BK).masked_fill(within_BK, 0)
    return probs_BV.scatter_reduce_(1, ids_BK, inside_BK, "amin")


def _chunks(num_tokens: int, chunk_tokens: int) -> Iterator[slice]:
    """Slices of the token axis; one empty slice when there are no tokens."""
    for start in range(0, max(num_tokens, 1), chunk_tokens):
        yield slice(start, min(start + chunk_tokens, num_tokens))


def _matmul_ready(weight_VD: Tensor) -> Tensor:
    """CPUs multiply in float32, from one copy of the head; accelerators take it as it is."""
    return weight_VD.float() if weight_VD.device.type == "cpu" else weight_VD


def _matmul(left: Tensor, right: Tensor) -> Tensor:
    """Product with float32 accumulation and a float32 result."""
    if right.dtype == torch.float32 or left.device.type == "cpu":
        return left.float() @ right.float()
    return torch.mm(left.to(right.dtype), right, out_dtype=torch.float32)
