"""The whole pipeline on its real engines, with tiny models: vLLM, transformers, DeepSpeed."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
import yaml

from benchmarks.audit import dense_diagnostics
from benchmarks.parity import parity
from opdcache.rollout.engine import Draw, Sampler
from opdcache.runfolder import RunFolder
from opdcache.schemas.audit import Audit
from opdcache.schemas.manifests import Sampling
from opdcache.schemas.rounds import (
    EvaluationRound,
    HeldOutRound,
    RolloutRound,
    ScoreRound,
    TrainRound,
)
from opdcache.store.cache import Cache
from opdcache.store.upkeep import verify

from .conftest import EOS_ID

pytestmark = pytest.mark.engine

CONFIG = {
    "rounds": 2,
    "cache": "cache",
    "prompts": {"source": {"type": "jsonl", "path": "prompts.jsonl"}, "per_round": 8},
    "rollout": {
        "samples_per_prompt": 2,
        "sampling": {"max_tokens": 24},
        "student_topk": 8,
        "shard_samples": 8,
        "dtype": "float32",
        "engine": {"max_model_len": 128},
    },
    "score": {"k": 16},
    "train": {
        "loss": {"k": 8},
        "optimizer": {"lr": 1e-3},
        "batch_samples": 4,
        "micro_batch_tokens": 128,
        "dtype": "float32",
        "checkpoint_every": 1,
    },
    "evaluation": {
        "source": {"type": "jsonl", "path": "held-out.jsonl"},
        "sampling": {"max_tokens": 24},
    },
}


def opdcache(*arguments: object) -> subprocess.CompletedProcess[str]:
    """Run a command in a process of its own."""
    command = [sys.executable, "-m", "opdcache.cli.main", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def write_run(folder: Path, name: str, student: Path, teacher: Path, **changes: object) -> Path:
    """A run file; a change replaces a part of CONFIG, key by key."""
    models = {"student": {"model": str(student)}, "teacher": {"model": str(teacher)}}
    config = CONFIG | models
    config["teacher"]["dtype"] = "float32"
    for part, values in changes.items():
        config[part] = config.get(part, {}) | values if isinstance(values, dict) else values
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump(config))
    return path


def write_prompts(folder: Path) -> None:
    for name, count in (("prompts", 12), ("held-out", 4)):
        rows = [{"prompt": f"{name} {i}: {'x' * i}", "answer": str(i)} for i in range(count)]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def weights(folder: Path) -> bytes:
    return (folder / "model.safetensors").read_bytes()


@pytest.fixture(scope="module")
def finished(
    tmp_path_factory: pytest.TempPathFactory, tiny_student: Path, tiny_teacher: Path
) -> Path:
    """A folder with a finished two-round run, ``first.yaml``."""
    folder = tmp_path_factory.mktemp("pipeline")
    write_prompts(folder)
    done = opdcache("run", write_run(folder, "first", tiny_student, tiny_teacher))
    assert done.returncode == 0, done.stderr
    return folder


def test_a_finished_run_has_every_round_file_and_students_that_differ(finished: Path) -> None:
    folder = RunFolder(finished / "first")
    for index in range(2):
        rollouts = folder.need(RolloutRound, index)
        assert sum(s.num_rows for s in rollouts.shards) == 16
        assert sum(s.num_rows for s in folder.need(HeldOutRound, index).shards) == 4
        assert len(folder.need(ScoreRound, index).shards) == len(rollouts.shards)
        trained = folder.need(TrainRound, index)
        assert trained.num_tokens == sum(s.num_tokens for s in rollouts.shards)
        assert trained.num_updates == 4 * (index + 1)
    assert weights(folder.student_path(1)) != weights(folder.student_path(2))


def test_a_second_call_does_nothing_and_says_so(finished: Path) -> None:
    before = {p: p.stat().st_mtime_ns for p in finished.rglob("*") if p.is_file()}
    again = opdcache("run", finished / "first.yaml")
    stage = opdcache("score", finished / "first.yaml", "--round", 1)
    assert again.returncode == stage.returncode == 0
    assert "nothing to do" in again.stderr
    assert "nothing to do" in stage.stderr
    now = {p: p.stat().st_mtime_ns for p in finished.rglob("*") if p.is_file()}
    del (
        before[finished / "first" / "file-hashes.json"],
        now[finished / "first" / "file-hashes.json"],
    )
    assert now == before


def test_no_claim_is_left_and_status_reads_the_run(finished: Path) -> None:
    assert not [p for p in (finished / "cache" / "claims").rglob("*") if p.is_file()]
    shown = opdcache("status", finished / "first.yaml")
    assert shown.returncode == 0
    assert shown.stdout.count("done") == 7
    assert "4/4 updates" in shown.stdout


def test_a_run_that_differs_in_the_loss_reuses_round_0(
    finished: Path, tiny_student: Path, tiny_teacher: Path
) -> None:
    loss = {"loss": {"support": "student_topk", "k": 4, "normalisation": "renormalised"}}
    train = CONFIG["train"] | loss
    other = write_run(finished, "other", tiny_student, tiny_teacher, train=train)
    for stage in ("rollout", "score", "train"):
        done = opdcache(stage, other, "--round", 0)
        assert done.returncode == 0, done.stderr
        assert "vLLM" not in done.stderr
        assert "loading the teacher" not in done.stderr
    folder = RunFolder(finished / "other")
    assert all(shard.cached for shard in folder.need(RolloutRound, 0).shards)
    assert all(shard.cached for shard in folder.need(ScoreRound, 0).shards)
    first = RunFolder(finished / "first")
    assert weights(folder.student_path(1)) != weights(first.student_path(1))


def test_metrics_are_logged_once_an_update_in_both_logs(finished: Path) -> None:
    rows = RunFolder(finished / "first").metrics()
    assert [row["update"] for row in rows] == list(range(8))
    names = {"loss", "reverse_kl_tail", "reverse_kl_sampled", "overlap", "overlap_mass_student"}
    names |= {"overlap_mass_teacher", "entropy_gap", "grad_norm", "tokens_per_s", "ess"}
    assert names <= set(rows[0])
    assert rows[0]["ess"] == pytest.approx(1, abs=1e-4)
    assert list((finished / "first" / "tensorboard").iterdir())


def test_behavior_logprobs_are_the_students_own_in_fp32(finished: Path, tiny_student: Path) -> None:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(tiny_student, dtype=torch.float32)
    folder = RunFolder(finished / "first")
    cache, seen_eos = Cache(str(finished / "cache")), False
    for shard in folder.need(RolloutRound, 0).shards:
        for row in cache.read_rollouts(cache.need_rollouts(shard)).to_pylist():
            prompt, completion = row["prompt_token_ids"], row["completion_token_ids"]
            with torch.no_grad():
                logits = model(torch.tensor([prompt + completion])).logits[0].double()
            dense = torch.log_softmax(logits, -1)[len(prompt) - 1 : -1]
            own = dense[torch.arange(len(completion)), torch.tensor(completion)]
            np.testing.assert_allclose(row["behavior_logprobs"], own, atol=2e-4)
            assert row["sampling_logprobs"] == row["behavior_logprobs"]
            top = dense.topk(8).values
            np.testing.assert_allclose(row["student_topk_logprobs"], top, atol=2e-4)
            stopped = row["finish_reason"] == "stop"
            assert stopped == (completion[-1] == EOS_ID)
            assert stopped or len(completion) == 24
            seen_eos |= stopped
    assert seen_eos, "choose another seed: no completion of the fixture ends in EOS"


def test_a_score_shard_and_a_rollout_shard_are_read_without_this_package(finished: Path) -> None:
    code = (
        "import sys, pathlib, zarr, pyarrow.parquet as pq\n"
        "root = pathlib.Path(sys.argv[1])\n"
        "group = zarr.open_group(next(root.rglob('scores.zarr')), mode='r')\n"
        "print(sum(a[:].size for _, a in group.arrays()))\n"
        "print(pq.read_table(next(root.rglob('rollouts.parquet'))).num_rows)\n"
        "assert not [m for m in sys.modules if m.startswith('opdcache')]\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, finished / "cache"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert all(int(line) > 0 for line in done.stdout.split())


def test_the_exported_student_loads_in_transformers(finished: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = RunFolder(finished / "first").student_path(2)  # vLLM loaded it for the evaluation
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert AutoTokenizer.from_pretrained(folder).eos_token_id == EOS_ID
    assert torch.isfinite(model(torch.tensor([[1, 2, 3]])).logits).all()


def test_evaluation_is_the_exact_reverse_kl(
    finished: Path, tiny_student: Path, tiny_teacher: Path
) -> None:
    from transformers import AutoModelForCausalLM

    done = opdcache("evaluate", finished / "first.yaml")
    assert done.returncode == 0, done.stderr
    assert "exact full-vocabulary" in done.stdout
    folder = RunFolder(finished / "first")
    models = [
        AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
        for path in (tiny_student, tiny_teacher)
    ]
    cache, values = Cache(str(finished / "cache")), []
    for shard in folder.need(HeldOutRound, 0).shards:
        for row in cache.read_rollouts(cache.need_rollouts(shard)).to_pylist():
            ids = torch.tensor([row["prompt_token_ids"] + row["completion_token_ids"]])
            with torch.no_grad():
                p, q = (m(ids).logits[0].double().log_softmax(-1) for m in models)
            kl = (p.exp() * (p - q)).sum(-1)
            values.append(kl[len(row["prompt_token_ids"]) - 1 : -1])
    exact = folder.need(EvaluationRound, 0)
    assert exact.reverse_kl == pytest.approx(float(torch.cat(values).mean()), rel=1e-4)
    assert exact.tokens == len(torch.cat(values))


def test_an_audit_s_numbers_are_those_of_both_models(
    finished: Path, tiny_student: Path, tiny_teacher: Path
) -> None:
    scored = opdcache("score", finished / "first.yaml", "--round", 0, "--student")
    assert scored.returncode == 0, scored.stderr
    done = opdcache("audit", finished / "first.yaml", "--round", 0, "-k", 8, "--json")
    assert done.returncode == 3, done.stderr  # models that know nothing of each other
    audit = Audit.model_validate_json(done.stdout)
    assert {"overlap"} <= {f.check for f in audit.findings if f.level == "no-go"}
    folder, cache = RunFolder(finished / "first"), Cache(str(finished / "cache"))
    shards = folder.need(RolloutRound, 0).shards
    exact = dense_diagnostics(
        (tiny_student, tiny_teacher),
        [r for s in shards for r in cache.read_rollouts(cache.need_rollouts(s)).to_pylist()],
        k=8,
    )
    found = audit.parts[0].diagnostics.model_dump()
    assert found["num_tokens"] == sum(shard.num_tokens for shard in shards)
    assert {name: found[name] for name in exact} == pytest.approx(exact, abs=1e-3)


@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGKILL])
def test_interrupting_train_and_resuming_gives_the_bit_identical_student(
    finished: Path, tiny_student: Path, tiny_teacher: Path, how: signal.Signals
) -> None:
    run = write_run(finished, f"stopped-{how.name}", tiny_student, tiny_teacher)
    for stage in ("rollout", "score"):
        assert opdcache(stage, run, "--round", 0).returncode == 0
    folder = RunFolder(run.with_suffix(""))
    command = [sys.executable, "-m", "opdcache.cli.main", "train", run, "--round", "0"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    while process.poll() is None and not folder.metrics():
        time.sleep(0.02)
    os.kill(process.pid, how)
    stderr = process.communicate()[1]
    expected = 75 if how == signal.SIGTERM else -signal.SIGKILL
    assert process.returncode == expected, stderr
    assert folder.find(TrainRound, 0) is None
    resumed = opdcache("train", run, "--round", 0)
    assert resumed.returncode == 0, resumed.stderr
    if how == signal.SIGTERM:
        assert "resuming after update" in resumed.stderr
    undisturbed = RunFolder(finished / "first")
    assert weights(folder.student_path(1)) == weights(undisturbed.student_path(1))
    assert [row["update"] for row in folder.metrics()] == [0, 1, 2, 3]


def test_the_same_shards_come_out_with_the_same_tokens_again(
    finished: Path, tiny_student: Path, tiny_teacher: Path
) -> None:
    run = write_run(finished, "again", tiny_student, tiny_teacher, cache="empty")
    done = opdcache("rollout", run, "--round", 0)
    assert done.returncode == 0, done.stderr
    first, again = (
        RunFolder(finished / name).need(RolloutRound, 0).shards for name in ("first", "again")
    )
    assert [shard.key for shard in again] == [shard.key for shard in first]
    assert [shard.content for shard in again] == [shard.content for shard in first]
    assert not any(shard.cached for shard in again)


def test_a_shard_does_not_hang_on_the_shards_that_its_worker_made_before(
    tiny_student: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Prompts share their keys and values within a batch of requests, and not across batches."""
    arguments: dict[str, Any] = {"max_model_len": 256, "kv_cache_memory_bytes": 2**26}
    sampler = Sampler(tiny_student, dtype="float32", processed=False, topk=0, arguments=arguments)
    seen: list[list[int | None]] = []
    generate = sampler.engine.generate

    def noted(*asked: Any) -> Any:
        outputs = generate(*asked)
        seen.append([output.num_cached_tokens for output in outputs])
        return outputs

    monkeypatch.setattr(sampler.engine, "generate", noted)
    draws = [Draw((*range(2, 202), last), last) for last in (3, 4)]
    try:
        drawn = [sampler.sample(draws, Sampling(max_tokens=4)) for _ in range(2)]
        sampler.engine.generate([draws[0].prompt_token_ids], [{"max_tokens": 1}])
    finally:
        sampler.close()
    assert [one.token_ids for one in drawn[0]] == [one.token_ids for one in drawn[1]]
    assert seen[0][0] == seen[1][0] == 0
    assert seen[0][1] == seen[1][1] == 192  # all whole blocks of 32
    assert sampler.engine.llm.llm_engine.vllm_config.cache_config.kv_cache_memory_bytes == 2**26
    assert (seen[2][0] or 0) > 0  # what would be shared


