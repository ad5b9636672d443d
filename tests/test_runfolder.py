"""A run keeps its meaning: what may change while it is under way, and who may work on it."""

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest

from opdcache.errors import ConfigError, Held, InputsMissing, PromptError, RunChanged
from opdcache.evaluation import divergence as evaluate
from opdcache.rollout.stage import RolloutPlan, plan_round
from opdcache.runfolder import RunContext, RunFolder, open_run
from opdcache.schemas.config import RunConfig
from opdcache.schemas.rounds import HeldOutRound, RolloutRound, ServedColumns
from opdcache.stage import Silent, Worker
from opdcache.store.cache import Cache, as_listed, commit_path, rollout_commit

from . import handmade, shards

SHORT, LONG = "hi", "a prompt of many more tokens than the other one has"


@pytest.fixture
def base(tmp_path: Path, tiny_student: Path, tiny_teacher: Path) -> dict[str, object]:
    """A run with two prompts and a held-out one; its models are copies of its own."""
    for name, folder in (("student", tiny_student), ("teacher", tiny_teacher)):
        shutil.copytree(folder, tmp_path / name)
    write_prompts(tmp_path / "prompts.jsonl", {"prompt": SHORT}, {"prompt": LONG})
    write_prompts(tmp_path / "held-out.jsonl", {"prompt": "held out"}, {"prompt": LONG * 2})
    source = {"type": "jsonl", "path": str(tmp_path / "held-out.jsonl")}
    return {
        "cache": str(tmp_path / "cache"),
        "output": str(tmp_path / "run"),
        "student": {"model": str(tmp_path / "student")},
        "teacher": {"model": str(tmp_path / "teacher")},
        "prompts": {
            "source": {"type": "jsonl", "path": str(tmp_path / "prompts.jsonl")},
            "per_round": 2,
        },
        "rollout": {"samples_per_prompt": 1, "engine": {"max_model_len": 128}},
        "evaluation": {"source": source},
    }


