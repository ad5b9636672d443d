"""What ``opdcache plan`` reads and prints: rates that a user gives, and the costs of a run."""

from typing import Annotated, Literal

from pydantic import Field

from .base import Model
from .rounds import Stage

_Rate = Annotated[float, Field(gt=0, allow_inf_nan=False)]


class Rates(Model):
    """``--rates``: completion tokens a second, of one worker; a stage left out is measured."""

    rollout: _Rate | None = Field(None, description="one rollout worker, engine start excluded")
    score: _Rate | None = Field(None, description="one score worker, model loading excluded")
    train: _Rate | None = Field(None, description="the learner as it is launched, all ranks")


class Measured(Model):
    """A number, and where it comes from."""

    value: float | None = Field(description="None when nothing tells")
    source: str = Field(description="what it was measured on, or how it was estimated")


class StageCost(Model):
    """One stage over the planned rounds."""

    stage: Stage = Field(description="rollout (held-out completions included), score or train")
    unit: Literal["shards", "updates"] = Field(description="what is counted")
    num_units: int = Field(description="shards or updates of the rounds")
    num_done: int = Field(description="those that are made: in the cache, or trained")
    num_tokens: int = Field(description="completion tokens: exact where made, else by the estimate")
    most_tokens: int = Field(description="the same by the upper bound of a completion's length")
    left_tokens: int = Field(description="completion tokens to be made, by the estimate")
    most_left_tokens: int = Field(description="the same by the upper bound")
    size_bytes: int | None = Field(description="stored in the cache; None for train, see disk")
    most_size_bytes: int | None = Field(description="the same by the upper bound")
    tokens_per_s: Measured = Field(description="completion tokens a second of one worker")
    left_s: float | None = Field(description="wall time of what is left; None without a rate")
    most_left_s: float | None = Field(description="the same by the upper bound")


class Prompts(Model):
    """What the rounds ask, counted on the prompts as they are rendered."""

    num_requests: int = Field(description="training completions asked for")
    num_tokens: int = Field(description="prompt tokens, each completion's counted")
    num_held_out_requests: int = Field(description="held-out completions asked for")
    num_held_out_tokens: int = Field(description="their prompt tokens")
    dropped: tuple[dict[str, int], ...] = Field(
        description="training prompts left out of each round that trains, by reason; what is left "
        "out of the source is in every one"
    )
    held_out_dropped: dict[str, int] = Field(description="held-out prompts left out, by reason")


class Reading(Model):
    """What each rank of the learner reads from the cache."""

    update_bytes: int = Field(description="shard bytes of one update's samples")
    bytes_per_s: int | None = Field(description="the same at the train rate; None without one")
    most_shards: int = Field(description="most shards of a round")
    held_shards: int = Field(description="shards that the learner holds in memory")
    reread_bytes: int = Field(
        description="read again an update on average, since shards are read whole and a round has "
        "more than are held; 0 when it has not"
    )


class Disk(Model):
    """What training keeps in the run's folder.

    A student a round stays; of the learner's state the newest alone, which is whole before the one
    before it goes.
    """

    student_bytes: Measured = Field(description="a round's student")
    checkpoint_bytes: Measured = Field(description="the learner's state, all ranks")
    num_students: int = Field(description="students of the planned rounds")
    num_done: int = Field(description="planned rounds that are trained")
    most_bytes: int | None = Field(
        description="at most: these students and two states, or none where a state's size is "
        "unknown; None where that of a student is"
    )
    most_left_bytes: int | None = Field(description="the part of it that is not there yet")
    free_at: str = Field(description="the run's folder, or the nearest above it that is there")
    free_bytes: int = Field(description="free on its file system")


class SharedCost(Model):
    """Teacher time an experiment, when several share scores."""

    num_experiments: int = Field(description="experiments that share")
    all_scores_s: float = Field(description="device-seconds each, when they share every score")
    round_0_s: float = Field(description="device-seconds each, when they share round 0 alone")


class TeacherCost(Model):
    """The teacher's devices for all scores, against a teacher that stays resident.

    Assumed: one device a teacher, and one worker a stage; the resident one scores at the same
    rate, idles while the student samples and trains, and nothing overlaps.
    """

    resident_s: float = Field(description="device-seconds that a resident teacher is held")
    cached_s: float = Field(description="device-seconds of scoring as a job of its own")
    ratio: float = Field(description="the first over the second")
    break_even_start_s: float = Field(
        description="device-seconds a round that starting the cached teacher may take until the "
        "resident one, which is started once, is as cheap"
    )
    shared: tuple[SharedCost, ...] = Field(description="what sharing saves")


class Plan(Model):
    """``opdcache plan --json``: what a run costs, before anything runs."""

    rounds: tuple[int, ...] = Field(description="planned rounds; the last may be held-out alone")
    num_workers: int = Field(description="rollout and score workers")
    prompts: Prompts = Field(description="what is asked")
    stages: tuple[StageCost, ...] = Field(description="rollout, score, train")
    completion_tokens: Measured = Field(description="mean completion length, training")
    held_out_completion_tokens: Measured = Field(description="mean completion length, held-out")
    score_tokens: dict[str, int] = Field(
        description="completion tokens to be scored by task, by the estimate, what is made included"
    )
    rollout_bytes_per_token: Measured = Field(description="stored a completion token")
    score_bytes_per_token: Measured = Field(description="stored a completion token")
    reading: Reading = Field(description="what training reads")
    disk: Disk = Field(description="what training keeps in the run's folder")
    teacher: TeacherCost | None = Field(description="None when a stage has no rate")
    notes: tuple[str, ...] = Field(description="what else a reader of these numbers should know")
