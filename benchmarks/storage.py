"""What a token's teacher entries cost to keep, and what keeping them costs in truth.

    python benchmarks/storage.py --npz scores.npz --k 50

The file holds ``I`` int [T, K] ids and ``V`` float32 [T, K] log-probs, likeliest first, normalised
over the full vocabulary (``real_scores.py`` makes one). Every codec keeps the first k entries; the
rest of the vocabulary is one tail entry. A JSON object a codec is printed, then one with them all.

- ``codec_kl_*``: KL(exact || kept) over the k entries and the tail, nats, both sides summing to 1.
- ``reverse_kl_error_*``: how far the tail-bucket reverse KL of a student (the teacher with normal
  noise of 0.5 nats on every entry) is off when it is taken against the kept entries.
- ``*_tokens_per_s``: encoding in one thread; decoding in two, shards on disk to arrays of ids,
  log-probs and tails, over at least a million tokens. Opening a shard is timed apart.

Bytes are those of ids, log-probs and everything needed to read them; the tail's are apart.
"""

import argparse
import json
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from opdcache.schemas.columns import Compression
from opdcache.store import codec
from opdcache.store.encoding import encode_scores
from opdcache.store.files import in_memory
from opdcache.store.scores import Scores, TopK, open_scores

DECODED_TOKENS = 1_000_000
THREADS = 2
TAIL = "tail_logprobs/"
Files = dict[str, bytes]


@dataclass(frozen=True)
class Kept:
    """Entries of T tokens: ids int [T, K], log-probs [T, K], log of the mass outside them [T]."""

    ids: NDArray[np.generic]
    logprobs: NDArray[np.floating]
    tail: NDArray[np.floating]


@dataclass(frozen=True)
class Codec:
    """A way to keep entries; ``open`` is what is done once a shard, before its tokens are read."""

    name: str
    encode: Callable[[Kept], Files]
    open: Callable[[Files], object]
    decode: Callable[[object], Kept]


def derived_tail(logprobs: NDArray[np.floating]) -> NDArray[np.floating]:
    """A tail that is not stored: what the kept entries leave of 1, at least a rounding."""
    left = np.maximum(1 - np.exp(logprobs.astype(np.float64)).sum(axis=1), 6e-8)
    tail: NDArray[np.floating] = np.log(left)
    return tail


def opdcache(name: str, step: float, compression: Compression) -> Codec:
    """This project's score shard, with the columns of the teacher's entries alone."""

    def encode(kept: Kept) -> Files:
        num_tokens, k = kept.ids.shape
        topk = TopK(
            kept.ids.astype(np.int32),
            kept.logprobs.astype(np.float32),
            np.full(num_tokens, k, np.uint16),
            kept.tail.astype(np.float32),
        )
        scores = Scores(token_offsets=np.asarray([0, num_tokens]), topk=topk)
        return encode_scores(scores, step=step, attributes={}, compression=compression)

    def decode(opened: object) -> Kept:
        topk = opened.read(frozenset({"topk"})).topk  # type: ignore[attr-defined]
        return Kept(topk.ids, topk.logprobs, topk.tail_logprobs)

    return Codec(name, encode, lambda files: open_scores(in_memory(files)), decode)


def parquet_lists() -> Codec:
    """Lists of int32 ids and float32 log-probs in Parquet, zstd."""

    def encode(kept: Kept) -> Files:
        def lists(values: NDArray[np.generic], kind: pa.DataType) -> pa.Array:
            flat = pa.array(values.reshape(-1), type=kind)
            return pa.FixedSizeListArray.from_arrays(flat, values.shape[1]).cast(pa.list_(kind))

        table = pa.table(
            {"ids": lists(kept.ids, pa.int32()), "logprobs": lists(kept.logprobs, pa.float32())}
        )
        sink = pa.BufferOutputStream()
        pq.write_table(table, sink, compression="zstd")
        return {"data": bytes(sink.getvalue())}

    def decode(opened: object) -> Kept:
        table = pq.read_table(pa.BufferReader(opened["data"]), use_threads=False)  # type: ignore[index]
        ids, logprobs = (
            column.combine_chunks().flatten().to_numpy().reshape(table.num_rows, -1)
            for column in table.columns
        )
        return Kept(ids, logprobs, derived_tail(logprobs))

    return Codec("parquet-int32-float32", encode, lambda files: files, decode)


