"""Objects of a committed shard, read whole or in part, every byte checked before it is used.

A manifest has the SHA-256 of each object and, of one longer than a block, of each of its blocks:
so some bytes of a large object can be read, and checked, without the rest.
"""

import hashlib
import io
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Protocol

from ..errors import ChecksumMismatch
from ..schemas.manifests import BLOCK_BYTES, ObjectEntry
from .objects import ObjectStore

REMEDY = "'opdcache cache verify' puts the shard aside; run its stage again to make it anew"


class File(Protocol):
    """Bytes that can be read in part."""

    @property
    def size_bytes(self) -> int:
        """How many there are."""

    def read(self, start: int, stop: int) -> bytes:
        """Bytes ``start:stop``."""

    def at_hand(self, start: int, stop: int) -> bool:
        """Whether bytes ``start:stop`` are in memory."""


@dataclass(frozen=True, slots=True)
class InMemory:
    """Bytes as a file."""

    data: bytes

    @property
    def size_bytes(self) -> int:
        """How many there are."""
        return len(self.data)

    def read(self, start: int, stop: int) -> bytes:
        """Bytes ``start:stop``."""
        return self.data[start:stop]

    def at_hand(self, start: int, stop: int) -> bool:
        """They are."""
        return True


def in_memory(objects: Mapping[str, bytes]) -> dict[str, File]:
    """Objects by path as files by path."""
    return {path: InMemory(data) for path, data in objects.items()}


def object_entry(path: str, data: bytes) -> ObjectEntry:
    """What a manifest says of an object."""
    parts = range(0, len(data), BLOCK_BYTES) if len(data) > BLOCK_BYTES else ()
    return ObjectEntry(
        path=path,
        size_bytes=len(data),
        sha256=_sha256(data),
        blocks=tuple(_sha256(data[i : i + BLOCK_BYTES]) for i in parts),
    )


@dataclass(slots=True)
class CheckedFile:
    """One object of a shard. What is read stays in memory, and is checked once."""

    objects: ObjectStore
    path: str
    entry: ObjectEntry
    _blocks: dict[int, bytes] = field(default_factory=dict)

    @property
    def size_bytes(self) -> int:
        """Its length, as it was committed."""
        return self.entry.size_bytes

    def read(self, start: int, stop: int) -> bytes:
        """Bytes ``start:stop``; whole blocks are fetched, in one request.

        Raises:
            ObjectMissing, ChecksumMismatch: the object is not what was committed.
        """
        numbers = self._numbers(start, stop)
        missing = [number for number in numbers if number not in self._blocks]
        if missing:
            self._fetch(missing[0], missing[-1] + 1)
        first = numbers.start * BLOCK_BYTES
        if len(numbers) == 1:
            return self._blocks[numbers.start][start - first : stop - first]
        return b"".join(self._blocks[n] for n in numbers)[start - first : stop - first]

    def at_hand(self, start: int, stop: int) -> bool:
        """Whether bytes ``start:stop`` have been read."""
        return all(number in self._blocks for number in self._numbers(start, stop))

    def _numbers(self, start: int, stop: int) -> range:
        return range(start // BLOCK_BYTES, max(-(-stop // BLOCK_BYTES), start // BLOCK_BYTES + 1))

    def _fetch(self, first: int, last: int) -> None:
        """Blocks ``first:last``; all of them are checked as one object."""
        begin, end = first * BLOCK_BYTES, min(last * BLOCK_BYTES, self.size_bytes)
        if not self.entry.blocks:
            first, last, begin, end = 0, -(-self.size_bytes // BLOCK_BYTES) or 1, 0, self.size_bytes
        if begin == 0 and end == self.size_bytes:
            data = self.objects.get(self.path)
            self._check(self.entry.sha256, data, self.size_bytes)
        else:
            data = self.objects.get_range(self.path, begin, end)
            for number in range(first, last):
                block = data[number * BLOCK_BYTES - begin :][:BLOCK_BYTES]
                size = min(BLOCK_BYTES, self.size_bytes - number * BLOCK_BYTES)
                self._check(self.entry.blocks[number], block, size)
        for number in range(first, last):
            self._blocks[number] = data[number * BLOCK_BYTES - begin :][:BLOCK_BYTES]

    def _check(self, expected: str, data: bytes, size: int) -> None:
        sha256 = _sha256(data)
        if sha256 != expected or len(data) != size:
            raise ChecksumMismatch(
                "object is not what was committed",
                where=self.objects.at(self.path),
                expected=f"SHA-256 {expected[:12]}, {size} bytes",
                got=f"{sha256[:12]}, {len(data)} bytes",
                remedy=REMEDY,
            )


def begin(file: CheckedFile, *, whole: bool) -> None:
    """Read a file whole, or of one longer than a block the last one.

    That block has the index of what is before it.
    """
    is_small = file.size_bytes <= BLOCK_BYTES
    file.read(0 if whole or is_small else file.size_bytes - 1, file.size_bytes)


class Seekable(io.RawIOBase):
    """A file as Python's readers want it."""

    def __init__(self, file: File) -> None:
        self._file, self._place = file, 0

    def readable(self) -> bool:
        """It is."""
        return True

    def seekable(self) -> bool:
        """It is."""
        return True

    def tell(self) -> int:
        """Where the next read begins."""
        return self._place

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        """Go to a place; gives it."""
        origin = {io.SEEK_SET: 0, io.SEEK_CUR: self._place, io.SEEK_END: self._file.size_bytes}
        self._place = origin[whence] + offset
        return self._place

    def read(self, size: int = -1) -> bytes:
        """Up to ``size`` bytes; all that are left by default."""
        left = self._file.size_bytes - self._place
        stop = self._place + (left if size < 0 else min(size, left))
        data = self._file.read(self._place, stop) if stop > self._place else b""
        self._place += len(data)
        return data


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()
