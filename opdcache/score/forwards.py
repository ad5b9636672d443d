"""Hidden states at completion positions, by forwards over few tokens.

Sequences are padded on the right and attended causally, so padding is never seen and needs no mask.
Where they begin alike, what they share goes through the model once, and the rest continues from its
keys and values: completions of one prompt, or prompts with a long system prompt in common.
"""

import copy
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from .teacher import Sequences, by_length

_MIN_GAIN = 0.1
"""Share of all tokens that shared beginnings must save: keys and values are copied for them."""


@dataclass(frozen=True, slots=True)
class _Shared:
    """Beginnings of one forward, and the sequences that continue from them, forward by forward.

    Attributes:
        firsts: a row of each beginning.
        batches: all rows that begin so.
    """

    firsts: list[int]
    batches: list[list[int]]


class Forwards:
    """Runs a causal LM's body over completions.

    Args:
        body: gives hidden states of token ids.
        device: of its input.
        batch_tokens: padded tokens of one forward at most, with those that it continues from (one
            sequence at least); it may be lowered between forwards.
    """

    def __init__(self, body: nn.Module, device: torch.device, batch_tokens: int) -> None:
        self._body, self._device, self.batch_tokens = body, device, batch_tokens
        self.continues = self._continues_exactly()

    @torch.no_grad()
    def each(self, sequences: Sequences) -> Iterator[tuple[list[int], Tensor]]:
        """All completions, some at a time: their rows, and the hidden states that predict their
        tokens, one completion after the other, [T, D]."""
        lengths = sequences.lengths
        alone = list(by_length(lengths, self.batch_tokens))
        fewest = (1 - _MIN_GAIN) * _num_padded(lengths, alone)
        best: tuple[NDArray[np.int64], list[_Shared]] | None = None
        for shared_N in shared_beginnings(sequences) if self.continues and alone else ():
            plan, num_tokens = _plan(sequences, shared_N, self.batch_tokens)
            if num_tokens < fewest:
                best, fewest = (shared_N, plan), num_tokens
        if best is None:
            yield from ((rows, self.alone(sequences, rows)) for rows in alone)
            return
        for shared in best[1]:
            yield from self._continued(sequences, best[0], shared)

    @torch.no_grad()
    def alone(self, sequences: Sequences, rows: Sequence[int]) -> Tensor:
        """Hidden states [T, D] of some completions from one forward of all their tokens."""
        states_RLD = self._states(_padded([sequences.whole(row) for row in rows])).last_hidden_state
        return _predicting(states_RLD, sequences, rows, [0] * len(rows))

    def _continued(
        self, sequences: Sequences, shared_N: NDArray[np.int64], shared: _Shared
    ) -> Iterator[tuple[list[int], Tensor]]:
        """What ``each`` gives, of all rows that have these beginnings, ``shared_N`` tokens long."""
        begun = [sequences.whole(row)[: shared_N[row]] for row in shared.firsts]
        place = {ids.tobytes(): i for i, ids in enumerate(begun)}
        ids_BS = _padded(begun, left=True)
        seen_BS = np.arange(ids_BS.shape[1]) >= ids_BS.shape[1] - shared_N[shared.firsts, None]
        positions_BS = np.maximum(seen_BS.cumsum(axis=1) - 1, 0)
        known = self._states(ids_BS, seen_BS, positions_BS).past_key_values
        for rows in shared.batches:
            of = [place[sequences.whole(row)[: shared_N[row]].tobytes()] for row in rows]
            ids_RL = _padded([sequences.whole(row)[shared_N[row] :] for row in rows])
            seen_RM = np.hstack([seen_BS[of], np.ones(ids_RL.shape, np.bool_)])
            positions_RL = shared_N[rows, None] + np.arange(ids_RL.shape[1])
            theirs = copy.copy(known)  # its layers replace their tensors, and never write to them
            theirs.layers = [copy.copy(layer) for layer in known.layers]
            theirs.batch_select_indices(torch.tensor(of))
            states_RLD = self._states(
                ids_RL, seen_RM, positions_RL, past_key_values=theirs
            ).last_hidden_state
            yield rows, _predicting(states_RLD, sequences, rows, shared_N[rows].tolist())

    def _states(
        self,
        ids_BL: NDArray[np.int64],
        seen_BM: NDArray[np.bool_] | None = None,
        positions_BL: NDArray[np.int64] | None = None,
        **more: object,
    ) -> Any:
        """The body's output: of whole sequences, or of parts of them; then with keys and values."""
        arrays = {"input_ids": ids_BL, "attention_mask": seen_BM, "position_ids": positions_BL}
        given = {
            n: torch.from_numpy(a).to(self._device) for n, a in arrays.items() if a is not None
        }
        return self._body(**given, **more, use_cache=seen_BM is not None)

    @torch.no_grad()
    def _continues_exactly(self) -> bool:
        """Whether the model keeps keys and values of tokens and nothing else, and continuing from
        them is the same as a whole forward, but for rounding."""
        from transformers.cache_utils import (
            DynamicCache,
            DynamicLayer,
            DynamicSlidingWindowLayer,
        )

        ids = np.arange(1, 13, dtype=np.int32)
        prompts, completions = [ids[:6], ids[:6], ids[3:5]], [ids[5:9], ids[7:9], ids[1:8]]
        probe, rows = Sequences(prompts, completions, np.zeros((13, 0), np.int32)), [0, 1, 2]
        read = self._states(_padded([ids]), np.ones((1, 12), np.bool_))
        kept: Any = getattr(read, "past_key_values", None)
        plain = (DynamicLayer, DynamicSlidingWindowLayer)
        if type(kept) is not DynamicCache or any(type(layer) not in plain for layer in kept.layers):
            return False
        beginnings = np.asarray([5, 5, 1])
        ((_, ours_TD),) = self._continued(probe, beginnings, _Shared([0, 2], [rows]))
        theirs_TD = self.alone(probe, rows)
        off = (ours_TD.float() - theirs_TD.float()).norm() / theirs_TD.float().norm()
        return bool(off <= 2 * torch.finfo(theirs_TD.dtype).eps ** 0.5)


