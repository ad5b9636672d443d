"""A run whose number of ranks changes under way, against one process that is never interrupted."""

import os
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch import Tensor

from .conftest import make_tiny_model
from .test_learner import TIGHT, carry_out, job, run_config, weights, write_rounds

pytestmark = [pytest.mark.engine, pytest.mark.usefixtures("one_thread")]

STAGES = (0, 1, 2, 3)
FEWER = {f"fewer-zero{stage}": {"zero_stage": stage} for stage in STAGES}
BF16 = {
    f"fewer-bf16-zero{stage}": {"zero_stage": stage, "dtype": "bfloat16"} for stage in STAGES[1:]
}
WHOLE = {name.replace("fewer", "whole"): train for name, train in BF16.items()}
MORE = {
    "more-zero1": {"zero_stage": 1},
    "more-zero3": {
        "zero_stage": 3,
        "deepspeed": {"zero_optimization": {"sub_group_size": 20_000}},  # several parts a rank
    },
}
ALONE, CUT_SHORT = "alone", "cut-short"


@dataclass(frozen=True)
class Runs:
    """Run folders by name, and the student that they start from."""

    base: Path
    student: Path

    def student_of(self, name: str, round_index: int = 1) -> Tensor:
        """All weights that a run exported, one after another."""
        return joined(weights(self.base / name / "students" / f"{round_index:03d}"))


def joined(tensors: dict[str, Tensor]) -> Tensor:
    return torch.cat([tensors[name].flatten() for name in sorted(tensors)])


@pytest.fixture(scope="module")
def runs(
    tmp_path_factory: pytest.TempPathFactory, tiny_tokenizer_folder: Path, one_thread: None
) -> Runs:
    """Two updates on two ranks, the third on one or on four; the next round on one again."""
    base = tmp_path_factory.mktemp("ranks")
    student = make_tiny_model(base / "student", tiny_tokenizer_folder, seed=1)
    configs = {
        name: run_config(name, base, student, micro_batch_tokens=TIGHT, **train)
        for name, train in {
            **{**FEWER, **BF16, **WHOLE, **MORE},
            **{ALONE: {"zero_stage": 1}, CUT_SHORT: {"zero_stage": 3}},
        }.items()
    }
    write_rounds(str(base / "cache"), [base / name for name in configs])
    begun = [configs[name] for name in (*FEWER, *BF16, *MORE, CUT_SHORT)]
    two = [*(job(c, stop_after=2) for c in begun), *(job(configs[name]) for name in WHOLE)]
    carry_out(base, "two", two, ranks=2)
    carry_out(base, "four", [job(configs[name]) for name in MORE], ranks=4)
    leave_half_a_conversion(base / CUT_SHORT / "checkpoints")
    os.link(base / CUT_SHORT / "checkpoints" / "latest", base / "before")
    alone = [job(configs[ALONE]), job(configs[ALONE], 1)]
    ends = [job(configs[name]) for name in (*FEWER, *BF16, CUT_SHORT)]
    carry_out(base, "one", [*alone, *ends, *(job(configs[name], 1) for name in MORE)])
    return Runs(base, student)


def leave_half_a_conversion(checkpoints: Path) -> None:
    """A part of a weight, as a conversion of another state leaves it when it is killed."""
    saved = (checkpoints / "latest").read_text()
    part = checkpoints / "universal" / saved / "tmp" / "model.model.norm.weight" / "0" / "fp32.07"
    part.parent.mkdir(parents=True)
    torch.save(torch.zeros(3), part)


def error(ours: Tensor, exact: Tensor) -> float:
    return float((ours - exact).norm() / exact.norm())


@pytest.mark.parametrize("name", [*FEWER, *MORE, CUT_SHORT])
def test_a_round_begun_on_two_ranks_ends_on_others_as_on_one(runs: Runs, name: str) -> None:
    exact, start = runs.student_of(ALONE), joined(weights(runs.student))
    assert error(runs.student_of(name), exact) <= 1e-5
    assert error(runs.student_of(name) - start, exact - start) <= 1e-3


@pytest.mark.parametrize("name", MORE)
def test_the_next_round_goes_on_on_one_rank_with_what_four_saved(runs: Runs, name: str) -> None:
    first, second = runs.student_of(ALONE), runs.student_of(ALONE, 2)
    assert error(runs.student_of(name, 2), second) <= 1e-5
    assert error(runs.student_of(name, 2) - first, second - first) <= 1e-3


@pytest.mark.parametrize("name", BF16)
def test_bf16_goes_on_on_one_rank_from_the_float32_masters_of_two(runs: Runs, name: str) -> None:
    """The third update's batch is one sample, whose gradient both have in the same bits."""
    whole = runs.student_of(name.replace("fewer", "whole"))
    assert torch.equal(runs.student_of(name), whole)


def test_the_name_of_the_newest_state_is_replaced_and_never_written_over(runs: Runs) -> None:
    """A kill while it is written over leaves it empty, and the run without a state."""
    assert (runs.base / "before").read_text().endswith("-ranks-2")
    assert (runs.base / CUT_SHORT / "checkpoints" / "latest").read_text().endswith("-ranks-1")


def test_what_a_change_of_ranks_makes_for_the_moment_is_gone_afterwards(runs: Runs) -> None:
    for name in (*FEWER, *BF16, *MORE, CUT_SHORT):
        (state,) = (p for p in (runs.base / name / "checkpoints").iterdir() if p.is_dir())
        assert state.name.endswith("-ranks-1")
