"""The experiments' run files, and how their answers are judged."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from benchmarks.phenomena import (
    cold_start,
    common,
    damaged,
    horizon,
    new_knowledge,
    reverse,
    staleness,
    supports,
    truncation,
)
from benchmarks.phenomena.plots import Panel, drawn
from opdcache.identity import key_of
from opdcache.resolve import load_tokenizer
from opdcache.run_prompts import RunPrompts
from opdcache.runfile import load_run
from opdcache.runfolder import RunFolder
from opdcache.schemas.config import RunConfig
from opdcache.schemas.losses import imitates
from opdcache.schemas.manifests import ScoreManifest
from opdcache.schemas.rounds import PromptScores, RolloutRound, ServedColumns, TrainRound
from opdcache.score.teacher import Sequences
from opdcache.store.cache import Cache, as_listed

from . import shards
from .handmade import rounds


def bench(tmp_path: Path, model: Path, *words: str) -> common.Bench:
    parser = common.arguments(new_knowledge.__doc__)
    return common.Bench(parser.parse_args(["--model", str(model), "--out", str(tmp_path), *words]))


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, ...]]:
    """Commands that an experiment gives, which are not carried out."""
    given: list[tuple[Any, ...]] = []

    def note(*words: Any, fine: object = (0,)) -> str:
        given.append(words)
        return '{"shared": []}'

    monkeypatch.setattr(common, "opdcache", note)
    monkeypatch.setattr(reverse, "opdcache", note)
    monkeypatch.setattr(damaged, "opdcache", note)
    return given


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_every_run_file_of_the_experiments_can_be_read(
    tmp_path: Path, tiny_student: Path, asked: list[tuple[Any, ...]], dtype: str
) -> None:
    of = bench(tmp_path, tiny_student, "--dtype", dtype, "--tuning", "8", "--prompts", "2")
    of.asked.direction = "reverse"
    weak = {"base": of.model, "idle": of.idle, "pruned": tmp_path / "pruned"}
    teachers = {**weak, "taught": of.taught}
    name = new_knowledge.arm(of, "A", teachers["taught"], seed=1)
    pairs = reverse.preflight(of, teachers)
    named = {Path(word).stem for words in asked for word in words if str(word).endswith(".yaml")}
    assert named == {"taught", "own", "idle", name, "preflight"}
    loaded = {name: load_run(tmp_path / f"{name}.yaml") for name in named}
    imitating = {name for name, one in loaded.items() if imitates(one.train.loss)}
    assert imitating == {"taught", "idle"}
    first = f"{tmp_path / 'preflight.yaml'}@0"
    told_apart = [words[1:3] for words in asked if words[0] == "compare"]
    assert told_apart == [
        *((first, f"{first}#{name}") for name in ("idle", "pruned", "taught")),
        (f"{first}#idle", f"{first}#taught"),
    ]
    assert list(pairs) == ["base, idle", "base, pruned", "base, taught", "idle, taught"]
    first_round = loaded["preflight"]
    assert first_round.teacher.model == str(of.model)
    assert {name: Path(one.model) for name, one in first_round.references.items()} == {
        name: path for name, path in teachers.items() if name != "base"
    }
    assert (name, loaded[name].seed) == ("A-reverse-1", 1)
    assert loaded[name].train.loss.direction == "reverse"
    assert {one.cache for one in loaded.values()} == {str(tmp_path / "cache")}
    assert teachers["taught"] == RunFolder(tmp_path / "taught").student_path(1)


@pytest.mark.parametrize("stages", [(), ("rollout", "score")])
def test_of_a_whole_run_students_stay_and_its_checkpoint_goes(
    tmp_path: Path, tiny_student: Path, monkeypatch: pytest.MonkeyPatch, stages: tuple[str, ...]
) -> None:
    of, folder = bench(tmp_path, tiny_student), RunFolder(tmp_path / "run")
    for kept in (folder.checkpoints, folder.student_path(1)):
        (kept / "part").mkdir(parents=True)
    there: list[bool] = []
    monkeypatch.setattr(
        common, "opdcache", lambda *words: there.append(folder.checkpoints.exists())
    )
    of.run("run", of.config(tiny_student, tiny_student), *stages)
    assert there == [True] * (len(stages) or 1)
    assert folder.checkpoints.exists() == bool(stages)
    assert folder.student_path(1).exists()


def test_a_cold_start_costs_as_many_completions_as_it_saves(
    tmp_path: Path, tiny_student: Path, asked: list[tuple[Any, ...]]
) -> None:
    of = bench(tmp_path, tiny_student, "--tuning", "8", "--prompts", "4", "--rounds", "7")
    (alone,) = cold_start.without(of, tiny_student, seed=1)
    names = cold_start.with_one(of, tiny_student, seed=1)
    without, sampler, sft, then = (load_run(tmp_path / f"{name}.yaml") for name in (alone, *names))

    def completions(run: RunConfig) -> int:
        return run.rounds * run.prompts.per_round * run.rollout.samples_per_prompt

    assert completions(sampler) + completions(then) == completions(without) == 6 * 4
    assert (sampler.student.model, then.student.model) == (
        str(of.taught),
        str(RunFolder(tmp_path / names[1]).student_path(1)),
    )
    assert imitates(sft.train.loss)
    assert sft.train.epochs == 1
    assert sft.rollouts is not None
    assert Path(sft.rollouts.from_) == tmp_path / names[0]


def test_runs_one_after_the_other_share_a_student() -> None:
    def of(**scores: float) -> common.Scores:
        teacher = {None: [prompt_scores("a", scores.pop("teacher"))]}
        return dict(enumerate([prompt_scores("a", score)] for score in scores.values())) | teacher

    joined = cold_start.one_after_another(
        [of(before=0.1, warm=0.4, teacher=1.0), of(warm=0.4, after=0.7, teacher=1.0)]
    )
    assert [joined[i][0].scores[0] for i in (0, 1, 2, None)] == [0.1, 0.4, 0.7, 1.0]
    assert len(joined) == 4
    assert common.compared(joined)[2]["recovery"]["value"] == pytest.approx(0.6 / 0.9)


def test_a_cold_start_is_told_by_the_tokens_that_all_its_runs_trained_on(
    tmp_path: Path, tiny_student: Path, asked: list[tuple[Any, ...]], monkeypatch: Any
) -> None:
    of = bench(tmp_path, tiny_student)
    rollouts = RolloutRound(round=0, student="s", shards=(), dropped={}, elapsed_s=30)
    trained = TrainRound(
        round=0, student="s", num_updates=1, num_samples=1, num_tokens=7, dropped={}, elapsed_s=60
    )
    for name, num_rounds in {"sampler": 0, "sft": 1, "then": 2}.items():
        for index in range(max(1, num_rounds)):
            of.folder(name).write(rollouts.model_copy(update={"round": index}))
            if num_rounds:
                of.folder(name).write(trained.model_copy(update={"round": index}))
    monkeypatch.setattr(
        cold_start,
        "verified",
        lambda out, name: {
            i: [prompt_scores("a", 0.5)] for i in (*range({"sft": 2, "then": 3}[name]), None)
        },
    )
    told = cold_start.told(of, ["sampler", "sft", "then"])
    assert told["tokens"] == [0, 7, 14, 21]
    assert len(told["models"]) == 4 + 1
    assert told["minutes"] == (4 * 30 + 3 * 60) / 60


def test_a_horizon_is_all_that_is_sampled_and_none_of_what_is_held_out(
    tmp_path: Path, tiny_student: Path, asked: list[tuple[Any, ...]]
) -> None:
    run = horizon.arm(bench(tmp_path, tiny_student), 0.25, seed=3)
    loaded = load_run(tmp_path / f"{run}.yaml")
    assert (run, loaded.rollout.sampling.max_tokens) == ("first-25-3", horizon.LENGTH // 4)
    assert loaded.evaluation is not None
    assert loaded.evaluation.sampling.max_tokens == horizon.LENGTH
    assert asked[0][:2] == ("recipes", "damage")
    prompts = RunPrompts(loaded)
    held_out = {prompt.messages for prompt in prompts.held_out.prompts}
    assert held_out
    assert not held_out & {prompt.messages for prompt in prompts.training.prompts}


def scored_round(folder: RunFolder, cache: Cache, k: int, index: int = 0) -> int:
    """Pin a round of three tokens with two prompts of two, and its scores; their bytes."""
    rollouts = cache.rollouts(key_of(shards.rollout_identity()))
    shard = as_listed(rollouts or shards.commit_rollouts(cache), cached=False)
    scores = shards.commit_scores(cache, cache.need_rollouts(shard), "topk", k=k)
    served = ServedColumns(key=scores.key, columns=("topk",))
    for one in rounds([shard], [[served]], index):
        folder.write(one)
    return sum(path.stat().st_size for path in cache_files(cache, scores))


def cache_files(cache: Cache, scores: ScoreManifest) -> list[Path]:
    """The objects of a score set."""
    root = Path(cache.objects.url.removeprefix("file://"))
    found = [path for path in root.rglob("*") if scores.attempt in path.parts and path.is_file()]
    assert len(found) == len(scores.objects)
    return found


def test_bytes_are_those_of_the_score_set_that_serves_a_round(tmp_path: Path) -> None:
    cache = Cache(str(tmp_path / "cache"))
    few, many = RunFolder(tmp_path / "few"), RunFolder(tmp_path / "many")
    sizes = [scored_round(few, cache, 4), scored_round(many, cache, 16)]
    assert sizes[0] < sizes[1]
    assert [
        truncation.bytes_per_token(few, cache, 4),
        truncation.bytes_per_token(many, cache, 16),
    ] == [sizes[0] / 3, sizes[1] / 3]
    with pytest.raises(SystemExit, match="more entries serves it"):
        truncation.bytes_per_token(many, cache, 4)


def test_what_a_horizon_costs_adds_up_over_its_rounds(tmp_path: Path) -> None:
    cache, folder = Cache(str(tmp_path / "cache")), RunFolder(tmp_path / "run")
    sizes = [scored_round(folder, cache, 4, 0), scored_round(folder, cache, 8, 1)]
    updates = [(0, 10, 5), (0, 6, 2), (1, 4, 1)]
    rows = [{"round": r, "num_tokens": n, "tokens_per_s": v} for r, n, v in updates]
    folder.metrics_path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert horizon.costs(folder, cache, 2) == [
        {"bytes": 0, "teacher_tokens": 0, "learner_s": 0},
        {"bytes": sizes[0], "teacher_tokens": 7, "learner_s": 5},
        {"bytes": sum(sizes), "teacher_tokens": 14, "learner_s": 9},
    ]


def test_draws_are_set_against_the_bucket_at_their_bytes() -> None:
    def run(loss: str, size: float, kl: float, seed: int = 0) -> dict[str, Any]:
        measured = dict.fromkeys(truncation.MEASURED, kl)
        return {"seed": seed, "loss": loss, "bytes_per_token": size, **measured}

    tail = "top k and tail"
    runs = [run(tail, 1000, 1.0), run(tail, 10, 3.0), run(tail, 100, 99.0, seed=1)]
    told = truncation.as_large(run("draws", 100, 0.0), runs)
    assert told["forward_kl"] == pytest.approx(2.0)
    assert truncation.as_large(run("draws", 1, 0.0), runs)["forward_kl"] == 3.0
    assert truncation.as_large(run("draws", 100, 0.0, seed=2), runs) == {}


@pytest.mark.parametrize(
    ("loss", "num"), [(loss, num) for loss, (_, nums) in truncation.ARMS.items() for num in nums]
)
def test_every_truncation_is_stored_alone_and_trained_on(
    tmp_path: Path, tiny_student: Path, asked: list[tuple[Any, ...]], loss: str, num: int
) -> None:
    run = truncation.arm(bench(tmp_path, tiny_student), loss, num, seed=0, rollouts="sampled-0")
    loaded = load_run(tmp_path / f"{run}.yaml")
    drawn = loss == "draws"
    assert loaded.score.columns == (("draws",) if drawn else ("topk",))
    assert (loaded.score.draws if drawn else loaded.score.k) == num
    assert loaded.train.loss.k == (num if not drawn else 16)
    assert loaded.train.loss.direction == "forward"
    assert loaded.evaluation is None


def test_a_student_is_compared_with_its_teacher_over_the_whole_vocabulary(
    tiny_student: Path, tiny_teacher: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(truncation, "FULL", 8)
    tokens = [np.arange(3, 9, dtype=np.int32), np.arange(20, 24, dtype=np.int32)]
    held_out = Sequences(tokens, tokens[::-1], np.zeros((10, 0), np.int32))
    same = truncation.against(tiny_student, tiny_student, held_out)
    assert (same["forward_kl"], same["reverse_kl"], same["ece"]) == pytest.approx((0, 0, 0))
    told = truncation.against(tiny_student, tiny_teacher, held_out)
    log_p, log_q = (
        torch.cat([logprobs(model, *pair) for pair in zip(tokens, tokens[::-1], strict=True)])
        for model in (tiny_student, tiny_teacher)
    )
    assert told["forward_kl"] == pytest.approx(float((log_q.exp() * (log_q - log_p)).sum(1).mean()))
    assert told["reverse_kl"] == pytest.approx(float((log_p.exp() * (log_p - log_q)).sum(1).mean()))
    top = log_p.argmax(dim=1, keepdim=True)
    assert told["confidence"] == pytest.approx(float(log_p.gather(1, top).exp().mean()))
    assert told["right"] == pytest.approx(float(log_q.gather(1, top).exp().mean()))
    assert told["full_mass"] == pytest.approx(float(log_q.exp().topk(8).values.sum(1).mean()))


def logprobs(model: Path, prompt: Any, completion: Any) -> torch.Tensor:
    """A plain forward's, [T, V]."""
    ids = torch.tensor([[*prompt, *completion]])
    with torch.no_grad():
        logits = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)(ids).logits[0]
    return torch.log_softmax(logits[len(prompt) - 1 : -1], dim=1)