def test_a_second_scoring_of_some_completions_is_as_near_as_the_store_s_step(
    finished: Path,
) -> None:
    done = opdcache("score", finished / "first.yaml", "--round", 0, "--check", 5)
    assert done.returncode == 0, done.stderr
    assert "5 completions scored again" in done.stdout
    (line,) = (line for line in done.stdout.splitlines() if "top-k log-probs" in line)
    mean, most = (float(word) for word in line.replace(",", "").split() if word[0].isdigit())
    assert 0 < mean < most <= 0.05  # half a step of 1/256, as a share of the value
    (floor,) = (line for line in done.stdout.splitlines() if "noise floor" in line)
    assert float(floor.split(" is ")[1].split()[0]) < 1e-5


def test_a_changed_sampling_distribution_is_recorded_beside_the_raw_one(
    finished: Path, tiny_student: Path, tiny_teacher: Path
) -> None:
    from transformers import AutoModelForCausalLM

    sampling = {"temperature": 0.7, "top_p": 0.8, "max_tokens": 24}
    rollout = CONFIG["rollout"] | {"sampling": sampling}
    run = write_run(finished, "warm", tiny_student, tiny_teacher, rollout=rollout)
    done = opdcache("rollout", run, "--round", 0)
    assert done.returncode == 0, done.stderr
    model = AutoModelForCausalLM.from_pretrained(tiny_student, dtype=torch.float32)
    cache = Cache(str(finished / "cache"))
    shard = RunFolder(finished / "warm").need(RolloutRound, 0).shards[0]
    for row in cache.read_rollouts(cache.need_rollouts(shard)).to_pylist():
        prompt, completion = row["prompt_token_ids"], row["completion_token_ids"]
        with torch.no_grad():
            logits = model(torch.tensor([prompt + completion])).logits[0].double()
        logits = logits[len(prompt) - 1 : -1]
        for t, token in enumerate(completion):
            raw = torch.log_softmax(logits[t], -1)
            assert row["behavior_logprobs"][t] == pytest.approx(float(raw[token]), abs=2e-4)
            drawn = torch.softmax(logits[t] / 0.7, -1)
            order = drawn.argsort(descending=True)
            held = drawn[order].cumsum(0)
            nucleus = order[: int((held < 0.8).sum()) + 1]
            assert token in nucleus
            kept = drawn[token] / drawn[nucleus].sum()
            assert row["sampling_logprobs"][t] == pytest.approx(float(kept.log()), abs=1e-3)


