"""A round's rollouts taken from another run, or from an import, in place of sampling them."""

import time
from pathlib import Path

from ..errors import ConfigError, InputsMissing, ObjectMissing, TokenizerMismatch
from ..outcomes import refuse_unanswered
from ..runfolder import RunContext, RunFolder
from ..schemas.manifests import RolloutManifest
from ..schemas.rounds import RolloutRound
from ..served import refuse_unserved
from ..store.cache import Cache, as_listed


def take(context: RunContext, source: Path, round_index: int) -> RolloutRound:
    """The round file of this run that pins the shards of the other run's round.

    Raises:
        ConfigError: there is no such folder.
        InputsMissing: it has no such round.
        ObjectMissing: a shard is not in this run's cache.
        InvalidShard: a shard is not the one that the other run pinned.
        TokenizerMismatch: its ids are not those of this run's student.
        LossError: the loss needs more than these rollouts have.
        ConfigError: it looks at reference answers, which they lack.
    """
    started = time.monotonic()
    theirs = _theirs(context, source, round_index)
    cache, keys = context.cache, [shard.key for shard in theirs.shards]
    cache.pin(context.resolved.run_id, "rollouts", keys)
    found = cache.committed_rollouts(keys)
    for shard in theirs.shards:
        if shard.key not in found:
            raise ObjectMissing(
                f"a rollout shard of {source} is not in this run's cache",
                where=cache.objects.at(f"commits/rollouts/{shard.key}.json"),
                remedy="bring it there with 'opdcache cache copy', or make it anew at its source",
            )
        if cache.need_rollouts(shard).identity.vocabulary != context.resolved.vocabulary:
            raise TokenizerMismatch(
                "its token ids are not those of this run's student",
                where=f"rollout shard {shard.key[:12]} of {source}",
                remedy="take rollouts of a model with the same tokenizer",
            )
    taken = RolloutRound(
        round=round_index,
        student=theirs.student,
        shards=tuple(as_listed(found[key], cached=True) for key in keys),
        dropped=theirs.dropped,
        elapsed_s=round(time.monotonic() - started, 3),
    )
    refuse_unserved(context, taken)
    loss = context.config.train.loss
    if loss.outcome is not None or loss.sft_weight:
        refuse_unanswered(loss, [a for key in keys for a in _answers(cache, found[key])])
    return taken


def _answers(cache: Cache, manifest: RolloutManifest) -> list[str | None]:
    table = cache.read_rollouts(manifest)
    if "answer" not in table.column_names:
        return [None] * table.num_rows
    answers: list[str | None] = table.column("answer").to_pylist()
    return answers


def _theirs(context: RunContext, source: Path, round_index: int) -> RolloutRound:
    folder = RunFolder(source)
    theirs = folder.find(RolloutRound, round_index)
    if theirs is not None:
        return theirs
    if not source.is_dir() or source == context.folder.path:
        raise ConfigError(
            "no such folder of another run",
            where=f"rollouts.from: {source}",
            remedy="give the output folder of a run, or the --out of 'opdcache cache import'",
        )
    there = 0
    while folder.find(RolloutRound, there) is not None:
        there += 1
    raise InputsMissing(
        f"no rollouts of round {round_index}: {source} has those of {there} rounds, and this run "
        f"of {context.config.rounds} takes them all",
        where=context.folder.path,
        remedy="make them there first, or set 'rounds' to as many",
    )
