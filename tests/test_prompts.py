"""Prompt sources, their faults by place, the schedule across rounds, rendering."""

import hashlib
import json
import random
import sys
from collections import Counter
from fractions import Fraction
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from opdcache.errors import NotInstalled, PromptError
from opdcache.prompts import (
    Prompt,
    PromptSet,
    RenderedPrompt,
    apportioned,
    check_schedule,
    load_prompts,
    render,
    requests,
    scheduled,
)
from opdcache.schemas.prompts import (
    HuggingFaceSource,
    JsonlSource,
    ParquetSource,
    PromptsConfig,
    ReasoningGymSource,
)


class WordTokenizer:
    """A word is a token; its id is the word's length."""

    def __init__(self, chat_template: str | None = "yes") -> None:
        self.chat_template = chat_template

    def get_vocab(self) -> dict[str, int]:
        return {}

    def encode(self, text: str) -> list[int]:
        return [len(word) for word in text.split()]

    def apply_chat_template(self, conversation: Any, **kwargs: Any) -> Any:
        assert kwargs == {"add_generation_prompt": True, "tokenize": True, "return_dict": False}
        if any(m["role"] == "alien" for m in conversation):
            raise RuntimeError("roles must\nalternate")
        return [
            token
            for message in conversation
            for token in (100 + len(message["role"]), *self.encode(message["content"]))
        ]


def jsonl(folder: Path, *rows: object, **how: object) -> PromptSet:
    """Prompts of a file whose lines are the rows: text as it is, anything else as JSON."""
    file = folder / "prompts.jsonl"
    lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
    file.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    return load_prompts(JsonlSource.model_validate({"type": "jsonl", "path": str(file), **how}))


def parquet(folder: Path, rows: list[dict[str, object]], **how: object) -> PromptSet:
    file = folder / "prompts.parquet"
    pq.write_table(pa.Table.from_pylist(rows), file)
    source = {"type": "parquet", "path": str(file), **how}
    return load_prompts(ParquetSource.model_validate(source))


def huggingface(dataset: object, **how: object) -> PromptSet:
    source = {"type": "huggingface", "dataset": str(dataset), **how}
    return load_prompts(HuggingFaceSource.model_validate(source))


def saved(folder: Path, rows: list[dict[str, object]], **how: object) -> PromptSet:
    """Prompts of a dataset that was saved to a folder."""
    from datasets import Dataset

    Dataset.from_list(rows).save_to_disk(folder / "saved")
    return huggingface(folder / "saved", **how)


def config(**changes: object) -> PromptsConfig:
    source = {"type": "jsonl", "path": "p.jsonl"}
    return PromptsConfig.model_validate({"source": source, **changes})


def prompt(name: str, *messages: tuple[str, str], task: str = "default") -> Prompt:
    return Prompt(name, messages or (("user", name),), task, None, f"content of {name}")


def names(prompts: list[Prompt]) -> list[str]:
    return [p.prompt_id for p in prompts]


def test_a_jsonl_row_gives_every_field(tmp_path: Path) -> None:
    loaded = jsonl(
        tmp_path,
        {"id": 7, "prompt": "2+2?", "task": "sums", "answer": 4},
        {"messages": [{"role": "system", "content": "s"}, {"role": "user", "content": "u"}]},
    )

    first, second = loaded.prompts
    assert first.prompt_id == "7"
    assert (first.messages, first.task, first.answer) == ((("user", "2+2?"),), "sums", "4")
    assert second.messages == (("system", "s"), ("user", "u"))
    assert (second.task, second.answer) == ("default", None)
    assert loaded.dropped == {}


def test_a_parquet_source_gives_the_same_prompts_as_a_jsonl_one(tmp_path: Path) -> None:
    rows: list[dict[str, object]] = [
        {"id": "a", "prompt": "one", "answer": "1", "messages": None},
        {"id": "b", "prompt": None, "messages": [{"role": "user", "content": "two"}]},
    ]

    assert parquet(tmp_path, rows) == jsonl(tmp_path, *rows)


def jsonl_rows(folder: Path, rows: list[dict[str, object]], **how: object) -> PromptSet:
    return jsonl(folder, *rows, **how)


ROW_SOURCES = pytest.mark.parametrize("load", [jsonl_rows, parquet, saved])


