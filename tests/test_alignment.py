"""Index t is the distribution that predicts completion token t: in scoring, and in training."""

import math
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from opdcache.errors import InvalidShard
from opdcache.evaluation.divergence import _compare
from opdcache.schemas.columns import ScoreColumn
from opdcache.schemas.losses import TokensConfig
from opdcache.schemas.training import Layout
from opdcache.score.teacher import Ask, Sequences, in_order
from opdcache.score.transformers_scorer import TransformersScorer
from opdcache.store.cache import Cache, as_listed, rollout_commit
from opdcache.store.scores import Draws, Scores, StudentTopK, TopK
from opdcache.train.live import loss_weights
from opdcache.train.microbatch import MicroBatch
from opdcache.train.samples import RoundSamples
from opdcache.train.weights import TokenRule

from . import shards
from .conftest import EOS_ID, TINY_VOCAB
from .handmade import Row, commit_rollouts, commit_scores, rounds
from .shards import stored

pytestmark = pytest.mark.usefixtures("one_thread")

K = 5
CPU = torch.device("cpu")


def ids(*values: int) -> NDArray[np.int32]:
    return np.array(values, np.int32)


PROMPTS = [ids(5, 9, 33), ids(7), ids(*range(40, 61)), ids(3, 3), ids(200, 1, 1, 8), ids(66, 67)]
COMPLETIONS = [
    ids(12, 80, 7, 7, 250, EOS_ID),  # ends
    ids(90, 91, 92, 93, 94, 95, 96, 97, 98, 99, 100, 101),  # cut off without EOS
    ids(17),  # one token
    ids(),  # empty
    ids(EOS_ID),  # nothing but EOS
    ids(EOS_ID, 4, EOS_ID, 9),  # EOS inside
]
RECORDED = np.random.default_rng(0).integers(TINY_VOCAB, size=(24, 3))
SEQUENCES = Sequences(PROMPTS, COMPLETIONS, RECORDED)


