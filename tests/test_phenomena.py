"""The experiments' run files, and how their answers are judged."""

from pathlib import Path
from typing import Any

import pytest

from benchmarks.phenomena import common, new_knowledge, reverse, staleness, supports
from opdcache.resolve import load_tokenizer
from opdcache.run_prompts import RunPrompts
from opdcache.runfile import load_run
from opdcache.runfolder import RunFolder
from opdcache.schemas.losses import imitates
from opdcache.schemas.rounds import PromptScores, RolloutRound


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
    return given


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_every_run_file_of_the_experiments_can_be_read(
    tmp_path: Path, tiny_student: Path, asked: list[tuple[Any, ...]], dtype: str
) -> None:
    of = bench(tmp_path, tiny_student, "--dtype", dtype, "--tuning", "8", "--prompts", "2")
    of.asked.direction = "reverse"
    teachers = {"base": of.model, "taught": of.taught, "idle": of.idle}
    name = new_knowledge.arm(of, "A", teachers["taught"], seed=1)
    reverse.preflight(of, teachers)
    named = {Path(word).stem for words in asked for word in words if str(word).endswith(".yaml")}
    assert named == {"taught", "own", "idle", name, "preflight"}
    loaded = {name: load_run(tmp_path / f"{name}.yaml") for name in named}
    imitating = {name for name, one in loaded.items() if imitates(one.train.loss)}
    assert imitating == {"taught", "idle"}
    assert (name, loaded[name].seed) == ("A-reverse-1", 1)
    assert loaded[name].train.loss.direction == "reverse"
    assert {one.cache for one in loaded.values()} == {str(tmp_path / "cache")}
    assert teachers["taught"] == RunFolder(tmp_path / "taught").student_path(1)


@pytest.mark.parametrize("loss", supports.LOSSES)
def test_every_loss_of_the_supports_can_be_trained_on(
    tmp_path: Path, tiny_student: Path, asked: list[tuple[Any, ...]], loss: str
) -> None:
    run = supports.arm(bench(tmp_path, tiny_student, "--tuning", "8"), loss, seed=0)
    train = load_run(tmp_path / f"{run}.yaml").train
    assert train.loss.model_dump(include=set(supports.LOSSES[loss])) == supports.LOSSES[loss]


@pytest.mark.parametrize("loss", staleness.LOSSES)
def test_a_lagged_learner_takes_the_rollouts_of_its_older_policies(
    tmp_path: Path,
    tiny_student: Path,
    asked: list[tuple[Any, ...]],
    monkeypatch: pytest.MonkeyPatch,
    loss: str,
) -> None:
    of = bench(tmp_path, tiny_student, "--tuning", "8", "--rounds", "4")
    given: list[tuple[str, str, int]] = []
    sampled = RolloutRound(round=0, student="s", shards=(), dropped={}, elapsed_s=0)

    def note(self: staleness.Lagged, stage: str, file: Path, index: int) -> None:
        given.append((stage, file.stem, index))
        if stage == "rollout" and file.stem[-2:] in ("-0", "-1", "-2", "-3"):
            RunFolder(of.out / file.stem).write(sampled, anew=True)

    monkeypatch.setattr(staleness.Lagged, "_command", note)
    arm = staleness.Lagged(of, loss, lag=2, seed=7, started=None)  # type: ignore[arg-type]
    arm.train()
    assert [file for stage, file, _ in given if stage == "train"] == [arm.name] * 4
    samplers = [load_run(tmp_path / f"{arm.name}-{i}.yaml") for i in range(4)]
    first = str(tiny_student)
    policies = [Path(one.student.model) for one in samplers]
    assert policies == [Path(first)] * 3 + [RunFolder(tmp_path / arm.name).student_path(1)]
    assert len({one.seed for one in samplers}) == 4
    learner = load_run(tmp_path / f"{arm.name}.yaml")
    assert learner.rollouts is not None
    pinned = RunFolder(Path(learner.rollouts.from_))
    assert [pinned.need(RolloutRound, i).round for i in range(4)] == [0, 1, 2, 3]
    held_out = {
        prompt.messages for prompt in of._prompts(of.asked.evaluated, common.EVALUATION_SEED)
    }
    for one in (*samplers, learner):
        assert not held_out & {prompt.messages for prompt in RunPrompts(one).training.prompts}


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
