"""Columns of a rollout shard and arrays of a score shard, each declared once.

Dimensions: N completions of a shard, T completion tokens of the shard (all completions, in row
order), K kept teacher entries a token (``k_cap``), S recorded student entries a token.
"""

from dataclasses import dataclass
from typing import Literal

import pyarrow as pa


@dataclass(frozen=True, slots=True)
class RolloutColumn:
    """One Parquet column of a rollout shard; a row is one completion."""

    name: str
    type: pa.DataType
    description: str
    optional: bool = False


def _tokens(value: pa.DataType) -> pa.DataType:
    return pa.list_(pa.field("element", value, nullable=False))


def _topk(value: pa.DataType) -> pa.DataType:
    return pa.list_(pa.field("element", _tokens(value), nullable=False))


ROLLOUT_COLUMNS = (
    RolloutColumn("rollout_id", pa.string(), "prompt_id/sample_index: unique in a shard"),
    RolloutColumn("prompt_id", pa.string(), "identity of the prompt within its prompt set"),
    RolloutColumn("sample_index", pa.int32(), "which completion of the prompt, from 0"),
    RolloutColumn("prompt_token_ids", _tokens(pa.int32()), "prompt as the student saw it"),
    RolloutColumn("completion_token_ids", _tokens(pa.int32()), "sampled ids, EOS included"),
    RolloutColumn(
        "behavior_logprobs",
        _tokens(pa.float32()),
        "raw model log-prob of each sampled token at temperature 1, nats",
        optional=True,
    ),
    RolloutColumn(
        "sampling_logprobs",
        _tokens(pa.float32()),
        "log-prob of each sampled token under the distribution sampled from, nats",
        optional=True,
    ),
    RolloutColumn(
        "loss_mask",
        _tokens(pa.bool_()),
        "whether each token is supervised; all are where the column is absent",
        optional=True,
    ),
    RolloutColumn("finish_reason", pa.string(), "stop (EOS or a stop string) or length"),
    RolloutColumn("text", pa.string(), "the completion decoded, special tokens left out"),
    RolloutColumn("task", pa.string(), "the prompt's task; one a shard"),
    RolloutColumn("answer", pa.string(), "the prompt set's reference answer", optional=True),
    RolloutColumn(
        "messages",
        pa.string(),
        "the prompt's chat, as JSON: a list of [role, content]",
        optional=True,
    ),
    RolloutColumn(
        "student_topk_ids",
        _topk(pa.int32()),
        "the student's S likeliest ids a token",
        optional=True,
    ),
    RolloutColumn(
        "student_topk_logprobs",
        _topk(pa.float32()),
        "their raw log-probs at temperature 1, nats, descending",
        optional=True,
    ),
)


def rollout_schema(
    *,
    answer: bool,
    messages: bool,
    student_topk: bool,
    behavior: bool = True,
    sampling: bool = True,
    loss_mask: bool = False,
) -> pa.Schema:
    """Arrow schema of a rollout shard with the given optional columns."""
    present = {"answer": answer, "messages": messages, "loss_mask": loss_mask}
    present |= {"student_topk_ids": student_topk, "student_topk_logprobs": student_topk}
    present |= {"behavior_logprobs": behavior, "sampling_logprobs": sampling}
    return pa.schema(
        [
            pa.field(
                column.name,
                column.type,
                nullable=column.name in ("answer", "messages"),
                metadata={"description": column.description},
            )
            for column in ROLLOUT_COLUMNS
            if present.get(column.name, True)
        ]
    )


ScoreColumn = Literal["sampled", "entropy", "topk", "student_topk", "draws"]
"""What a scorer can be asked for: one array, or several that only make sense together."""

SCORE_COLUMNS: tuple[ScoreColumn, ...] = ("sampled", "entropy", "topk", "student_topk")
"""Those that a run stores unless it says otherwise."""


Compression = Literal["blosc", "pcodec"]
"""Of a score array's chunks: a core codec of Zarr v3, or a smaller one that is an extension."""


@dataclass(frozen=True, slots=True)
class ScoreArray:
    """One Zarr array of a score shard; ``uint`` stands for the narrowest type that is enough."""

    name: str
    column: ScoreColumn | None
    dims: tuple[str, ...]
    dtype: str
    unit: str
    description: str


SCORE_ARRAYS = (
    ScoreArray(
        "token_offsets",
        None,
        ("offset",),
        "int64",
        "tokens",
        "N + 1 offsets: completion i owns tokens offsets[i]:offsets[i + 1]",
    ),
    ScoreArray(
        "sampled_logprobs",
        "sampled",
        ("token",),
        "float16",
        "nats",
        "teacher log-prob of the sampled token",
    ),
    ScoreArray(
        "entropy", "entropy", ("token",), "float16", "nats", "entropy of the teacher's distribution"
    ),
    ScoreArray(
        "num_kept", "topk", ("token",), "uint16", "entries", "kept entries of the token, at most K"
    ),
    ScoreArray(
        "tail_logprobs",
        "topk",
        ("token",),
        "float16",
        "nats",
        "log of the teacher's mass outside the kept entries; -inf when they hold everything",
    ),
    ScoreArray(
        "topk_ranks",
        "topk",
        ("rank", "token"),
        "uint",
        "index",
        "kept entries, likeliest first, as indexes into rank_ids; 0 past num_kept; uint16 where "
        "that is wide enough, uint32 elsewhere",
    ),
    ScoreArray(
        "rank_ids",
        "topk",
        ("distinct",),
        "uint32",
        "token id",
        "every token id that the shard keeps, most frequent first",
    ),
    ScoreArray(
        "topk_steps",
        "topk",
        ("rank", "token"),
        "uint16",
        "step",
        "drop from the entry before (from 0 for the first); 0 past num_kept: with "
        "u = step * cumsum(topk_steps, axis=rank), topk_logprobs = -where(u < 1, u, exp(u - 1))",
    ),
    ScoreArray(
        "student_topk_steps",
        "student_topk",
        ("student_rank", "token"),
        "uint16",
        "step",
        "teacher log-prob of each recorded student id: with u = step * student_topk_steps, "
        "student_topk_logprobs = -where(u < 1, u, exp(u - 1))",
    ),
    ScoreArray(
        "student_tail_logprobs",
        "student_topk",
        ("token",),
        "float16",
        "nats",
        "log of the teacher's mass outside the recorded student ids",
    ),
    ScoreArray(
        "draw_ids",
        "draws",
        ("draw", "token"),
        "uint",
        "token id",
        "distinct ids drawn from the teacher's distribution, most often drawn first, then by id; "
        "0 past them",
    ),
    ScoreArray(
        "draw_counts",
        "draws",
        ("draw", "token"),
        "uint16",
        "draws",
        "how often each was drawn; 0 past the last",
    ),
)


def score_arrays(columns: frozenset[ScoreColumn]) -> tuple[ScoreArray, ...]:
    """The arrays that a score shard with these columns holds, in their declared order."""
    return tuple(a for a in SCORE_ARRAYS if a.column is None or a.column in columns)
