"""Shards that fail: tried again, counted wherever that was, set aside, and left out or refused."""

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from opdcache.errors import (
    EngineError,
    EngineLost,
    Interrupted,
    RunChanged,
    ShardsFailed,
    StageError,
    StoreUnavailable,
)
from opdcache.failures import TRIES, Failures
from opdcache.identity import key_of
from opdcache.rollout.stage import run as rollout
from opdcache.runfolder import RunFolder
from opdcache.schemas.manifests import RolloutIdentity, RolloutManifest
from opdcache.schemas.rounds import RolloutRound, ScoreRound
from opdcache.score import stage as score_stage
from opdcache.score.transformers_scorer import TransformersScorer
from opdcache.stage import Silent, Worker, give_up, make_shards
from opdcache.store.cache import Attempt, Cache
from opdcache.train.stage import _pinned

from .shards import write_rollouts
from .test_forwards import CASES
from .test_stage import NAMES, below, tasks
from .test_taken import ROWS, imported, opened
from .test_taken import base as base  # a fixture

Compute = Callable[[RolloutIdentity, Attempt], RolloutManifest]


class Maker:
    """Makes shards; those whose name begins so fail, as often as is said."""

    def __init__(self, folder: Path, fails: dict[str, int], error: Exception | None = None) -> None:
        self.cache, self.failures = Cache(str(folder / "cache")), Failures(folder / "failures")
        self.error, self._fails = error or RuntimeError("the engine broke"), Counter(fails)
        self.tries, self.renewed = Counter[str](), 0

    def make(self, names: list[str]) -> int:
        return make_shards(
            self.cache,
            "rollouts",
            tasks(names),
            is_done=lambda identity: self.cache.rollouts(key_of(identity)) is not None,
            compute=self._compute,
            renew=self._renew,
            failures=self.failures,
            worker=Worker(),
            progress=Silent(),
            poll_s=0.01,
        )

    def aside(self, names: list[str]) -> dict[str, str]:
        return self.failures.aside("rollouts", tasks(names))

    def _compute(self, identity: RolloutIdentity, attempt: Attempt) -> RolloutManifest:
        name = identity.student
        self.tries[name] += 1
        manifest = write_rollouts(attempt, identity)
        if self.tries[name] <= self._fails[name]:
            raise self.error
        return manifest

    def _renew(self) -> None:
        self.renewed += 1
        raise RuntimeError("what is broken does not stop in order")


def test_a_shard_that_fails_twice_is_made_at_the_third_try_and_the_others_meanwhile(
    tmp_path: Path,
) -> None:
    maker = Maker(tmp_path, {"shard 0": TRIES - 1})
    assert maker.make(NAMES[:4]) == 4
    assert maker.tries == Counter({"shard 0": TRIES, "shard 1": 1, "shard 2": 1, "shard 3": 1})
    assert maker.renewed == TRIES - 1
    assert maker.aside(NAMES[:4]) == {}
    assert below(maker.cache, "claims") == []


def test_a_shard_that_always_fails_is_set_aside_and_the_others_are_made(tmp_path: Path) -> None:
    maker = Maker(tmp_path, {"shard 1": 99}, EngineError("no logits"))
    assert maker.make(NAMES[:4]) == 3
    assert maker.tries["shard 1"] == TRIES
    (key,) = tasks(["shard 1"])
    assert maker.aside(NAMES[:4]) == {key: "no logits [OPD402]"}
    again = Maker(tmp_path, {})
    assert again.make(NAMES[:4]) == 0  # nor does another worker try it
    assert again.tries == Counter()
    for file in (tmp_path / "failures" / "rollouts").iterdir():
        file.unlink()
    assert again.make(NAMES[:4]) == 1


def test_failures_of_several_workers_add_up(tmp_path: Path) -> None:
    (key,) = tasks(NAMES[:1])
    for number in range(1, TRIES):
        assert Failures(tmp_path / "failures").note("rollouts", key, ValueError("x")) == number
    maker = Maker(tmp_path, {"shard 0": 99})
    assert maker.make(NAMES[:1]) == 0
    assert maker.tries["shard 0"] == 1


def test_a_worker_on_which_everything_fails_leaves_the_rest_to_others(tmp_path: Path) -> None:
    broken = Maker(tmp_path, dict.fromkeys(NAMES, 99))
    with pytest.raises(StageError, match="3 shards failed one after the other on this worker"):
        broken.make(NAMES)
    assert sum(broken.tries.values()) == 3
    assert broken.aside(NAMES) == {}
    assert Maker(tmp_path, {}).make(NAMES) == 20


def test_a_success_in_between_says_that_the_worker_is_sound(tmp_path: Path) -> None:
    maker = Maker(tmp_path, dict.fromkeys(NAMES[::2], 99))
    assert maker.make(NAMES) == 10
    assert len(maker.aside(NAMES)) == 10  # also when those that fail were all that was left


