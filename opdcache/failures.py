"""Shards that fail again and again: counted in the run's folder, and set aside.

A failure is an error that making a shard raised. That a worker was killed is none: preemption is
not the shard's fault. Nor are the store's errors, or a model that cannot be loaded.
"""

import platform
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from pydantic import ValidationError

from .documents import create
from .errors import EngineError, OpdcacheError, ShardsFailed
from .schemas.manifests import Kind
from .schemas.status import Failure

TRIES = 3
"""A shard that has failed so often is set aside."""


def is_the_shards_own(error: Exception) -> bool:
    """Whether an error speaks against the shard that was being made, not the run or the store."""
    if isinstance(error, OpdcacheError):
        return isinstance(error, EngineError)
    return not isinstance(error, OSError)


def breaks_the_process(error: Exception) -> bool:
    """Whether nothing that this process asks of its device will succeed any more, as after a
    device-side assertion. Running out of memory is not of that kind."""
    return type(error).__name__ == "AcceleratorError" or "CUDA error" in str(error)


def one_line(error: BaseException) -> str:
    """An error's class and what it says first, or the message of one of ours."""
    if isinstance(error, OpdcacheError):
        return f"{error} [{error.code}]"
    said = str(error).strip().splitlines()
    return f"{type(error).__name__}: {said[0]}" if said else type(error).__name__


@dataclass(frozen=True, slots=True)
class Failures:
    """Failed tries of a run, a file each: ``RUN/failures/<kind>/<key>.<n>.json``."""

    folder: Path

    def note(self, kind: Kind, key: str, error: Exception) -> int:
        """Count a failed try; how many there are now."""
        failure = Failure(
            kind=kind,
            key=key,
            error=one_line(error),
            host=platform.node(),
            at=datetime.now(UTC).isoformat(timespec="seconds"),
        )
        number = 0
        while not create(self.folder / kind / f"{key}.{number}.json", failure):
            number += 1
        return number + 1

    def every(self) -> list[Failure]:
        """All failed tries, oldest first."""
        found = []
        for path in self.folder.glob("*/*.json"):
            with suppress(OSError, ValidationError):
                found.append(Failure.model_validate_json(path.read_bytes()))
        return sorted(found, key=lambda failure: failure.at)

    def aside(self, kind: Kind, keys: Iterable[str]) -> dict[str, str]:
        """Those of the keys that are set aside, and the last error of each."""
        wanted, tries = set(keys), dict[str, list[str]]()
        for failure in self.every():
            if failure.kind == kind and failure.key in wanted:
                tries.setdefault(failure.key, []).append(failure.error)
        return {key: errors[-1] for key, errors in tries.items() if len(errors) >= TRIES}

    def refuse(self, aside: Mapping[str, str], most: int, num_shards: int, where: str) -> None:
        """Stop where more shards are set aside than ``max_failed_shards`` lets pass, or all.

        Args:
            num_shards: how many there are.

        Raises:
            ShardsFailed: they are.
        """
        if not aside or len(aside) <= min(most, num_shards - 1):
            return
        key, error = next(iter(aside.items()))
        raise ShardsFailed(
            f"{len(aside)} shard{'s' * (len(aside) > 1)} failed {TRIES} times each, such as "
            f"{key[:12]}: {error}",
            where=where,
            expected=f"{min(most, num_shards - 1)} of {num_shards} at most",
            remedy=f"see to the cause and delete {self.folder}, or raise max_failed_shards",
        )