@pytest.fixture(scope="module")
def oracle(tiny_teacher: Path) -> list[torch.Tensor]:
    """Log-probs after every token of every sequence, one sequence at a time, [L, V] each."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(tiny_teacher, dtype=torch.float32).eval()
    made = []
    for prompt, completion in zip(PROMPTS, COMPLETIONS, strict=True):
        whole = torch.from_numpy(np.concatenate([prompt, completion]).astype(np.int64))
        with torch.no_grad():
            logits = model(input_ids=whole[None]).logits[0]
        made.append(torch.log_softmax(logits.double(), dim=1))
    return made


def predictions(oracle: list[torch.Tensor], shift: int = 0) -> torch.Tensor:
    """[T, V]: of every completion token, the distribution given all that is before it."""
    rows = []
    for prompt, completion, logprobs in zip(PROMPTS, COMPLETIONS, oracle, strict=True):
        rows += [logprobs[len(prompt) + t - 1 + shift] for t in range(len(completion))]
    return torch.stack(rows)


@cache
def scorer(folder: Path, batch_tokens: int) -> TransformersScorer:
    return TransformersScorer(folder, dtype="float32", batch_tokens=batch_tokens)


def score(folder: Path, batch_tokens: int, sequences: Sequences = SEQUENCES) -> Scores:
    ask = Ask(frozenset(ALL), k=K, mass=1.0, num_ids=TINY_VOCAB)
    return in_order(scorer(folder, batch_tokens).score(sequences, ask))


def sampled(scores: Scores) -> NDArray[np.float32]:
    assert scores.sampled_logprobs is not None
    return scores.sampled_logprobs


@pytest.mark.parametrize("batch_tokens", [1, 30, 64, 10_000])
def test_scores_are_those_of_one_sequence_at_a_time(
    tiny_teacher: Path, oracle: list[torch.Tensor], batch_tokens: int
) -> None:
    scores = score(tiny_teacher, batch_tokens)
    exact = predictions(oracle)
    tokens = [int(y) for completion in COMPLETIONS for y in completion]
    assert len(sampled(scores)) == len(tokens) == 24
    assert scores.token_offsets.tolist() == SEQUENCES.offsets.tolist()
    assert scores.topk is not None
    assert scores.entropy is not None
    assert scores.student_topk is not None
    order = exact.sort(dim=1, descending=True)
    assert scores.topk.ids.tolist() == order.indices[:, :K].tolist()
    assert np.abs(scores.topk.logprobs - order.values[:, :K].numpy()).max() <= 1e-5
    for t, y in enumerate(tokens):
        assert abs(sampled(scores)[t] - float(exact[t, y])) <= 1e-5
        assert abs(scores.entropy[t] + float((exact[t].exp() * exact[t]).sum())) <= 5e-5
        tail = float(exact[t, order.indices[t, K:]].exp().sum())
        assert abs(scores.topk.tail_logprobs[t] - math.log(tail)) <= 1e-4
        for j in range(3):
            gathered = float(exact[t, RECORDED[t, j]])
            assert abs(scores.student_topk.logprobs[t, j] - gathered) <= 1e-5


@pytest.mark.parametrize("shift", [-1, 1])
def test_scores_that_were_shifted_by_one_token_would_be_found(
    tiny_teacher: Path, oracle: list[torch.Tensor], shift: int
) -> None:
    tokens = torch.from_numpy(SEQUENCES.sampled_T)
    padded = [torch.cat([o, o[-1:]]) for o in oracle]
    if shift == -1:
        padded = [torch.cat([o[:1], o]) for o in oracle]
    rows = predictions(padded, shift=max(shift, 0))
    shifted = rows.gather(1, tokens[:, None])[:, 0].numpy()
    difference = np.abs(sampled(score(tiny_teacher, 64)) - shifted)
    assert float(np.median(difference)) > 0.1


def test_a_sequence_has_the_same_scores_whatever_stands_beside_it(tiny_teacher: Path) -> None:
    together = sampled(score(tiny_teacher, 10_000))
    start = 0
    for i, completion in enumerate(COMPLETIONS):
        stop = start + len(completion)
        alone = Sequences([PROMPTS[i]], [completion], RECORDED[start:stop])
        own = sampled(score(tiny_teacher, 64, alone))
        assert own.shape == (len(completion),)
        if len(completion):
            assert np.abs(own - together[start:stop]).max() <= 1e-5
        start = stop


def test_the_order_of_the_sequences_is_the_order_of_their_scores(tiny_teacher: Path) -> None:
    back = Sequences(PROMPTS[::-1], COMPLETIONS[::-1], np.zeros((24, 0), np.int64))
    forward, reverse = sampled(score(tiny_teacher, 40)), score(tiny_teacher, 40, back)
    pieces = [sampled(reverse.rows(i, i + 1)) for i in reversed(range(len(COMPLETIONS)))]
    assert np.abs(np.concatenate(pieces) - forward).max() <= 1e-5


def test_draws_belong_to_their_token_whatever_the_batches_are(
    tiny_teacher: Path, oracle: list[torch.Tensor]
) -> None:
    evenly = np.broadcast_to((np.arange(500) + 0.5) / 500, (24, 500)).copy()
    ask = Ask(frozenset({"draws"}), K, 1.0, TINY_VOCAB, uniforms_TN=evenly)
    made = [
        in_order(scorer(tiny_teacher, batch_tokens).score(SEQUENCES, ask)).draws
        for batch_tokens in (1, 40, 10_000)
    ]
    for draws in made:
        assert draws is not None
        assert made[0] is not None
        assert draws.ids.tolist() == made[0].ids.tolist()
        assert draws.counts.tolist() == made[0].counts.tolist()
    assert made[0] is not None
    for t, probs in enumerate(predictions(oracle).exp().numpy()):
        drawn = np.bincount(made[0].ids[t], made[0].counts[t], minlength=TINY_VOCAB)
        assert np.abs(drawn - 500 * probs).max() <= 1.01


def test_a_token_id_beyond_the_teachers_vocabulary_is_refused(tiny_teacher: Path) -> None:
    foreign = Sequences([ids(1)], [ids(3, TINY_VOCAB)], np.zeros((2, 0), np.int64))
    with pytest.raises(InvalidShard, match="vocabulary"):
        score(tiny_teacher, 64, foreign)


# Training samples. Values encode the place that they belong to: sample i, token t.

MOST_TOKENS = 16
S = 4
LENGTHS = ([6, 1, 0, 9, 3], [2, 12, 5], [0, 1, 4, 7])


def place(sample: int, t: int) -> float:
    """A number that names a token of a sample and that every stored dtype holds exactly."""
    return float(sample * MOST_TOKENS + t)


def row_of(sample: int, length: int, siblings: int = 1) -> Row:
    tokens, prompt = np.arange(length), sample // siblings
    return Row(
        prompt=[1000 + prompt] * (1 + prompt % 4) + [prompt],
        completion=(sample * MOST_TOKENS + tokens).astype(np.int32).tolist(),
        sampling_T=np.array([-place(sample, t) - 0.5 for t in tokens], np.float32),
        recorded_ids_TS=np.array(
            [[place(sample, t) * S + j for j in range(S)] for t in tokens], np.int32
        ).reshape(length, S),
    )


def scores_of(samples: list[tuple[int, int]], columns: tuple[ScoreColumn, ...], k: int) -> Scores:
    """Scores of a shard; the teacher's entry j of a token has mass e**-(place / 8 + j)."""
    places = [place(sample, t) for sample, length in samples for t in range(length)]
    entries = np.array([[p / 8 + j for j in range(k)] for p in places], np.float32)
    topk = TopK(
        ids=np.array([[p * k + j for j in range(k)] for p in places], np.int32),
        logprobs=-entries,
        num_kept=np.array([1 + int(p) % k for p in places], np.uint16),
        tail_logprobs=np.array([-p / 2 for p in places], np.float32),
    )
    recorded = np.array([[p / 8 + j / 4 for j in range(S)] for p in places], np.float32)
    drawn = np.array([[p, p + 1, p] for p in places], np.int64).reshape(-1, 3)
    return Scores(
        token_offsets=np.cumsum([0, *(length for _, length in samples)]).astype(np.int64),
        sampled_logprobs=-np.array(places, np.float32) if "sampled" in columns else None,
        entropy=np.array(places, np.float32) if "entropy" in columns else None,
        topk=topk if "topk" in columns else None,
        student_topk=(
            StudentTopK(-recorded, np.array([-p / 4 for p in places], np.float32))
            if "student_topk" in columns
            else None
        ),
        draws=Draws.of(drawn) if "draws" in columns else None,
    )