def test_confidence_is_set_against_what_is_right_within_its_bin() -> None:
    confidence, right = torch.tensor([0.9, 0.9, 0.1, 1.0]), torch.tensor([0.5, 0.9, 0.2, 1.0])
    assert truncation.calibration_error(confidence, right) == pytest.approx((0.4 + 0.1) / 4)


def test_seeds_are_drawn_thin_and_their_mean_thick() -> None:
    runs = [("a", [1, 10], [0.0, 2.0]), ("a", [3, 30], [1.0, None]), ("b", [2], [5.0])]
    (axis,) = drawn([Panel("t", "bytes", runs, logarithmic=True)]).axes
    curves = [(list(line.get_xdata()), list(line.get_ydata())) for line in axis.lines]
    assert curves[1] == ([3], [1.0])
    assert curves[2] == ([2], [0.5])
    assert curves[3] == ([2], [5.0])
    assert (len(curves), axis.get_xscale()) == (4, "log")


@pytest.mark.parametrize("loss", supports.LOSSES)
def test_every_loss_of_the_supports_can_be_trained_on(
    tmp_path: Path, tiny_student: Path, asked: list[tuple[Any, ...]], loss: str
) -> None:
    of = bench(tmp_path, tiny_student, "--tuning", "8")
    of.asked.begin = 2
    run = supports.arm(of, loss, seed=0)
    assert load_run(tmp_path / "begun-0-2.yaml").train.loss.direction == "forward"
    student = load_run(tmp_path / f"{run}.yaml").student.model
    assert student == str(of.folder("begun-0-2").student_path(2))
    train = load_run(tmp_path / f"{run}.yaml").train
    assert train.loss.model_dump(include=set(supports.LOSSES[loss])) == supports.LOSSES[loss]


