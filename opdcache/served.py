"""Whether a round's rollouts can serve a loss: what was recorded, and by which policy.

A run's own rollouts always can. Those of another run, or from elsewhere, may be another policy's,
and may lack what its sampling would have recorded (docs/design.md, Losses).
"""

from .errors import LossError
from .runfolder import RunContext
from .schemas.losses import LossConfig, cell
from .schemas.rounds import RolloutRound


def refuse_unserved(context: RunContext, rollouts: RolloutRound) -> None:
    """Refuse a loss that these rollouts cannot serve.

    Raises:
        LossError: it looks at ids that another policy recorded, or at what was not recorded.
        InputsMissing: the policy that the round starts from is not there yet.
        ObjectMissing: a shard is not in the cache.
    """
    loss = context.config.train.loss
    recorded = cell(loss).needs_recorded_topk
    ends = context.config.train.end_round
    ratio = loss.support == "sampled" or loss.reference_kl > 0 or ends.ess is not None
    if not recorded and not ratio:
        return
    policy = context.policy(rollouts.round) if recorded else rollouts.student
    if policy != rollouts.student:
        raise _refusal(
            loss,
            "needs the teacher's log-probs at ids that the live student chose, and these rollouts "
            "are another policy's",
            expected=f"policy {policy[:12]}",
            got=rollouts.student[:12],
        )
    for manifest in context.cache.objects.each(context.cache.need_rollouts, rollouts.shards):
        identity, where = manifest.identity, f"rollout shard {manifest.key[:12]}"
        if recorded and identity.student_topk < loss.k:
            got = f"{identity.student_topk} recorded entries a token"
            raise _refusal(loss, f"with k = {loss.k} needs more than is recorded", where, got=got)
        if ratio and "sampling_logprobs" in identity.absent:
            raise _refusal(
                loss,
                "needs sampling_logprobs: without them nothing can say how far the student is "
                "from the policy that sampled",
                where,
            )


def _refusal(loss: LossConfig, why: str, where: str = "train.loss", **details: str) -> LossError:
    remedy = "take support 'teacher_topk', 'overlap' or 'draws', which any rollouts serve"
    return LossError(f"support {loss.support!r} {why}", where=where, remedy=remedy, **details)