ALL: tuple[ScoreColumn, ...] = ("sampled", "entropy", "topk", "student_topk")


def samples_in(
    tmp_path: Path,
    k: int = K,
    widths: tuple[int, ...] = (K, K, K),
    layout: Layout = "padded",
    siblings: int = 1,
) -> RoundSamples:
    """A round of three committed shards, their columns spread over two score sets each.

    Args:
        siblings: completions of one prompt, which follow one another.
    """
    store = Cache(str(tmp_path / "cache"))
    shards, served, sample = [], [], 0
    for number, lengths in enumerate(LENGTHS):
        here = [(sample + i, length) for i, length in enumerate(lengths)]
        sample += len(lengths)
        rows = [row_of(*one, siblings) for one in here]
        shard = commit_rollouts(store, rows, name=f"shard-{number}")
        shards.append(shard)
        parts: list[tuple[ScoreColumn, ...]] = [
            ("sampled", "topk"),
            ("entropy", "student_topk", "draws"),
        ]
        served.append(
            [
                commit_scores(store, shard, scores_of(here, columns, widths[number]), columns)
                for columns in parts
            ]
        )
    return RoundSamples(store, *rounds(shards, served), k, layout=layout)


FLAT = [length for lengths in LENGTHS for length in lengths]
FILLED = [i for i, length in enumerate(FLAT) if length]


def tokens_of(samples: list[int]) -> list[tuple[int, int]]:
    return [(i, t) for i in samples for t in range(FLAT[i])]


def present(batch: MicroBatch) -> dict[str, Any]:
    """Columns of the tokens."""
    return {name: getattr(batch, name) for name in MicroBatch.__slots__ if "_T" in name}