@pytest.mark.parametrize("num_begun", [0, 1, 3])
@pytest.mark.parametrize("loss", staleness.LOSSES)
def test_a_lagged_learner_takes_the_rollouts_of_its_older_policies(
    tmp_path: Path,
    tiny_student: Path,
    asked: list[tuple[Any, ...]],
    monkeypatch: pytest.MonkeyPatch,
    loss: str,
    num_begun: int,
) -> None:
    of = bench(tmp_path, tiny_student, "--tuning", "8", "--rounds", "4")
    given: list[tuple[str, str, int]] = []
    sampled = RolloutRound(round=0, student="s", shards=(), dropped={}, elapsed_s=0)

    def note(started: object, stage: str, file: Path, index: int) -> None:
        given.append((stage, file.stem, index))
        if stage == "rollout" and file.stem[-2:] in ("-0", "-1", "-2", "-3"):
            RunFolder(of.out / file.stem).write(sampled, anew=True)
        if stage == "train":
            checkpoints = RunFolder(of.out / file.stem).checkpoints
            assert checkpoints.exists() == (index > 0)
            checkpoints.mkdir(parents=True, exist_ok=True)

    monkeypatch.setattr(staleness, "_command", note)
    begun = [tiny_student, *(Path(f"/older/{index}") for index in range(num_begun))]
    arm = staleness.Lagged(of, begun, loss, age=2, seed=7)
    arm.train(None)  # type: ignore[arg-type]
    assert [file for stage, file, _ in given if stage == "train"] == [arm.name] * 4
    assert not arm.folder.checkpoints.exists()
    samplers = [load_run(tmp_path / f"{arm.name}-{i}.yaml") for i in range(4)]
    policies = [Path(one.student.model) for one in samplers]
    before = {0: [0, 0, 0], 1: [0, 0, 1], 3: [1, 2, 3]}[num_begun]
    own = RunFolder(tmp_path / arm.name).student_path(1)
    assert policies == [*(begun[index] for index in before), own]
    ages = [arm.ages(index) for index in range(4)]
    assert ages == {0: [[0], [1], [2], [2]], 1: [[1], [2], [2], [2]], 3: [[2]] * 4}[num_begun]
    assert len({one.seed for one in samplers}) == 4
    learner = load_run(tmp_path / f"{arm.name}.yaml")
    assert learner.student.model == str(begun[-1])
    assert learner.rollouts is not None
    pinned = RunFolder(Path(learner.rollouts.from_))
    assert [pinned.need(RolloutRound, i).round for i in range(4)] == [0, 1, 2, 3]
    held_out = {
        prompt.messages for prompt in of._prompts(of.asked.evaluated, common.EVALUATION_SEED)
    }
    for one in samplers:
        assert not held_out & {prompt.messages for prompt in RunPrompts(one).training.prompts}


