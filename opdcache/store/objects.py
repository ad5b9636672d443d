"""The one door to storage: objects by path on any URL that obstore knows.

Five operations are all that the cache needs, so that a file system, S3, GCS and Azure behave
alike: put, exclusive create, get, list, delete. Everything above speaks of paths and bytes, and
meets errors of ``opdcache.errors`` only.
"""

import os
import re
import secrets
import stat
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from threading import Lock
from typing import TYPE_CHECKING, TypeVar

import obstore
from obstore.exceptions import (
    AlreadyExistsError,
    BaseError,
    PermissionDeniedError,
    UnauthenticatedError,
)
from obstore.store import LocalStore, MemoryStore, from_url

if TYPE_CHECKING:
    from obstore.store import RetryConfig

from ..errors import NotAllowed, ObjectMissing, StoreError, StoreFull, StoreUnavailable

Item = TypeVar("Item")
Result = TypeVar("Result")
_AT_ONCE = 16
_UMASK = Lock()
"""It is the process's, and is set by reading it."""

# Signs of a fault in a store's message, none of which a path can hold by chance.
_FULL = re.compile(r"\(os error (28|122)\)")
_DENIED = re.compile(r"\(os error (1|13|30)\)")
_ASK = "check the permissions"
_PASSING = re.compile(
    r"error sending request|after \d+ retries|status code: (429|5\d\d)"
    r"|\(os error (104|110|111|116)\)"
)
# A job of hours outlives a store that is away for a minute.
_PATIENCE: "RetryConfig" = {"max_retries": 30, "retry_timeout": timedelta(minutes=3)}
# obstore writes a local file under such a name, and renames it when it is whole.
_CUT_SHORT = re.compile(r"#\d+$")


@dataclass(frozen=True, slots=True)
class ObjectInfo:
    """What a listing says of an object."""

    path: str
    size_bytes: int
    etag: str | None
    last_modified: datetime


