"""Arrays of a score shard, decoded straight from the bytes of its objects.

zarr-python writes the arrays and reads them too; this reader knows what ``docs/format.md`` fixes of
them: one object an array, chunks of tokens that are compressed one by one, an index at the end.
So some tokens are read by decoding their chunks alone, in the calling thread (Blosc lets other
threads run), and a small shard costs no more than its bytes.

Legend: T tokens, K entries a token, C tokens of a chunk.
"""

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

import numpy as np
from numcodecs import blosc
from numpy.typing import NDArray

from ..errors import InvalidShard, NotInstalled
from ..schemas.columns import Compression
from .files import File

_ABSENT = np.iinfo(np.uint64).max
_CHECKSUM_BYTES = 4


def _pcodec(encoded: bytes) -> bytes:
    """A pcodec chunk's values.

    Raises:
        NotInstalled: the optional package is not there.
    """
    need_compression("pcodec")
    from numcodecs.pcodec import PCodec

    values: bytes = PCodec().decode(encoded)
    return values


_DECODERS: Mapping[Compression, Callable[[bytes], bytes]] = {
    "blosc": blosc.decompress,
    "pcodec": _pcodec,
}
_COMPRESSIONS: Mapping[str, Compression] = {"blosc": "blosc", "numcodecs.pcodec": "pcodec"}


def need_compression(compression: Compression) -> None:
    """Check that chunks can be compressed so, and read.

    Raises:
        NotInstalled: its package is optional, and not there.
    """
    if compression == "pcodec" and find_spec("pcodec") is None:
        raise NotInstalled("pcodec is not installed", remedy="pip install 'opdcache[pcodec]'")


@dataclass(frozen=True, slots=True)
class StoredArray:
    """One array, [T] or [K, T], of integers or floats.

    Attributes:
        shape: T, or K and T.
        dtype: of the values.
        chunk_tokens: C.
        compression: of each chunk.
        file: the object with the chunks; None when every value is 0.
        index: uint64 [chunks, 2], offset and length of each chunk in the object.
    """

    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    chunk_tokens: int
    compression: Compression
    file: File | None
    index: NDArray[np.uint64]

    def chunks(self, start: int, stop: int) -> Iterator[tuple[slice, NDArray[Any]]]:
        """Tokens ``start:stop`` chunk by chunk: places counted from ``start``, and values."""
        size = self.chunk_tokens
        for number in range(start // size, -(-stop // size)):
            first = number * size
            begin, end = max(start, first), min(stop, first + size)
            yield (
                slice(begin - start, end - start),
                self._chunk(number)[..., begin - first : end - first],
            )

    def read(self, start: int, stop: int) -> NDArray[Any]:
        """Values of tokens ``start:stop``."""
        parts = [values for _, values in self.chunks(start, stop)]
        if len(parts) == 1:
            return parts[0]
        return np.concatenate([np.zeros((*self.shape[:-1], 0), self.dtype), *parts], axis=-1)

    def at_hand(self, start: int, stop: int) -> bool:
        """Whether the chunks of tokens ``start:stop`` are in memory."""
        return self.file is None or self.file.at_hand(*self._bytes(start, stop))

    def fetch(self, start: int, stop: int) -> None:
        """Read the chunks of tokens ``start:stop`` into memory, in one request."""
        if self.file is not None:
            self.file.read(*self._bytes(start, stop))

    def _bytes(self, start: int, stop: int) -> tuple[int, int]:
        """Where in the object those chunks are: they follow one another."""
        size = self.chunk_tokens
        chunks = self.index[start // size : -(-stop // size)]
        chunks = chunks[chunks[:, 0] != _ABSENT]
        if not len(chunks):
            return 0, 0
        return int(chunks[:, 0].min()), int(chunks.sum(axis=1).max())

    def _chunk(self, number: int) -> NDArray[Any]:
        shape = (*self.shape[:-1], self.chunk_tokens)
        offset, length = (int(n) for n in self.index[number])
        if self.file is None or offset == _ABSENT:
            return np.zeros(shape, self.dtype)
        encoded = self.file.read(offset, offset + length)
        return np.frombuffer(_DECODERS[self.compression](encoded), self.dtype).reshape(shape)


def open_arrays(files: Mapping[str, File]) -> tuple[dict[str, Any], dict[str, StoredArray]]:
    """A group's attributes and its arrays by name; nothing is decoded.

    Args:
        files: the group's objects by path below its root.

    Raises:
        InvalidShard: they are no group of the documented format.
    """
    try:
        group = _json(files["zarr.json"])
        described = {
            path.partition("/")[0]: _json(file)
            for path, file in files.items()
            if path.endswith("/zarr.json")
        }
        arrays = {name: _array(name, meta, files) for name, meta in described.items()}
        return group["attributes"], arrays
    except (KeyError, ValueError, TypeError, IndexError, StopIteration) as error:
        raise InvalidShard(f"not a group of score arrays: {error!r}") from error


def _json(file: File) -> Any:
    return json.loads(file.read(0, file.size_bytes))


def _array(name: str, meta: Mapping[str, Any], files: Mapping[str, File]) -> StoredArray:
    shape = tuple(meta["shape"])
    sharding = next(c for c in meta["codecs"] if c["name"] == "sharding_indexed")["configuration"]
    chunk_tokens = sharding["chunk_shape"][-1]
    number = meta["chunk_grid"]["configuration"]["chunk_shape"][-1] // chunk_tokens
    compression = _COMPRESSIONS[sharding["codecs"][-1]["name"]]
    file = files.get(f"{name}/c/" + "/".join("0" for _ in shape))
    index = np.full((number, 2), _ABSENT, np.uint64)
    if file is not None:
        end = file.size_bytes - _CHECKSUM_BYTES
        index = np.frombuffer(file.read(end - index.nbytes, end), "<u8").reshape(number, 2)
    return StoredArray(
        shape=shape,
        dtype=np.dtype(meta["data_type"]).newbyteorder("<"),
        chunk_tokens=chunk_tokens,
        compression=compression,
        file=file,
        index=index,
    )