def test_a_replaying_learner_samples_less_and_looks_back(
    tmp_path: Path, tiny_student: Path, asked: list[tuple[Any, ...]]
) -> None:
    of = bench(tmp_path, tiny_student, "--tuning", "8", "--rounds", "4", "--prompts", "8")
    of.asked.begin, of.asked.losses = 2, ["teacher_topk, reverse", "sampled"]
    of.asked.lags, of.asked.replays = [4], [1, 3]
    arms = list(staleness.arms(of, seed=7))
    assert [(arm.KIND, arm.loss, arm.age) for arm in arms] == [
        ("lag", "teacher_topk, reverse", 4),
        *(("replayed", "teacher_topk, reverse", age) for age in (1, 0, 3, 0)),
        ("lag", "sampled", 4),
    ]
    assert len({arm.name for arm in arms}) == len(arms)
    arms[3].train(None)  # type: ignore[arg-type]
    assert [list(arms[3].ages(index)) for index in range(4)] == [
        [0],
        [0, 1],
        [0, 1, 2],
        [*range(4)],
    ]
    begun, run = (load_run(tmp_path / f"{name}.yaml") for name in ("begun-7-2", arms[3].name))
    assert run.student.model == str(of.folder("begun-7-2").student_path(2))
    assert (run.train.max_staleness, run.prompts.per_round) == (3, 2)
    assert run.train.loss.direction == "reverse"
    first, own = ([p.messages for p in RunPrompts(one).of_round(0).prompts] for one in (begun, run))
    assert first[:2] != own


