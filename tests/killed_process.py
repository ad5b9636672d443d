"""Runs one training stage again and again, and kills it each time at a random moment.

``killed_process.py JOB LOG KILLS``: JOB is a JSON file with one job of ``learner_process.py``, LOG
the run's metrics. The libraries are imported once; every attempt is a process of its own, forked
from this one, which ends by SIGKILL. Exits with 1 when an attempt ends by itself.
"""

import json
import os
import random
import signal
import sys
import time
from pathlib import Path

import deepspeed  # noqa: F401  # imported before any fork
import torch
import torch.utils.tensorboard
from learner_process import carry_out
from transformers import AutoModelForCausalLM, LlamaForCausalLM  # noqa: F401


def killed(job: Path, log: Path, num_updates: int, share: float) -> bool:
    """Whether the process had to be killed: so many logged updates after its start, and then that
    share of the time that the last of them took."""
    goal = logged(log) + num_updates
    started = time.monotonic()
    child = os.fork()
    if child == 0:
        for one in json.loads(job.read_text()):
            carry_out(one)
        os._exit(0)
    while (done := logged(log)) < goal:
        if done < goal - 1:
            started = time.monotonic()
        if os.waitpid(child, os.WNOHANG) != (0, 0):
            return False
        time.sleep(0.002)
    time.sleep(share * (time.monotonic() - started))
    os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    return os.WIFSIGNALED(status)


def logged(log: Path) -> int:
    """Lines of the log."""
    return log.read_text().count("\n") if log.exists() else 0


if __name__ == "__main__":
    torch.set_num_threads(1)
    torch.compile(lambda: None)  # DeepSpeed does; it imports for seconds
    at_random = random.Random(7)
    for _ in range(int(sys.argv[3])):
        num_updates, share = at_random.randint(2, 3), at_random.random()
        if not killed(Path(sys.argv[1]), Path(sys.argv[2]), num_updates, share):
            sys.exit(1)
