"""Carries out a run's plan on this machine, a process a stage.

A stage in a process of its own gives all its memory back before the next model is loaded.
"""

import os
import subprocess
import sys
from pathlib import Path

from ..rounds import steps
from ..runfile import load_run
from ..runfolder import RunFolder
from ..stage import interrupts
from ..store.cache import Cache
from .ranks import ended_by_signal, threads_each


def run(run_file: Path, num_ranks: int | None = None) -> int:
    """Run every stage that is not done, in order; the exit code of the first that fails, or 0.

    Args:
        num_ranks: of each train stage; by default it is a single process.
    """
    config = load_run(run_file)
    assert config.output is not None
    folder = RunFolder(Path(config.output))
    cache = Cache(config.cache)
    left = [s for s in steps(config) if not folder.is_done(config, s.stage, s.round, cache)]
    if not left:
        print(f"all {config.rounds} rounds are done, nothing to do", file=sys.stderr)
    for step in left:
        ranks = num_ranks if step.stage == "train" else None
        options = ["--round", str(step.round), *(["--nproc", str(ranks)] if ranks else [])]
        code = run_command(step.stage, str(run_file), *options, num_processes=ranks or 1)
        if code:
            return code
    return 0


def run_command(*arguments: str, num_processes: int = 1) -> int:
    """One ``opdcache`` command in a process of its own; its exit code.

    A signal that stops this process stops the command first, gracefully.

    Args:
        num_processes: among which the command divides the cores.

    Raises:
        StageError: a signal ended it.
    """
    command = [sys.executable, "-m", "opdcache.cli.main", *arguments]
    # All cores for the one worker: vLLM would otherwise take a single thread.
    threads = {"OMP_NUM_THREADS": str(threads_each(num_processes))}
    process = subprocess.Popen(command, env={**threads, **os.environ})
    with interrupts(process.terminate):
        code = process.wait()
    if code < 0:
        raise ended_by_signal(f"'opdcache {arguments[0]}'", code)
    return code
