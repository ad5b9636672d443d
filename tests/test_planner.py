"""What ``opdcache plan`` says of a run: what there is to make, what is made, what it rests on."""

import json
import platform
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import yaml

from opdcache import planner
from opdcache.cli.main import _exit_code
from opdcache.errors import ConfigError, RunChanged
from opdcache.identity import key_of
from opdcache.planned import look
from opdcache.rollout.stage import RolloutPlan, plan_rounds
from opdcache.runfile import load_rates, load_run
from opdcache.runfolder import RunContext, open_run
from opdcache.schemas.manifests import RolloutManifest
from opdcache.schemas.plan import Measured, Plan, Rates, StageCost
from opdcache.schemas.rounds import RolloutRound, TrainRound
from opdcache.stage import Silent, Worker
from opdcache.store.cache import Cache, as_listed, rollout_commit
from opdcache.train.saved import Saved

from . import shards

PROMPTS = ("a", "bb", "ccc")  # a byte a token
HERE = shards.PROVENANCE.host


@pytest.fixture
def folder(tmp_path: Path, tiny_tokenizer_folder: Path) -> Path:
    """Models that have a tokenizer and a fingerprint, and prompts of one, two and three tokens."""
    for name in ("student", "teacher"):
        shutil.copytree(tiny_tokenizer_folder, tmp_path / name)
        (tmp_path / name / "config.json").write_text('{"vocab_size": 258}')
        (tmp_path / name / "model.safetensors").write_text(name)
    write_prompts(tmp_path / "prompts.jsonl", *PROMPTS)
    write_prompts(tmp_path / "held-out.jsonl", "held")
    return tmp_path


def write_prompts(path: Path, *prompts: str) -> None:
    path.write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt in prompts))


def write_run(folder: Path, name: str = "run", **changes: Any) -> Path:
    """A run of two rounds, two prompts each, two completions a prompt, two completions a shard."""
    config: dict[str, Any] = {
        "rounds": 2,
        "student": {"model": "./student"},
        "teacher": {"model": "./teacher", "dtype": "float32"},
        "prompts": {
            "source": {"type": "jsonl", "path": "prompts.jsonl"},
            "template": "raw",
            "per_round": 2,
            "order": "listed",
        },
        "rollout": {
            "samples_per_prompt": 2,
            "sampling": {"max_tokens": 10},
            "shard_samples": 2,
            "student_topk": 2,
        },
        "score": {"k": 4},
        "train": {"loss": {"k": 4}, "batch_samples": 2},
    }
    for part, values in changes.items():
        config[part] = config[part] | values if part in config and part != "rounds" else values
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump(config))
    return path


def planned(path: Path, given: dict[str, float] | None = None, **options: Any) -> Plan:
    return planner.plan(load_run(path), Rates(**given or {}), **options)


def stage(plan: Plan, name: str) -> StageCost:
    return next(cost for cost in plan.stages if cost.stage == name)


def opened(path: Path) -> RunContext:
    return open_run(load_run(path), Silent(), Worker())


def rollout_plan(context: RunContext, index: int = 0, policy: str | None = None) -> RolloutPlan:
    student = context.student(0)
    policy = policy or context.resolved.student
    (made,) = plan_rounds(context, student, policy, [index])
    return made


def make(
    context: RunContext, number: int, plan: RolloutPlan | None = None, tokens: int = 3
) -> RolloutManifest:
    """Commit one shard of a round: two completions, one of them empty."""
    task = list((plan or rollout_plan(context)).tasks.values())[number]
    attempt = context.cache.attempt(key_of(task.identity))
    rows = shards.table(list(range(tokens)), [])
    manifest = shards.write_rollouts(attempt, task.identity, rows)
    assert context.cache.commit(attempt, manifest)
    return manifest


def score(context: RunContext, rollouts: RolloutManifest, k: int = 4) -> int:
    """Commit what the run needs of a shard's scores; gives its bytes."""
    columns = sorted(context.config.columns_of(context.config.teacher))
    manifest = shards.commit_scores(
        context.cache,
        rollouts,
        *columns,
        teacher=context.resolved.teacher,
        num_ids=context.resolved.vocab_size,
        k=k,
    )
    return sum(entry.size_bytes for entry in manifest.objects)


