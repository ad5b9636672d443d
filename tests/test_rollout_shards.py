"""Rollout shards: the Parquet table, its token axis, and what its content hash covers."""

import io
from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from opdcache.identity import content_hash
from opdcache.store import rollouts
from opdcache.store.rollouts import Completion, rollout_table

ID_COLUMNS = ["prompt_token_ids", "completion_token_ids", "student_topk_ids"]


def completion(
    index: int = 0,
    prompt: Sequence[int] = (1, 2, 3),
    tokens: Sequence[int] = (7, 8),
    *,
    width: int = 2,
    answer: str | None = "42",
    text: str = "hi",
) -> Completion:
    """A completion whose numbers follow from its tokens."""
    num_tokens = len(tokens)
    flat = np.asarray(tokens, np.int32).reshape(num_tokens, 1)
    return Completion(
        prompt_id="p",
        sample_index=index,
        prompt_token_ids=prompt,
        completion_token_ids=tokens,
        behavior_logprobs=np.linspace(-2, -1, num_tokens, dtype=np.float32),
        sampling_logprobs=np.linspace(-4, -3, num_tokens, dtype=np.float32),
        topk_ids=flat * 10 + np.arange(width, dtype=np.int32),
        topk_logprobs=-np.ones((num_tokens, width), np.float32) * np.arange(1, width + 1),
        finish_reason="stop",
        text=text,
        task="sums",
        answer=answer,
    )


def changed(table: pa.Table, column: str, values: object) -> pa.Table:
    """The table with one column's values replaced."""
    place = table.column_names.index(column)
    field = table.schema.field(place)
    return table.set_column(place, field, pa.array(values, type=field.type))


def test_a_written_shard_is_read_by_plain_parquet(tmp_path: Path) -> None:
    table = rollout_table([completion(0), completion(1, tokens=(9,), text="ünï\n")])
    file = tmp_path / rollouts.FILE
    file.write_bytes(rollouts.encode_rollouts(table))

    rows = pq.read_table(file).to_pylist()

    assert [row["rollout_id"] for row in rows] == ["p/0", "p/1"]
    assert rows[1] == {
        "rollout_id": "p/1",
        "prompt_id": "p",
        "sample_index": 1,
        "prompt_token_ids": [1, 2, 3],
        "completion_token_ids": [9],
        "behavior_logprobs": [-2.0],
        "sampling_logprobs": [-4.0],
        "finish_reason": "stop",
        "text": "ünï\n",
        "task": "sums",
        "answer": "42",
        "student_topk_ids": [[90, 91]],
        "student_topk_logprobs": [[-1.0, -2.0]],
    }


def test_every_stored_column_says_what_it_holds(tmp_path: Path) -> None:
    file = tmp_path / rollouts.FILE
    file.write_bytes(rollouts.encode_rollouts(rollout_table([completion()])))

    schema = pq.read_schema(file)

    assert len(schema.names) == 13
    assert all(schema.field(name).metadata[b"description"] for name in schema.names)


def test_a_decoded_shard_equals_the_encoded_one() -> None:
    table = rollout_table([completion(0), completion(1, tokens=())])

    assert rollouts.decode_rollouts(rollouts.encode_rollouts(table)).equals(table)


def test_an_empty_completion_is_a_row_without_tokens() -> None:
    table = rollout_table([completion(0), completion(1, tokens=()), completion(2, tokens=(5,))])

    assert rollouts.token_offsets(table).tolist() == [0, 2, 2, 3]
    assert [ids.tolist() for ids in rollouts.token_lists(table, "completion_token_ids")] == [
        [7, 8],
        [],
        [5],
    ]
    assert rollouts.flat_tokens(table, "student_topk_ids", np.int64).tolist() == [
        [70, 71],
        [80, 81],
        [50, 51],
    ]


def test_a_shard_of_empty_completions_has_no_tokens() -> None:
    table = rollout_table([completion(0, tokens=()), completion(1, tokens=())])

    read = rollouts.decode_rollouts(rollouts.encode_rollouts(table))

    assert rollouts.token_offsets(read).tolist() == [0, 0, 0]
    assert rollouts.flat_tokens(read, "behavior_logprobs", np.float32).shape == (0,)
    assert len(rollouts.flat_tokens(read, "student_topk_ids", np.int64)) == 0


def test_without_recorded_entries_there_are_no_recorded_columns() -> None:
    table = rollout_table([completion(width=0)])

    assert not {"student_topk_ids", "student_topk_logprobs"} & set(table.column_names)


def test_without_answers_there_is_no_answer_column() -> None:
    assert "answer" not in rollout_table([completion(answer=None)]).column_names


def test_a_missing_answer_among_others_is_null() -> None:
    table = rollout_table([completion(0), completion(1, answer=None)])

    assert table.column("answer").to_pylist() == ["42", None]


@settings(max_examples=40, deadline=None)
@given(st.lists(st.lists(st.integers(0, 2**18), max_size=4), min_size=1, max_size=6))
def test_the_token_axis_is_all_completions_end_to_end(lists: list[list[int]]) -> None:
    table = rollout_table([completion(i, tokens=ids) for i, ids in enumerate(lists)])

    flat = rollouts.flat_tokens(table, "completion_token_ids", np.int64)

    assert flat.tolist() == [token for ids in lists for token in ids]
    bounds = rollouts.token_offsets(table)
    assert [flat[a:b].tolist() for a, b in pairwise(bounds)] == lists
    recorded = rollouts.flat_tokens(table, "student_topk_ids", np.int64).tolist()
    assert recorded == [[10 * t, 10 * t + 1] for ids in lists for t in ids]


