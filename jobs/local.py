"""Carries out a run's plan on this machine, a process a stage.

A stage in a process of its own gives all its memory back before the next model is loaded.
"""

import os
import signal
import subprocess
import sys
from pathlib import Path

from ..errors import StageError
from ..rounds import steps
from ..runfile import load_run
from ..runfolder import RunFolder
from ..stage import interrupts
from ..store.cache import Cache


def run(run_file: Path) -> int:
    """Run every stage that is not done, in order; the exit code of the first that fails, or 0."""
    config = load_run(run_file)
    assert config.output is not None
    folder = RunFolder(Path(config.output))
    cache = Cache(config.cache)
    left = [s for s in steps(config) if not folder.is_done(config, s.stage, s.round, cache)]
    if not left:
        print(f"all {config.rounds} rounds are done, nothing to do", file=sys.stderr)
    for step in left:
        code = run_command(step.stage, str(run_file), "--round", str(step.round))
        if code:
            return code
    return 0


def run_command(*arguments: str) -> int:
    """One ``opdcache`` command in a process of its own; its exit code.

    A signal that stops this process stops the command first, gracefully.

    Raises:
        StageError: a signal ended it.
    """
    command = [sys.executable, "-m", "opdcache.cli.main", *arguments]
    process = subprocess.Popen(command, env=_environment())
    with interrupts(process.terminate):
        code = process.wait()
    if code < 0:
        raise StageError(
            f"'opdcache {arguments[0]}' was ended by {signal.Signals(-code).name}",
            remedy="run the same command to go on"
            + (", with smaller batches if memory ran out" if -code == signal.SIGKILL else ""),
        )
    return code


def _environment() -> dict[str, str]:
    """All cores for the one worker: vLLM would otherwise take a single thread."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return {"OMP_NUM_THREADS": str(cores or 1), **os.environ}
