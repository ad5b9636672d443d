"""Held-out shards made into scores, and when scores are taken again; without engines."""

import importlib
import json
import re
import shutil
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from opdcache import documents
from opdcache.cli.evaluation_text import evaluation_lines
from opdcache.errors import ConfigError, InputsMissing, PromptError, RunChanged, UsageError
from opdcache.evaluation import divergence, verified
from opdcache.evaluation import run as evaluation
from opdcache.prompts import load_prompts
from opdcache.resolve import load_tokenizer
from opdcache.rollout import engine, teacher
from opdcache.rollout.stage import plan_round
from opdcache.rollout.stage import run as rollout
from opdcache.rollout.tasks import Policy, RolloutTask
from opdcache.rounds import status
from opdcache.runfolder import RunContext, open_run
from opdcache.schemas.config import RunConfig
from opdcache.schemas.evaluation import Evaluation
from opdcache.schemas.manifests import RolloutManifest, Sampling
from opdcache.schemas.prompts import ReasoningGymSource
from opdcache.schemas.rounds import (
    AccuracyRound,
    EvaluationRound,
    HeldOutRound,
    RolloutShard,
    TeacherAccuracy,
    TeacherHeldOut,
)
from opdcache.stage import Silent, Worker
from opdcache.store import rollouts
from opdcache.store.cache import Cache, as_listed

from . import shards
from .test_runfolder import base as base  # a fixture
from .test_runfolder import opened, write_prompts

Completions = dict[str, Sequence[str]]
"""By prompt id; the answer is the id's last letter, and a text with a full stop is whole."""

FUNCTION = "tests.test_verified:ends"
calls = list[str]()


class Said(Silent):
    """Progress that remembers its lines."""

    def __init__(self) -> None:
        self.lines, self.num_open = list[str](), 0

    def begin(self, title: str, total: int, unit: str) -> None:
        self.num_open += 1

    def end(self) -> None:
        self.num_open -= 1

    def say(self, text: str) -> None:
        self.lines.append(text)


class Sampled:
    """Commits a shard for every task without an engine; remembers who would have sampled."""

    def __init__(self) -> None:
        self.policies = list[Policy]()

    def __call__(
        self, context: RunContext, policy: Policy, tasks: dict[str, RolloutTask], *_: str
    ) -> tuple[dict[str, RolloutManifest], dict[str, str]]:
        self.policies.append(policy)
        found = {key: shards.commit_rollouts(context.cache, key) for key in tasks}
        return {
            key: manifest.model_copy(update={"key": key, "task": tasks[key].task})
            for key, manifest in found.items()
        }, {}


def ends(text: str, answer: str) -> float:
    """A user's verifier: 1 where the text ends in the answer, less where it only has it."""
    calls.append(text)
    return 1.0 if text.rstrip(".").endswith(answer) else 0.25 * (answer in text)


def fails(text: str, answer: str) -> float:
    raise ValueError(text)


def commit(
    cache: Cache, name: str, completions: Completions, task: str = "t", first_sample: int = 0
) -> RolloutShard:
    table = rollouts.rollout_table(
        [
            rollouts.Completion(
                prompt_id=prompt,
                sample_index=index,
                prompt_token_ids=[1],
                completion_token_ids=[2, 3],
                behavior_logprobs=np.zeros(2, np.float32),
                sampling_logprobs=np.zeros(2, np.float32),
                topk_ids=np.zeros((2, 0), np.int32),
                topk_logprobs=np.zeros((2, 0), np.float32),
                finish_reason="stop" if text.endswith(".") else "length",
                text=text,
                task=task,
                answer=prompt[-1],
            )
            for prompt, texts in completions.items()
            for index, text in enumerate(texts, first_sample)
        ]
    )
    manifest = shards.commit_rollouts(cache, name, table, student_topk=0)
    return as_listed(manifest, cached=False).model_copy(update={"task": task})


@pytest.fixture
def context(base: dict[str, Any]) -> RunContext:
    """A run of two rounds with a verifier."""
    return opened(verifying(base, rounds=2, samples_per_prompt=2))


def verifying(base: dict[str, Any], rounds: int = 1, **changes: object) -> dict[str, Any]:
    evaluation = base["evaluation"] | {"verifier": FUNCTION} | changes
    return base | {"rounds": rounds, "evaluation": evaluation}


