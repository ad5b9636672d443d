"""What is reported of an update, and what is concluded from it.

Legend: P chunks of positions.
"""

import math
import resource
import sys
from collections.abc import Callable, Sequence
from statistics import median

import torch
from torch import Tensor

from ..schemas.training import EndRound
from .live import means
from .loading import Share
from .objective import POSITIONS, Objective

_LEAST_UPDATES = 5
"""Updates whose losses must be known before one is told to be a spike."""


class Report:
    """One update's sums, over this rank's micro-batches until they are summed over all.

    Attributes:
        waited_s: seconds that the learner waited for data.
        worst_sample, worst_loss: place of the sample with the largest mean loss, and that loss.
    """

    def __init__(self) -> None:
        self.waited_s = 0.0
        self.worst_sample, self.worst_loss = "", 0.0
        self._sums: dict[str, Tensor] = {}
        self._losses: list[tuple[Share, Tensor]] = []
        self._answers: Tensor | None = None

    def add(self, objective: Objective, share: Share) -> None:
        """Add a micro-batch."""
        if share.is_answers:
            names = ("loss", "num_tokens", "objective")
            found = torch.stack([objective.sums[name].sum() for name in names])
            counted = found if share.weight else torch.zeros_like(found)
            self._answers = counted if self._answers is None else self._answers + counted
            return
        for name, values_P in objective.sums.items():
            # What only keeps a rank in step may be anything; it counts for nothing.
            counted_P = values_P if share.weight else torch.zeros_like(values_P)
            self._sums[name] = self._sums.get(name, 0) + counted_P
        if share.weight:
            self._losses.append((share, objective.losses_B))

    @property
    def imitates_finitely(self) -> bool:
        """Whether the loss of the reference answers, where there are any, is finite."""
        return self._answers is None or bool(self._answers.isfinite().all())

    def sum_over_ranks(self, sum_of: Callable[[Tensor], Tensor]) -> None:
        """Make the sums those of all ranks."""
        together = sum_of(torch.stack(list(self._sums.values())))
        self._sums = dict(zip(self._sums, together.cpu(), strict=True))
        if self._answers is not None:
            self._answers = sum_of(self._answers).cpu()

    def worst(self, num_tokens: Callable[[Sequence[int]], int]) -> Tensor:
        """This rank's sample with the largest mean loss, and that loss; float64 [2]. A loss that is
        not finite is larger than any."""
        worst, most = -1, -math.inf
        for share, losses_B in self._losses:
            for sample, loss in zip(share.samples, losses_B.tolist(), strict=True):
                mean = loss / num_tokens([sample]) if math.isfinite(loss) else math.inf
                worst, most = (sample, mean) if mean > most else (worst, most)
        return torch.tensor([worst, most], dtype=torch.float64)

    def values(
        self, grad_norm: float, lr: float, num_tokens: int, elapsed_s: float
    ) -> dict[str, float]:
        """The update's metrics by name; see ``live.means``."""
        sums = {name: float(values_P.sum()) for name, values_P in self._sums.items()}
        imitated = {}
        if self._answers is not None:
            loss, count, objective = self._answers.tolist()
            sums["objective"] += objective
            imitated["sft_loss"] = loss / count
        return {
            **means(sums),
            **imitated,
            "objective": sums["objective"],
            "grad_norm": grad_norm,
            "lr": lr,
            "num_tokens": num_tokens,
            "tokens_per_s": num_tokens / elapsed_s,
            "data_wait": self.waited_s / elapsed_s,
            "memory_bytes": _memory_bytes(),
        }

    @property
    def by_position(self) -> list[dict[str, float]]:
        """Metrics by depth: ``from`` is the first place of the chunk in its completion."""
        columns = [
            {name: float(values_P[chunk]) for name, values_P in self._sums.items()}
            for chunk in range(len(self._sums["num_tokens"]))
        ]
        return [
            {"from": chunk * POSITIONS, "num_tokens": sums["num_tokens"], **means(sums)}
            for chunk, sums in enumerate(columns)
            if sums["num_measured"]
        ]


def is_spike(loss: float, before: Sequence[float], factor: float) -> bool:
    """Whether a loss is above the median size of those of the updates before it, times this."""
    if len(before) < _LEAST_UPDATES:
        return False
    return loss > factor * median(map(abs, before))


def below(limits: EndRound, values: dict[str, float]) -> str | None:
    """Which limit an update's metrics are below, as words; None when none.

    That they are reported is seen to before the round begins.
    """
    for name, limit in limits:
        if limit is not None and not values[name] >= limit:  # nor is what is not a number
            return f"{name} is {values[name]:.3f}, below {limit:g}"
    return None


def _memory_bytes() -> int:
    """Most memory held so far: the accelerator's, or the process's."""
    if torch.accelerator.is_available():
        return int(torch.accelerator.max_memory_allocated())
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