def test_the_chosen_hidden_state_has_read_all_before_its_token_and_nothing_more(
    tmp_path: Path,
) -> None:
    samples = [6, 1, 3, 9, 0]
    batch = samples_in(tmp_path).collate(samples)
    expected = tokens_of(samples)
    assert batch.num_tokens == len(expected)
    for n, (i, t) in enumerate(expected):
        row = row_of(i, FLAT[i])
        read = batch.input_ids_BL[int(batch.rows_T[n]), : int(batch.columns_T[n]) + 1].tolist()
        assert read == [*row.prompt, *row.completion[:t]]
        assert int(batch.sampled_T[n]) == row.completion[t]


def test_every_teacher_column_is_that_of_its_token(tmp_path: Path) -> None:
    samples = [6, 1, 3, 9, 0, 11]
    batch = present(samples_in(tmp_path).collate(samples))
    for n, (i, t) in enumerate(tokens_of(samples)):
        p = place(i, t)
        assert float(batch["sampling_T"][n]) == -p - 0.5
        assert float(batch["teacher_sampled_T"][n]) == -p
        assert float(batch["teacher_entropy_T"][n]) == p
        kept = 1 + int(p) % K
        assert batch["kept_TK"][n].tolist() == [j < kept for j in range(K)]
        assert batch["topk_ids_TK"][n, :kept].tolist() == [p * K + j for j in range(kept)]
        assert batch["topk_TK"][n, :kept].tolist() == stored(*(-(p / 8 + j) for j in range(kept)))
        assert float(batch["tail_T"][n]) == -p / 2
        assert batch["recorded_ids_TS"][n].tolist() == [p * S + j for j in range(S)]
        assert batch["recorded_TS"][n].tolist() == stored(*(-(p / 8 + j / 4) for j in range(S)))
        assert float(batch["recorded_tail_T"][n]) == -p / 4
        assert batch["draw_ids_TN"][n].tolist() == [p, p + 1]
        assert batch["draw_counts_TN"][n].tolist() == [2, 1]


@pytest.mark.parametrize("k", [1, 2, 3])
def test_entries_past_the_losses_k_join_the_tail(tmp_path: Path, k: int) -> None:
    samples = [6, 1, 3]
    batch = present(samples_in(tmp_path, k=k).collate(samples))
    assert batch["topk_ids_TK"].shape[1] == k
    assert batch["recorded_ids_TS"].shape[1] == k
    merged = 0
    for n, (i, t) in enumerate(tokens_of(samples)):
        p = place(i, t)
        stored_kept = 1 + int(p) % K
        kept = min(stored_kept, k)
        merged += stored_kept > k
        assert int(batch["kept_TK"][n].sum()) == kept
        assert batch["topk_ids_TK"][n, :kept].tolist() == [p * K + j for j in range(kept)]
        gone = stored(*(-(p / 8 + j) for j in range(kept, stored_kept)))
        tail = math.exp(-p / 2) + sum(map(math.exp, gone))
        assert float(batch["tail_T"][n]) == pytest.approx(math.log(tail), abs=1e-5)
        gone = stored(*(-(p / 8 + j / 4) for j in range(k, S)))
        rest = math.exp(-p / 4) + sum(map(math.exp, gone))
        assert float(batch["recorded_tail_T"][n]) == pytest.approx(math.log(rest), abs=1e-5)
        assert batch["recorded_ids_TS"][n].tolist() == [p * S + j for j in range(k)]
    assert merged > 0


@pytest.mark.parametrize("k", [2, 16])
def test_shards_that_were_scored_with_different_k_stand_in_one_micro_batch(
    tmp_path: Path, k: int
) -> None:
    samples = [6, 1, 9]
    widths = (3, 5, 4)
    batch = samples_in(tmp_path, k=k, widths=widths).collate(samples)
    assert batch.kept_TK is not None
    assert batch.topk_TK is not None
    width_of = {6: 5, 1: 3, 9: 4}
    for n, (i, t) in enumerate(tokens_of(samples)):
        p = place(i, t)
        kept = min(1 + int(p) % width_of[i], k)
        assert int(batch.kept_TK[n].sum()) == kept
        assert batch.topk_TK[n, :kept].tolist() == stored(*(-(p / 8 + j) for j in range(kept)))


