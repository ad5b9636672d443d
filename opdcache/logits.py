"""Chunks of an LM head's logits, and what is read off whole distributions.

Logits are made for a chunk of tokens at a time, in float32 whatever the weights' dtype, and used up
before the next chunk. Log-probs are natural, at temperature 1, over the full vocabulary.

Legend: C tokens of a chunk, B of a block of it, V vocabulary (padding included), K entries.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

CHUNK_TOKENS = 512
GROUP = 32
"""Entries of a group, when the likeliest are looked for and draws are placed."""
TINY = 1e-30
"""Sums of exponentials below this have lost bits: float32 ends at 1e-38."""
_CACHED_ENTRIES = 2**20
"""Logits of a block on a CPU: 4 MiB of them, and as much again of their exponentials."""


@dataclass(frozen=True, slots=True)
class Dense:
    """Whole distributions of some tokens, relative to each one's likeliest entry.

    Attributes:
        most_B: the likeliest entry's logit.
        shifted_BV: logits less that; at most 0.
        weights_BV: their exponentials, in (0, 1].
        total_B: the sum of those; at least 1.
    """

    most_B: Tensor
    shifted_BV: Tensor
    weights_BV: Tensor
    total_B: Tensor

    @classmethod
    def of(cls, logits_BV: Tensor) -> "Dense":
        """Takes the logits' place in memory."""
        most_B = logits_BV.amax(dim=1)
        shifted_BV = logits_BV.sub_(most_B[:, None])
        weights_BV = shifted_BV.exp()
        return cls(most_B, shifted_BV, weights_BV, weights_BV.sum(dim=1))

    def logprobs(self, shifted_BK: Tensor) -> Tensor:
        """Log-probs of some entries' shifted logits."""
        return shifted_BK - self.total_B.log()[:, None]

    def entropy(self) -> Tensor:
        """Nats. Both terms are at least 0, so nothing cancels."""
        return self.total_B.log() - (self.weights_BV * self.shifted_BV).sum(dim=1) / self.total_B

    def tail(self, ids_BK: Tensor, within_BK: Tensor) -> Tensor:
        """Log of the mass of all but the ids within, summed over it.

        Mass too small for float32's exponentials is summed in logs.
        """
        held_BK = self.weights_BV.gather(1, ids_BK)
        self.weights_BV.scatter_reduce_(1, ids_BK, held_BK.masked_fill(within_BK, 0), "amin")
        rest_B = self.weights_BV.sum(dim=1)
        self.weights_BV.scatter_(1, ids_BK, held_BK)
        log_B = rest_B.log()
        tiny = (rest_B < TINY).nonzero()[:, 0]
        if len(tiny):
            log_B[tiny] = log_mass_without(self.shifted_BV[tiny], ids_BK[tiny], within_BK[tiny])
        return log_B - self.total_B.log()


def chunks(num_tokens: int, chunk_tokens: int) -> Iterator[slice]:
    """Slices of the token axis; one empty slice when there are no tokens."""
    for start in range(0, max(num_tokens, 1), chunk_tokens):
        yield slice(start, min(start + chunk_tokens, num_tokens))


def blocks(logits_CV: Tensor) -> Iterator[slice]:
    """Tokens of a chunk that are looked at together: on a CPU, as many as stay in its caches."""
    on_cpu = logits_CV.device.type == "cpu"
    size = max(1, _CACHED_ENTRIES // logits_CV.shape[1] if on_cpu else len(logits_CV))
    return chunks(len(logits_CV), size)


def likeliest(values_BV: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """``values_BV.topk(k)``, values and ids. The k largest stand in the k groups of entries that
    have the largest maxima, so only those groups are sorted.
    """
    size = values_BV.shape[1] // GROUP
    if 2 * k > size:
        top = values_BV.topk(k, dim=1)
        return top.values, top.indices
    grouped_BGM = values_BV[:, : GROUP * size].view(len(values_BV), GROUP, size)
    best_BK = grouped_BGM.amax(dim=1).topk(k, dim=1, sorted=False).indices
    steps_G = torch.arange(0, GROUP * size, size, device=values_BV.device)
    rest_R = torch.arange(GROUP * size, values_BV.shape[1], device=values_BV.device)
    ids_BC = torch.cat(
        [
            (best_BK[:, :, None] + steps_G).flatten(1),
            rest_R.expand(len(values_BV), -1),
        ],
        dim=1,
    )
    top = values_BV.gather(1, ids_BC).topk(k, dim=1)
    return top.values, ids_BC.gather(1, top.indices)


def log_mass_without(logits_CV: Tensor, ids_CK: Tensor, within_CK: Tensor) -> Tensor:
    """``logsumexp`` over all but the ids within; the logits are as before when it returns.

    An id may stand more than once, within and not: the least value counts, so it is left out.
    """
    values_CK = logits_CV.gather(1, ids_CK)
    left_out_CK = values_CK.masked_fill(within_CK, -torch.inf)
    logits_CV.scatter_reduce_(1, ids_CK, left_out_CK, "amin")
    rest_C = torch.logsumexp(logits_CV, dim=1)
    logits_CV.scatter_(1, ids_CK, values_CK)
    return rest_C


def matmul_ready(weight_VD: Tensor) -> Tensor:
    """CPUs multiply in float32, from one copy of the head; accelerators take it as it is."""
    return weight_VD.float() if weight_VD.device.type == "cpu" else weight_VD


def matmul(left: Tensor, right: Tensor) -> Tensor:
    """Product with float32 accumulation and a float32 result."""
    if right.dtype == torch.float32 or left.device.type == "cpu":
        return left.float() @ right.float()
    return torch.mm(left.to(right.dtype), right, out_dtype=torch.float32)


def add_matmul(sum_NM: Tensor, left: Tensor, right: Tensor) -> None:
    """Add a product to a float32 sum, in its place."""
    if left.device.type == "cpu":
        sum_NM.addmm_(left.float(), right.float())
    else:
        sum_NM += matmul(left, right)
