"""Every loss of the registry, and every metric, against dense float64 loops over the vocabulary."""

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, get_args

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor

from opdcache.heads import support_view
from opdcache.schemas.losses import (
    CELLS,
    Direction,
    LossConfig,
    Normalisation,
    Support,
    TokensConfig,
    cell,
    is_divergence,
    is_local,
    refusal,
    tolerates_older,
)
from opdcache.train.learner import SupportHead
from opdcache.train.live import (
    Live,
    ids_to_gather,
    live,
    means,
    metric_values,
    on_support,
    within_support,
)
from opdcache.train.losses import OnSupport, token_losses
from opdcache.train.microbatch import MicroBatch
from opdcache.train.objective import POSITIONS, Objective

pytestmark = pytest.mark.usefixtures("one_thread")

T, V, D, K, S, N = 13, 31, 8, 5, 5, 12
CELL_KEYS = sorted(CELLS)
DIVERGENCE_KEYS = [key for key in CELL_KEYS if key[2] not in ("none", "reference")]
KL_KEYS = [key for key in DIVERGENCE_KEYS if key[1] != "jsd"]
WHOLE_KEYS = [key for key in DIVERGENCE_KEYS if key[2] != "truncated"]
TAIL_KEYS = [key for key in CELL_KEYS if key[2] == "tail"]
ALL_SUPPORTS = ("teacher_topk", "student_topk", "overlap", "union")
CAP = 0.3
OUTCOME = {"outcome": "rewards:right", "outcome_weight": 0.8}
SAMPLED = ("sampled", "reverse")
"""The policy gradient of the sampled token; forward is cross-entropy on it."""

OPTIONS: list[tuple[Callable[[tuple[str, str, str]], bool], dict[str, Any]]] = [
    (lambda key: key[1] == "jsd", {"beta": 0.0}),
    (lambda key: key[1] == "jsd", {"beta": 0.1}),
    (lambda key: key[1] == "jsd", {"beta": 1.0}),
    (lambda key: key[2] == "reference", {"weighting": "teacher"}),
    (lambda key: key[2] == "reference", {"weighting": "uniform", "clamp": 0.4}),
    (lambda key: key[1:] == ("reverse", "truncated"), {"stop_gradient": True}),
    (lambda key: key[1:] == ("reverse", "tail"), {"forward_above": 1.8}),
    (lambda key: key[1:] == ("reverse", "renormalised"), {"forward_above": 1.8}),
    (lambda key: key[:2] == SAMPLED, {"clamp": 0.3}),
    (lambda key: key[:2] == SAMPLED, {"importance_cap": CAP}),
    (lambda key: key[:2] == SAMPLED, {"reference": "base", "extrapolation": 1.7, "clamp": 2.0}),
    (
        lambda key: key[0] == "student_topk" and key[2] == "reference",
        {"reference": "base", "extrapolation": 0.6, "weighting": "teacher"},
    ),
    (lambda key: True, {"reference": "base", "reference_kl": 0.5}),
    (lambda key: True, OUTCOME),
    (lambda key: True, OUTCOME | {"importance_cap": CAP}),
]
"""What every option belongs to, and values of it."""


@dataclass(frozen=True)
class Problem:
    """A student's head input, a teacher's distributions (float64 log-probs), the stored columns."""

    hidden_TD: Tensor
    weight_VD: Tensor
    teacher_TV: Tensor
    batch: MicroBatch


def stored(
    teacher_TV: Tensor, num_kept: list[int], recorded: Tensor, sampled: Tensor
) -> MicroBatch:
    """The columns of a teacher, entry by entry; what lies past the kept entries is rubbish."""
    tokens = len(teacher_TV)
    width = max(num_kept)
    ids = torch.full((tokens, width), 7)
    logprobs = torch.full((tokens, width), -0.125)
    kept = torch.zeros((tokens, width), dtype=torch.bool)
    tails, recorded_tails = [], []
    for t, row in enumerate(teacher_TV):
        likeliest = row.sort(descending=True).indices.tolist()
        for j in range(num_kept[t]):
            ids[t, j], logprobs[t, j], kept[t, j] = likeliest[j], row[likeliest[j]], True
        tails.append(sum(math.exp(row[v]) for v in likeliest[num_kept[t] :]))
        outside = set(range(teacher_TV.shape[1])) - set(recorded[t].tolist())
        recorded_tails.append(sum(math.exp(row[v]) for v in outside))
    probs = teacher_TV.exp()
    picked = torch.arange(tokens)
    return MicroBatch(
        num_sequences=2,
        input_ids_BL=torch.zeros((1, tokens), dtype=torch.long),
        position_ids_BL=None,
        branches_BL=None,
        rows_T=torch.zeros(tokens, dtype=torch.long),
        columns_T=picked,
        sequences_T=picked * 2 // tokens,
        places_T=picked * POSITIONS // 5,
        weights_T=torch.ones(tokens),
        sampled_T=sampled,
        sampling_T=torch.linspace(-3, -0.5, tokens),
        teacher_sampled_T=teacher_TV[picked, sampled].float(),
        teacher_entropy_T=-(probs * teacher_TV).sum(dim=1).float(),
        topk_ids_TK=ids,
        topk_TK=logprobs,
        kept_TK=kept,
        tail_T=torch.tensor(tails, dtype=torch.float64).log().float(),
        recorded_ids_TS=recorded,
        recorded_TS=teacher_TV.gather(1, recorded).float(),
        recorded_tail_T=torch.tensor(recorded_tails, dtype=torch.float64).log().float(),
        reference_sampled_T=-torch.linspace(0.5, 5, tokens),
        reference_recorded_TS=-torch.linspace(0.2, 6, recorded.numel()).view(recorded.shape),
        advantage_T=torch.where(picked * 2 < tokens, 0.7, -0.4),
        **drawn(teacher_TV),
    )


def drawn(teacher_TV: Tensor) -> dict[str, Tensor]:
    """N draws a token, counted; past the last stand zeros."""
    made = torch.Generator().manual_seed(1)
    draws = torch.multinomial(teacher_TV.exp(), N, replacement=True, generator=made)
    ids, counts = torch.zeros_like(draws), torch.zeros_like(draws)
    for t, row in enumerate(draws):
        found, times = row.unique(return_counts=True)
        ids[t, : len(found)], counts[t, : len(found)] = found, times
    return {"draw_ids_TN": ids, "draw_counts_TN": counts}


