"""Traps that other systems for on-policy distillation fell into, a section each."""

import dataclasses
import json
import os
import pickle
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import zarr
from numpy.typing import NDArray
from pydantic import ValidationError

from opdcache.errors import (
    ConfigError,
    EngineError,
    InvalidShard,
    ModelError,
    TokenizerMismatch,
)
from opdcache.importing import import_rollouts
from opdcache.rollout.stage import run as rollout
from opdcache.runfolder import RunContext, open_run
from opdcache.schemas.config import RunConfig
from opdcache.schemas.losses import CELLS, LossConfig, refusal
from opdcache.schemas.rounds import RolloutRound
from opdcache.schemas.teachers import TeacherConfig
from opdcache.score import statistics, vllm_scorer
from opdcache.score.http_scorer import _columns
from opdcache.score.rendering import Rendering
from opdcache.score.stage import plan_shards
from opdcache.score.stage import run as score
from opdcache.score.teacher import Ask, Sequences, Teacher, in_order
from opdcache.score.transformers_scorer import TransformersScorer
from opdcache.score.vllm_scorer import VllmScorer, as_scores
from opdcache.stage import Silent, Worker
from opdcache.store import codec, rollouts
from opdcache.store.cache import Cache, as_listed
from opdcache.store.encoding import ScoreBuilder, encode_scores
from opdcache.store.scores import GROUP, Scores, TopK
from opdcache.train.losses import OnSupport, reverse_kl, token_losses, with_tail
from opdcache.vllm_engine import Logprobs

from . import shards
from .conftest import EOS_ID, TINY_VOCAB, make_tiny_model
from .test_alignment import K as KEPT
from .test_alignment import samples_in

pytestmark = pytest.mark.usefixtures("one_thread")

ENGINE = frozenset({"sampled", "topk"})
K = 40


def ids(*values: int) -> NDArray[np.int32]:
    return np.array(values, np.int32)


@dataclasses.dataclass
class Flat:
    """vLLM's flat log-probs, from (id, log-prob) pairs a position."""

    positions: list[list[tuple[int, float]]]

    def __len__(self) -> int:
        return len(self.positions)

    @property
    def end_indices(self) -> list[int]:
        return np.cumsum([len(p) for p in self.positions]).tolist()

    @property
    def start_indices(self) -> list[int]:
        return [0, *self.end_indices[:-1]]

    @property
    def token_ids(self) -> list[int]:
        return [i for p in self.positions for i, _ in p]

    @property
    def logprobs(self) -> list[float]:
        return [value for p in self.positions for _, value in p]


# Trap 1: alignment. ``test_alignment`` holds transformers and the learner to it.

# Prompt 5, 6; completion 7 (among the two likeliest), EOS (not), 8 (the likeliest).
FLAT = Flat(
    [
        [],
        [(6, -9.0), (1, -0.5), (2, -1.5)],
        [(7, -1.0), (3, -0.75), (7, -1.0)],
        [(EOS_ID, -4.0), (1, -0.25), (2, -2.0)],
        [(8, -0.125), (8, -0.125), (3, -3.0)],
    ]
)
SERVED: list[dict[str, dict[str, Any]] | None] = [
    None,
    {"6": {"logprob": -9.0, "rank": 9}, "1": {"logprob": -0.5, "rank": 1}},
    {"7": {"logprob": -1.0, "rank": 2}, "3": {"logprob": -0.75, "rank": 1}},
    {
        str(EOS_ID): {"logprob": -4.0, "rank": 17},
        "1": {"logprob": -0.25, "rank": 1},
        "2": {"logprob": -2.0, "rank": 2},
    },
    {"8": {"logprob": -0.125, "rank": 1}, "3": {"logprob": -3.0, "rank": 2}},
]


@pytest.mark.parametrize("engine", ["vllm", "http"])
def test_trap_1_index_t_is_token_t_behind_a_first_position_that_holds_none(engine: str) -> None:
    whole = [5, 6, 7, EOS_ID, 8]
    if engine == "vllm":
        read = Logprobs.of(FLAT, whole[2:], start=2)
    else:
        read = _columns(SERVED, whole, 2, 2)
    assert read.sampled.tolist() == [-1.0, -4.0, -0.125]
    topk_ids, topk = read.topk(2)
    assert topk_ids.tolist() == [[3, 7], [1, 2], [8, 3]]  # without the extra entry
    assert topk.tolist() == [[-0.75, -1.0], [-0.25, -2.0], [-0.125, -3.0]]


@pytest.mark.parametrize("shift", [-1, 1])
def test_trap_1_an_answer_that_is_shifted_by_one_is_refused(shift: int) -> None:
    tokens = [7, EOS_ID, 8]
    flat, served = FLAT.positions, SERVED
    moved = Flat(flat[1:] + flat[:1] if shift == -1 else [[], *flat[:-1]])
    with pytest.raises(EngineError):
        Logprobs.of(moved, tokens, start=2)
    with pytest.raises(EngineError):
        _columns(served[1:] + served[:1] if shift == -1 else [None, *served[:-1]], [5, 6, *tokens],
                 2, 2)  # fmt: skip