def answer(context: RunContext, index: int | None, *listed: RolloutShard) -> None:
    """What the rollout stage of a round, or of the teacher, leaves behind."""
    pinned: dict[str, Any] = {"shards": listed, "elapsed_s": 0.0}
    if index is None:
        made = TeacherHeldOut(teachers=("t",) * len(listed), **pinned)
        documents.create(context.folder.teacher_path / "held_out.json", made)
    else:
        context.folder.write(HeldOutRound(round=index, student="s", dropped={}, **pinned))


def test_scores_truncation_and_the_gap_are_those_that_the_texts_say(context: RunContext) -> None:
    cache = context.cache
    answer(context, 0, commit(cache, "before", {"p1": ["1.", "2"], "p2": ["no.", "2 or 3."]}))
    answer(context, 1, commit(cache, "after", {"p1": ["1.", "1"], "p2": ["no.", "2."]}))
    answer(context, None, commit(cache, "teacher", {"p1": ["1.", "1."], "p2": ["2.", "2."]}))
    found = verified.run(context)
    assert found is not None
    assert [row.round for row in found.overall] == [0, 1, None]
    assert [row.mean_score.value for row in found.overall] == [1.25 / 4, 3 / 4, 1]
    assert [row.pass_at[1].value for row in found.overall] == [1 / 4, 3 / 4, 1]
    assert [row.pass_at[2].value for row in found.overall] == [1 / 2, 1, 1]
    assert [row.num_truncated for row in found.overall] == [1, 1, 0]
    recovery = found.overall[1].recovery
    assert recovery is not None
    assert recovery.value == pytest.approx((3 / 4 - 1.25 / 4) / (1 - 1.25 / 4))
    assert found.by_task == {}


def test_a_prompt_s_completions_may_stand_in_several_shards(context: RunContext) -> None:
    first = commit(context.cache, "first", {"p1": ["1.", "no"], "p2": ["no."]})
    second = commit(context.cache, "second", {"p2": ["2"]}, first_sample=1)
    answer(context, 0, second, first)
    answer(context, None, first, second)
    verified.run(context)
    kept = context.folder.find(AccuracyRound, 0)
    assert kept is not None
    said = [(prompt.prompt_id, prompt.scores, prompt.num_truncated) for prompt in kept.prompts]
    assert said == [("p1", (1, 0), 1), ("p2", (0, 1), 1)]


def test_tasks_are_told_apart_each_with_a_gap_of_its_own(context: RunContext) -> None:
    for index, texts in ((0, ["no.", "1."]), (1, ["1.", "1."]), (None, ["1.", "1."])):
        sums = commit(context.cache, f"sums {index}", {"p1": texts}, "sums")
        words = commit(context.cache, f"words {index}", {"p2": ["2."] * 2}, "words")
        answer(context, index, sums, words)
    found = verified.run(context)
    assert found is not None
    assert list(found.by_task) == ["sums", "words"]
    assert [row.mean_score.value for row in found.by_task["sums"]] == [0.5, 1, 1]
    assert [row.mean_score.value for row in found.overall] == [0.75, 1, 1]
    of = [found.by_task[task][1].recovery for task in ("sums", "words")]
    assert [one.value for one in of if one] == [1, None]


def test_scores_are_kept_and_taken_anew_when_completions_or_the_verifier_differ(
    base: dict[str, Any], context: RunContext
) -> None:
    shard = commit(context.cache, "before", {"p1": ["1.", "2."], "p2": ["2.", "2."]})
    answer(context, 0, shard)
    answer(context, None, commit(context.cache, "teacher", {"p1": ["1."] * 2, "p2": ["2."] * 2}))
    first = verified.run(context)
    kept = context.folder.find(AccuracyRound, 0)
    assert kept is not None
    calls.clear()
    assert verified.run(context) == first
    assert calls == []
    context.folder.write(kept.model_copy(update={"contents": ("other",)}), anew=True)
    assert verified.run(context) == first
    assert len(calls) == 4  # the round's; the teacher's are kept
    calls.clear()
    other = opened(verifying(base, rounds=2, samples_per_prompt=2, verifier="math"))
    by_math = verified.run(other)
    assert by_math is not None
    assert by_math.verifier == "math"
    kept = context.folder.find(AccuracyRound, 0)
    assert kept is not None
    assert kept.verifier == "math"
    assert verified.run(context) == first
    assert len(calls) == 8


