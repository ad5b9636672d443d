"""Runs training stages one after another in a process of their own.

``learner_process.py JOBS LIMIT_S``: exits with a traceback of every thread at the time limit.

JOBS is a JSON file: a list of objects with ``config`` (a run's configuration), ``round``,
``stop_after`` (updates after which the process sends itself SIGTERM, or null) and ``stop_rank``
(the one rank that does; null for every rank).
"""

import faulthandler
import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

import torch

from opdcache.errors import Interrupted
from opdcache.runfolder import RunContext, RunFolder
from opdcache.schemas.config import RunConfig
from opdcache.schemas.rounds import Resolved
from opdcache.stage import Silent, Worker
from opdcache.store.cache import Cache
from opdcache.train.stage import run


class StopsItself(Silent):
    """Asks this process to stop, once, when enough updates are done."""

    def __init__(self, after: int | None) -> None:
        self._after, self._done = after, 0

    def advance(self, units: int, tokens: int) -> None:
        """Count the updates."""
        self._done += units
        if self._done == self._after:
            os.kill(os.getpid(), signal.SIGTERM)


def carry_out(job: dict[str, Any]) -> None:
    """Train one round, or as far as the job says."""
    rank = int(os.environ.get("RANK", "0"))
    config = RunConfig.model_validate_json(json.dumps(job["config"]))
    assert config.output is not None
    resolved = Resolved(
        run_id="run",
        opdcache="0",
        config=config,
        student="student",
        teacher="teacher",
        vocabulary="vocabulary",
        tokenizers="tokenizers",
        vocab_size=258,
    )
    context = RunContext(
        resolved,
        RunFolder(Path(config.output)),
        Cache(config.cache),
        StopsItself(job["stop_after"] if job["stop_rank"] in (None, rank) else None),
        Worker(),
    )
    try:
        run(context, job["round"])
    except Interrupted:
        assert job["stop_after"] is not None
    else:
        assert job["stop_after"] is None


if __name__ == "__main__":
    faulthandler.dump_traceback_later(float(sys.argv[2]), exit=True)
    torch.set_num_threads(1)
    for one in json.loads(Path(sys.argv[1]).read_text()):
        carry_out(one)
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
