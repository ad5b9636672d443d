"""Whether a round's rollouts can serve a loss: what was recorded, and by which policy.

A run's own rollouts always can. Those of another run, or from elsewhere, may be another policy's,
and may lack what its sampling would have recorded (docs/design.md, Losses).
"""

from .errors import LossError
from .runfolder import RunContext
from .schemas.losses import cell, imitates
from .schemas.rounds import RolloutRound

_SERVED = "take support 'teacher_topk', 'overlap' or 'draws', which any rollouts serve"


def refuse_unserved(context: RunContext, rollouts: RolloutRound) -> None:
    """Refuse a loss that these rollouts cannot serve.

    Raises:
        LossError: it looks at ids that another policy recorded, or at what was not recorded.
        InputsMissing: the policy that the round starts from is not there yet.
        ObjectMissing: a shard is not in the cache.
    """
    loss, ends = context.config.train.loss, context.config.train.end_round
    support, recorded = f"support {loss.support!r}", cell(loss).needs_recorded_topk
    unweighed = loss.outcome_weight and loss.importance_cap is None
    looks = recorded or loss.reference_kl or unweighed
    another = _disagreement(context, rollouts) if looks else None
    if another and recorded:
        raise _refusal(
            f"{support} needs the teacher's log-probs at ids that the live student chose, and "
            "these rollouts are another policy's",
            **another,
        )
    if another and loss.reference_kl:
        raise _refusal(
            "reference_kl needs tokens that the live student sampled, and these rollouts are "
            "another policy's",
            remedy="leave it out, or sample in this run",
            **another,
        )
    if another:
        raise _refusal(
            "an outcome without importance_cap needs tokens that the live student sampled, and "
            "these rollouts are another policy's",
            remedy="set train.loss.importance_cap",
            **another,
        )
    gradient = loss.support == "sampled" and not imitates(loss)
    ratio = support if gradient else "train.end_round.ess" if ends.ess else None
    if loss.importance_cap is not None and ratio is None:
        ratio = "importance_cap"
    if not recorded and not ratio:
        return
    for manifest in context.cache.objects.each(context.cache.need_rollouts, rollouts.shards):
        identity, where = manifest.identity, f"rollout shard {manifest.key[:12]}"
        if recorded and identity.student_topk < loss.k:
            got = f"{identity.student_topk} recorded entries a token"
            why = f"{support} with k = {loss.k} needs more than is recorded"
            raise _refusal(why, where, got=got)
        if ratio and "sampling_logprobs" in identity.absent:
            raise _refusal(
                f"{ratio} needs sampling_logprobs: without them nothing can say how far the "
                "student is from the policy that sampled",
                where,
                _SERVED if gradient else "leave it out",
            )


def _disagreement(context: RunContext, rollouts: RolloutRound) -> dict[str, str] | None:
    """The policy that the round starts from and the one that sampled, where they differ."""
    policy = context.policy(rollouts.round)
    if policy == rollouts.student:
        return None
    return {"expected": f"policy {policy[:12]}", "got": rollouts.student[:12]}


def _refusal(
    why: str, where: str = "train.loss", remedy: str = _SERVED, **details: str
) -> LossError:
    return LossError(why, where=where, remedy=remedy, **details)