def problem(
    *, num_kept: list[int] | None = None, num_recorded: int = S, same: bool = False, seed: int = 0
) -> Problem:
    """Student and teacher that are close enough to overlap; ragged kept entries by default."""
    made = torch.Generator().manual_seed(seed)
    hidden = torch.randn(T, D, generator=made)
    weight = 0.7 * torch.randn(V, D, generator=made)
    noise = 0.0 if same else 1.0
    logits = hidden.double() @ weight.double().T
    teacher = torch.log_softmax(
        logits + noise * torch.randn(T, V, generator=made, dtype=torch.float64), dim=1
    )
    ragged = [1 + t % K for t in range(T)]
    recorded = torch.stack([torch.randperm(V, generator=made)[:num_recorded] for _ in range(T)])
    sampled = torch.randint(V, (T,), generator=made)
    return Problem(hidden, weight, teacher, stored(teacher, num_kept or ragged, recorded, sampled))


def config(key: tuple[Support, Direction, Normalisation], k: int = K, **options: Any) -> LossConfig:
    loss = LossConfig(support=key[0], direction=key[1], normalisation=key[2], k=k, **options)
    assert refusal(loss) is None
    return loss


WITH_OPTIONS = [
    config(key, **options) for key in CELL_KEYS for belongs, options in OPTIONS if belongs(key)
]
LOSSES = [config(key) for key in CELL_KEYS] + WITH_OPTIONS
"""Every cell of the registry, and every cell with every option that belongs to it."""


def named(loss: LossConfig) -> str:
    changed = loss.model_dump(exclude={"k"}, exclude_defaults=True)
    return "-".join(f"{v}" if isinstance(v, str) else f"{n}={v}" for n, v in changed.items())


def student_view(
    loss: LossConfig, batch: MicroBatch, hidden_TD: Tensor, weight_VD: Tensor
) -> tuple[Live, Tensor]:
    """What the learner sees of the student, and its loss a token."""
    view = support_view(
        hidden_TD,
        weight_VD,
        ids_to_gather(loss, batch),
        within_TK=within_support(loss, batch),
        topk=loss.k,
        chunk_tokens=4,
    )
    student = live(loss, batch, view)
    return student, token_losses(loss, on_support(loss, batch, student))


def ours(loss: LossConfig, given: Problem) -> tuple[Tensor, Tensor]:
    """The library's loss a token, and the gradient of its sum with respect to the hidden states."""
    hidden = given.hidden_TD.clone().requires_grad_()
    losses = student_view(loss, given.batch, hidden, given.weight_VD)[1]
    losses.sum().backward()
    assert hidden.grad is not None
    return losses.detach(), hidden.grad


def dense(
    given: Problem, loss_of_token: Callable[[int, Tensor, Tensor], Tensor]
) -> tuple[Tensor, Tensor]:
    """Oracle: ``loss_of_token(t, log p, log q)`` over the whole vocabulary, and its gradient."""
    hidden = given.hidden_TD.double().requires_grad_()
    log_p = torch.log_softmax(hidden @ given.weight_VD.double().T, dim=1)
    rows = [loss_of_token(t, log_p[t], given.teacher_TV[t]) for t in range(len(log_p))]
    total = torch.stack(rows)
    total.sum().backward()
    assert hidden.grad is not None
    return total.detach(), hidden.grad


def support_of(loss: LossConfig, batch: MicroBatch) -> Callable[[int, Tensor, Tensor], list[int]]:
    """The ids that a loss looks at, found in the dense distributions."""
    assert batch.kept_TK is not None
    assert batch.recorded_ids_TS is not None
    num_kept = [sum(row) for row in batch.kept_TK.tolist()]
    recorded = batch.recorded_ids_TS.tolist()

    def teachers(t: int, log_p: Tensor, log_q: Tensor) -> list[int]:
        return log_q.sort(descending=True).indices[: num_kept[t]].tolist()

    def overlap(t: int, log_p: Tensor, log_q: Tensor) -> list[int]:
        own = set(log_p.sort(descending=True).indices[: loss.k].tolist())
        return [v for v in teachers(t, log_p, log_q) if v in own]

    def union(t: int, log_p: Tensor, log_q: Tensor) -> list[int]:
        return sorted(set(teachers(t, log_p, log_q)) | set(recorded[t]))

    def difference(t: int, log_p: Tensor, log_q: Tensor) -> list[int]:
        return sorted(set(teachers(t, log_p, log_q)) ^ set(recorded[t]))

    return {
        "sampled": lambda t, log_p, log_q: [int(batch.sampled_T[t])],
        "teacher_topk": teachers,
        "student_topk": lambda t, log_p, log_q: recorded[t],
        "overlap": overlap,
        "union": union,
        "symmetric_difference": difference,
        "draws": lambda t, log_p, log_q: list(range(V)),
    }[loss.support]


def zero(log_p: Tensor) -> Tensor:
    return 0 * log_p.sum()


def bounded(value: float, bound: float | None) -> float:
    return value if bound is None else max(-bound, min(bound, value))


def policy_gradient_oracle(
    loss: LossConfig,
    ids: list[int],
    log_p: Tensor,
    log_q: Tensor,
    sampling: float,
    reference: dict[int, float],
) -> Tensor:
    """``-sum c A log p`` with numbers, not tensors, for c and A: of the sampled token, or of the
    reference form."""
    p, q = log_p.detach().exp().tolist(), log_q.exp().tolist()
    mass_p, mass_q = sum(p[v] for v in ids), sum(q[v] for v in ids)
    total = zero(log_p)
    for v in ids:
        advantage = math.log(q[v] / p[v])
        if loss.extrapolation is not None:
            factor, base = loss.extrapolation, reference[v]
            advantage = factor * (math.log(q[v]) - base) - (math.log(p[v]) - base)
        advantage = bounded(advantage, loss.clamp)
        if loss.support == "sampled":
            ratio = p[v] / math.exp(sampling)
            share = 1.0 if loss.importance_cap is None else min(ratio, loss.importance_cap)
        else:
            shares = {"student": p[v] / mass_p, "teacher": q[v] / mass_q, "uniform": 1 / len(ids)}
            share = shares[loss.weighting]
        total = total - share * advantage * log_p[v]
    return total