def test_completions_end_where_the_context_does_and_keep_their_raw_logprobs(
    finished: Path, tiny_student: Path, tiny_teacher: Path
) -> None:
    room = 64
    rollout = CONFIG["rollout"] | {
        "sampling": {"temperature": 0.7, "max_tokens": 500},
        "engine": {"max_model_len": room},
    }
    run = write_run(finished, "full", tiny_student, tiny_teacher, rollout=rollout)
    done = opdcache("rollout", run, "--round", 0)
    assert done.returncode == 0, done.stderr
    cache = Cache(str(finished / "cache"))
    lengths = []
    for shard in RunFolder(finished / "full").need(RolloutRound, 0).shards:
        for row in cache.read_rollouts(cache.need_rollouts(shard)).to_pylist():
            assert len(row["behavior_logprobs"]) == len(row["completion_token_ids"])
            lengths.append(len(row["prompt_token_ids"]) + len(row["completion_token_ids"]))
    assert max(lengths) == room - 1  # vLLM's raw pass wants room for a token


def test_a_prompt_that_fills_the_context_is_refused_in_one_line(
    finished: Path, tiny_student: Path, tiny_teacher: Path
) -> None:
    rollout = CONFIG["rollout"] | {"engine": {"max_model_len": 16}}
    run = write_run(finished, "narrow", tiny_student, tiny_teacher, rollout=rollout)
    done = opdcache("rollout", run, "--round", 0)
    assert done.returncode == 2
    assert "a prompt fills the engine's context (expected fewer than 16 tokens" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("engine", "said"),
    [
        ({"model": "another"}, "'model' is not free"),
        ({"logprobs_mode": "raw_logits"}, "'logprobs_mode' is not free"),
        ({"max_model_length": 16}, "did you mean 'max_model_len'?"),
        ({"max_model_len": -5}, "max_model_len"),
    ],
)
def test_an_engine_argument_that_cannot_be_is_refused_in_one_line(
    finished: Path,
    tiny_student: Path,
    tiny_teacher: Path,
    tmp_path: Path,
    engine: dict[str, object],
    said: str,
) -> None:
    write_prompts(tmp_path)
    rollout = CONFIG["rollout"] | {"engine": engine}
    run = write_run(tmp_path, "refused", tiny_student, tiny_teacher, rollout=rollout)
    done = opdcache("rollout", run, "--round", 0)
    assert done.returncode == 2
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1
    assert said in errors[0]


