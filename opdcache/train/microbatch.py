"""The tensors of one forward and backward, and how sequences are laid out in them.

Legend: B sequences, L padded length, T completion tokens of the micro-batch, K teacher entries,
S recorded student entries, N drawn ids.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..schemas.training import Layout


@dataclass(frozen=True, slots=True)
class MicroBatch:
    """Sequences of one forward and backward; T are the supervised tokens alone.

    Token t of the batch is predicted by the hidden state at ``(rows_T[t], columns_T[t])``. Tokens
    that are masked are fed, and stand nowhere else. Absent columns are None.

    Attributes:
        num_sequences: completions.
        input_ids_BL: int64; what comes after all that predicts a supervised token is not fed. A
            row a sequence, padded on the right; or all in one row, one after another; or a row a
            prompt, with its completions one after another behind it, padded on the right.
        position_ids_BL: int64; None where they are those of the columns.
        branches_BL: int64, of rows of prompts: 0 in the prompt, then the number of the completion,
            -1 in the padding; None of other rows.
        sequences_T, places_T: int64, which completion a token is of, and where it stands in it.
        weights_T: float32, how much each counts in the loss before any is chosen.
        sampled_T: int64, the supervised tokens.
        sampling_T: float32, log-prob under the distribution sampled from; None where an import
            had none.
        teacher_sampled_T, teacher_entropy_T: float32.
        topk_ids_TK, topk_TK, kept_TK, tail_T: the teacher's likeliest entries.
        recorded_ids_TS, recorded_TS, recorded_tail_T: ids that the student recorded, the teacher's
            log-probs of them, and the log of its mass elsewhere.
        draw_ids_TN, draw_counts_TN: ids that the teacher drew, and how often; 0 past the last.
        reference_sampled_T, reference_recorded_TS: a reference's log-probs of the sampled token and
            of the recorded ids.
        advantage_T: float32, of the outcome of the token's completion; see ``outcomes``.
    """

    num_sequences: int
    input_ids_BL: Tensor
    position_ids_BL: Tensor | None
    branches_BL: Tensor | None
    rows_T: Tensor
    columns_T: Tensor
    sequences_T: Tensor
    places_T: Tensor
    weights_T: Tensor
    sampled_T: Tensor
    sampling_T: Tensor | None = None
    teacher_sampled_T: Tensor | None = None
    teacher_entropy_T: Tensor | None = None
    topk_ids_TK: Tensor | None = None
    topk_TK: Tensor | None = None
    kept_TK: Tensor | None = None
    tail_T: Tensor | None = None
    recorded_ids_TS: Tensor | None = None
    recorded_TS: Tensor | None = None
    recorded_tail_T: Tensor | None = None
    draw_ids_TN: Tensor | None = None
    draw_counts_TN: Tensor | None = None
    reference_sampled_T: Tensor | None = None
    reference_recorded_TS: Tensor | None = None
    advantage_T: Tensor | None = None

    @property
    def num_tokens(self) -> int:
        """Supervised tokens."""
        return int(self.sampled_T.shape[0])

    def cut(self, part: slice) -> "MicroBatch":
        """The same sequences with some of the supervised tokens."""
        return self._with(lambda column: column[part], lambda name: "_T" in name)

    def pinned(self) -> "MicroBatch":
        """In memory that an accelerator copies from while it computes."""
        return self._with(lambda column: column.pin_memory())

    def to(self, device: torch.device) -> "MicroBatch":
        """On a device."""
        return self._with(lambda column: column.to(device, non_blocking=True))

    def _with(
        self, change: Callable[[Tensor], Tensor], of: Callable[[str], bool] = lambda name: True
    ) -> "MicroBatch":
        """The same with some of the tensors changed."""
        columns = {field.name: getattr(self, field.name) for field in fields(self)}
        changed = {n: change(c) for n, c in columns.items() if isinstance(c, Tensor) and of(n)}
        return MicroBatch(**columns | changed)


@dataclass(frozen=True, slots=True)
class Fed:
    """What the model reads of a sequence: all before the last supervised token."""

    prompt: NDArray[np.int32]
    completion: NDArray[np.int32]

    @property
    def ids(self) -> NDArray[np.int32]:
        """All of it."""
        return np.concatenate([self.prompt, self.completion])


class Start(NamedTuple):
    """Where a sequence stands among the tokens fed.

    Attributes:
        last: column of the prompt's last token.
        completion: column of the completion's first token.
    """

    row: int
    last: int
    completion: int

    def before(self, places: NDArray[np.int64]) -> NDArray[np.int64]:
        """Columns of the tokens that predict those at some places of the completion."""
        return np.where(places > 0, self.completion + places - 1, self.last)


class Laid(NamedTuple):
    """How sequences are laid out; see ``MicroBatch``. Starts are in the sequences' order."""

    ids: NDArray[np.int64]
    positions: NDArray[np.int64] | None
    branches: NDArray[np.int64] | None
    starts: Sequence[Start]