def masses(loss: LossConfig, ids: list[int], log_p: Tensor) -> Tensor:
    """What a divergence compares: probabilities, [entries]."""
    p = log_p.exp()
    if loss.normalisation == "renormalised":
        return p[ids] / p[ids].sum()
    if loss.normalisation == "truncated":
        return p[ids]
    rest = [v for v in range(len(p)) if v not in ids]
    return torch.cat([p[ids], p[rest].sum()[None]]) if rest else p[ids]


def kl(a: Tensor, b: Tensor) -> Tensor:
    return (a * (a / b).log()).sum()


def divergence_oracle(loss: LossConfig, ids: list[int], log_p: Tensor, log_q: Tensor) -> Tensor:
    if not ids and loss.normalisation != "tail":
        return zero(log_p)
    p, q = (masses(loss, ids, side) for side in (log_p, log_q))
    if loss.direction == "forward" or (loss.direction == "jsd" and loss.beta == 0):
        return kl(q, p)
    if loss.direction == "jsd" and loss.beta < 1:
        mixture = loss.beta * q + (1 - loss.beta) * p
        return loss.beta * kl(q, mixture) + (1 - loss.beta) * kl(p, mixture)
    if loss.stop_gradient:
        weights = (p * (p / q).log()).tolist()
        return sum((w * p_.log() for w, p_ in zip(weights, p, strict=True)), zero(log_p))
    entropy = float(-(log_q.exp() * log_q).sum())
    gated = loss.forward_above is not None and entropy > loss.forward_above
    return kl(p, q) + kl(q, p) if gated else kl(p, q)


def renormalised_oracle(ids: list[int], log_p: Tensor, log_q: Tensor) -> Tensor:
    loss = config(("teacher_topk", "reverse", "renormalised"))
    return divergence_oracle(loss, ids, log_p, log_q)


def tail_oracle(ids: list[int], log_a: Tensor, log_b: Tensor) -> Tensor:
    """KL(a || b) over the ids and one bucket that holds every other id."""
    return divergence_oracle(config(("teacher_topk", "reverse", "tail")), ids, log_a, log_b)


def oracle_of(loss: LossConfig, batch: MicroBatch) -> Callable[[int, Tensor, Tensor], Tensor]:
    """A loss of token t from whole distributions."""
    support = support_of(loss, batch)

    def of_token(t: int, log_p: Tensor, log_q: Tensor) -> Tensor:
        assert batch.reference_sampled_T is not None
        y, base = int(batch.sampled_T[t]), float(batch.reference_sampled_T[t])
        away = loss.reference_kl * (base - float(log_p[y].detach()))
        reward = 0.0
        if loss.outcome_weight:
            assert batch.sampling_T is not None
            assert batch.advantage_T is not None
            ratio = math.exp(float(log_p[y].detach()) - float(batch.sampling_T[t]))
            share = 1.0 if loss.importance_cap is None else min(ratio, loss.importance_cap)
            reward = loss.outcome_weight * share * float(batch.advantage_T[t])
        return of_teacher(t, log_p, log_q) - (away + reward) * log_p[y]

    def of_teacher(t: int, log_p: Tensor, log_q: Tensor) -> Tensor:
        ids = support(t, log_p.detach(), log_q)
        if (loss.support, loss.direction) == ("sampled", "forward"):
            return -log_p[int(batch.sampled_T[t])]
        if loss.support == "sampled" or loss.normalisation == "reference":
            assert batch.sampling_T is not None
            sampling, base = float(batch.sampling_T[t]), reference_of(loss, batch, t)
            return policy_gradient_oracle(loss, ids, log_p, log_q, sampling, base)
        if loss.support == "draws":
            assert batch.draw_ids_TN is not None
            assert batch.draw_counts_TN is not None
            pairs = zip(
                batch.draw_ids_TN[t].tolist(), batch.draw_counts_TN[t].tolist(), strict=True
            )
            return sum((-n / N * log_p[v] for v, n in pairs), zero(log_p))
        return divergence_oracle(loss, ids, log_p, log_q)

    return of_token


def reference_of(loss: LossConfig, batch: MicroBatch, t: int) -> dict[int, float]:
    """The reference's log-probs by id."""
    assert batch.reference_sampled_T is not None
    assert batch.recorded_ids_TS is not None
    assert batch.reference_recorded_TS is not None
    if loss.support == "sampled":
        return {int(batch.sampled_T[t]): float(batch.reference_sampled_T[t])}
    ids, values = batch.recorded_ids_TS[t].tolist(), batch.reference_recorded_TS[t].tolist()
    return dict(zip(ids, values, strict=True))


def oracle(loss: LossConfig, given: Problem) -> tuple[Tensor, Tensor]:
    return dense(given, oracle_of(loss, given.batch))


def assert_close(mine: tuple[Tensor, Tensor], exact: tuple[Tensor, Tensor]) -> None:
    for ours_, theirs in zip(mine, exact, strict=True):
        assert ours_.shape == theirs.shape
        assert float((ours_.double() - theirs).abs().max()) <= 1e-5


@pytest.mark.parametrize("loss", LOSSES, ids=named)
def test_loss_and_gradient_are_those_of_a_dense_computation(loss: LossConfig) -> None:
    given = problem()
    exact = oracle(loss, given)
    assert float(exact[0].abs().max()) > 1e-2
    assert float(exact[1].abs().max()) > 1e-2
    assert_close(ours(loss, given), exact)


def learnt(
    given: Problem, loss: LossConfig, tokens: TokensConfig, **options: Any
) -> tuple[Objective, Tensor, tuple[Tensor, Tensor]]:
    """What the learner's head makes of a micro-batch: the objective, and the gradients with respect
    to hidden states and head."""
    head = SupportHead(given.weight_VD.clone().requires_grad_(), chunk_tokens=4)
    hidden = given.hidden_TD.clone().requires_grad_()
    objective = Objective(loss, tokens, given.batch, longest=3 * POSITIONS, **options)
    value = head(hidden, objective)
    (2 * value).backward()
    assert hidden.grad is not None
    assert head.weight.grad is not None
    return objective, value.detach(), (hidden.grad / 2, head.weight.grad / 2)


