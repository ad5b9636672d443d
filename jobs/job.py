"""A run as jobs, and what a launcher is."""

from collections.abc import Container, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from ..rounds import Step, steps
from ..runfolder import RunFolder
from ..schemas.config import RunConfig
from ..schemas.launch import Resources
from ..store.cache import Cache


@dataclass(frozen=True, slots=True)
class Job:
    """One stage of one round, which needs all that stand before it.

    Attributes:
        run_file: absolute.
        workers: processes that share the stage; of train, one.
        nodes, ranks: machines of a train stage, and processes on each; else 1.
        resources: of each worker or node.
    """

    step: Step
    run_file: Path
    workers: int
    nodes: int
    ranks: int
    resources: Resources

    @property
    def name(self) -> str:
        """Names the job to people, and in a scheduler."""
        return f"{self.run_file.stem}-{self.step.round:03d}-{self.step.stage}"

    def command(self, worker: int | str) -> list[str]:
        """What a worker runs, without the program's name.

        Args:
            worker: its index, or what becomes that in a script.
        """
        common = [self.step.stage, str(self.run_file), "--round", str(self.step.round)]
        shared = ["--worker", f"{worker}/{self.workers}"] if self.workers > 1 else []
        return common + shared


class Launcher(Protocol):
    """Carries out jobs in order, or hands them to what will."""

    def launch(self, jobs: Sequence[Job]) -> int:
        """An exit code: 0, or that of the first job that failed."""


def jobs_of(config: RunConfig, run_file: Path, rounds: Container[int] | None = None) -> list[Job]:
    """The jobs that a run has left, in order.

    Args:
        rounds: only of these rounds.
    """
    assert config.output is not None
    folder, cache = RunFolder(Path(config.output)), Cache.there(config.cache)
    chosen = [s for s in steps(config) if rounds is None or s.round in rounds]
    left = [s for s in chosen if not folder.is_done(config, s.stage, s.round, cache)]
    return [_job(config, run_file.resolve(), step) for step in left]


def _job(config: RunConfig, run_file: Path, step: Step) -> Job:
    train = config.launch.train
    if step.stage == "train":
        return Job(step, run_file, 1, train.nodes, train.ranks, train)
    launch = config.launch.rollout if step.stage == "rollout" else config.launch.score
    return Job(step, run_file, launch.workers, 1, 1, launch)