@ROW_SOURCES
def test_a_source_s_columns_are_read_by_the_names_that_it_gives_them(
    tmp_path: Path, load: Any
) -> None:
    rows = [{"question": "2+2?", "solution": 4, "kind": "sums", "key": 7}]
    columns = {"prompt": "question", "answer": "solution", "task": "kind", "id": "key"}

    (loaded,) = load(tmp_path, rows, columns=columns).prompts

    assert (loaded.messages, loaded.answer) == ((("user", "2+2?"),), "4")
    assert (loaded.task, loaded.prompt_id) == ("sums", "7")


@ROW_SOURCES
def test_a_chat_is_read_by_the_name_that_its_column_has(tmp_path: Path, load: Any) -> None:
    chat = [{"role": "system", "content": "s"}, {"role": "user", "content": "u"}]

    (loaded,) = load(tmp_path, [{"turns": chat}], columns={"messages": "turns"}).prompts

    assert loaded.messages == (("system", "s"), ("user", "u"))


@ROW_SOURCES
def test_a_text_that_is_named_leaves_out_the_other_kind(tmp_path: Path, load: Any) -> None:
    chat = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "the completion"}]
    rows: list[dict[str, object]] = [{"prompt": "a", "messages": chat}]

    (loaded,) = load(tmp_path, rows, columns={"prompt": "prompt"}).prompts

    assert loaded.messages == (("user", "a"),)


@ROW_SOURCES
def test_two_of_our_names_may_be_one_column(tmp_path: Path, load: Any) -> None:
    (loaded,) = load(tmp_path, [{"q": "a"}], columns={"prompt": "q", "id": "q"}).prompts

    assert (loaded.prompt_id, loaded.messages) == ("a", (("user", "a"),))


@ROW_SOURCES
def test_a_named_column_that_is_not_there_is_an_error_with_those_that_are(
    tmp_path: Path, load: Any
) -> None:
    with pytest.raises(PromptError, match=r"no column 'solution' \(got columns question, answer\)"):
        load(
            tmp_path,
            [{"question": "a", "answer": "1"}],
            columns={"prompt": "question", "answer": "solution"},
        )


@ROW_SOURCES
def test_a_source_without_a_text_is_an_error_with_its_columns(tmp_path: Path, load: Any) -> None:
    with pytest.raises(
        PromptError, match=r"no column 'prompt' or 'messages' \(got columns question\).*'columns'"
    ):
        load(tmp_path, [{"question": "a"}])


def test_a_named_column_that_one_row_lacks_is_named_by_line(tmp_path: Path) -> None:
    rows = [{"prompt": "a", "key": 1}, {"prompt": "b"}]

    with pytest.raises(PromptError, match=r"prompts\.jsonl:2: no column 'key'"):
        jsonl(tmp_path, *rows, columns={"id": "key"})


@ROW_SOURCES
def test_a_source_s_task_is_that_of_the_rows_that_name_none(tmp_path: Path, load: Any) -> None:
    rows = [{"prompt": "a", "task": None}, {"prompt": "b", "task": "own"}]

    loaded = load(tmp_path, rows, task="ours").prompts

    assert [p.task for p in loaded] == ["ours", "own"]


def test_a_saved_dataset_gives_the_same_prompts_as_a_jsonl_file(tmp_path: Path) -> None:
    rows: list[dict[str, object]] = [
        {"id": "a", "prompt": "one", "answer": "1", "messages": None},
        {"id": "b", "prompt": None, "messages": [{"role": "user", "content": "two"}]},
    ]

    assert saved(tmp_path, rows) == jsonl(tmp_path, *rows)


@pytest.fixture
def splits(tmp_path: Path) -> Path:
    """A saved dataset of two splits."""
    from datasets import Dataset, DatasetDict

    named = {name: Dataset.from_list([{"prompt": f"of {name}"}]) for name in ("train", "test")}
    DatasetDict(named).save_to_disk(tmp_path / "splits")
    return tmp_path / "splits"


@pytest.mark.parametrize(("split", "taken"), [(None, "train"), ("test", "test")])
def test_a_saved_dataset_of_splits_gives_the_one_asked_for(
    splits: Path, split: str | None, taken: str
) -> None:
    assert huggingface(splits, split=split).prompts[0].messages == (("user", f"of {taken}"),)


def test_a_split_that_is_not_there_is_an_error_with_those_that_are(splits: Path) -> None:
    with pytest.raises(PromptError, match=r"splits: no split 'tset' \(expected one of train, test"):
        huggingface(splits, split="tset")


