"""The live student on a micro-batch: what the loss sees of it, and what is reported of it.

Legend: T tokens, K teacher entries, S recorded student entries, N drawn ids.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from ..heads import StudentView
from ..schemas.losses import LossConfig, TokensConfig, cell, imitates
from .losses import OnSupport, reverse_kl, with_tail
from .microbatch import MicroBatch
from .weights import largest

_LEAST_LEFT = 1 / 128
"""Of the mass outside the teacher's top-k, what the union leaves at least: less than that the
stored log-probs, which are rounded, cannot tell from nothing."""


@dataclass(frozen=True, slots=True)
class Live:
    """The live student's log-probs of a micro-batch's ids.

    Attributes:
        sampled_T: of the sampled tokens.
        topk_TK: of the teacher's kept entries; None when none are stored.
        recorded_TS: of the recorded student ids; None unless the loss looks at them.
        drawn_TN: of the teacher's draws; None unless the loss looks at them.
        view: the rest of what the head gave, the tail that the loss asked for included.
    """

    sampled_T: Tensor
    topk_TK: Tensor | None
    recorded_TS: Tensor | None
    drawn_TN: Tensor | None
    view: StudentView


def ids_to_gather(loss: LossConfig, batch: MicroBatch) -> Tensor:
    """Ids that the loss and the metrics need, [T, 1 + K + S + N]: sampled, teacher's, recorded,
    drawn; those that nobody needs are left out."""
    return torch.cat(list(_gathered(loss, batch).values()), dim=1)


def within_support(loss: LossConfig, batch: MicroBatch) -> Tensor | None:
    """Which of ``ids_to_gather`` the student's tail leaves out; None when the loss has no tail.

    For the overlap these are the teacher's kept entries: those that are not shared join the tail
    afterwards, once the live student is known.
    """
    if loss.normalisation != "tail":
        return None
    within = {
        name: torch.zeros_like(i, dtype=torch.bool) for name, i in _gathered(loss, batch).items()
    }
    if loss.support != "student_topk":
        assert batch.kept_TK is not None
        within["topk"] = batch.kept_TK
    if "recorded" in within:
        within["recorded"] = torch.ones_like(within["recorded"])
    return torch.cat(list(within.values()), dim=1)


def live(loss: LossConfig, batch: MicroBatch, view: StudentView) -> Live:
    """Take apart the head's view of ``ids_to_gather``."""
    gathered = _gathered(loss, batch)
    widths = [ids.shape[1] for ids in gathered.values()]
    parts = dict(zip(gathered, torch.split(view.logprobs_TK, widths, dim=1), strict=True))
    return Live(
        sampled_T=parts["sampled"][:, 0],
        topk_TK=parts.get("topk"),
        recorded_TS=parts.get("recorded"),
        drawn_TN=parts.get("drawn"),
        view=view,
    )


def on_support(loss: LossConfig, batch: MicroBatch, student: Live) -> OnSupport:
    """Both sides of the loss on its support."""
    student_TK, teacher_TK, valid_TK, student_tail_T, teacher_tail_T = _sides(loss, batch, student)
    return OnSupport(
        student_TK,
        teacher_TK,
        valid_TK,
        student_tail_T,
        teacher_tail_T,
        sampling_T=batch.sampling_T,
        teacher_entropy_T=batch.teacher_entropy_T,
        reference_TK=_reference_on(loss, batch),
        student_sampled_T=student.sampled_T,
        reference_sampled_T=batch.reference_sampled_T,
        advantage_T=batch.advantage_T,
    )


def _reference_on(loss: LossConfig, batch: MicroBatch) -> Tensor | None:
    """The reference's log-probs of the ids of a loss that extrapolates from it."""
    if loss.extrapolation is None:
        return None
    if loss.support == "student_topk":
        return batch.reference_recorded_TS
    assert batch.reference_sampled_T is not None
    return batch.reference_sampled_T[:, None]