def packed(vocab_size: int) -> Codec:
    """Ids in as few bits as the vocabulary needs, log-probs as bfloat16; not compressed."""
    bits = int(vocab_size - 1).bit_length()

    def encode(kept: Kept) -> Files:
        shape = np.asarray(kept.ids.shape, "<i8").tobytes()
        return {"ids": pack(kept.ids, bits), "values": bfloat16(kept.logprobs), "shape": shape}

    def decode(opened: object) -> Kept:
        files: Files = opened  # type: ignore[assignment]
        rows, width = np.frombuffer(files["shape"], "<i8")
        ids = unpack(files["ids"], bits, int(rows * width)).reshape(rows, width)
        logprobs = from_bfloat16(files["values"]).reshape(rows, width)
        return Kept(ids, logprobs, derived_tail(logprobs))

    return Codec("packed-ids-bfloat16", encode, lambda files: files, decode)


def polynomial(vocab_size: int, k: int) -> Codec:
    """Packed ids; a few exact values (bfloat16), the others as a polynomial of the rank (float32).

    Made from the description of another tool's scheme: 16 exact values and six terms at k = 128 and
    above, one exact value and three terms below.
    """
    bits = int(vocab_size - 1).bit_length()
    exact, terms = (16, (0.0, 1.0, 2.0, 3.0, 4.0, 0.5)) if k >= 128 else (1, (0.0, 1.0, 0.5))
    rank = np.linspace(0, 1, k - exact)
    design = np.stack([rank**power for power in terms], axis=1)
    solve = np.linalg.pinv(design)

    def encode(kept: Kept) -> Files:
        rest = kept.logprobs[:, exact:].astype(np.float64)
        return {
            "ids": pack(kept.ids, bits),
            "exact": bfloat16(kept.logprobs[:, :exact]),
            "terms": (rest @ solve.T).astype("<f4").tobytes(),
        }

    def decode(opened: object) -> Kept:
        files: Files = opened  # type: ignore[assignment]
        first = from_bfloat16(files["exact"]).reshape(-1, exact)
        rest = np.frombuffer(files["terms"], "<f4").reshape(-1, len(terms)) @ design.T
        logprobs = np.concatenate([first, rest], axis=1)
        ids = unpack(files["ids"], bits, logprobs.size).reshape(logprobs.shape)
        return Kept(ids, logprobs, derived_tail(logprobs))

    return Codec("polynomial", encode, lambda files: files, decode)


def pack(ids: NDArray[np.generic], bits: int) -> bytes:
    """Unsigned integers, ``bits`` bits each."""
    flat = ids.reshape(-1).astype("<u4")
    rows = np.unpackbits(flat.view(np.uint8).reshape(-1, 4), axis=1, bitorder="little")
    return np.packbits(rows[:, :bits], bitorder="little").tobytes()


def unpack(data: bytes, bits: int, count: int) -> NDArray[np.int32]:
    """Inverse of ``pack``."""
    flat = np.unpackbits(np.frombuffer(data, np.uint8), count=count * bits, bitorder="little")
    rows = np.zeros((count, 32), np.uint8)
    rows[:, :bits] = flat.reshape(count, bits)
    return np.packbits(rows, axis=1, bitorder="little").view("<i4").reshape(-1)


def bfloat16(values: NDArray[np.floating]) -> bytes:
    """float32 rounded to nearest even at 8 bits of precision."""
    bits = values.astype("<f4").reshape(-1).view("<u4").astype(np.uint64)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype("<u2").tobytes()


def from_bfloat16(data: bytes) -> NDArray[np.float32]:
    """Inverse of ``bfloat16``."""
    return (np.frombuffer(data, "<u2").astype("<u4") << 16).view("<f4")