def weighted_oracle(
    loss: LossConfig, given: Problem, weights: Tensor
) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """The weighted sum of the tokens' losses, and its gradients, from dense float64 logits."""
    hidden, weight = (x.double().requires_grad_() for x in (given.hidden_TD, given.weight_VD))
    log_p, of_token = torch.log_softmax(hidden @ weight.T, dim=1), oracle_of(loss, given.batch)
    rows = [w * of_token(t, log_p[t], given.teacher_TV[t]) for t, w in enumerate(weights.tolist())]
    total = sum(rows[1:], rows[0])
    total.backward()
    assert hidden.grad is not None
    assert weight.grad is not None
    return total.detach(), (hidden.grad, weight.grad)


@pytest.mark.parametrize("loss", LOSSES, ids=named)
def test_the_learners_objective_and_gradients_are_those_of_a_dense_computation(
    loss: LossConfig,
) -> None:
    given = problem(seed=3)
    weights = torch.linspace(0.5, 2, T)
    given = replace(given, batch=replace(given.batch, weights_T=weights))
    value, gradients = weighted_oracle(loss, given, weights.double() / 7)
    objective, mine, ours_ = learnt(given, loss, TokensConfig(), whole=7.0)
    assert_close((mine, *ours_), (value, *gradients))
    assert float(objective.sums["objective"].sum()) == pytest.approx(float(value), abs=1e-5)
    losses = oracle(loss, given)[0]
    assert float(objective.sums["loss"].sum()) == pytest.approx(float(losses.sum()), abs=1e-4)


@pytest.mark.parametrize(
    "key", [key for key in DIVERGENCE_KEYS if key[2] != "truncated"], ids="-".join
)
def test_the_tokens_that_differ_most_are_chosen_live(
    key: tuple[Support, Direction, Normalisation],
) -> None:
    given, loss = problem(seed=6), config(key)
    losses = oracle(loss, given)[0]
    chosen = torch.zeros(T, dtype=torch.float64)
    for sequence in range(given.batch.num_sequences):
        own = (given.batch.sequences_T == sequence).nonzero()[:, 0]
        chosen[own[losses[own].argsort(descending=True)[:3]]] = 1 / 6
    _, mine, ours_ = learnt(given, loss, TokensConfig(fraction=0.4), whole=6.0)
    value, gradients = weighted_oracle(loss, given, chosen)
    assert_close((mine, *ours_), (value, *gradients))


def test_sums_are_kept_apart_by_depth_and_losses_by_completion() -> None:
    given, loss = problem(seed=4), config(("teacher_topk", "reverse", "tail"))
    objective, *_ = learnt(given, loss, TokensConfig(), whole=1.0)
    losses = oracle(loss, given)[0]
    depth, rows = given.batch.places_T // POSITIONS, given.batch.sequences_T
    assert depth.unique().tolist() == [0, 1, 2]
    assert objective.sums["num_tokens"].tolist() == depth.bincount().tolist()
    by_depth = [float(losses[depth == p].sum()) for p in range(3)]
    assert objective.sums["loss"].tolist() == pytest.approx(by_depth, abs=1e-5)
    by_row = [float(losses[rows == row].sum()) for row in range(2)]
    assert objective.losses_B.tolist() == pytest.approx(by_row, abs=1e-5)


@pytest.mark.parametrize(("every", "few"), [(1, list(range(T))), (3, [0, 3, 6, 9, 12]), (100, [6])])
def test_a_local_loss_is_of_all_tokens_and_its_metrics_of_one_of_so_many(
    every: int, few: list[int]
) -> None:
    given, loss = problem(seed=4), config(("teacher_topk", "reverse", "renormalised"))
    assert is_local(loss)
    objective, *_ = learnt(given, loss, TokensConfig(), whole=1.0, measure_every=every)
    mine = means({name: float(value.sum()) for name, value in objective.sums.items()})
    per_token = [brute_force_metrics(loss, cut(given, t)) for t in few]
    for name in ("student_entropy", "overlap", "reverse_kl_tail"):
        assert mine[name] == pytest.approx(sum(m[name] for m in per_token) / len(few), abs=1e-5)
    assert mine["loss"] == pytest.approx(float(oracle(loss, given)[0].mean()), abs=1e-5)


def cut(given: Problem, t: int) -> Problem:
    """The problem of one token."""
    one = slice(t, t + 1)
    return Problem(
        given.hidden_TD[one], given.weight_VD, given.teacher_TV[one], given.batch.cut(one)
    )


@pytest.mark.parametrize("loss", WITH_OPTIONS, ids=named)
def test_an_option_changes_the_loss_or_its_gradient(loss: LossConfig) -> None:
    plain, given = config((loss.support, loss.direction, loss.normalisation)), problem()
    pairs = zip(ours(loss, given), ours(plain, given), strict=True)
    assert max(float((one - other).abs().max()) for one, other in pairs) > 1e-2


@pytest.mark.parametrize("loss", LOSSES, ids=named)
def test_weight_gradient_is_that_of_a_dense_computation(loss: LossConfig) -> None:
    given = problem(seed=2)
    weight = given.weight_VD.clone().requires_grad_()
    student_view(loss, given.batch, given.hidden_TD, weight)[1].mean().backward()
    exact = given.weight_VD.double().requires_grad_()
    log_p = torch.log_softmax(given.hidden_TD.double() @ exact.T, dim=1)
    of_token = oracle_of(loss, given.batch)
    rows = [of_token(t, p, q) for t, (p, q) in enumerate(zip(log_p, given.teacher_TV, strict=True))]
    (sum(rows[1:], rows[0]) / T).backward()
    assert weight.grad is not None
    assert exact.grad is not None
    assert float((weight.grad.double() - exact.grad).abs().max()) <= 1e-5