def test_a_split_of_a_saved_dataset_that_has_none_is_refused(tmp_path: Path) -> None:
    with pytest.raises(PromptError, match="no split 'test': the folder holds one dataset"):
        saved(tmp_path, [{"prompt": "a"}], split="test")


def test_a_folder_that_holds_no_dataset_is_a_prompt_error(tmp_path: Path) -> None:
    with pytest.raises(PromptError, match="not a dataset that can be loaded"):
        huggingface(tmp_path)


def test_a_hub_s_dataset_is_asked_for_by_name_split_and_revision(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    import datasets

    asked = []

    def load_dataset(*arguments: object, **named: object) -> datasets.Dataset:
        asked.append((arguments, named))
        return datasets.Dataset.from_list([{"prompt": "a"}])

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    huggingface("them/theirs")
    huggingface("them/theirs", name="main", split="test", revision="abc")

    assert asked == [
        (("them/theirs", None), {"split": "train", "revision": None}),
        (("them/theirs", "main"), {"split": "test", "revision": "abc"}),
    ]


@pytest.mark.parametrize("fault", [ConnectionError, ValueError])
def test_what_the_hub_refuses_is_a_prompt_error_that_names_the_dataset(
    monkeypatch: pytest.MonkeyPatch, fault: type[Exception]
) -> None:
    import datasets

    def load_dataset(*_: object, **__: object) -> None:
        raise fault("Unknown split 'tset'.\nShould be one of ['train']")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    with pytest.raises(PromptError, match=r"^them/theirs: .*one of \['train'\]"):
        huggingface("them/theirs", split="tset")


def test_a_hugging_face_source_without_the_library_says_how_to_get_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)

    with pytest.raises(NotInstalled, match="datasets is not installed; pip install datasets"):
        huggingface("them/theirs")


def test_a_reasoning_gym_source_is_decided_by_its_seed() -> None:
    def generated(seed: int) -> list[Prompt]:
        return load_prompts(
            ReasoningGymSource(type="reasoning_gym", dataset="chain_sum", size=5, seed=seed)
        ).prompts

    assert generated(1) == generated(1)
    assert names(generated(1)) != names(generated(2))
    assert len(generated(1)) == 5
    assert {p.task for p in generated(1)} == {"chain_sum"}
    assert all((p.answer or "").lstrip("-").isdigit() for p in generated(1))


def test_reasoning_gym_takes_more_arguments_of_the_dataset() -> None:
    source = ReasoningGymSource(
        type="reasoning_gym",
        dataset="chain_sum",
        size=4,
        config={"min_terms": 6, "max_terms": 6, "min_digits": 1, "max_digits": 1},
    )

    for generated in load_prompts(source).prompts:
        question = generated.messages[0][1]
        assert sum(question.count(sign) for sign in "+-") >= 5


def test_an_unknown_reasoning_gym_dataset_is_a_prompt_error() -> None:
    source = ReasoningGymSource(type="reasoning_gym", dataset="no_such_thing", size=1)

    with pytest.raises(PromptError, match="no_such_thing"):
        load_prompts(source)


def test_an_unknown_argument_of_a_dataset_is_a_prompt_error() -> None:
    source = ReasoningGymSource(
        type="reasoning_gym", dataset="chain_sum", size=1, config={"colour": 3}
    )

    with pytest.raises(PromptError, match="colour"):
        load_prompts(source)


@pytest.mark.parametrize(
    "row",
    [
        '{"prompt": "unfinished',
        "[1, 2]",
        '"text"',
        '{"text": "another key"}',
        '{"prompt": "both", "messages": [{"role": "user", "content": "x"}]}',
        '{"prompt": 5}',
        '{"messages": []}',
        '{"messages": "hello"}',
        '{"messages": [{"role": "user"}]}',
        '{"messages": [{"role": "user", "content": null}]}',
        '{"messages": 3}',
        '{"prompt": "half a character: \\ud83d"}',
    ],
)
def test_a_malformed_jsonl_row_is_named_by_file_and_line(tmp_path: Path, row: str) -> None:
    with pytest.raises(PromptError, match=r"prompts\.jsonl:3: ") as caught:
        jsonl(tmp_path, {"prompt": "good"}, "", row, {"prompt": "good too"})

    assert "\n" not in str(caught.value)


def test_a_malformed_parquet_row_is_named_by_its_number(tmp_path: Path) -> None:
    with pytest.raises(PromptError, match=r"prompts\.parquet row 1: "):
        parquet(tmp_path, [{"prompt": "good"}, {"prompt": None}])