def test_a_set_that_holds_more_mass_than_the_run_asks_is_cut_to_it(tmp_path: Path) -> None:
    store, half = Cache(str(tmp_path / "cache")), float(np.log(0.5))
    shard = commit_rollouts(store, [row_of(0, 1)])
    topk = TopK(
        ids=np.asarray([[5, 6, 7]], np.int32),
        logprobs=np.asarray([[half, 2 * half, 3 * half]], np.float32),
        num_kept=np.asarray([3], np.uint16),
        tail_logprobs=np.asarray([3 * half], np.float32),
    )
    scores = Scores(np.asarray([0, 1]), topk=topk)
    pinned = rounds([shard], [[commit_scores(store, shard, scores, ("topk",))]])
    for mass, kept in ((1.0, 3), (0.7, 2), (0.4, 1)):
        batch = RoundSamples(store, *pinned, 3, mass).collate([0])
        assert batch.kept_TK is not None
        assert batch.tail_T is not None
        assert int(batch.kept_TK.sum()) == kept
        assert float(batch.tail_T.exp()) == pytest.approx(0.5 ** min(kept, 3), abs=2e-3)


def test_a_references_columns_are_those_of_their_token(tmp_path: Path) -> None:
    store = Cache(str(tmp_path / "cache"))
    here = [(0, 3), (1, 4)]
    shard = commit_rollouts(store, [row_of(*one) for one in here])
    columns: tuple[ScoreColumn, ...] = ("sampled", "student_topk", "topk")
    scores = scores_of(here, columns, K)
    pinned = rounds([shard], [[commit_scores(store, shard, scores, columns)]])
    named = pinned[1].model_copy(update={"references": {"base": pinned[1].shards}})
    batch = RoundSamples(store, pinned[0], named, 2, reference="base").collate([1, 0])
    assert batch.reference_sampled_T is not None
    assert batch.reference_recorded_TS is not None
    assert batch.recorded_TS is not None
    places = [place(1, t) for t in range(4)] + [place(0, t) for t in range(3)]
    assert batch.reference_sampled_T.tolist() == [-p for p in places]
    assert torch.equal(batch.reference_recorded_TS, batch.recorded_TS)
    assert batch.reference_recorded_TS.shape == (7, 2)
    without = RoundSamples(store, *pinned, 2).collate([1, 0])
    assert (without.reference_sampled_T, without.reference_recorded_TS) == (None, None)


def test_columns_that_are_not_stored_are_none(tmp_path: Path) -> None:
    store = Cache(str(tmp_path / "cache"))
    shard = commit_rollouts(store, [row_of(0, 3), row_of(1, 2)])
    columns: tuple[ScoreColumn, ...] = ("sampled",)
    served = commit_scores(store, shard, scores_of([(0, 3), (1, 2)], columns, K), columns)
    batch = RoundSamples(store, *rounds([shard], [[served]]), K).collate([1, 0])
    absent = {name for name, value in present(batch).items() if value is None}
    assert absent == {
        "teacher_entropy_T",
        "topk_ids_TK",
        "topk_TK",
        "kept_TK",
        "tail_T",
        "recorded_ids_TS",
        "recorded_TS",
        "recorded_tail_T",
        "draw_ids_TN",
        "draw_counts_TN",
        "reference_sampled_T",
        "reference_recorded_TS",
        "advantage_T",
    }
    assert batch.teacher_sampled_T is not None
    expected = [-place(i, t) for i, t in ((1, 0), (1, 1), (0, 0), (0, 1), (0, 2))]
    assert batch.teacher_sampled_T.tolist() == expected


