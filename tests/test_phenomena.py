"""The experiments' run files, and how their answers are judged."""

from pathlib import Path
from typing import Any

import pytest

from benchmarks.phenomena import common, new_knowledge, reverse
from opdcache.resolve import load_tokenizer
from opdcache.runfile import load_run
from opdcache.runfolder import RunFolder
from opdcache.schemas.losses import imitates


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
    teachers = {"base": of.model, "taught": of.taught(), "idle": of.idle()}
    new_knowledge.arm(of, "A", teachers["taught"], seed=1)
    reverse.preflight(of, teachers)
    named = {Path(word).stem for words in asked for word in words if str(word).endswith(".yaml")}
    assert named == {"taught", "own", "idle", "A-1", "preflight"}
    loaded = {name: load_run(tmp_path / f"{name}.yaml") for name in named}
    imitating = {name for name, one in loaded.items() if imitates(one.train.loss)}
    assert imitating == {"taught", "idle"}
    assert loaded["A-1"].seed == 1
    assert {one.cache for one in loaded.values()} == {str(tmp_path / "cache")}
    assert teachers["taught"] == RunFolder(tmp_path / "taught").student_path(1)


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
