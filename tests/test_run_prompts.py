"""A run's prompts: what is held out, what is trained on, what is left out and counted."""

import hashlib
import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from opdcache.errors import PromptError
from opdcache.prompts import Prompt, PromptSet
from opdcache.run_prompts import RunPrompts, split_point
from opdcache.schemas.config import RunConfig

NUMBERS = [{"prompt": f"question {i}"} for i in range(200)]
SENTENCE = "Ann has one apple and two pears how many pieces of fruit has she in all"
HELD_OUT, CHEAP = "held out for evaluation", {"num_prompts": 1000}


def asked(prompts: PromptSet) -> list[str]:
    return [prompt.messages[-1][1] for prompt in prompts.prompts]


def chosen(
    folder: Path,
    rows: list[dict[str, object]] | list[dict[str, str]],
    evaluation: dict[str, object] | None = None,
    **prompts: object,
) -> RunPrompts:
    """Prompts of a run on rows of a file; an evaluation's rows are put in one of its own."""
    config = {"rounds": 3, "student": {"model": "s"}, "teacher": {"model": "t"}}
    how = dict(evaluation or {})
    if "rows" in how:
        how["source"] = written(folder / "evaluation.jsonl", how.pop("rows"))
    config["prompts"] = {"source": written(folder / "prompts.jsonl", rows), **prompts}
    config["evaluation"] = None if evaluation is None else how
    return RunPrompts(RunConfig.model_validate(config))


def written(file: Path, rows: object) -> dict[str, str]:
    assert isinstance(rows, list)
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return {"type": "jsonl", "path": str(file)}


def prompt(text: str) -> Prompt:
    return Prompt("id", (("user", text),), "task", None, "content")


@given(st.text(st.characters(codec="utf-8")), st.floats(0, 1))
def test_a_prompt_is_held_out_when_the_digest_of_its_text_is_below_the_share(
    text: str, share: float
) -> None:
    value = ["opdcache held-out split 1", [["user", text]]]
    told = json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode()
    first_52 = int.from_bytes(hashlib.sha256(told).digest(), "big") >> 204

    assert (split_point(prompt(text)) < share) == (first_52 < share * 2**52)


def test_a_share_is_about_that_much_of_the_prompts() -> None:
    below = [split_point(prompt(f"question {i}")) < 0.1 for i in range(10_000)]

    assert abs(sum(below) - 1000) < 150  # five standard deviations


def test_a_larger_share_holds_out_what_a_smaller_one_does_and_more(tmp_path: Path) -> None:
    small, large = (
        set(asked(chosen(tmp_path, NUMBERS, CHEAP, held_out_share=share).held_out))
        for share in (0.1, 0.3)
    )

    assert small
    assert small < large


def test_the_split_is_the_same_in_every_run(tmp_path: Path) -> None:
    def split(rows: list[dict[str, object]], **prompts: object) -> set[str]:
        run = chosen(tmp_path, rows, CHEAP, held_out_share=0.2, **prompts)
        return set(asked(run.held_out))

    plain: list[dict[str, object]] = [dict(row) for row in NUMBERS]
    labelled = [row | {"id": i, "task": "other", "answer": "1"} for i, row in enumerate(plain)]
    chats = [{"messages": [{"role": "user", "content": row["prompt"]}]} for row in plain]

    first = split(plain)
    assert 20 < len(first) < 60
    assert split(plain[::-1], order="listed", per_round=3) == first
    assert split(labelled, system="be nice") == first
    assert split(chats) == first
    assert split(plain[:100]) == first & {str(row["prompt"]) for row in plain[:100]}


def test_what_is_held_out_is_in_no_round_and_counted(tmp_path: Path) -> None:
    run = chosen(tmp_path, NUMBERS, CHEAP, held_out_share=0.3, per_round=150)
    held_out = set(asked(run.held_out))

    trained = {text for index in range(3) for text in asked(run.of_round(index))}

    assert trained | held_out == {row["prompt"] for row in NUMBERS}
    assert trained & held_out == set()
    assert run.of_round(0).dropped == {HELD_OUT: len(held_out)}


