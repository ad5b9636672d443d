"""A run's plan: which stages of which rounds there are, what is done, what is next."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from .runfolder import RunFolder, stage_files
from .schemas.config import RunConfig
from .schemas.rounds import STAGES, HeldOutRound, RolloutRound, ScoreRound, Stage, TrainRound
from .schemas.status import RunStatus, StageStatus
from .store.cache import Cache
from .workers import workers


@dataclass(frozen=True, slots=True)
class Step:
    """One stage of one round."""

    round: int
    stage: Stage


def steps(config: RunConfig) -> Iterator[Step]:
    """Every stage of the run, in order.

    With an evaluation, the last student is sampled once more, on held-out prompts alone.
    """
    for round_index in range(config.rounds):
        for stage in STAGES:
            yield Step(round_index, stage)
    if config.evaluation is not None:
        yield Step(config.rounds, "rollout")


def status(config: RunConfig) -> RunStatus:
    """How far a run is, from its files and the cache's commits; loads no model."""
    assert config.output is not None
    folder, cache = RunFolder(Path(config.output), writes=False), Cache.there(config.cache)
    resolved = folder.resolved()
    return RunStatus(
        run_id=None if resolved is None else resolved.run_id,
        stages=tuple(_status(folder, config, step, cache) for step in steps(config)),
        failures=tuple(folder.failures.every()),
    )


def _status(folder: RunFolder, config: RunConfig, step: Step, cache: Cache) -> StageStatus:
    files = [folder.find(kind, step.round) for kind in stage_files(config, step.stage, step.round)]
    at_it = tuple(workers(folder, step.stage, step.round))
    of = StageStatus(round=step.round, stage=step.stage, state="waiting", workers=at_it)
    if all(files) and not folder.is_done(config, step.stage, step.round, cache):
        return _with(of, state="to redo")
    match files:
        case [ScoreRound() as found]:
            pairs = zip(folder.scored(step.round)[0].shards, found.shards, strict=True)
            tokens = sum(sampled.num_tokens for sampled, scored in pairs if scored.served)
            cached = sum(s.cached for s in found.shards)
            of = _with(of, num_tokens=tokens, cached=cached, failed=found.failed)
            return _done(of, len(found.shards), found.elapsed_s)
        case [TrainRound() as trained]:
            of = _with(of, unit="updates", num_tokens=trained.num_tokens)
            updates = -(-trained.num_samples // config.train.batch_samples)
            return _done(of, updates, trained.elapsed_s)
    sampled = [file for file in files if isinstance(file, RolloutRound | HeldOutRound)]
    if len(sampled) < len(files):
        return _unfinished(folder, config, of, cache)
    listed = [shard for file in sampled for shard in file.shards]
    of = _with(
        of,
        cached=sum(s.cached for s in listed),
        num_tokens=sum(s.num_tokens for s in listed),
        failed=sampled[0].failed if isinstance(sampled[0], RolloutRound) else {},
    )
    return _done(of, len(listed), sampled[0].elapsed_s)


def _with(status: StageStatus, **changes: object) -> StageStatus:
    return status.model_copy(update=changes)


def _done(of: StageStatus, total: int, elapsed_s: float) -> StageStatus:
    return _with(of, state="done", done=total, total=total, elapsed_s=elapsed_s)


def _unfinished(folder: RunFolder, config: RunConfig, of: StageStatus, cache: Cache) -> StageStatus:
    if of.stage == "train":
        of = _with(of, unit="updates")
        logged = sum(1 for row in folder.metrics() if row["round"] == of.round)
        if not logged:
            return of
        total = _num_updates(folder, config, of.round)
        return _under_way(of, logged, total)
    plan = folder.find_plan(stage_files(config, of.stage, of.round)[0], of.round)
    if plan is None:
        return of
    missing = cache.objects.each(cache.objects.info, plan.missing).count(None)
    return _under_way(of, plan.num_shards - missing, plan.num_shards)


def _under_way(of: StageStatus, done: int, total: int) -> StageStatus:
    """With the rates of the workers that run, their starts included."""
    running = [worker for worker in of.workers if worker.state == "running"]
    units_per_s = sum(w.num_units / max(w.elapsed_s, 1e-9) for w in running)
    return _with(
        of,
        state="under way",
        done=done,
        total=total,
        tokens_per_s=sum(w.tokens_per_s for w in running) if running else None,
        left_s=(total - done) / units_per_s if units_per_s else None,
    )


def _num_updates(folder: RunFolder, config: RunConfig, round_index: int) -> int:
    trained = (folder.scored(i)[0] for i in config.train.trained_rounds(round_index))
    samples = sum(shard.num_rows for rollouts in trained for shard in rollouts.shards)
    return -(-samples * config.train.epochs // config.train.batch_samples)