@pytest.mark.parametrize("key", KL_KEYS, ids="-".join)
def test_on_the_whole_vocabulary_every_kl_is_the_full_kl(
    key: tuple[Support, Direction, Normalisation],
) -> None:
    given = problem(num_kept=[V] * T, num_recorded=V)
    exact = dense(
        given,
        lambda t, p, q: (
            (p.exp() * (p - q)).sum() if key[1] == "reverse" else (q.exp() * (q - p)).sum()
        ),
    )
    assert float(exact[0].min()) > 1e-2
    assert_close(ours(config(key, k=V), given), exact)


@pytest.mark.parametrize("key", WHOLE_KEYS, ids="-".join)
def test_a_teacher_that_is_the_student_gives_no_loss_and_no_gradient(
    key: tuple[Support, Direction, Normalisation],
) -> None:
    losses, gradient = ours(config(key), problem(same=True))
    assert float(losses.abs().max()) <= 1e-6
    assert float(gradient.abs().max()) <= 1e-5


@pytest.mark.parametrize(
    "loss",
    [
        loss
        for loss in LOSSES
        if ((loss.support, loss.direction) == SAMPLED or loss.normalisation == "reference")
        and loss.reference is None
        and loss.outcome is None
    ],
    ids=named,
)
def test_a_teacher_that_is_the_student_gives_no_gradient_to_policy_gradients_either(
    loss: LossConfig,
) -> None:
    assert float(ours(loss, problem(same=True))[1].abs().max()) <= 1e-5


@pytest.mark.parametrize("support", ALL_SUPPORTS)
@pytest.mark.parametrize(("direction", "sign"), [("reverse", 1), ("forward", -1)])
def test_a_truncated_kl_trains_the_mass_of_the_support_even_at_the_teacher(
    support: Support, direction: Direction, sign: int
) -> None:
    given, loss = problem(same=True), config((support, direction, "truncated"))
    ids_of = support_of(loss, given.batch)

    def mass(t: int, p: Tensor, q: Tensor) -> Tensor:
        return sign * p.exp()[ids_of(t, p.detach(), q)].sum()

    gradient = ours(loss, given)[1].double()
    assert float(gradient.abs().max()) > 1e-2
    assert float((gradient - dense(given, mass)[1]).abs().max()) <= 1e-5
    if direction == "reverse":
        stopped = loss.model_copy(update={"stop_gradient": True})
        assert float(ours(stopped, given)[1].abs().max()) <= 1e-5


def disjoint() -> Problem:
    """A teacher whose likely ids are the student's least likely ones."""
    given = problem()
    log_p = torch.log_softmax(given.hidden_TD.double() @ given.weight_VD.double().T, dim=1)
    teacher = torch.log_softmax(-log_p, dim=1)
    assert given.batch.recorded_ids_TS is not None
    batch = stored(teacher, [K] * T, given.batch.recorded_ids_TS, given.batch.sampled_T)
    return replace(given, teacher_TV=teacher, batch=batch)


@pytest.mark.parametrize("key", [key for key in CELL_KEYS if key[0] == "overlap"], ids="-".join)
def test_an_empty_overlap_gives_zero_loss_and_a_zero_finite_gradient(
    key: tuple[Support, Direction, Normalisation],
) -> None:
    given, loss = disjoint(), config(key)
    support = support_of(loss, given.batch)
    log_p = torch.log_softmax(given.hidden_TD.double() @ given.weight_VD.double().T, dim=1)
    assert all(support(t, log_p[t], given.teacher_TV[t]) == [] for t in range(T))
    losses, gradient = ours(loss, given)
    assert bool(torch.isfinite(gradient).all())
    assert float(losses.abs().max()) <= 1e-6
    assert float(gradient.abs().max()) <= 1e-6


@pytest.mark.parametrize("support", [*ALL_SUPPORTS, "symmetric_difference"])
def test_reference_form_is_eq5_plus_a_term_that_trains_the_mass_of_the_support(
    support: Support,
) -> None:
    given, loss = problem(), config((support, "reverse", "reference"))
    ids_of = support_of(loss, given.batch)

    def eq5(t: int, p: Tensor, q: Tensor) -> Tensor:
        ids = ids_of(t, p.detach(), q)
        return renormalised_oracle(ids, p, q)

    def mass_term(t: int, p: Tensor, q: Tensor) -> Tensor:
        ids = ids_of(t, p.detach(), q)
        if not ids:
            return zero(p)
        mass_p, mass_q = p.exp()[ids].sum(), q.exp()[ids].sum()
        factor = renormalised_oracle(ids, p, q) + (mass_p / mass_q).log()
        return factor.detach() * mass_p.log()

    expected = dense(given, eq5)[1] + dense(given, mass_term)[1]
    assert float(dense(given, mass_term)[1].abs().max()) > 1e-2
    assert float((ours(loss, given)[1].double() - expected).abs().max()) <= 1e-5


def test_eq5_has_the_gradient_of_its_stop_gradient_form() -> None:
    given, loss = problem(), config(("teacher_topk", "reverse", "renormalised"))
    ids_of = support_of(loss, given.batch)

    def stopped(t: int, p: Tensor, q: Tensor) -> Tensor:
        ids = ids_of(t, p, q)
        own, teachers = (torch.log_softmax(x[ids], dim=0) for x in (p, q))
        return ((own.exp() * (own - teachers)).detach() * own).sum()

    exact = dense(given, stopped)[1]
    assert float((ours(loss, given)[1].double() - exact).abs().max()) <= 1e-5


def test_reverse_kl_with_tail_has_the_gradient_of_its_stop_gradient_form() -> None:
    given, loss = problem(), config(("teacher_topk", "reverse", "tail"))
    ids_of = support_of(loss, given.batch)

    def stopped(t: int, p: Tensor, q: Tensor) -> Tensor:
        ids = ids_of(t, p, q)
        rest = [v for v in range(V) if v not in ids]
        own = torch.stack([*p[ids], p[rest].logsumexp(0)])
        teachers = torch.stack([*q[ids], q[rest].logsumexp(0)])
        return ((own.exp() * (own - teachers)).detach() * own).sum()

    exact = dense(given, stopped)[1]
    assert float((ours(loss, given)[1].double() - exact).abs().max()) <= 1e-5