def test_an_import_that_was_stopped_is_made_and_other_answers_are_refused(
    tmp_path: Path, tiny_student: Path, asked: list[tuple[Any, ...]]
) -> None:
    for _ in range(2):  # nothing is carried out, so nothing is imported the first time
        assert bench(tmp_path, tiny_student, "--tuning", "8").taught
    assert [words[:2] for words in asked].count(("cache", "import")) == 2
    for more in (("--tuning", "9"), ("--tuning", "8", "--evaluated", "600")):
        with pytest.raises(SystemExit, match="take another --out"):
            assert bench(tmp_path, tiny_student, *more).taught


def prompt_scores(name: str, *scores: float, failed: int = 0) -> PromptScores:
    of = {"prompt_id": name, "task": "t", "num_truncated": 1, "num_failed": failed}
    return PromptScores(scores=scores, **of)


def test_two_curves_are_compared_round_by_round_on_the_same_prompts() -> None:
    def of(*scores: tuple[float, float]) -> common.Scores:
        rounds = {
            i: [prompt_scores(str(n), *two) for n in range(200)] for i, two in enumerate(scores)
        }
        return {**rounds, None: [prompt_scores("0", 1)]}

    base, other = of((1, 0), (1, 1)), of((0, 1), (0, 0))
    assert reverse.apart(base, other) == [{"value": v, "low": v, "high": v} for v in (0, 1)]
    other[1][:120] = base[1][:120]
    (_, last) = reverse.apart(base, other)
    draws = np.random.default_rng(1).binomial(200, 80 / 200, 100_000) / 200
    low, high = np.quantile(draws, [0.025, 0.975])
    assert last == {
        "value": 0.4,
        "low": pytest.approx(low, abs=0.006),
        "high": pytest.approx(high, abs=0.006),
    }
    with pytest.raises(SystemExit, match="not asked the same"):
        reverse.apart(base, {**other, 0: other[0][::-1]})


