"""One completion token by token, as people look at it; the record is in ``schemas.inspection``.

Texts are as the tokenizer gives them, control characters and all: whoever shows them makes them
safe for where they are shown.
"""

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..errors import NotInstalled, UsageError
from ..identity import vocabulary_fingerprint
from ..schemas.inspection import Entry, Row, Token
from ..store.cache import Cache
from .blocks import Block, Entries, blocks
from .measures import Shared, Values, measures
from .targets import Shard

__all__ = ["Entry", "Row", "Texts", "Token", "read_row", "row_of"]

_UNKNOWN_CHARACTER = "\N{REPLACEMENT CHARACTER}"
_MEASURED = {
    "advantage": "advantage",
    "student_entropy": "student_entropy",
    "student_entropy_low": "student_entropy_low",
    "student_entropy_high": "student_entropy_high",
    "teacher_entropy": "teacher_entropy",
    "overlap": "overlap",
    "mass_student": "overlap_mass_student",
    "mass_teacher": "overlap_mass_teacher",
}
"""A token's fields that are measures, by their names there."""


class Texts:
    """Ids to text.

    Args:
        path: a ``tokenizer.json``; without one, the text of an id is ``<id>``.

    Raises:
        UsageError: the file is not there, or is no tokenizer.
        NotInstalled: the ``tokenizers`` package is not.
    """

    def __init__(self, path: Path | None = None) -> None:
        self._tokenizer = None if path is None else _tokenizer(path)
        self._known: dict[int, str] = {}

    @property
    def known(self) -> bool:
        """Whether there is a tokenizer."""
        return self._tokenizer is not None

    def are_of(self, vocabulary: str) -> bool:
        """Whether the ids mean what they mean by a ``identity.vocabulary_fingerprint``."""
        if self._tokenizer is None:
            return True
        return vocabulary_fingerprint(self._tokenizer.get_vocab()) == vocabulary

    def token(self, id: int) -> str:
        """Of one id, a leading space included; bytes of part of a character as ``\\xNN``."""
        if id not in self._known:
            self._known[id] = self._text(id)
        return self._known[id]

    def text(self, ids: Sequence[int]) -> str:
        """Of ids in a row, special tokens included."""
        if self._tokenizer is None:
            return "".join(map(self.token, ids))
        return str(self._tokenizer.decode(list(ids), skip_special_tokens=False))

    def _text(self, id: int) -> str:
        piece = None if self._tokenizer is None else self._tokenizer.id_to_token(id)
        if piece is None:
            return f"<{id}>"
        # Of two, the second keeps the space that some decoders take off what comes first.
        text = self.text([id, id])[len(self.text([id])) :]
        return text if _UNKNOWN_CHARACTER not in text else _bytes_shown(piece)