@pytest.mark.parametrize("normalisation", ["renormalised", "tail", "truncated"])
def test_the_stop_gradient_identity_holds_against_finite_differences(
    normalisation: Normalisation,
) -> None:
    """The slope of the KL along a direction, from values alone, beside the gradient of its
    stop-gradient form: the same but where the sum is truncated, then off by that of the mass."""
    given, step = problem(), 1e-5
    loss = config(("teacher_topk", "reverse", normalisation))
    ids_of = support_of(loss, given.batch)
    ids = [ids_of(t, q, q) for t, q in enumerate(given.teacher_TV)]
    along_TD = torch.randn(T, D, generator=torch.Generator().manual_seed(3), dtype=torch.float64)

    def at(distance: float, of_token: Callable[[int, Tensor, Tensor], Tensor]) -> float:
        moved = replace(given, hidden_TD=given.hidden_TD.double() + distance * along_TD)
        return float(dense(moved, of_token)[0].sum())

    def slope(of_token: Callable[[int, Tensor, Tensor], Tensor]) -> float:
        return (at(step, of_token) - at(-step, of_token)) / (2 * step)

    def stopped(t: int, p: Tensor, q: Tensor) -> Tensor:
        own, teachers = masses(loss, ids[t], p), masses(loss, ids[t], q)
        return ((own * (own / teachers).log()).detach() * own.log()).sum()

    by_values = slope(lambda t, p, q: divergence_oracle(loss, ids[t], p, q))
    of_mass = slope(lambda t, p, q: masses(loss, ids[t], p).sum())
    by_gradient = float((dense(given, stopped)[1] * along_TD).sum())
    assert abs(by_values) > 0.1
    assert (abs(of_mass) > 0.1) == (normalisation == "truncated")
    assert by_values == pytest.approx(by_gradient + of_mass, abs=1e-6)
    assert float((ours(loss, given)[1].double() * along_TD).sum()) == pytest.approx(
        by_values, abs=1e-4
    )


def test_the_cap_of_the_importance_weights_binds_at_some_tokens_and_not_at_others() -> None:
    given = problem()
    assert given.batch.sampling_T is not None
    log_p = torch.log_softmax(given.hidden_TD @ given.weight_VD.T, dim=1)
    ratios = (log_p[torch.arange(T), given.batch.sampled_T] - given.batch.sampling_T).exp()
    assert 3 <= int((ratios > CAP).sum()) <= T - 3


def test_the_gate_opens_at_some_tokens_and_not_at_others() -> None:
    given = problem()
    gate = config(("teacher_topk", "reverse", "tail"), forward_above=1.8)
    plain = config(("teacher_topk", "reverse", "tail"))
    added = ours(gate, given)[0] - ours(plain, given)[0]
    assert given.batch.teacher_entropy_T is not None
    assert ((added > 1e-3) == (given.batch.teacher_entropy_T > 1.8)).all()
    assert 3 <= int((added > 1e-3).sum()) <= T - 3


def test_without_tail_or_renormalisation_the_stop_gradient_form_would_differ_by_the_mass() -> None:
    given, loss = problem(), config(("teacher_topk", "reverse", "tail"))
    ids_of = support_of(loss, given.batch)

    def truncated(t: int, p: Tensor, q: Tensor) -> Tensor:
        ids = ids_of(t, p, q)
        return (p[ids].exp() * (p[ids] - q[ids])).sum()

    def stopped(t: int, p: Tensor, q: Tensor) -> Tensor:
        ids = ids_of(t, p, q)
        return ((p[ids].exp() * (p[ids] - q[ids])).detach() * p[ids]).sum()

    def mass(t: int, p: Tensor, q: Tensor) -> Tensor:
        return p[ids_of(t, p, q)].exp().sum()

    difference = dense(given, truncated)[1] - dense(given, stopped)[1]
    assert float(difference.abs().max()) > 1e-2
    assert float((difference - dense(given, mass)[1]).abs().max()) <= 1e-12
    assert float((ours(loss, given)[1].double() - dense(given, truncated)[1]).abs().max()) > 1e-2


@pytest.mark.parametrize("support", ["teacher_topk", "student_topk", "overlap"])
def test_the_registry_refuses_to_renormalise_on_one_entry(support: Support) -> None:
    loss = LossConfig(support=support, normalisation="renormalised", k=1)
    assert "identically 0" in (refusal(loss) or "")
    assert refusal(loss.model_copy(update={"k": 2})) is None


def test_every_combination_is_a_cell_or_is_refused_with_a_reason() -> None:
    allowed = set()
    for key in itertools.product(get_args(Support), get_args(Direction), get_args(Normalisation)):
        loss = LossConfig(support=key[0], direction=key[1], normalisation=key[2])
        if refusal(loss) is None:
            allowed.add(key)
            assert cell(loss) is CELLS[key]
    assert allowed == set(CELLS)


def test_an_option_is_refused_where_it_means_nothing() -> None:
    values = {name: value for _, options in OPTIONS for name, value in options.items()}
    for name in ("reference", "reference_kl", "outcome", "outcome_weight"):
        del values[name]  # tested below, by pairs
    for name, value in values.items():
        alone = [(rule, o) for rule, o in OPTIONS if "outcome" not in o]
        belongs = [rule for rule, options in alone if name in options]
        for key in CELL_KEYS:
            loss = LossConfig(support=key[0], direction=key[1], normalisation=key[2])
            of = {"reference": "base"} if name == "extrapolation" else {}
            reason = refusal(loss.model_copy(update={name: value} | of))
            if any(rule(key) for rule in belongs) or (name, key[2]) == ("clamp", "reference"):
                assert reason is None
            else:
                assert (reason or "").startswith(f"{name} belongs to ")