def with_tail(kept: Kept) -> NDArray[np.float64]:
    """Log-probs of the entries and the tail, [T, K + 1]."""
    return np.concatenate([kept.logprobs, kept.tail[:, None]], axis=1, dtype=np.float64)


def distances(exact: Kept, kept: Kept) -> dict[str, float]:
    """How far the kept entries are from the exact ones."""
    log_q, log_kept = with_tail(exact), with_tail(kept)
    normalised = log_kept - np.logaddexp.reduce(log_kept, axis=1, keepdims=True)
    codec_kl = (np.exp(log_q) * (log_q - normalised)).sum(axis=1)
    log_p = log_q + np.random.default_rng(0).normal(0, 0.5, log_q.shape)
    log_p -= np.logaddexp.reduce(log_p, axis=1, keepdims=True)
    error = np.abs((np.exp(log_p) * (log_q - log_kept)).sum(axis=1))
    return {
        "codec_kl_mean": float(codec_kl.mean()),
        "codec_kl_max": float(codec_kl.max()),
        "reverse_kl_error_mean": float(error.mean()),
        "reverse_kl_error_max": float(error.max()),
    }


def measure(how: Codec, exact: Kept, folder: Path) -> dict[str, object]:
    """One codec on the exact entries."""
    started = time.perf_counter()
    files = how.encode(exact)
    encode_s = time.perf_counter() - started
    num_tokens, k = exact.ids.shape
    copies = -(-DECODED_TOKENS // num_tokens)
    for copy in range(copies):
        for name, data in files.items():
            path = folder / how.name / str(copy) / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(data)

    def opened(copy: int) -> object:
        place = folder / how.name / str(copy)
        return how.open({name: (place / name).read_bytes() for name in files})

    started = time.perf_counter()
    shards = [opened(copy) for copy in range(copies)]
    open_s = time.perf_counter() - started
    started = time.perf_counter()
    with ThreadPoolExecutor(THREADS) as pool:
        # Results are dropped as they come, as a learner drops them.
        read = sum(len(kept.tail) for kept in pool.map(how.decode, shards))
    decode_s = time.perf_counter() - started
    kept = how.decode(shards[0])
    assert read >= DECODED_TOKENS
    assert (kept.ids == exact.ids).all(), f"{how.name} gives other ids"
    tail_bytes = sum(len(data) for name, data in files.items() if TAIL in name)
    return {
        "name": how.name,
        "k": k,
        "bytes_per_token": (sum(map(len, files.values())) - tail_bytes) / num_tokens,
        "tail_bytes_per_token": tail_bytes / num_tokens,
        **distances(exact, kept),
        "encode_tokens_per_s": num_tokens / encode_s,
        "decode_tokens_per_s": read / decode_s,
        "open_ms_per_shard": 1000 * open_s / copies,
    }


def main() -> None:
    """Measure every codec in one run."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--npz", type=Path, required=True)
    parser.add_argument("--k", type=int, default=16)
    parser.add_argument("--step", type=float, default=1 / 256)
    asked = parser.parse_args()
    with np.load(asked.npz) as arrays:
        ids, logprobs = arrays["I"][:, : asked.k], arrays["V"][:, : asked.k].astype(np.float32)
    vocab_size = int(ids.max()) + 1
    exact = Kept(ids, logprobs, derived_tail(logprobs))
    codecs = [
        opdcache("opdcache", asked.step, "blosc"),
        opdcache("opdcache-pcodec", asked.step, "pcodec"),
        parquet_lists(),
        packed(vocab_size),
        polynomial(vocab_size, asked.k),
    ]
    results = []
    with tempfile.TemporaryDirectory() as name:
        for how in codecs:
            results.append(measure(how, exact, Path(name)))
            print(json.dumps(results[-1]), flush=True)
    print(json.dumps({"clip_floor": codec.clip_floor(asked.step), "codecs": results}))


if __name__ == "__main__":
    main()