def test_a_shard_that_another_worker_set_aside_meanwhile_is_not_tried_a_fourth_time(
    tmp_path: Path,
) -> None:
    maker, (first, second) = Maker(tmp_path, {"shard 0": 1}), tasks(NAMES[:2])
    renew = maker._renew

    def others_fail_too() -> None:
        maker.failures.note("rollouts", first, ValueError("x"))
        maker.failures.note("rollouts", first, ValueError("x"))
        renew()

    maker._renew = others_fail_too  # type: ignore[method-assign]
    assert maker.make(NAMES[:2]) == 1
    assert maker.tries == Counter({"shard 0": 1, "shard 1": 1})
    assert maker.cache.rollouts(second) is not None


def test_a_stop_while_an_engine_is_stopped_is_a_stop(tmp_path: Path) -> None:
    maker = Maker(tmp_path, {"shard 0": 1})

    def stopped() -> None:
        give_up()

    maker._renew = stopped  # type: ignore[method-assign]
    with pytest.raises(Interrupted):
        maker.make(NAMES[:3])
    assert below(maker.cache, "commits") == below(maker.cache, "claims") == []


@pytest.mark.parametrize("error", ["CUDA error: device-side assert triggered", "of a class"])
def test_a_fault_that_breaks_the_process_leaves_the_rest_to_a_new_one(
    tmp_path: Path, error: str
) -> None:
    kind = RuntimeError if error.startswith("CUDA") else torch.AcceleratorError
    maker = Maker(tmp_path, {"shard 0": 1}, kind(error))
    with pytest.raises(EngineLost) as caught:
        maker.make(NAMES[:3])
    assert caught.value.exit_code == 75
    assert len(maker.failures.every()) == 1
    assert maker.make(NAMES[:3]) == 3


@pytest.mark.parametrize(
    "error", [StoreUnavailable("away"), OSError(28, "No space left"), ShardsFailed("x")]
)
def test_what_is_not_the_shard_s_fault_is_raised_and_not_counted(
    tmp_path: Path, error: Exception
) -> None:
    maker = Maker(tmp_path, {"shard 0": 1}, error)
    with pytest.raises(type(error)):
        maker.make(NAMES[:2])
    assert maker.failures.every() == []
    assert below(maker.cache, "claims") == below(maker.cache, "data") == []


def test_a_model_that_does_not_load_is_not_the_shard_s_fault(tmp_path: Path) -> None:
    maker = Maker(tmp_path, {})

    def refuse(identity: RolloutIdentity) -> None:
        raise EngineError("vLLM does not start")

    with pytest.raises(EngineError, match="does not start"):
        make_shards(
            maker.cache,
            "rollouts",
            tasks(NAMES[:1]),
            is_done=lambda identity: False,
            compute=maker._compute,
            prepare=refuse,
            failures=maker.failures,
            worker=Worker(),
            progress=Silent(),
        )
    assert maker.failures.every() == []


@pytest.fixture
def poisoned(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, tiny_student: Path) -> None:
    """Three imported shards of a row each, by task; the second can never be scored."""
    rows = [
        ROWS[1] | {"task": task, "completion_token_ids": [number]}
        for number, task in enumerate(("a", "b", "c"))
    ]
    imported(tmp_path, tiny_student, rows)
    make = score_stage._Scorer.make

    def fail(self: Any, task: Any, attempt: Attempt) -> Any:
        if task.rollout.task == "b":
            raise RuntimeError("no kernel takes this shape\nmore")
        return make(self, task, attempt)

    monkeypatch.setattr(score_stage._Scorer, "make", fail)


@pytest.mark.usefixtures("poisoned", "one_thread")
def test_a_round_with_a_poisoned_shard_stops_or_goes_on_by_policy(base: dict[str, Any]) -> None:
    context = opened(base)
    rollout(context, 0)
    with pytest.raises(
        ShardsFailed, match=r"1 shard failed 3 times each, such as .*: RuntimeError: no kernel"
    ) as caught:
        score_stage.run(context, 0)
    assert "max_failed_shards" in str(caught.value)
    assert context.folder.find(ScoreRound, 0) is None

    few = [context.folder.need(RolloutRound, 0).shards[1].content]
    with pytest.raises(ShardsFailed):  # a round of nothing is none
        context.folder.failures.refuse(dict.fromkeys(few, "x"), 9, 1, "round 0")

    patient = opened(base | {"max_failed_shards": 1})
    scored = score_stage.run(patient, 0)
    listed = patient.folder.need(RolloutRound, 0).shards
    (left_out,) = (s.content for s in listed if s.task == "b")
    assert list(scored.failed) == [left_out]
    assert patient.folder.is_done(patient.config, "score", 0, patient.cache)
    rollouts, scores = _pinned(patient, [0])
    assert [s.task for s in rollouts.shards] == ["a", "c"]
    assert [s.content for s in scores.shards] == [s.content for s in rollouts.shards]


