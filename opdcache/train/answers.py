"""The reference answers of a round's prompts, as sequences that the student is to imitate.

Legend: T answer tokens of the micro-batch.
"""

from collections.abc import Callable, Sequence
from functools import cached_property

import numpy as np
import torch
from numpy.typing import NDArray

from ..schemas.losses import LossConfig
from ..schemas.training import Layout
from .dealing import cut, deal
from .microbatch import LAYOUTS, Fed, MicroBatch
from .samples import RoundSamples

IMITATION = LossConfig(support="sampled", direction="forward", normalisation="none")
"""Cross-entropy: an answer's token is a single draw."""


class Answers:
    """Answers of the prompts of a round's samples; one that has none is left out.

    Args:
        ids_of: token ids of an answer, EOS at its end.
    """

    def __init__(
        self, samples: RoundSamples, ids_of: Callable[[str], Sequence[int]], layout: Layout
    ) -> None:
        self._samples, self._ids_of = samples, ids_of
        self._layout: Layout = "packed" if layout == "packed" else "padded"

    def of(self, samples: Sequence[int]) -> list[int]:
        """Numbers of the answers of some samples' prompts, each once."""
        numbers = dict.fromkeys(self._samples.prompt(sample) for sample in samples)
        return [number for number in numbers if number in self._sequences]

    def num_tokens(self, answers: Sequence[int]) -> int:
        """Tokens of the answers, EOS among them."""
        return sum(len(self._sequences[i][1]) for i in answers)

    def dealt(self, answers: Sequence[int], num_ranks: int) -> list[list[int]]:
        """The answers, to each rank about as many tokens."""
        return deal([[i] for i in answers], self._length, num_ranks)

    def micro_batches(self, answers: Sequence[int], max_tokens: int) -> list[list[int]]:
        """Answers of like length under a budget of tokens fed, padding included."""
        return cut([[i] for i in answers], self._length, max_tokens, self._layout)

    def collate(self, answers: Sequence[int]) -> MicroBatch:
        """Tensors of the answers."""
        pairs = [self._sequences[i] for i in answers]
        laid = LAYOUTS[self._layout]([Fed(prompt, ids[:-1]) for prompt, ids in pairs])
        places = [np.arange(len(ids)) for _, ids in pairs]
        joined = zip(places, laid.starts, strict=True)
        columns = [start.before(of) for of, start in joined]
        rows = [np.full(len(c), s.row) for c, s in zip(columns, laid.starts, strict=True)]
        ids_T = torch.from_numpy(np.concatenate([ids for _, ids in pairs]).astype(np.int64))
        return MicroBatch(
            num_sequences=len(pairs),
            input_ids_BL=torch.from_numpy(laid.ids),
            position_ids_BL=None if laid.positions is None else torch.from_numpy(laid.positions),
            branches_BL=None,
            rows_T=torch.from_numpy(np.concatenate(rows)),
            columns_T=torch.from_numpy(np.concatenate(columns)),
            sequences_T=torch.from_numpy(np.repeat(np.arange(len(pairs)), list(map(len, places)))),
            places_T=torch.from_numpy(np.concatenate(places)),
            weights_T=torch.ones(len(ids_T)),
            sampled_T=ids_T,
        )

    def _length(self, row: Sequence[int]) -> int:
        """Tokens fed of an answer and its prompt."""
        prompt, ids = self._sequences[row[0]]
        return len(prompt) + len(ids) - 1

    @cached_property
    def _sequences(self) -> dict[int, tuple[NDArray[np.int32], NDArray[np.int32]]]:
        """Prompt and answer by number of the prompt."""
        found = {
            number: (prompt, np.array(self._ids_of(answer), np.int32))
            for number, (prompt, answer) in enumerate(self._samples.asked())
            if answer is not None
        }
        return {number: (prompt, ids) for number, (prompt, ids) in found.items() if len(ids)}