def test_every_epoch_is_another_permutation_of_all_samples(tmp_path: Path) -> None:
    order = samples_in(tmp_path).order(seed=3, round_index=1, epochs=3)
    epochs = [order[i * len(FLAT) : (i + 1) * len(FLAT)] for i in range(3)]
    assert len(order) == 3 * len(FLAT)
    assert all(sorted(epoch) == list(range(len(FLAT))) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 3


def test_the_order_depends_on_the_seed_and_the_round_alone(tmp_path: Path) -> None:
    one = samples_in(tmp_path / "one")
    other = samples_in(tmp_path / "other", k=1, widths=(2, 3, 4))
    made = {(s, r): one.order(s, r, 2) for s in (0, 1) for r in (0, 1)}
    assert other.order(0, 1, 2) == made[0, 1] == one.order(0, 1, 2)
    assert one.order(0, 1, 1) == made[0, 1][: len(FLAT)]
    assert len({tuple(order) for order in made.values()}) == 4


@pytest.mark.parametrize("max_tokens", [1, 13, 20, 40, 1000])
def test_micro_batches_hold_each_sample_with_tokens_once_and_keep_to_the_budget(
    tmp_path: Path, max_tokens: int
) -> None:
    samples = samples_in(tmp_path)
    made = list(samples.micro_batches(range(len(FLAT)), max_tokens))
    assert sorted(i for micro in made for i in micro) == FILLED
    for micro in made:
        padded = samples.collate(micro).input_ids_BL
        assert len(micro) == 1 or padded.numel() <= max_tokens
    assert len(made) == len(FILLED) if max_tokens == 1 else len(made) < len(FILLED)


def test_samples_without_tokens_are_in_no_micro_batch(tmp_path: Path) -> None:
    empty = [i for i, length in enumerate(FLAT) if not length]
    samples = samples_in(tmp_path)
    assert list(samples.micro_batches(empty, 100)) == []
    assert samples.num_tokens(empty) == 0
    assert samples.num_tokens(range(len(FLAT))) == sum(FLAT)


def test_a_rollout_shard_that_was_made_anew_with_other_tokens_is_refused(tmp_path: Path) -> None:
    store = Cache(str(tmp_path / "cache"))
    shard = commit_rollouts(store, [row_of(0, 3)])
    served = commit_scores(store, shard, scores_of([(0, 3)], ALL, K), ALL)
    pinned = rounds([shard], [[served]])
    store.objects.delete(rollout_commit(shard.key))
    anew = commit_rollouts(store, [row_of(1, 3)])
    assert anew.key == shard.key
    assert anew.content != shard.content
    with pytest.raises(InvalidShard, match="generated anew"):
        RoundSamples(store, *pinned, K).collate([0])


def test_a_rollout_shard_that_was_made_anew_with_the_same_tokens_is_used(tmp_path: Path) -> None:
    store = Cache(str(tmp_path / "cache"))
    shard = commit_rollouts(store, [row_of(0, 3)])
    served = commit_scores(store, shard, scores_of([(0, 3)], ALL, K), ALL)
    store.objects.delete(rollout_commit(shard.key))
    assert commit_rollouts(store, [row_of(0, 3)]) == shard
    batch = RoundSamples(store, *rounds([shard], [[served]]), K).collate([0])
    assert batch.sampled_T.tolist() == [0, 1, 2]


# Masks: sample 0 is supervised here and there, sample 1 nowhere, sample 2 is empty.

MASKS = ([True, False, False, True, True, False], [False], [])


def masked_samples(
    tmp_path: Path, masks: tuple[list[bool], ...] = MASKS, **rule: Any
) -> RoundSamples:
    store = Cache(str(tmp_path / "cache"))
    lengths = [(i, len(mask)) for i, mask in enumerate(masks)]
    rows = [
        replace(row_of(i, n), loss_mask=np.array(mask, np.bool_))
        for (i, n), mask in zip(lengths, masks, strict=True)
    ]
    shard = commit_rollouts(store, rows)
    served = commit_scores(store, shard, scores_of(lengths, ALL, K), ALL)
    return RoundSamples(store, *rounds([shard], [[served]]), K, rule=TokenRule(**rule))


def test_a_masked_token_is_fed_and_stands_nowhere_else(tmp_path: Path) -> None:
    batch = masked_samples(tmp_path).collate([0])
    row = row_of(0, 6)
    assert batch.input_ids_BL[0].tolist() == [*row.prompt, *row.completion[:4]]
    assert batch.sampled_T.tolist() == [row.completion[t] for t in (0, 3, 4)]
    assert batch.columns_T.tolist() == [len(row.prompt) - 1 + t for t in (0, 3, 4)]
    assert batch.teacher_sampled_T is not None
    assert batch.teacher_sampled_T.tolist() == [-place(0, t) for t in (0, 3, 4)]
    assert batch.num_tokens == 3
    there = {name: value for name, value in present(batch).items() if value is not None}
    assert {len(value) for name, value in there.items() if name.endswith("_T")} == {3}
    assert {len(value) for name, value in there.items() if name.endswith("_TK")} == {3}


def test_masked_tokens_are_not_counted_and_a_sample_without_others_is_dropped_for_that(
    tmp_path: Path,
) -> None:
    samples = masked_samples(tmp_path)
    assert [samples.num_tokens([i]) for i in range(3)] == [3, 0, 0]
    assert list(samples.micro_batches(range(3), 1000)) == [[0]]
    reasons = [samples.why_dropped(i) for i in range(3)]
    assert reasons == [None, "no supervised token", "empty completion"]


def test_what_is_beyond_the_longest_supervised_length_is_neither_counted_nor_fed(
    tmp_path: Path,
) -> None:
    samples = masked_samples(tmp_path, limit=4)
    batch, row = samples.collate([0]), row_of(0, 6)
    assert batch.sampled_T.tolist() == [row.completion[t] for t in (0, 3)]
    assert batch.input_ids_BL[0].tolist() == [*row.prompt, *row.completion[:3]]
    assert samples.num_tokens([0, 1, 2]) == samples.weight([0, 1, 2]) == 2
    assert masked_samples(tmp_path / "short", limit=1).collate([0]).num_tokens == 1


def test_ids_that_are_left_out_are_fed_and_not_supervised(tmp_path: Path) -> None:
    row = row_of(0, 6)
    samples = masked_samples(tmp_path, left_out=(row.completion[3], row.completion[5]))
    batch = samples.collate([0])
    assert batch.sampled_T.tolist() == [row.completion[t] for t in (0, 4)]
    assert batch.input_ids_BL[0].tolist() == [*row.prompt, *row.completion[:4]]


def test_weights_are_those_of_the_places_in_the_completion(tmp_path: Path) -> None:
    samples = masked_samples(tmp_path, half_life=3.0)
    expected = [0.5 ** (t / 3) for t in (0, 3, 4)]
    assert samples.collate([0]).weights_T.tolist() == pytest.approx(expected)
    assert samples.weight([0, 1, 2]) == pytest.approx(sum(expected))


MANY_MASKS = ([True] * 5, [False, True], [False], [])


def test_by_sequences_every_completion_weighs_the_same(tmp_path: Path) -> None:
    samples = masked_samples(tmp_path, MANY_MASKS, per_sequence=True)
    batch = samples.collate([0, 1])
    config = TokensConfig(mean="sequences")
    weights = loss_weights(config, batch, torch.zeros(6)).tolist()
    assert weights == pytest.approx([0.2] * 5 + [1.0])
    assert samples.weight(range(4)) == 2


@pytest.mark.parametrize("mean", ["tokens", "sequences"])
def test_tokens_of_the_largest_entropy_are_chosen_and_counted(tmp_path: Path, mean: Any) -> None:
    """The hand-made entropy of a token is its place: the last ones are chosen."""
    rule = {"fraction": 0.3, "per_sequence": mean == "sequences"}
    samples = masked_samples(tmp_path, MANY_MASKS, **rule)
    batch = samples.collate([0, 1])
    config = TokensConfig(fraction=0.3, by="entropy", mean=mean)
    weights = loss_weights(config, batch, -batch.columns_T.float()).tolist()
    share = 0.5 if mean == "sequences" else 1.0
    assert weights == pytest.approx([0, 0, 0, share, share, 1])
    assert samples.weight(range(4)) == pytest.approx(sum(weights))


def test_far_down_a_completion_a_short_half_life_still_weighs_it_as_one(tmp_path: Path) -> None:
    masks = ([False] * 4 + [True] * 2,)
    samples = masked_samples(tmp_path, masks, half_life=0.001, per_sequence=True)
    batch = samples.collate([0])
    weights = loss_weights(TokensConfig(mean="sequences"), batch, torch.zeros(2)).tolist()
    assert weights == [1, 0]


def test_a_sample_that_stands_twice_in_an_update_is_trained_twice(tmp_path: Path) -> None:
    samples = masked_samples(tmp_path, MANY_MASKS)
    micro = [i for batch in samples.micro_batches([1, 0, 1, 2], 1000) for i in batch]
    assert sorted(micro) == [0, 1, 1]
    assert samples.num_tokens([1, 0, 1, 2]) == 7


def test_an_evaluation_leaves_masked_tokens_out(tiny_student: Path, tiny_teacher: Path) -> None:
    def compared(supervised: NDArray[np.bool_]) -> torch.Tensor:
        models = [(scorer(folder, 40), SEQUENCES) for folder in (tiny_student, tiny_teacher)]
        parts = _compare(*models, supervised, 40)
        return torch.cat([part.reverse_kl_T for part in parts]).sort().values

    every = compared(np.ones(24, np.bool_))
    mask = np.arange(24) % 3 == 0
    halves = torch.cat([compared(mask), compared(~mask)]).sort().values
    assert len(compared(mask)) == 8
    assert float((halves - every).abs().max()) <= 1e-5
    assert len(compared(np.zeros(24, np.bool_))) == 0


def test_samples_with_a_fault_that_is_to_be_dropped_are_named_with_the_first_that_they_have(
    tmp_path: Path,
) -> None:
    store = Cache(str(tmp_path / "cache"))
    loop = "the same line, said again and again\n" * 30
    said = [("stop", "fine"), ("length", "fine"), ("stop", loop), ("length", loop)]
    table = shards.table(*([1, 2] for _ in said))
    for name, values in zip(("finish_reason", "text"), zip(*said, strict=True), strict=True):
        column = table.column_names.index(name)
        table = table.set_column(column, table.schema.field(name), [list(values)])
    listed = [
        as_listed(shards.commit_rollouts(store, str(i), table.slice(i, 2)), cached=False)
        for i in (0, 2)
    ]
    samples = RoundSamples(store, *rounds(listed, [[], []]), K)
    assert samples.unfit(()) == {}
    assert samples.unfit(["truncated"]) == {1: "truncated", 3: "truncated"}
    assert samples.unfit(["repetitive"]) == {2: "repetitive", 3: "repetitive"}
    both = samples.unfit(["repetitive", "truncated"])
    assert both == {1: "truncated", 2: "repetitive", 3: "truncated"}


def test_columns_that_not_all_shards_have_are_left_out(tmp_path: Path) -> None:
    store = Cache(str(tmp_path / "cache"))
    shards, served = [], []
    for number, columns in enumerate((("sampled", "topk"), ("entropy", "topk"))):
        here = [(2 * number, 3), (2 * number + 1, 2)]
        shard = commit_rollouts(store, [row_of(*one) for one in here], name=f"shard-{number}")
        named: Any = columns
        shards.append(shard)
        served.append([commit_scores(store, shard, scores_of(here, named, K), named)])
    batch = RoundSamples(store, *rounds(shards, served), K).collate([0, 3])
    assert (batch.teacher_sampled_T, batch.teacher_entropy_T) == (None, None)
    assert batch.topk_TK is not None
    assert len(batch.topk_TK) == 5


def test_sizes_are_read_once_and_scores_only_for_what_is_put_together(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    samples = samples_in(tmp_path)
    read: list[int] = []
    decode = samples._read
    monkeypatch.setattr(samples, "_shard", lambda index: read.append(index) or decode(index))
    everything = range(len(FLAT))
    assert samples.num_tokens(everything) == sum(FLAT)
    samples.dealt(everything, 2), samples.weight(everything), samples.longest(everything)
    list(samples.micro_batches(everything, 30))
    assert read == []
    samples.collate(FILLED[:1])
    assert set(read) == {0}