def test_workers_that_plan_other_shards_of_the_same_inputs_are_refused(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    folder.write_plan(ScoreRound, 0, ["a", "b"], ["a"], ["content"])
    folder.write_plan(ScoreRound, 0, ["b", "a"], [], ["content"])  # a later worker
    plan = folder.find_plan(ScoreRound, 0)
    assert plan is not None
    assert plan.missing == ("a",)
    with pytest.raises(RunChanged, match="this worker would make other shards"):
        folder.write_plan(ScoreRound, 0, ["a", "c"], [], ["content"])
    folder.write_plan(ScoreRound, 0, ["d"], ["d"], ["content made anew"])
    plan = folder.find_plan(ScoreRound, 0)
    assert plan is not None
    assert (plan.num_shards, plan.missing) == (1, ("d",))


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("draws", [0, 3])
def test_out_of_memory_halves_the_batch_and_changes_no_score(
    tiny_teacher: Path, case: str, draws: int, one_thread: None
) -> None:
    from opdcache.score.teacher import Ask, in_order

    sequences, said = CASES[case], list[str]()
    uniforms = np.random.default_rng(1).random((int(sequences.offsets[-1]), draws))
    drawn = {"draws"} if draws else set()
    ask = Ask(
        frozenset({"topk", "entropy", "sampled"} | drawn),
        k=4,
        mass=1.0,
        num_ids=258,
        uniforms_TN=uniforms if draws else None,
    )
    whole = TransformersScorer(tiny_teacher, dtype="float32", batch_tokens=1024)
    tight = TransformersScorer(tiny_teacher, dtype="float32", batch_tokens=1024, say=said.append)
    body = tight._forwards._body

    def small(**given: Any) -> Any:
        if given["input_ids"].numel() > 60:
            raise RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you…")
        return body(**given)

    tight._forwards._body = small  # type: ignore[assignment]
    ours, theirs = (in_order(scorer.score(sequences, ask)) for scorer in (tight, whole))
    assert said
    assert "score.batch_tokens 1024 is too much here, 512 from now on" in said[0]
    assert tight.details()["batch_tokens"] == 1024 // 2 ** len(said)
    for column in ("sampled_logprobs", "entropy"):
        np.testing.assert_allclose(getattr(ours, column), getattr(theirs, column), atol=1e-5)
    assert ours.topk is not None
    assert theirs.topk is not None
    np.testing.assert_allclose(ours.topk.logprobs, theirs.topk.logprobs, atol=1e-5)
    if draws:
        assert ours.draws is not None
        assert theirs.draws is not None
        np.testing.assert_array_equal(ours.draws.ids, theirs.draws.ids)


@pytest.mark.parametrize("fails_at", [2, 3])
def test_what_was_scored_before_memory_ran_out_is_not_scored_again(
    tiny_teacher: Path, fails_at: int, one_thread: None
) -> None:
    from opdcache.score.teacher import Ask, in_order

    sequences = CASES["a prompt of one token: nothing to share"]
    uniforms = np.random.default_rng(1).random((int(sequences.offsets[-1]), 3))
    ask = Ask(frozenset({"topk", "draws"}), k=4, mass=1.0, num_ids=258, uniforms_TN=uniforms)
    whole, tight = (
        TransformersScorer(tiny_teacher, dtype="float32", batch_tokens=128) for _ in range(2)
    )
    body, calls = tight._forwards._body, list[int]()

    def once(**given: Any) -> Any:
        calls.append(len(given["input_ids"]))
        if len(calls) == fails_at:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return body(**given)

    tight._forwards._body = once  # type: ignore[assignment]
    batches = list(tight.score(sequences, ask))
    rows = [row for batch in batches for row in batch.rows]
    assert sorted(rows) == list(range(len(sequences.completions)))
    assert tight.details()["batch_tokens"] == 64
    ours, theirs = in_order(batches), in_order(whole.score(sequences, ask))
    assert ours.topk is not None
    assert theirs.topk is not None
    np.testing.assert_allclose(ours.topk.logprobs, theirs.topk.logprobs, atol=1e-5)
    assert ours.draws is not None
    assert theirs.draws is not None
    np.testing.assert_array_equal(ours.draws.ids, theirs.draws.ids)


def test_memory_that_is_too_small_for_one_sequence_is_an_error(
    tiny_teacher: Path, one_thread: None
) -> None:
    from opdcache.score.teacher import Ask

    scorer = TransformersScorer(tiny_teacher, dtype="float32", batch_tokens=512)

    def none(**given: Any) -> Any:
        raise MemoryError

    scorer._forwards._body = none  # type: ignore[assignment]
    ask = Ask(frozenset({"topk"}), k=4, mass=1.0, num_ids=258)
    with pytest.raises(EngineError, match="out of memory with a single sequence"):
        list(scorer.score(CASES["a system prompt"], ask))
