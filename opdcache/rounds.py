"""A run's plan: which stages of which rounds there are, what is done, what is next."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from .runfolder import RunFolder, stage_files
from .schemas.config import RunConfig
from .schemas.rounds import STAGES, HeldOutRound, RolloutRound, ScoreRound, Stage, TrainRound
from .store.cache import Cache


@dataclass(frozen=True, slots=True)
class Step:
    """One stage of one round."""

    round: int
    stage: Stage


@dataclass(frozen=True, slots=True)
class StageStatus:
    """How far a stage of a round is.

    Attributes:
        state: done, under way, waiting, or "to redo": a shard of it was put aside.
        unit: what is counted: shards, held-out ones included, or updates.
        done, total: counts; total is 0 while it is not known.
        cached: shards of a finished stage that another run had made.
        num_tokens: completion tokens of a finished stage.
        elapsed_s: seconds that the finishing worker spent.
    """

    step: Step
    state: str
    unit: str = "shards"
    done: int = 0
    total: int = 0
    cached: int = 0
    num_tokens: int = 0
    elapsed_s: float | None = None


def steps(config: RunConfig) -> Iterator[Step]:
    """Every stage of the run, in order.

    With an evaluation, the last student is sampled once more, on held-out prompts alone.
    """
    for round_index in range(config.rounds):
        for stage in STAGES:
            yield Step(round_index, stage)
    if config.evaluation is not None:
        yield Step(config.rounds, "rollout")


def status(config: RunConfig) -> list[StageStatus]:
    """Every stage of a run, from its files and the cache's commits; loads no model."""
    assert config.output is not None
    folder, cache = RunFolder(Path(config.output)), Cache(config.cache)
    return [_status(folder, config, step, cache) for step in steps(config)]


def _status(folder: RunFolder, config: RunConfig, step: Step, cache: Cache) -> StageStatus:
    files = [folder.find(kind, step.round) for kind in stage_files(config, step.stage, step.round)]
    if all(files) and not folder.is_done(config, step.stage, step.round, cache):
        return StageStatus(step, "to redo")
    match files:
        case [ScoreRound() as found]:
            tokens = sum(s.num_tokens for s in folder.need(RolloutRound, step.round).shards)
            cached = sum(s.cached for s in found.shards)
            return _done(step, "shards", len(found.shards), cached, tokens, found.elapsed_s)
        case [TrainRound() as trained]:
            updates = -(-trained.num_samples // config.train.batch_samples)
            return _done(step, "updates", updates, 0, trained.num_tokens, trained.elapsed_s)
    sampled = [file for file in files if isinstance(file, RolloutRound | HeldOutRound)]
    if len(sampled) < len(files):
        return _unfinished(folder, config, step, cache)
    shards = [shard for file in sampled for shard in file.shards]
    cached, tokens = sum(s.cached for s in shards), sum(s.num_tokens for s in shards)
    return _done(step, "shards", len(shards), cached, tokens, sampled[0].elapsed_s)


def _done(
    step: Step, unit: str, total: int, cached: int, num_tokens: int, elapsed_s: float
) -> StageStatus:
    return StageStatus(step, "done", unit, total, total, cached, num_tokens, elapsed_s)


def _unfinished(folder: RunFolder, config: RunConfig, step: Step, cache: Cache) -> StageStatus:
    if step.stage == "train":
        logged = sum(1 for row in folder.metrics() if row["round"] == step.round)
        if not logged:
            return StageStatus(step, "waiting", "updates")
        total = _num_updates(folder, config, step.round)
        return StageStatus(step, "under way", "updates", logged, total)
    plan = folder.find_plan(stage_files(config, step.stage, step.round)[0], step.round)
    if plan is None:
        return StageStatus(step, "waiting")
    missing = sum(1 for path in plan.missing if cache.objects.info(path) is None)
    return StageStatus(step, "under way", "shards", plan.num_shards - missing, plan.num_shards)


def _num_updates(folder: RunFolder, config: RunConfig, round_index: int) -> int:
    trained = (folder.need(RolloutRound, i) for i in config.train.trained_rounds(round_index))
    samples = sum(shard.num_rows for rollouts in trained for shard in rollouts.shards)
    return -(-samples * config.train.epochs // config.train.batch_samples)