def test_a_function_whose_file_has_changed_is_asked_again(
    base: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(tmp_path))
    file = tmp_path / "changing_verifier.py"
    file.write_text("def f(text, answer): return 0\n")
    asked = verifying(base, verifier="changing_verifier:f", teacher=False)
    context = opened(asked)
    answer(context, 0, commit(context.cache, "before", {"p1": ["1."]}))
    found = [verified.run(context)]
    file.write_text("def f(text, answer): return  1\n")
    importlib.reload(importlib.import_module("changing_verifier"))
    found.append(verified.run(context))
    assert [one.overall[0].mean_score.value for one in found if one] == [0, 1]


def test_a_teacher_that_is_not_asked_is_not_there(base: dict[str, Any]) -> None:
    context = opened(verifying(base, teacher=False))
    answer(context, 0, commit(context.cache, "before", {"p1": ["1."]}))
    found = verified.run(context)
    assert found is not None
    assert [row.round for row in found.overall] == [0]
    assert not context.folder.teacher_path.exists()


def test_students_are_verified_beside_a_served_teacher_and_the_divergence_is_refused(
    base: dict[str, Any], tmp_path: Path
) -> None:
    tokenizer = str(tmp_path / "teacher")
    backend = {"type": "http", "url": "http://one", "tokenizer": tokenizer, "budget_tokens": 9}
    served = {"model": "big", "revision": "1", "backend": backend}
    config = verifying(base, teacher=False) | {"teacher": served}
    context = opened(config)
    assert len(plan_round(context, 0).parts[HeldOutRound].tasks) == 1
    assert status(context.config).stages[-1].stage == "rollout"
    answer(context, 0, commit(context.cache, "before", {"p1": ["1."]}))
    found = evaluation.run(context, divergence=False)
    assert found.accuracy is not None
    assert [row.mean_score.value for row in found.accuracy.overall] == [1]
    with pytest.raises(ConfigError, match=r"^teacher: .*an http teacher.*take --no-divergence"):
        evaluation.run(context)


def test_rounds_that_answered_different_prompts_are_not_compared(context: RunContext) -> None:
    answer(context, 0, commit(context.cache, "before", {"p1": ["1.", "1."]}))
    answer(context, None, commit(context.cache, "teacher", {"p2": ["1.", "1."]}))
    with pytest.raises(RunChanged, match="held-out prompts are not the same"):
        verified.run(context)


def test_a_round_without_held_out_completions_is_yet_to_come(context: RunContext) -> None:
    with pytest.raises(InputsMissing, match="no student has sampled the held-out prompts"):
        verified.run(context)


def test_without_verifier_and_divergence_there_is_nothing_to_evaluate(base: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match=r"nothing but the divergence.*--no-divergence"):
        evaluation.run(opened(base), divergence=False)


def test_who_verifies_may_change_under_way_and_what_is_asked_may_not(base: dict[str, Any]) -> None:
    opened(base)
    changed = opened(verifying(base, teacher=False)).config
    assert changed.evaluation is not None
    assert (changed.evaluation.verifier, changed.evaluation.teacher) == (FUNCTION, False)
    with pytest.raises(RunChanged, match=r"evaluation\.samples_per_prompt changed"):
        opened(verifying(base, samples_per_prompt=3))
    with pytest.raises(RunChanged, match="evaluation"):
        opened(base | {"evaluation": None, "prompts": base["prompts"] | {"held_out_share": 0.5}})


def test_held_out_prompts_without_answers_are_refused_before_anything_is_sampled(
    base: dict[str, Any],
) -> None:
    context = opened(verifying(base))
    with pytest.raises(ConfigError, match=r"evaluation.verifier: .* needs reference answers"):
        rollout(context, 0)
    assert not list(context.cache.objects.list(""))


def planned(config: dict[str, Any]) -> tuple[RunContext, list[teacher._Part]]:
    context = opened(config)
    return context, teacher.plan(context)


def ask(base: dict[str, Any], tmp_path: Path, **changes: object) -> dict[str, Any]:
    """A run whose held-out prompts have answers and tasks."""
    rows = [{"prompt": f"say {i}", "answer": f"SECRET{i}", "task": t} for i, t in enumerate("aba")]
    write_prompts(tmp_path / "held-out.jsonl", *rows)
    return verifying(base, samples_per_prompt=2) | changes