def pin(context: RunContext, index: int, *manifests: RolloutManifest) -> None:
    """Write the file of a sampled round."""
    listed = tuple(as_listed(manifest, cached=False) for manifest in manifests)
    context.folder.write(
        RolloutRound(round=index, student="s", shards=listed, dropped={}, elapsed_s=1.0)
    )


def trained(context: RunContext, index: int, **changes: Any) -> None:
    values = {"num_updates": 2, "num_samples": 4, "num_tokens": 30, "elapsed_s": 2.0, **changes}
    context.folder.write(TrainRound(round=index, student="f" * 64, dropped={}, **values))


def files(folder: Path) -> set[Path]:
    return set(folder.rglob("*"))


def test_prompts_shards_and_updates_are_counted_on_the_schedule_of_every_round(
    folder: Path,
) -> None:
    plan = planned(write_run(folder))
    # rounds of (a, bb) and (ccc, a), each prompt twice
    assert plan.prompts.num_requests == 8
    assert plan.prompts.num_tokens == 2 * (1 + 2) + 2 * (3 + 1)
    assert [cost.num_units for cost in plan.stages] == [4, 4, 4]
    assert all(cost.num_done == 0 for cost in plan.stages)


def test_one_round_can_be_planned(folder: Path) -> None:
    plan = planned(write_run(folder), round_index=1)
    assert plan.rounds == (1,)
    assert plan.prompts.num_tokens == 2 * (3 + 1)


def test_a_round_that_is_not_in_the_run_is_refused(folder: Path) -> None:
    with pytest.raises(ConfigError, match="no round 2 in this run; its last one is 1"):
        planned(write_run(folder), round_index=2)


def test_prompts_that_are_left_out_are_counted_a_round(folder: Path) -> None:
    path = write_run(folder, prompts={"max_prompt_tokens": 2})
    long = {"prompt longer than max_prompt_tokens": 1}
    assert planned(path).prompts.dropped == ({}, long)


def test_held_out_completions_are_sampled_of_every_student_and_not_scored(folder: Path) -> None:
    evaluation = {
        "source": {"type": "jsonl", "path": "held-out.jsonl"},
        "samples_per_prompt": 3,
        "sampling": {"max_tokens": 5},
    }
    plan = planned(write_run(folder, evaluation=evaluation))
    assert len(plan.prompts.dropped) == 2  # the last student is not trained
    assert plan.rounds == (0, 1, 2)
    assert plan.prompts.num_held_out_requests == 9
    assert plan.prompts.num_held_out_tokens == 9 * len("held")
    assert stage(plan, "rollout").most_tokens == 8 * 10 + 9 * 5
    assert stage(plan, "score").most_tokens == 8 * 10


def test_without_evidence_a_completion_is_as_long_as_it_may_be(folder: Path) -> None:
    plan = planned(write_run(folder, rollout={"engine": {"max_model_len": 12}}))
    # prompts of 1 and 2 tokens leave room for 10, one of 3 for 9
    assert stage(plan, "rollout").num_tokens == 6 * 10 + 2 * 9
    assert plan.completion_tokens.value is None
    assert "upper bound" in plan.completion_tokens.source


def test_a_later_epoch_costs_training_alone(folder: Path) -> None:
    plan = planned(write_run(folder, train={"epochs": 3}))
    assert stage(plan, "score").num_tokens == 80
    assert (stage(plan, "train").num_tokens, stage(plan, "train").num_units) == (240, 12)


def test_nothing_is_written(folder: Path) -> None:
    path = write_run(folder)
    before = files(folder)
    planned(path)
    assert files(folder) == before


def test_nothing_is_written_where_the_cache_has_something(folder: Path) -> None:
    context = opened(write_run(folder))
    make(context, 0)
    other = write_run(folder, "other", train={"batch_samples": 4})
    before = files(folder)
    assert stage(planned(other), "rollout").num_done == 1
    assert files(folder) == before


