"""Fingerprints and content keys: everything in the cache is addressed by what produced it.

All digests are SHA-256, hex. Python's ``hash()`` is salted per process and never used.
"""

import hashlib
import json
import secrets
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from .errors import ModelError
from .schemas.base import Model

HASHED_COLUMNS = ("prompt_token_ids", "completion_token_ids", "student_topk_ids")
_TOKENIZER_FILES = (
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template*",
    "vocab*",
    "merges.txt",
    "*.model",
)
_NOT_IDENTITY = {"_name_or_path", "transformers_version"}


def canonical_json(value: Any) -> bytes:
    """The one byte string of a JSON value: sorted keys, no spaces, UTF-8."""
    return json.dumps(
        value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False
    ).encode()


def digest(value: Any) -> str:
    """SHA-256 of a JSON value's canonical form."""
    return hashlib.sha256(canonical_json(value)).hexdigest()


def key_of(identity: Model) -> str:
    """Key of a shard: the digest of its identity, which manifests store as the preimage."""
    return digest(identity.model_dump(mode="json"))


def derived_seed(run_seed: int, round_index: int, prompt_id: str, sample_index: int) -> int:
    """Seed of one completion, in [0, 2**31): the same wherever and whenever it is drawn."""
    return int(digest([run_seed, round_index, prompt_id, sample_index])[:16], 16) % 2**31


def content_hash(table: pa.Table) -> str:
    """Hash of a rollout table's token ids, recorded ids and row order: never of file bytes."""
    state = hashlib.sha256()
    for name in HASHED_COLUMNS:
        state.update(name.encode() + b"\0")
        if name not in table.column_names:
            continue
        chunks, kind = table.column(name).chunks, table.schema.field(name).type
        while pa.types.is_list(kind):
            state.update(np.int64(sum(map(len, chunks))).tobytes())
            for chunk in chunks:
                state.update(np.diff(chunk.offsets.to_numpy()).astype("<i8").data)
            chunks, kind = [chunk.flatten() for chunk in chunks], kind.value_type
        for chunk in chunks:
            state.update(chunk.to_numpy().astype("<i4", copy=False))
    return state.hexdigest()


def vocabulary_fingerprint(vocabulary: Mapping[str, int]) -> str:
    """Fingerprint of what token ids mean: the token of every id, added tokens included."""
    return digest(sorted((index, token) for token, index in vocabulary.items()))


def vocabulary_difference(student: Mapping[str, int], teacher: Mapping[str, int]) -> str | None:
    """What differs between two vocabularies, as a phrase; None when every id means the same.

    The padded size of a model's embedding plays no part: it is no property of the tokenizer.
    """
    ours = {index: token for token, index in student.items()}
    theirs = {index: token for token, index in teacher.items()}
    differing = [i for i in sorted(ours.keys() | theirs.keys()) if ours.get(i) != theirs.get(i)]
    if not differing:
        return None
    first = differing[0]
    return (
        f"{len(differing)} ids differ, {len(ours)} tokens against {len(theirs)}; the first is id "
        f"{first}: {ours.get(first)!r} for the student, {theirs.get(first)!r} for the teacher"
    )


class FileHashes:
    """SHA-256 of files, remembered by path, size and modification time in a small JSON file.

    Args:
        remembered: the file.
        writes: what is new is remembered; else the file is read only.
    """

    def __init__(self, remembered: Path | None = None, *, writes: bool = True) -> None:
        self._file = remembered if writes else None
        self._known: dict[str, list[Any]] = {}
        if remembered is not None and remembered.exists():
            self._known = json.loads(remembered.read_text())

    def of(self, paths: Iterable[Path]) -> list[str]:
        """Hashes of the files, in order; several are read at once."""
        with ThreadPoolExecutor(max_workers=4) as pool:
            hashes = list(pool.map(self._of, paths))
        if self._file is not None:
            self._file.parent.mkdir(parents=True, exist_ok=True)
            draft = self._file.with_suffix(f".{secrets.token_hex(4)}")
            draft.write_text(json.dumps(self._known, indent=1, sort_keys=True))
            draft.replace(self._file)
        return hashes

    def _of(self, path: Path) -> str:
        stat = path.stat()
        seen = [stat.st_size, stat.st_mtime_ns]
        known = self._known.get(str(path))
        if known is None or known[:2] != seen:
            with path.open("rb") as file:
                known = [*seen, hashlib.file_digest(file, "sha256").hexdigest()]
            self._known[str(path)] = known
        return str(known[2])


def model_fingerprint(folder: Path, hashes: FileHashes) -> str:
    """Fingerprint of a model: its weight files' hashes, configuration and generation configuration.

    Raises:
        ModelError: the folder is missing, or holds no configuration or no weights.
    """
    config = model_config(folder)
    weights = weight_files(folder)
    has_generation = (folder / "generation_config.json").exists()
    stop = _json_mapping(folder, "generation_config.json") if has_generation else {}
    parts = {
        "weights": [[p.name, h] for p, h in zip(weights, hashes.of(weights), strict=True)],
        "config": {k: v for k, v in config.items() if k not in _NOT_IDENTITY},
        "generation_config": {k: v for k, v in stop.items() if k not in _NOT_IDENTITY},
    }
    return digest(parts)


def model_config(folder: Path) -> dict[str, Any]:
    """The model's ``config.json``.

    Raises:
        ModelError: the folder or the file is missing, or it is not JSON.
    """
    if not folder.is_dir():
        raise ModelError("no such model folder", where=folder, remedy="check the path")
    return _json_mapping(folder, "config.json")


def _json_mapping(folder: Path, name: str) -> dict[str, Any]:
    try:
        value = json.loads((folder / name).read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ModelError(
            f"not a Hugging Face model: {name} is missing",
            where=folder,
            remedy="save it with save_pretrained",
        ) from error
    except ValueError as error:
        raise ModelError(f"{name} is not JSON", where=folder) from error
    if not isinstance(value, dict):
        raise ModelError(f"{name} is not a mapping", where=folder)
    return value


def model_vocab_size(config: Mapping[str, Any]) -> int:
    """Rows of the model's LM head, padding included."""
    text = config.get("text_config") or config
    return int(text["vocab_size"])


def tokenizer_files(folder: Path) -> list[Path]:
    """The tokenizer's files beside a model, by name."""
    return sorted({file for pattern in _TOKENIZER_FILES for file in folder.glob(pattern)})


def weight_files(folder: Path) -> list[Path]:
    """The model's weight files, by name; safetensors where there are any.

    Raises:
        ModelError: there are none.
    """
    for pattern in ("*.safetensors", "*.bin"):
        found = sorted(folder.glob(pattern))
        if found:
            return found
    raise ModelError(
        "no weights: neither *.safetensors nor *.bin",
        where=folder,
        remedy="save the model with save_pretrained",
    )
