"""Which rank of a learner this process is, what it says when another one is gone, and its end."""

import atexit
import os
import re
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from ..errors import RankLost, UsageError

_PORTS = range(20_000, 30_000)


def slurm_ranks(environment: Mapping[str, str]) -> dict[str, str]:
    """Rank variables, as ``torchrun`` sets them, of a task that ``srun`` started beside others.

    Empty where others have set them, and for a single process; a batch script is one, though Slurm
    numbers it too.

    Raises:
        UsageError: nothing says where the first task is.
    """
    get = environment.get
    in_script = "SLURM_JOB_ID" in environment and "SLURM_STEP_ID" not in environment
    if "RANK" in environment or "SLURM_PROCID" not in environment or in_script:
        return {}
    size = get("SLURM_STEP_NUM_TASKS") or get("SLURM_NTASKS") or "1"
    if size == "1":
        return {}
    nodes = get("SLURM_STEP_NODELIST") or get("SLURM_JOB_NODELIST") or get("SLURM_NODELIST") or ""
    address = get("MASTER_ADDR") or first_node(nodes) or get("SLURM_LAUNCH_NODE_IPADDR")
    job = get("SLURM_JOB_ID", "")
    port = get("MASTER_PORT") or (str(_PORTS[int(job) % len(_PORTS)]) if job.isdigit() else None)
    for name, value in (("MASTER_ADDR", address), ("MASTER_PORT", port)):
        if value is None:
            raise UsageError(
                f"{size} tasks of srun do not know where the first is: {name} is not set",
                remedy="export MASTER_ADDR (the first node's name) and MASTER_PORT before srun",
            )
    devices = get("CUDA_VISIBLE_DEVICES", "").count(",") + 1
    local = int(get("SLURM_LOCALID", "0"))
    return {
        "RANK": environment["SLURM_PROCID"],
        "WORLD_SIZE": size,
        # A task may see its own device alone.
        "LOCAL_RANK": str(local % devices if "CUDA_VISIBLE_DEVICES" in environment else local),
        "MASTER_ADDR": str(address),
        "MASTER_PORT": str(port),
    }


def first_node(nodes: str) -> str | None:
    """The first of Slurm's list of nodes, such as ``gpu[003-005,9],login``."""
    return re.sub(r"\[(\w+)[^]]*\]", r"\1", nodes).split(",")[0] or None


@contextmanager
def lost_ranks() -> Iterator[None]:
    """The end of another rank as one line: torch has a traceback for each that is left.

    Raises:
        RankLost: another rank ended.
    """
    try:
        yield
    except RuntimeError as error:
        import torch

        if isinstance(error, torch.distributed.DistError) or "gloo" in str(error):
            said = str(error).strip().splitlines()[:1]
            raise RankLost(
                f"another rank of the learner ended, or is not reached: {' '.join(said)}",
                remedy="its own error says why; else look at MASTER_ADDR and MASTER_PORT",
            ) from error
        raise


def leave(code: int) -> None:
    """End this process with an exit code, if it is a learner's rank; else return.

    Exit hooks run, but the interpreter is not taken down. If a thread of gloo lets go of a tensor
    meanwhile, that aborts the process (pytorch issue 190489), and a launcher takes a round that is
    done for a lost rank.
    """
    from torch import distributed

    if not distributed.is_initialized():
        return
    try:
        if code == 0:
            distributed.destroy_process_group()
        atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()
    finally:
        os._exit(code)
