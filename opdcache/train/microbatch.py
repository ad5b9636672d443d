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


@dataclass(frozen=True, slots=True)
class MicroBatch:
    """Sequences of one forward and backward; T are the supervised tokens alone.

    Token t of the batch is predicted by the hidden state at ``(rows_T[t], columns_T[t])``. Tokens
    that are masked are fed, and stand nowhere else. Absent columns are None.

    Attributes:
        num_sequences: completions.
        input_ids_BL: int64; what comes after all that predicts a supervised token is not fed. A
            row a sequence, padded on the right; or all in one row, one after another.
        position_ids_BL: int64, of packed sequences, each of which begins at 0; None of padded ones.
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
    """

    num_sequences: int
    input_ids_BL: Tensor
    position_ids_BL: Tensor | None
    rows_T: Tensor
    columns_T: Tensor
    sequences_T: Tensor
    places_T: Tensor
    weights_T: Tensor
    sampled_T: Tensor
    sampling_T: Tensor | None
    teacher_sampled_T: Tensor | None
    teacher_entropy_T: Tensor | None
    topk_ids_TK: Tensor | None
    topk_TK: Tensor | None
    kept_TK: Tensor | None
    tail_T: Tensor | None
    recorded_ids_TS: Tensor | None
    recorded_TS: Tensor | None
    recorded_tail_T: Tensor | None
    draw_ids_TN: Tensor | None
    draw_counts_TN: Tensor | None
    reference_sampled_T: Tensor | None = None
    reference_recorded_TS: Tensor | None = None

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


class Start(NamedTuple):
    """Where a sequence begins among the tokens fed."""

    row: int
    column: int


Laid = tuple[NDArray[np.int64], NDArray[np.int64] | None, list[Start]]
"""Token ids, position ids, and where each sequence begins."""


def padded(fed: Sequence[NDArray[np.int32]]) -> Laid:
    """A row a sequence."""
    ids = np.zeros((len(fed), max(map(len, fed))), np.int64)
    for row, sequence in enumerate(fed):
        ids[row, : len(sequence)] = sequence
    return ids, None, [Start(row, 0) for row in range(len(fed))]


def packed(fed: Sequence[NDArray[np.int32]]) -> Laid:
    """All sequences in one row, told apart by their position ids."""
    lengths = [len(sequence) for sequence in fed]
    ids = np.concatenate(fed).astype(np.int64)[None]
    positions = np.concatenate([np.arange(length) for length in lengths])[None]
    return ids, positions, [Start(0, int(s)) for s in np.cumsum([0, *lengths[:-1]])]


def alike(entries: Sequence[NDArray[Any]]) -> list[NDArray[Any]]:
    """Entries of equal width: sets that were made for another k may stand in one batch."""
    width = max((e.shape[1] for e in entries), default=0)
    return [np.pad(e, ((0, 0), (0, width - e.shape[1]))) for e in entries]