class ObjectStore:
    """Objects below one URL. Paths are relative, with forward slashes."""

    def __init__(self, url: str) -> None:
        """Open a URL (``s3://``, ``gs://``, ``az://``, ``memory://``) or a local folder.

        Raises:
            StoreError: the URL is of no known kind, or the folder cannot be made.
        """
        self.url = url
        self._pid = os.getpid()
        self._threads = ThreadPoolExecutor(max_workers=_AT_ONCE)
        self._folder: Path | None = None
        self._shared: int | None = None
        with _errors(url):
            if url.startswith("memory://"):
                self._store: obstore.store.ObjectStore = MemoryStore()
            elif not is_local(url):
                self._store = from_url(url, retry_config=_PATIENCE)
            else:
                self._folder = local_folder(url)
                if self._folder.is_file():
                    raise StoreError("it is a file", where=url, remedy="give a folder or a URL")
                self._store = LocalStore(self._folder, mkdir=True)
                mode = stat.S_IMODE(self._folder.stat().st_mode)
                self._shared = mode if mode & stat.S_IWGRP else None

    def each(self, do: Callable[[Item], Result], items: Iterable[Item]) -> list[Result]:
        """What an operation on this store gives for every item, several at once."""
        self._check_process("")
        return list(self._threads.map(do, items))

    def put(self, path: str, data: bytes) -> None:
        """Write an object whole, replacing what is there."""
        with self._access(path):
            self._share(path)
            obstore.put(self._store, path, data)

    def create(self, path: str, data: bytes) -> bool:
        """Write an object if there is none; False when there is one. Atomic on every store."""
        with self._access(path):
            self._share(path)
            try:
                obstore.put(self._store, path, data, mode="create")
            except AlreadyExistsError:
                return False
        return True

    def _share(self, path: str) -> None:
        """Before a write: what is made in a folder that a group may write to is the group's too,
        whatever the umask; and where nobody may delete what is another's there, nor below it."""
        if self._shared is None or self._folder is None:
            return
        with _UMASK:
            os.umask(os.umask(stat.S_IRWXO) & ~stat.S_IRWXG)
        missing = []
        for folder in (self._folder / path).parents:
            if folder.exists():
                break
            missing.append(folder)
        for folder in reversed(missing):
            with suppress(FileExistsError):
                folder.mkdir()
                folder.chmod(self._shared)

    def get(self, path: str) -> bytes:
        """The whole object.

        Raises:
            ObjectMissing: it is not there.
        """
        with self._access(path):
            return bytes(obstore.get(self._store, path).bytes())

    def get_range(self, path: str, start: int, stop: int) -> bytes:
        """Bytes ``start:stop`` of an object; fewer when it ends before.

        Raises:
            ObjectMissing: it is not there.
        """
        with self._access(path):
            try:
                return bytes(obstore.get_range(self._store, path, start=start, end=stop))
            except BaseError:
                if obstore.head(self._store, path)["size"] >= stop:
                    raise
        return self.get(path)[start:stop]

    def info(self, path: str) -> ObjectInfo | None:
        """What the store says of an object; None when there is none."""
        try:
            with self._access(path):
                return _info(obstore.head(self._store, path))
        except ObjectMissing:
            return None

    def list(self, prefix: str) -> Iterator[ObjectInfo]:
        """Objects whose path is below ``prefix``, a folder; in no order."""
        with self._access(prefix):
            for batch in obstore.list(self._store, prefix.rstrip("/"), chunk_size=5000):
                yield from map(_info, batch)

    def delete(self, path: str) -> None:
        """Remove an object; nothing happens when there is none."""
        if self._folder is not None and _CUT_SHORT.search(path):
            (self._folder / path).unlink(missing_ok=True)
            return
        try:
            with self._access(path):
                obstore.delete(self._store, path)
        except ObjectMissing:
            return

    def leftovers(self, prefix: str) -> Iterator[ObjectInfo]:
        """Files below a folder of a local store that a killed writer left half-written: no listing
        has them."""
        folder = self._folder
        if folder is None:
            return
        for file in (folder / prefix).rglob("*#*"):
            with suppress(FileNotFoundError):  # its writer may have finished
                if _CUT_SHORT.search(file.name) and file.is_file():
                    path, stat = str(file.relative_to(folder)), file.stat()
                    changed = datetime.fromtimestamp(stat.st_mtime, UTC)
                    yield ObjectInfo(path, stat.st_size, None, changed)

    def now(self) -> datetime:
        """The store's own time, by which it dates objects: that of an object written for it."""
        path = f"probe/{secrets.token_hex(8)}"
        self.put(path, b"")
        found = self.info(path)
        self.delete(path)
        if found is None:
            raise ObjectMissing("an object that was just written is gone", where=self.at(path))
        return found.last_modified

    @contextmanager
    def _access(self, path: str) -> Iterator[None]:
        """An operation on a path."""
        self._check_process(path)
        with _errors(self.at(path)):
            yield

    def _check_process(self, path: str) -> None:
        """Threads do not survive a fork: what waits for them would never end.

        Raises:
            StoreError: this process was forked from the one that opened the store.
        """
        if os.getpid() != self._pid:
            raise StoreError(
                "a forked process cannot use its parent's store",
                where=self.at(path),
                remedy="start workers afresh: DataLoader(..., multiprocessing_context='spawn')",
            )

    def at(self, path: str) -> str:
        """Where an object is, for people."""
        return f"{self.url.rstrip('/')}/{path}"


def is_local(url: str) -> bool:
    """Whether a URL is a folder of this machine."""
    return "://" not in url or url.startswith("file://")


def local_folder(url: str) -> Path:
    """The folder of a local URL."""
    return Path(url.removeprefix("file://")).resolve()


def _info(meta: "obstore.ObjectMeta") -> ObjectInfo:
    return ObjectInfo(meta["path"], meta["size"], meta["e_tag"], meta["last_modified"])


@contextmanager
def _errors(where: str) -> Iterator[None]:
    """Storage's exceptions as this project's, in one line."""
    try:
        yield
    except FileNotFoundError as error:
        raise ObjectMissing("no such object", where=where) from error
    except (PermissionDeniedError, UnauthenticatedError, PermissionError) as error:
        raise NotAllowed("not allowed", where=where, remedy=_ASK) from error
    except AlreadyExistsError:
        raise
    except (BaseError, OSError, ValueError) as error:
        reason = str(error).splitlines()[0]
        if _FULL.search(str(error)):
            raise StoreFull(
                "no space left", where=where, remedy="free some, then run the same command again"
            ) from error
        if _DENIED.search(str(error)):
            raise NotAllowed("not allowed", where=where, remedy=_ASK) from error
        if _PASSING.search(str(error)):
            raise StoreUnavailable(reason, where=where, remedy="try again") from error
        raise StoreError(reason, where=where) from error
