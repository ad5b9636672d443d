"""Rollouts that were made elsewhere, as ordinary rollout shards: scored and trained on like any.

A file of token ids, JSONL or Parquet, a row a completion. The whole file is checked before
anything is stored. What a file does not say is absent, never filled in.
"""

import difflib
import hashlib
import math
import time
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from . import quality
from .errors import PromptError, UsageError
from .identity import (
    content_hash,
    digest,
    key_of,
    model_config,
    model_fingerprint,
    model_vocab_size,
    vocabulary_fingerprint,
)
from .prompt_rows import file_rows
from .prompts import Tokenizer, parse_chat
from .resolve import load_tokenizer
from .runfolder import RunFolder
from .schemas.manifests import ImportIdentity, Quality, RolloutManifest
from .schemas.rounds import RolloutRound
from .stage import Progress, Worker, make_shards, provenance
from .store import rollouts as shards
from .store.cache import Attempt, Cache, as_listed

_LABELS = ("prompt_id", "sample_index", "task", "answer", "finish_reason", "text")
_LOGPROBS = ("behavior_logprobs", "sampling_logprobs")
COLUMNS = (
    *("prompt_token_ids", "completion_token_ids", *_LOGPROBS, "loss_mask"),
    *("id", *_LABELS, "messages"),
)
"""What a file may have; the first two it must."""
_LOGPROB_SLACK = 1e-3
_LEAST_LOGPROB = float(np.finfo(np.float32).min)
"""Engines round: a log-prob may be so much above 0."""


@dataclass(frozen=True, slots=True)
class Imported:
    """What an import did.

    Attributes:
        num_made: shards that were not in the cache before.
        num_supervised: tokens that no mask takes out.
        quality: completions that are truncated or repetitive.
    """

    num_shards: int
    num_made: int
    num_rows: int
    num_tokens: int
    num_supervised: int
    quality: Mapping[str, int]


@dataclass(frozen=True, slots=True)
class _Policy:
    """The student that is said to have sampled: fingerprints of it and of its ids; ids are below
    ``vocab_size``."""

    student: str
    vocabulary: str
    vocab_size: int


@dataclass(frozen=True, slots=True)
class _Shard:
    """One shard to be: its rows, and the identity that they make."""

    table: pa.Table
    identity: ImportIdentity
    vocab_size: int


def import_rollouts(
    cache: Cache,
    file: Path,
    student: Path,
    out: Path,
    progress: Progress,
    *,
    task: str = "default",
    shard_samples: int = 256,
) -> Imported:
    """Commit a file's rollouts to a cache, and pin them by a round file that runs can name.

    Args:
        student: folder of the policy that sampled; its tokenizer gives the ids their meaning.
        out: gets ``rounds/000/rollout.json``, for ``rollouts: {from: OUT}`` of a run file.
        task: of the rows that name none.
        shard_samples: completions a shard at most.

    Raises:
        PromptError: the file is missing, empty or malformed; names the row.
        ModelError: the student is missing or incomplete.
        UsageError: ``out`` holds other rollouts, or a run.
    """
    started, folder = time.monotonic(), RunFolder(out)
    vocab_size, tokenizer = model_vocab_size(model_config(student)), load_tokenizer(student)
    rows = _read(file, _Reader(vocab_size, tokenizer, task))
    policy = _Policy(
        model_fingerprint(student, folder.hashes),
        vocabulary_fingerprint(tokenizer.get_vocab()),
        vocab_size,
    )
    asked = _shards(rows, policy, shard_samples)
    _refuse_others(folder, asked)
    run_id = digest(["import", sorted(asked)])[:16]
    cache.pin(run_id, "rollouts", asked)
    num_made = _commit(cache, asked, run_id, file.name, progress)
    manifests = list(cache.committed_rollouts(asked).values())
    folder.write(
        RolloutRound(
            round=0,
            student=policy.student,
            shards=tuple(as_listed(m, cached=False) for m in manifests),
            dropped={},
            elapsed_s=round(time.monotonic() - started, 3),
        )
    )
    return _summed(asked, manifests, num_made)