def test_the_teacher_is_asked_what_the_students_are_with_the_same_seeds(
    base: dict[str, Any], tmp_path: Path
) -> None:
    context, (part,) = planned(ask(base, tmp_path))
    ours = plan_round(context, 0).parts[HeldOutRound].tasks
    assert [task.requests for task in part.tasks] == [task.requests for task in ours]
    assert [task.seeds for task in part.tasks] == [task.seeds for task in ours]
    assert {task.identity.student for task in part.tasks} == {context.resolved.teacher}
    assert part.policy.dtype == "bfloat16"
    assert part.policy.engine == {"max_model_len": 128}


def test_a_teacher_reads_its_own_system_message_and_never_the_context(
    base: dict[str, Any], tmp_path: Path
) -> None:
    prompt = {"system": "Be brief.", "context": "{prompt} The answer is {answer}."}
    own = {"model": str(tmp_path / "teacher"), "prompt": prompt}
    _, (part,) = planned(ask(base, tmp_path, teacher=own))
    tokenizer = load_tokenizer(tmp_path / "teacher")
    read = [
        tokenizer.decode(list(r.rendered.token_ids), skip_special_tokens=False)
        for task in part.tasks
        for r in task.requests
    ]
    assert read == [f"s:Be brief.\nu:say {i}\na:" for i in (0, 0, 2, 2, 1, 1)]


def test_a_teacher_s_completions_hang_on_no_key_of_the_loss_or_of_what_students_record(
    base: dict[str, Any], tmp_path: Path
) -> None:
    keys = []
    for name, topk in (("one", 16), ("two", 4)):
        of = {"output": str(tmp_path / name), "rollout": base["rollout"] | {"student_topk": topk}}
        train = {"loss": {"k": 4, "support": "student_topk"}}
        config = ask(base, tmp_path, **of, train=train)
        keys.append([task.key for task in planned(config)[1][0].tasks])
    assert keys[0] == keys[1]


def test_each_task_is_answered_by_its_own_teacher_in_its_own_engine(
    base: dict[str, Any], tmp_path: Path
) -> None:
    shutil.copytree(tmp_path / "student", tmp_path / "maths")
    backend = {"type": "vllm", "engine": {"max_model_len": 96}}
    maths = {"model": str(tmp_path / "maths"), "dtype": "float32", "backend": backend}
    config = ask(base, tmp_path, teachers={"b": maths})
    config["score"] = {"columns": ["sampled", "topk"]}
    _, parts = planned(config)
    assert [[task.task for task in part.tasks] for part in parts] == [["a"], ["b"]]
    assert [part.policy.engine for part in parts] == [{"max_model_len": 128}, backend["engine"]]
    assert [part.place for part in parts] == ["rollout.engine", "teachers.b.backend.engine"]
    assert [part.policy.dtype for part in parts] == ["bfloat16", "float32"]