def padded(fed: Sequence[Fed]) -> Laid:
    """A row a sequence."""
    ids = np.zeros((len(fed), max(len(one.ids) for one in fed)), np.int64)
    for row, one in enumerate(fed):
        ids[row, : len(one.ids)] = one.ids
    lengths = [len(one.prompt) for one in fed]
    return Laid(ids, None, None, [Start(row, n - 1, n) for row, n in enumerate(lengths)])


def packed(fed: Sequence[Fed]) -> Laid:
    """All sequences in one row, told apart by their position ids."""
    lengths = [len(one.ids) for one in fed]
    ids = np.concatenate([one.ids for one in fed]).astype(np.int64)[None]
    positions = np.concatenate([np.arange(length) for length in lengths])[None]
    begins = np.cumsum([0, *lengths[:-1]]).tolist()
    ends = [begin + len(one.prompt) for begin, one in zip(begins, fed, strict=True)]
    return Laid(ids, positions, None, [Start(0, end - 1, end) for end in ends])


def shared(fed: Sequence[Fed]) -> Laid:
    """A row a prompt, which its completions share; branches tell these apart."""
    rows: dict[bytes, list[int]] = {}
    for i, one in enumerate(fed):
        rows.setdefault(one.prompt.tobytes(), []).append(i)
    if len(rows) == len(fed):
        return padded(fed)  # nothing to tell apart, so that attention is the fastest there is
    width = max(
        len(fed[mine[0]].prompt) + sum(len(fed[i].completion) for i in mine)
        for mine in rows.values()
    )
    ids = np.zeros((len(rows), width), np.int64)
    positions, branches = np.zeros_like(ids), np.full_like(ids, -1)
    starts: dict[int, Start] = {}
    for row, mine in enumerate(rows.values()):
        prompt, column = fed[mine[0]].prompt, 0
        for branch, part in enumerate([prompt, *(fed[i].completion for i in mine)]):
            here = slice(column, column + len(part))
            ids[row, here], branches[row, here] = part, branch
            positions[row, here] = np.arange(len(part)) + (len(prompt) if branch else 0)
            if branch:
                starts[mine[branch - 1]] = Start(row, len(prompt) - 1, column)
            column = here.stop
    return Laid(ids, positions, branches, [starts[i] for i in range(len(fed))])


LAYOUTS: dict[Layout, Callable[[Sequence[Fed]], Laid]] = {
    "padded": padded,
    "packed": packed,
    "shared": shared,
}


def alike(entries: Sequence[NDArray[Any]]) -> list[NDArray[Any]]:
    """Entries of equal width: sets that were made for another k may stand in one batch."""
    width = max((e.shape[1] for e in entries), default=0)
    return [np.pad(e, ((0, 0), (0, width - e.shape[1]))) for e in entries]
