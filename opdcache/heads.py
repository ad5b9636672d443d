"""LM-head operations that never hold [T, V]: what scoring, learning and evaluation share.

Logits are made for a chunk of tokens at a time, in float32 whatever the weights' dtype, and used up
before the next chunk. Log-probs are natural, at temperature 1, over the full vocabulary.

Legend: T tokens, V vocabulary (rows of the head, padding included), D width, K support, S recorded.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .errors import ModelError
from .logits import (
    CHUNK_TOKENS,
    TINY,
    Dense,
    add_matmul,
    blocks,
    chunks,
    likeliest,
    matmul,
    matmul_ready,
)

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
    asked = _Asked(ids_TK, within_TK, min(topk, weight_VD.shape[0]), chunk_tokens)
    return StudentView(*_SupportView.apply(hidden_TD, weight_VD, asked))  # type: ignore[no-untyped-call]


def support_loss(
    hidden_TD: Tensor,
    weight_VD: Tensor,
    ids_TK: Tensor,
    loss_of: Callable[[StudentView, slice], Tensor],
    *,
    within_TK: Tensor | None = None,
    topk: int = 1,
    chunk_tokens: int = CHUNK_TOKENS,
) -> Tensor:
    """A loss that is a sum over tokens, differentiable: its gradient is made in the same pass.

    That takes three products with the head where ``support_view`` and its backward take four, and
    one exponential a logit.

    Args:
        loss_of: the loss of a chunk, a scalar, from the view of its tokens and their place on the
            token axis; it is called once a chunk, in order.
        within_TK, topk, chunk_tokens: see ``support_view``.

    Returns:
        float32 scalar, the chunks' losses added up.
    """
    asked = _Asked(ids_TK, within_TK, min(topk, weight_VD.shape[0]), chunk_tokens)
    return _SupportLoss.apply(hidden_TD, weight_VD, asked, loss_of)  # type: ignore[no-untyped-call,no-any-return]


def support_logits(
    hidden_TD: Tensor, weight_VD: Tensor, ids_TK: Tensor, *, chunk_tokens: int = CHUNK_TOKENS
) -> Tensor:
    """Logits of the ids in each token's support, float32 [T, K], differentiable.

    No other logit is made: all that a loss needs that is renormalised on the support.
    """
    return _SupportLogits.apply(hidden_TD, weight_VD, ids_TK, chunk_tokens)  # type: ignore[no-untyped-call,no-any-return]


@dataclass(frozen=True, slots=True)
class _Asked:
    """What is to be looked at; see ``support_view``. No gradient goes to any of it."""

    ids_TK: Tensor
    within_TK: Tensor | None
    topk: int
    chunk_tokens: int


class _SupportView(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden_TD: Tensor, weight_VD: Tensor, asked: _Asked
    ) -> tuple[Tensor, ...]:
        rows = []
        for _, chunk in _chunked(hidden_TD, weight_VD, asked):
            rows.append(chunk.columns)
            del chunk
        columns = tuple(torch.cat(column) for column in zip(*rows, strict=True))
        ctx.save_for_backward(hidden_TD, weight_VD)
        ctx.asked = asked
        ctx.mark_non_differentiable(*columns[2:])
        return columns

    @staticmethod
    def backward(
        ctx: Any, grad_TK: Tensor, grad_tail_T: Tensor, *_: Tensor
    ) -> tuple[Tensor | None, ...]:
        hidden_TD, weight_VD = ctx.saved_tensors
        made = _Gradients(hidden_TD, weight_VD, ctx.needs_input_grad)
        for part, chunk in _chunked(hidden_TD, weight_VD, replace(ctx.asked, topk=1)):
            made.add(part, chunk.gradient(grad_TK[part], grad_tail_T[part]))
            del chunk
        return *made.done(), None


class _SupportLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden_TD: Tensor,
        weight_VD: Tensor,
        asked: _Asked,
        loss_of: Callable[[StudentView, slice], Tensor],
    ) -> Tensor:
        made = _Gradients(hidden_TD, weight_VD, ctx.needs_input_grad)
        total = hidden_TD.new_zeros((), dtype=torch.float32)
        for part, chunk in _chunked(hidden_TD, weight_VD, asked):
            logprobs_CK, tail_C, *rest = chunk.columns
            leaves = logprobs_CK.requires_grad_(), tail_C.requires_grad_()
            with torch.enable_grad():
                loss = loss_of(StudentView(*leaves, *rest), part)
                pulls = torch.autograd.grad(loss, leaves, materialize_grads=True)
            total += loss.detach()
            made.add(part, chunk.gradient(*pulls))
            del chunk
        ctx.made = made.done()
        return total

    @staticmethod
    def backward(ctx: Any, scale: Tensor) -> tuple[Tensor | None, ...]:
        # One on a CPU most often, where going over [V, D] once more is not for nothing.
        is_one = scale.device.type == "cpu" and float(scale) == 1
        made, ctx.made = ctx.made, None  # [V, D] is let go as soon as it is added
        scaled = (g if g is None or is_one else g.mul_(scale) for g in made)
        return *scaled, None, None


class _SupportLogits(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden_TD: Tensor, weight_VD: Tensor, ids_TK: Tensor, chunk_tokens: int
    ) -> Tensor:
        logits_TK = hidden_TD.new_empty(ids_TK.shape, dtype=torch.float32)
        for part in chunks(len(hidden_TD), chunk_tokens):
            rows_CKD = weight_VD[ids_TK[part]].float()
            logits_TK[part] = torch.bmm(rows_CKD, hidden_TD[part, :, None].float())[:, :, 0]
        ctx.save_for_backward(hidden_TD, weight_VD, ids_TK)
        ctx.chunk_tokens = chunk_tokens
        return logits_TK

    @staticmethod
    def backward(ctx: Any, grad_TK: Tensor) -> tuple[Tensor | None, ...]:
        hidden_TD, weight_VD, ids_TK = ctx.saved_tensors
        made = _Gradients(hidden_TD, weight_VD, ctx.needs_input_grad)
        for part in chunks(len(hidden_TD), ctx.chunk_tokens):
            made.add_rows(part, ids_TK[part], grad_TK[part])
        return *made.done(), None, None


def _chunked(
    hidden_TD: Tensor, weight_VD: Tensor, asked: _Asked
) -> Iterator[tuple[slice, "_Chunk"]]:
    """The distributions of all tokens, a chunk at a time; one must be let go before the next."""
    weight, within_TK = matmul_ready(weight_VD), asked.within_TK
    for part in chunks(len(hidden_TD), asked.chunk_tokens):
        within_CK = None if within_TK is None else within_TK[part]
        logits_CV = matmul(hidden_TD[part], weight.t())
        chunk = _Chunk(logits_CV, asked.ids_TK[part], within_CK, asked.topk)
        del logits_CV
        yield part, chunk
        del chunk


class _Chunk:
    """The distributions of some tokens: looked at, then turned into a gradient where they stand.

    Attributes:
        columns: the fields of ``StudentView``.
    """

    def __init__(
        self, logits_CV: Tensor, ids_CK: Tensor, within_CK: Tensor | None, topk: int
    ) -> None:
        self._memory_CV, self._ids_CK, self._within_CK = logits_CV, ids_CK, within_CK
        self._small: dict[int, tuple[Tensor, Tensor]] = {}
        num_tokens, logprobs_CK = len(logits_CV), logits_CV.new_empty(ids_CK.shape)
        # Made before the blocks: kept between what each needs and gives back, a heap breaks up.
        self._tail_C, entropy_C, threshold_C, self._total_C = (
            logits_CV.new_zeros(num_tokens) for _ in range(4)
        )
        self.columns = logprobs_CK, self._tail_C, entropy_C, threshold_C
        for block in blocks(logits_CV):
            self._look(block, topk)

    def _look(self, block: slice, topk: int) -> None:
        """Fill a block's place in the view, and put its exponentials in the logits' place."""
        dense, ids_BK = Dense.of(self._memory_CV[block]), self._ids_CK[block]
        logprobs_CK, tail_C, entropy_C, threshold_C = self.columns
        if self._within_CK is not None:
            tail_C[block] = dense.tail(ids_BK, self._within_CK[block])
            tiny = (tail_C[block] < math.log(TINY)).nonzero()[:, 0]
            self._small[block.start] = tiny, dense.shifted_BV[tiny]
        logprobs_CK[block] = dense.logprobs(dense.shifted_BV.gather(1, ids_BK))
        threshold_C[block] = dense.logprobs(likeliest(dense.shifted_BV, topk)[0])[:, -1]
        entropy_C[block] = dense.entropy()
        self._total_C[block] = dense.total_B
        self._memory_CV[block] = dense.weights_BV

    def gradient(self, pull_CK: Tensor, pull_tail_C: Tensor) -> Tensor:
        """Gradient with respect to the logits, [C, V], of a loss whose gradients with respect to
        log-probs and tail are these: ``scatter(pull) - p sum(pull)``, and of the tail ``p' - p``,
        where p' is p renormalised outside the ids within."""
        for block in blocks(self._memory_CV):
            pull_BK, total_B = pull_CK[block], self._total_C[block]
            if self._within_CK is None:
                self._memory_CV[block].mul_((-pull_BK.sum(dim=1) / total_B)[:, None])
            else:
                self._pull_tail(block, pull_BK.sum(dim=1), pull_tail_C[block])
            self._memory_CV[block].scatter_add_(1, self._ids_CK[block], pull_BK)
        return self._memory_CV

    def _pull_tail(self, block: slice, pull_B: Tensor, pull_tail_B: Tensor) -> None:
        """``pull_tail (p' - p) - pull p`` in the place of a block's exponentials.

        As p' is p times ``exp(-tail)``, they serve both, but where the tail is so small that
        float32 has lost bits of them.
        """
        assert self._within_CK is not None
        weights_BV, ids_BK = self._memory_CV[block], self._ids_CK[block]
        tail_B, total_B = self._tail_C[block].detach(), self._total_C[block]
        tiny, small_RV = self._small[block.start]
        inside_B = (-(pull_B + pull_tail_B) / total_B)[:, None]
        outside_B = (
            inside_B + (pull_tail_B * (-tail_B).exp() / total_B).index_fill(0, tiny, 0)[:, None]
        )
        held_BK, is_inside_BK = _inside(weights_BV, ids_BK, self._within_CK[block])
        weights_BV.mul_(outside_B)
        weights_BV.scatter_(1, ids_BK, held_BK * torch.where(is_inside_BK, inside_B, outside_B))
        if len(tiny):
            rest_R = (tail_B + total_B.log())[tiny]
            small_RV.sub_(rest_R.masked_fill(rest_R.isneginf(), torch.inf)[:, None]).exp_()
            held_RK, is_inside_RK = _inside(small_RV, ids_BK[tiny], self._within_CK[block][tiny])
            small_RV.scatter_(1, ids_BK[tiny], held_RK.masked_fill(is_inside_RK, 0))
            weights_BV[tiny] += small_RV * pull_tail_B[tiny, None]