def _sides(loss: LossConfig, batch: MicroBatch, student: Live) -> tuple[Tensor, ...]:
    """The first five fields of ``OnSupport``."""
    tail_T = student.view.tail_T
    if loss.support == "sampled":
        teacher_T = batch.teacher_sampled_T
        if imitates(loss):
            teacher_T = torch.zeros_like(student.sampled_T)  # what was sampled was drawn once
        assert teacher_T is not None
        alone = torch.ones_like(batch.sampled_T, dtype=torch.bool)[:, None]
        return student.sampled_T[:, None], teacher_T[:, None], alone, tail_T, tail_T
    if loss.support == "draws":
        assert student.drawn_TN is not None
        assert batch.draw_counts_TN is not None
        counts_TN = batch.draw_counts_TN
        shares_TN = counts_TN.clamp(min=1) / counts_TN.sum(dim=1, keepdim=True)
        return student.drawn_TN, shares_TN.log(), counts_TN > 0, tail_T, tail_T
    if loss.support == "student_topk":
        assert student.recorded_TS is not None
        assert batch.recorded_TS is not None
        assert batch.recorded_tail_T is not None
        whole = torch.ones_like(batch.recorded_TS, dtype=torch.bool)
        return student.recorded_TS, batch.recorded_TS, whole, tail_T, batch.recorded_tail_T
    assert student.topk_TK is not None
    assert batch.topk_TK is not None
    assert batch.kept_TK is not None
    assert batch.tail_T is not None
    if loss.support == "teacher_topk":
        return student.topk_TK, batch.topk_TK, batch.kept_TK, tail_T, batch.tail_T
    if loss.support == "overlap":
        shared_TK = _shared(batch.kept_TK, student)
        left_out_TK = batch.kept_TK & ~shared_TK
        return (
            student.topk_TK,
            batch.topk_TK,
            shared_TK,
            _joined(tail_T, student.topk_TK, left_out_TK),
            _joined(batch.tail_T, batch.topk_TK, left_out_TK),
        )
    assert batch.topk_ids_TK is not None
    assert batch.recorded_ids_TS is not None
    assert student.recorded_TS is not None
    assert batch.recorded_TS is not None
    whole = torch.ones_like(batch.recorded_TS, dtype=torch.bool)
    theirs_TK = batch.kept_TK
    ours_TS = ~_among(batch.recorded_ids_TS, batch.topk_ids_TK, batch.kept_TK)
    if loss.support == "symmetric_difference":
        theirs_TK = theirs_TK & ~_among(batch.topk_ids_TK, batch.recorded_ids_TS, whole)
    return (
        torch.cat([student.topk_TK, student.recorded_TS], dim=1),
        torch.cat([batch.topk_TK, batch.recorded_TS], dim=1),
        torch.cat([theirs_TK, ours_TS], dim=1),
        tail_T,
        _less(batch.tail_T, batch.recorded_TS, ours_TS),
    )


@torch.no_grad()
def loss_weights(tokens: TokensConfig, batch: MicroBatch, losses_T: Tensor | None) -> Tensor:
    """How much each token counts, [T]: its weight, or 0 where it is not among those chosen; of
    means over sequences, as a share of its completion's.

    Args:
        losses_T: needed where they choose.
    """
    weights_T = batch.weights_T
    if tokens.fraction < 1:
        values_T = losses_T if tokens.by == "divergence" else batch.teacher_entropy_T
        assert values_T is not None
        weights_T = weights_T * largest(values_T, batch.sequences_T, tokens.fraction)
    if tokens.mean == "sequences":
        sums_B = weights_T.new_zeros(batch.num_sequences).index_add(0, batch.sequences_T, weights_T)
        weights_T = weights_T / sums_B.clamp(min=torch.finfo(sums_B.dtype).tiny)[batch.sequences_T]
    return weights_T


@torch.no_grad()
def metric_values(batch: MicroBatch, student: Live) -> dict[str, Tensor]:
    """A value a token, [T]; their sums, divided by that of ``num_measured``, are means.

    ``support_mass`` is the student's on the teacher's kept entries. ``reverse_kl_tail`` merges
    everything outside those into one bucket: a lower bound of the full KL. ``reverse_kl_sampled``
    is ``r - 1 - log r`` of the sampled token, ``r = q/p``: unbiased while the student is the policy
    that sampled. Without the log-probs that the policy sampled with there are no weights.
    """
    found = {
        "num_measured": torch.ones_like(student.view.entropy_T),
        "student_entropy": student.view.entropy_T,
    }
    if batch.sampling_T is not None:
        found["weight"] = (student.sampled_T - batch.sampling_T).double().exp()
        found["weight_squared"] = found["weight"].square()
    if batch.teacher_sampled_T is not None:
        log_ratio_T = batch.teacher_sampled_T - student.sampled_T
        found["reverse_kl_sampled"] = log_ratio_T.exp() - 1 - log_ratio_T
    if batch.teacher_entropy_T is not None:
        found["teacher_entropy"] = batch.teacher_entropy_T
        found["entropy_gap"] = (batch.teacher_entropy_T - student.view.entropy_T).abs()
    if student.topk_TK is not None:
        found |= _on_teachers_topk(batch, student)
    return found