def test_a_cache_that_is_gone_is_not_made_to_plan_a_run_that_has_begun(folder: Path) -> None:
    path = write_run(folder)
    opened(path)
    shutil.rmtree(folder / "cache")
    planned(path)
    assert not (folder / "cache").exists()


def test_a_shard_that_is_in_the_cache_costs_nothing_and_is_counted_exactly(folder: Path) -> None:
    path = write_run(folder)
    context = opened(path)
    manifest = make(context, 1)
    plan = planned(path, {"rollout": 2.0}, round_index=0)
    cost = stage(plan, "rollout")
    assert (cost.num_units, cost.num_done) == (2, 1)
    assert (cost.most_tokens, cost.most_left_tokens) == (3 + 20, 20)
    assert cost.most_left_s == 10
    per_token = plan.rollout_bytes_per_token.value
    assert per_token == sum(entry.size_bytes for entry in manifest.objects) / 3
    assert cost.most_size_bytes == pytest.approx(23 * per_token, abs=1)


def test_scores_that_serve_a_shard_of_the_cache_cost_nothing(folder: Path) -> None:
    path = write_run(folder)
    context = opened(path)
    first, second = make(context, 0), make(context, 1, tokens=4)
    size = score(context, first)
    plan = planned(path, round_index=0)
    cost = stage(plan, "score")
    assert (cost.num_done, cost.num_tokens, cost.left_tokens) == (1, 7, second.num_tokens)
    assert cost.size_bytes == size + round(4 * size / 3)
    assert plan.score_bytes_per_token.source == "1 shard alike in the cache"


def test_scores_of_a_larger_k_serve_and_are_no_measure_of_bytes(folder: Path) -> None:
    path = write_run(folder)
    context = opened(path)
    score(context, make(context, 0), k=8)
    plan = planned(path, round_index=0)
    assert stage(plan, "score").num_done == 1
    assert plan.score_bytes_per_token.source.startswith("estimated")


def test_later_rounds_hang_on_students_that_do_not_exist_yet(folder: Path) -> None:
    path = write_run(folder)
    context = opened(path)
    # the same tasks under the first student's name: not what round 1 will make
    make(context, 0, rollout_plan(context, 1))
    plan = planned(path)
    assert stage(plan, "rollout").num_done == 0
    assert any("from round 1 on" in note for note in plan.notes)


def test_a_round_that_is_sampled_and_not_trained_leaves_the_next_unknown(folder: Path) -> None:
    path = write_run(folder)
    context = opened(path)
    pin(context, 0, make(context, 0), make(context, 1))
    assert any("from round 1 on" in note for note in planned(path).notes)


def test_keys_of_the_round_whose_student_exists_are_known(folder: Path) -> None:
    path = write_run(folder)
    context = opened(path)
    pin(context, 0, make(context, 0), make(context, 1))
    trained(context, 0)
    make(context, 0, rollout_plan(context, 1, policy="f" * 64))
    plan = planned(path)
    assert stage(plan, "rollout").num_done == 3
    assert plan.notes == ()


def test_a_sampled_round_counts_by_what_it_pinned(folder: Path) -> None:
    path = write_run(folder)
    context = opened(path)
    manifests = make(context, 0), make(context, 1, tokens=5)
    pin(context, 0, *manifests)
    write_prompts(folder / "prompts.jsonl", "other", "ones", "now")
    cost = stage(planned(path, round_index=0), "rollout")
    assert (cost.num_done, cost.num_tokens, cost.left_s) == (2, 8, 0)


def test_a_pinned_shard_that_was_put_aside_is_to_be_made_again(folder: Path) -> None:
    path = write_run(folder)
    context = opened(path)
    manifests = make(context, 0), make(context, 1)
    pin(context, 0, *manifests)
    context.cache.put_aside(rollout_commit(manifests[0].key), "a test")
    cost = stage(planned(path, round_index=0), "rollout")
    assert (cost.num_units, cost.num_done) == (2, 1)


