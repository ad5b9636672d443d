"""Which estimates of forward KL are unbiased: those from the teacher's draws, not from its top-k.

The teacher's distributions are those of a real head with a long tail. What is stored of them is
written to a score shard and read back; the oracle is the full vocabulary in float64.
"""

import numpy as np
import torch
from numpy.typing import NDArray

from opdcache.score.statistics import teacher_statistics
from opdcache.store.encoding import encode_scores
from opdcache.store.files import InMemory
from opdcache.store.scores import Draws, Scores, TopK, open_scores

VOCAB, WIDTH, NUM_TOKENS, NUM_DRAWS, K = 400, 16, 40, 12, 12
REPEATS = 400


def distributions() -> tuple[torch.Tensor, torch.Tensor, NDArray[np.float64]]:
    """A teacher's hidden states and head, and the log-probs of a student near it, float64."""
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(NUM_TOKENS, WIDTH, generator=generator)
    weight = torch.randn(VOCAB, WIDTH, generator=generator) * 0.4
    logits = hidden.double() @ weight.double().t()
    nearby = logits + 0.7 * torch.randn(logits.shape, generator=generator).double()
    return hidden, weight, torch.log_softmax(nearby, dim=1).numpy()


def read_back(scores: Scores) -> Scores:
    encoded = encode_scores(scores, step=1 / 256, attributes={})
    return open_scores({path: InMemory(data) for path, data in encoded.items()}).read(
        scores.columns
    )


def teacher_scores(uniforms: NDArray[np.float64] | None) -> Scores:
    hidden, weight, _ = distributions()
    stats = teacher_statistics(
        hidden,
        weight,
        torch.zeros(NUM_TOKENS, dtype=torch.int64),
        torch.zeros((NUM_TOKENS, 0), dtype=torch.int64),
        k=K,
        mass=1.0,
        uniforms_TN=None if uniforms is None else torch.from_numpy(uniforms),
    )
    topk = TopK(
        stats.topk_ids_TK.numpy().astype(np.int32),
        stats.topk_TK.numpy(),
        stats.num_kept_T.numpy().astype(np.uint16),
        stats.tail_T.numpy(),
    )
    return read_back(
        Scores(
            np.asarray([0, NUM_TOKENS]),
            entropy=stats.entropy_T.numpy(),
            topk=topk,
            draws=None if uniforms is None else Draws.of(stats.drawn_TN.numpy()),
        )
    )


def exact_kl() -> float:
    hidden, weight, student = distributions()
    teacher = torch.log_softmax(hidden.double() @ weight.double().t(), dim=1).numpy()
    return float((np.exp(teacher) * (teacher - student)).sum(axis=1).mean())


def drawn_kl(scores: Scores) -> float:
    """Cross-entropy to the draws less the teacher's stored entropy (arXiv 2503.16870)."""
    _, _, student = distributions()
    assert scores.draws is not None
    assert scores.entropy is not None
    here = np.take_along_axis(student, scores.draws.ids.astype(np.int64), axis=1)
    crossed = -(scores.draws.counts / NUM_DRAWS * here).sum(axis=1)
    return float((crossed - scores.entropy).mean())


def topk_kl(scores: Scores) -> float:
    """The kept entries renormalised, as if they were the teacher's distribution."""
    _, _, student = distributions()
    assert scores.topk is not None
    kept = scores.topk.logprobs.astype(np.float64)
    inside = kept - np.logaddexp.reduce(kept, axis=1, keepdims=True)
    here = np.take_along_axis(student, scores.topk.ids.astype(np.int64), axis=1)
    return float((np.exp(inside) * (inside - here)).sum(axis=1).mean())


def test_forward_kl_from_draws_is_unbiased_and_from_renormalised_topk_is_not() -> None:
    rng = np.random.default_rng(1)
    uniforms = rng.random((REPEATS, NUM_TOKENS, NUM_DRAWS))
    estimates = np.asarray([drawn_kl(teacher_scores(u)) for u in uniforms])
    error = estimates.std(ddof=1) / REPEATS**0.5
    exact, biased = exact_kl(), topk_kl(teacher_scores(None))
    assert error < 0.02 * exact
    assert abs(estimates.mean() - exact) < 4 * error + 2e-3  # float16 entropies, and chance
    assert abs(biased - exact) > 20 * error


def test_one_token_s_draws_are_its_distribution_on_average() -> None:
    hidden, weight, _ = distributions()
    evenly = np.broadcast_to((np.arange(20_000) + 0.5) / 20_000, (NUM_TOKENS, 20_000)).copy()
    draws = teacher_scores(evenly).draws
    assert draws is not None
    teacher = torch.softmax(hidden.double() @ weight.double().t(), dim=1).numpy()
    for t in range(NUM_TOKENS):
        counts = np.bincount(draws.ids[t], draws.counts[t], minlength=VOCAB)
        assert np.abs(counts / 20_000 - teacher[t]).max() < 1e-4