def test_seeds_are_pooled_by_prompt_and_only_of_the_same_prompts() -> None:
    one = {0: [prompt_scores("a", 0, 1), prompt_scores("b", 1, 1)]}
    other = {0: [prompt_scores("a", 1, 1, failed=2), prompt_scores("b", 0, 0)]}
    (a, b) = common.pooled([one, other])[0]
    assert (a.scores, a.num_truncated, a.num_failed) == ((0, 1, 1, 1), 2, 2)
    assert b.scores == (1, 1, 0, 0)
    with pytest.raises(SystemExit, match="not asked the same"):
        common.pooled([one, {0: other[0][::-1]}])


def test_the_gap_of_every_seed_is_that_to_its_own_teacher_a(
    tmp_path: Path, tiny_student: Path, asked: list[tuple[Any, ...]], monkeypatch: Any
) -> None:
    teachers = {"A-forward-0": 0.5, "B-forward-0": 0.1, "A-forward-1": 1.0, "B-forward-1": 0.1}

    def verified(out: Path, name: str) -> common.Scores:
        after = 0.4 if name[0] == "A" else 0.0
        return {
            index: [prompt_scores("a", score), prompt_scores("b", score)]
            for index, score in ((0, 0.0), (1, after), (None, teachers[name]))
        }

    told: dict[str, Any] = {}
    monkeypatch.setattr(new_knowledge, "verified", verified)
    monkeypatch.setattr(
        new_knowledge, "by_round", lambda out, name: {"rounds": [], "findings": [], "minutes": 1.0}
    )
    monkeypatch.setattr(new_knowledge, "written", lambda bench, name, **of: told.update(of))
    given = f"x --model {tiny_student} --out {tmp_path} --tuning 8 --seeds 0 1"
    monkeypatch.setattr("sys.argv", given.split())
    new_knowledge.main()
    recoveries = [run["models"][1]["recovery"]["value"] for run in told["runs"]]
    assert recoveries == pytest.approx([0.8, 0, 0.4, 0])
    assert told["pooled"]["A"][1]["recovery"]["value"] == pytest.approx(0.4 / 0.75)
    assert [run["own_teacher"]["mean_score"]["value"] for run in told["runs"]] == [0.5, 0.1, 1, 0.1]


def test_no_prompt_that_is_asked_is_among_the_answers(tmp_path: Path, tiny_student: Path) -> None:
    of = bench(tmp_path, tiny_student, "--tuning", "3000", "--evaluated", "100")
    rows = of._answers()
    held_out = {p.messages[0][1] for p in of._prompts(100, common.EVALUATION_SEED)}
    decode = load_tokenizer(tiny_student).decode
    asked = {decode(row["prompt_token_ids"], skip_special_tokens=False) for row in rows}
    assert len(asked) == len(rows) > 1000
    assert not asked & held_out
    assert all(text.startswith("State the final answer") for text in asked)


@pytest.mark.parametrize(
    ("text", "score"), [(" 15.", 1), ("15", 1), (" -15.", 0), (" 150.", 0), (" 3 15", 0), ("", 0)]
)
def test_the_first_whole_number_is_the_answer(text: str, score: float) -> None:
    assert common.right(text, "15") == score


def test_a_metric_is_weighted_by_its_tokens() -> None:
    rows = [{"x": 1.0, "num_tokens": 3}, {"x": None, "num_tokens": 9}, {"x": 5.0, "num_tokens": 1}]
    assert common.weighted(rows, "x") == 2
    assert common.weighted(rows, "y") is None
