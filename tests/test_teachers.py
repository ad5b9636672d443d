"""Several teachers, references, and teachers with prompts of their own, on real tiny models."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

import opdcache
from opdcache.errors import ConfigError
from opdcache.evaluation import divergence as evaluate
from opdcache.identity import FileHashes, model_fingerprint
from opdcache.importing import import_rollouts
from opdcache.resolve import load_tokenizer
from opdcache.rollout.stage import run as rollout
from opdcache.runfolder import RunContext, RunFolder, open_run
from opdcache.schemas.config import RunConfig
from opdcache.schemas.manifests import ScoreManifest
from opdcache.schemas.rounds import HeldOutRound, RolloutRound, ScoredShard, ScoreRound
from opdcache.score import stage
from opdcache.score.teacher import Teacher
from opdcache.served import refuse_unserved
from opdcache.stage import Silent, Worker
from opdcache.store.cache import score_commit
from opdcache.train.samples import RoundSamples

from .conftest import EOS_ID, make_tiny_model

pytestmark = [pytest.mark.engine, pytest.mark.usefixtures("one_thread")]

TASKS = ("maths", "code", "prose")
CONTEXT = "Answer: {answer}\n{prompt}"
COMPLETIONS = ([104, 105, EOS_ID], [7], [], [200, 201, 9, 33, 12])
Rows = list[dict[str, Any]]


@pytest.fixture(scope="module")
def maths_teacher(tmp_path_factory: pytest.TempPathFactory, tiny_tokenizer_folder: Path) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("maths"), tiny_tokenizer_folder, seed=3)


class Oracle:
    """Log-probs of completion tokens by one whole forward a sequence, in float64."""

    def __init__(self) -> None:
        self._models: dict[str, Any] = {}

    def dense(
        self, folder: Path, prompt: list[int], completion: list[int], **changes: object
    ) -> torch.Tensor:
        """[T, V]; a change is of the model's configuration."""
        from transformers import AutoModelForCausalLM

        name = str((folder, changes))
        if name not in self._models:
            model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
            for part, value in changes.items():
                for norm in (m for m in model.modules() if hasattr(m, part)):
                    setattr(norm, part, value)
            self._models[name] = model.eval()
        with torch.no_grad():
            logits = self._models[name](torch.tensor([prompt + completion])).logits[0]
        return logits.double().log_softmax(-1)[len(prompt) - 1 : -1]

    def sampled(self, folder: Path, prompt: list[int], completion: list[int]) -> list[float]:
        dense = self.dense(folder, prompt, completion)
        return dense[range(len(completion)), completion].tolist() if completion else []


@pytest.fixture(scope="module")
def oracle() -> Oracle:
    return Oracle()


def ids(folder: Path, text: str) -> list[int]:
    return load_tokenizer(folder).encode(text)


@pytest.fixture(scope="module")
def rows(tiny_student: Path, oracle: Oracle) -> Rows:
    """Completions of two prompts of each task, with the student's own log-probs."""
    made = []
    for task in TASKS:
        for number in range(2):
            question = f"{task} {number}: {{answer}}?"
            prompt = ids(tiny_student, f"u:{question}\na:")
            for index, completion in enumerate(COMPLETIONS):
                own = oracle.sampled(tiny_student, prompt, completion)
                made.append(
                    {
                        "id": f"{task}-{number}",
                        "sample_index": index,
                        "task": task,
                        "answer": f"{task} {number}",
                        "messages": [{"role": "user", "content": question}],
                        "prompt_token_ids": prompt,
                        "completion_token_ids": completion,
                        "behavior_logprobs": [min(0.0, value) for value in own],
                        "sampling_logprobs": [min(0.0, value) for value in own],
                    }
                )
    return made