def test_a_line_separator_within_a_prompt_does_not_end_the_row(tmp_path: Path) -> None:
    texts = ["a\u2028b", "c\u0085d", "e\u2029f"]  # legal, unescaped, in JSON text

    loaded = jsonl(tmp_path, *(json.dumps({"prompt": t}, ensure_ascii=False) for t in texts))

    assert [p.messages[0][1] for p in loaded.prompts] == texts


def test_an_empty_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(PromptError, match=r"prompts\.jsonl: no prompts"):
        jsonl(tmp_path)


def test_a_file_of_blank_lines_is_refused(tmp_path: Path) -> None:
    with pytest.raises(PromptError, match="no prompts"):
        jsonl(tmp_path, "", "  ")


def test_an_empty_parquet_file_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "p.parquet"
    pq.write_table(pa.table({"prompt": pa.array([], pa.string())}), file)

    with pytest.raises(PromptError, match="no prompts"):
        load_prompts(ParquetSource(type="parquet", path=str(file)))


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_a_missing_file_is_a_prompt_error_that_names_it(tmp_path: Path, kind: str) -> None:
    source = config(source={"type": kind, "path": str(tmp_path / "nowhere")}).source

    with pytest.raises(PromptError, match="nowhere"):
        load_prompts(source)


def test_a_file_that_is_not_utf8_is_a_prompt_error(tmp_path: Path) -> None:
    file = tmp_path / "p.jsonl"
    file.write_bytes('{"prompt": "café"}'.encode("latin-1"))

    with pytest.raises(PromptError, match="not UTF-8"):
        load_prompts(JsonlSource(type="jsonl", path=str(file)))


def test_a_file_that_is_no_parquet_is_a_prompt_error(tmp_path: Path) -> None:
    file = tmp_path / "p.parquet"
    file.write_text("not parquet")

    with pytest.raises(PromptError, match=r"p\.parquet: not a readable Parquet file"):
        load_prompts(ParquetSource(type="parquet", path=str(file)))


def test_exact_copies_are_dropped_and_counted(tmp_path: Path) -> None:
    loaded = jsonl(tmp_path, *({"prompt": text} for text in "abacaa"))

    assert [p.messages[0][1] for p in loaded.prompts] == ["a", "b", "c"]
    assert loaded.dropped == {"copy of another prompt": 3}


def test_a_copy_is_dropped_whatever_its_id_but_not_one_with_another_answer(
    tmp_path: Path,
) -> None:
    rows = [{"id": "a", "prompt": "x"}, {"id": "b", "prompt": "x"}, {"id": "a", "prompt": "x"}]
    loaded = jsonl(tmp_path, *rows, {"id": "c", "prompt": "x", "answer": "1"})

    assert names(loaded.prompts) == ["a", "c"]
    assert loaded.dropped == {"copy of another prompt": 2}


def test_a_field_of_a_message_that_would_be_lost_is_refused(tmp_path: Path) -> None:
    call = {"role": "assistant", "content": "", "name": None, "tool_calls": [{"name": "f"}]}

    with pytest.raises(PromptError, match=r"jsonl:1: a message has 'tool_calls'.*; write it into"):
        jsonl(tmp_path, {"messages": [call]})


def test_the_same_text_for_another_task_is_another_prompt(tmp_path: Path) -> None:
    loaded = jsonl(tmp_path, {"prompt": "a", "task": "x"}, {"prompt": "a", "task": "y"})

    assert len(set(names(loaded.prompts))) == 2


def test_one_id_for_two_prompts_is_refused(tmp_path: Path) -> None:
    with pytest.raises(PromptError, match="id 'x' stands for two prompts"):
        jsonl(tmp_path, {"id": "x", "prompt": "a"}, {"id": "x", "prompt": "b"})


def test_an_id_that_the_source_does_not_give_follows_from_the_prompt_alone(tmp_path: Path) -> None:
    one = jsonl(tmp_path, {"prompt": "a"}, {"prompt": "b"}).prompts
    other = jsonl(tmp_path, {"prompt": "b"}, {"prompt": "a"}).prompts

    assert names(one) == names(other)[::-1]


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 12), st.integers(1, 30), st.integers(0, 10), st.integers(0, 3))
def test_the_schedule_takes_every_prompt_once_in_each_pass(
    size: int, per_round: int, rounds: int, seed: int
) -> None:
    prompts = [prompt(str(i)) for i in range(size)]
    walked = [
        name
        for index in range(rounds)
        for name in names(scheduled(prompts, config(per_round=per_round), seed, index))
    ]

    assert len(walked) == rounds * per_round
    passes = [walked[start : start + size] for start in range(0, len(walked), size)]
    for whole in passes[:-1]:
        assert sorted(whole) == sorted(names(prompts))
    assert not passes or len(set(passes[-1])) == len(passes[-1])


