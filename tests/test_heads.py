"""The LM-head operations against dense float64 computations over the whole vocabulary."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from opdcache.errors import ModelError
from opdcache.heads import (
    divergence,
    split_head,
    support_logprobs,
    support_view,
)
from opdcache.score.statistics import teacher_statistics

pytestmark = pytest.mark.usefixtures("one_thread")

NUM_TOKENS, VOCAB, WIDTH = 23, 97, 16
CHUNKS = (1, 7, 100)


def dense(hidden_TD: Tensor, weight_VD: Tensor) -> Tensor:
    """Log-probs [T, V] in float64 of the numbers as they are given."""
    logits = hidden_TD.detach().double() @ weight_VD.detach().double().T
    return logits - logits.exp().sum(dim=1, keepdim=True).log()


def problem(
    dtype: torch.dtype = torch.float32, num_tokens: int = NUM_TOKENS, seed: int = 0
) -> tuple[Tensor, Tensor]:
    """Hidden states and a head whose logits have a spread of about 4 nats."""
    made = torch.Generator().manual_seed(seed)
    hidden = torch.randn(num_tokens, WIDTH, generator=made)
    weight = torch.randn(VOCAB, WIDTH, generator=made)
    return hidden.to(dtype), weight.to(dtype)


def some_ids(width: int, seed: int = 3) -> Tensor:
    made = torch.Generator().manual_seed(seed)
    return torch.randint(VOCAB, (NUM_TOKENS, width), generator=made)


def largest_error(ours: Tensor, exact: Tensor) -> float:
    assert ours.shape == exact.shape
    return float((ours.detach().double() - exact.detach().double()).abs().max())


def assert_gradients_are_dense(ids_TK: Tensor, chunk_tokens: int) -> None:
    """Gradients of a random linear functional of the log-probs, against dense autograd."""
    hidden, weight = (x.requires_grad_() for x in problem())
    pull_TK = torch.randn(ids_TK.shape, generator=torch.Generator().manual_seed(9))
    pull_TK /= ids_TK.shape[1]
    ours = support_logprobs(hidden, weight, ids_TK, chunk_tokens=chunk_tokens)
    (ours * pull_TK).sum().backward()
    exact = [x.detach().double().requires_grad_() for x in (hidden, weight)]
    logprobs = torch.log_softmax(exact[0] @ exact[1].T, dim=1)
    picked = torch.stack([logprobs[t, ids_TK[t]] for t in range(len(ids_TK))])
    (picked * pull_TK).sum().backward()
    for mine, theirs in zip((hidden, weight), exact, strict=True):
        assert mine.grad is not None
        assert theirs.grad is not None
        assert largest_error(mine.grad, theirs.grad) <= 1e-5


@pytest.mark.parametrize("chunk_tokens", CHUNKS)
def test_support_logprobs_are_those_of_the_whole_vocabulary(chunk_tokens: int) -> None:
    hidden, weight = problem()
    ids = some_ids(6)
    ours = support_logprobs(hidden, weight, ids, chunk_tokens=chunk_tokens)
    exact = dense(hidden, weight)
    for t in range(NUM_TOKENS):
        for j in range(6):
            assert abs(float(ours[t, j]) - float(exact[t, ids[t, j]])) <= 1e-5


@pytest.mark.parametrize("chunk_tokens", CHUNKS)
def test_gradients_of_support_logprobs_are_those_of_a_dense_computation(chunk_tokens: int) -> None:
    assert_gradients_are_dense(some_ids(6), chunk_tokens)


def test_an_id_that_stands_twice_gets_the_gradient_of_both_places() -> None:
    ids = some_ids(6)
    ids[:, 3:] = ids[:, :1]
    assert_gradients_are_dense(ids, 7)


def test_gradients_are_right_when_the_support_is_the_whole_vocabulary() -> None:
    ids = torch.stack([torch.randperm(VOCAB) for _ in range(NUM_TOKENS)])
    assert_gradients_are_dense(ids, 7)


def test_no_tokens_give_no_logprobs_and_zero_gradients() -> None:
    hidden, weight = problem(num_tokens=0)
    hidden.requires_grad_()
    weight.requires_grad_()
    ours = support_logprobs(hidden, weight, torch.zeros((0, 4), dtype=torch.long))
    assert ours.shape == (0, 4)
    ours.sum().backward()
    assert weight.grad is not None
    assert weight.grad.shape == weight.shape
    assert float(weight.grad.abs().max()) == 0


def test_gradients_agree_with_finite_differences_of_float64_logprobs() -> None:
    made = torch.Generator().manual_seed(5)
    hidden = torch.randn(3, 4, generator=made).requires_grad_()
    weight = torch.randn(6, 4, generator=made).requires_grad_()
    ids = torch.tensor([[0, 5], [2, 2], [1, 4]])
    pull = torch.randn(3, 2, generator=made)
    (support_logprobs(hidden, weight, ids, chunk_tokens=2) * pull).sum().backward()

    def value(h: Tensor, w: Tensor) -> float:
        logprobs = dense(h, w)
        return sum(float(pull[t, j] * logprobs[t, ids[t, j]]) for t in range(3) for j in range(2))

    step = 1e-5
    for which, tensor in enumerate((hidden, weight)):
        assert tensor.grad is not None
        for place in range(tensor.numel()):
            ends = []
            for sign in (1, -1):
                moved = [hidden.detach().double(), weight.detach().double()]
                moved[which].view(-1)[place] += sign * step
                ends.append(value(moved[0], moved[1]))
            slope = (ends[0] - ends[1]) / (2 * step)
            assert abs(slope - float(tensor.grad.view(-1)[place])) <= 1e-5


def test_a_head_without_gradient_still_gives_the_hidden_states_theirs() -> None:
    hidden, weight = problem()
    hidden.requires_grad_()
    support_logprobs(hidden, weight, some_ids(2)).sum().backward()
    assert hidden.grad is not None
    assert float(hidden.grad.abs().max()) > 0
    assert weight.grad is None


def test_bf16_inputs_are_normalised_in_float32() -> None:
    hidden, weight = problem(torch.bfloat16)
    ids = some_ids(6)
    ours = support_logprobs(hidden, weight, ids, chunk_tokens=7)
    assert ours.dtype == torch.float32
    assert largest_error(ours, dense(hidden, weight).gather(1, ids)) <= 1e-5


def test_bf16_gradients_are_the_exact_ones_rounded_once() -> None:
    hidden, weight = (x.requires_grad_() for x in problem(torch.bfloat16))
    ids = some_ids(6)
    support_logprobs(hidden, weight, ids, chunk_tokens=1)[:, :3].sum().backward()
    exact = [x.detach().double().requires_grad_() for x in (hidden, weight)]
    torch.log_softmax(exact[0] @ exact[1].T, dim=1).gather(1, ids)[:, :3].sum().backward()
    for mine, theirs in zip((hidden, weight), exact, strict=True):
        assert mine.grad is not None
        assert theirs.grad is not None
        assert mine.grad.dtype == torch.bfloat16
        rounding = theirs.grad.abs() * 2**-8 + 1e-5
        assert bool(((mine.grad.double() - theirs.grad).abs() <= rounding).all())


@pytest.mark.parametrize("chunk_tokens", CHUNKS)
def test_student_entropy_and_threshold_are_those_of_the_whole_distribution(
    chunk_tokens: int,
) -> None:
    hidden, weight = problem()
    view = support_view(hidden, weight, some_ids(2), topk=5, chunk_tokens=chunk_tokens)
    exact = dense(hidden, weight)
    entropy = torch.tensor([-sum(p.exp() * p for p in row) for row in exact], dtype=torch.float64)
    fifth = exact.sort(dim=1, descending=True).values[:, 4]
    assert largest_error(view.entropy_T, entropy) <= 5e-5
    assert largest_error(view.threshold_T, fifth) <= 1e-5


def test_a_token_reaches_the_threshold_exactly_when_it_is_among_the_k_likeliest() -> None:
    hidden, weight = problem()
    everything = torch.arange(VOCAB).expand(NUM_TOKENS, VOCAB)
    view = support_view(hidden, weight, everything, topk=5)
    exact = dense(hidden, weight)
    for t in range(NUM_TOKENS):
        reached = {v for v in range(VOCAB) if view.logprobs_TK[t, v] >= view.threshold_T[t]}
        assert reached == set(exact[t].sort(descending=True).indices[:5].tolist())


def test_a_k_above_the_vocabulary_puts_every_id_among_the_likeliest() -> None:
    hidden, weight = problem()
    view = support_view(hidden, weight, some_ids(2), topk=10 * VOCAB)
    assert largest_error(view.threshold_T, dense(hidden, weight).min(dim=1).values) <= 1e-5


def peaked() -> tuple[Tensor, Tensor]:
    """Distributions whose mass outside the two likeliest ids falls from 1e-2 to 1e-11."""
    weight = torch.zeros(VOCAB, WIDTH)
    weight[:, 0] = torch.linspace(-1, 0, VOCAB)
    weight[40, 1] = weight[60, 1] = 1.0
    hidden = torch.zeros(24, WIDTH)
    hidden[:, 0] = 1.0
    hidden[:, 1] = torch.linspace(8.0, 29.0, 24)
    return hidden, weight


def relative_errors(tail_T: Tensor, exact_T: Tensor) -> Tensor:
    return (tail_T.double().exp() / exact_T - 1).abs()


@pytest.mark.parametrize("chunk_tokens", CHUNKS)
def test_the_students_tail_and_its_gradients_are_those_of_a_dense_computation(
    chunk_tokens: int,
) -> None:
    """Ids are repeated, some of them marked in one place only; a token marks none."""
    ids = some_ids(6)
    ids[:, 5] = ids[:, 0]
    within = torch.rand(ids.shape, generator=torch.Generator().manual_seed(4)) < 0.5
    within[3] = False
    made = torch.Generator().manual_seed(9)
    pull_TK, pull_T = (torch.randn(n, generator=made) for n in (ids.shape, (NUM_TOKENS,)))
    hidden, weight = (x.requires_grad_() for x in problem())
    view = support_view(hidden, weight, ids, within_TK=within, chunk_tokens=chunk_tokens)
    ((view.logprobs_TK * pull_TK).sum() / 6 + (view.tail_T * pull_T).sum()).backward()
    exact = [x.detach().double().requires_grad_() for x in (hidden, weight)]
    logprobs = torch.log_softmax(exact[0] @ exact[1].T, dim=1)
    tails = []
    for t in range(NUM_TOKENS):
        inside = {int(ids[t, j]) for j in range(6) if within[t, j]}
        tails.append(torch.logsumexp(logprobs[t, [v for v in range(VOCAB) if v not in inside]], 0))
    tail_T = torch.stack(tails)
    ((logprobs.gather(1, ids) * pull_TK).sum() / 6 + (tail_T * pull_T).sum()).backward()
    assert largest_error(view.tail_T, tail_T) <= 1e-5
    for mine, theirs in zip((hidden, weight), exact, strict=True):
        assert mine.grad is not None
        assert theirs.grad is not None
        assert largest_error(mine.grad, theirs.grad) <= 2e-5


@pytest.mark.parametrize("drop", [10.0, 60.0, 72.0, 90.0, 200.0])
def test_the_gradient_of_a_tail_is_right_however_small_it_is(drop: float) -> None:
    """Beside ordinary tokens, in one chunk: of mass that float32 holds, loses bits of, or not."""
    logits = torch.linspace(-2, 0, VOCAB).repeat(3, 1)
    logits[1, 2:] -= drop
    ids = torch.tensor([[0, 1]] * 3)
    hidden = logits.requires_grad_()
    view = support_view(hidden, torch.eye(VOCAB), ids, within_TK=torch.ones_like(ids).bool())
    view.tail_T.sum().backward()
    exact = logits.detach().double().requires_grad_()
    tail_T = torch.log_softmax(exact, dim=1)[:, 2:].logsumexp(dim=1)
    tail_T.sum().backward()
    assert hidden.grad is not None
    assert exact.grad is not None
    assert largest_error(view.tail_T, tail_T) <= 1e-4
    assert largest_error(hidden.grad, exact.grad) <= 1e-5
    assert float(exact.grad[1, 2:].sum()) == pytest.approx(1, abs=1e-2)


def test_a_tiny_tail_of_the_student_keeps_its_relative_precision() -> None:
    hidden, weight = peaked()
    ids = torch.tensor([[60, 40]]).expand(24, 2)
    view = support_view(hidden, weight, ids, within_TK=torch.ones_like(ids, dtype=torch.bool))
    exact = dense(hidden, weight).exp()
    exact[:, [60, 40]] = 0
    assert float(exact.sum(dim=1).min()) < 1e-10
    assert float(relative_errors(view.tail_T, exact.sum(dim=1)).max()) <= 1e-4


@pytest.mark.parametrize("chunk_tokens", CHUNKS)
def test_teacher_topk_sampled_and_entropy_are_those_of_the_whole_vocabulary(
    chunk_tokens: int,
) -> None:
    hidden, weight = problem()
    sampled, gather = some_ids(1)[:, 0], some_ids(4, seed=8)
    stats = teacher_statistics(
        hidden, weight, sampled, gather, k=5, mass=1.0, chunk_tokens=chunk_tokens
    )
    exact = dense(hidden, weight)
    order = exact.sort(dim=1, descending=True)
    assert torch.equal(stats.topk_ids_TK, order.indices[:, :5])
    assert largest_error(stats.topk_TK, order.values[:, :5]) <= 1e-5
    assert stats.num_kept_T.tolist() == [5] * NUM_TOKENS
    for t in range(NUM_TOKENS):
        assert abs(float(stats.sampled_T[t] - exact[t, sampled[t]])) <= 1e-5
        assert abs(float(stats.entropy_T[t]) + float((exact[t].exp() * exact[t]).sum())) <= 5e-5
        for j in range(4):
            assert abs(float(stats.gathered_TS[t, j] - exact[t, gather[t, j]])) <= 1e-5


def test_the_teachers_tail_is_the_mass_outside_its_kept_entries() -> None:
    hidden, weight = problem()
    stats = teacher_statistics(hidden, weight, some_ids(1)[:, 0], some_ids(0), k=5, mass=1.0)
    outside = dense(hidden, weight).sort(dim=1).values[:, :-5].exp().sum(dim=1)
    assert float(relative_errors(stats.tail_T, outside).max()) <= 1e-5


def test_a_tiny_tail_keeps_its_relative_precision() -> None:
    hidden, weight = peaked()
    nothing = torch.zeros((24, 0), dtype=torch.long)
    stats = teacher_statistics(hidden, weight, nothing.sum(1), nothing, k=2, mass=1.0)
    outside = dense(hidden, weight).sort(dim=1).values[:, :-2].exp().sum(dim=1)
    assert float(outside.min()) < 1e-10
    assert float(relative_errors(stats.tail_T, outside).max()) <= 1e-4


def test_a_tiny_tail_of_the_gathered_ids_keeps_its_relative_precision() -> None:
    hidden, weight = peaked()
    gather = torch.tensor([[60, 40, 3]]).expand(24, 3)
    stats = teacher_statistics(hidden, weight, gather[:, 0], gather, k=1, mass=1.0)
    exact = dense(hidden, weight).exp()
    exact[:, [60, 40, 3]] = 0
    assert float(exact.sum(dim=1).min()) < 1e-10
    assert float(relative_errors(stats.gathered_tail_T, exact.sum(dim=1)).max()) <= 1e-4


def test_an_id_gathered_twice_leaves_the_tail_once() -> None:
    hidden, weight = problem()
    gather = some_ids(3, seed=8)
    gather[:, 2] = gather[:, 0]
    stats = teacher_statistics(hidden, weight, gather[:, 0], gather, k=1, mass=1.0)
    mass = dense(hidden, weight).exp()
    inside = [row[sorted(set(own.tolist()))].sum() for row, own in zip(mass, gather, strict=True)]
    outside = mass.sum(dim=1) - torch.stack(inside)
    assert float(relative_errors(stats.gathered_tail_T, outside).max()) <= 1e-5


@pytest.mark.parametrize("chunk_tokens", CHUNKS)
def test_entries_are_kept_until_they_hold_the_mass_or_the_cap_is_reached(chunk_tokens: int) -> None:
    hidden, weight = problem()
    hidden = hidden * torch.linspace(0.1, 2, NUM_TOKENS)[:, None]
    cap, mass = 6, 0.8
    stats = teacher_statistics(
        hidden, weight, some_ids(1)[:, 0], some_ids(0), k=cap, mass=mass, chunk_tokens=chunk_tokens
    )
    probs = dense(hidden, weight).exp().sort(dim=1, descending=True).values
    expected, tails = [], []
    for row in probs.tolist():
        held, kept = 0.0, 0
        while held < mass and kept < cap:
            held += row[kept]
            kept += 1
        expected.append(kept)
        tails.append(sum(row[kept:]))
    assert min(expected) == 1
    assert max(expected) == cap
    assert len(set(expected)) > 2
    assert stats.num_kept_T.tolist() == expected
    assert stats.topk_TK.shape == (NUM_TOKENS, cap)
    exact = torch.tensor(tails, dtype=torch.float64)
    assert float(relative_errors(stats.tail_T, exact).max()) <= 1e-5


def test_entries_are_kept_among_the_shared_ids_and_the_others_mass_is_tail() -> None:
    hidden, weight = problem()
    shared, k = VOCAB // 2, 4
    stats = teacher_statistics(
        hidden, weight, some_ids(1)[:, 0], some_ids(0), k=k, mass=1.0, num_ids=shared
    )
    probs = dense(hidden, weight).exp()
    assert bool((probs.argmax(dim=1) >= shared).any())  # the cut does take likeliest ids away
    best = probs[:, :shared].sort(dim=1, descending=True)
    assert torch.equal(stats.topk_ids_TK, best.indices[:, :k])
    outside = 1 - best.values[:, :k].sum(dim=1)
    assert float(relative_errors(stats.tail_T, outside).max()) <= 1e-4


@pytest.mark.parametrize("chunk_tokens", CHUNKS)
def test_ids_are_drawn_as_often_as_the_teacher_s_distribution_says(chunk_tokens: int) -> None:
    hidden, weight = problem()
    shared, draws = VOCAB - 9, 4000
    evenly = ((torch.arange(draws).double() + 0.5) / draws).expand(NUM_TOKENS, draws)
    stats = teacher_statistics(
        hidden, weight, some_ids(1)[:, 0], some_ids(0), k=1, mass=1.0, num_ids=shared,
        uniforms_TN=evenly, chunk_tokens=chunk_tokens,
    )  # fmt: skip
    assert stats.drawn_TN.shape == (NUM_TOKENS, draws)
    among = dense(hidden, weight)[:, :shared].exp()
    expected = draws * among / among.sum(dim=1, keepdim=True)
    for t in range(NUM_TOKENS):
        counts = torch.bincount(stats.drawn_TN[t], minlength=shared)
        assert largest_error(counts, expected[t]) <= 1 + 1e-2


def test_no_recorded_ids_leave_all_mass_in_their_tail() -> None:
    hidden, weight = problem()
    stats = teacher_statistics(hidden, weight, some_ids(1)[:, 0], some_ids(0), k=3, mass=1.0)
    assert stats.gathered_TS.shape == (NUM_TOKENS, 0)
    assert float(stats.gathered_tail_T.abs().max()) <= 1e-5


@pytest.mark.parametrize("k", [VOCAB, VOCAB + 50])
def test_keeping_the_whole_vocabulary_leaves_no_tail(k: int) -> None:
    hidden, weight = problem()
    everything = torch.arange(VOCAB).expand(NUM_TOKENS, VOCAB)
    stats = teacher_statistics(hidden, weight, some_ids(1)[:, 0], everything, k=k, mass=1.0)
    assert stats.topk_ids_TK.shape == (NUM_TOKENS, VOCAB)
    assert stats.num_kept_T.tolist() == [VOCAB] * NUM_TOKENS
    assert bool(torch.isneginf(stats.tail_T).all())
    assert bool(torch.isneginf(stats.gathered_tail_T).all())
    assert largest_error(stats.gathered_TS, dense(hidden, weight)) <= 1e-5


def test_no_tokens_give_empty_teacher_statistics_of_the_right_widths() -> None:
    hidden, weight = problem(num_tokens=0)
    gather = torch.zeros((0, 4), dtype=torch.long)
    stats = teacher_statistics(hidden, weight, gather.sum(1), gather, k=5, mass=1.0)
    assert stats.topk_ids_TK.shape == stats.topk_TK.shape == (0, 5)
    assert stats.gathered_TS.shape == (0, 4)
    for flat in (stats.sampled_T, stats.entropy_T, stats.tail_T, stats.num_kept_T):
        assert flat.shape == (0,)


def test_a_bf16_teacher_is_normalised_in_float32() -> None:
    hidden, weight = problem(torch.bfloat16)
    stats = teacher_statistics(hidden, weight, some_ids(1)[:, 0], some_ids(3), k=5, mass=1.0)
    exact = dense(hidden, weight)
    assert stats.topk_TK.dtype == torch.float32
    top = exact.sort(dim=1, descending=True).values
    assert largest_error(stats.topk_TK, top[:, :5]) <= 1e-5
    assert float(relative_errors(stats.tail_T, top[:, 5:].exp().sum(dim=1)).max()) <= 1e-5


def assert_divergence_is_exact(
    student: tuple[Tensor, Tensor], teacher: tuple[Tensor, Tensor], chunk_tokens: int
) -> None:
    k, vocab = 5, VOCAB
    ours = divergence(student, teacher, k=k, chunk_tokens=chunk_tokens)
    p, q = (dense(hidden, weight[:vocab]) for hidden, weight in (student, teacher))
    for t in range(NUM_TOKENS):
        kl = sum(float(p[t, v].exp() * (p[t, v] - q[t, v])) for v in range(vocab))
        likely = [set(x[t].sort(descending=True).indices[:k].tolist()) for x in (p, q)]
        assert abs(float(ours.reverse_kl_T[t]) - kl) <= 1e-5
        assert abs(float(ours.student_entropy_T[t]) + float((p[t].exp() * p[t]).sum())) <= 1e-5
        assert abs(float(ours.teacher_entropy_T[t]) + float((q[t].exp() * q[t]).sum())) <= 1e-5
        assert abs(float(ours.overlap_T[t]) - len(likely[0] & likely[1]) / k) <= 1e-6
    assert len(set(ours.overlap_T.tolist())) > 1


@pytest.mark.parametrize("chunk_tokens", CHUNKS)
def test_divergence_is_the_full_vocabulary_kl_with_overlap_by_counting(chunk_tokens: int) -> None:
    student = problem()
    teacher = (student[0] + 0.4 * problem(seed=1)[0], student[1] + 0.4 * problem(seed=1)[1])
    assert_divergence_is_exact(student, teacher, chunk_tokens)


@pytest.mark.parametrize("longer", ["student", "teacher"])
def test_divergence_compares_only_the_ids_that_both_padded_heads_have(longer: str) -> None:
    student = problem()
    teacher = (student[0] + 0.4 * problem(seed=1)[0], student[1] + 0.4 * problem(seed=1)[1])
    padding = 5 * torch.ones(7, WIDTH)
    if longer == "student":
        student = (student[0], torch.cat([student[1], padding]))
    else:
        teacher = (teacher[0], torch.cat([teacher[1], padding]))
    assert_divergence_is_exact(student, teacher, 100)


def test_a_model_has_no_divergence_from_itself() -> None:
    both = problem()
    ours = divergence(both, both, k=5)
    assert float(ours.reverse_kl_T.abs().max()) == 0
    assert ours.overlap_T.tolist() == [1.0] * NUM_TOKENS


def test_divergence_of_no_tokens_is_empty() -> None:
    both = problem(num_tokens=0)
    assert divergence(both, both, k=5).reverse_kl_T.shape == (0,)


def tiny(architecture: str, **changes: object) -> Any:
    import transformers

    torch.manual_seed(0)
    arguments: dict[str, object] = {
        "vocab_size": 64,
        "hidden_size": 32,
        "intermediate_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "max_position_embeddings": 32,
        "initializer_range": 0.3,
        "bos_token_id": 0,
        "eos_token_id": 0,
        "pad_token_id": 0,
        **changes,
    }
    config = getattr(transformers, f"{architecture}Config")(**arguments)
    return getattr(transformers, f"{architecture}ForCausalLM")(config).eval()


@pytest.mark.parametrize("architecture", ["Llama", "Qwen2"])
@pytest.mark.parametrize("tied", [True, False])
def test_split_gives_a_body_and_a_head_that_make_the_models_logits(
    architecture: str, tied: bool
) -> None:
    model = tiny(architecture, tie_word_embeddings=tied)
    body, head = split_head(model, Path("somewhere"))
    ids = torch.tensor([[5, 9, 33, 2, 61]])
    with torch.no_grad():
        ours = body(input_ids=ids).last_hidden_state.double() @ head.weight.double().T
        theirs = model(input_ids=ids).logits.double()
    assert float(theirs.abs().max()) > 1
    assert largest_error(ours, theirs) <= 1e-4


def test_split_refuses_a_model_with_a_logit_soft_cap() -> None:
    with pytest.raises(ModelError, match="not the LM head applied"):
        split_head(tiny("Gemma2", final_logit_softcapping=5.0), Path("somewhere"))


def test_split_refuses_a_soft_cap_that_bends_logprobs_by_a_tenth_of_a_nat() -> None:
    model = tiny("Gemma2", final_logit_softcapping=30.0, initializer_range=0.25)
    probe = torch.arange(30)[None]
    with torch.no_grad():
        plain = model.base_model(input_ids=probe).last_hidden_state @ model.lm_head.weight.T
        bent = torch.log_softmax(model(input_ids=probe).logits, dim=-1)
    assert float((torch.log_softmax(plain, dim=-1) - bent).abs().max()) > 0.1
    with pytest.raises(ModelError):
        split_head(model, Path("somewhere"))


def test_split_refuses_a_model_that_scales_its_logits() -> None:
    with pytest.raises(ModelError, match="not the LM head applied"):
        split_head(tiny("Granite", logits_scaling=4.0), Path("somewhere"))


def test_split_refuses_a_head_with_a_bias() -> None:
    model = tiny("Llama", tie_word_embeddings=False)
    model.lm_head = nn.Linear(32, 64, bias=True)
    with pytest.raises(ModelError, match="plain linear"):
        split_head(model, Path("somewhere"))


@pytest.mark.parametrize("chunk_tokens", CHUNKS)
def test_the_tail_and_its_gradient_are_those_outside_the_marked_ids(chunk_tokens: int) -> None:
    hidden, weight = problem()
    ids = torch.stack([torch.tensor([3, 5, 3, 7, 5])] * NUM_TOKENS)  # some stand twice
    within = torch.tensor([True, False, False, True, True]).expand_as(ids)
    outside = [v for v in range(VOCAB) if v not in (3, 5, 7)]
    mine, theirs = hidden.clone().requires_grad_(), hidden.double().requires_grad_()
    view = support_view(mine, weight, ids, within_TK=within, chunk_tokens=chunk_tokens)
    exact = torch.log_softmax(theirs @ weight.double().T, dim=1)[:, outside].logsumexp(dim=1)
    assert largest_error(view.tail_T.detach(), exact.detach()) <= 1e-5
    weights = torch.linspace(-1, 1, NUM_TOKENS)
    (view.tail_T @ weights).backward()
    (exact @ weights.double()).backward()
    assert mine.grad is not None
    assert theirs.grad is not None
    assert largest_error(mine.grad, theirs.grad) <= 1e-5


def test_a_support_that_holds_the_whole_vocabulary_has_no_tail_and_a_finite_gradient() -> None:
    hidden, weight = problem()
    hidden.requires_grad_()
    everything = torch.arange(VOCAB).expand(NUM_TOKENS, VOCAB)
    view = support_view(hidden, weight, everything, within_TK=torch.ones_like(everything).bool())
    assert bool(view.tail_T.isneginf().all())
    (view.logprobs_TK.sum() + view.tail_T.clamp(min=-80).sum()).backward()
    assert hidden.grad is not None
    assert bool(hidden.grad.isfinite().all())