class Bench:
    """Runs that take the same rollouts, in one cache; counts the teachers that they load."""

    def __init__(self, folder: Path, student: Path, rows: Rows, patch: pytest.MonkeyPatch) -> None:
        self.folder, self._student = folder, student
        self.loads, self.alive, self.most_alive = list[str](), 0, 0
        (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        self._load = stage.load_teacher
        patch.setattr(stage, "load_teacher", self._counted)

    def open(self, name: str, teacher: object, **changes: object) -> RunContext:
        """A run whose round 0 has its rollouts, a prompt's in a shard; with an evaluation, one that
        has not begun."""
        config: dict[str, object] = {
            "cache": str(self.folder / "cache"),
            "output": str(self.folder / name),
            "student": {"model": str(self._student)},
            "teacher": teacher,
            "prompts": {"source": {"type": "jsonl", "path": "none"}},
            "rollouts": {"from": str(self.folder / "elsewhere")},
            "score": {"k": 8, "step": 1 / 4096},
            "train": {"loss": {"k": 8}},
        }
        context = open_run(RunConfig.model_validate(config | changes), Silent(), Worker())
        import_rollouts(
            context.cache,
            self.folder / "rows.jsonl",
            self._student,
            self.folder / "elsewhere",
            Silent(),
            shard_samples=len(COMPLETIONS),
        )
        if "evaluation" not in changes:
            rollout(context, 0)
        return context

    def _counted(self, context: RunContext, config: Any) -> Teacher:
        teacher, close = self._load(context, config), None
        self.loads.append(Path(config.model).name)
        self.alive += 1
        self.most_alive = max(self.most_alive, self.alive)
        close = teacher.close

        def closing() -> None:
            self.alive -= 1
            close()

        teacher.close = closing  # type: ignore[method-assign]
        return teacher


@pytest.fixture
def bench(tmp_path: Path, tiny_student: Path, rows: Rows, monkeypatch: pytest.MonkeyPatch) -> Bench:
    return Bench(tmp_path, tiny_student, rows, monkeypatch)


def model(folder: Path, **prompt: str) -> dict[str, object]:
    return {"model": str(folder), "dtype": "float32", "prompt": prompt or None}


def sampled(context: RunContext, scored: Iterable[ScoredShard]) -> list[NDArray[np.float32]]:
    """What score sets say of the sampled tokens, a completion each, in the order of the shards."""
    found = []
    for shard in scored:
        opened = context.cache.open_score_set(shard.content, shard.teacher, shard.served)
        scores = opened.read()
        assert scores.sampled_logprobs is not None
        found += np.split(scores.sampled_logprobs, scores.token_offsets[1:-1])
    return found


def in_order(rows: Rows) -> Rows:
    """Rows in the order of the shards: by task."""
    return sorted(rows, key=lambda row: row["task"])


def assert_near(
    ours: list[NDArray[np.float32]], theirs: Iterable[list[float]], atol: float = 5e-3
) -> None:
    for mine, exact in zip(ours, theirs, strict=True):
        np.testing.assert_allclose(mine, exact, rtol=1e-3, atol=atol)


def test_each_task_is_scored_by_its_teacher_and_each_model_is_loaded_once(
    bench: Bench, rows: Rows, oracle: Oracle, tiny_teacher: Path, maths_teacher: Path
) -> None:
    context = bench.open("run", model(tiny_teacher), teachers={"maths": model(maths_teacher)})
    scored = stage.run(context, 0)
    shards = context.folder.need(RolloutRound, 0).shards
    assert [shard.task for shard in shards] == [t for t in sorted(TASKS) for _ in range(2)]
    folders = {"maths": maths_teacher}
    prints = {f: model_fingerprint(f, FileHashes()) for f in (tiny_teacher, maths_teacher)}
    assert [shard.teacher for shard in scored.shards] == [
        prints[folders.get(shard.task, tiny_teacher)] for shard in shards
    ]
    assert_near(
        sampled(context, scored.shards),
        (
            oracle.sampled(
                folders.get(row["task"], tiny_teacher),
                row["prompt_token_ids"],
                row["completion_token_ids"],
            )
            for row in in_order(rows)
        ),
    )
    assert sorted(bench.loads) == sorted([tiny_teacher.name, maths_teacher.name])
    assert (bench.most_alive, bench.alive) == (1, 0)


def test_what_is_read_of_a_run_is_of_each_shard_s_own_teacher(
    bench: Bench, rows: Rows, oracle: Oracle, tiny_teacher: Path, maths_teacher: Path
) -> None:
    context = bench.open("run", model(tiny_teacher), teachers={"maths": model(maths_teacher)})
    scored = stage.run(context, 0)
    samples = opdcache.open_cache(bench.folder / "cache").of_run(bench.folder / "run")
    of_task = {"maths": maths_teacher}
    for sample, row in zip(samples, in_order(rows), strict=True):  # the step is 1/4096
        assert sample.rollout_id == f"{row['id']}/{row['sample_index']}"
        assert sample.scores.topk is not None
        dense = oracle.dense(
            of_task.get(sample.task, tiny_teacher),
            row["prompt_token_ids"],
            row["completion_token_ids"],
        )
        exact = dense.topk(8).values.numpy()
        np.testing.assert_allclose(sample.scores.topk.logprobs, exact, rtol=1e-3, atol=1e-3)
    refuse_unserved(context, 0)
    trained = RoundSamples(context.cache, context.folder.need(RolloutRound, 0), scored, k=8)
    (batch,) = trained.micro_batches(range(len(trained)), 10**6)
    assert len(batch) == len([row for row in rows if row["completion_token_ids"]])


def test_references_are_more_score_sets_and_the_student_s_are_its_own_log_probs(
    bench: Bench,
    rows: Rows,
    oracle: Oracle,
    tiny_student: Path,
    tiny_teacher: Path,
    maths_teacher: Path,
) -> None:
    student = {"model": "@student", "dtype": "float32"}
    base = model(maths_teacher)
    context = bench.open("run", model(tiny_teacher), references={"base": base, "policy": student})
    scored = stage.run(context, 0)
    assert {n: len(s) for n, s in scored.references.items()} == {"base": 6, "policy": 6}
    assert {s.teacher for s in scored.references["policy"]} == {context.resolved.student}
    assert {s.teacher for s in scored.references["base"]} == {context.resolved.references["base"]}
    ordered = in_order(rows)
    own = [row["behavior_logprobs"] for row in ordered]
    for ours, theirs in zip(sampled(context, scored.references["policy"]), own, strict=True):
        half = np.asarray(theirs, np.float16)  # stored so; 11 significant bits
        assert np.all(np.abs(ours - theirs) <= np.abs(half - theirs) + np.spacing(half) / 2 + 1e-4)
    assert_near(
        sampled(context, scored.references["base"]),
        (
            oracle.sampled(maths_teacher, row["prompt_token_ids"], row["completion_token_ids"])
            for row in ordered
        ),
    )
    folders = (tiny_student, tiny_teacher, maths_teacher)
    assert sorted(bench.loads) == sorted(folder.name for folder in folders)
    assert bench.most_alive == 1


def test_a_stage_is_undone_while_a_reference_s_score_set_is_put_aside(
    bench: Bench, tiny_teacher: Path, maths_teacher: Path
) -> None:
    references = {"base": model(maths_teacher)}
    context = bench.open("run", model(tiny_teacher), references=references)
    scored = stage.run(context, 0)

    def done() -> bool:
        return context.folder.is_done(context.config, "score", 0, context.cache)

    assert done()
    shard = scored.references["base"][3]
    (served,) = shard.served
    context.cache.put_aside(score_commit(shard.content, shard.teacher, served.key), "damaged")
    assert not done()
    bench.loads.clear()
    assert stage.run(context, 0).references == scored.references
    assert bench.loads == [maths_teacher.name]
    assert done()


def test_a_teacher_with_privileged_context_scores_the_completion_behind_it(
    bench: Bench, rows: Rows, oracle: Oracle, tiny_teacher: Path
) -> None:
    context = bench.open("run", model(tiny_teacher, context=CONTEXT, system="S"))
    scored = stage.run(context, 0)

    def shown(row: dict[str, Any]) -> list[int]:
        question = row["messages"][0]["content"]
        return ids(tiny_teacher, f"s:S\nu:Answer: {row['answer']}\n{question}\na:")

    ordered = in_order(rows)
    assert_near(
        sampled(context, scored.shards),
        (oracle.sampled(tiny_teacher, shown(row), row["completion_token_ids"]) for row in ordered),
    )
    as_student = bench.open("plain", model(tiny_teacher))
    plain = sampled(as_student, stage.run(as_student, 0).shards)
    ours = np.concatenate(sampled(context, scored.shards))
    assert np.abs(ours - np.concatenate(plain)).max() > 0.1
    manifest = one_manifest(context, scored)
    assert manifest.provenance.details["prompt"] == {
        "template": "chat",
        "system": "S",
        "context": CONTEXT,
    }


def one_manifest(context: RunContext, scored: ScoreRound) -> ScoreManifest:
    shard = scored.shards[0]
    path = score_commit(shard.content, shard.teacher, shard.served[0].key)
    manifest = context.cache.manifest(path)
    assert isinstance(manifest, ScoreManifest)
    return manifest


def test_scores_behind_the_same_context_are_found_and_behind_another_are_not(
    bench: Bench, tiny_teacher: Path
) -> None:
    cached = []
    for name, context in (("one", CONTEXT), ("two", CONTEXT), ("three", CONTEXT + "!")):
        scored = stage.run(bench.open(name, model(tiny_teacher, context=context)), 0)
        cached.append([shard.cached for shard in scored.shards])
    assert cached == [[False] * 6, [True] * 6, [False] * 6]
    assert len(bench.loads) == 2


def test_a_teacher_and_a_reference_of_the_same_weights_are_loaded_once(
    bench: Bench, tiny_teacher: Path
) -> None:
    """Self-distillation looked at: the same model with and without the answer."""
    references = {"plain": model(tiny_teacher)}
    by_task = {"maths": model(tiny_teacher, context="{prompt}?")}
    context = bench.open(
        "run", model(tiny_teacher, context=CONTEXT), teachers=by_task, references=references
    )
    scored = stage.run(context, 0)
    assert bench.loads == [tiny_teacher.name]
    every = (*scored.shards, *scored.references["plain"])
    assert len({served.key for shard in every for served in shard.served}) == 12


def test_evaluation_is_the_full_kl_to_each_task_s_teacher_behind_its_prompt(
    bench: Bench,
    rows: Rows,
    oracle: Oracle,
    tiny_student: Path,
    tiny_teacher: Path,
    maths_teacher: Path,
) -> None:
    source = {"type": "jsonl", "path": "held-out"}
    backend = {"type": "transformers", "arguments": {"rms_norm_eps": 0.1}}
    context = bench.open(
        "run",
        model(tiny_teacher) | {"backend": backend},
        teachers={"maths": model(maths_teacher, context=CONTEXT)},
        evaluation={"source": source},
    )
    shards = RunFolder(bench.folder / "elsewhere").need(RolloutRound, 0).shards
    student = context.resolved.student
    context.folder.write(
        HeldOutRound(round=0, student=student, shards=shards, dropped={}, elapsed_s=0)
    )
    (found,) = evaluate.run(context)
    values = []
    for row in rows:
        prompt, completion = row["prompt_token_ids"], row["completion_token_ids"]
        p = oracle.dense(tiny_student, prompt, completion)
        q = oracle.dense(tiny_teacher, prompt, completion, variance_epsilon=0.1)
        if row["task"] == "maths":
            shown = f"u:Answer: {row['answer']}\n{row['messages'][0]['content']}\na:"
            q = oracle.dense(maths_teacher, ids(maths_teacher, shown), completion)
        values.append((p.exp() * (p - q)).sum(-1))
    assert found.tokens == len(torch.cat(values))
    assert found.reverse_kl == pytest.approx(float(torch.cat(values).mean()), rel=1e-4)
    assert set(found.teachers) == {context.resolved.teacher, context.resolved.teachers["maths"]}
    assert RunFolder(bench.folder / "run").find(ScoreRound, 0) is None


def test_evaluation_is_refused_where_vllm_s_arguments_change_a_teacher(
    bench: Bench, tiny_teacher: Path, maths_teacher: Path
) -> None:
    backend = {"type": "vllm", "engine": {"max_model_len": 64, "quantization": "fp8"}}
    context = bench.open(
        "run",
        model(tiny_teacher),
        teachers={"maths": model(maths_teacher) | {"backend": backend}},
        evaluation={"source": {"type": "jsonl", "path": "held-out"}},
    )

    with pytest.raises(ConfigError, match="'quantization' may change the teacher"):
        evaluate.run(context)
