"""A scoring model in transformers: exact statistics of its distributions at completion positions.

Sequences are padded on the right and attended causally, so padding is never seen and needs no mask.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..errors import InvalidShard
from ..heads import TeacherStats, split_head, teacher_statistics
from ..models import default_device, load_model


@dataclass(frozen=True, slots=True)
class Sequences:
    """Completions to score, on one token axis. N completions, T tokens, S recorded entries a token.

    Attributes:
        prompts: int32 token ids of each prompt, as the teacher reads it; never empty.
        completions: int32 token ids of each completion; may be empty.
        recorded_TS: int64 [T, S], more ids to look up at each token; S may be 0.
    """

    prompts: Sequence[NDArray[np.int32]]
    completions: Sequence[NDArray[np.int32]]
    recorded_TS: NDArray[np.int64]

    @property
    def offsets(self) -> NDArray[np.int64]:
        """[N + 1]: where each completion's tokens are on the token axis."""
        return np.concatenate([[0], np.cumsum([len(c) for c in self.completions])]).astype(np.int64)

    @property
    def sampled_T(self) -> NDArray[np.int64]:
        """int64 [T], the completion tokens."""
        return np.concatenate([np.zeros(0, np.int64), *self.completions]).astype(np.int64)


class TransformersScorer:
    """Scores completions with a causal LM.

    Args:
        folder: the model, in Hugging Face format.
        dtype: dtype that its body computes in; the head is computed in float32.
        batch_tokens: padded tokens of one forward at most (one sequence at least).

    Raises:
        ModelError: the model cannot be loaded, or its head is not a plain linear map.
    """

    def __init__(self, folder: Path, *, dtype: str, batch_tokens: int) -> None:
        self._device = default_device()
        self._body, self._head = split_head(load_model(folder, dtype, self._device), folder)
        self._batch_tokens = batch_tokens

    @torch.no_grad()
    def score(
        self,
        sequences: Sequences,
        *,
        k: int,
        mass: float,
        num_ids: int,
        uniforms_TN: NDArray[np.float64] | None = None,
    ) -> TeacherStats:
        """Statistics of every completion token, in the order of the token axis, on the CPU.

        Args:
            k, mass: see ``teacher_statistics``.
            num_ids: ids that student and teacher share; entries are kept among these alone.
            uniforms_TN: float64 [T, N] in [0, 1), each for one draw; none by default.

        Raises:
            InvalidShard: a token id is not in the model's vocabulary.
        """
        parts, orders = [], []
        uniforms = None if uniforms_TN is None else torch.from_numpy(uniforms_TN)
        for hidden_TD, at_T in self.hidden_batches(sequences):
            stats = teacher_statistics(
                hidden_TD,
                self.head_weight,
                torch.from_numpy(sequences.sampled_T[at_T]).to(self._device),
                torch.from_numpy(sequences.recorded_TS[at_T]).to(self._device),
                k=k,
                mass=mass,
                num_ids=num_ids,
                uniforms_TN=None if uniforms is None else uniforms[at_T].to(self._device),
            )
            parts.append(stats)
            orders.append(at_T)
        return _in_order(parts, orders)

    @property
    def head_weight(self) -> Tensor:
        """The LM head, [V, D]."""
        return self._head.weight

    @torch.no_grad()
    def hidden_batches(self, sequences: Sequences) -> Iterator[tuple[Tensor, NDArray[np.int64]]]:
        """Hidden states that predict completion tokens [T, D], batch by batch, and those tokens'
        places on the token axis. The batches depend on the sequences alone, not on the model.

        Raises:
            InvalidShard: a token id is not in the model's vocabulary.
        """
        vocab = self._head.weight.shape[0]
        read: list[NDArray[Any]] = [*sequences.prompts, *sequences.completions]
        read.append(sequences.recorded_TS)
        largest = max(int(ids.max(initial=0)) for ids in read)
        if largest >= vocab:
            raise InvalidShard(
                "a token id is not in the model's vocabulary", expected=f"< {vocab}", got=largest
            )
        for rows in self._batches(sequences):
            yield self._hidden(sequences, rows)

    def _batches(self, sequences: Sequences) -> Iterator[list[int]]:
        """Rows by falling length, as many as the padded budget holds."""
        lengths = [
            len(p) + len(c) for p, c in zip(sequences.prompts, sequences.completions, strict=True)
        ]
        order = sorted(range(len(lengths)), key=lambda row: -lengths[row])
        while order:
            size = max(1, self._batch_tokens // lengths[order[0]])
            yield order[:size]
            order = order[size:]

    def _hidden(
        self, sequences: Sequences, rows: Sequence[int]
    ) -> tuple[Tensor, NDArray[np.int64]]:
        """Hidden states that predict the rows' completion tokens, and those tokens' places."""
        whole = [np.concatenate([sequences.prompts[r], sequences.completions[r]]) for r in rows]
        padded = np.zeros((len(rows), max(len(w) for w in whole)), np.int64)
        for row, ids in enumerate(whole):
            padded[row, : len(ids)] = ids
        body = self._body(input_ids=torch.from_numpy(padded).to(self._device), use_cache=False)
        states: Tensor = body.last_hidden_state
        starts = [len(sequences.prompts[r]) - 1 for r in rows]
        counts = [len(sequences.completions[r]) for r in rows]
        taken = [states[i, s : s + n] for i, (s, n) in enumerate(zip(starts, counts, strict=True))]
        offsets = sequences.offsets
        places = [np.arange(offsets[r], offsets[r + 1]) for r in rows]
        return torch.cat(taken), np.concatenate(places)


def _in_order(parts: Sequence[TeacherStats], orders: Sequence[NDArray[np.int64]]) -> TeacherStats:
    """Batches put back on the token axis."""
    back = torch.from_numpy(np.argsort(np.concatenate(orders)))
    columns = (
        torch.cat([getattr(p, f.name).cpu() for p in parts])[back] for f in fields(TeacherStats)
    )
    return TeacherStats(*columns)
