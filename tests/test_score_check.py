"""A second scoring is held against what is stored: the noise floor that the CLI tells."""

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from opdcache.cli.tables import noise_lines
from opdcache.rollout.stage import run as rollout
from opdcache.score.check import check, noise
from opdcache.score.stage import run as score
from opdcache.store.scores import Scores, TopK

from .test_taken import imported, opened


def scores(**changes: object) -> Scores:
    """Two tokens, three kept entries of the first and two of the second."""
    topk = TopK(
        ids=np.asarray([[7, 3, 9], [2, 5, 0]], np.int32),
        logprobs=np.asarray([[-0.5, -1.5, -2.5], [-0.25, -3.0, 0.0]], np.float32),
        num_kept=np.asarray([3, 2], np.uint16),
        tail_logprobs=np.asarray([-4, -4], np.float32),
    )
    held = Scores(
        np.asarray([0, 2]),
        sampled_logprobs=np.asarray([-1, -2], np.float32),
        entropy=np.asarray([1, 2], np.float32),
        topk=topk,
    )
    return replace(held, **changes)  # type: ignore[arg-type]


def test_scores_are_at_no_distance_from_themselves() -> None:
    found = noise([(scores(), scores())])
    assert (found.num_samples, found.num_tokens) == (1, 2)
    assert found.sampled_max == found.entropy_max == found.topk_max == found.reverse_kl_sampled == 0
    assert found.same_first == found.same_topk == 1


def test_differences_are_those_of_the_same_token_and_entry() -> None:
    again = TopK(
        ids=np.asarray([[3, 7, 8], [2, 5, 4]], np.int32),
        logprobs=np.asarray([[-0.7, -0.9, -2.5], [-0.5, -3.0, -5.0]], np.float32),
        num_kept=np.asarray([3, 3], np.uint16),
        tail_logprobs=np.asarray([-4, -4], np.float32),
    )
    sampled = np.asarray([-1.5, -2.0], np.float32)
    found = noise([(scores(), scores(sampled_logprobs=sampled, topk=again))])
    assert found.sampled_mean == pytest.approx(0.25)
    assert found.sampled_max == pytest.approx(0.5)
    assert found.reverse_kl_sampled == pytest.approx((math.exp(-0.5) - 1 + 0.5) / 2)
    # Shared: 7 (0.4 apart), 3 (0.8), 2 (0.25), 5 (0); 9 is not kept again.
    assert found.topk_mean == pytest.approx((0.4 + 0.8 + 0.25 + 0) / 4, abs=1e-6)
    assert found.topk_max == pytest.approx(0.8, abs=1e-6)
    assert found.same_first == 0.5
    assert found.same_topk == 0.8


def test_a_column_that_is_not_stored_is_not_spoken_of() -> None:
    found = noise([(scores(entropy=None), scores(entropy=None))])
    assert math.isnan(found.entropy_mean)
    assert not any("entropy" in line for line in noise_lines(found))
    assert any("noise floor" in line for line in noise_lines(found))


def test_a_wider_stored_set_is_held_against_what_the_run_uses_of_it(
    tmp_path: Path, tiny_student: Path, tiny_teacher: Path, one_thread: None
) -> None:
    imported(tmp_path, tiny_student)
    config: dict[str, Any] = {
        "cache": str(tmp_path / "cache"),
        "student": {"model": str(tiny_student)},
        "teacher": {"model": str(tiny_teacher), "dtype": "float32"},
        "prompts": {"source": {"type": "jsonl", "path": str(tmp_path / "none.jsonl")}},
        "rollouts": {"from": str(tmp_path / "elsewhere")},
        "train": {"loss": {"k": 2}},
    }
    for name, k in (("wide", 8), ("narrow", 2)):
        context = opened(config | {"output": str(tmp_path / name), "score": {"k": k}})
        rollout(context, 0)
        (shard,) = score(context, 0).shards
    assert shard.cached
    assert check(context, 0, 10).same_topk == 1
