"""DeepSpeed training of a tiny model against a plain loop: dense logits, AdamW, one sequence at a
time, on one process."""

import json
import math
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from torch import Tensor

from opdcache.disk import disk
from opdcache.identity import tokenizer_files
from opdcache.runfolder import RunFolder
from opdcache.schemas.config import RunConfig
from opdcache.schemas.rounds import TrainRound
from opdcache.schemas.training import Layout
from opdcache.store import codec
from opdcache.store.cache import Cache
from opdcache.store.scores import Scores, TopK
from opdcache.train.samples import RoundSamples

from .conftest import EOS_ID, TINY_VOCAB, make_tiny_model
from .handmade import STEP, Row, commit_rollouts, commit_scores, rounds

pytestmark = [
    pytest.mark.engine,
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.timeout(2700),  # the first test trains every run of the file
]

K = 4
LENGTHS = (7, 12, 0, 3, 1, 9, 2, 5, 10)
PROMPTS = (5, 1, 3)
"""Tokens of the prompts, which the completions have in turn."""
ANSWERS = ("12", "343", "5")
IMITATED = {"support": "sampled", "direction": "forward", "normalisation": "none"}
MIXED = {"sft_weight": 0.3, "outcome": "learner_process:right", "outcome_weight": 0.7}
BATCH, EPOCHS, ROUNDS = 4, 1, 2
LR, BETAS, EPS, DECAY, CLIP = 3e-3, (0.8, 0.9), 1e-3, 0.05, 0.5
ROOMY, TIGHT = 4096, 20
"""Padded tokens a micro-batch: an update in one micro-batch, or in several."""


@dataclass(frozen=True)
class Sample:
    """A completion and the teacher's K likeliest entries of its tokens; exact in every dtype."""

    row: Row
    ids_TK: np.ndarray
    logprobs_TK: np.ndarray
    tail_T: np.ndarray


def made_samples() -> list[Sample]:
    rng = np.random.default_rng(1)
    prompts = [rng.integers(256, size=size).tolist() for size in PROMPTS]
    made = []
    for i, length in enumerate(LENGTHS):
        row = Row(
            prompt=prompts[i % len(prompts)],
            completion=rng.integers(TINY_VOCAB, size=length).tolist(),
            sampling_T=np.full(length, -2, np.float32),
            recorded_ids_TS=np.zeros((length, 0), np.int32),
            text=ANSWERS[i % 3] if i % 2 else "wrong",
            answer=ANSWERS[i % 3],
        )
        ids = [rng.permutation(TINY_VOCAB)[:K] for _ in range(length)]
        levels = np.sort(rng.integers(200, 620, size=(length, K)), axis=1).astype(np.uint16)
        logprobs = codec.decode_logprobs(levels, STEP)
        tail = np.log1p(-np.minimum(np.exp(logprobs).sum(axis=1), 0.99))
        made.append(
            Sample(
                row,
                np.array(ids, np.int32).reshape(length, K),
                logprobs,
                tail.astype(np.float16).astype(np.float32),
            )
        )
    return made


SAMPLES = made_samples()


def write_rounds(
    cache_url: str,
    runs: Sequence[Path],
    samples: Sequence[Sample] = SAMPLES,
    unscored: Sequence[Path] = (),
) -> None:
    """Commit the samples as two shards, and pin them to both rounds of every run; of those that are
    not scored without a score set."""
    cache = Cache(cache_url)
    shards, served = [], []
    for number, part in enumerate((samples[:4], samples[4:])):
        shard = commit_rollouts(cache, [s.row for s in part], name=f"shard-{number}")
        lengths = [len(s.row.completion) for s in part]
        topk = TopK(
            ids=np.concatenate([s.ids_TK for s in part]),
            logprobs=np.concatenate([s.logprobs_TK for s in part]),
            num_kept=np.full(sum(lengths), K, np.uint16),
            tail_logprobs=np.concatenate([s.tail_T for s in part]),
        )
        scores = Scores(np.cumsum([0, *lengths]).astype(np.int64), topk=topk)
        shards.append(shard)
        served.append([commit_scores(cache, shard, scores, ("topk",))])
    for run in runs:
        for round_index in range(ROUNDS):
            pinned = [() for _ in served] if run in unscored else served
            for file in rounds(shards, pinned, round_index):
                RunFolder(run).write(file)