def _read(file: Path, reader: "_Reader") -> list[shards.Completion]:
    """The file's rows, checked."""
    rows = [reader.read(row, place) for place, row in file_rows(file)]
    if not rows:
        raise PromptError("no rollouts", where=file, remedy="give at least one row")
    return rows


def _refuse_others(folder: RunFolder, asked: Collection[str]) -> None:
    """Raise unless a folder is free, or holds the same import."""
    before = folder.find(RolloutRound, 0)
    others = before is not None and [shard.key for shard in before.shards] != list(asked)
    if others or folder.resolved() is not None:
        raise UsageError(
            "holds a run, or other rollouts", where=folder.path, remedy="give another folder"
        )


def _summed(
    asked: Mapping[str, _Shard], manifests: Sequence[RolloutManifest], num_made: int
) -> Imported:
    supervised = (shards.supervised_tokens(shard.table) for shard in asked.values())
    return Imported(
        num_shards=len(asked),
        num_made=num_made,
        num_rows=sum(m.num_rows for m in manifests),
        num_tokens=sum(m.num_tokens for m in manifests),
        num_supervised=sum(int(tokens.sum()) for tokens in supervised),
        quality={name: sum(m.quality[name] for m in manifests) for name in get_args(Quality)},
    )


def _shards(
    rows: Sequence[shards.Completion], policy: _Policy, shard_samples: int
) -> dict[str, _Shard]:
    """Shards to be, by key: of one task each, rows in the order of the file."""
    by_task = sorted(rows, key=lambda row: row.task)
    made = {}
    for _, group in groupby(by_task, lambda row: row.task):
        ours = list(group)
        for start in range(0, len(ours), shard_samples):
            table = shards.rollout_table(ours[start : start + shard_samples])
            identity = _identity(table, policy)
            made[key_of(identity)] = _Shard(table, identity, policy.vocab_size)
    return made


def _identity(table: pa.Table, policy: _Policy) -> ImportIdentity:
    labels = (*_LABELS, *(name for name in ("messages",) if name in table.column_names))
    rows = table.select([name for name in labels if name in table.column_names]).to_pylist()

    def column(name: str, dtype: type[np.generic]) -> str | None:
        if name not in table.column_names:
            return None
        values = shards.flat_tokens(table, name, dtype)
        return hashlib.sha256(values.astype(values.dtype.newbyteorder("<")).tobytes()).hexdigest()

    return ImportIdentity(
        student=policy.student,
        vocabulary=policy.vocabulary,
        content=content_hash(table),
        labels=digest([[row.get(name) for name in labels] for row in rows]),
        behavior_logprobs=column("behavior_logprobs", np.float32),
        sampling_logprobs=column("sampling_logprobs", np.float32),
        loss_mask=column("loss_mask", np.bool_),
    )


def _commit(
    cache: Cache, asked: Mapping[str, _Shard], run_id: str, source: str, progress: Progress
) -> int:
    """Commit the shards that are not there; how many."""
    progress.begin(f"importing {source}", len(asked), "shards")
    try:
        return make_shards(
            cache,
            "rollouts",
            asked,
            is_done=lambda shard: cache.rollouts(key_of(shard.identity)) is not None,
            compute=lambda shard, attempt: _make(shard, attempt, run_id, source),
            worker=Worker(),
            progress=progress,
        )
    finally:
        progress.end()


def _make(shard: _Shard, attempt: Attempt, run_id: str, source: str) -> RolloutManifest:
    started, table = time.monotonic(), shard.table
    attempt.put(shards.FILE, shards.encode_rollouts(table))
    num_tokens = int(shards.token_offsets(table)[-1])
    texts = (table.column(name).to_pylist() for name in ("finish_reason", "text"))
    return RolloutManifest(
        key=key_of(shard.identity),
        attempt=attempt.name,
        objects=tuple(attempt.entries),
        num_rows=table.num_rows,
        num_tokens=num_tokens,
        dropped={},
        provenance=provenance(
            run_id, started=started, num_tokens=num_tokens, details={"imported from": source}
        ),
        identity=shard.identity,
        content=shard.identity.content,
        num_prompt_tokens=len(shards.flat_tokens(table, "prompt_token_ids", np.int32)),
        vocab_size=shard.vocab_size,
        task=table.column("task")[0].as_py(),
        quality=quality.counted(zip(*texts, strict=True)),
    )


