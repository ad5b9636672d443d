"""How far a run is: what workers say of themselves, and what ``opdcache status --json`` prints."""

from typing import Literal

from pydantic import Field

from .base import Model
from .manifests import Kind
from .rounds import Stage


class Failure(Model):
    """``failures/<kind>/<key>.<n>.json``: a failed try at a shard."""

    kind: Kind = Field(description="of the shard")
    key: str = Field(description="of the shard")
    error: str = Field(description="its first line")
    host: str = Field(description="machine of the worker")
    at: str = Field(description="when, in UTC")


class WorkerState(Model):
    """``rounds/NNN/workers/STAGE-I.json``: what a worker of a stage says of itself."""

    round: int = Field(description="index of the round")
    stage: Stage = Field(description="what it works at")
    index: int = Field(description="which worker of the stage; of train, the first rank speaks")
    count: int = Field(description="workers of the stage")
    state: Literal["running", "done", "stopped", "failed", "gone"] = Field(
        description="stopped: asked to, or to be tried again; gone: its process ended unsaid"
    )
    host: str = Field(description="machine that it runs on")
    pid: int = Field(description="its process")
    machine: str = Field("", description="boot and process-number space, to tell whether it lives")
    started: str = Field("", description="start time of the process there, in kernel ticks")
    version: str = Field(description="of opdcache")
    began_at: str = Field(description="when it began, in UTC")
    said_at: str = Field(description="when it said this, in UTC")
    elapsed_s: float = Field(description="seconds since it began")
    start_s: float = Field(0.0, description="seconds of these in which engines started")
    work_s: float = Field(0.0, description="seconds of these in which units were made")
    num_units: int = Field(0, description="shards or updates that it made")
    num_tokens: int = Field(0, description="completion tokens in them")
    error: str | None = Field(None, description="last line of what stopped it")

    @property
    def tokens_per_s(self) -> float:
        """Since it began, its start included."""
        return self.num_tokens / max(self.elapsed_s, 1e-9)


class StageStatus(Model):
    """How far a stage of a round is."""

    round: int = Field(description="index of the round")
    stage: Stage = Field(description="rollout, score or train")
    state: Literal["done", "under way", "waiting", "to redo"] = Field(
        description="to redo: a shard of it was put aside"
    )
    unit: Literal["shards", "updates"] = Field("shards", description="held-out shards included")
    done: int = Field(0, description="units made")
    total: int = Field(0, description="units in all; 0 while it is not known")
    cached: int = Field(0, description="shards of a finished stage that another run had made")
    num_tokens: int = Field(0, description="completion tokens of a finished stage")
    elapsed_s: float | None = Field(None, description="seconds of the worker that finished it")
    failed: dict[str, str] = Field({}, description="shards set aside, and the last error of each")
    workers: tuple[WorkerState, ...] = Field((), description="by index")
    tokens_per_s: float | None = Field(None, description="of all running workers; None: none runs")
    left_s: float | None = Field(None, description="estimate; None while nothing tells")


class RunStatus(Model):
    """``opdcache status --json``."""

    run_id: str | None = Field(description="None: the run has not begun")
    stages: tuple[StageStatus, ...] = Field(description="in order")
    failures: tuple[Failure, ...] = Field(description="failed tries at shards, oldest first")

    @property
    def is_done(self) -> bool:
        """Whether nothing is left."""
        return all(stage.state == "done" for stage in self.stages)