def write_prompts(path: Path, *rows: dict[str, str]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def opened(config: dict[str, object]) -> RunContext:
    return open_run(RunConfig.model_validate(config), Silent(), Worker())


def planned(config: dict[str, object], round_index: int = 0) -> RolloutPlan:
    return plan_round(opened(config), round_index)


def test_more_rounds_may_be_asked_of_a_run_under_way(base: dict[str, object]) -> None:
    opened(base)
    assert opened(base | {"rounds": 5}).config.rounds == 5


def test_a_run_that_an_earlier_version_began_knows_which_ids_its_models_share(
    base: dict[str, object],
) -> None:
    resolved = Path(str(base["output"])) / "resolved.json"
    now = opened(base).resolved
    stored = json.loads(resolved.read_text())
    del stored["shared_ids"]
    resolved.write_text(json.dumps(stored))
    assert opened(base).resolved == now
    assert now.shared_ids_of("any task") == now.shared_ids["teacher"] > 0


def test_a_key_that_is_taken_out_of_the_run_file_is_noticed(base: dict[str, object]) -> None:
    opened(base)
    with pytest.raises(RunChanged, match=r"rollout\.engine\.max_model_len changed"):
        opened(base | {"rollout": {"samples_per_prompt": 1}})


def test_other_held_out_prompts_are_refused_since_training_prompts_depend_on_them(
    base: dict[str, object],
) -> None:
    opened(base)
    with pytest.raises(RunChanged, match="evaluation"):
        opened({name: part for name, part in base.items() if name != "evaluation"})


def test_another_chat_template_under_the_same_vocabulary_is_noticed(
    base: dict[str, object], tmp_path: Path
) -> None:
    opened(base)
    file = next((tmp_path / "student").glob("chat_template*"))
    file.write_text("another " + file.read_text())
    with pytest.raises(RunChanged, match="tokenizer"):
        opened(base)


def teachers_of(tmp_path: Path, teacher: Path, **changes: object) -> dict[str, object]:
    """A served teacher, one of a task and a reference; a change is of the served one's backend."""
    for name in ("maths", "base"):
        if not (tmp_path / name).exists():
            shutil.copytree(teacher, tmp_path / name)
    backend = {"type": "http", "url": "http://one", "tokenizer": str(teacher), "budget_tokens": 9}
    served = {"model": "big", "revision": "1", "backend": backend | changes}
    return {
        "teacher": served,
        "teachers": {"maths": {"model": str(tmp_path / "maths")}, "code": served},
        "references": {"base": {"model": str(tmp_path / "base")}, "far": served},
        "evaluation": None,
    }


@pytest.mark.parametrize(
    "change",
    [
        {"url": "http://two"},
        {"concurrency": 1},
        {"budget_tokens": 10**9},
        {"timeout_s": 1},
        {"retries": 0},
        {"api_key_variable": "KEY"},
    ],
)
def test_how_a_served_teacher_is_asked_may_change_under_way(
    base: dict[str, object], tmp_path: Path, tiny_teacher: Path, change: dict[str, object]
) -> None:
    opened(base | teachers_of(tmp_path, tiny_teacher))
    config = opened(base | teachers_of(tmp_path, tiny_teacher, **change)).config
    ((name, value),) = change.items()
    assert {getattr(t.backend, name) for t in (config.teacher, config.teachers["code"])} == {value}
    assert getattr(config.references["far"].backend, name) == value


@pytest.mark.parametrize(
    "change",
    [
        {"max_failed_shards": 2},
        {"launch": {"max_restarts": 5}},
        {"audit": {"min_overlap": 0.1}},
    ],
)
def test_what_changes_no_shard_may_change_under_way(
    base: dict[str, object], change: dict[str, object]
) -> None:
    before = opened(base).config
    assert opened(base | change).config == type(before).model_validate(
        before.model_dump(by_alias=True) | change
    )


@pytest.mark.parametrize("part", ["teacher", "teachers.maths", "references.base"])
@pytest.mark.parametrize(
    "change",
    [
        {"revision": "another"},
        {"dtype": "float32"},
        {"prompt": {"system": "Be brief."}},
        {"backend": {"type": "vllm"}},
        {"backend": {"arguments": {"attn_implementation": "eager"}, "type": "transformers"}},
    ],
)
def test_what_a_teacher_is_may_not_change_under_way(
    base: dict[str, object], tmp_path: Path, tiny_teacher: Path, part: str, change: dict[str, Any]
) -> None:
    own: dict[str, Any] = {"model": str(tmp_path / "teacher")}

    def config(teacher: dict[str, Any]) -> dict[str, object]:
        group, _, name = part.partition(".")
        return base | ({group: {name: teacher}} if name else {"teacher": teacher})

    opened(config(own))
    with pytest.raises(RunChanged, match=re.escape(f"{part}.{next(iter(change))}")):
        opened(config(own | change))


def test_the_tokenizer_and_the_version_of_a_served_teacher_may_not_change(
    base: dict[str, object], tmp_path: Path, tiny_teacher: Path
) -> None:
    config = base | teachers_of(tmp_path, tiny_teacher)
    opened(config)
    with pytest.raises(RunChanged, match=r"teacher\.backend\.tokenizer"):
        opened(base | teachers_of(tmp_path, tiny_teacher, tokenizer=str(tmp_path / "maths")))
    served: dict[str, Any] = config["teacher"]  # type: ignore[assignment]
    with pytest.raises(RunChanged, match=r"teacher\.revision changed.*expected 1, got 2"):
        opened(config | {"teacher": served | {"revision": "2"}})


@pytest.mark.parametrize(
    ("folder", "said"), [("maths", "teacher of maths"), ("base", "reference base")]
)
def test_a_model_whose_weights_changed_is_named(
    base: dict[str, object], tmp_path: Path, tiny_teacher: Path, folder: str, said: str
) -> None:
    config = base | teachers_of(tmp_path, tiny_teacher)
    opened(config)
    weights = tmp_path / folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\1")
    with pytest.raises(RunChanged, match=f"^{said}: not what this run began with|: {said}: not"):
        opened(config)


def test_only_one_process_trains_a_run(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    with folder.alone("training", lease_s=0.5):
        with pytest.raises(Held, match="another process") as held, folder.alone("training", 0.5):
            pass
        assert held.value.exit_code == 75
    with folder.alone("training"):
        pass


def test_a_trainer_on_a_machine_that_was_lost_does_not_lock_its_run(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    claim = tmp_path / "claims" / "run" / "training.0"
    claim.parent.mkdir(parents=True)
    elsewhere = {"machine": "another", "pid": 1, "started": "1"}
    claim.write_text(json.dumps({"nonce": "0", "process": elsewhere}))
    with folder.alone("training", lease_s=0.5):
        assert not claim.exists()


def test_more_rounds_are_refused_where_the_learning_rate_depends_on_them(
    base: dict[str, object],
) -> None:
    train = {"optimizer": {"schedule": "linear"}}
    opened(base | {"train": train})
    with pytest.raises(RunChanged, match="rounds changed"):
        opened(base | {"train": train, "rounds": 5})


def test_a_corrected_answer_makes_another_rollout_shard(
    base: dict[str, object], tmp_path: Path
) -> None:
    file = tmp_path / "prompts.jsonl"
    keys = []
    for answer in ("1", "2"):
        write_prompts(file, {"prompt": SHORT, "answer": answer}, {"prompt": LONG})
        keys.append(set(planned(base).tasks))
    assert len(keys[0] & keys[1]) == 1  # the held-out shard
    assert keys[0] != keys[1]


def test_prompts_that_are_too_long_are_left_out_and_counted_held_out_ones_too(
    base: dict[str, object], tmp_path: Path
) -> None:
    prompts = base["prompts"]
    assert isinstance(prompts, dict)
    plan = planned(base | {"prompts": prompts | {"max_prompt_tokens": 30}})
    for kind in (RolloutRound, HeldOutRound):
        part = plan.parts[kind]
        assert part.dropped == {"prompt longer than max_prompt_tokens": 1}
        assert [len(task.requests) for task in part.tasks] == [1]
    with pytest.raises(PromptError, match=r"no prompt is left.*raise prompts\.max_prompt_tokens"):
        planned(
            base
            | {"output": str(tmp_path / "other"), "prompts": prompts | {"max_prompt_tokens": 1}}
        )


def test_an_evaluation_without_a_source_samples_what_the_hash_holds_out(
    base: dict[str, object], tmp_path: Path
) -> None:
    write_prompts(tmp_path / "prompts.jsonl", *({"prompt": str(i)} for i in range(40)))
    prompts = base["prompts"]
    assert isinstance(prompts, dict)
    plan = planned(
        base | {"prompts": prompts | {"held_out_share": 0.5, "per_round": 40}, "evaluation": {}}
    )
    trained, held_out = (
        {r.rendered.prompt.messages for task in plan.parts[kind].tasks for r in task.requests}
        for kind in (RolloutRound, HeldOutRound)
    )
    assert trained
    assert held_out
    assert len(trained | held_out) == 40
    assert trained & held_out == set()


def test_the_last_student_samples_held_out_prompts_alone(
    base: dict[str, object], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(RunContext, "student", lambda *_: tmp_path / "student")
    assert list(planned(base, round_index=1).parts) == [HeldOutRound]


def test_an_evaluation_of_nothing_is_an_error(base: dict[str, object]) -> None:
    with pytest.raises(InputsMissing, match="opdcache rollout"):
        evaluate.run(opened(base))
    without = {name: part for name, part in base.items() if name != "evaluation"}
    with pytest.raises(ConfigError, match="add 'evaluation'"):
        evaluate.run(opened(without | {"output": base["output"] + "2"}))  # type: ignore[operator]


def test_a_stage_is_undone_while_a_shard_that_it_pinned_is_put_aside(tmp_path: Path) -> None:
    cache, folder = Cache(str(tmp_path / "cache")), RunFolder(tmp_path / "run")
    config = RunConfig.model_validate(
        {
            "student": {"model": "s"},
            "teacher": {"model": "t"},
            "prompts": {"source": {"type": "jsonl", "path": "p"}},
        }
    )
    rollout = shards.commit_rollouts(cache)
    scores = shards.commit_scores(cache, rollout, "entropy")
    served = ServedColumns(key=scores.key, columns=("entropy",))
    files = handmade.rounds([as_listed(rollout, cached=False)], [[served]])
    for file in files:
        folder.write(file)

    def done() -> tuple[bool, bool]:
        return tuple(folder.is_done(config, stage, 0, cache) for stage in ("rollout", "score"))

    assert done() == (True, True)
    cache.put_aside(commit_path(scores), "damaged")
    assert done() == (True, False)
    shards.commit_scores(cache, rollout, "entropy")
    assert done() == (True, True)
    cache.put_aside(rollout_commit(rollout.key), "damaged")
    assert done() == (False, True)
    other = shards.commit_rollouts(cache, rows=shards.table([8, 8, 8], []))
    assert other.key == rollout.key
    assert done() == (False, True)  # the file still pins the old tokens
    again = handmade.rounds([as_listed(other, cached=False)], [[served]])[0]
    folder.write(again)
    assert folder.need(RolloutRound, 0) == files[0]
    folder.write(again, anew=True)
    assert folder.need(RolloutRound, 0) == again
    assert done() == (True, False)
