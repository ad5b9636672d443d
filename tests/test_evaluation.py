"""``opdcache evaluate`` with a verifier, on real engines with tiny models."""

import json
import os
import subprocess
import sys
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from opdcache.documents import read
from opdcache.runfolder import RunFolder
from opdcache.schemas.evaluation import Evaluation, ModelAccuracy
from opdcache.schemas.rounds import HeldOutRound, RolloutShard, TeacherHeldOut
from opdcache.store.cache import Cache

from .conftest import EOS_ID
from .test_package import WITHOUT_ENGINES
from .test_pipeline import opdcache, write_prompts, write_run

pytestmark = pytest.mark.engine

FUNCTION = """
def graded(text, answer):
    share = len(text.encode()) % 4 / 3
    return 1.0 if str(len(text)).endswith(answer) else share
"""
EVALUATION = {"verifier": "users_verifier:graded", "samples_per_prompt": 4}


@pytest.fixture(scope="module")
def evaluated(
    tmp_path_factory: pytest.TempPathFactory, tiny_student: Path, tiny_teacher: Path
) -> Iterator[Path]:
    """A folder with a run of one round, ``first.yaml``, and what evaluating it printed."""
    folder = tmp_path_factory.mktemp("evaluation")
    write_prompts(folder)
    (folder / "users_verifier.py").write_text(FUNCTION)
    before = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = f"{folder}{os.pathsep}{before or ''}"
    run = write_run(folder, "first", tiny_student, tiny_teacher, rounds=1, evaluation=EVALUATION)
    done = opdcache("run", run)
    assert done.returncode == 0, done.stderr
    done = opdcache("evaluate", run, "--json")
    assert done.returncode == 0, done.stderr
    assert "starting vLLM" in done.stderr
    (folder / "printed.json").write_text(done.stdout)
    yield folder
    if before is None:
        del os.environ["PYTHONPATH"]
    else:
        os.environ["PYTHONPATH"] = before


def shards_of(folder: Path, row: ModelAccuracy) -> tuple[RolloutShard, ...]:
    run = RunFolder(folder)
    if row.round is not None:
        return run.need(HeldOutRound, row.round).shards
    answered = read(TeacherHeldOut, run.teacher_path / "held_out.json")
    assert answered is not None
    return answered.shards


def completions(cache: Cache, shards: tuple[RolloutShard, ...]) -> list[dict[str, Any]]:
    return [r for s in shards for r in cache.read_rollouts(cache.need_rollouts(s)).to_pylist()]


def files(folder: Path) -> dict[Path, int]:
    every = (path for path in folder.rglob("*") if path.is_file() and path.suffix != ".pyc")
    return {p: p.stat().st_mtime_ns for p in every if p.name != "file-hashes.json"}


def test_accuracy_is_that_of_a_direct_loop_over_the_stored_completions(evaluated: Path) -> None:
    found = Evaluation.model_validate_json((evaluated / "printed.json").read_text())
    assert found.accuracy is not None
    graded: dict[str, Any] = {}
    exec(FUNCTION, graded)
    assert [row.round for row in found.accuracy.overall] == [0, 1, None]
    means = {}
    for row in found.accuracy.overall:
        by_prompt = defaultdict[str, list[float]](list)
        cut = 0
        for one in completions(
            Cache(str(evaluated / "cache")), shards_of(evaluated / "first", row)
        ):
            by_prompt[one["prompt_id"]].append(graded["graded"](one["text"], one["answer"]))
            cut += (
                len(one["completion_token_ids"]) == 24
                and EOS_ID not in (one["completion_token_ids"])
            )
        assert [len(scores) for scores in by_prompt.values()] == [4] * 4
        means[row.round] = np.mean([np.mean(scores) for scores in by_prompt.values()])
        assert row.mean_score.value == pytest.approx(means[row.round])
        right = [[score == 1 for score in scores] for scores in by_prompt.values()]
        assert row.pass_at[1].value == pytest.approx(np.mean(right))
        assert row.pass_at[4].value == np.mean([any(one) for one in right])
        assert row.num_truncated == cut
        assert row.mean_score.low < row.mean_score.value < row.mean_score.high
    recovery = found.accuracy.overall[1].recovery
    assert recovery is not None
    assert recovery.gap == pytest.approx(means[None] - means[0])
    expected = (means[1] - means[0]) / (means[None] - means[0])
    assert recovery.value == (pytest.approx(expected) if recovery.gap > 0 else None)