def _tokenizer(path: Path) -> Any:
    try:
        from tokenizers import Tokenizer
    except ModuleNotFoundError as error:
        raise NotInstalled(
            "texts of tokens need the package tokenizers", remedy="pip install tokenizers"
        ) from error
    try:
        return Tokenizer.from_str(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise UsageError("no such file", where=path, expected="a tokenizer.json") from error
    except Exception as error:  # the package raises no narrower kind
        raise UsageError(f"not a tokenizer: {error}", where=path) from error


def _bytes_shown(piece: str) -> str:
    """A vocabulary's piece with bytes that are no character: ``<0xE6>``, or by GPT-2's alphabet."""
    alphabet = _byte_alphabet()
    if byte := re.fullmatch(r"<0x([0-9A-Fa-f]{2})>", piece):
        held = bytes.fromhex(byte[1])
    elif all(character in alphabet for character in piece):
        held = bytes(alphabet[character] for character in piece)
    else:
        return piece
    return held.decode("utf-8", "backslashreplace")


def _byte_alphabet() -> dict[str, int]:
    """Byte-level vocabularies write a byte as itself where that can be seen, else from 256 on."""
    seen = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = sorted(set(range(256)) - set(seen))
    return {chr(b): b for b in seen} | {chr(256 + n): b for n, b in enumerate(others)}


def read_row(cache: Cache, shard: Shard, row: int, texts: Texts, *, k: int) -> Row:
    """One completion of a shard; what holds its tokens alone is decoded.

    Raises:
        UsageError: the shard has not so many rows.
        ObjectMissing, ChecksumMismatch, InvalidShard: it is not what was committed.
    """
    for block in blocks(cache, shard, row):
        return row_of(block, row, texts, k=k)
    num = shard.scored.rollouts.num_rows
    raise UsageError(
        f"there is no row {row}",
        where=f"shard {shard.name}",
        expected=f"0 to {num - 1}" if num else "none: it is empty",
    )


def row_of(block: Block, row: int, texts: Texts, *, k: int) -> Row:
    """One completion of a block.

    An entry has the log-prob of the model whose list it is in, and the other model's where that is
    stored: the teacher's scores of the recorded ids, either model's stored entries, or the sampled
    token's.

    Args:
        row: of the shard.
        k: entries of each model that are listed and compared.

    Raises:
        UsageError: the block does not have the row.
    """
    within = row - block.first_row
    if not 0 <= within < block.table.num_rows:
        last = block.first_row + block.table.num_rows - 1
        raise UsageError(
            f"there is no row {row}",
            where=f"shard {block.shard}",
            expected=f"{block.first_row} to {last}",
        )
    alone = _alone(block, within)
    stored = alone.table.to_pylist()[0]
    tokens = tuple(_Tokens(alone, texts, k))
    rewards = [t.advantage for t in tokens if t.supervised and t.advantage is not None]
    return Row(
        shard=block.shard,
        row=row,
        rollout_id=stored["rollout_id"],
        prompt=_prompt(stored, texts),
        task=stored["task"],
        answer=stored.get("answer"),
        finish_reason=stored["finish_reason"],
        text=stored["text"],
        tokens=tokens,
        reward=sum(rewards) / len(rewards) if rewards else None,
    )


def _alone(block: Block, within: int) -> Block:
    """A block of one completion of a block."""
    start, stop = block.offsets[within : within + 2].tolist()
    tokens, own, student = slice(start, stop), block.own, block.student
    return replace(
        block,
        first_row=block.first_row + within,
        table=block.table.slice(within, 1),
        offsets=np.asarray([0, stop - start]),
        token_ids=block.token_ids[tokens],
        supervised=block.supervised[tokens],
        behavior_logprobs=None if (b := block.behavior_logprobs) is None else b[tokens],
        student=None
        if student is None
        else Entries(student.ids[tokens], student.logprobs[tokens], student.num_kept[tokens]),
        scores=block.scores.rows(within, within + 1),
        own=None if own is None else own.rows(within, within + 1),
    )


def _prompt(stored: Mapping[str, Any], texts: Texts) -> str:
    if texts.known or not stored.get("messages"):
        return texts.text(stored["prompt_token_ids"])
    return "\n".join(f"{role}: {content}" for role, content in json.loads(stored["messages"]))


@dataclass(frozen=True)
class _Tokens:
    """The tokens of a block of one completion."""

    block: Block
    texts: Texts
    k: int

    def __iter__(self) -> Iterator[Token]:
        block = self.block
        measured = measures(block, self.shared, self.k)
        fields = {name: measured[key] for name, key in _MEASURED.items() if key in measured}
        ids, supervised = block.token_ids.tolist(), block.supervised.tolist()
        for t, (id, is_supervised) in enumerate(zip(ids, supervised, strict=True)):
            given = {name: _value(values[t]) for name, values in fields.items()}
            yield Token(
                position=t,
                id=id,
                text=self.texts.token(id),
                supervised=is_supervised,
                student_logprob=_at(block.behavior_logprobs, t),
                teacher_logprob=_at(block.scores.sampled_logprobs, t),
                student=tuple(self.student_entries(t)),
                student_tail=_at(self.student_tails, t),
                teacher=tuple(self.teacher_entries(t)),
                teacher_tail=_at(self.teacher_tails, t),
                **(dict.fromkeys(_MEASURED) | given),
            )

    @cached_property
    def shared(self) -> Shared | None:
        """Which entries are both models'."""
        return Shared.between(self.block)

    @cached_property
    def student_tails(self) -> Values | None:
        """[T]: mass outside the first k of the student's entries."""
        if (student := self.block.student) is None:
            return None
        kept_TS = np.arange(student.ids.shape[1]) < np.minimum(student.num_kept, self.k)[:, None]
        held_T = np.where(kept_TS, np.exp(student.logprobs.astype(np.float64)), 0).sum(axis=1)
        return np.asarray(np.clip(1 - held_T, 0, 1))

    @cached_property
    def teacher_tails(self) -> Values | None:
        """[T]: mass outside the first k of the teacher's entries."""
        if (topk := self.block.scores.topk) is None:
            return None
        return np.asarray(np.exp(topk.cut(self.k).tail_logprobs.astype(np.float64)))

    @cached_property
    def shared_ids(self) -> list[set[int]]:
        """Of each token, the ids that are compared and both models'."""
        if self.shared is None:
            return [set()] * len(self.block.token_ids)
        both = zip(self.shared.student.ids, self.shared.within(self.k), strict=True)
        return [set(ids_S[within_S].tolist()) for ids_S, within_S in both]

    def student_entries(self, t: int) -> Iterator[Entry]:
        """The student's first k at a token."""
        theirs = self.teacher_logprobs(t)
        for id, value in islice(_listed(self.block.student, t).items(), self.k):
            yield self.entry(id, t, value, theirs.get(id))

    def teacher_entries(self, t: int) -> Iterator[Entry]:
        """The teacher's first k at a token."""
        ours = self.student_logprobs(t)
        for id, value in islice(_listed(self.block.teacher, t).items(), self.k):
            yield self.entry(id, t, ours.get(id), value)

    def entry(self, id: int, t: int, ours: float | None, theirs: float | None) -> Entry:
        """An id at a token."""
        return Entry(
            id=id,
            text=self.texts.token(id),
            shared=id in self.shared_ids[t],
            student_logprob=ours,
            teacher_logprob=theirs,
        )

    def student_logprobs(self, t: int) -> dict[int, float | None]:
        """All that is stored of the student at a token, by id; of several, the most exact."""
        block = self.block
        known = {int(block.token_ids[t]): _at(block.behavior_logprobs, t)}
        return _listed(block.own_entries, t) | known | _listed(block.student, t)

    def teacher_logprobs(self, t: int) -> dict[int, float | None]:
        """All that is stored of the teacher at a token, by id; of several, that of recorded ids."""
        block, given = self.block, self.block.scores.student_topk
        known = {int(block.token_ids[t]): _at(block.scores.sampled_logprobs, t)}
        known |= _listed(block.teacher, t)
        if given is not None and block.student is not None and block.has_recorded:
            ids, values = block.student.ids[t].tolist(), given.logprobs[t].tolist()
            known |= {id: _value(value) for id, value in zip(ids, values, strict=True)}
        return known


def _listed(entries: Entries | None, t: int) -> dict[int, float | None]:
    """A model's stored entries of a token."""
    if entries is None:
        return {}
    kept = slice(0, int(entries.num_kept[t]))
    ids, values = entries.ids[t, kept].tolist(), entries.logprobs[t, kept].tolist()
    return {id: _value(value) for id, value in zip(ids, values, strict=True)}


def _at(values: NDArray[Any] | None, t: int) -> float | None:
    return None if values is None else _value(values[t])


def _value(value: float) -> float | None:
    """NaN is none."""
    return None if np.isnan(value) else float(value)