def test_rounds_added_to_a_finished_run_are_trained(
    finished: Path, tiny_student: Path, tiny_teacher: Path
) -> None:
    for rounds in (1, 2):
        run = write_run(finished, "grown", tiny_student, tiny_teacher, rounds=rounds)
        done = opdcache("run", run)
        assert done.returncode == 0, done.stderr
    grown, at_once = (RunFolder(finished / name) for name in ("grown", "first"))
    assert grown.need(TrainRound, 1).num_samples == 16
    assert weights(grown.student_path(2)) == weights(at_once.student_path(2))


def test_a_model_that_is_its_own_teacher_is_at_no_distance_from_it(
    tmp_path: Path, tiny_student: Path
) -> None:
    measured = parity(tmp_path, tiny_student, "bfloat16", 40_000)  # many completions end early
    assert measured["num_tokens"] >= 20_000
    assert 0 < measured["reverse_kl"] < 5e-3


def test_two_workers_share_a_stage_and_each_shard_is_committed_once(
    finished: Path, tiny_student: Path, tiny_teacher: Path
) -> None:
    run = write_run(finished, "shared", tiny_student, tiny_teacher, score={"k": 17})
    assert opdcache("rollout", run, "--round", 0).returncode == 0
    command = [sys.executable, "-m", "opdcache.cli.main", "score", run, "--round", "0", "--worker"]
    workers = [
        subprocess.Popen([*command, f"{i}/2"], stderr=subprocess.PIPE, text=True) for i in range(2)
    ]
    for worker in workers:
        assert worker.communicate()[1] is not None
        assert worker.returncode == 0
    scored = RunFolder(finished / "shared").need(ScoreRound, 0)
    assert not any(shard.cached for shard in scored.shards)
    for shard in scored.shards:
        for served in shard.served:
            attempts = list((finished / "cache" / "data" / served.key[:2] / served.key).iterdir())
            assert len([a for a in attempts if list(a.rglob("zarr.json"))]) == 1


