"""Starts the ranks of a learner on this machine, and looks after them.

They find each other as under ``torchrun``. That ends all at the first that ends, and exits with 1;
here a stop on request may take its time, the exit code is the ranks' own, and what went wrong is
said once.
"""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import ExitStack
from tempfile import TemporaryFile
from typing import IO

from ..errors import Interrupted, RankLost, StageError, UsageError
from ..stage import interrupts
from .processes import stop_with_parent

_LOOK_S, _SPREAD_S, _END_S = 0.05, 5.0, 30.0
"""Between looks; until a fault has reached the other ranks; until those that it does not end."""


def run_ranks(num_ranks: int, *arguments: str) -> int:
    """One ``opdcache`` command in so many processes, as ranks of a learner; its exit code.

    The first rank speaks; of another one is shown what it said, if the fault began there. A signal
    that stops this process stops the ranks first, gracefully.

    Raises:
        UsageError: this process is itself a rank.
        Interrupted: they were asked to stop before they could do so gracefully.
        RankLost: a signal ended one.
    """
    if "RANK" in os.environ:
        raise UsageError(
            "--nproc within a launcher: RANK is set",
            remedy="leave --nproc away under torchrun, deepspeed or srun",
        )
    from torch.distributed import TCPStore  # type: ignore[attr-defined]

    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    shared = {
        "OMP_NUM_THREADS": str(threads_each(num_ranks)),
        **os.environ,
        "WORLD_SIZE": str(num_ranks),
        "LOCAL_WORLD_SIZE": str(num_ranks),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(store.port),
        "TORCHELASTIC_USE_AGENT_STORE": str(True),
        "TORCHELASTIC_RESTART_COUNT": "0",
    }
    command = [sys.executable, "-m", "opdcache.cli.main", *arguments]
    ranks: list[subprocess.Popen[bytes]] = []
    asked = False

    def stop() -> None:
        nonlocal asked
        asked = True
        for rank in ranks:
            rank.terminate()

    with ExitStack() as stack:
        files = [stack.enter_context(TemporaryFile()) for _ in range(num_ranks - 1)]
        said: list[IO[bytes] | None] = [None, *files]
        with interrupts(stop):
            for number, file in enumerate(said):
                own = {"RANK": str(number), "LOCAL_RANK": str(number)}
                ranks.append(
                    subprocess.Popen(
                        command,
                        env=shared | own,
                        stdout=file,
                        stderr=file,
                        preexec_fn=stop_with_parent,
                    )
                )
            failures = [(rank, code) for rank, code in enumerate(_wait(ranks)) if code]
        if not failures:
            return 0
        cause, code = min(failures, key=lambda f: (f[1] == Interrupted.exit_code, f[0]))
        if code < 0 and asked:
            raise Interrupted("stopped on request", remedy="run the same command to go on")
        if code < 0:
            said_of = ended_by_signal(f"rank {cause} of 'opdcache {arguments[0]}'", code)
            raise RankLost(said_of.what, remedy=said_of.remedy)
        if (file := said[cause]) is not None:
            file.seek(0)
            text = file.read().decode(errors="replace")
            print(f"rank {cause}:\n{text}", end="", file=sys.stderr)
        return code


def _wait(ranks: Sequence["subprocess.Popen[bytes]"]) -> list[int | None]:
    """Exit codes of all ranks; None of those that had to be ended when another one failed."""

    def codes() -> list[int | None]:
        return [rank.poll() for rank in ranks]

    def wait(limit_s: float) -> None:
        until = time.monotonic() + limit_s
        while None in codes() and time.monotonic() < until:
            time.sleep(_LOOK_S)

    while None in codes() and not any(codes()):
        time.sleep(_LOOK_S)
    wait(_SPREAD_S)
    ended = codes()
    for end in ("terminate", "kill"):
        for rank in ranks:
            getattr(rank, end)()
        wait(_END_S)
    return ended


def threads_each(num_processes: int) -> int:
    """Threads for each of so many processes that share this machine's cores."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return max(1, (cores or 1) // num_processes)


def ended_by_signal(what: str, code: int) -> StageError:
    """The error of a process with a negative exit code."""
    return StageError(
        f"{what} was ended by {signal.Signals(-code).name}",
        remedy="run the same command to go on"
        + (", with smaller batches if memory ran out" if -code == signal.SIGKILL else ""),
    )