def test_completions_are_as_long_as_in_the_run_s_finished_rounds(folder: Path) -> None:
    path = write_run(folder)
    context = opened(path)
    pin(context, 0, make(context, 0), make(context, 1, tokens=5))  # 8 tokens in 4 completions
    plan = planned(path, round_index=1)
    assert plan.completion_tokens.value == 2
    assert plan.completion_tokens.source == "1 finished round of this run"
    cost = stage(plan, "rollout")
    assert (cost.num_tokens, cost.most_tokens) == (8, 40)


def test_completions_are_as_long_as_those_of_the_same_student_and_sampling(folder: Path) -> None:
    context = opened(write_run(folder))
    make(context, 0)  # 3 tokens in 2 completions
    same = planned(write_run(folder, "same", seed=1))
    assert same.completion_tokens.value == 1.5
    assert same.completion_tokens.source == (
        "1 shard of the same student and sampling in the cache"
    )
    hotter = {"sampling": {"max_tokens": 10, "temperature": 1.5}}
    assert planned(write_run(folder, "other", rollout=hotter)).completion_tokens.value is None


def test_tasks_have_lengths_of_their_own(folder: Path) -> None:
    rows = [{"prompt": "a", "task": "short"}, {"prompt": "bb", "task": "long"}]
    (folder / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    path = write_run(folder)
    context = opened(path)
    tasks = [task.task for task in rollout_plan(context).tasks.values()]
    assert tasks == ["long", "short"]
    listed = [
        as_listed(make(context, i, tokens=n), cached=False).model_copy(update={"task": task})
        for i, (task, n) in enumerate(zip(tasks, (8, 2), strict=True))
    ]
    context.folder.write(
        RolloutRound(round=0, student="s", shards=tuple(listed), dropped={}, elapsed_s=1.0)
    )
    assert planned(path, round_index=1).score_tokens == {"long": 8, "short": 2}


def test_rates_are_measured_on_what_this_machine_made(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(platform, "node", lambda: HERE)
    path = write_run(folder)
    context = opened(path)
    manifest = make(context, 0)
    score(context, manifest)
    plan = planned(path)
    # 3 tokens in the second that the manifests say
    assert stage(plan, "rollout").tokens_per_s.value == 3
    assert stage(plan, "score").tokens_per_s.source == f"1 shard made on {HERE}"
    assert stage(plan, "train").tokens_per_s.value is None


@pytest.mark.parametrize(
    "changes",
    [{"rollout": {"dtype": "float16"}}, {"rollout": {"engine": {"tensor_parallel_size": 2}}}],
)
def test_another_engine_is_no_measure_of_the_rate(
    folder: Path, monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any]
) -> None:
    monkeypatch.setattr(platform, "node", lambda: HERE)
    make(opened(write_run(folder)), 0)
    other = planned(write_run(folder, "other", **changes))
    assert stage(other, "rollout").tokens_per_s.value is None


@pytest.mark.parametrize(
    "backend",
    [
        {"type": "vllm"},
        {"type": "transformers", "arguments": {"quantization_config": {"bits": 4}}},
    ],
)
def test_another_backend_of_the_teacher_is_no_measure_of_its_rate(
    folder: Path, monkeypatch: pytest.MonkeyPatch, backend: dict[str, Any]
) -> None:
    monkeypatch.setattr(platform, "node", lambda: HERE)
    path = write_run(folder)
    context = opened(path)
    score(context, make(context, 0))
    other = planned(write_run(folder, "other", teacher={"backend": backend}))
    assert stage(planned(path), "score").tokens_per_s.value == 3
    assert stage(other, "score").tokens_per_s.value is None


def test_without_a_rate_no_time_is_guessed(folder: Path) -> None:
    path = write_run(folder)
    context = opened(path)
    score(context, make(context, 0))  # by another machine
    plan = planned(path)
    assert [cost.left_s for cost in plan.stages] == [None, None, None]
    assert {cost.tokens_per_s.source for cost in plan.stages} == {"no rate: give --rates"}
    assert plan.teacher is None


def test_the_learner_s_rate_is_that_of_the_run_s_train_rounds(folder: Path) -> None:
    path = write_run(folder)
    context = opened(path)
    pin(context, 0, make(context, 0), make(context, 1))
    trained(context, 0, num_tokens=30, elapsed_s=2.0)
    cost = stage(planned(path), "train")
    assert (cost.tokens_per_s.value, cost.num_units, cost.num_done) == (15, 4, 2)
    assert cost.left_s == cost.left_tokens / 15


def test_updates_of_a_round_under_way_count(folder: Path) -> None:
    path = write_run(folder)
    context = opened(path)
    context.folder.metrics_path.write_text('{"update": 0, "round": 0}\n')
    cost = stage(planned(path, round_index=0), "train")
    assert (cost.num_done, cost.most_left_tokens) == (1, 20)


def test_workers_share_the_shards_of_a_round(folder: Path) -> None:
    path = write_run(folder, rollout={"shard_samples": 1, "sampling": {"max_tokens": 10}})
    rates = {"rollout": 10.0, "score": 5.0, "train": 1.0}
    plan = planned(path, rates, num_workers=3)
    # four shards of 10 tokens a round: two turns, in each of two rounds
    assert [cost.left_s for cost in plan.stages] == [4, 8, 80]


def test_a_teacher_is_paid_for_its_scores_alone(folder: Path) -> None:
    path = write_run(folder, train={"epochs": 3})
    plan = planned(path, {"rollout": 1.0, "score": 4.0, "train": 2.0}, num_workers=7)
    assert plan.teacher is not None
    assert (plan.teacher.resident_s, plan.teacher.cached_s) == (80 + 20 + 120, 20)
    assert plan.teacher.shared[0].round_0_s == 10 + 10 / 2


def test_what_is_made_already_is_part_of_the_teacher_s_cost(folder: Path) -> None:
    path = write_run(folder)
    context = opened(path)
    score(context, make(context, 0))
    plan = planned(path, {"rollout": 1.0, "score": 1.0, "train": 1.0}, round_index=0)
    assert plan.teacher is not None
    assert plan.teacher.cached_s == 3 + 3  # the other shard is as long


def test_an_update_reads_its_samples_bytes(folder: Path) -> None:
    path = write_run(folder)
    plan = planned(path, {"train": 5.0})
    per_token = plan.rollout_bytes_per_token.value + plan.score_bytes_per_token.value
    assert plan.reading.update_bytes == pytest.approx(2 * 10 * per_token, abs=1)
    assert plan.reading.bytes_per_s == pytest.approx(5 * per_token, abs=1)
    assert plan.reading.reread_bytes == 0


def test_more_shards_than_the_learner_holds_are_read_again(folder: Path) -> None:
    write_prompts(folder / "prompts.jsonl", *(f"prompt {i}" for i in range(64)))
    path = write_run(folder, prompts={"per_round": 64}, rounds=1)
    reading = planned(path).reading
    assert reading.most_shards == 64
    # half of an update's two samples need a shard that is not held, and a shard is two samples
    assert reading.reread_bytes == pytest.approx(reading.update_bytes, abs=2)


def test_the_learner_holds_as_many_shards_as_the_plan_says() -> None:
    from opdcache.train import samples

    assert planner.HELD_SHARDS == samples._SHARDS_IN_MEMORY


def test_a_manifest_that_is_unsound_is_left_out_and_counted(folder: Path) -> None:
    path = write_run(folder)
    Cache(str(folder / "cache")).objects.put("commits/rollouts/other.json", b"{}")
    assert any("1 of rollouts, unsound" in note for note in planned(path).notes)


def test_another_run_file_than_the_run_began_with_is_refused(folder: Path) -> None:
    opened(write_run(folder))
    with pytest.raises(RunChanged, match=r"score\.k changed"):
        planned(write_run(folder, score={"k": 8}))


def test_a_model_of_the_hub_is_not_downloaded_to_plan(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import huggingface_hub

    asked: list[Any] = []

    def snapshot(model: str, *, allow_patterns: Any = None, **options: Any) -> str:
        if options.get("local_files_only"):
            raise OSError("not here")
        asked.append((model, allow_patterns))
        return str(folder / "student")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot)
    make(opened(write_run(folder)), 0)
    hub = {"student": {"model": "someone/student"}, "teacher": {"model": "someone/teacher"}}
    plan = planned(write_run(folder, "hub", **hub))
    ((model, patterns),) = asked
    assert model == "someone/student"
    assert not any("safetensors" in pattern or "bin" in pattern for pattern in patterns)
    assert plan.prompts.num_requests == 8
    assert any("not on this machine" in note for note in plan.notes)


def test_an_empty_cache_needs_no_fingerprints(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def read(*_: object) -> None:
        raise AssertionError("a model was read")

    monkeypatch.setattr("opdcache.identity.FileHashes.of", read)
    assert look(load_run(write_run(folder))).context.resolved.student == ""


def test_rounds_planned_together_are_those_planned_alone(folder: Path) -> None:
    context = opened(write_run(folder))
    student = context.student(0)
    together = list(plan_rounds(context, student, "p", [0, 1]))
    alone = [next(iter(plan_rounds(context, student, "p", [index]))) for index in (0, 1)]
    assert [list(plan.tasks) for plan in together] == [list(plan.tasks) for plan in alone]
    assert set(together[0].tasks) != set(together[1].tasks)


PARAMETERS = 5 * 7 + 3


@pytest.fixture
def weighing(folder: Path) -> Path:
    """A student whose weights are in two files, in another precision than it is trained in."""
    from safetensors.numpy import save_file

    student = folder / "student"
    (student / "model.safetensors").unlink()
    save_file({"wide": np.zeros((5, 7), np.float16)}, student / "model-1.safetensors")
    save_file({"short": np.zeros(3, np.float16)}, student / "model-2.safetensors")
    files = {"wide": "model-1.safetensors", "short": "model-2.safetensors"}
    (student / "model.safetensors.index.json").write_text(json.dumps({"weight_map": files}))
    return folder


def test_disk_is_estimated_by_the_parameters_and_the_training_dtype(weighing: Path) -> None:
    disk = planned(write_run(weighing, train={"dtype": "float32", "zero_stage": 0})).disk
    assert (disk.student_bytes.value, disk.checkpoint_bytes.value) == (4 * 38, 12 * 38)
    assert disk.student_bytes.source == f"estimated: {PARAMETERS} parameters of 4 bytes"
    assert (disk.num_students, disk.num_done) == (2, 0)
    assert disk.most_bytes == disk.most_left_bytes == (2 * 4 + 2 * 12) * PARAMETERS
    assert disk.free_at == str(weighing)
    assert disk.free_bytes == pytest.approx(shutil.disk_usage(weighing).free, rel=0.1)


def test_disk_is_measured_once_a_round_is_trained(weighing: Path) -> None:
    path = write_run(weighing)
    context = opened(path)
    folder = context.folder
    trained(context, 0)
    newest = Saved(round=0, num_updates=2, num_ranks=1)
    sizes = {"students/001": 100, "students/.002-draft": 7}
    sizes |= {f"checkpoints/{newest.tag}": 1000, "checkpoints/half-of-the-next": 3000}
    for name, size in sizes.items():
        (folder.path / name).mkdir(parents=True)
        (folder.path / name / "weights").write_bytes(bytes(size))
    assert planned(path).disk.checkpoint_bytes.value == 14 * PARAMETERS  # none is whole
    newest.become_newest(folder.checkpoints)
    disk = planned(path).disk
    assert disk.student_bytes == Measured(value=100, source="this run's students")
    assert disk.checkpoint_bytes == Measured(value=1000, source="this run's checkpoint")
    assert (disk.num_done, disk.most_bytes, disk.most_left_bytes) == (1, 2200, 1100)
    trained(context, 1)
    assert planned(path).disk.most_left_bytes == 0


def test_disk_of_one_round_has_one_student(weighing: Path) -> None:
    disk = planned(write_run(weighing), round_index=1).disk
    assert (disk.num_students, disk.most_bytes) == (1, (2 + 2 * 14) * PARAMETERS)


def test_disk_of_adapters_is_known_when_they_are_saved(weighing: Path) -> None:
    disk = planned(write_run(weighing, train={"lora": {"rank": 4}})).disk
    assert (disk.student_bytes.value, disk.checkpoint_bytes.value) == (2 * PARAMETERS, None)
    assert disk.most_bytes == disk.most_left_bytes == 2 * 2 * PARAMETERS


def test_disk_is_unknown_where_weights_are_not_all_safetensors(weighing: Path) -> None:
    (weighing / "student" / "model-2.safetensors").unlink()
    disk = planned(write_run(weighing)).disk
    assert disk.student_bytes.value is disk.checkpoint_bytes.value is disk.most_bytes is None


def test_disk_counts_rounds_whose_rollouts_another_run_has_yet_to_make(weighing: Path) -> None:
    (weighing / "elsewhere").mkdir()
    evaluation = {"source": {"type": "jsonl", "path": "held-out.jsonl"}, "num_prompts": 1}
    path = write_run(weighing, rollouts={"from": "elsewhere"}, evaluation=evaluation)
    assert planned(path).disk.num_students == 2
    assert planned(path, round_index=2).disk.num_students == 0  # held-out completions alone


def test_the_command_says_where_the_disk_is_too_small(
    weighing: Path, command: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert "too little" not in command()
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=1000))
    printed = command()
    assert "2 students of 76 bytes (estimated: 38 parameters of 2 bytes)" in printed
    line = f"  1.2 kB at most, 1.2 kB of it to come; 1.0 kB free at {weighing}"
    assert f"{line}\n  too little" in printed


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("scores: 1", "unknown key 'scores'.*did you mean 'score'"),
        ("score: 0", "score: .*greater than 0"),
        ("score: .inf", "score: .*finite"),
        ("score: fast", "score: .*number"),
        ("- 1", "a rates file is a mapping"),
    ],
)
def test_a_rates_file_that_says_something_else_is_refused(
    tmp_path: Path, text: str, message: str
) -> None:
    (tmp_path / "rates.yaml").write_text(text)
    with pytest.raises(ConfigError, match=message):
        load_rates(tmp_path / "rates.yaml")