def test_the_kl_to_a_reference_has_on_average_the_gradient_of_the_full_one() -> None:
    log_p = torch.randn(V, dtype=torch.float64, generator=torch.Generator().manual_seed(8))
    log_p = torch.log_softmax(log_p, dim=0)
    log_r = torch.log_softmax(log_p.flip(0) / 2, dim=0)
    logits = log_p.clone().requires_grad_()
    full = torch.log_softmax(logits, dim=0)
    (full.exp() * (full - log_r)).sum().backward()
    exact = logits.grad
    loss = config(("draws", "forward", "none"), reference="base", reference_kl=0.7)
    average = torch.zeros(V, dtype=torch.float64)
    for y in range(V):
        logits = log_p.clone().requires_grad_()
        sampled = torch.log_softmax(logits, dim=0)[y : y + 1]
        nothing = torch.zeros((1, 1), dtype=torch.float64)
        on = OnSupport(
            nothing,
            nothing,
            nothing.bool(),
            nothing[0],
            nothing[0],
            student_sampled_T=sampled,
            reference_sampled_T=log_r[y : y + 1],
        )
        token_losses(loss, on).sum().backward()
        assert logits.grad is not None
        average += log_p[y].exp() * logits.grad
    assert exact is not None
    assert float((average - 0.7 * exact).abs().max()) <= 1e-9


def test_what_is_extrapolated_needs_a_reference_and_a_reference_a_use() -> None:
    plain = {"support": "sampled", "normalisation": "none"}
    for wrong, why in (
        ({"extrapolation": 1.5}, "needs a 'reference'"),
        ({"reference": "base"}, "nothing else looks at it"),
        ({"reference_kl": 0.1}, "belongs to a loss with a 'reference'"),
    ):
        assert why in str(refusal(LossConfig.model_validate(plain | wrong)))
    topk = LossConfig(reference="base", extrapolation=1.5)
    assert "whose ids the reference scored" in str(refusal(topk))


def test_an_outcome_needs_a_weight_and_a_weight_an_outcome() -> None:
    for wrong, why in (
        ({"outcome": "rewards:right"}, "outcome belongs to outcome_weight"),
        ({"outcome_weight": 0.5}, "outcome_weight belongs to a loss with an 'outcome'"),
    ):
        assert why in str(refusal(LossConfig.model_validate(wrong)))
    with pytest.raises(ValidationError, match="outcome"):
        LossConfig(outcome="no function", outcome_weight=0.5)


def test_what_an_outcome_does_to_a_loss() -> None:
    plain = config(("teacher_topk", "reverse", "renormalised"))
    with_outcome = plain.model_copy(update=OUTCOME)
    capped = with_outcome.model_copy(update={"importance_cap": CAP})
    assert (is_local(plain), is_local(with_outcome)) == (True, False)
    assert (is_divergence(plain), is_divergence(with_outcome)) == (True, False)
    recorded = config(("student_topk", "reverse", "renormalised")).model_copy(
        update=OUTCOME | {"importance_cap": CAP}
    )
    losses = (plain, with_outcome, capped, recorded)
    assert [tolerates_older(loss) for loss in losses] == [True, False, True, False]


def test_a_gate_on_the_teachers_entropy_needs_the_entropy() -> None:
    loss = config(("overlap", "reverse", "tail"), forward_above=1.0)
    assert cell(loss).columns == {"topk", "entropy"}


@pytest.mark.parametrize("key", CELL_KEYS, ids="-".join)
def test_teacher_values_at_the_clip_floor_and_empty_tails_stay_finite(
    key: tuple[Support, Direction, Normalisation],
) -> None:
    given = problem()
    floor, nothing = torch.tensor(-255.99609375), torch.full((T,), -torch.inf)
    batch = given.batch
    assert batch.topk_TK is not None
    assert batch.recorded_TS is not None
    topk, recorded = batch.topk_TK.clone(), batch.recorded_TS.clone()
    topk[:, 1:] = floor
    recorded[:, 1:] = floor
    clipped = replace(
        batch,
        topk_TK=topk,
        recorded_TS=recorded,
        teacher_sampled_T=floor.expand(T),
        tail_T=nothing,
        recorded_tail_T=nothing,
    )
    losses, gradient = ours(config(key), replace(given, batch=clipped))
    assert bool(torch.isfinite(losses).all())
    assert bool(torch.isfinite(gradient).all())


@pytest.mark.parametrize("support", ["teacher_topk", "student_topk"])
def test_draining_the_support_raises_the_reverse_kl_with_tail(support: Support) -> None:
    """A student that moves its mass off the support wins with a truncated sum, not with a tail."""
    given = problem(num_kept=[K] * T)
    ids_of = support_of(config((support, "reverse", "tail")), given.batch)
    identity = torch.eye(V)
    kls, truncated = [], []
    for drained in (0.0, 3.0, 6.0, 9.0, 12.0):
        logits = given.teacher_TV.float().clone()
        for t in range(T):
            logits[t, ids_of(t, given.teacher_TV[t], given.teacher_TV[t])] -= drained
        loss = config((support, "reverse", "tail"))
        losses = student_view(loss, given.batch, logits, identity)[1]
        kls.append(float(losses.mean()))
        log_p = torch.log_softmax(logits.double(), dim=1)
        sums = [
            sum(float(log_p[t, v].exp() * (log_p[t, v] - given.teacher_TV[t, v])) for v in ids)
            for t in range(T)
            for ids in [ids_of(t, log_p[t], given.teacher_TV[t])]
        ]
        truncated.append(sum(sums) / T)
    assert kls == sorted(kls)
    assert kls[0] < 1e-5
    assert kls[1] > 0.1
    assert kls[2] > kls[1] + 0.01
    assert min(truncated) < 0


def almost_all(outside: float) -> Tensor:
    """Log-probs of [1, V] with the given mass outside the first K ids, spread evenly."""
    mass = torch.full((1, V), outside / (V - K), dtype=torch.float64)
    mass[0, :K] = (1 - outside) * torch.tensor([0.4, 0.3, 0.15, 0.1, 0.05], dtype=torch.float64)
    return mass.log()


def peaked(student_tail: float, teacher_tail: float) -> Problem:
    teacher = almost_all(teacher_tail)
    batch = stored(teacher, [K], torch.arange(K)[None], torch.tensor([2]))
    return Problem(almost_all(student_tail).float(), torch.eye(V), teacher, batch)


