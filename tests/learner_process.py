"""Runs training stages one after another in a process of their own.

``learner_process.py JOBS LIMIT_S``: exits with a traceback of every thread at the time limit.

JOBS is a JSON file: a list of objects with ``config`` (a run's configuration), ``round``,
``stop_after`` (updates after which the process sends itself SIGTERM, or null), ``stop_rank``
(the one rank that does; null for every rank), ``poisoned`` (samples whose weights in the loss are
infinite) and ``fails`` (words of the error that it must end with, or null).
"""

import faulthandler
import json
import os
import signal
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch._dynamo.utils import counters

from opdcache.errors import EngineError, Interrupted
from opdcache.runfolder import RunContext, RunFolder
from opdcache.schemas.config import RunConfig
from opdcache.schemas.rounds import Resolved
from opdcache.stage import Silent, Worker
from opdcache.store.cache import Cache
from opdcache.train.microbatch import MicroBatch
from opdcache.train.ranks import leave
from opdcache.train.samples import RoundSamples
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


def right(text: str, answer: str) -> float:
    """Reward of a completion."""
    return float(text == answer)


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
    compiled = counters["frames"]["ok"]
    try:
        with poisoned(set(job["poisoned"])):
            run(context, job["round"])
    except Interrupted:
        assert job["stop_after"] is not None
    except EngineError as error:
        if not job["fails"] or not all(word in str(error) for word in job["fails"]):
            raise
    else:
        assert job["stop_after"] is None
        assert job["fails"] is None
    assert (counters["frames"]["ok"] > compiled) == config.train.compile


@contextmanager
def poisoned(bad: set[int]) -> Iterator[None]:
    """Within the block these samples' tokens weigh infinitely much."""
    collate = RoundSamples.collate

    def with_bad(self: RoundSamples, samples: Sequence[int]) -> MicroBatch:
        batch = collate(self, samples)
        hit = torch.tensor([sample in bad for sample in samples])[batch.sequences_T]
        return replace(batch, weights_T=batch.weights_T.masked_fill(hit, torch.inf))

    RoundSamples.collate = with_bad  # type: ignore[method-assign]
    try:
        yield
    finally:
        RoundSamples.collate = collate  # type: ignore[method-assign]


if __name__ == "__main__":
    faulthandler.dump_traceback_later(float(sys.argv[2]), exit=True)
    torch.set_num_threads(1)
    for one in json.loads(Path(sys.argv[1]).read_text()):
        carry_out(one)
    leave(0)