def shared_beginnings(sequences: Sequences) -> Iterator[NDArray[np.int64]]:
    """How many tokens of each sequence others may share, [N]: its prompt but for the last token,
    which predicts the first of its completion; or what all prompts begin with. None, where a
    prompt is too short for either."""
    prompts = sequences.prompts
    whole_N = np.asarray([len(prompt) - 1 for prompt in prompts])
    shortest = int(whole_N.min())
    alike_P = np.all([prompt[:shortest] == prompts[0][:shortest] for prompt in prompts], axis=0)
    num_alike = shortest if alike_P.all() else int(alike_P.argmin())
    if shortest > 0:
        yield whole_N
    if num_alike > 0:
        yield np.full(len(prompts), num_alike)


def _plan(
    sequences: Sequences, shared_N: NDArray[np.int64], batch_tokens: int
) -> tuple[list[_Shared], int]:
    """Forwards that read each beginning once, and their tokens, padding included."""
    rows_of: dict[bytes, list[int]] = {}
    for row, num_shared in enumerate(shared_N):
        rows_of.setdefault(sequences.whole(row)[:num_shared].tobytes(), []).append(row)
    groups = list(rows_of.values())
    firsts = np.asarray([rows[0] for rows in groups])
    own_N, plan, num_tokens = sequences.lengths - shared_N, [], 0
    for taken in by_length(shared_N[firsts], batch_tokens):
        rows = np.asarray([row for group in taken for row in groups[group]])
        lengths = own_N[rows] + shared_N[firsts[taken]].max()
        batches = [rows[of].tolist() for of in by_length(lengths, batch_tokens)]
        plan.append(_Shared(firsts[taken].tolist(), batches))
        num_tokens += _num_padded(shared_N, [firsts[taken]]) + _num_padded(own_N, batches)
    return plan, num_tokens


def _num_padded(lengths: NDArray[np.int64], batches: Iterable[Any]) -> int:
    """Tokens of some forwards, padding included."""
    return sum(len(rows) * int(lengths[rows].max()) for rows in batches)


def _padded(ids: Sequence[NDArray[np.int32]], *, left: bool = False) -> NDArray[np.int64]:
    """One batch of sequences, padded with 0 on the right, or on the left."""
    width = max(map(len, ids))
    padded = np.zeros((len(ids), width), np.int64)
    for row, own in zip(padded, ids, strict=True):
        row[width - len(own) if left else 0 :][: len(own)] = own
    return padded


def _predicting(
    states_RLD: Tensor, sequences: Sequences, rows: Sequence[int], begins: Sequence[int]
) -> Tensor:
    """Of states that begin at some token of each sequence, those that predict completions."""
    parts = []
    for states_LD, row, begin in zip(states_RLD, rows, begins, strict=True):
        start = len(sequences.prompts[row]) - 1 - begin
        parts.append(states_LD[start : start + len(sequences.completions[row])])
    return torch.cat(parts)