def run_config(name: str, base: Path, student: Path, **train: object) -> dict[str, Any]:
    """A run's configuration with the hyperparameters of the plain loop."""
    lr, more = train.pop("lr", LR), train.pop("more_loss", {})
    assert isinstance(more, dict)
    return {
        "seed": 5,
        "rounds": ROUNDS,
        "cache": str(base / "cache"),
        "output": str(base / name),
        "student": {"model": str(student)},
        "teacher": {"model": str(student)},
        "prompts": {"source": {"type": "jsonl", "path": "none"}},
        "rollout": {"student_topk": 0},
        "score": {"k": K, "columns": ["topk"]},
        "train": {
            "loss": {
                "support": "teacher_topk",
                "direction": "forward",
                "normalisation": "tail",
                "k": K,
                **more,
            },
            "optimizer": {
                "lr": lr,
                "betas": list(BETAS),
                "eps": EPS,
                "weight_decay": DECAY,
                "schedule": "linear",
                "max_grad_norm": CLIP,
            },
            "batch_samples": BATCH,
            "epochs": EPOCHS,
            "micro_batch_tokens": ROOMY,
            "dtype": "float32",
            "zero_stage": 1,
            "head_chunk_tokens": 5,
            **train,
        },
    }


def imitating(name: str, base: Path, student: Path, **train: object) -> dict[str, Any]:
    """A run that imitates the samples, and scores nothing."""
    config = run_config(name, base, student, more_loss=IMITATED, **train)
    return config | {"rollouts": {"from": "elsewhere"}, "score": {"columns": []}}


