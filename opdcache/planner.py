"""What a run costs before anything runs: shards, tokens, bytes, time, and its teacher's share.

``planned`` says what there is to make and what is made, ``measured`` how long, large and fast the
rest will be, ``disk`` what training keeps, ``costs`` has the arithmetic; this puts them together.
"""

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from operator import attrgetter

from . import costs, measured
from .disk import disk
from .errors import ConfigError
from .measured import Evidence
from .planned import Look, Round, Rounds, Shard, look
from .rounds import steps
from .schemas.config import RunConfig
from .schemas.plan import Measured, Plan, Prompts, Rates, Reading, StageCost, TeacherCost
from .schemas.rounds import HeldOutRound, RolloutRound, Stage

HELD_SHARDS = 32
"""Shards that the learner holds decoded: ``train.samples``, which needs torch, has the same."""

ByShard = Callable[[Shard], float]
_tokens: ByShard = attrgetter("num_tokens")
_most: ByShard = attrgetter("most_tokens")


def plan(
    config: RunConfig, given: Rates, *, num_workers: int = 1, round_index: int | None = None
) -> Plan:
    """The costs of a run, or of one round of it.

    Args:
        given: rates that stand in for measured ones.
        num_workers: workers that share the rollout stage, and then the score stage.

    Raises:
        ConfigError: there is no such round.
        ModelError: a model folder is missing or incomplete.
        PromptError: the prompts cannot be read, or none is left.
        RunChanged: the run has begun, with another run file or other models.
    """
    indexes = sorted({step.round for step in steps(config)})
    if round_index is not None and round_index not in indexes:
        raise ConfigError(
            f"there is no round {round_index} in this run", remedy=f"its last one is {indexes[-1]}"
        )
    looked = look(config)
    found = measured.evidence(looked.context)
    rounds = Rounds(looked, found)
    listed = rounds.of(indexes if round_index is None else [round_index])
    trained = [each.index for each in listed if each.index < config.rounds]
    lengths = {kind: rounds.lengths[kind].mean for kind in (RolloutRound, HeldOutRound)}
    basis = _basis(looked, found, given, listed, num_workers)
    return Plan(
        rounds=tuple(each.index for each in listed),
        num_workers=num_workers,
        prompts=_prompts(listed),
        stages=(_rollout(basis), _score(basis), _train(basis)),
        completion_tokens=lengths[RolloutRound],
        held_out_completion_tokens=lengths[HeldOutRound],
        score_tokens=_score_tokens(basis),
        rollout_bytes_per_token=basis.rollout_bytes,
        score_bytes_per_token=basis.score_bytes,
        reading=_reading(basis),
        disk=disk(config.train, looked.context.folder, looked.student, trained),
        teacher=_teacher(basis),
        notes=tuple(_notes(looked, found, rounds, listed)),
    )


@dataclass(frozen=True, slots=True)
class _Basis:
    """What costs are made of: the rounds, and what a token takes."""

    config: RunConfig
    rounds: Sequence[Round]
    num_workers: int
    rates: dict[Stage, Measured]
    rollout_bytes: Measured
    score_bytes: Measured

    @property
    def training(self) -> list[Shard]:
        """Training shards of all rounds."""
        return [shard for each in self.rounds for shard in each.training]

    @property
    def sampled(self) -> list[Shard]:
        """Training and held-out shards of all rounds."""
        return [shard for each in self.rounds for shard in (*each.training, *each.held_out)]


def _basis(
    looked: Look, found: Evidence, given: Rates, rounds: Sequence[Round], num_workers: int
) -> _Basis:
    context, config = looked.context, looked.context.config
    rates: dict[Stage, Measured] = {
        "rollout": measured.rollout_rate(found, context),
        "score": measured.score_rate(found, context),
        "train": measured.train_rate(found),
    }
    for stage in rates:
        if (value := getattr(given, stage)) is not None:
            rates[stage] = Measured(value=value, source="--rates")
    sampled = [shard for each in rounds for shard in (*each.training, *each.held_out)]
    prompt_tokens = sum(shard.num_prompt_tokens for shard in sampled)
    share = prompt_tokens / max(sum(map(_tokens, sampled)), 1)
    rollout_bytes = measured.rollout_bytes(found, config.rollout.student_topk, share)
    score_bytes = Measured(value=0.0, source="nothing is scored")
    if config.scores:
        score_bytes = measured.score_bytes(found, context)
    return _Basis(config, rounds, num_workers, rates, rollout_bytes, score_bytes)


def _rollout(basis: _Basis) -> StageCost:
    shards = [[*each.training, *each.held_out] for each in basis.rounds]
    return _of_shards("rollout", basis, shards, attrgetter("rollout_bytes"), basis.rollout_bytes)


def _score(basis: _Basis) -> StageCost:
    models = 1 + len(basis.config.references) if basis.config.scores else 0
    shards = [list(each.training) * models for each in basis.rounds]
    return _of_shards("score", basis, shards, attrgetter("score_bytes"), basis.score_bytes)


