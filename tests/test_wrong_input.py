"""Wrong input at the command line: one line, the right exit code, no traceback, nothing lost."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from .conftest import make_tiny_model

pytestmark = pytest.mark.slow


def run_with(folder: Path, command: list[str], **parts: object) -> str:
    """The error line of a command on a run file with the given parts; it must exit 2."""
    (folder / "run.yaml").write_text(yaml.safe_dump(parts))
    done = subprocess.run(
        [sys.executable, "-m", "opdcache.cli.main", command[0], "run.yaml", *command[1:]],
        cwd=folder,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2, done.stderr
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1
    assert "Traceback" not in done.stderr
    return errors[0]


ROLLOUT = ["rollout", "--round", "0"]


@pytest.fixture
def base(tmp_path: Path, tiny_student: Path, tiny_teacher: Path) -> dict[str, object]:
    (tmp_path / "prompts.jsonl").write_text(json.dumps({"prompt": "hello"}) + "\n")
    return {
        "student": {"model": str(tiny_student)},
        "teacher": {"model": str(tiny_teacher)},
        "prompts": {"source": {"type": "jsonl", "path": "prompts.jsonl"}},
    }


def test_an_unknown_key_is_named_with_its_near_match(
    tmp_path: Path, base: dict[str, object]
) -> None:
    error = run_with(tmp_path, ROLLOUT, **base, rollout={"sampels_per_prompt": 4})
    assert "rollout.sampels_per_prompt" in error
    assert "did you mean 'samples_per_prompt'" in error


def test_a_missing_model_is_named(tmp_path: Path, base: dict[str, object]) -> None:
    error = run_with(tmp_path, ROLLOUT, **{**base, "teacher": {"model": "models/teacher/x"}})
    assert str(tmp_path / "models" / "teacher" / "x") in error


def test_a_model_that_the_hub_does_not_give_is_named(
    tmp_path: Path, base: dict[str, object], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    error = run_with(tmp_path, ROLLOUT, **{**base, "teacher": {"model": "nobody/nothing"}})
    assert "nobody/nothing" in error


def test_a_teacher_with_other_token_ids_is_refused_with_what_differs(
    tmp_path: Path, base: dict[str, object], tiny_tokenizer_folder: Path
) -> None:
    tokenizer = tmp_path / "tokenizer"
    shutil.copytree(tiny_tokenizer_folder, tokenizer)
    path = tokenizer / "tokenizer.json"
    content = json.loads(path.read_text())
    vocabulary = content["model"]["vocab"]
    vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]
    path.write_text(json.dumps(content))
    teacher = make_tiny_model(tmp_path / "other-teacher", tokenizer, seed=3)
    error = run_with(tmp_path, ROLLOUT, **{**base, "teacher": {"model": str(teacher)}})
    assert "2 ids differ" in error
    assert "'a' for the student, 'b' for the teacher" in error


def test_an_empty_prompt_file_is_named(tmp_path: Path, base: dict[str, object]) -> None:
    (tmp_path / "prompts.jsonl").write_text("")
    error = run_with(tmp_path, ROLLOUT, **base)
    assert f"{tmp_path / 'prompts.jsonl'}: no prompts" in error


def test_a_malformed_row_is_named_by_file_and_line(tmp_path: Path, base: dict[str, object]) -> None:
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "fine"}\n{"prompt": \n')
    error = run_with(tmp_path, ROLLOUT, **base)
    assert f"{tmp_path / 'prompts.jsonl'}:2: not JSON" in error


def test_a_loss_whose_support_is_not_recorded_is_refused(
    tmp_path: Path, base: dict[str, object]
) -> None:
    error = run_with(
        tmp_path,
        ROLLOUT,
        **base,
        rollout={"student_topk": 0},
        train={"loss": {"support": "student_topk"}},
    )
    assert "set rollout.student_topk to 16 or more" in error


def test_a_round_that_the_run_does_not_have_is_refused(
    tmp_path: Path, base: dict[str, object]
) -> None:
    error = run_with(tmp_path, ["train", "--round", "1"], **base)
    assert "no train stage of round 1" in error


def test_a_run_file_that_changed_since_the_run_began_is_refused(
    tmp_path: Path, base: dict[str, object]
) -> None:
    (tmp_path / "prompts.jsonl").write_text("")
    run_with(tmp_path, ROLLOUT, **base)  # begins the run, and then finds no prompts
    error = run_with(tmp_path, ROLLOUT, **base, seed=1)
    assert "seed changed since this run began (expected 0, got 1)" in error


def test_a_run_folder_that_is_a_file_is_named(tmp_path: Path, base: dict[str, object]) -> None:
    (tmp_path / "run").write_text("")
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(base))
    done = subprocess.run(
        [sys.executable, "-m", "opdcache.cli.main", *ROLLOUT[:1], "run.yaml", *ROLLOUT[1:]],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1
    assert str(tmp_path / "run") in errors[0]
    assert "Traceback" not in done.stderr


def test_an_earlier_stage_that_is_missing_asks_to_try_again(
    tmp_path: Path, base: dict[str, object]
) -> None:
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(base))
    done = subprocess.run(
        [sys.executable, "-m", "opdcache.cli.main", "score", "run.yaml", "--round", "0"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 75
    assert "run 'opdcache rollout RUN.yaml --round 0' first" in done.stderr