class _Reader:
    """Reads rows, and remembers what they must agree on."""

    def __init__(self, vocab_size: int, tokenizer: Tokenizer, task: str) -> None:
        self._vocab_size, self._tokenizer, self._task = vocab_size, tokenizer, task
        self._prompts: dict[str, list[int]] = {}
        self._indexes: dict[str, set[int]] = {}
        self._logprobs: set[str] | None = None

    def read(self, row: Any, place: str) -> shards.Completion:
        """A row as a completion.

        Raises:
            PromptError: it is malformed; names the place.
        """
        fields = _fields(row, place)
        prompt = self._ids(fields, "prompt_token_ids", place)
        completion = self._ids(fields, "completion_token_ids", place)
        if not prompt:
            raise PromptError("the prompt has no tokens", where=place, remedy="give at least one")
        supervised = _mask(fields, len(completion), place)
        self._same_columns(set(_LOGPROBS) & set(fields), place)
        behavior, sampling = (_logprobs(fields, n, supervised, place) for n in _LOGPROBS)
        prompt_id = self._prompt_id(fields, prompt, place)
        return shards.Completion(
            prompt_id=prompt_id,
            sample_index=self._sample_index(fields, prompt_id, place),
            prompt_token_ids=prompt,
            completion_token_ids=completion,
            behavior_logprobs=behavior,
            sampling_logprobs=sampling,
            topk_ids=np.zeros((len(completion), 0), np.int32),
            topk_logprobs=np.zeros((len(completion), 0), np.float32),
            finish_reason=_text(fields, "finish_reason", place) or "unknown",
            text=self._decoded(fields, completion, place),
            task=_text(fields, "task", place) or self._task,
            answer=_text(fields, "answer", place),
            messages=_messages(fields, place),
            loss_mask=supervised,
        )

    def _ids(self, fields: Mapping[str, Any], name: str, place: str) -> list[int]:
        ids = fields.get(name)
        if not isinstance(ids, list) or any(type(one) is not int for one in ids):
            raise PromptError(f"{name} is a list of integers, and must be there", where=place)
        outside = next((one for one in ids if not 0 <= one < self._vocab_size), None)
        if outside is not None:
            raise PromptError(
                f"{name}: an id is not in the student's vocabulary",
                where=place,
                expected=f"0 <= id < {self._vocab_size}",
                got=outside,
                remedy="name the student whose ids these are",
            )
        return ids

    def _same_columns(self, present: set[str], place: str) -> None:
        if self._logprobs is None:
            self._logprobs = present
        differing = sorted(present ^ self._logprobs)
        if differing:
            raise PromptError(
                f"{differing[0]}: some rows have it, and some have not",
                where=place,
                remedy="give it in every row, or in none",
            )

    def _prompt_id(self, fields: Mapping[str, Any], prompt: list[int], place: str) -> str:
        said = [_text(fields, name, place) for name in ("prompt_id", "id") if name in fields]
        if len(set(said)) > 1:
            raise PromptError("id and prompt_id differ", where=place, remedy="give one of them")
        prompt_id = (said[0] if said else None) or digest(prompt)[:16]
        if self._prompts.setdefault(prompt_id, prompt) != prompt:
            raise PromptError(
                f"id {prompt_id!r} stands for two prompts",
                where=place,
                remedy="give rows of other prompts ids of their own",
            )
        return prompt_id

    def _sample_index(self, fields: Mapping[str, Any], prompt_id: str, place: str) -> int:
        taken = self._indexes.setdefault(prompt_id, set())
        index = fields.get("sample_index", len(taken))
        if type(index) is not int or not 0 <= index < 2**31:
            raise PromptError("sample_index is an integer from 0 on", where=place, got=index)
        if index in taken:
            raise PromptError(
                f"prompt {prompt_id!r} has two samples {index}",
                where=place,
                remedy="leave sample_index out, or count from 0",
            )
        taken.add(index)
        return index

    def _decoded(self, fields: Mapping[str, Any], completion: list[int], place: str) -> str:
        said = _text(fields, "text", place)
        if said is not None:
            return said
        return self._tokenizer.decode(completion, skip_special_tokens=True)


