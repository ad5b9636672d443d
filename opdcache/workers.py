"""What the workers of a run say of themselves, in its folder, for whoever asks how far it is."""

import os
import platform
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from importlib.metadata import version
from pathlib import Path
from typing import Literal

from . import documents
from .errors import Interrupted, InvalidShard, OpdcacheError
from .failures import one_line
from .runfolder import RunContext, RunFolder
from .schemas.rounds import Stage
from .schemas.status import WorkerState
from .store.claims import ClaimedProcess

_EVERY_S, _BEAT_S = 2.0, 20.0
_SILENT_S = 5 * _BEAT_S
"""A worker that has said nothing for so long is gone, as far as anybody can tell: machines' clocks
may differ, so this is for people alone."""


@contextmanager
def at_work(context: RunContext, stage: Stage, round_index: int) -> Iterator[RunContext]:
    """The run as a worker sees it whose progress, and whose end, are noted."""
    if os.environ.get("RANK", "0") != "0":
        yield context
        return
    noted = _Noted(context, stage, round_index)
    ended = threading.Event()
    beat = threading.Thread(target=noted.keep_up, args=(ended,), daemon=True)
    beat.start()
    try:
        yield replace(context, progress=noted)
    except BaseException as error:
        ended.set()
        beat.join()
        tries_again = isinstance(error, OpdcacheError) and (
            error.exit_code == Interrupted.exit_code
        )
        noted.write("stopped" if tries_again else "failed", one_line(error))
        raise
    ended.set()
    beat.join()
    if noted.has_begun:
        noted.write("done")


def workers(folder: RunFolder, stage: Stage, round_index: int) -> list[WorkerState]:
    """What the workers of a stage said last, by index."""
    found = []
    for path in _folder(folder, round_index).glob(f"{stage}-*.json"):
        with suppress(InvalidShard):
            state = documents.read(WorkerState, path)
            if state is not None:
                found.append(_as_it_is(state))
    return sorted(found, key=lambda state: state.index)


def _as_it_is(state: WorkerState) -> WorkerState:
    if state.state != "running":
        return state
    process = ClaimedProcess(state.machine, state.pid, state.started)
    silent = datetime.now(UTC) - datetime.fromisoformat(state.said_at)
    if process.is_gone() or silent > timedelta(seconds=_SILENT_S):
        return state.model_copy(update={"state": "gone"})
    return state


def _folder(folder: RunFolder, round_index: int) -> Path:
    return folder.round_path(round_index) / "workers"


class _Noted:
    """Progress that is noted in the run's folder, and shown as before."""

    def __init__(self, context: RunContext, stage: Stage, round_index: int) -> None:
        worker, me = context.worker, ClaimedProcess.this()
        self._shown = context.progress
        self._path = _folder(context.folder, round_index) / f"{stage}-{worker.index}.json"
        self._began = self._noted = time.monotonic()
        self.has_begun = False
        self._state = WorkerState(
            round=round_index,
            stage=stage,
            index=worker.index,
            count=worker.count,
            state="running",
            host=platform.node(),
            pid=me.pid,
            machine=me.machine,
            started=me.started,
            version=version("opdcache"),
            began_at=_now(),
            said_at=_now(),
            elapsed_s=0.0,
        )

    def write(self, state: str = "running", error: str | None = None) -> None:
        """Note how it stands."""
        self._noted = time.monotonic()
        update = {
            "state": state,
            "error": error,
            "said_at": _now(),
            "elapsed_s": round(self._noted - self._began, 3),
        }
        with suppress(OSError):  # a full disk is the work's to tell
            documents.create(self._path, self._state.model_copy(update=update), anew=True)

    def keep_up(self, ended: threading.Event) -> None:
        """Note now and then that it is still at work."""
        while not ended.wait(_BEAT_S):
            if self.has_begun:
                self.write()

    def begin(self, title: str, total: int, unit: str) -> None:
        """See ``Progress``."""
        self.has_begun = True
        self.write()
        self._shown.begin(title, total, unit)

    def advance(self, units: int, tokens: int) -> None:
        """See ``Progress``. What another worker made has no tokens here."""
        if tokens:
            self._state = self._state.model_copy(
                update={
                    "num_units": self._state.num_units + units,
                    "num_tokens": self._state.num_tokens + tokens,
                }
            )
        if time.monotonic() - self._noted >= _EVERY_S:
            self.write()
        self._shown.advance(units, tokens)

    def spent(self, on: Literal["start", "work"], seconds: float) -> None:
        """See ``Progress``."""
        name = f"{on}_s"
        total = round(getattr(self._state, name) + seconds, 3)
        self._state = self._state.model_copy(update={name: total})
        self._shown.spent(on, seconds)

    def say(self, text: str) -> None:
        """See ``Progress``."""
        self._shown.say(text)

    def end(self) -> None:
        """See ``Progress``."""
        self._shown.end()


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="milliseconds")
