"""What the learner minimises on a micro-batch, a chunk of tokens at a time, and what it reports.

Legend: T tokens of the micro-batch, C of a chunk of them, K entries.
"""

import torch
from torch import Tensor

from ..heads import StudentView
from ..schemas.losses import LossConfig, TokensConfig, is_local
from .live import ids_to_gather, live, loss_weights, metric_values, on_support, within_support
from .losses import token_losses
from .microbatch import MicroBatch

POSITIONS = 1024
"""Places of a completion that are reported together (arXiv 2604.13016 looks at depth so)."""


class Objective:
    """The weighted loss of a micro-batch's tokens, over the weight of the whole update.

    Called with the view of some tokens and their place on the token axis, it gives their part of
    the sum, and adds up what is reported of them.

    Args:
        whole: what the update's loss is divided by.
        longest: places of a completion at most.
        measure_every: where the loss does not need whole distributions, one token of so many is
            looked at for what is reported of them.

    Attributes:
        ids_TK, within_TK, topk: what to ask the head for; see ``support_view``.
        is_local: whether the loss needs the logits of ``ids_TK`` alone.
        selects: whether ``select`` must be called first, with the view of all tokens.
        sums: of the tokens so far, by the chunk of ``POSITIONS`` places of the completion that they
            stand in, float64 [P]; see ``live.means``.
        losses_B: float64, sums of the tokens' losses by completion, unweighted.
    """

    def __init__(
        self,
        loss: LossConfig,
        tokens: TokensConfig,
        batch: MicroBatch,
        whole: float,
        longest: int,
        measure_every: int = 1,
    ) -> None:
        self._loss, self._tokens, self._whole = loss, tokens, whole
        self.batch = batch
        self.ids_TK, self.within_TK = ids_to_gather(loss, batch), within_support(loss, batch)
        self.topk = loss.k
        self.is_local = is_local(loss)
        self.sums: dict[str, Tensor] = {}
        self.losses_B = batch.weights_T.new_zeros(batch.num_sequences, dtype=torch.float64)
        self._num_chunks = max(1, -(-longest // POSITIONS))
        by_loss = tokens.fraction < 1 and tokens.by == "divergence"
        self._weights_T = None if by_loss else loss_weights(tokens, batch, None) / whole
        self.selects = by_loss and not self.is_local
        self.measured = slice(batch.num_tokens // 2 % measure_every, None, measure_every)
        """Tokens that are looked at whole, where the loss is local; one at least."""

    def select(self, view: StudentView) -> None:
        """Choose the tokens that count, by their losses."""
        losses_T = self._losses(self.batch, view)
        self._weights_T = loss_weights(self._tokens, self.batch, losses_T) / self._whole

    def __call__(self, view: StudentView, part: slice) -> Tensor:
        """The tokens' part of the loss, a scalar; what is reported of them is added up."""
        assert self._weights_T is not None
        batch = self.batch.cut(part)
        student = live(self._loss, batch, view)
        losses_C = token_losses(self._loss, on_support(self._loss, batch, student))
        self._add(batch, metric_values(batch, student))
        return self._weighted(batch, losses_C, self._weights_T[part])

    def of_logits(self, logits_TK: Tensor) -> Tensor:
        """The whole loss, a scalar, where it is local: the logits stand for log-probs, from which
        they differ by what cancels."""
        losses_T = self._losses(self.batch, _bare(logits_TK))
        weights_T = self._weights_T
        if weights_T is None:
            weights_T = loss_weights(self._tokens, self.batch, losses_T) / self._whole
        return self._weighted(self.batch, losses_T, weights_T)

    def measure(self, view: StudentView) -> None:
        """Add up what is reported of the distributions of the ``measured`` tokens."""
        batch = self.batch.cut(self.measured)
        self._add(batch, metric_values(batch, live(self._loss, batch, view)))

    def _losses(self, batch: MicroBatch, view: StudentView) -> Tensor:
        student = live(self._loss, batch, view)
        return token_losses(self._loss, on_support(self._loss, batch, student))

    def _weighted(self, batch: MicroBatch, losses_C: Tensor, weights_C: Tensor) -> Tensor:
        weighted_C = losses_C * weights_C
        seen_C = losses_C.detach().double()
        found = {"num_tokens": torch.ones_like(seen_C), "loss": seen_C}
        self._add(batch, found | {"objective": weighted_C.detach()})
        self.losses_B.index_add_(0, batch.sequences_T, seen_C)
        return weighted_C.sum()

    def _add(self, batch: MicroBatch, values_C: dict[str, Tensor]) -> None:
        chunks_C = batch.places_T // POSITIONS
        for name, values in values_C.items():
            nothing_P = values.new_zeros(self._num_chunks, dtype=torch.float64)
            sums_P = self.sums.setdefault(name, nothing_P)
            sums_P.index_add_(0, chunks_C, values.double())


def _bare(logits_TK: Tensor) -> StudentView:
    """A view of nothing but logits."""
    nothing_T = logits_TK.new_zeros(len(logits_TK))
    return StudentView(logits_TK, nothing_T, nothing_T, nothing_T)
