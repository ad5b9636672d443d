"""One teacher, one answer, whatever runs it: transformers, vLLM, or a real vLLM server."""

import dataclasses
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
import pytest
import yaml
from numpy.typing import NDArray

from opdcache.errors import EngineError
from opdcache.identity import digest
from opdcache.runfolder import RunFolder
from opdcache.schemas.manifests import ScoreManifest
from opdcache.schemas.rounds import ScoreRound
from opdcache.schemas.teachers import HttpBackend
from opdcache.score.http_scorer import HttpScorer
from opdcache.score.teacher import Ask, Teacher, in_order
from opdcache.score.transformers_scorer import TransformersScorer
from opdcache.score.vllm_scorer import VllmScorer
from opdcache.store.cache import Cache
from opdcache.store.scores import Scores

from .conftest import EOS_ID, TINY_VOCAB
from .s3_server import free_ports
from .test_alignment import SEQUENCES
from .test_pipeline import opdcache
from .vllm_server import API_KEY, VllmServer, vllm_server

pytestmark = pytest.mark.engine

K = 40
"""More than the 20 that vLLM gives unless told."""
ENGINE_COLUMNS = frozenset({"sampled", "topk"})
ASKS = {
    "all": Ask(ENGINE_COLUMNS, K, 1.0, TINY_VOCAB),
    "mass": Ask(ENGINE_COLUMNS, K, 0.6, TINY_VOCAB),
    "shared ids": Ask(ENGINE_COLUMNS, K, 1.0, 200),
}
FLOAT32_NATS = 1e-4
BFLOAT16_MEAN_NATS, BFLOAT16_MOST_NATS = 0.05, 0.6
MASS = 1e-5
"""How far a tail that is what the kept entries leave of 1 may be off, as mass."""
KEY_VARIABLE = "OPDCACHE_TEST_API_KEY"

Answers = dict[str, Scores]


def answers(teacher: Teacher, asks: Mapping[str, Ask] = ASKS) -> Answers:
    """What a teacher says to every ask; it is closed."""
    try:
        return {name: in_order(teacher.score(SEQUENCES, ask)) for name, ask in asks.items()}
    finally:
        teacher.close()


def in_transformers(folder: Path, dtype: str) -> Answers:
    return answers(TransformersScorer(folder, dtype=dtype, batch_tokens=64))


def in_vllm(folder: Path, dtype: str) -> Answers:
    return answers(VllmScorer(folder, dtype=dtype, k=K, batch_tokens=64, arguments={}))


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory, tiny_teacher: Path) -> Iterator[VllmServer]:
    """Serves the tiny teacher in float32."""
    folder = tmp_path_factory.mktemp("server")
    with vllm_server(folder, tiny_teacher, "tiny", "--dtype=float32", "--max-logprobs=64") as it:
        yield it


def backend(server: VllmServer, **changes: object) -> dict[str, object]:
    usual = {"type": "http", "url": server.url, "budget_tokens": 10_000}
    return {**usual, "api_key_variable": KEY_VARIABLE, "timeout_s": 60, **changes}


@pytest.fixture(scope="module")
def float32(
    tiny_teacher: Path, server: VllmServer, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Answers]:
    os.environ[KEY_VARIABLE] = API_KEY
    asked = HttpBackend.model_validate(backend(server, tokenizer=str(tiny_teacher)))
    ledger = tmp_path_factory.mktemp("ledger") / "sent"
    return {
        "transformers": in_transformers(tiny_teacher, "float32"),
        "vllm": in_vllm(tiny_teacher, "float32"),
        "http": answers(HttpScorer("tiny", asked, ledger)),
    }


