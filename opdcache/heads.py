"""LM-head operations that never hold [T, V]: what scoring, learning and evaluation share.

Logits are made for a chunk of tokens at a time, in float32 whatever the weights' dtype, and used up
before the next chunk. Log-probs are natural, at temperature 1, over the full vocabulary.

Legend: T tokens, V vocabulary (rows of the head, padding included), D width, K support, S recorded.
"""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .errors import ModelError
from .logits import CHUNK_TOKENS, TINY, Dense, blocks, chunks, likeliest, matmul, matmul_ready

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
        weight = matmul_ready(weight_VD)
        for part in chunks(num_tokens, chunk_tokens):
            logits_CV = matmul(hidden_TD[part], weight.t())
            for block, at in blocks(logits_CV, part):
                dense, ids_BK = Dense.of(logits_CV[block]), ids_TK[at]
                logprobs_TK[at] = dense.logprobs(dense.shifted_BV.gather(1, ids_BK))
                threshold_T[at] = dense.logprobs(likeliest(dense.shifted_BV, topk)[0])[:, -1]
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
        weight = matmul_ready(weight_VD)
        grad_hidden_TD = torch.empty_like(hidden_TD) if needs_hidden else None
        grad_weight_VD = torch.zeros_like(weight_VD, dtype=torch.float32) if needs_weight else None
        total_T = grad_TK.sum(dim=1)
        if within_TK is not None:
            total_T = total_T + grad_tail_T
        for part in chunks(hidden_TD.shape[0], ctx.chunk_tokens):
            grad_CV = matmul(hidden_TD[part], weight.t())
            for block, at in blocks(grad_CV, part):
                logits_BV, ids_BK = grad_CV[block], ids_TK[at]
                if within_TK is None:
                    _probs(logits_BV, lse_T[at]).mul_(-total_T[at, None])
                else:
                    tail = ids_BK, within_TK[at], tail_T[at], grad_tail_T[at]
                    _probs_and_outside(logits_BV, lse_T[at], -total_T[at], *tail)
                logits_BV.scatter_add_(1, ids_BK, grad_TK[at])
            if grad_hidden_TD is not None:
                grad_hidden_TD[part] = matmul(grad_CV, weight).to(hidden_TD.dtype)
            if grad_weight_VD is not None:
                grad_weight_VD += matmul(grad_CV.t(), hidden_TD[part])
        if grad_weight_VD is not None:
            grad_weight_VD = grad_weight_VD.to(weight_VD.dtype)
        return grad_hidden_TD, grad_weight_VD, None, None, None, None


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
    weights = [matmul_ready(weight[:vocab]) for _, weight in (student, teacher)]
    rows = []
    for part in chunks(student[0].shape[0], chunk_tokens):
        p, q = (
            torch.log_softmax(matmul(hidden[part], weight.t()), dim=1)
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
    tiny = (tail_B < math.log(TINY)).nonzero()[:, 0]
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