@pytest.mark.parametrize("name", ["rollouts.parquet", "topk_steps/c/0/0"])
def test_a_changed_byte_in_a_shard_stops_who_reads_it_and_the_stages_mend_it(
    finished: Path, tiny_student: Path, tiny_teacher: Path, tmp_path: Path, name: str
) -> None:
    write_prompts(tmp_path)
    run = write_run(tmp_path, "damaged", tiny_student, tiny_teacher)
    subprocess.run(["cp", "-r", finished / "cache", tmp_path / "cache"], check=True)
    assert opdcache("rollout", run, "--round", 0).returncode == 0
    assert opdcache("score", run, "--round", 0).returncode == 0
    folder, cache = RunFolder(tmp_path / "damaged"), Cache(str(tmp_path / "cache"))
    shard = folder.need(RolloutRound, 0).shards[0]
    scored = folder.need(ScoreRound, 0).shards[0].served[0]
    key = shard.key if name == "rollouts.parquet" else scored.key
    file = next((tmp_path / "cache" / "data" / key[:2] / key).rglob(name))
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)
    done = opdcache("train", run, "--round", 0)
    assert done.returncode == 3
    assert key in done.stderr
    assert "Traceback" not in done.stderr
    assert "OPD301" in done.stderr.splitlines()[-1]
    assert cache.quarantined() == {key}
    assert "to redo" in opdcache("status", run).stdout
    for stage in ("rollout", "score", "train"):
        again = opdcache(stage, run, "--round", 0)
        assert again.returncode == 0, again.stderr
    assert cache.quarantined() == {key}
    assert verify(cache, deep=True) == []
    contents = [s.content for s in folder.need(RolloutRound, 0).shards]
    assert contents == [s.content for s in folder.need(ScoreRound, 0).shards]