# No text of these ids tokenises to them again: a lone byte of a longer sign, EOS as text.
ODD = [ids(97, 195, 98), ids(EOS_ID, 97), ids(104, EOS_ID, EOS_ID), ids(255)]
ODD_SEQUENCES = Sequences([ids(104, 105)] * len(ODD), ODD, np.zeros((9, 0), np.int32))


def dense(folder: Path, sequences: Sequences) -> torch.Tensor:
    """Log-probs [T, V] in float64 of every completion token, one sequence at a time."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    rows = []
    for row, prompt in enumerate(sequences.prompts):
        whole = torch.from_numpy(sequences.whole(row).astype(np.int64))
        with torch.no_grad():
            logits = model(input_ids=whole[None]).logits[0].double()
        rows.append(torch.log_softmax(logits, dim=1)[len(prompt) - 1 : -1])
    return torch.cat(rows)


def sampled_of(scores: Scores) -> NDArray[np.float32]:
    assert scores.sampled_logprobs is not None
    return scores.sampled_logprobs


def topk_of(scores: Scores) -> TopK:
    assert scores.topk is not None
    return scores.topk


def assert_ids_are_scored_as_they_are(teacher: Teacher, folder: Path) -> None:
    scores = in_order(teacher.score(ODD_SEQUENCES, Ask(ENGINE, K, 1.0, TINY_VOCAB)))
    exact = dense(folder, ODD_SEQUENCES).numpy()
    assert scores.token_offsets.tolist() == [0, 3, 5, 8, 9]
    expected = exact[np.arange(9), ODD_SEQUENCES.sampled_T]
    assert np.abs(sampled_of(scores) - expected).max() <= 1e-4
    likeliest = np.argsort(-exact, axis=1, kind="stable")
    assert topk_of(scores).ids[:, :5].tolist() == likeliest[:, :5].tolist()


def test_trap_1_stored_ids_are_scored_though_their_text_tokenises_otherwise(
    tiny_teacher: Path, tiny_tokenizer_folder: Path
) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tiny_tokenizer_folder)
    for completion in ODD:
        text = tokenizer.decode(completion, skip_special_tokens=True)
        assert tokenizer(text)["input_ids"] != completion.tolist()
    teacher = TransformersScorer(tiny_teacher, dtype="float32", batch_tokens=64)
    assert_ids_are_scored_as_they_are(teacher, tiny_teacher)


@pytest.mark.engine
def test_trap_1_an_engine_scores_stored_ids_too(engine: VllmScorer, tiny_teacher: Path) -> None:
    assert_ids_are_scored_as_they_are(engine, tiny_teacher)


# Trap 2: what vLLM does unless told.


@pytest.fixture(scope="module")
def engine(tiny_teacher: Path) -> Iterator[VllmScorer]:
    """The tiny teacher; blocks of a KV cache that are short beside its sequences."""
    scorer = VllmScorer(
        tiny_teacher, dtype="float32", k=K, batch_tokens=10_000, arguments={"block_size": 32}
    )
    yield scorer
    scorer.close()


@pytest.mark.engine
def test_trap_2_the_engine_that_scores_keeps_no_prefixes_and_gives_raw_logprobs(
    engine: VllmScorer,
) -> None:
    settings = engine._engine.llm.llm_engine.vllm_config
    assert settings.cache_config.enable_prefix_caching is False
    assert settings.cache_config.block_size == 32
    assert settings.model_config.logprobs_mode == "raw_logprobs"
    assert settings.model_config.max_logprobs == K > 20
    if not torch.accelerator.is_available():
        assert settings.scheduler_config.enable_chunked_prefill is False


@pytest.mark.engine
def test_trap_2_sequences_that_share_blocks_are_scored_as_if_alone(
    engine: VllmScorer, tiny_teacher: Path
) -> None:
    prefix = ids(*((7 * i + 3) % 250 for i in range(100)))
    completions = [np.concatenate([ids(*range(50)), ids(i, EOS_ID)]) for i in (60, 70)]
    completions.append(completions[0])  # the same sequence again
    recorded = np.zeros((156, 0), np.int32)
    together = Sequences([prefix] * 3, completions, recorded)
    ask = Ask(ENGINE, K, 1.0, TINY_VOCAB)
    exact = dense(tiny_teacher, together).numpy()
    expected = exact[np.arange(156), together.sampled_T]
    for _ in range(2):  # the second time everything could come from a cache
        given = in_order(engine.score(together, ask))
        assert np.abs(sampled_of(given) - expected).max() <= 1e-4
        assert topk_of(given).ids.shape == (156, K)


@pytest.mark.engine
def test_trap_2_a_temperature_changes_no_logprob_of_a_prompt_and_seeds_work(
    engine: VllmScorer,
) -> None:
    whole = [104, 105, 97, 98, EOS_ID]
    plain = {"max_tokens": 8, "prompt_logprobs": K, "detokenize": False, "ignore_eos": True}
    cold = plain | {"temperature": 0.1, "top_p": 0.5, "top_k": 3, "seed": 5}
    asked = [plain, cold, cold]
    outputs = engine._engine.generate([whole] * 3, asked)
    read = [Logprobs.of(o.prompt_logprobs, whole[2:], 2) for o in outputs]
    assert np.abs(read[0].logprobs - read[1].logprobs).max() <= 1e-5
    assert read[0].ids.tolist() == read[1].ids.tolist()
    drawn = [tuple(o.outputs[0].token_ids) for o in outputs]
    assert len(drawn[1]) == 8
    assert drawn[1] == drawn[2]


class FakeEngine:
    """Remembers how it was started and asked; the token is among the k likeliest."""

    max_model_len = 100

    def __init__(self, own: dict[str, Any], free: dict[str, Any], place: str) -> None:
        self.own, self.free = own, free
        self.asked: list[dict[str, Any]] = []

    def generate(self, prompts: list[list[int]], parameters: list[dict[str, Any]]) -> list[Any]:
        self.asked += parameters
        return [
            FakeOutput(prompt, one["prompt_logprobs"])
            for prompt, one in zip(prompts, parameters, strict=True)
        ]


class FakeOutput:
    prompt_token_id_logprobs = None

    def __init__(self, prompt: list[int], k: int) -> None:
        likeliest = [(i, -1.0 - i) for i in range(k)]
        self.prompt_logprobs = Flat([[], *([(t, -3.0), *likeliest] for t in prompt[1:])])


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> VllmScorer:
    """A scorer whose engine is none."""
    monkeypatch.setattr(vllm_scorer, "Engine", FakeEngine)
    return VllmScorer(Path("m"), dtype="float32", k=K, batch_tokens=64, arguments={})


def test_trap_2_nothing_is_detokenised_and_no_request_bends_a_distribution(
    fake: VllmScorer,
) -> None:
    list(fake.score(ODD_SEQUENCES, Ask(ENGINE, K, 1.0, TINY_VOCAB)))
    started: Any = fake._engine
    assert started.own["enable_prefix_caching"] is False
    assert started.own["max_logprobs"] == K
    assert started.own["logprobs_mode"] == "raw_logprobs"
    expected = {"max_tokens": 1, "prompt_logprobs": K, "detokenize": False}
    assert started.asked == [expected] * len(ODD)


@pytest.mark.parametrize(
    "argument", ["enable_prefix_caching", "max_logprobs", "logprobs_mode", "dtype", "model"]
)
def test_trap_2_a_run_file_cannot_undo_what_scoring_needs(argument: str) -> None:
    with pytest.raises(ConfigError, match=rf"teacher\.backend\.engine: '{argument}' is not free"):
        VllmScorer(Path("m"), dtype="float32", k=K, batch_tokens=64, arguments={argument: True})


# Trap 3: an engine looks up no ids but the likeliest, unless it says that it does.

SERVER = {"type": "http", "url": "http://t:1", "tokenizer": "t", "budget_tokens": 1}


def run_config(backend: dict[str, Any], **parts: Any) -> RunConfig:
    teacher = {"model": "teacher", "revision": "1", "backend": backend}
    return RunConfig.model_validate(
        {
            "student": {"model": "student"},
            "teacher": teacher,
            "prompts": {"source": {"type": "jsonl", "path": "p"}},
            **parts,
        }
    )


STUDENTS_LOSS = {"train": {"loss": {"support": "student_topk"}}}


@pytest.mark.parametrize("backend", [{"type": "vllm"}, SERVER])
def test_trap_3_the_students_ids_are_refused_of_an_engine_before_anything_starts(
    backend: dict[str, Any],
) -> None:
    with pytest.raises(ValidationError, match="needs the score column student_topk"):
        run_config(backend, **STUDENTS_LOSS)
    with pytest.raises(ValidationError, match="cannot give 'student_topk'"):
        run_config(backend, score={"columns": ["topk", "student_topk"]})
    config = run_config(backend)
    assert config.columns_of(config.teacher) == ENGINE


@pytest.mark.parametrize("backend", [{"type": "vllm", "gathers_ids": True}, {}])
def test_trap_3_the_students_ids_are_accepted_where_they_are_looked_up(
    backend: dict[str, Any],
) -> None:
    config = run_config({"type": "transformers"} | backend, **STUDENTS_LOSS)
    assert "student_topk" in config.columns_of(config.teacher)


def test_trap_3_ids_are_looked_up_from_the_row_that_predicts_the_first_token(
    fake: VllmScorer, monkeypatch: pytest.MonkeyPatch
) -> None:
    recorded = np.arange(27).reshape(9, 3)
    looked_up = dataclasses.replace(ODD_SEQUENCES, recorded_TS=recorded)
    ask = Ask(ENGINE | {"student_topk"}, K, 1.0, TINY_VOCAB)
    with pytest.raises(EngineError):
        list(fake.score(looked_up, ask))
    started: Any = fake._engine
    longest_first = (0, 2, 1, 3)
    for row, one in zip(longest_first, started.asked, strict=True):
        place = slice(*looked_up.offsets[row : row + 2])
        assert one["prompt_logprob_token_ids"].tolist() == recorded[place].tolist()
        assert one["prompt_logprob_start"] == 1  # of a prompt of two tokens, the second
    monkeypatch.setattr(FakeOutput, "prompt_token_id_logprobs", np.full((3, 3), -2, np.float32))
    one = Sequences(looked_up.prompts[:1], ODD[:1], recorded[:3])
    student = in_order(fake.score(one, ask)).student_topk
    assert student is not None
    assert student.logprobs.tolist() == [[-2.0] * 3] * 3
    assert student.tail_logprobs == pytest.approx(np.log(1 - 3 * np.exp(-2)), abs=1e-6)


def test_trap_3_an_engine_that_looks_up_ids_is_asked_for_none_where_none_are_wanted(
    fake: VllmScorer,
) -> None:
    list(fake.score(ODD_SEQUENCES, Ask(ENGINE, K, 1.0, TINY_VOCAB)))
    started: Any = fake._engine
    assert not [one for one in started.asked if "prompt_logprob_token_ids" in one]


# Trap 4: missing is not zero.


@pytest.mark.parametrize(
    "flat",
    [
        None,
        Flat(FLAT.positions[:-1]),
        Flat([*FLAT.positions[:3], [], FLAT.positions[4]]),
        Flat([*FLAT.positions[:3], [(EOS_ID, -4.0)], FLAT.positions[4]]),
        Flat([*FLAT.positions[:2], [], [], []]),
    ],
)
def test_trap_4_a_position_that_vllm_does_not_score_is_an_error(flat: Flat | None) -> None:
    with pytest.raises(EngineError, match="no log-prob"):
        Logprobs.of(flat, [7, EOS_ID, 8], start=2)


@pytest.mark.parametrize(
    "served", [None, SERVED[:-1], [*SERVED[:3], None, SERVED[4]], [*SERVED[:3], {}, SERVED[4]]]
)
def test_trap_4_a_position_that_a_server_does_not_score_is_an_error(served: Any) -> None:
    with pytest.raises(EngineError, match=r"no log-prob|not aligned"):
        _columns(served, [5, 6, 7, EOS_ID, 8], 2, 2)


@pytest.mark.parametrize("given", [None, np.zeros((2, 3), np.float32)])
def test_trap_4_ids_that_an_engine_did_not_look_up_are_an_error(
    fake: VllmScorer, monkeypatch: pytest.MonkeyPatch, given: Any
) -> None:
    monkeypatch.setattr(FakeOutput, "prompt_token_id_logprobs", given)
    sequences = Sequences([ids(1, 2)], [ids(3, 4, 5)], np.zeros((3, 3), np.int32))
    with pytest.raises(EngineError, match="did not look up"):
        list(fake.score(sequences, Ask(ENGINE | {"student_topk"}, K, 1.0, TINY_VOCAB)))


def test_trap_4_a_completion_that_a_teacher_left_out_is_not_stored_as_zeros() -> None:
    scores = shards.some_scores(ENGINE)
    builder = ScoreBuilder(np.asarray([0, 3, 5]), ENGINE, shards.STEP)
    builder.add([0], scores.rows(0, 1))
    with pytest.raises(InvalidShard, match=r"completions have no scores.*rows \[1\]"):
        builder.encode({})


@pytest.mark.parametrize("value", [np.nan, 0.5])
def test_trap_4_what_is_no_logprob_is_not_stored(value: float) -> None:
    with pytest.raises(InvalidShard):
        codec.encode_logprobs(np.asarray([-1.0, value], np.float32), shards.STEP)


@pytest.mark.parametrize("column", ["sampled_logprobs", "entropy"])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_trap_4_what_no_distribution_has_is_not_stored(column: str, value: float) -> None:
    scores = shards.some_scores(frozenset({"sampled", "entropy"}))
    wrong = getattr(scores, column).copy()
    wrong[1] = value
    wrong_scores = dataclasses.replace(scores, **{column: wrong})
    with pytest.raises(InvalidShard, match=f"^{column}: no log-prob or entropy that"):
        encode_scores(wrong_scores, step=shards.STEP, attributes={})
    assert encode_scores(scores, step=shards.STEP, attributes={})


@pytest.mark.parametrize("part", ["topk", "student_topk"])
def test_trap_4_a_tail_that_is_nan_is_not_stored(part: Any) -> None:
    scores = shards.some_scores(frozenset({part}))
    tail = np.full_like(getattr(scores, part).tail_logprobs, np.nan)
    wrong = dataclasses.replace(getattr(scores, part), tail_logprobs=tail)
    with pytest.raises(InvalidShard, match="tail_logprobs: no log-prob"):
        encode_scores(dataclasses.replace(scores, **{part: wrong}), step=shards.STEP, attributes={})


def test_trap_4_a_column_that_a_backend_cannot_give_is_absent() -> None:
    parts = [Logprobs.of(FLAT, [7, EOS_ID, 8], start=2)]
    scores = as_scores(np.asarray([3, 0]), parts, Ask(ENGINE, 2, 1.0, TINY_VOCAB))
    assert scores.columns == ENGINE
    assert scores.entropy is None
    assert scores.student_topk is None


# Trap 5: a truncated reverse KL is won by draining the support.


@pytest.mark.parametrize("support", ["teacher_topk", "student_topk", "overlap"])
@pytest.mark.parametrize("direction", ["reverse", "forward"])
def test_trap_5_a_kl_on_a_support_with_neither_tail_nor_renormalisation_is_refused(
    support: Any, direction: Any
) -> None:
    loss = LossConfig(support=support, direction=direction, normalisation="none")
    assert "only with it" in (refusal(loss) or "")
    assert (support, direction, "none") not in CELLS
    with pytest.raises(ValidationError, match=r"train\.loss: "):
        run_config({"type": "transformers"}, train={"loss": loss.model_dump()})


def test_trap_5_draining_the_support_lowers_the_truncated_sum_and_raises_ours() -> None:
    teacher = torch.tensor([[0.5, 0.3, 0.1, 0.06, 0.04]], dtype=torch.float64)
    kept, truncated, ours = 2, [], []
    for left in (0.8, 0.4, 0.2, 0.1):  # mass of the support; at first the teacher's
        scale = torch.tensor([left / 0.8] * kept + [(1 - left) / 0.2] * 3, dtype=torch.float64)
        p, q = (teacher * scale)[:, :kept], teacher[:, :kept]
        truncated.append(float((p * (p / q).log()).sum()))
        tails = (torch.tensor([1 - mass], dtype=torch.float64).log() for mass in (left, 0.8))
        on = OnSupport(p.log(), q.log(), torch.ones_like(q, dtype=torch.bool), *tails)
        ours.append(float(reverse_kl(with_tail(on))))
        if left < 0.8:
            exact = left * np.log(left / 0.8) + (1 - left) * np.log((1 - left) / 0.2)
            assert ours[-1] == pytest.approx(exact, abs=1e-12)
    assert truncated[0] == pytest.approx(0, abs=1e-12)
    assert ours[0] == pytest.approx(0, abs=1e-12)
    assert all(value < -0.2 for value in truncated[1:])
    assert ours == sorted(ours)
    assert ours[1] > 0.3


# Trap 6: vocabularies of one family are padded to different sizes.

ROWS = [
    {"prompt_token_ids": [104, 105], "completion_token_ids": [97, 98, EOS_ID]},
    {"prompt_token_ids": [7], "completion_token_ids": [9, 200]},
]
PADDED = 320


def padded_model(folder: Path, tokenizer: Path, seed: int) -> Path:
    return make_tiny_model(folder, tokenizer, seed=seed, vocab_size=PADDED)


def opened(
    folder: Path,
    student: Path,
    teacher: Path,
    name: str = "run",
    how: dict[str, Any] | None = None,
    **parts: Any,
) -> RunContext:
    """A run whose rollouts were imported; they are taken."""
    config = {
        "cache": str(folder / "cache"),
        "output": str(folder / name),
        "student": {"model": str(student)},
        "teacher": {"model": str(teacher), "dtype": "float32", **(how or {})},
        "prompts": {"source": {"type": "jsonl", "path": str(folder / "none")}},
        "rollouts": {"from": str(folder / "elsewhere")},
        **parts,
    }
    context = open_run(RunConfig.model_validate(config), Silent(), Worker())
    file = folder / "rows.jsonl"
    if not file.exists():
        file.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
        import_rollouts(context.cache, file, student, folder / "elsewhere", Silent())
    rollout(context, 0)
    return context


@pytest.mark.parametrize("padded", ["teacher", "student"])
def test_trap_6_models_whose_padding_differs_are_scored_on_the_ids_that_both_have(
    tmp_path: Path,
    tiny_student: Path,
    tiny_teacher: Path,
    tiny_tokenizer_folder: Path,
    padded: str,
) -> None:
    models = {"student": tiny_student, "teacher": tiny_teacher}
    models[padded] = padded_model(tmp_path / "padded", tiny_tokenizer_folder, 5)
    context = opened(tmp_path, **models, score={"k": 300})
    (shard,) = score(context, 0).shards
    (manifest,) = context.cache.score_sets(shard.content, shard.teacher)
    assert manifest.identity.num_ids == TINY_VOCAB
    scores = context.cache.open_score_set(shard.content, shard.teacher, shard.served).read()
    sequences = Sequences(
        [np.asarray(row["prompt_token_ids"], np.int32) for row in ROWS],
        [np.asarray(row["completion_token_ids"], np.int32) for row in ROWS],
        np.zeros((5, 0), np.int32),
    )
    exact = dense(models["teacher"], sequences).numpy()
    topk = topk_of(scores)
    assert exact.shape[1] == (PADDED if padded == "teacher" else TINY_VOCAB)
    expected = exact[np.arange(5), sequences.sampled_T]
    assert np.abs(sampled_of(scores) - expected).max() <= 0.01  # as stored
    for t in range(5):
        kept = topk.ids[t, : topk.num_kept[t]]
        assert sorted(kept.tolist()) == list(range(TINY_VOCAB))
        padding = np.exp(exact[t, TINY_VOCAB:]).sum()
        assert np.exp(topk.tail_logprobs[t]) == pytest.approx(padding, rel=0.02, abs=1e-12)
    assert (np.exp(topk.tail_logprobs).min() > 1e-6) == (padded == "teacher")


def test_trap_6_a_recorded_id_that_the_teacher_has_not_holds_no_mass(
    tiny_teacher: Path,
) -> None:
    recorded = np.asarray([[5, PADDED - 1, 9], [TINY_VOCAB, 3, PADDED - 1]], np.int32)
    sequences = Sequences([ids(1, 2)], [ids(3, 4)], recorded)
    ask = Ask(frozenset({"student_topk"}), 4, 1.0, TINY_VOCAB)
    teacher = TransformersScorer(tiny_teacher, dtype="float32", batch_tokens=64)
    given = in_order(teacher.score(sequences, ask)).student_topk
    assert given is not None
    exact = dense(tiny_teacher, sequences).numpy()
    for t, row in enumerate(recorded):
        there = row[row < TINY_VOCAB]
        logprobs = given.logprobs[t]
        assert np.isneginf(logprobs[row >= TINY_VOCAB]).all()
        assert logprobs[row < TINY_VOCAB] == pytest.approx(exact[t, there], abs=1e-4)
        rest = 1 - np.exp(exact[t, there]).sum()
        assert np.exp(given.tail_logprobs[t]) == pytest.approx(rest, abs=1e-5)


@pytest.mark.parametrize("head", ["cpu", "disk"])
def test_a_teacher_is_placed_by_a_device_map_but_for_a_head_that_is_not_in_memory(
    tmp_path: Path, tiny_teacher: Path, head: str
) -> None:
    places = {"model": "cpu", "lm_head": head}
    asked = {"device_map": places, "offload_folder": str(tmp_path / "offloaded")}

    def loaded() -> TransformersScorer:
        return TransformersScorer(tiny_teacher, dtype="float32", batch_tokens=64, arguments=asked)

    if head == "disk":
        with pytest.raises(ModelError, match="the LM head is offloaded; keep lm_head on a device"):
            loaded()
        return
    whole = TransformersScorer(tiny_teacher, dtype="float32", batch_tokens=64)
    ask = Ask(ENGINE, K, 1.0, TINY_VOCAB)
    given, exact = (sampled_of(in_order(t.score(ODD_SEQUENCES, ask))) for t in (loaded(), whole))
    assert given.tolist() == exact.tolist()


def test_trap_6_another_model_does_not_change_which_ids_a_teacher_shares(
    tmp_path: Path, tiny_student: Path, tiny_teacher: Path, tiny_tokenizer_folder: Path
) -> None:
    student, teacher = (
        padded_model(tmp_path / name, tiny_tokenizer_folder, seed)
        for name, seed in (("student", 5), ("teacher", 6))
    )
    alone = opened(tmp_path, student, teacher)
    beside = opened(
        tmp_path,
        student,
        teacher,
        "beside",
        references={"base": {"model": str(tiny_teacher)}, "policy": {"model": "@student"}},
    )
    rollouts = alone.folder.need(RolloutRound, 0).shards
    ours, theirs = (plan_shards(context, rollouts, 0) for context in (alone, beside))
    assert [task.key for task in ours.teachers] == [task.key for task in theirs.teachers]
    assert {task.identity.num_ids for task in theirs.teachers} == {PADDED}
    shared = {name: of[0].identity.num_ids for name, of in theirs.references.items()}
    assert shared == {"base": TINY_VOCAB, "policy": PADDED}


def test_trap_6_an_engines_entries_beyond_the_shared_ids_are_tail() -> None:
    part = Logprobs(ids(7, 300, 7, 2)[None], np.log(np.float32([[0.25, 0.5, 0.25, 0.125]])))
    scores = as_scores(np.asarray([1]), [part], Ask(ENGINE, 3, 1.0, TINY_VOCAB))
    topk = topk_of(scores)
    assert topk.num_kept.tolist() == [2]
    assert topk.ids[0, :2].tolist() == [7, 2]
    assert np.exp(topk.tail_logprobs[0]) == pytest.approx(0.5 + 0.125, abs=1e-6)


def test_trap_6_another_tokenizer_of_the_same_length_is_refused_with_what_differs(
    tmp_path: Path, tiny_student: Path, tiny_tokenizer_folder: Path
) -> None:
    tokenizer = tmp_path / "tokenizer"
    shutil.copytree(tiny_tokenizer_folder, tokenizer)
    content = json.loads((tokenizer / "tokenizer.json").read_text())
    vocabulary = content["model"]["vocab"]
    vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]
    (tokenizer / "tokenizer.json").write_text(json.dumps(content))
    teacher = make_tiny_model(tmp_path / "teacher", tokenizer, seed=3)
    with pytest.raises(TokenizerMismatch, match=r"2 ids differ.*'a' for the student, 'b' for"):
        opened(tmp_path, tiny_student, teacher)


# Trap 7: -inf padding, and log-softmax in bfloat16.


def kl_on(batch: Any, student_TK: torch.Tensor, topk_TK: torch.Tensor, loss: LossConfig) -> Any:
    floor = torch.full((len(topk_TK),), -3.0)
    return token_losses(
        loss, OnSupport(student_TK, topk_TK, batch.kept_TK, floor, batch.tail_T)
    ).sum()


@pytest.mark.parametrize("key", [k for k in sorted(CELLS) if k[0] == "teacher_topk"], ids="-".join)
def test_trap_7_no_padding_reaches_a_loss_as_minus_infinity(tmp_path: Path, key: Any) -> None:
    loss = LossConfig(support=key[0], direction=key[1], normalisation=key[2], k=KEPT)
    batch = samples_in(tmp_path).collate([6, 1, 3, 9])
    assert batch.topk_TK is not None
    assert batch.kept_TK is not None
    assert not bool(batch.kept_TK.all(dim=1).all())
    assert bool(torch.isfinite(batch.topk_TK).all())
    gradients = []
    for padding in (None, -torch.inf):
        topk_TK = batch.topk_TK
        if padding is not None:
            topk_TK = topk_TK.masked_fill(~batch.kept_TK, padding)
        student_TK = torch.full_like(topk_TK, -2.0).requires_grad_()
        kl_on(batch, student_TK, topk_TK, loss).backward()
        assert student_TK.grad is not None
        gradients.append(student_TK.grad)
    assert bool(torch.isfinite(gradients[0]).all())
    assert float(gradients[0][~batch.kept_TK].abs().max()) == 0
    if key[1:] == ("reverse", "tail"):
        assert bool(torch.isnan(gradients[1]).any())  # the trap is a real one


def test_trap_7_a_log_softmax_in_bfloat16_would_not_pass_for_ours() -> None:
    made = torch.Generator().manual_seed(0)
    hidden = torch.randn(50, 32, generator=made).bfloat16()
    weight = torch.randn(1000, 32, generator=made).bfloat16()
    gather = torch.randint(1000, (50, 3), generator=made)
    stats = statistics.teacher_statistics(hidden, weight, gather[:, 0], gather, k=16, mass=1.0)
    exact = torch.log_softmax(hidden.double() @ weight.double().T, dim=1)
    coarse = torch.log_softmax(hidden @ weight.T, dim=1)
    tolerance = 1e-5
    ours = (stats.gathered_TS.double() - exact.gather(1, gather)).abs().max()
    theirs = (coarse.double() - exact).gather(1, gather).abs().max()
    assert float(ours) <= tolerance
    assert float(theirs) > 1000 * tolerance


# Trap 8: what a score key is made of.


def changed_weights(folder: Path, model: Path) -> Path:
    """The model, with one bit of one weight turned."""
    shutil.copytree(model, folder)
    file = folder / "model.safetensors"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    return folder


def keys_of(context: RunContext) -> list[str]:
    shards_ = context.folder.need(RolloutRound, 0).shards
    return list(plan_shards(context, shards_, 0).tasks)


def test_trap_8_what_the_teacher_reads_in_the_place_of_a_prompt_is_part_of_the_key(
    tmp_path: Path, tiny_tokenizer_folder: Path
) -> None:
    cache = Cache(str(tmp_path / "cache"))
    said = rollouts.Completion(
        prompt_id="p",
        sample_index=0,
        prompt_token_ids=[1, 2],
        completion_token_ids=[3],
        behavior_logprobs=-np.ones(1, np.float32),
        sampling_logprobs=-np.ones(1, np.float32),
        topk_ids=np.zeros((1, 0), np.int32),
        topk_logprobs=np.zeros((1, 0), np.float32),
        finish_reason="stop",
        text="",
        task="t",
        answer=None,
        messages=(("user", "hi"),),
    )
    shard = as_listed(
        shards.commit_rollouts(cache, "a", rollouts.rollout_table([said]), 0), cached=False
    )
    teacher = tmp_path / "teacher"
    shutil.copytree(tiny_tokenizer_folder, teacher)

    def key(prompt: dict[str, Any] | None) -> str:
        config = TeacherConfig.model_validate({"model": str(teacher), "prompt": prompt})
        return Rendering(config).key(cache, shard)

    own = (None, {}, {"template": "raw"}, {"system": "Be brief."}, {"context": "Again: {prompt}"})
    keys = [key(prompt) for prompt in own]
    assert len(set(keys)) == len(own)
    assert key({"context": "{prompt}"}) == key({})  # it reads the same ids
    (teacher / "chat_template.jinja").write_text("{{ messages[0]['content'] }}!")
    assert key({}) not in keys
    assert key({"template": "raw"}) == keys[2]


def test_trap_8_whatever_changes_scores_changes_their_key_and_nothing_else_does(
    tmp_path: Path, tiny_student: Path, tiny_teacher: Path
) -> None:
    other = changed_weights(tmp_path / "other", tiny_teacher)
    engine = {"type": "vllm", "engine": {"quantization": "fp8"}}
    gives = {"columns": ["sampled", "topk"]}
    variants: dict[str, tuple[Path, dict[str, Any]]] = {
        "as it is": (tiny_teacher, {"score": gives}),
        "weights": (other, {"score": gives}),
        "dtype": (tiny_teacher, {"score": gives, "how": {"dtype": "bfloat16"}}),
        "arguments": (tiny_teacher, {"score": gives, "how": {"backend": engine}}),
        "k": (tiny_teacher, {"score": gives | {"k": 17}}),
        "mass": (tiny_teacher, {"score": gives | {"mass": 0.9}}),
        "step": (tiny_teacher, {"score": gives | {"step": 1 / 512}}),
        "columns": (tiny_teacher, {"score": {"columns": ["topk"]}}),
        "draws": (tiny_teacher, {"score": gives | {"draws": 3}}),
        "seed of draws": (tiny_teacher, {"score": gives | {"draws": 3, "draw_seed": 1}}),
    }
    keys = {}
    for name, (teacher, parts) in variants.items():
        (keys[name],) = keys_of(
            opened(tmp_path, tiny_student, teacher, name=name.replace(" ", "-"), **parts)
        )
    assert len(set(keys.values())) == len(variants)
    same = {"score": {**gives, "batch_tokens": 7, "compression": "pcodec"}, "seed": 9}
    placed = {"backend": {"type": "vllm", "engine": {"tensor_parallel_size": 8}}}
    for name, parts in {"batches": same, "engine": {"score": gives, "how": placed}}.items():
        assert keys_of(opened(tmp_path, tiny_student, tiny_teacher, name=name, **parts)) == [
            keys["as it is"]
        ]


PLANNED = """
import sys, yaml
from opdcache.runfolder import open_run
from opdcache.schemas.config import RunConfig
from opdcache.schemas.rounds import RolloutRound
from opdcache.score.rendering import Rendering
from opdcache.score.stage import plan_shards
from opdcache.stage import Silent, Worker
context = open_run(RunConfig.model_validate(yaml.safe_load(sys.stdin)), Silent(), Worker())
print(*plan_shards(context, context.folder.need(RolloutRound, 0).shards, 0).tasks)
"""


@pytest.mark.slow
def test_trap_8_keys_are_the_same_in_every_process(
    tmp_path: Path, tiny_student: Path, tiny_teacher: Path
) -> None:
    import yaml

    context = opened(tmp_path, tiny_student, tiny_teacher)
    asked = yaml.safe_dump(context.config.model_dump(mode="json", by_alias=True))
    made = [
        subprocess.run(
            [sys.executable, "-c", PLANNED],
            env={**os.environ, "PYTHONHASHSEED": salt},
            input=asked,
            capture_output=True,
            text=True,
            check=True,
        ).stdout.split()
        for salt in ("1", "4242")
    ]
    assert made == [keys_of(context)] * 2


def test_trap_8_no_object_of_a_shard_needs_unpickling(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = Cache(str(tmp_path))
    manifest = shards.commit_rollouts(cache, "a")
    shards.commit_scores(cache, manifest, "sampled", "topk", "draws", draws=3)

    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("a shard was unpickled")

    for name in ("load", "loads", "Unpickler"):
        monkeypatch.setattr(pickle, name, refuse)
    assert cache.read_rollouts(manifest).num_rows == 2
    (group_path,) = tmp_path.rglob(GROUP)
    group = zarr.open_group(str(group_path), mode="r")
    arrays = dict(group.arrays())
    assert len(arrays) > 5
    for array in arrays.values():
        assert array.dtype.kind in "iuf"
        array[...]
    codecs = json.dumps([array.metadata.to_dict()["codecs"] for array in arrays.values()])
    assert "pickle" not in codecs
    opcodes = (b"\x80\x02", b"\x80\x03", b"\x80\x04\x95", b"\x80\x05\x95")
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert not [path for path in files if path.read_bytes().startswith(opcodes)]