def _fields(row: Any, place: str) -> dict[str, Any]:
    """What a row says; null is the same as nothing."""
    if not isinstance(row, dict):
        raise PromptError("a row is an object", where=place, got=type(row).__name__)
    unknown = sorted(set(row) - set(COLUMNS))
    if unknown:
        near = difflib.get_close_matches(unknown[0], COLUMNS, n=1)
        remedy = f"did you mean {near[0]!r}?" if near else f"known columns: {', '.join(COLUMNS)}"
        raise PromptError(f"unknown column {unknown[0]!r}", where=place, remedy=remedy)
    return {name: value for name, value in row.items() if value is not None}


def _text(fields: Mapping[str, Any], name: str, place: str) -> str | None:
    """A field as text; whole numbers are taken as such."""
    value = fields.get(name)
    if value is None:
        return None
    if not isinstance(value, str) and type(value) is not int:
        raise PromptError(f"{name} is text", where=place, got=type(value).__name__)
    return _unicode(str(value), name, place)


def _unicode(text: str, name: str, place: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise PromptError(f"{name} is not Unicode: half a character", where=place) from error
    return text


def _messages(fields: Mapping[str, Any], place: str) -> tuple[tuple[str, str], ...] | None:
    """The prompt's chat, which a teacher with a prompt of its own is shown."""
    if "messages" not in fields:
        return None
    chat = parse_chat(fields["messages"], place)
    return tuple((_unicode(r, "role", place), _unicode(c, "content", place)) for r, c in chat)


def _entries(fields: Mapping[str, Any], name: str, num_tokens: int, place: str) -> list[Any]:
    """A list with an entry a completion token."""
    values = fields[name]
    if not isinstance(values, list):
        raise PromptError(f"{name} is a list", where=place, got=type(values).__name__)
    if len(values) != num_tokens:
        raise PromptError(
            f"{name} has not an entry a completion token",
            where=place,
            expected=num_tokens,
            got=len(values),
        )
    return values


def _mask(fields: Mapping[str, Any], num_tokens: int, place: str) -> NDArray[np.bool_]:
    if "loss_mask" not in fields:
        return np.ones(num_tokens, np.bool_)
    values = _entries(fields, "loss_mask", num_tokens, place)
    wrong = [value for value in values if not isinstance(value, int) or value not in (0, 1)]
    if wrong:
        raise PromptError("loss_mask is of 0 and 1", where=place, got=repr(wrong[0]))
    return np.asarray(values, np.bool_)


def _logprobs(
    fields: Mapping[str, Any], name: str, supervised: NDArray[np.bool_], place: str
) -> NDArray[np.float32] | None:
    """A column of log-probs; one of a masked token may be missing, and is NaN then."""
    if name not in fields:
        return None
    given = _entries(fields, name, len(supervised), place)
    for t, value in enumerate(given):
        if value is None and not supervised[t]:
            continue
        number = type(value) in (int, float)
        if not number or not _LEAST_LOGPROB <= value <= _LOGPROB_SLACK:
            raise PromptError(
                f"{name}: not the log-prob of a token that was sampled",
                where=f"{place} token {t}",
                expected="a finite number, at most 0",
                got="null" if value is None else value,
                remedy="leave the column out where log-probs are not known",
            )
    return np.asarray([math.nan if v is None else v for v in given], np.float32)