def _of_shards(
    stage: Stage,
    basis: _Basis,
    rounds: Sequence[Sequence[Shard]],
    stored: Callable[[Shard], int | None],
    per_token: Measured,
) -> StageCost:
    """A stage whose workers share a round's shards; a round begins when the one before is done."""
    every = [shard for shards in rounds for shard in shards]
    left = [[shard for shard in shards if stored(shard) is None] for shards in rounds]
    rate = basis.rates[stage]

    def size(tokens: ByShard) -> int:
        return round(sum(_size(stored(s), tokens(s), per_token) for s in every))

    def wall(tokens: ByShard) -> float | None:
        if rate.value is None:
            return None if any(left) else 0.0
        turns = (costs.makespan(map(tokens, shards), basis.num_workers) for shards in left)
        return sum(turns) / rate.value

    return StageCost(
        stage=stage,
        unit="shards",
        num_units=len(every),
        num_done=len(every) - sum(map(len, left)),
        num_tokens=round(sum(map(_tokens, every))),
        most_tokens=round(sum(map(_most, every))),
        left_tokens=round(sum(_tokens(s) for shards in left for s in shards)),
        most_left_tokens=round(sum(_most(s) for shards in left for s in shards)),
        size_bytes=size(_tokens),
        most_size_bytes=size(_most),
        tokens_per_s=rate,
        left_s=wall(_tokens),
        most_left_s=wall(_most),
    )


def _size(stored: int | None, num_tokens: float, per_token: Measured) -> float:
    return num_tokens * (per_token.value or 0.0) if stored is None else stored


def _train(basis: _Basis) -> StageCost:
    rate, epochs = basis.rates["train"], basis.config.train.epochs
    num_updates = sum(each.num_updates for each in basis.rounds)
    num_done = sum(each.updates_done for each in basis.rounds)

    def total(tokens: ByShard) -> float:
        return sum(map(tokens, basis.training)) * epochs

    def left(tokens: ByShard) -> float:
        return sum(
            sum(map(tokens, each.training)) * epochs * (1 - each.updates_done / each.num_updates)
            for each in basis.rounds
            if each.num_updates
        )

    def wall(tokens: ByShard) -> float | None:
        if rate.value is None:
            return None if num_done < num_updates else 0.0
        return left(tokens) / rate.value

    return StageCost(
        stage="train",
        unit="updates",
        num_units=num_updates,
        num_done=num_done,
        num_tokens=round(total(_tokens)),
        most_tokens=round(total(_most)),
        left_tokens=round(left(_tokens)),
        most_left_tokens=round(left(_most)),
        size_bytes=None,
        most_size_bytes=None,
        tokens_per_s=rate,
        left_s=wall(_tokens),
        most_left_s=wall(_most),
    )


def _prompts(rounds: Sequence[Round]) -> Prompts:
    training = [shard for each in rounds for shard in each.training]
    held_out = [shard for each in rounds for shard in each.held_out]
    return Prompts(
        num_requests=sum(shard.num_rows for shard in training),
        num_tokens=sum(shard.num_prompt_tokens for shard in training),
        num_held_out_requests=sum(shard.num_rows for shard in held_out),
        num_held_out_tokens=sum(shard.num_prompt_tokens for shard in held_out),
        dropped=tuple(each.dropped for each in rounds if each.training),
        held_out_dropped=rounds[0].held_out_dropped,
    )


def _score_tokens(basis: _Basis) -> dict[str, int]:
    """Completion tokens that teachers score, by task: each may have one of its own."""
    by_task: defaultdict[str, float] = defaultdict(float)
    for shard in basis.training if basis.config.scores else ():
        by_task[shard.task] += shard.num_tokens
    return {task: round(tokens) for task, tokens in sorted(by_task.items())}


def _reading(basis: _Basis) -> Reading:
    """What a rank reads: shards of rollouts and scores, whole, some of them more than once."""
    shards, rate = basis.training, basis.rates["train"].value
    size = sum(
        _size(s.rollout_bytes, s.num_tokens, basis.rollout_bytes)
        + _size(s.score_bytes, s.num_tokens, basis.score_bytes)
        for s in shards
    )
    num_samples, num_tokens = sum(s.num_rows for s in shards), sum(map(_tokens, shards))
    batch = basis.config.train.batch_samples
    most = max(len(each.training) for each in basis.rounds)
    again = costs.reread_samples(batch, most, HELD_SHARDS) * size / max(len(shards), 1)
    return Reading(
        update_bytes=round(batch * size / max(num_samples, 1)),
        bytes_per_s=None if rate is None else round(rate * size / max(num_tokens, 1)),
        most_shards=most,
        held_shards=HELD_SHARDS,
        reread_bytes=round(again),
    )


def _teacher(basis: _Basis) -> TeacherCost | None:
    """The teacher's share, as if nothing were made; None when a stage has no rate."""
    rollout, score, train = (basis.rates[stage].value for stage in ("rollout", "score", "train"))
    scored = sum(map(_tokens, basis.training))
    if not (rollout and score and train and scored and basis.config.scores):
        return None
    first = sum(_tokens(s) for each in basis.rounds if not each.index for s in each.training)
    return costs.teacher_cost(
        rollout_s=sum(map(_tokens, basis.sampled)) / rollout,
        score_s=scored / score,
        train_s=scored * basis.config.train.epochs / train,
        round_0_s=first / score,
        num_rounds=sum(1 for each in basis.rounds if each.training),
    )


def _notes(looked: Look, found: Evidence, rounds: Rounds, listed: Sequence[Round]) -> Iterator[str]:
    if looked.is_blind:
        yield "the models are not on this machine: what the cache has is not counted"
    unknown = [r.index for r in listed if r.training and r.index >= rounds.first_unknown]
    if unknown:
        yield (
            f"shards from round {unknown[0]} on hang on students that do not exist yet: "
            "all are counted as to be made"
        )
    for reason, count in found.left_out.items():
        yield f"left out of what is measured: {count:,} {reason}"
