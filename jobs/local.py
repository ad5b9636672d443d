"""Carries out a run's jobs on this machine, whose cores and devices the workers share.

A stage in processes of its own gives all its memory back before the next model is loaded.
"""

import os
import subprocess
import sys
import time
from collections.abc import Sequence
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess
from pathlib import Path

from ..errors import Interrupted
from ..runfile import load_run
from ..runfolder import RunFolder
from ..schemas.config import RunConfig
from ..stage import interrupts
from ..store.cache import Cache
from .job import Job, jobs_of
from .processes import Processes
from .ranks import ended_by_signal, threads_each

_LONGEST_PAUSE_S = 30.0
_LOST = 255
"""What multiprocessing says of a process whose end it did not see."""


def run(run_file: Path, num_ranks: int | None = None, num_workers: int | None = None) -> int:
    """Run every stage that is not done, in order; the exit code of the first that fails, or 0.

    Args:
        num_ranks: of each train stage, in the place of ``launch.train.ranks``.
        num_workers: of each rollout and score stage, in the place of ``launch``'s.
    """
    config = load_run(run_file)
    launch = config.launch
    if num_ranks is not None:
        train = launch.train.model_copy(update={"ranks": num_ranks})
        launch = launch.model_copy(update={"train": train})
    if num_workers is not None:
        more = {"workers": num_workers}
        stages = {name: getattr(launch, name).model_copy(update=more) for name in _SHARED}
        launch = launch.model_copy(update=stages)
    config = config.model_copy(update={"launch": launch})
    jobs = jobs_of(config, run_file)
    if not jobs:
        print(f"all {config.rounds} rounds are done, nothing to do", file=sys.stderr)
    return Local(config).launch(jobs)


_SHARED = ("rollout", "score")


class Local:
    """The launcher of one machine. A process that is killed, or says that the same command may
    succeed later, is started again, ``launch.max_restarts`` times a stage."""

    def __init__(self, config: RunConfig) -> None:
        assert config.output is not None
        self._config = config
        self._folder, self._cache = RunFolder(Path(config.output)), Cache(config.cache)
        self._asked = False

    def launch(self, jobs: Sequence[Job]) -> int:
        """See ``Launcher``.

        Raises:
            StageError: a signal ended a process once too often.
        """
        sampled = sum(job.workers for job in jobs if job.step.stage == "rollout")
        processes = Processes(with_vllm=sampled > 1)
        for job in jobs:
            code = self._carry_out(job, processes)
            if code or self._asked:
                return code or Interrupted.exit_code
        return 0

    def _carry_out(self, job: Job, processes: Processes) -> int:
        started: dict[int, BaseProcess] = {}
        restarts, failures = 0, dict[int, int]()

        def stop() -> None:
            self._asked = True
            for process in started.values():
                process.terminate()

        with interrupts(stop):

            def start(index: int) -> None:
                """Start a worker, unless a stop was asked for, which may be while it starts."""
                if not self._asked:
                    started[index] = self._start(job, index, processes)
                if self._asked and index in started:
                    started[index].terminate()

            for index in range(job.workers):
                start(index)
            while started:
                wait([process.sentinel for process in started.values()])
                for index, process in list(started.items()):
                    if process.is_alive():
                        continue
                    process.join()
                    code = process.exitcode or 0
                    del started[index]
                    may = code < 0 or code in (Interrupted.exit_code, _LOST)
                    if may and restarts < self._config.launch.max_restarts and not self._asked:
                        restarts += 1
                        self._say(job, index, code, f"started again, {restarts} of at most "
                                  f"{self._config.launch.max_restarts} times")  # fmt: skip
                        if code > 0:
                            time.sleep(min(2.0 ** (restarts - 1), _LONGEST_PAUSE_S))
                        start(index)
                    elif code:
                        failures[index] = code
        return self._code(job, failures)

    def _code(self, job: Job, failures: dict[int, int]) -> int:
        """The exit code of a job some of whose processes failed."""
        step = job.step
        if self._asked and failures:
            return Interrupted.exit_code
        if failures and self._folder.is_done(self._config, step.stage, step.round, self._cache):
            for index, code in failures.items():
                self._say(job, index, code, "the others finished the stage")
            return 0
        code = next(iter(failures.values()), 0)
        if code < 0:
            raise ended_by_signal(f"'opdcache {step.stage}'", code)
        return code

    def _start(self, job: Job, index: int, processes: Processes) -> BaseProcess:
        ranks = ["--nproc", str(job.ranks)] if job.ranks > 1 else []
        threads = job.resources.cpus or threads_each(job.workers * job.ranks)
        # All cores for the one worker: vLLM would otherwise take a single thread.
        own = {"OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", str(threads))}
        if job.workers > 1 or job.resources.gpus is not None:
            own |= _devices(job, index)
        return processes.start(job.command(index) + ranks, own)

    def _say(self, job: Job, index: int, code: int, then: str) -> None:
        end = f"was ended by signal {-code}" if code < 0 else f"ended with exit code {code}"
        which = f"worker {index}/{job.workers} of " if job.workers > 1 else ""
        said = f"round {job.step.round} {job.step.stage}: {which}'opdcache {job.step.stage}' {end}"
        print(f"{said}; {then}", file=sys.stderr)


def _devices(job: Job, index: int) -> dict[str, str]:
    """The devices of one of the workers: its share of those that this process may use."""
    seen = os.environ.get("CUDA_VISIBLE_DEVICES")
    if seen is not None:
        names = [name for name in seen.split(",") if name]
    else:
        import torch

        names = [str(number) for number in range(torch.accelerator.device_count())]
    if not names:
        return {}
    each = job.resources.gpus
    if each is None:
        each = max(1, len(names) // job.workers)
    first = index * each % len(names)
    return {"CUDA_VISIBLE_DEVICES": ",".join((names * 2)[first : first + each])}


def run_command(*arguments: str) -> int:
    """One ``opdcache`` command in a process of its own; its exit code.

    A signal that stops this process stops the command first, gracefully.

    Raises:
        StageError: a signal ended it.
    """
    command = [sys.executable, "-m", "opdcache.cli.main", *arguments]
    threads = {"OMP_NUM_THREADS": str(threads_each(1))}
    process = subprocess.Popen(command, env={**threads, **os.environ})
    with interrupts(process.terminate):
        code = process.wait()
    if code < 0:
        raise ended_by_signal(f"'opdcache {arguments[0]}'", code)
    return code