def test_a_teacher_in_transformers_takes_of_the_student_s_engine_what_fits_the_machine(
    base: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    harmless = {"max_model_len": 96, "enforce_eager": True}
    engine = {**harmless, "quantization": "fp8", "hf_overrides": {"rope_theta": 1}}
    config = ask(base, tmp_path, rollout=base["rollout"] | {"engine": engine})
    said = Said()
    context = open_run(RunConfig.model_validate(config), said, Worker())
    monkeypatch.setattr(teacher, "generate", sampled := Sampled())
    teacher.run(context)
    assert [policy.engine for policy in sampled.policies] == [harmless]
    assert said.lines == [
        "teacher teacher held out: without rollout.engine's hf_overrides, quantization"
    ]


def test_teachers_of_the_same_weights_in_two_folders_are_two(
    base: dict[str, Any], tmp_path: Path
) -> None:
    """The tokenizers beside them may differ, which no fingerprint of the weights says."""
    shutil.copytree(tmp_path / "teacher", tmp_path / "again")
    other = {"b": {"model": str(tmp_path / "again")}}
    context, parts = planned(ask(base, tmp_path, teachers=other))
    assert context.resolved.teachers["b"] == context.resolved.teacher
    assert [part.policy.folder.name for part in parts] == ["teacher", "again"]


def test_a_teacher_of_two_tasks_is_one_engine(base: dict[str, Any], tmp_path: Path) -> None:
    same = {"b": {"model": str(tmp_path / "teacher")}}
    _, (part,) = planned(ask(base, tmp_path, teachers=same))
    assert [task.task for task in part.tasks] == ["a", "b"]


@pytest.mark.parametrize("name", ["teacher", "maths"])
def test_the_teachers_of_a_run_are_listed_as_their_shards_are(
    base: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """Tasks a and c are one teacher's, whose engine comes first: b's shards are the last then."""
    shutil.copytree(tmp_path / "student", tmp_path / "maths")
    rows = [{"prompt": f"say {t}", "answer": t, "task": t} for t in "abc"]
    config = ask(base, tmp_path, teachers={"b": {"model": str(tmp_path / name)}})
    write_prompts(tmp_path / "held-out.jsonl", *rows)
    context = opened(config)
    monkeypatch.setattr(teacher, "generate", sampled := Sampled())
    made = teacher.run(context)
    resolved = context.resolved
    engines = [policy.fingerprint for policy in sampled.policies]
    assert engines == list(dict.fromkeys([resolved.teacher, resolved.teachers["b"]]))
    of = {"a": resolved.teacher, "b": resolved.teachers["b"], "c": resolved.teacher}
    tasks = ["a", "b", "c"] if name == "teacher" else ["a", "c", "b"]
    assert [shard.task for shard in made.shards] == tasks
    assert list(made.teachers) == [of[shard.task] for shard in made.shards]


def test_a_prompt_that_fills_an_engine_names_that_engine_s_key(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(engine, "Engine", lambda *_: SimpleNamespace(max_model_len=4))
    place = "teachers.b.backend.engine"
    sampler = engine.Sampler(
        tmp_path, dtype="float32", processed=False, topk=0, arguments={}, place=place
    )
    with pytest.raises(PromptError, match=r"or raise teachers\.b\.backend\.engine\.max_model_len"):
        sampler.sample([engine.Draw((1, 2, 3, 4), 0)], Sampling())


def test_a_teacher_that_vllm_would_load_otherwise_is_not_asked(
    base: dict[str, Any], tmp_path: Path
) -> None:
    backend = {"type": "transformers", "arguments": {"device_map": "auto", "rope_scaling": {}}}
    own = {"model": str(tmp_path / "teacher"), "backend": backend}
    words = r"backend\.arguments: 'rope_scaling' may change.*teacher to false"
    with pytest.raises(ConfigError, match=rf"^teacher\.{words}"):
        planned(ask(base, tmp_path, teacher=own))
    with pytest.raises(ConfigError, match=rf"^teachers\.b\.{words}"):
        planned(ask(base, tmp_path, teachers={"b": own}, output=str(tmp_path / "other")))


def test_the_divergence_names_the_teacher_that_it_cannot_load(
    base: dict[str, Any], tmp_path: Path
) -> None:
    backend = {"type": "vllm", "engine": {"quantization": "fp8"}}
    own = {"model": str(tmp_path / "teacher"), "backend": backend}
    config = ask(base, tmp_path, teachers={"b": own})
    config["score"] = {"columns": ["sampled", "topk"]}
    with pytest.raises(ConfigError, match=r"^teachers\.b\.backend\.engine: 'quantization' may"):
        divergence.refuse(opened(config))


def told(context: RunContext, *texts: Completions) -> list[list[str]]:
    """Cells of the table for round 0, round 1 and the teacher, then the words below it."""
    for index, one in zip((0, 1, None), texts, strict=True):
        answer(context, index, commit(context.cache, f"shard {index}", one))
    lines = list(evaluation_lines(evaluation.run(context, divergence=False)))
    rows = [re.split(r"\s{2,}", line.strip()) for line in lines[1].splitlines()[-3:]]
    return [*rows, [lines[-1]]]


def test_the_table_says_what_a_reader_needs_of_the_gap(context: RunContext) -> None:
    half, right = {"p1": ["1.", "no."], "p2": ["no", "2."]}, {"p1": ["1."] * 2, "p2": ["2."] * 2}
    before, after, teacher, gap = told(context, half, right, right)
    assert before == ["0", "0.500 [0.500, 0.500]", *before[2:4], "25.0%", "4"]
    assert after[4] == "100% [100%, 100%]"
    assert teacher[:2] == ["teacher", "1.000 [1.000, 1.000]"]
    assert gap == ["gap: the teacher is +0.500 from round 0 in avg@n"]


def test_the_table_says_that_a_gap_is_not_there(context: RunContext) -> None:
    half, right = {"p1": ["1.", "no."], "p2": ["no", "2."]}, {"p1": ["1."] * 2, "p2": ["2."] * 2}
    _, after, _, (gap,) = told(context, right, half, half)
    assert after[4] == "undefined"
    assert gap == (
        "gap: the teacher is -0.500 from round 0 in avg@n; it does not lead in 100.0% of the "
        "resamples: nothing to recover"
    )


def test_the_table_says_that_a_gap_is_too_unsure_for_bounds(context: RunContext) -> None:
    right, wrong = ["1.", "1."], ["no.", "no."]
    before = {"p1": right, "q1": wrong, "r1": wrong}
    after = {"p1": right, "q1": right, "r1": wrong}
    teacher = {"p1": wrong, "q1": right, "r1": right}
    _, row, _, (gap,) = told(context, before, after, teacher)
    assert row[4] == "100% (no bounds)"
    assert re.search(r"does not lead in \d\d\.\d% of the resamples$", gap)


def test_the_table_says_how_many_completions_could_not_be_judged(base: dict[str, Any]) -> None:
    source = {"type": "reasoning_gym", "dataset": "prime_factorization", "size": 2, "seed": 3}
    context = opened(verifying(base, rounds=2, verifier="reasoning_gym", source=source))
    first, second = load_prompts(ReasoningGymSource.model_validate(source)).prompts
    unsure: Completions = {
        first.prompt_id: ["I am not sure."],
        second.prompt_id: [f"{second.answer}"],
    }
    right: Completions = {prompt.prompt_id: [f"{prompt.answer}"] for prompt in (first, second)}
    *_, (line,) = told(context, unsure, right, unsure)
    assert line == (
        "completions that could not be judged, counted as wrong: round 0: 1, teacher: 1"
    )
    kept = context.folder.find(AccuracyRound, 0)
    assert kept is not None
    said = {prompt.prompt_id: (prompt.scores, prompt.num_failed) for prompt in kept.prompts}
    assert said == {first.prompt_id: ((0,), 1), second.prompt_id: ((1,), 0)}


@pytest.mark.parametrize(
    ("rounds", "divergences", "changes"),
    [
        ((0, 1), (0.5, 0.25), ["", "-50.0%"]),
        ((0, 1), (0.0, 0.25), ["", ""]),
        ((1, 2), (0.5, 0.25), ["", ""]),
    ],
)
def test_a_change_is_from_round_0_where_that_is_there_and_differs_from_the_teacher(
    rounds: Sequence[int], divergences: Sequence[float], changes: list[str]
) -> None:
    of = {"teachers": (), "contents": (), "overlap": 1, "entropy_gap": 2, "tokens": 9}
    entropies = {"student_entropy": 1, "teacher_entropy": 1, "student": "s"}
    rows = tuple(
        EvaluationRound(round=i, reverse_kl=kl, **of, **entropies)
        for i, kl in zip(rounds, divergences, strict=True)
    )
    _, table = evaluation_lines(Evaluation(divergence=rows, accuracy=None))
    cells = [line.split() for line in table.splitlines()[-2:]]
    assert [row[2] if len(row) == 6 else "" for row in cells] == changes


def test_a_verifier_that_fails_ends_the_progress_all_the_same(base: dict[str, Any]) -> None:
    said = Said()
    config = verifying(base, teacher=False, verifier="tests.test_verified:fails")
    context = open_run(RunConfig.model_validate(config), said, Worker())
    answer(context, 0, commit(context.cache, "before", {"p1": ["1."]}))
    with pytest.raises(ConfigError, match=r"row 0: evaluation\.verifier: the function failed"):
        verified.run(context)
    assert said.num_open == 0


def test_a_teacher_s_scores_are_a_file_beside_its_completions(context: RunContext) -> None:
    answer(context, 0, commit(context.cache, "before", {"p1": ["1.", "2."]}))
    answer(context, None, commit(context.cache, "teacher", {"p1": ["1.", "1."]}))
    verified.run(context)
    raw = json.loads((context.folder.teacher_path / "accuracy.json").read_text())
    kept = TeacherAccuracy.model_validate(raw)
    assert [prompt.scores for prompt in kept.prompts] == [(1, 1)]
    assert kept.verifier == FUNCTION