def test_what_is_held_out_is_not_trained_on_under_another_id_or_task(tmp_path: Path) -> None:
    rows = [
        {"prompt": row["prompt"], "id": f"{task}{i}", "task": task}
        for i, row in enumerate(NUMBERS)
        for task in ("one", "two")
    ]
    run = chosen(tmp_path, rows, CHEAP, held_out_share=0.3)

    assert len(run.held_out.prompts) + len(run.training.prompts) == 400
    assert set(asked(run.held_out)) & set(asked(run.training)) == set()


def test_a_share_holds_out_without_an_evaluation_too(tmp_path: Path) -> None:
    with_one = chosen(tmp_path, NUMBERS, CHEAP, held_out_share=0.3).training
    without = chosen(tmp_path, NUMBERS, held_out_share=0.3)

    assert without.training == with_one
    assert without.held_out.prompts == []


def test_an_evaluation_of_some_takes_the_same_in_any_order_and_none_is_trained_on(
    tmp_path: Path,
) -> None:
    few = {"num_prompts": 5}
    run = chosen(tmp_path, NUMBERS, few, held_out_share=0.3)
    again = chosen(tmp_path, NUMBERS[::-1], few, held_out_share=0.2)
    every = chosen(tmp_path, NUMBERS, CHEAP, held_out_share=0.3)

    assert asked(run.held_out) == asked(again.held_out)
    assert run.training == every.training
    assert run.held_out.dropped == {
        "more than evaluation.num_prompts": len(every.held_out.prompts) - 5
    }


def test_a_split_that_holds_out_nothing_is_an_error_for_its_evaluation(tmp_path: Path) -> None:
    run = chosen(tmp_path, NUMBERS[:3], CHEAP, held_out_share=1e-6)

    with pytest.raises(PromptError, match="the hash holds out no prompt; raise it"):
        _ = run.held_out


def test_an_evaluation_s_own_prompts_are_not_trained_on_under_another_task(tmp_path: Path) -> None:
    rows = [{"prompt": "a", "task": "one"}, {"prompt": "b", "task": "one"}]
    run = chosen(tmp_path, rows, {"rows": [{"prompt": "a", "task": "two"}]})

    assert asked(run.training) == ["b"]
    assert run.training.dropped == {HELD_OUT: 1}


def test_a_source_and_a_share_hold_out_both(tmp_path: Path) -> None:
    split = asked(chosen(tmp_path, NUMBERS, CHEAP, held_out_share=0.1).held_out)
    other = next(row for row in NUMBERS if row["prompt"] not in split)

    run = chosen(tmp_path, NUMBERS, {"rows": [other]}, held_out_share=0.1)

    assert asked(run.held_out) == [other["prompt"]]
    assert run.training.dropped == {HELD_OUT: len(split) + 1}


def test_nothing_left_to_train_on_is_an_error_with_the_reasons(tmp_path: Path) -> None:
    run = chosen(tmp_path, NUMBERS[:2], {"rows": NUMBERS[:2]})

    with pytest.raises(PromptError, match=r"no prompt is left to train on .*evaluation': 2"):
        _ = run.training


def test_a_task_without_a_share_is_left_out_and_counted(tmp_path: Path) -> None:
    rows = [{"prompt": f"{task} {i}", "task": task} for task in ("a", "b", "c") for i in range(4)]

    run = chosen(tmp_path, rows, shares={"a": 1, "b": 1}, per_round=2)

    assert {p.task for p in run.training.prompts} == {"a", "b"}
    assert run.of_round(0).dropped == {HELD_OUT: 0, "task without a share": 4}


def test_a_share_of_a_task_that_is_not_there_is_an_error_with_those_that_are(
    tmp_path: Path,
) -> None:
    rows = [{"prompt": task, "task": task} for task in ("code", "maths")]

    with pytest.raises(PromptError, match=r"no prompt has task 'math' .*one of code, maths"):
        _ = chosen(tmp_path, rows, shares={"math": 1}).training