def test_the_teacher_s_completions_are_its_own(evaluated: Path, tiny_teacher: Path) -> None:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(tiny_teacher, dtype=torch.float32)
    answered = read(TeacherHeldOut, evaluated / "first" / "teacher" / "held_out.json")
    assert answered is not None
    for row in completions(Cache(str(evaluated / "cache")), answered.shards):
        prompt, completion = row["prompt_token_ids"], row["completion_token_ids"]
        with torch.no_grad():
            logits = model(torch.tensor([prompt + completion])).logits[0].double()
        dense = torch.log_softmax(logits, -1)[len(prompt) - 1 : -1]
        own = dense[torch.arange(len(completion)), torch.tensor(completion)]
        np.testing.assert_allclose(row["behavior_logprobs"], own, atol=2e-4)


def test_a_second_evaluation_makes_nothing_and_says_the_same(evaluated: Path) -> None:
    before = files(evaluated)
    again = opdcache("evaluate", evaluated / "first.yaml", "--json")
    assert again.returncode == 0, again.stderr
    assert again.stdout == (evaluated / "printed.json").read_text()
    assert "vLLM" not in again.stderr
    assert files(evaluated) == before


def test_what_is_kept_is_told_where_no_engine_is_installed(evaluated: Path) -> None:
    command = [sys.executable, "-c", WITHOUT_ENGINES, "evaluate", evaluated / "first.yaml"]
    done = subprocess.run([*command, "--no-divergence"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "reverse KL" not in done.stdout
    rows = [line.split() for line in done.stdout.splitlines()]
    assert [row[0] for row in rows if row and row[0] in ("0", "1", "teacher")] == [
        "0",
        "1",
        "teacher",
    ]
    assert "gap: the teacher is" in done.stdout


def test_another_run_with_the_same_teacher_finds_its_completions(
    evaluated: Path, tiny_student: Path, tiny_teacher: Path
) -> None:
    changes = {"rounds": 1, "evaluation": EVALUATION, "rollout": {"student_topk": 4}}
    loss = {"loss": {"support": "student_topk", "k": 4}}
    other = write_run(evaluated, "other", tiny_student, tiny_teacher, **changes, train=loss)
    assert opdcache("rollout", other, "--round", 0).returncode == 0
    done = opdcache("evaluate", other, "--no-divergence", "--json")
    assert done.returncode == 0, done.stderr
    assert "vLLM" not in done.stderr
    first, again = (
        read(TeacherHeldOut, evaluated / name / "teacher" / "held_out.json")
        for name in ("first", "other")
    )
    assert first is not None
    assert again is not None
    assert all(shard.cached for shard in again.shards)
    assert not any(shard.cached for shard in first.shards)
    assert [s.content for s in again.shards] == [s.content for s in first.shards]
    assert json.loads(done.stdout)["divergence"] is None


def test_a_shard_of_the_teacher_s_that_is_damaged_is_made_anew(evaluated: Path) -> None:
    path = evaluated / "first" / "teacher" / "held_out.json"
    answered = read(TeacherHeldOut, path)
    assert answered is not None
    key = answered.shards[0].key
    (file,) = (evaluated / "cache" / "data" / key[:2] / key).rglob("rollouts.parquet")
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)
    (evaluated / "first" / "teacher" / "accuracy.json").unlink()
    command = ("evaluate", evaluated / "first.yaml", "--no-divergence")
    done = opdcache(*command)
    assert done.returncode == 3
    assert "OPD301" in done.stderr.splitlines()[-1]
    assert Cache(str(evaluated / "cache")).quarantined() == {key}
    done = opdcache(*command)
    assert done.returncode == 0, done.stderr
    assert "starting vLLM" in done.stderr
    assert "teacher" in done.stdout