def test_a_full_disk_is_one_line_and_loses_nothing(
    finished: Path, tiny_student: Path, tiny_teacher: Path, tmp_path: Path
) -> None:
    """On a real file system that is full: a small one of memory, in a mount space of its own."""
    write_prompts(tmp_path)
    score = {"k": 18}  # nothing serves it yet
    run = write_run(tmp_path, "full", tiny_student, tiny_teacher, score=score)
    (tmp_path / "cache").mkdir()
    command = f"{sys.executable} -m opdcache.cli.main"
    script = f"""
        mount -t tmpfs -o size=8m tmpfs {tmp_path}/cache
        cp -r {finished}/cache/commits {finished}/cache/data {tmp_path}/cache
        {command} rollout {run} --round 0 || exit 1
        dd if=/dev/zero of={tmp_path}/cache/filler bs=4k 2> /dev/null
        {command} score {run} --round 0 2> {tmp_path}/full.txt
        echo $? >> {tmp_path}/full.txt
        rm {tmp_path}/cache/filler
        {command} score {run} --round 0
    """
    done = subprocess.run(
        ["unshare", "--map-root-user", "--mount", "sh", "-c", script],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    *_, error, code = (tmp_path / "full.txt").read_text().splitlines()
    assert code == "1"
    assert "no space left" in error
    assert "OPD202" in error
    assert "Traceback" not in (tmp_path / "full.txt").read_text()


def test_a_table_of_rollouts_has_no_list_without_its_tokens(finished: Path) -> None:
    for path in (finished / "cache").rglob("rollouts.parquet"):
        table = pq.read_table(path)
        lengths = table.column("completion_token_ids").combine_chunks().value_lengths()
        for name in ("behavior_logprobs", "sampling_logprobs", "student_topk_ids"):
            assert table.column(name).combine_chunks().value_lengths() == lengths


def test_imported_rollouts_are_scored_and_trained_on_without_an_engine_that_samples(
    tmp_path: Path, tiny_student: Path, tiny_teacher: Path
) -> None:
    row = {"prompt_token_ids": [104, 105], "completion_token_ids": [97, 98, EOS_ID]}
    rows = [row | {"loss_mask": [1, 0, 1]}, row, row | {"finish_reason": "length"}]
    rows += [row | {"loss_mask": [0, 0, 0]}, row | {"completion_token_ids": []}]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(one) + "\n" for one in rows))
    command = ("cache", "import", tmp_path / "cache", tmp_path / "rows.jsonl")
    done = opdcache(*command, "--student", tiny_student, "--out", tmp_path / "elsewhere")
    assert done.returncode == 0, done.stderr
    changes = {"rounds": 1, "evaluation": None, "rollouts": {"from": "elsewhere"}}
    train = {"train": {"drop": ["truncated"]}}
    done = opdcache(
        "run", write_run(tmp_path, "first", tiny_student, tiny_teacher, **changes, **train)
    )
    assert done.returncode == 0, done.stderr
    assert "vLLM" not in done.stderr
    folder = RunFolder(tmp_path / "first")
    trained = folder.need(TrainRound, 0)
    assert (trained.num_samples, trained.num_tokens) == (4, 2 + 3)
    assert trained.dropped == {
        "truncated": 1,
        "no supervised token": 1,
        "empty completion": 1,
    }
    (metrics,) = folder.metrics()
    assert metrics["num_tokens"] == 5
    assert "ess" not in metrics
    assert weights(folder.student_path(1)) != weights(tiny_student)
    shown = opdcache("status", tmp_path / "first.yaml")
    assert "1/1 updates" in shown.stdout
    assert verify(Cache(str(tmp_path / "cache")), deep=True) == []