def carry_out(
    folder: Path,
    name: str,
    jobs: Sequence[dict[str, Any]],
    *,
    ranks: int = 1,
    limit_s: float = 780,
    on_cpu: bool = True,
) -> None:
    """Run jobs in one process, or in one a rank under torchrun."""
    listed = folder / f"{name}.json"
    listed.write_text(json.dumps(list(jobs)))
    script = str(Path(__file__).with_name("learner_process.py"))
    launcher = [sys.executable]
    if ranks > 1:
        launcher += ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
    environment = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE")}
    environment["OMP_NUM_THREADS"] = "1"
    if on_cpu:
        environment |= {"DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        [*launcher, script, str(listed), str(limit_s)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=limit_s + 30,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]


def job(
    config: dict[str, Any],
    round_index: int = 0,
    stop_after: int | None = None,
    stop_rank: int | None = None,
    poisoned: Sequence[int] = (),
    fails: Sequence[str] | None = None,
) -> dict[str, Any]:
    return {
        "config": config,
        "round": round_index,
        "stop_after": stop_after,
        "stop_rank": stop_rank,
        "poisoned": list(poisoned),
        "fails": fails,
    }


def load(folder: Path, dtype: torch.dtype = torch.float32) -> torch.nn.Module:
    from transformers import AutoModelForCausalLM

    model: torch.nn.Module = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    return model


def weights(folder: Path) -> dict[str, Tensor]:
    return {name: p.detach().double() for name, p in load(folder).named_parameters()}


def exact_bytes(folder: Path) -> dict[str, Tensor]:
    from safetensors.torch import load_file

    return dict(load_file(folder / "model.safetensors"))


def forward_kl(log_p: Tensor, ids: list[int], log_q: Tensor, tail_q: Tensor) -> Tensor:
    """KL(q || p) of one token; whatever is not among the ids is one bucket."""
    rest = [v for v in range(len(log_p)) if v not in ids]
    inside = sum((q.exp() * (q - log_p[v]) for v, q in zip(ids, log_q, strict=True)), tail_q * 0)
    return inside + tail_q.exp() * (tail_q - torch.logsumexp(log_p[rest], dim=0))


@dataclass(frozen=True)
class Plain:
    """What the plain loop does: weights after each round, and what it sees at each update."""

    start: dict[str, Tensor]
    rounds: list[dict[str, Tensor]]
    losses: list[float]
    norms: list[float]
    lrs: list[float]


Weigh = Callable[[Sequence[float]], Sequence[float]]
"""How much each token of a completion counts, of the values of its losses."""


def all_alike(losses: Sequence[float]) -> Sequence[float]:
    return [1.0 for _ in losses]


CHOSEN = {"max_supervised": [4], "half_life": 3.0, "fraction": 0.4, "mean": "sequences"}


def as_chosen(losses: Sequence[float]) -> Sequence[float]:
    """What CHOSEN says: of the first four tokens the two fifths with the largest loss, a mean of
    them with weights that are halved every three tokens."""
    first = list(losses[:4])
    ranked = sorted(range(len(first)), key=lambda t: -first[t])[: math.ceil(0.4 * len(first))]
    decayed = [0.5 ** (t / 3) if t in ranked else 0.0 for t in range(len(losses))]
    return [weight / sum(decayed) for weight in decayed]


def plain_loop(
    student: Path,
    order: Sequence[Sequence[int]],
    weigh: Weigh = all_alike,
    count: Callable[[int], int] = lambda num_tokens: num_tokens,
    limit: Callable[[int], int | None] = lambda update: None,
    mixed: bool = False,
    of_tokens: Callable[..., Iterator[Tensor]] | None = None,
) -> Plain:
    """Train with dense logits, a sequence at a time; the optimizer goes on across rounds.

    Args:
        count: what a completion of so many tokens adds to the denominator.
        limit: how many tokens of a completion an update of the run looks at.
        mixed: add what MIXED says.
        of_tokens: the loss of every token; the teacher's by default.
    """
    model = load(student)
    parameters = list(model.parameters())
    optimizer = torch.optim.AdamW(parameters, lr=LR, betas=BETAS, eps=EPS, weight_decay=DECAY)
    per_round = -(-len(SAMPLES) * EPOCHS // BATCH)
    made = Plain(weights(student), [], [], [], [])
    for listed in order:
        for update in range(per_round):
            batch = [SAMPLES[i] for i in listed[update * BATCH : (update + 1) * BATCH]]
            most = limit(len(made.losses))
            whole = sum(count(len(s.row.completion[:most])) for s in batch)
            optimizer.zero_grad()
            terms = []
            for sample in batch:
                pull = 0.7 * advantage(sample) if mixed else 0.0
                losses = list((of_tokens or token_losses)(model, sample, pull))[:most]
                weights_ = weigh([float(loss.detach()) for loss in losses])
                terms += [w * loss for w, loss in zip(weights_, losses, strict=True)]
            loss = sum(terms[1:], terms[0]) / whole
            if mixed:
                loss = loss + 0.3 * imitation(model, student, batch)
            loss.backward()
            norm = torch.nn.utils.clip_grad_norm_(parameters, CLIP)
            lr = LR * (1 - len(made.losses) / (per_round * ROUNDS))
            optimizer.param_groups[0]["lr"] = lr
            optimizer.step()
            made.losses.append(float(loss.detach()))
            made.norms.append(float(norm))
            made.lrs.append(lr)
        made.rounds.append({n: p.detach().double().clone() for n, p in model.named_parameters()})
    return made


def advantage(sample: Sample) -> float:
    """How much better than the other completions of its prompt a sample answers it."""
    alike = [s.row for s in SAMPLES if s.row.prompt == sample.row.prompt]
    rewards = [float(row.text == row.answer) for row in alike]
    return float(sample.row.text == sample.row.answer) - sum(rewards) / len(rewards)


def imitation(model: torch.nn.Module, student: Path, batch: Sequence[Sample]) -> Tensor:
    """Mean negative log-prob of the tokens of the answers to the batch's prompts, and of EOS."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(student)
    terms = []
    for prompt, answer in {(tuple(s.row.prompt), s.row.answer) for s in batch}:
        ids = [*tokenizer(answer, add_special_tokens=False).input_ids, EOS_ID]
        logits = model(input_ids=torch.tensor([[*prompt, *ids]])).logits[0]
        log_p = torch.log_softmax(logits, dim=1)
        terms += [-log_p[len(prompt) - 1 + t, token] for t, token in enumerate(ids)]
    return torch.stack(terms).mean()


def token_losses(model: torch.nn.Module, sample: Sample, pull: float = 0.0) -> Iterator[Tensor]:
    """The loss of every token, less how much its log-prob is pulled up."""
    prompt, completion = list(sample.row.prompt), list(sample.row.completion)
    if not completion:
        return
    logits = model(input_ids=torch.tensor([prompt + completion])).logits[0]
    log_p = torch.log_softmax(logits, dim=1)
    for t in range(len(completion)):
        here = log_p[len(prompt) - 1 + t]
        kl = forward_kl(
            here,
            sample.ids_TK[t].tolist(),
            torch.from_numpy(sample.logprobs_TK[t]),
            torch.tensor(sample.tail_T[t]),
        )
        yield kl - pull * here[completion[t]]


def cross_entropies(model: torch.nn.Module, sample: Sample, _: float) -> Iterator[Tensor]:
    """The negative log-prob of every token."""
    prompt, completion = list(sample.row.prompt), list(sample.row.completion)
    if completion:
        logits = model(input_ids=torch.tensor([prompt + completion])).logits[0, len(prompt) - 1 :]
        yield from torch.nn.functional.cross_entropy(
            logits[:-1], torch.tensor(completion), reduction="none"
        )


@dataclass(frozen=True)
class Trained:
    """Run folders by name, and the plain loops of the tied and the untied student."""

    base: Path
    plain: dict[str, Plain]
    student: Path

    def weights(self, name: str, round_index: int = 1) -> dict[str, Tensor]:
        return weights(self.base / name / "students" / f"{round_index:03d}")

    def metrics(self, name: str) -> list[dict[str, float]]:
        lines = (self.base / name / "metrics.jsonl").read_text().splitlines()
        return [json.loads(line) for line in lines]


SINGLE = {
    f"{tie}-zero{stage}-{size}": (tie, {"zero_stage": stage, "micro_batch_tokens": budget})
    for tie in ("tied", "untied")
    for stage in (0, 1, 2, 3)
    for size, budget in (("roomy", ROOMY), ("tight", TIGHT))
    if tie == "tied" or size == "tight"
} | {
    "tied-packed-tight": (
        "tied",
        {"zero_stage": 1, "micro_batch_tokens": TIGHT, "packing": True},
    ),
    "tied-compiled-tight": (
        "tied",
        {"zero_stage": 1, "micro_batch_tokens": TIGHT, "compile": True},
    ),
    "tied-compiled-zero3": (
        "tied",
        {"zero_stage": 3, "micro_batch_tokens": TIGHT, "compile": True},
    ),
    "shared-zero1-roomy": ("shared", {"share_prompts": True, "micro_batch_tokens": ROOMY}),
    "shared-zero3-tight": (
        "shared",
        {
            "share_prompts": True,
            "micro_batch_tokens": TIGHT,
            "zero_stage": 3,
            "gradient_checkpointing": True,
        },
    ),
}
DOUBLE = {
    f"double-zero{stage}": {"zero_stage": stage, "micro_batch_tokens": TIGHT}
    for stage in (0, 1, 2, 3)
}
DOUBLE_SHARED = "double-shared"
BF16 = {f"bf16-zero{stage}": {"zero_stage": stage, "dtype": "bfloat16"} for stage in (1, 2, 3)}
ONE_STOPPED = "one-stopped"
OFFLOADED = {
    f"offloaded-zero{stage}": {
        "zero_stage": stage,
        "offload_optimizer": True,
        "micro_batch_tokens": TIGHT,
    }
    for stage in (1, 2, 3)
}
DOUBLE_BF16 = {f"double-{name}": train for name, train in BF16.items()}
BF16_OFFLOADED = {name.replace("bf16", "bf16-offloaded"): train for name, train in BF16.items()}
DOUBLE_OFFLOADED = {f"double-{name}": train for name, train in OFFLOADED.items()}
PLANNED = {
    **{name: train for name, (tie, train) in SINGLE.items() if tie == "tied"},
    **DOUBLE,
    **BF16,
    **DOUBLE_BF16,
    **OFFLOADED,
    **DOUBLE_OFFLOADED,
    **{name: {**train, "offload_optimizer": True} for name, train in BF16_OFFLOADED.items()},
}
STOPPED = {
    "stopped-zero0": {"zero_stage": 0},
    "stopped-zero1": {"zero_stage": 1},
    "stopped-zero3": {"zero_stage": 3},
    "stopped-bf16-zero1": {"zero_stage": 1, "dtype": "bfloat16"},
}
WEIGHTED = ("chosen", "double-chosen")
WIDENED = {"max_supervised": [2, 6], "milestones": [4]}
"""The second round's second update is the first with more tokens."""
SMALL_LR, MANY = 5e-5, 60


@pytest.fixture(scope="module")
def trained(
    tmp_path_factory: pytest.TempPathFactory, tiny_tokenizer_folder: Path, one_thread: None
) -> Trained:
    """Every run of this file: three processes, since torch.distributed starts once in each."""
    base = tmp_path_factory.mktemp("learner")
    students = {
        tie: make_tiny_model(
            base / tie, tiny_tokenizer_folder, seed=1, tie_word_embeddings=tie == "tied"
        )
        for tie in ("tied", "untied")
    }
    students["shared"] = students["tied"]
    configs = {
        name: run_config(name, base, students[tie], **train)
        for name, (tie, train) in SINGLE.items()
    } | {
        name: run_config(name, base, students["tied"], **train)
        for name, train in {
            **{**DOUBLE, **BF16, **DOUBLE_BF16, **STOPPED, **OFFLOADED, **DOUBLE_OFFLOADED},
            **{name: {**t, "offload_optimizer": True} for name, t in BF16_OFFLOADED.items()},
        }.items()
    }
    configs["small-lr"] = run_config(
        "small-lr",
        base,
        students["tied"],
        dtype="bfloat16",
        lr=SMALL_LR,
        epochs=MANY,
        batch_samples=len(SAMPLES),
        checkpoint_every=1000,
    )
    for name in WEIGHTED:
        configs[name] = run_config(
            name, base, students["tied"], tokens=CHOSEN, micro_batch_tokens=TIGHT
        )
    for name, layout in (("mixed", {}), ("double-mixed", {"share_prompts": True})):
        configs[name] = run_config(
            name, base, students["tied"], more_loss=MIXED, micro_batch_tokens=TIGHT, **layout
        )
    configs["imitated"] = imitating("imitated", base, students["tied"], micro_batch_tokens=TIGHT)
    configs["widened"] = run_config("widened", base, students["tied"], tokens=WIDENED)
    configs[DOUBLE_SHARED] = run_config(
        DOUBLE_SHARED, base, students["tied"], share_prompts=True, micro_batch_tokens=TIGHT
    )
    configs[ONE_STOPPED] = run_config(ONE_STOPPED, base, students["tied"], zero_stage=1)
    write_rounds(
        str(base / "cache"), [base / name for name in configs], unscored=[base / "imitated"]
    )
    whole = [job(configs[name]) for name in (*SINGLE, *BF16, "small-lr", "chosen")]
    more = ("widened", "mixed", "imitated")
    whole += [job(configs[name]) for name in (*OFFLOADED, *BF16_OFFLOADED, *more)]
    carry_out(base, "first", [*whole, *(job(configs[name], stop_after=2) for name in STOPPED)])
    goes_on = [job(configs[name], 1) for name in SINGLE if name.endswith("tight")]
    goes_on += [job(configs["widened"], 1, stop_after=1), job(configs["widened"], 1)]
    goes_on += [job(configs[name], 1) for name in BF16]
    carry_out(base, "second", [*goes_on, *(job(configs[name]) for name in STOPPED)])
    names = (*DOUBLE, *DOUBLE_OFFLOADED, "double-chosen", "double-mixed", DOUBLE_SHARED)
    double = [job(configs[name]) for name in names]
    double += [job(configs[name], i) for name in DOUBLE_BF16 for i in range(ROUNDS)]
    double += [job(configs[name], 1) for name in DOUBLE]
    carry_out(base, "double", double, ranks=2)
    config = RunConfig.model_validate_json(json.dumps(configs["tied-zero1-roomy"]))
    folder = RunFolder(base / "tied-zero1-roomy")
    orders = {
        layout: [
            RoundSamples(Cache(config.cache), *_files(folder), K, layout=layout).order(
                config.seed, r, EPOCHS
            )
            for r in range(ROUNDS)
        ]
        for layout in ("padded", "shared")
    }
    plain = {
        tie: plain_loop(path, orders["shared" if tie == "shared" else "padded"])
        for tie, path in students.items()
    }
    plain["chosen"] = plain_loop(students["tied"], orders["padded"], as_chosen, lambda n: n > 0)
    plain["widened"] = plain_loop(
        students["tied"], orders["padded"], limit=lambda update: 2 if update < 4 else 6
    )
    plain["mixed"] = plain_loop(students["tied"], orders["padded"], mixed=True)
    plain["double-mixed"] = plain_loop(students["tied"], orders["shared"], mixed=True)
    plain["imitated"] = plain_loop(students["tied"], orders["padded"], of_tokens=cross_entropies)
    return Trained(base, plain, students["tied"])


def _files(folder: RunFolder) -> Any:
    from opdcache.schemas.rounds import RolloutRound, ScoreRound

    return folder.need(RolloutRound, 0), folder.need(ScoreRound, 0)


def assert_same_weights(ours: dict[str, Tensor], plain: Plain, round_index: int) -> None:
    """Norm-relative: the weights to 1e-5, and what training changed of them to 1e-3."""
    exact = plain.rounds[round_index]
    assert ours.keys() == exact.keys()

    def norm(made: Iterator[Tensor]) -> float:
        return float(torch.cat([x.flatten() for x in made]).norm())

    error = norm(ours[n] - exact[n] for n in exact)
    change = norm(exact[n] - plain.start[n] for n in exact)
    assert change > 1e-3 * norm(iter(exact.values()))
    assert error <= 1e-5 * norm(iter(exact.values()))
    assert error <= 1e-3 * change


@pytest.mark.parametrize("name", SINGLE)
def test_updates_are_those_of_a_plain_loop(trained: Trained, name: str) -> None:
    assert_same_weights(trained.weights(name), trained.plain[name.split("-")[0]], 0)


@pytest.mark.parametrize("name", [name for name in SINGLE if name.endswith("tight")])
def test_the_next_round_goes_on_with_the_moments_and_the_schedule(
    trained: Trained, name: str
) -> None:
    assert_same_weights(trained.weights(name, 2), trained.plain[name.split("-")[0]], 1)


@pytest.mark.parametrize("name", WEIGHTED)
def test_tokens_count_as_the_run_file_says(trained: Trained, name: str) -> None:
    assert_same_weights(trained.weights(name), trained.plain["chosen"], 0)


@pytest.mark.parametrize("name", ["mixed", "double-mixed"])
def test_answers_are_imitated_and_outcomes_rewarded_beside_the_teachers_loss(
    trained: Trained, name: str
) -> None:
    assert_same_weights(trained.weights(name), trained.plain[name], 0)
    logged = trained.metrics(name)
    assert [row["objective"] for row in logged] == pytest.approx(trained.plain[name].losses[:3])
    assert all(row["sft_loss"] > 0 for row in logged)
    assert len({row["reward"] for row in logged}) > 1


def test_completions_of_another_model_are_imitated_without_a_score(trained: Trained) -> None:
    assert_same_weights(trained.weights("imitated"), trained.plain["imitated"], 0)
    logged = trained.metrics("imitated")
    assert [row["loss"] for row in logged] == pytest.approx(trained.plain["imitated"].losses[:3])
    assert not {"reverse_kl_tail", "overlap", "reverse_kl_sampled"} & set(logged[0])


@pytest.mark.parametrize("round_index", [0, 1])
def test_completions_are_read_further_after_so_many_updates_of_the_run(
    trained: Trained, round_index: int
) -> None:
    made, plain = trained.weights("widened", round_index + 1), trained.plain["widened"]
    assert_same_weights(made, plain, round_index)
    logged = trained.metrics("widened")
    assert [row["loss"] for row in logged] == pytest.approx(plain.losses, rel=1e-4)


@pytest.mark.parametrize("name", [*OFFLOADED, *DOUBLE_OFFLOADED])
def test_an_offloaded_optimizer_makes_the_same_updates(trained: Trained, name: str) -> None:
    assert_same_weights(trained.weights(name), trained.plain["tied"], 0)
    norms = [row["grad_norm"] for row in trained.metrics(name)]
    assert norms == pytest.approx(trained.plain["tied"].norms[:3], rel=1e-4)


@pytest.mark.parametrize("name", BF16)
def test_an_offloaded_optimizer_in_bf16_ends_in_the_same_bits(trained: Trained, name: str) -> None:
    other = name.replace("bf16", "bf16-offloaded")
    ours, theirs = (exact_bytes(trained.base / n / "students" / "001") for n in (other, name))
    assert all(torch.equal(ours[tensor], theirs[tensor]) for tensor in theirs)


@pytest.mark.parametrize("name", PLANNED)
def test_a_plan_foresees_what_a_student_and_a_checkpoint_take(trained: Trained, name: str) -> None:
    config = run_config(name, trained.base, trained.student, **PLANNED[name])
    train = RunConfig.model_validate_json(json.dumps(config)).train
    before, after = (
        disk(train, RunFolder(trained.base / run), trained.student, [0]) for run in ("none", name)
    )
    whole = before.student_bytes.value + sum(
        file.stat().st_size for file in tokenizer_files(trained.student)
    )
    assert after.student_bytes.value == pytest.approx(whole, rel=0.05)
    assert after.checkpoint_bytes.value == pytest.approx(before.checkpoint_bytes.value, rel=0.05)


def test_completions_of_a_prompt_are_trained_on_together_on_two_ranks_as_on_one(
    trained: Trained,
) -> None:
    assert_same_weights(trained.weights(DOUBLE_SHARED), trained.plain["shared"], 0)


@pytest.mark.gpu
@pytest.mark.parametrize("zero_stage", [0, 1, 3])
@pytest.mark.parametrize("layout", [{}, {"packing": True}, {"share_prompts": True}], ids=str)
def test_an_accelerator_makes_the_updates_of_a_plain_loop(
    tmp_path: Path, tiny_student: Path, zero_stage: int, layout: dict[str, bool]
) -> None:
    assert torch.accelerator.is_available()
    config = run_config("run", tmp_path, tiny_student, zero_stage=zero_stage, **layout)
    write_rounds(config["cache"], [tmp_path / "run"])
    carry_out(tmp_path, "only", [job(config)], on_cpu=False)
    folder = RunFolder(tmp_path / "run")
    laid: Layout = "shared" if "share_prompts" in layout else "padded"
    samples = RoundSamples(Cache(config["cache"]), *_files(folder), K, layout=laid)
    exact = plain_loop(tiny_student, [samples.order(5, 0, EPOCHS)]).rounds[0]
    assert relative_error(weights(folder.student_path(1)), exact) <= 1e-4


@pytest.mark.gpu
def test_an_accelerator_imitates_as_a_plain_loop_does(tmp_path: Path, tiny_student: Path) -> None:
    assert torch.accelerator.is_available()
    config = imitating("run", tmp_path, tiny_student)
    write_rounds(config["cache"], [tmp_path / "run"], unscored=[tmp_path / "run"])
    carry_out(tmp_path, "only", [job(config)], on_cpu=False)
    folder = RunFolder(tmp_path / "run")
    order = RoundSamples(Cache(config["cache"]), *_files(folder), K).order(5, 0, EPOCHS)
    exact = plain_loop(tiny_student, [order], of_tokens=cross_entropies).rounds[0]
    assert relative_error(weights(folder.student_path(1)), exact) <= 1e-4


def relative_error(ours: dict[str, Tensor], exact: dict[str, Tensor]) -> float:
    """Of all weights as one vector."""
    error, size = (
        torch.cat([x.flatten() for x in made]).norm()
        for made in ((ours[n] - exact[n] for n in exact), exact.values())
    )
    return float(error / size)


@pytest.mark.parametrize("round_index", range(ROUNDS))
@pytest.mark.parametrize("name", DOUBLE)
def test_two_ranks_make_the_updates_of_one(trained: Trained, name: str, round_index: int) -> None:
    made = trained.weights(name, round_index + 1)
    assert_same_weights(made, trained.plain["tied"], round_index)


@pytest.mark.parametrize("name", BF16)
def test_two_ranks_in_bf16_end_within_a_thousandth_of_one_after_both_rounds(
    trained: Trained, name: str
) -> None:
    ours, theirs = (trained.weights(which, ROUNDS) for which in (f"double-{name}", name))
    error, size = (
        torch.cat([x.flatten() for x in made]).norm()
        for made in ((ours[n] - theirs[n] for n in theirs), theirs.values())
    )
    assert float(error / size) <= 1e-3


def test_the_updates_of_this_file_tell_a_token_mean_from_a_mean_of_means(trained: Trained) -> None:
    folder = RunFolder(trained.base / "tied-zero1-tight")
    samples = RoundSamples(Cache(str(trained.base / "cache")), *_files(folder), K)
    first = list(samples.micro_batches(samples.order(5, 0, EPOCHS)[:BATCH], TIGHT))
    counts = [samples.num_tokens(micro) for micro in first]
    assert len(counts) > 1
    assert len(set(counts)) > 1


@pytest.mark.parametrize("name", [*SINGLE, *DOUBLE])
def test_logged_loss_norm_and_learning_rate_are_those_of_the_plain_loop(
    trained: Trained, name: str
) -> None:
    plain = trained.plain[name.split("-")[0] if name in SINGLE else "tied"]
    logged = trained.metrics(name)
    seen = zip(logged, plain.losses, plain.norms, plain.lrs, strict=False)
    assert len(logged) == 3 * (1 + (name in DOUBLE or name.endswith("tight")))
    assert [row["update"] for row in logged] == list(range(len(logged)))
    for row, loss, norm, lr in seen:
        assert row["loss"] == pytest.approx(loss, rel=1e-4)
        assert row["grad_norm"] == pytest.approx(norm, rel=1e-4)
        assert row["lr"] == pytest.approx(lr, rel=1e-9)
    assert min(plain.norms) > CLIP


@pytest.mark.parametrize("name", BF16)
def test_bf16_logs_the_loss_and_the_norm_of_the_plain_loop_within_its_rounding(
    trained: Trained, name: str
) -> None:
    first = trained.metrics(name)[0]
    assert first["loss"] == pytest.approx(trained.plain["tied"].losses[0], rel=0.05)
    assert first["grad_norm"] == pytest.approx(trained.plain["tied"].norms[0], rel=0.1)


def test_bf16_without_zero_is_refused_since_it_would_keep_no_float32_masters(
    tmp_path: Path,
) -> None:
    config = run_config("run", tmp_path, tmp_path, dtype="bfloat16", zero_stage=0)
    with pytest.raises(ValidationError, match="zero_stage"):
        RunConfig.model_validate(config)


@pytest.mark.parametrize("name", BF16)
def test_bf16_training_ends_near_the_plain_loop(trained: Trained, name: str) -> None:
    assert_near(trained, name)


def assert_near(trained: Trained, name: str) -> None:
    """Training changed the weights as the plain loop did, within what bf16 loses."""
    plain, ours = trained.plain["tied"], trained.weights(name)
    start, exact = (
        torch.cat([made[n].flatten() for n in plain.start])
        for made in (plain.start, plain.rounds[0])
    )
    moved = torch.cat([ours[n].flatten() for n in plain.start])
    assert float((moved - exact).norm()) <= 0.5 * float((exact - start).norm())


def test_bf16_training_keeps_updates_that_bf16_weights_would_lose(trained: Trained) -> None:
    """Each update is less than half a spacing of the weights looked at; together they move them."""
    start = exact_bytes(trained.student)
    ours = exact_bytes(trained.base / "small-lr" / "students" / "001")
    moved = looked_at = 0
    for name, before in start.items():
        assert ours[name].dtype == torch.bfloat16
        rounded = before.bfloat16().float()
        large = (rounded.abs() >= 0.25) & (rounded.abs() < 0.5)
        half_spacing = 2.0**-2 * 2.0**-7 / 2
        assert half_spacing > 4 * SMALL_LR
        looked_at += int(large.sum())
        moved += int((ours[name].float() != rounded)[large].sum())
    assert looked_at > 1000
    assert moved > 0.05 * looked_at


@pytest.mark.parametrize("name", STOPPED)
def test_an_interrupted_and_resumed_round_ends_in_the_same_bits(
    trained: Trained, name: str
) -> None:
    twin = {
        "stopped-zero0": "tied-zero0-roomy",
        "stopped-zero1": "tied-zero1-roomy",
        "stopped-zero3": "tied-zero3-roomy",
        "stopped-bf16-zero1": "bf16-zero1",
    }[name]
    whole, resumed = (exact_bytes(trained.base / n / "students" / "001") for n in (twin, name))
    assert whole.keys() == resumed.keys()
    for tensor in whole:
        assert torch.equal(whole[tensor], resumed[tensor]), tensor


@pytest.mark.parametrize("name", STOPPED)
def test_an_interrupted_and_resumed_round_logs_every_update_once(
    trained: Trained, name: str
) -> None:
    assert [row["update"] for row in trained.metrics(name)] == [0, 1, 2]


def test_a_stop_that_reaches_one_rank_first_stops_all_after_the_same_update(
    trained: Trained,
) -> None:
    config = run_config(ONE_STOPPED, trained.base, trained.student, zero_stage=1)
    jobs = [job(config, stop_after=1, stop_rank=1), job(config)]
    carry_out(trained.base, ONE_STOPPED, jobs, ranks=2, limit_s=300)
    assert [row["update"] for row in trained.metrics(ONE_STOPPED)] == [0, 1, 2]
    assert_same_weights(trained.weights(ONE_STOPPED), trained.plain["tied"], 0)


@pytest.mark.parametrize(
    "name", ["tied-zero1-roomy", "untied-zero3-tight", "double-zero3", "bf16-zero3"]
)
def test_the_exported_folder_loads_with_the_tokenizer_it_started_with(
    trained: Trained, name: str
) -> None:
    from transformers import AutoTokenizer

    folder = trained.base / name / "students" / "001"
    before, after = (AutoTokenizer.from_pretrained(f) for f in (trained.student, folder))
    assert after.get_vocab() == before.get_vocab()
    assert after.chat_template == before.chat_template
    assert (folder / "tokenizer.json").read_bytes() == (
        trained.student / "tokenizer.json"
    ).read_bytes()
    model = load(folder)
    logits = model(input_ids=torch.tensor([[1, 2, 3]])).logits
    assert logits.shape == (1, 3, TINY_VOCAB)
    assert bool(torch.isfinite(logits).all())


@pytest.mark.parametrize("name", ["tied-zero1-roomy", "tied-zero3-roomy", "untied-zero3-tight"])
def test_the_exported_configuration_is_that_of_the_start(trained: Trained, name: str) -> None:
    start = trained.base / name.split("-")[0]
    folder = trained.base / name / "students" / "001"
    before, after = (json.loads((f / "config.json").read_text()) for f in (start, folder))
    assert after == before


def test_what_the_teacher_said_of_masked_tokens_changes_no_update(
    tmp_path: Path, tiny_student: Path
) -> None:
    masks = [np.arange(n) % 3 > 0 if n > 2 else None for n in LENGTHS]
    masked = [
        replace(s, row=replace(s.row, loss_mask=mask))
        for s, mask in zip(SAMPLES, masks, strict=True)
    ]
    changed = [
        replace(
            s, logprobs_TK=np.where(mask[:, None], s.logprobs_TK, s.logprobs_TK[:, ::-1].mean())
        )
        if (mask := s.row.loss_mask) is not None
        else s
        for s in masked
    ]
    jobs = []
    for name, samples in (("masked", masked), ("changed", changed), ("whole", SAMPLES)):
        config = run_config(name, tmp_path, tiny_student) | {"cache": str(tmp_path / f"{name}-c")}
        write_rounds(config["cache"], [tmp_path / name], samples)
        jobs.append(job(config))
    carry_out(tmp_path, "masks", jobs)
    made = {
        name: exact_bytes(tmp_path / name / "students" / "001")
        for name in ("masked", "changed", "whole")
    }
    for name, tensor in made["masked"].items():
        assert torch.equal(tensor, made["changed"][name]), name
    assert any(not torch.equal(t, made["whole"][n]) for n, t in made["masked"].items())
    counted = RunFolder(tmp_path / "masked").need(TrainRound, 0).num_tokens
    assert counted == sum(
        n if m is None else int(m.sum()) for n, m in zip(LENGTHS, masks, strict=True)
    )