def test_a_task_that_is_held_out_whole_is_an_error(tmp_path: Path) -> None:
    rows = [{"prompt": "a", "task": "one"}, {"prompt": "b", "task": "two"}]
    run = chosen(tmp_path, rows, {"rows": [{"prompt": "b"}]}, shares={"one": 1, "two": 1})

    with pytest.raises(PromptError, match="no prompt of task 'two' is left to train on"):
        run.of_round(0)


def test_rounds_that_are_too_many_are_refused_when_the_first_is_planned(tmp_path: Path) -> None:
    run = chosen(tmp_path, NUMBERS, per_round=100, max_epochs=1)

    with pytest.raises(PromptError, match="3 rounds walk through the set"):
        run.of_round(0)


def test_a_near_copy_of_an_evaluation_prompt_is_left_out_and_counted(tmp_path: Path) -> None:
    rows = [{"prompt": SENTENCE + " now"}, {"prompt": "something else altogether"}]
    run = chosen(tmp_path, rows, {"rows": [{"prompt": SENTENCE}]}, near_duplicates={})

    assert asked(run.of_round(0))[0] == "something else altogether"
    assert run.training.dropped == {HELD_OUT: 0, "near copy of an evaluation prompt": 1}


def test_a_system_message_makes_no_near_copies(tmp_path: Path) -> None:
    def chat(text: str) -> dict[str, object]:
        system = {"role": "system", "content": " ".join(f"rule{i}" for i in range(100))}
        return {"messages": [system, {"role": "user", "content": text}]}

    run = chosen(tmp_path, [chat("a b c d")], {"rows": [chat("e f g h")]}, near_duplicates={})

    assert asked(run.training) == ["a b c d"]


def test_a_near_copy_of_what_the_hash_holds_out_is_left_out_though_it_is_not_evaluated(
    tmp_path: Path,
) -> None:
    rows = [{"prompt": f"{SENTENCE} {i}"} for i in range(20)] + [{"prompt": "x y z"}]
    kept = [row for row in rows if split_point(prompt(row["prompt"])) >= 0.3]
    assert 5 < len(kept) < 20

    run = chosen(tmp_path, rows, held_out_share=0.3, near_duplicates={"threshold": 0.8})

    assert asked(run.training) == [p["prompt"] for p in kept if p["prompt"] == "x y z"]
    assert run.training.dropped["near copy of an evaluation prompt"] == len(kept) - 1


def test_an_evaluation_source_is_never_trained_on_however_little_of_it_is_asked(
    tmp_path: Path,
) -> None:
    evaluation = {"rows": NUMBERS[:100], "num_prompts": 10}
    run = chosen(tmp_path, NUMBERS, evaluation)

    assert asked(run.held_out) == [row["prompt"] for row in NUMBERS[:10]]
    assert sorted(asked(run.training)) == sorted(row["prompt"] for row in NUMBERS[100:])
    assert run.training.dropped[HELD_OUT] == 100


def test_a_near_copy_of_any_prompt_of_the_evaluation_source_is_left_out(tmp_path: Path) -> None:
    evaluation = {"rows": [{"prompt": "another one"}, {"prompt": SENTENCE}], "num_prompts": 1}
    rows: list[dict[str, object]] = [*NUMBERS[:3], {"prompt": f"{SENTENCE} today"}]
    run = chosen(tmp_path, rows, evaluation, near_duplicates={"threshold": 0.6})

    assert sorted(asked(run.training)) == [row["prompt"] for row in NUMBERS[:3]]


def test_a_teacher_of_a_task_that_no_prompt_has_is_refused(tmp_path: Path) -> None:
    config = {
        "student": {"model": "s"},
        "teacher": {"model": "t"},
        "teachers": {"mahts": {"model": "m"}},
        "prompts": {"source": written(tmp_path / "p.jsonl", [{"prompt": "1", "task": "maths"}])},
    }

    with pytest.raises(PromptError, match=r"teachers: no prompt has task 'mahts'.*one of maths"):
        RunPrompts(RunConfig.model_validate(config)).training  # noqa: B018