def test_a_round_s_prompts_can_be_named_without_the_rounds_before() -> None:
    prompts = [prompt(str(i)) for i in range(10)]
    settings_ = config(per_round=7)
    one_by_one = [names(scheduled(prompts, settings_, 3, index)) for index in range(6)]

    whole = names(scheduled(prompts, config(per_round=42), 3, 0))

    assert [name for part in one_by_one for name in part] == whole
    assert names(scheduled(prompts, settings_, 3, 5)) == one_by_one[5]


def test_a_shuffled_walk_has_a_new_order_each_pass_and_for_each_seed() -> None:
    prompts = [prompt(str(i)) for i in range(20)]
    orders = [
        tuple(names(scheduled(prompts, config(per_round=20), seed, index)))
        for seed in range(2)
        for index in range(2)
    ]

    assert len({*orders, tuple(names(prompts))}) == 5


def test_a_listed_walk_keeps_the_order_of_the_source() -> None:
    prompts = [prompt(name) for name in "abcde"]

    walked = [
        names(scheduled(prompts, config(per_round=3, order="listed"), 0, index))
        for index in range(4)
    ]

    assert walked == [["a", "b", "c"], ["d", "e", "a"], ["b", "c", "d"], ["e", "a", "b"]]


def tasks(**sizes: int) -> list[Prompt]:
    return [prompt(f"{task} {i}", task=task) for task, size in sizes.items() for i in range(size)]


def test_the_order_of_a_walk_is_that_of_runs_under_way() -> None:
    prompts = [prompt(str(i)) for i in range(9)]
    seeded = random.Random(hashlib.sha256(b"prompt order 5 2").digest())

    third_pass = [
        p for index in (6, 7, 8) for p in scheduled(prompts, config(per_round=3), 5, index)
    ]

    assert third_pass == seeded.sample(prompts, 9)


@settings(max_examples=100, deadline=None)
@given(
    st.integers(0, 200),
    st.dictionaries(st.text(max_size=2), st.floats(1e-3, 1e3), min_size=1, max_size=6),
)
def test_a_total_is_split_to_within_one_of_each_exact_part(
    total: int, weights: dict[str, float]
) -> None:
    parts = apportioned(total, weights)

    whole = sum(Fraction(weight) for weight in weights.values())
    assert sum(parts.values()) == total
    assert parts.keys() == weights.keys()
    for name, weight in weights.items():
        assert abs(parts[name] - total * Fraction(weight) / whole) < 1 + Fraction(1, 10**9)
        assert all(parts[name] >= parts[o] for o, other in weights.items() if other < weight)


def test_the_largest_remainders_get_what_is_left() -> None:
    # 10 seats in proportion to 41 : 34 : 25 are 4.1, 3.4 and 2.5
    assert apportioned(10, {"a": 4.1, "b": 3.4, "c": 2.5}) == {"a": 4, "b": 3, "c": 3}


def test_equal_remainders_go_by_name_in_whatever_order_weights_are_written() -> None:
    expected = {"a": 2, "b": 2, "c": 1}

    assert apportioned(5, {"a": 0.1, "b": 0.1, "c": 0.1}) == expected
    assert apportioned(5, {"c": 0.1, "b": 0.1, "a": 0.1}) == expected


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 9), st.integers(1, 9), st.integers(2, 20), st.integers(0, 6))
def test_each_task_with_a_share_is_walked_through_on_its_own(
    maths: int, code: int, per_round: int, rounds: int
) -> None:
    prompts, asked = tasks(maths=maths, code=code), {"maths": 1, "code": 1}
    walked = [
        p
        for index in range(rounds)
        for p in scheduled(prompts, config(per_round=per_round, shares=asked), 0, index)
    ]

    assert len(walked) == rounds * per_round
    for task, size in (("maths", maths), ("code", code)):
        ours = [p.prompt_id for p in walked if p.task == task]
        for start in range(0, len(ours), size):
            whole = ours[start : start + size]
            assert len(set(whole)) == len(whole)


def test_every_round_has_each_task_s_share() -> None:
    settings_ = config(per_round=8, shares={"code": 1, "maths": 3})

    for index in range(5):
        chosen = scheduled(tasks(maths=7, code=3, other=5), settings_, 0, index)
        assert Counter(p.task for p in chosen) == {"maths": 6, "code": 2}


