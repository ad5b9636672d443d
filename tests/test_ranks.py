"""Ranks of a learner: which one a process is, and how several are started and looked after."""

import os
import sys
from pathlib import Path
from types import ModuleType

import pytest

from opdcache.cli import main
from opdcache.errors import StageError, UsageError
from opdcache.jobs.ranks import run_ranks, threads_each
from opdcache.train.ranks import first_node, lost_ranks, slurm_ranks

SRUN = {
    "SLURM_PROCID": "5",
    "SLURM_NTASKS": "8",
    "SLURM_LOCALID": "1",
    "SLURM_JOB_ID": "41234",
    "SLURM_STEP_ID": "0",
    "SLURM_JOB_NODELIST": "gpu[003-004,7],login",
}


def test_a_task_of_srun_is_a_rank() -> None:
    assert slurm_ranks({**SRUN, "MASTER_ADDR": "head", "MASTER_PORT": "1234"}) == {
        "RANK": "5",
        "WORLD_SIZE": "8",
        "LOCAL_RANK": "1",
        "MASTER_ADDR": "head",
        "MASTER_PORT": "1234",
    }


def test_tasks_of_srun_meet_at_the_first_node_on_a_port_of_their_job() -> None:
    found = slurm_ranks(SRUN)
    other = slurm_ranks({**SRUN, "SLURM_JOB_ID": "41235"})
    assert found["MASTER_ADDR"] == "gpu003"
    assert 1024 < int(found["MASTER_PORT"]) < 32768
    assert other["MASTER_PORT"] != found["MASTER_PORT"]


@pytest.mark.parametrize(
    ("nodes", "first"),
    [
        ("node", "node"),
        ("a,b", "a"),
        ("n[01-04]", "n01"),
        ("n[7,9-12]-ib,m1", "n7-ib"),
        ("r[1-2]n[3-4]", "r1n3"),
        ("", None),
    ],
)
def test_the_first_of_slurm_s_nodes(nodes: str, first: str | None) -> None:
    assert first_node(nodes) == first


@pytest.mark.parametrize("name", ["SLURM_JOB_NODELIST", "SLURM_JOB_ID"])
def test_tasks_that_do_not_know_where_to_meet_are_refused_with_what_to_set(name: str) -> None:
    lacking = {k: v for k, v in SRUN.items() if k != name}
    with pytest.raises(UsageError, match=r"MASTER_(ADDR|PORT) is not set; export MASTER_ADDR"):
        slurm_ranks(lacking)


@pytest.mark.parametrize(
    "environment",
    [
        {},
        {**SRUN, "RANK": "0"},
        {**SRUN, "SLURM_NTASKS": "1"},
        {k: v for k, v in SRUN.items() if k != "SLURM_STEP_ID"},
    ],
    ids=["no Slurm", "torchrun within srun", "one task", "a batch script"],
)
def test_other_processes_are_left_alone(environment: dict[str, str]) -> None:
    assert slurm_ranks(environment) == {}


def test_a_task_that_sees_its_own_device_alone_takes_that() -> None:
    assert slurm_ranks({**SRUN, "CUDA_VISIBLE_DEVICES": "3"})["LOCAL_RANK"] == "0"
    assert slurm_ranks({**SRUN, "CUDA_VISIBLE_DEVICES": "0,1"})["LOCAL_RANK"] == "1"


def test_an_error_that_is_not_a_lost_rank_s_stays_what_it_is() -> None:
    with pytest.raises(RuntimeError, match="shape"), lost_ranks():
        raise RuntimeError("shape")


@pytest.fixture
def instead(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> "Instead":
    """A shell script that is run in place of every rank's Python."""
    for name in ("RANK", "OMP_NUM_THREADS"):
        monkeypatch.delenv(name, raising=False)
    return Instead(monkeypatch, tmp_path)


class Instead:
    """What ranks do."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
        self._monkeypatch, self._script = monkeypatch, folder / "python"
        self.said = folder / "said"

    def __call__(self, script: str) -> None:
        self._script.write_text(f"#!/bin/sh\nexec 3>>{self.said}\n{script}\n")
        self._script.chmod(0o755)
        self._monkeypatch.setattr("sys.executable", str(self._script))


VARIABLES = 'echo "$RANK $LOCAL_RANK $WORLD_SIZE $MASTER_ADDR $OMP_NUM_THREADS $4" >&3'


def test_every_rank_gets_its_variables_and_its_share_of_the_cores(instead: Instead) -> None:
    instead(VARIABLES)
    assert run_ranks(2, "train", "run.yaml") == 0
    threads = max(1, len(os.sched_getaffinity(0)) // 2)
    assert sorted(instead.said.read_text().splitlines()) == [
        f"0 0 2 127.0.0.1 {threads} run.yaml",
        f"1 1 2 127.0.0.1 {threads} run.yaml",
    ]


def test_a_number_of_threads_that_the_user_set_stays(
    instead: Instead, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    instead(VARIABLES)
    run_ranks(2, "train", "run.yaml")
    assert {line.split()[4] for line in instead.said.read_text().splitlines()} == {"7"}


def test_more_ranks_than_cores_have_a_thread_each() -> None:
    assert threads_each(1000) == 1


def test_the_rank_where_a_fault_began_is_shown_and_its_exit_code_kept(
    instead: Instead, capfd: pytest.CaptureFixture[str]
) -> None:
    instead('[ $RANK = 1 ] || exec sleep 60\necho "error: that shard" >&2\nexit 3')
    assert run_ranks(3, "train", "run.yaml") == 3
    assert capfd.readouterr().err == "rank 1:\nerror: that shard\n"


def test_an_error_that_every_rank_meets_is_shown_once(
    instead: Instead, capfd: pytest.CaptureFixture[str]
) -> None:
    instead('echo "error: that key" >&2\nexit 2')
    assert run_ranks(3, "train", "run.yaml") == 2
    assert capfd.readouterr().err == "error: that key\n"


def test_a_rank_that_lost_another_does_not_hide_why(
    instead: Instead, capfd: pytest.CaptureFixture[str]
) -> None:
    instead('[ $RANK = 1 ] || exit 75\nsleep 1\necho "error: no memory" >&2\nexit 1')
    assert run_ranks(2, "train", "run.yaml") == 1
    assert capfd.readouterr().err == "rank 1:\nerror: no memory\n"


def test_a_rank_that_a_signal_ended_is_named_with_the_signal(instead: Instead) -> None:
    instead("[ $RANK = 1 ] && kill -KILL $$\nexec sleep 60")
    with pytest.raises(StageError, match=r"rank 1 of 'opdcache train'.*SIGKILL.*memory"):
        run_ranks(2, "train", "run.yaml")


def test_ranks_within_ranks_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "0")
    with pytest.raises(UsageError, match="RANK is set"):
        run_ranks(2, "train", "run.yaml")


def test_a_fault_of_ours_in_a_rank_is_a_traceback_and_ends_it_as_any_error(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    left: list[int] = []

    def fault(arguments: list[str]) -> int:
        raise ZeroDivisionError("ours")

    monkeypatch.setattr(main, "_exit_code", fault)
    monkeypatch.setattr("opdcache.train.ranks.leave", left.append)
    monkeypatch.setitem(sys.modules, "deepspeed", ModuleType("deepspeed"))
    with pytest.raises(SystemExit) as ended:
        main.main()
    assert (ended.value.code, left) == (1, [1])
    assert capsys.readouterr().err.endswith("ZeroDivisionError: ours\n")