def means(sums: Mapping[str, float]) -> dict[str, float]:
    """Token-means of ``loss`` and of ``metric_values``, and the staleness of the rollouts.

    ``ess`` is the effective sample size of the ratios ``p_live / p_sampling`` as a share of the
    tokens: 1 while the student is the policy that sampled; absent where its log-probs are.
    """
    measured = sums["num_measured"]
    others = ("num_", "weight", "objective")
    made = {name: v / measured for name, v in sums.items() if not name.startswith(others)}
    made["loss"] = sums["loss"] / sums["num_tokens"]
    if sums.get("weight_squared"):
        made["ess"] = sums["weight"] ** 2 / (measured * sums["weight_squared"])
    return made


def _gathered(loss: LossConfig, batch: MicroBatch) -> dict[str, Tensor]:
    """The parts of ``ids_to_gather`` by name, in their order."""
    looks_at_recorded = cell(loss).needs_recorded_topk
    parts = {
        "sampled": batch.sampled_T[:, None],
        "topk": batch.topk_ids_TK,
        "recorded": batch.recorded_ids_TS if looks_at_recorded else None,
        "drawn": batch.draw_ids_TN if loss.support == "draws" else None,
    }
    return {name: ids for name, ids in parts.items() if ids is not None}


def _among(ids_TA: Tensor, others_TB: Tensor, valid_TB: Tensor) -> Tensor:
    """Bool [T, A]: which ids are among the valid ones of the others; [T, A, B] is never held."""
    columns = [((others_TB == ids[:, None]) & valid_TB).any(dim=1) for ids in ids_TA.unbind(dim=1)]
    return torch.stack(columns, dim=1)


def _less(tail_T: Tensor, logprobs_TS: Tensor, taken_TS: Tensor) -> Tensor:
    """A tail's log-mass without that of some entries in it."""
    taken_T = logprobs_TS.exp().masked_fill(~taken_TS, 0).sum(dim=1)
    left_T = 1 - taken_T / tail_T.exp().clamp(min=torch.finfo(torch.float32).tiny)
    return tail_T + left_T.clamp(min=_LEAST_LEFT).log()


def _shared(kept_TK: Tensor, student: Live) -> Tensor:
    """Kept teacher entries that are in the live student's top-k too."""
    assert student.topk_TK is not None
    return kept_TK & (student.topk_TK >= student.view.threshold_T[:, None])


def _joined(tail_T: Tensor, logprobs_TK: Tensor, left_out_TK: Tensor) -> Tensor:
    """A tail's log-mass with that of the entries left out of the support."""
    entries_TK = logprobs_TK.masked_fill(~left_out_TK, -1e30)
    return torch.logaddexp(tail_T, torch.logsumexp(entries_TK, dim=1))


def _on_teachers_topk(batch: MicroBatch, student: Live) -> dict[str, Tensor]:
    assert student.topk_TK is not None
    assert batch.topk_TK is not None
    assert batch.kept_TK is not None
    assert batch.tail_T is not None
    shared_TK = _shared(batch.kept_TK, student)
    held_T = (student.topk_TK.exp() * batch.kept_TK).sum(dim=1)
    tail_T = torch.log((1 - held_T).clamp(min=1e-7))  # good enough to report
    on_teacher = OnSupport(student.topk_TK, batch.topk_TK, batch.kept_TK, tail_T, batch.tail_T)
    return {
        "reverse_kl_tail": reverse_kl(with_tail(on_teacher)),
        "support_mass": held_T,
        "overlap": shared_TK.float().mean(dim=1),
        "overlap_mass_student": (student.topk_TK.exp() * shared_TK).sum(dim=1),
        "overlap_mass_teacher": (batch.topk_TK.exp() * shared_TK).sum(dim=1),
        "overlap_empty": (~shared_TK.any(dim=1)).float(),
    }
