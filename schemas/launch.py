"""The launch part of the run file: how the stages' work is spread. It changes nothing of what comes
out."""

import re
from typing import Annotated, Self

from pydantic import BeforeValidator, Field, model_validator

from .base import Model

_TIME = re.compile(r"(?:(\d+)-)?(\d+):(\d\d)(?::(\d\d))?")


def _seconds(value: object) -> object:
    """``[D-]HH:MM[:SS]`` as seconds; YAML itself reads an unquoted 12:00:00 as seconds."""
    found = _TIME.fullmatch(value) if isinstance(value, str) else None
    if found is None:
        return value
    days, hours, minutes, seconds = (int(part or 0) for part in found.groups())
    return ((days * 24 + hours) * 60 + minutes) * 60 + seconds


class Resources(Model):
    """What a job asks for."""

    gpus: int | None = Field(
        None,
        ge=0,
        description="devices of each worker, or of each node of train; local: by default those "
        "there are, divided; elsewhere none",
    )
    cpus: int | None = Field(
        None, ge=1, description="cores of each worker or rank; local divides those there are"
    )
    memory: str | None = Field(
        None, pattern=r"\d+[KMGT]", description="of each worker or node, such as 64G; not local"
    )
    time_limit: Annotated[int, BeforeValidator(_seconds)] | None = Field(
        None, ge=60, description="wall-clock limit: seconds, or [D-]HH:MM[:SS]; not local"
    )
    slurm: dict[str, bool | str | int] = Field(
        {}, description="more options of sbatch, by long name; over those of launch.slurm.options"
    )


class WorkersLaunch(Resources):
    """Workers of a rollout or score stage."""

    workers: int = Field(1, ge=1, description="workers that share the stage")


class TrainLaunch(Resources):
    """Ranks of a train stage."""

    nodes: int = Field(1, ge=1, description="machines; local and kubernetes: one")
    ranks: int = Field(1, ge=1, description="ranks of the learner on each machine")


class SlurmLaunch(Model):
    """``opdcache submit slurm``."""

    program: str | None = Field(
        None, description="what runs opdcache in a job; by default this installation's Python"
    )
    options: dict[str, bool | str | int] = Field(
        {},
        description="options of sbatch for every job, by long name: partition, account, qos…; true "
        "for one without a value",
    )
    setup: str = Field(
        "", description="shell lines that come first in a job: modules, an environment, variables"
    )
    warn_s: int = Field(
        180,
        ge=1,
        description="seconds before a time limit at which workers drop their shard, and the "
        "learner saves",
    )
    max_requeues: int = Field(
        50, ge=0, description="times that a job puts itself back in the queue"
    )


class KubernetesLaunch(Model):
    """``opdcache submit kubernetes``."""

    image: str = Field(description="container image that has opdcache")
    program: str = Field("opdcache", description="what runs opdcache in it")
    namespace: str = Field("default", description="of the jobs")
    claims: dict[str, str] = Field(
        {}, description="persistent volume claims, and where each is mounted in the containers"
    )
    env: dict[str, str] = Field({}, description="environment variables")
    secrets: tuple[str, ...] = Field(
        (), description="secrets whose keys become environment variables, such as a store's"
    )
    warn_s: int = Field(180, ge=1, description="seconds between SIGTERM and SIGKILL")
    max_retries: int = Field(
        200, ge=0, description="times that an index is tried again; waiting for inputs counts"
    )


class LaunchConfig(Model):
    """How the stages' work is spread over processes and machines."""

    rollout: WorkersLaunch = Field(WorkersLaunch(), description="rollout stages")
    score: WorkersLaunch = Field(WorkersLaunch(), description="score stages")
    train: TrainLaunch = Field(TrainLaunch(), description="train stages")
    max_restarts: int = Field(
        3, ge=0, description="local: times that the processes of a stage are started again"
    )
    templates: str | None = Field(
        None,
        description="folder of your own job templates, in the place of those that come along",
    )
    slurm: SlurmLaunch = Field(SlurmLaunch(), description="for Slurm")
    kubernetes: KubernetesLaunch | None = Field(None, description="for Kubernetes")

    @model_validator(mode="after")
    def _warnings_come_in_time(self) -> Self:
        for name in ("rollout", "score", "train"):
            limit = getattr(self, name).time_limit
            if limit is not None and self.slurm.warn_s + 60 > limit:
                raise ValueError(
                    f"launch.{name}.time_limit: {limit} s leave no time before the warning, which "
                    f"may come a minute earlier than launch.slurm.warn_s = {self.slurm.warn_s} s"
                )
        return self