def test_tasks_have_orders_of_their_own() -> None:
    asked = config(per_round=40, shares={"a": 1, "b": 1})

    chosen = names(scheduled(tasks(a=20, b=20), asked, 0, 0))

    assert [n[2:] for n in chosen if n[0] == "a"] != [n[2:] for n in chosen if n[0] == "b"]


def test_a_task_s_walk_does_not_depend_on_the_other_tasks() -> None:
    asked = config(per_round=10, shares={"a": 1, "b": 1})

    one, other = (names(scheduled(tasks(a=20, b=n), asked, 0, 1)) for n in (3, 30))

    assert one[:5] == other[:5]
    assert one[5:] != other[5:]


def test_a_share_too_small_for_a_prompt_is_refused() -> None:
    asked = config(per_round=4, shares={"a": 100, "b": 1})

    with pytest.raises(PromptError, match="the share of task 'b' is no prompt a round"):
        scheduled(tasks(a=9, b=9), asked, 0, 0)


def test_rounds_that_walk_through_the_set_max_epochs_times_are_accepted() -> None:
    check_schedule(tasks(a=8), config(per_round=4, max_epochs=3), num_rounds=6)


def test_rounds_that_walk_through_the_set_more_often_are_refused() -> None:
    with pytest.raises(
        PromptError, match=r"7 rounds walk .* the set more .*expected 24 prompts at most, got 28"
    ):
        check_schedule(tasks(a=8), config(per_round=4, max_epochs=3), num_rounds=7)


def test_rounds_that_walk_through_one_task_more_often_are_refused() -> None:
    asked = config(per_round=4, max_epochs=1, shares={"a": 1, "b": 1})

    check_schedule(tasks(a=8, b=4), asked, num_rounds=2)
    with pytest.raises(PromptError, match="walk through task 'b' more than max_epochs times"):
        check_schedule(tasks(a=8, b=4), asked, num_rounds=3)


def test_each_prompt_gets_samples_numbered_from_0() -> None:
    rendered = [RenderedPrompt(prompt(name), (1,)) for name in "ab"]

    made = [(r.rendered.prompt.prompt_id, r.sample_index) for r in requests(rendered, 2)]

    assert made == [("a", 0), ("a", 1), ("b", 0), ("b", 1)]


def test_a_prompt_that_stands_twice_in_a_round_never_repeats_a_sample_index() -> None:
    rendered = [RenderedPrompt(prompt(name), (1,)) for name in "abaa"]

    counts = Counter((r.rendered.prompt.prompt_id, r.sample_index) for r in requests(rendered, 3))

    assert counts == Counter([("a", i) for i in range(9)] + [("b", i) for i in range(3)])


def test_a_chat_is_rendered_by_the_template() -> None:
    (rendered,) = render([prompt("x", ("user", "aa bbb"))], config(), WordTokenizer())

    assert rendered.token_ids == (104, 2, 3)


def test_a_system_message_goes_before_every_chat() -> None:
    (rendered,) = render([prompt("x", ("user", "a"))], config(system="be nice"), WordTokenizer())

    assert rendered.token_ids == (106, 2, 4, 104, 1)


def test_a_raw_prompt_is_its_text_alone() -> None:
    tokenizer = WordTokenizer(chat_template=None)

    (rendered,) = render(
        [prompt("x", ("user", "aa b"), ("assistant", "bb ccc"))],
        config(template="raw", system="not used"),
        tokenizer,
    )

    assert rendered.token_ids == (2, 3, 3)  # "aa b" + "bb ccc"


def test_a_tokenizer_without_chat_template_is_refused_with_the_remedy() -> None:
    with pytest.raises(PromptError, match=r"no chat template; set the prompts' template: raw"):
        render([prompt("x")], config(), WordTokenizer(chat_template=None))


def test_a_chat_that_the_template_refuses_is_named_in_one_line() -> None:
    with pytest.raises(PromptError) as caught:
        render([prompt("odd", ("alien", "x"))], config(), WordTokenizer())

    assert str(caught.value) == "prompt odd: the chat template refuses it: roles must alternate"


def test_a_prompt_without_tokens_is_refused() -> None:
    with pytest.raises(PromptError, match="prompt blank: a prompt has no tokens"):
        render([prompt("blank", ("user", " "))], config(template="raw"), WordTokenizer())
