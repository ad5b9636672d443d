"""A worker's lease on a shard, without synchronised clocks and without conditional updates.

A claim is an object ``claims/<kind>/<key>.<n>``, made by exclusive create. Its holder rewrites it
with a new nonce while it works. An observer takes it for dead when its ETag has stood still for
the lease time on the observer's own monotonic clock, or at once when the holder's process is known
to be gone on this machine. Takeover is the exclusive create of generation ``n + 1``.

A claim only saves work. What makes a shard unique is the exclusive create of its manifest, so a
holder that sleeps through its lease and comes back loses the commit and nothing else.
"""

import json
import os
import secrets
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

from ..errors import ObjectMissing, StoreError
from ..identity import canonical_json
from .objects import ObjectInfo, ObjectStore


@dataclass(frozen=True, slots=True)
class ClaimedProcess:
    """Who holds a claim, as far as another process on the same machine can check it."""

    machine: str
    pid: int
    started: str

    @classmethod
    def this(cls) -> "ClaimedProcess":
        """The calling process."""
        return cls(_machine(), os.getpid(), _start_time(os.getpid()))

    def is_gone(self) -> bool:
        """Whether the process is known to have ended: True only on its own machine."""
        here = bool(self.machine) and self.machine == _machine()
        return here and _start_time(self.pid) != self.started


def _machine() -> str:
    """Boot and process-number space: two processes that share it can see one another."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return ""


def _start_time(pid: int) -> str:
    """Start time of a process in kernel ticks; empty when there is none."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]
    except OSError:
        return ""


@dataclass
class Claims:
    """Takes and observes claims on one store.

    Args:
        objects: the cache's store.
        lease_s: seconds without a heartbeat after which a claim is dead.
        clock: monotonic seconds.
    """

    objects: ObjectStore
    lease_s: float = 60.0
    clock: Callable[[], float] = time.monotonic
    _seen: dict[str, tuple[str | None, float]] = field(default_factory=dict)
    _holders: dict[str, tuple[str | None, ClaimedProcess]] = field(default_factory=dict)

    @contextmanager
    def hold(self, kind: str, key: str) -> Iterator[bool]:
        """Hold a key's claim for the block; gives False, without waiting, when another does."""
        path = self._take(kind, key)
        if path is None:
            yield False
            return
        stop = threading.Event()
        beat = threading.Thread(target=self._heartbeat, args=(path, stop), daemon=True)
        beat.start()
        try:
            yield True
        finally:
            stop.set()
            beat.join()
            self.objects.delete(path)

    def clear(self, kind: str, keys: Iterable[str], *, dead_only: bool = False) -> None:
        """Delete the claims of keys whose work is done: of workers that were killed before they
        could.

        Args:
            dead_only: only those whose holder is known to be gone, since the key may be claimed
                for other work.
        """
        done = set(keys)
        for claim in list(self.objects.list(f"claims/{kind}")):
            if _key(claim) not in done:
                continue
            with suppress(StoreError):
                if not dead_only or self._is_dead(claim):
                    self.objects.delete(claim.path)

    def held(self, kind: str) -> set[str]:
        """Keys of the claims that are not known to be dead, from one listing."""
        by_key: dict[str, list[ObjectInfo]] = {}
        for claim in self.objects.list(f"claims/{kind}"):
            by_key.setdefault(_key(claim), []).append(claim)
        newest = {key: max(claims, key=_generation) for key, claims in by_key.items()}
        return {key for key, claim in newest.items() if not self._is_dead(claim)}

    def _take(self, kind: str, key: str) -> str | None:
        listed = self.objects.list(f"claims/{kind}")
        held = sorted((o for o in listed if _key(o) == key), key=_generation)
        if held and not self._is_dead(held[-1]):
            return None
        path = f"claims/{kind}/{key}.{_generation(held[-1]) + 1 if held else 0}"
        if not self.objects.create(path, _body()):
            return None
        for dead in held:
            with suppress(StoreError):  # another user's, where the folder lets nobody delete those
                self.objects.delete(dead.path)
        return path

    def _is_dead(self, claim: ObjectInfo) -> bool:
        now = self.clock()
        etag, since = self._seen.get(claim.path, (None, now))
        if etag != claim.etag:
            since = now
        self._seen[claim.path] = (claim.etag, since)
        if now - since >= self.lease_s:
            return True
        try:
            known, holder = self._holders.get(claim.path, (None, None))
            if holder is None or known != claim.etag:  # a path is taken again, by another
                read = json.loads(self.objects.get(claim.path))["process"]
                holder = ClaimedProcess(**read)
                self._holders[claim.path] = (claim.etag, holder)
            return holder.is_gone()
        except (ObjectMissing, ValueError, KeyError, TypeError):
            return False

    def _heartbeat(self, path: str, stop: threading.Event) -> None:
        while not stop.wait(self.lease_s / 4):
            try:
                self.objects.put(path, _body())
            except StoreError:
                continue  # the lease outlasts a few lost beats; the commit decides in any case


def _key(claim: ObjectInfo) -> str:
    return claim.path.rpartition("/")[2].rpartition(".")[0]


def _generation(claim: ObjectInfo) -> int:
    return int(claim.path.rpartition(".")[2])


def _body() -> bytes:
    me = ClaimedProcess.this()
    process = {"machine": me.machine, "pid": me.pid, "started": me.started}
    return canonical_json({"nonce": secrets.token_hex(8), "process": process})
