"""A round's updates that are skipped, the round that ends early, the rollouts of older rounds; with
real DeepSpeed."""

from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from opdcache.runfolder import RunFolder
from opdcache.schemas.rounds import TrainRound

from .test_learner import BATCH, LENGTHS, SAMPLES, carry_out, exact_bytes, job, run_config
from .test_learner import write_rounds as write

pytestmark = [pytest.mark.engine, pytest.mark.usefixtures("one_thread")]

STAGES = ("fp32-0", "fp32-1", "fp32-2", "fp32-3", "bf16-1", "bf16-3")


@dataclass(frozen=True)
class Ended:
    """Runs that trained one round, and one that trained two."""

    base: Path
    order: list[int]

    def round(self, name: str, index: int = 0) -> TrainRound:
        return RunFolder(self.base / name).need(TrainRound, index)

    def weights(self, name: str) -> dict[str, torch.Tensor]:
        return exact_bytes(self.base / name / "students" / "001")


@pytest.fixture(scope="module")
def ended(tmp_path_factory: pytest.TempPathFactory, tiny_student: Path, one_thread: None) -> Ended:
    base = tmp_path_factory.mktemp("ended")
    configs = {}
    for stage in STAGES:
        dtype = "float32" if stage.startswith("fp32") else "bfloat16"
        how = {"zero_stage": int(stage[-1]), "dtype": dtype}
        configs[f"skips-{stage}"] = run_config(f"skips-{stage}", base, tiny_student, **how)
        configs[f"ends-{stage}"] = run_config(
            f"ends-{stage}", base, tiny_student, end_round={"support_mass": 1.0}, **how
        )
    configs["stops"] = run_config("stops", base, tiny_student, max_skipped=1)
    configs["older"] = run_config("older", base, tiny_student, max_staleness=1)
    write(str(base / "cache"), [base / name for name in configs])
    order = first_round_order()
    after_first = order[BATCH:]
    jobs = [
        *(job(configs[f"skips-{stage}"], poisoned=after_first) for stage in STAGES),
        *(job(configs[f"ends-{stage}"]) for stage in STAGES),
        job(configs["stops"], poisoned=after_first, fails=["not finite", "update 2", "row"]),
        *(job(configs["older"], index) for index in range(2)),
    ]
    carry_out(base, "jobs", jobs)
    return Ended(base, order)


def first_round_order() -> list[int]:
    """The order of round 0, seed 5, as its definition says."""
    import numpy as np

    return [int(i) for i in np.random.default_rng([5, 0]).permutation(len(SAMPLES))]


@pytest.mark.parametrize("stage", STAGES)
def test_updates_without_a_finite_gradient_are_skipped_and_counted(
    ended: Ended, stage: str
) -> None:
    found = ended.round(f"skips-{stage}")
    assert (found.num_updates, found.num_skipped) == (1, 2)
    assert found.num_samples == BATCH
    assert found.num_tokens == sum(LENGTHS[i] for i in ended.order[:BATCH])
    assert found.dropped["gradient not finite"] == len(SAMPLES) - BATCH
    logged = RunFolder(ended.base / f"skips-{stage}").metrics()
    assert [row["update"] for row in logged] == [0]


@pytest.mark.parametrize("stage", STAGES)
def test_a_skipped_update_leaves_the_weights_as_they_are(ended: Ended, stage: str) -> None:
    skipped, after_one = ended.weights(f"skips-{stage}"), ended.weights(f"ends-{stage}")
    for name, tensor in after_one.items():
        assert torch.equal(skipped[name], tensor), name


def test_one_update_more_than_may_be_skipped_stops_the_run(ended: Ended) -> None:
    assert RunFolder(ended.base / "stops").find(TrainRound, 0) is None


@pytest.mark.parametrize("stage", STAGES)
def test_a_round_whose_rollouts_are_too_old_ends_and_says_what_it_left(
    ended: Ended, stage: str
) -> None:
    found = ended.round(f"ends-{stage}")
    assert found.ended_early is not None
    assert found.ended_early.startswith("support_mass is 0.")
    assert (found.num_updates, found.num_samples) == (1, BATCH)
    left = len(SAMPLES) - BATCH
    assert found.dropped["round ended early"] == left
    assert found.num_tokens == sum(LENGTHS[i] for i in ended.order[:BATCH])


def test_older_rounds_rollouts_are_trained_on_too_while_they_are_fresh_enough(
    ended: Ended,
) -> None:
    assert ended.round("older", 0).num_samples == len(SAMPLES)
    assert ended.round("older", 1).num_samples == 2 * len(SAMPLES)
    assert ended.round("older", 1).num_tokens == 2 * sum(LENGTHS)