@pytest.mark.parametrize("ask", ASKS)
@pytest.mark.parametrize("name", ["vllm", "http"])
def test_float32_scores_are_the_same_in_every_backend(
    float32: dict[str, Answers], name: str, ask: str
) -> None:
    exact, given = float32["transformers"][ask], float32[name][ask]
    assert given.token_offsets.tolist() == exact.token_offsets.tolist()
    assert given.columns == {"sampled", "topk"}
    assert exact.sampled_logprobs is not None
    assert given.sampled_logprobs is not None
    assert np.abs(given.sampled_logprobs - exact.sampled_logprobs).max() <= FLOAT32_NATS
    assert exact.topk is not None
    assert given.topk is not None
    cut_short = 0
    for t, (count, whole) in enumerate(zip(given.topk.num_kept, exact.topk.num_kept, strict=True)):
        # An engine's k likeliest may hold ids that are not shared: then it keeps fewer.
        assert count == whole or (ask == "shared ids" and 0 < count < whole)
        cut_short += int(count < whole)
        assert given.topk.ids[t, :count].tolist() == exact.topk.ids[t, :count].tolist()
        difference = given.topk.logprobs[t, :count] - exact.topk.logprobs[t, :count]
        assert np.abs(difference).max() <= FLOAT32_NATS
        rest = np.exp(exact.topk.logprobs[t, count:whole]).sum()
        tail = np.exp(exact.topk.tail_logprobs[t]) + rest
        assert abs(np.exp(given.topk.tail_logprobs[t]) - tail) <= MASS
    assert (cut_short > 0) == (ask == "shared ids")
    assert (exact.topk.num_kept.min() < K) == (ask == "mass")


@pytest.mark.parametrize("name", ["vllm", "http"])
def test_what_an_engine_says_of_a_token_is_far_from_what_it_says_of_the_next(
    float32: dict[str, Answers], name: str
) -> None:
    exact, given = float32["transformers"]["all"], float32[name]["all"]
    assert exact.sampled_logprobs is not None
    assert given.sampled_logprobs is not None
    shifted = np.abs(given.sampled_logprobs[1:] - exact.sampled_logprobs[:-1])
    assert np.median(shifted) > 1000 * FLOAT32_NATS


def differences(one: Scores, other: Scores) -> NDArray[np.float32]:
    """Of the sampled tokens' log-probs, and of those entries that both keep, nats."""
    assert one.sampled_logprobs is not None
    assert other.sampled_logprobs is not None
    assert one.topk is not None
    assert other.topk is not None
    off = [np.abs(one.sampled_logprobs - other.sampled_logprobs)]
    for t in range(len(one.topk.ids)):
        ours = dict(zip(one.topk.ids[t].tolist(), one.topk.logprobs[t], strict=True))
        theirs = dict(zip(other.topk.ids[t].tolist(), other.topk.logprobs[t], strict=True))
        shared = ours.keys() & theirs.keys()
        assert len(shared) >= 0.8 * K
        off.append(np.abs([ours[i] - theirs[i] for i in shared]))
    return np.concatenate(off).astype(np.float32)


def test_bfloat16_scores_differ_by_no_more_than_the_documentation_says(
    tiny_teacher: Path, float32: dict[str, Answers]
) -> None:
    scored = in_transformers(tiny_teacher, "bfloat16")["all"]
    between = differences(scored, in_vllm(tiny_teacher, "bfloat16")["all"])
    rounding = differences(scored, float32["transformers"]["all"])
    for name, off in (("between backends", between), ("from float32", rounding)):
        spread = f"99 % {np.quantile(off, 0.99):.3f}, most {off.max():.3f} nats"
        print(f"bfloat16 {name}: mean {off.mean():.4f}, {spread}")
    assert between.mean() <= BFLOAT16_MEAN_NATS
    assert between.max() <= BFLOAT16_MOST_NATS
    assert between.mean() <= 1.5 * rounding.mean()


def test_an_engine_that_cannot_look_up_ids_says_so_in_one_line(tiny_teacher: Path) -> None:
    ask = dataclasses.replace(ASKS["all"], columns=ENGINE_COLUMNS | {"student_topk"})
    teacher = VllmScorer(tiny_teacher, dtype="float32", k=K, batch_tokens=64, arguments={})
    try:
        with pytest.raises(EngineError, match=r"^vLLM refuses a request: .*V2 model runner"):
            list(teacher.score(SEQUENCES, ask))
    finally:
        teacher.close()