@pytest.fixture
def command(folder: Path, capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """``opdcache plan`` on a run file with given rates; gives what it prints."""

    def run(*options: str) -> str:
        path = write_run(folder)
        (folder / "rates.yaml").write_text("{rollout: 100, score: 50, train: 10}")
        arguments = ["plan", str(path), "--rates", str(folder / "rates.yaml"), *options]
        assert _exit_code(arguments) == 0
        return capsys.readouterr().out

    return run


def test_the_command_prints_a_line_a_stage_and_what_it_rests_on(
    command: Callable[..., str],
) -> None:
    printed = command().splitlines()
    rows = [line.split() for line in printed]
    (score_row,) = [row for row in rows if row[:1] == ["score"]]
    assert score_row[1:5] == ["0/4", "shards", "80", "80"]
    assert score_row[-2:] == ["1.6", "s"]
    assert any(line.startswith("rates: rollout 100.0 tokens/s (--rates)") for line in printed)
    assert any(line.startswith("teacher: 1.6 s") and ", 10 s" in line for line in printed)


def test_the_command_prints_json_of_the_documented_keys(command: Callable[..., str]) -> None:
    plan = Plan.model_validate_json(command("--json", "--workers", "2"))
    assert (plan.num_workers, plan.teacher is not None) == (2, True)


def test_a_faulty_rates_file_is_one_line_and_exit_code_2(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (folder / "rates.yaml").write_text("trian: 1")
    rates = ["--rates", str(folder / "rates.yaml")]
    assert _exit_code(["plan", str(write_run(folder)), *rates]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.endswith("unknown key 'trian'; did you mean 'train'? [OPD101]")