def _inside(weights_BV: Tensor, ids_BK: Tensor, within_BK: Tensor) -> tuple[Tensor, Tensor]:
    """The entries' weights, at least 0, and which of them have an id that is within, there or at
    another entry of the same token; the weights are as before when it returns."""
    held_BK = weights_BV.gather(1, ids_BK)
    weights_BV.scatter_reduce_(1, ids_BK, held_BK.masked_fill(within_BK, -1), "amin")
    inside_BK = weights_BV.gather(1, ids_BK) < 0
    weights_BV.scatter_(1, ids_BK, held_BK)
    return held_BK, inside_BK


class _Gradients:
    """What a loss's gradient with respect to logits makes of those it came from: hidden states and
    head, whichever are needed, in float32 until all chunks are added."""

    def __init__(self, hidden_TD: Tensor, weight_VD: Tensor, needed: Sequence[bool]) -> None:
        self._hidden_TD, self._weight_VD = hidden_TD, weight_VD
        self._ready_VD = matmul_ready(weight_VD)
        self._to_hidden_TD = torch.zeros_like(hidden_TD) if needed[0] else None
        self._needs_weight = needed[1]
        self._to_weight_VD: Tensor | None = None

    def add(self, part: slice, grad_CV: Tensor) -> None:
        """Of a chunk's logits."""
        if self._to_hidden_TD is not None:
            self._to_hidden_TD[part] = matmul(grad_CV, self._ready_VD).to(self._hidden_TD.dtype)
        if not self._needs_weight:
            return
        if self._to_weight_VD is None:
            self._to_weight_VD = matmul(grad_CV.t(), self._hidden_TD[part])
        else:
            add_matmul(self._to_weight_VD, grad_CV.t(), self._hidden_TD[part])

    def add_rows(self, part: slice, ids_CK: Tensor, grad_CK: Tensor) -> None:
        """Of a chunk's logits of these ids alone."""
        if self._to_hidden_TD is not None:
            rows_CKD = self._weight_VD[ids_CK].float()
            found_CD = torch.bmm(grad_CK[:, None], rows_CKD)[:, 0]
            self._to_hidden_TD[part] = found_CD.to(self._hidden_TD.dtype)
        if self._needs_weight:
            if self._to_weight_VD is None:
                self._to_weight_VD = torch.zeros_like(self._weight_VD, dtype=torch.float32)
            outer_CKD = grad_CK[:, :, None] * self._hidden_TD[part, None].float()
            self._to_weight_VD.index_add_(0, ids_CK.flatten(), outer_CKD.flatten(0, 1))

    def done(self) -> tuple[Tensor | None, Tensor | None]:
        """Both, in the dtype of what they are gradients of."""
        to_weight_VD = self._to_weight_VD
        if to_weight_VD is not None:
            to_weight_VD = to_weight_VD.to(self._weight_VD.dtype)
        return self._to_hidden_TD, to_weight_VD


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