@pytest.mark.gpu
def test_a_gpu_engine_looks_up_the_recorded_ids_as_transformers_does(
    tiny_teacher: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VLLM_USE_V2_MODEL_RUNNER", "1")
    ask = dataclasses.replace(ASKS["all"], columns=ENGINE_COLUMNS | {"student_topk"})
    given = answers(
        VllmScorer(tiny_teacher, dtype="float32", k=K, batch_tokens=64, arguments={}), {"ids": ask}
    )["ids"].student_topk
    exact = answers(
        TransformersScorer(tiny_teacher, dtype="float32", batch_tokens=64), {"ids": ask}
    )["ids"].student_topk
    assert given is not None
    assert exact is not None
    assert given.logprobs.shape == SEQUENCES.recorded_TS.shape
    # A GPU's float32 products may be rounded as TF32.
    assert np.abs(given.logprobs - exact.logprobs).max() <= 1e-2
    assert np.abs(np.exp(given.tail_logprobs) - np.exp(exact.tail_logprobs)).max() <= 1e-2


# A whole score stage that asks the server.

ROWS = [
    {"prompt_token_ids": [104, 105], "completion_token_ids": [97, 98, EOS_ID]},
    {"prompt_token_ids": [104, 105], "completion_token_ids": []},
    {"prompt_token_ids": [7], "completion_token_ids": [9]},
]
NUM_SENT = (5 + 1) + (2 + 1)


def write_stage(folder: Path, student: Path, teacher: dict[str, object], name: str) -> Path:
    """A run file whose rollouts were imported."""
    rows = folder / "rows.jsonl"
    if not rows.exists():
        rows.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
        command = ["cache", "import", folder / "cache", rows]
        done = opdcache(*command, "--student", student, "--out", folder / "imported")
        assert done.returncode == 0, done.stderr
    config = {
        "cache": "cache",
        "student": {"model": str(student)},
        "teacher": {"dtype": "float32", **teacher},
        "prompts": {"source": {"type": "jsonl", "path": "prompts.jsonl"}},
        "rollouts": {"from": "imported"},
        "score": {"k": K},
        "train": {"loss": {"k": 4}},
    }
    (folder / f"{name}.yaml").write_text(yaml.safe_dump(config))
    done = opdcache("rollout", folder / f"{name}.yaml", "--round", 0)
    assert done.returncode == 0, done.stderr
    return folder / f"{name}.yaml"


def score_manifest(run: Path) -> ScoreManifest:
    (shard,) = RunFolder(run.with_suffix("")).need(ScoreRound, 0).shards
    (manifest,) = Cache(str(run.parent / "cache")).score_sets(shard.content, shard.teacher)
    return manifest


def test_a_score_stage_that_asks_a_server_is_counted_and_remembers_what_it_asked(
    tmp_path: Path,
    tiny_student: Path,
    tiny_teacher: Path,
    server: VllmServer,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv(KEY_VARIABLE, API_KEY)
    asked = backend(server, tokenizer=str(tiny_teacher), budget_tokens=NUM_SENT)
    teacher = {"model": "tiny", "revision": "first", "backend": asked}
    run = write_stage(tmp_path, tiny_student, teacher, "served")
    done = opdcache("score", run, "--round", 0)
    assert done.returncode == 0, done.stderr
    ledger = RunFolder(tmp_path / "served").sent_tokens_path
    assert sum(map(int, ledger.read_text().split())) == NUM_SENT
    manifest = score_manifest(run)
    assert manifest.identity.teacher == digest({"served": "tiny", "version": "first"})
    assert manifest.identity.columns == ("sampled", "topk")
    details = manifest.provenance.details
    assert details["backend"] == "http"
    assert details["cannot_give"] == ["draws", "entropy", "student_topk"]
    assert details["served"] == {"id": "tiny", "root": str(tiny_teacher), "max_model_len": 256}
    written = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert not [path for path in written if API_KEY.encode() in path.read_bytes()]
    assert API_KEY not in done.stderr + done.stdout
    # Another declared version is another teacher, and the budget is the run's own.
    other = {**teacher, "revision": "second", "backend": {**asked, "budget_tokens": NUM_SENT - 1}}
    done = opdcache("score", write_stage(tmp_path, tiny_student, other, "other"), "--round", 0)
    assert done.returncode == 1
    assert "the budget of teacher tokens does not hold the next request" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_score_stage_without_its_server_asks_to_try_again(
    tmp_path: Path, tiny_student: Path, tiny_teacher: Path
) -> None:
    (port,) = free_ports(1)
    asked = {"type": "http", "url": f"http://127.0.0.1:{port}", "budget_tokens": 9, "retries": 0}
    asked["tokenizer"] = str(tiny_teacher)
    teacher = {"model": "tiny", "revision": "first", "backend": asked}
    done = opdcache("score", write_stage(tmp_path, tiny_student, teacher, "alone"), "--round", 0)
    assert done.returncode == 75
    assert "the teacher's server does not answer" in done.stderr
    assert "Traceback" not in done.stderr
