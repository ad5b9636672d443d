"""Completions judged in a process of its own, which can be ended.

Scorers of others never end on some texts, raise on others, and a few evaluate what a model wrote.
The process is a new interpreter, fed through a pipe: a fork would take the threads' locks along,
and multiprocessing's spawn would run the caller's main module again, with all that it imports.
"""

import os
import signal
import subprocess
import sys
import threading
import weakref
from collections.abc import Callable
from contextlib import suppress
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from typing import Any

from .errors import EngineError, OpdcacheError

LIMIT_S = 10.0
"""Longest that one completion is worked on."""

_ORPHANED_S = 5.0
"""How much longer a process whose parent is gone goes on."""

Score = Callable[[str, str | None, str], float]
"""Score of a completion's text, given its prompt's reference answer and id."""


class Judge:
    """Scores completions in a process of its own, which starts with the first. Any thread may ask;
    one completion is judged at a time.

    Args:
        make: gives what scores; it is called in the process, so it must pickle.
        limit_s: longest that one completion is worked on.
    """

    def __init__(self, make: Callable[[], Score], limit_s: float = LIMIT_S) -> None:
        self._make, self._limit_s = make, limit_s
        self._lock = threading.Lock()
        self._child: _Child | None = None

    def __call__(self, text: str, answer: str | None, prompt_id: str) -> float | None:
        """The score; None where there is none from 0 to 1: the scorer raised, took too long, or its
        process died. The next completion has a new process then.

        Raises:
            OpdcacheError: one that the scorer raised.
            EngineError: the process does not start.
        """
        with self._lock:
            child, self._child = self._child or _Child(self._make, self._limit_s), None
            try:
                said = child.ask(text, answer, prompt_id)
            except (EOFError, OSError):  # TimeoutError is one
                child.end()
                return None
            except BaseException:  # interrupted: what it says next would be of this completion
                child.end()
                raise
            self._child = child
        if isinstance(said, OpdcacheError):
            raise said
        return said

    def close(self) -> None:
        """End the process, if there is one; it also ends with the judge, and with this process."""
        with self._lock:
            child, self._child = self._child, None
        if child is not None:
            child.end()


class _Child:
    def __init__(self, make: Callable[[], Score], limit_s: float) -> None:
        self._limit_s = limit_s
        self._pipe, theirs = Pipe()
        with theirs:
            process = subprocess.Popen(
                [sys.executable, "-P", "-c", _SERVE, str(theirs.fileno())],
                pass_fds=[theirs.fileno()],
                env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
            )
        self.end = weakref.finalize(self, _end, process, self._pipe)
        try:
            self._pipe.send((make, limit_s))
            error = self._pipe.recv()
        except (EOFError, OSError):
            error = EngineError("the process that verifies ended before it began")
        if error is not None:
            self.end()
            raise error

    def ask(self, *completion: str | None) -> float | OpdcacheError | None:
        """What the process says of a completion.

        Raises:
            TimeoutError: nothing, for too long.
            EOFError, OSError: it has died.
        """
        self._pipe.send(completion)
        if not self._pipe.poll(self._limit_s):
            raise TimeoutError
        said: float | OpdcacheError | None = self._pipe.recv()
        return said


def _end(process: "subprocess.Popen[bytes]", pipe: Connection) -> None:
    process.kill()
    process.wait()
    pipe.close()


_SERVE = "import sys; from opdcache.judging import serve; serve(int(sys.argv[1]))"


def serve(handle: int) -> None:
    """Judge what comes through a pipe until its other end is closed: what the process does."""
    for number in (signal.SIGINT, signal.SIGTERM):  # sent to all of a job: it ends with its parent
        signal.signal(number, signal.SIG_IGN)
    with Connection(handle) as pipe, suppress(EOFError):
        make, limit_s = pipe.recv()
        try:
            score = make()
        except OpdcacheError as error:
            return pipe.send(error)
        except Exception as error:  # others' code, at its start
            named = f"{type(error).__name__}: {error}"
            return pipe.send(EngineError(f"the verifier does not start: {named}"))
        pipe.send(None)
        while True:
            completion = pipe.recv()
            signal.setitimer(signal.ITIMER_REAL, limit_s + _ORPHANED_S)
            pipe.send(_judged(score, completion))
            signal.setitimer(signal.ITIMER_REAL, 0)


def _judged(score: Score, completion: Any) -> float | OpdcacheError | None:
    try:
        given = float(score(*completion))
    except OpdcacheError as error:
        return error
    except Exception:  # others' code, on a text that nobody foresaw
        return None
    return given if 0 <= given <= 1 else None