def test_the_token_axis_is_the_same_for_a_table_in_pieces() -> None:
    whole = rollout_table([completion(i, tokens=range(i)) for i in range(5)])
    pieces = pa.concat_tables([whole.slice(0, 2), whole.slice(2, 3)])
    assert pieces.column("completion_token_ids").num_chunks == 2

    for column in ("completion_token_ids", "student_topk_ids"):
        one, other = (rollouts.flat_tokens(t, column, np.int64) for t in (whole, pieces))
        assert one.tolist() == other.tolist()
    assert rollouts.token_offsets(pieces).tolist() == [0, 0, 1, 3, 6, 10]


@pytest.mark.parametrize("column", ID_COLUMNS)
def test_the_content_hash_changes_with_any_id(column: str) -> None:
    table = rollout_table([completion(0), completion(1, tokens=(9,))])
    hashes = {content_hash(table)}
    num_ids = len(table.column(column).combine_chunks().flatten())
    if column == "student_topk_ids":
        num_ids *= 2

    for place in range(num_ids):
        rows = table.column(column).to_pylist()
        leaves = [row for outer in rows for row in outer] if column == ID_COLUMNS[2] else rows
        flat = [(leaf, i) for leaf in leaves for i in range(len(leaf))]
        leaf, i = flat[place]
        leaf[i] += 1
        hashes.add(content_hash(changed(table, column, rows)))

    assert len(hashes) == num_ids + 1


def test_the_content_hash_does_not_change_with_how_the_table_lies_in_memory() -> None:
    rows = [completion(i, tokens=range(i)) for i in range(4)]
    whole = rollout_table(rows)
    in_chunks = pa.concat_tables([whole.slice(0, 0), whole.slice(0, 1), whole.slice(1)])

    assert in_chunks.column("completion_token_ids").num_chunks > 1
    assert content_hash(in_chunks) == content_hash(whole)


def test_the_content_hash_changes_with_the_order_of_rows() -> None:
    rows = [completion(0), completion(1, tokens=(9,))]

    assert content_hash(rollout_table(rows)) != content_hash(rollout_table(rows[::-1]))


@pytest.mark.parametrize("column", ID_COLUMNS)
def test_the_content_hash_changes_when_a_token_moves_to_the_next_row(column: str) -> None:
    table = rollout_table([completion(0, tokens=(5, 6)), completion(1, tokens=(7,))])
    first, second = table.column(column).to_pylist()
    moved = changed(table, column, [first[:-1], [first[-1], *second]])
    assert (
        moved.column(column).combine_chunks().flatten()
        == table.column(column).combine_chunks().flatten()
    )

    assert content_hash(moved) != content_hash(table)


def test_the_content_hash_changes_when_a_token_moves_from_prompt_to_completion() -> None:
    one = rollout_table([completion(prompt=(1, 2), tokens=(3,), width=0)])
    other = rollout_table([completion(prompt=(1,), tokens=(2, 3), width=0)])

    assert content_hash(one) != content_hash(other)


def test_the_content_hash_changes_with_the_recorded_width() -> None:
    hashes = {content_hash(rollout_table([completion(width=width)])) for width in (0, 1, 2)}

    assert len(hashes) == 3


def test_the_content_hash_does_not_change_with_text_or_logprobs() -> None:
    table = rollout_table([completion(0), completion(1)])
    expected = content_hash(table)

    for column in ("behavior_logprobs", "sampling_logprobs"):
        other = changed(table, column, [[-9.0, -9.0], [-9.0, -9.0]])
        assert content_hash(other) == expected, column
    for column in ("text", "finish_reason", "answer"):
        assert content_hash(changed(table, column, ["x", "y"])) == expected, column


def test_the_content_hash_does_not_change_when_the_file_is_encoded_anew() -> None:
    table = rollout_table([completion(i, tokens=range(i)) for i in range(7)])
    sink = io.BytesIO()
    pq.write_table(table, sink, compression="snappy", row_group_size=2, use_dictionary=False)
    assert sink.getvalue() != rollouts.encode_rollouts(table)

    again = pq.read_table(io.BytesIO(sink.getvalue()))

    assert content_hash(again) == content_hash(table)


def test_the_content_hash_of_a_slice_is_that_of_its_rows_alone() -> None:
    rows = [completion(i, tokens=range(i + 1)) for i in range(5)]

    sliced = rollout_table(rows).slice(1, 3)

    assert content_hash(sliced) == content_hash(rollout_table(rows[1:4]))


MASK = np.array([True, False])


def test_a_mask_is_a_column_when_a_token_is_not_supervised() -> None:
    table = rollout_table([completion(0), replace(completion(1), loss_mask=MASK)])

    read = rollouts.decode_rollouts(rollouts.encode_rollouts(table))

    assert read.column("loss_mask").to_pylist() == [[True, True], [True, False]]
    assert rollouts.supervised_tokens(read).tolist() == [True, True, True, False]


def test_a_mask_of_ones_is_no_column() -> None:
    table = rollout_table([replace(completion(), loss_mask=np.ones(2, np.bool_))])

    assert table.equals(rollout_table([completion()]))
    assert rollouts.supervised_tokens(table).tolist() == [True, True]


def test_the_content_hash_does_not_change_with_the_mask() -> None:
    table = rollout_table([replace(completion(), loss_mask=MASK)])

    assert content_hash(table) == content_hash(rollout_table([completion()]))