@pytest.mark.parametrize("key", TAIL_KEYS, ids="-".join)
@pytest.mark.parametrize(("student_tail", "teacher_tail"), [(1e-5, 0.1), (0.1, 1e-5), (1e-6, 1e-5)])
def test_loss_and_gradient_are_right_where_little_mass_is_outside_the_support(
    key: tuple[Support, Direction, Normalisation], student_tail: float, teacher_tail: float
) -> None:
    given = peaked(student_tail, teacher_tail)
    assert_close(ours(config(key), given), oracle(config(key), given))


@pytest.mark.parametrize("support", ALL_SUPPORTS)
def test_forward_kl_pulls_a_student_back_that_has_left_all_but_the_support(
    support: Support,
) -> None:
    given, loss = peaked(1e-8, 0.1), config((support, "forward", "tail"))
    exact = oracle(loss, given)[1][0, K:].sum()
    assert float(exact) == pytest.approx(-0.1, abs=1e-6)
    assert float(ours(loss, given)[1][0, K:].sum()) == pytest.approx(float(exact), rel=0.01)


def brute_force_metrics(loss: LossConfig, given: Problem) -> dict[str, float]:
    """Token-means by loops over the dense distributions."""
    batch = given.batch
    assert batch.kept_TK is not None
    log_p = torch.log_softmax(given.hidden_TD.double() @ given.weight_VD.double().T, dim=1)
    log_q = given.teacher_TV
    width = batch.kept_TK.shape[1]
    found: dict[str, list[float]] = {}

    def note(name: str, value: float) -> None:
        found.setdefault(name, []).append(value)

    for t in range(len(log_q)):
        p, q = log_p[t].exp().tolist(), log_q[t].exp().tolist()
        kept = log_q[t].sort(descending=True).indices[: int(batch.kept_TK[t].sum())].tolist()
        own = log_p[t].sort(descending=True).indices[: loss.k].tolist()
        shared = set(kept) & set(own)
        note("overlap", len(shared) / width)
        note("overlap_mass_student", sum(p[v] for v in shared))
        note("overlap_mass_teacher", sum(q[v] for v in shared))
        note("support_mass", sum(p[v] for v in kept))
        note("overlap_empty", float(not shared))
        entropies = [-sum(x * math.log(x) for x in side) for side in (p, q)]
        note("student_entropy", entropies[0])
        note("teacher_entropy", entropies[1])
        note("entropy_gap", abs(entropies[0] - entropies[1]))
        ratio = q[int(batch.sampled_T[t])] / p[int(batch.sampled_T[t])]
        note("reverse_kl_sampled", ratio - 1 - math.log(ratio))
        note("reverse_kl_tail", float(tail_oracle(kept, log_p[t], log_q[t])))
        note("weights", p[int(batch.sampled_T[t])] / math.exp(float(batch.sampling_T[t])))
    weights = found.pop("weights")
    made = {name: sum(values) / len(log_q) for name, values in found.items()}
    made["loss"] = float(oracle(loss, given)[0].mean())
    made["ess"] = sum(weights) ** 2 / (len(log_q) * sum(w * w for w in weights))
    return made


def summed(values: dict[str, Tensor], losses_T: Tensor) -> dict[str, float]:
    """Sums of metrics, and those of all tokens."""
    values = values | {"loss": losses_T, "num_tokens": torch.ones_like(losses_T)}
    return {name: float(of.double().sum()) for name, of in values.items()}


def reported(loss: LossConfig, given: Problem) -> dict[str, float]:
    student, losses = student_view(loss, given.batch, given.hidden_TD, given.weight_VD)
    sums = summed(metric_values(given.batch, student), losses)
    assert sums["num_measured"] == len(given.hidden_TD)
    return means(sums)


@pytest.mark.parametrize("key", CELL_KEYS, ids="-".join)
def test_reported_metrics_are_those_counted_token_by_token(
    key: tuple[Support, Direction, Normalisation],
) -> None:
    given, loss = problem(seed=4), config(key)
    expected = brute_force_metrics(loss, given)
    assert 0 < expected["overlap"] < 1
    assert 0 < expected["ess"] < 0.99
    mine = reported(loss, given)
    assert mine.keys() == expected.keys()
    for name, value in expected.items():
        assert mine[name] == pytest.approx(value, abs=1e-5, rel=1e-5), name


def test_empty_overlaps_are_counted() -> None:
    mine = reported(config(("overlap", "reverse", "tail")), disjoint())
    assert mine["overlap_empty"] == 1
    assert mine["overlap"] == 0


def test_a_student_that_is_the_policy_that_sampled_has_full_effective_sample_size() -> None:
    given = problem()
    log_p = torch.log_softmax(given.hidden_TD @ given.weight_VD.T, dim=1)
    sampling = log_p[torch.arange(T), given.batch.sampled_T]
    fresh = replace(given, batch=replace(given.batch, sampling_T=sampling))
    assert reported(config(CELL_KEYS[0]), fresh)["ess"] == pytest.approx(1, abs=1e-6)


def test_metrics_of_columns_that_are_not_stored_are_absent_not_zero() -> None:
    given, loss = problem(), config(("student_topk", "reverse", "tail"))
    bare = replace(
        given.batch,
        teacher_sampled_T=None,
        teacher_entropy_T=None,
        topk_ids_TK=None,
        topk_TK=None,
        kept_TK=None,
        tail_T=None,
    )
    mine = reported(loss, replace(given, batch=bare))
    assert mine.keys() == {"loss", "student_entropy", "ess"}
    assert mine["loss"] == pytest.approx(float(oracle(loss, given)[0].mean()), abs=1e-5)


def test_sums_of_two_micro_batches_make_the_means_of_all_their_tokens() -> None:
    loss = config(("teacher_topk", "reverse", "tail"))
    given = problem()
    few = 3

    def part(tokens: slice) -> dict[str, float]:
        batch = given.batch.cut(tokens)
        student, losses = student_view(loss, batch, given.hidden_TD[tokens], given.weight_VD)
        return summed(metric_values(batch, student), losses)

    first, second = part(slice(0, few)), part(slice(few, T))
    together = means({name: first[name] + second[name] for name in first})
    for name, value in brute_force_metrics(loss, given).items():
        assert together[name] == pytest.approx(value, abs=1e-5), name
