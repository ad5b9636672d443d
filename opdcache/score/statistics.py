"""What is stored of a teacher's distributions, in one pass over its head; [T, V] is never held.

Legend: T tokens, B of a block, V vocabulary (rows of the head, padding included), D width, K kept
entries, S recorded, N drawn.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from ..logits import CHUNK_TOKENS, GROUP, Dense, blocks, chunks, likeliest, matmul, matmul_ready


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
    weight = matmul_ready(weight_VD)
    num_ids = min(num_ids or weight_VD.shape[0], weight_VD.shape[0])
    k = min(k, num_ids)
    rows = []
    for part in chunks(hidden_TD.shape[0], chunk_tokens):
        logits_CV = matmul(hidden_TD[part], weight.t())
        for block in blocks(logits_CV):
            dense = Dense.of(logits_CV[block])
            sampled_B, gather_BS = sampled_T[part][block], gather_TS[part][block]
            uniforms_BN = None if uniforms_TN is None else uniforms_TN[part][block]
            rows.append(_statistics(dense, sampled_B, gather_BS, uniforms_BN, k, mass, num_ids))
    return TeacherStats(*(torch.cat(column) for column in zip(*rows, strict=True)))


def _statistics(
    dense: Dense,
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
    values_BK, ids_BK = likeliest(dense.shifted_BV[:, :num_ids], k)
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


def _draw(weights_BV: Tensor, uniforms_BN: Tensor) -> Tensor:
    """Ids [B, N] where the cumulative weight passes each uniform number: first of groups of
    entries, then within one. In float64, since float32 sums lose the smallest probabilities.
    """
    size = -(-weights_BV.shape[1] // GROUP)
    padded_BV = torch.nn.functional.pad(weights_BV, (0, GROUP * size - weights_BV.shape[1]))
    cdf_BM = (
        padded_BV.view(len(padded_BV), GROUP, size).sum(dim=1, dtype=torch.float64).cumsum(dim=1)
    )
    total_B1 = cdf_BM[:, -1:]
    goals_BN = torch.minimum(uniforms_BN * total_B1, total_B1.nextafter(total_B1.new_zeros(())))
    groups_BN = torch.searchsorted(cdf_BM, goals_BN, right=True)
    above_BN = cdf_BM.gather(1, groups_BN)
    below_BN = torch.where(groups_BN > 0, cdf_BM.gather(1, (groups_BN - 1).clamp(min=0)), 0.0)
    steps_G = torch.arange(0, GROUP * size, size, device=weights_BV.device)
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
