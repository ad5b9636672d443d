"""How much each token counts in the loss: what is left out, what decays, what is chosen live.

Legend: T tokens.
"""

import math
from bisect import bisect_right
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..schemas.losses import TokensConfig


@dataclass(frozen=True, slots=True)
class TokenRule:
    """``train.tokens`` at one update.

    Attributes:
        limit: tokens of a completion, from its first, that may be supervised.
        left_out: ids that are not.
        half_life: tokens after which the weight is halved.
        fraction: share of a completion's tokens that will be chosen live, one at least.
        per_sequence: whether every completion counts alike, whatever its length.
    """

    limit: int | None = None
    left_out: tuple[int, ...] = ()
    half_life: float | None = None
    fraction: float = 1.0
    per_sequence: bool = False

    @classmethod
    def of(
        cls, config: TokensConfig, round_index: int, update: int, special_ids: tuple[int, ...]
    ) -> "TokenRule":
        """The rule of an update of the run: the last limit stands for those after it too."""
        limits = config.max_supervised
        passed = bisect_right(config.milestones, update) if config.milestones else round_index
        return cls(
            limit=limits[min(passed, len(limits) - 1)] if limits else None,
            left_out=special_ids if config.skip_special else (),
            half_life=config.half_life,
            fraction=config.fraction,
            per_sequence=config.mean == "sequences",
        )

    def places(
        self, completion: NDArray[np.int32], supervised_T: NDArray[np.bool_]
    ) -> NDArray[np.int64]:
        """Places in a completion that count.

        Args:
            supervised_T: its loss mask.
        """
        kept_T = supervised_T & ~np.isin(completion, self.left_out)
        return np.flatnonzero(kept_T[: self.limit])

    def weights(self, places: NDArray[np.int64]) -> NDArray[np.float32]:
        """Weights of these places of one completion before any is chosen, float32.

        They decay with depth; where every completion counts alike, from its first place on, since
        only their ratios count.
        """
        if self.half_life is None:
            return np.ones(len(places), np.float32)
        depths = places - places[:1].sum() if self.per_sequence else places
        weights: NDArray[np.float64] = 0.5 ** (depths / self.half_life)
        return weights.astype(np.float32)

    def total(self, places: NDArray[np.int64]) -> float:
        """What these places add to the weight that an update's loss is divided by.

        It is known before any forward. Of decaying weights, of which live losses choose some, it is
        the share that is to be chosen of them all.
        """
        if self.per_sequence:
            return float(len(places) > 0)
        if self.half_life is None:
            return float(math.ceil(len(places) * self.fraction))
        return float(self.weights(places).sum(dtype=np.float64) * self.fraction)


def largest(values_T: Tensor, rows_T: Tensor, fraction: float) -> Tensor:
    """Bool [T]: tokens that are among the largest fraction of their sequence, one at least.

    Args:
        rows_T: int64, which sequence each token is of; a sequence's tokens stand together.
    """
    if fraction >= 1:
        return torch.ones_like(values_T, dtype=torch.bool)
    order_T = torch.argsort(values_T, descending=True, stable=True)
    by_row_T = order_T[torch.argsort(rows_T[order_T], stable=True)]
    counts_R = torch.bincount(rows_T)
    starts_R = counts_R.cumsum(0) - counts_R
    rank_T = torch.arange(len(values_T), device=values_T.device) - starts_R[rows_T[by_row_T]]
    most_R = torch.ceil(counts_R.double() * fraction).long()
    chosen_T = torch.zeros_like(values_T, dtype=torch.bool)
    chosen_T[by_row_T] = rank_T < most_R[rows_T[by_row_T]]
    return chosen_T
