"""``opdcache train --nproc``: real ranks on this machine."""

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from opdcache.runfolder import RunFolder
from opdcache.schemas.rounds import TrainRound

from .test_learner import run_config, weights, write_rounds
from .test_other_ranks import error, joined

pytestmark = pytest.mark.engine

LONG = {"epochs": 60}
RUNS: dict[str, dict[str, object]] = {
    **{"alone": {}, "two": {}, "slurm": {}, "stopped": LONG, "killed": LONG, "orphaned": LONG},
    "refused": {"deepspeed": {"zero_optimization": {"no_such_key": 1}}},
}
TRAIN = [sys.executable, "-m", "opdcache.cli.main", "train"]
ABORTS = """
import atexit, os, sys

class Late:
    is_rank = False

    def note(self):
        torch = sys.modules.get("torch")
        self.is_rank = torch is not None and torch.distributed.is_initialized()

    def __del__(self, abort=os.abort):
        if self.is_rank:
            abort()

late = Late()
atexit.register(late.note)
"""
"""A ``sitecustomize`` with the worst that a thread of gloo does: a rank whose interpreter comes to
its own end is aborted, each time."""


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory, tiny_student: Path) -> Path:
    """Run files of a short round, and of long ones; the short one trained by a single process."""
    folder = tmp_path_factory.mktemp("nproc")
    for name, changes in RUNS.items():
        config = run_config(name, folder, tiny_student, **changes)
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(config))
    write_rounds(str(folder / "cache"), [folder / name for name in RUNS])
    (folder / "sitecustomize.py").write_text(ABORTS)
    done = train(folder / "alone.yaml")
    assert done.wait() == 0, done.communicate()[1]
    return folder


def train(run: Path, *options: str, **variables: str) -> "subprocess.Popen[str]":
    environment = {k: v for k, v in os.environ.items() if k != "RANK"} | variables
    environment |= {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": ""}
    path = [str(run.parent), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment["PYTHONPATH"] = os.pathsep.join(path)
    command = [*TRAIN, str(run), "--round", "0", *options]
    return subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True)


def under_way(run: Path, *options: str) -> "subprocess.Popen[str]":
    """A training that has done some updates."""
    process, folder = train(run, *options), RunFolder(run.with_suffix(""))
    while process.poll() is None and len(folder.metrics()) < 2:
        time.sleep(0.05)
    return process


def errors(stderr: str) -> list[str]:
    return [line for line in stderr.splitlines() if line.startswith("error: ")]


def test_two_ranks_that_one_command_starts_train_as_one_process(base: Path) -> None:
    process = train(base / "two.yaml", "--nproc", "2")
    stderr = process.communicate()[1]
    assert process.returncode == 0, stderr
    two, alone = (joined(weights(base / name / "students" / "001")) for name in ("two", "alone"))
    assert error(two, alone) <= 1e-5
    assert stderr.count("starting DeepSpeed") == 1


def test_tasks_of_srun_train_as_one_process(base: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    step = {"SLURM_JOB_ID": "7", "SLURM_STEP_ID": "0", "SLURM_NTASKS": "2"}
    meet = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    tasks = [
        train(base / "slurm.yaml", SLURM_PROCID=n, SLURM_LOCALID=n, **step, **meet) for n in "01"
    ]
    said = [task.communicate()[1] for task in tasks]
    assert [task.returncode for task in tasks] == [0, 0], said
    ours, alone = (joined(weights(base / name / "students" / "001")) for name in ("slurm", "alone"))
    assert error(ours, alone) <= 1e-5


def test_a_stop_on_request_leaves_a_checkpoint_of_both_ranks(base: Path) -> None:
    process = under_way(base / "stopped.yaml", "--nproc", "2")
    process.send_signal(signal.SIGTERM)
    stderr = process.communicate()[1]
    assert process.returncode == 75, stderr
    assert len(errors(stderr)) == 1
    assert "which is saved; run the same command to go on" in stderr
    folder = RunFolder(base / "stopped")
    saved = (folder.checkpoints / "latest").read_text()
    assert saved == f"round-000-update-{len(folder.metrics()):06d}-ranks-2"
    assert folder.find(TrainRound, 0) is None


def test_a_rank_that_is_killed_ends_the_others_and_is_named(base: Path) -> None:
    process = under_way(base / "killed.yaml", "--nproc", "2")
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    environments = {pid: Path(f"/proc/{pid}/environ").read_bytes() for pid in children}
    (second,) = (int(pid) for pid, own in environments.items() if b"\0RANK=1\0" in own)
    os.kill(second, signal.SIGKILL)
    stderr = process.communicate()[1]
    assert process.returncode == 75
    assert "Traceback" not in stderr
    assert "rank 1 of 'opdcache train' was ended by SIGKILL" in errors(stderr)[-1]


def test_ranks_whose_launcher_is_killed_save_and_stop(base: Path) -> None:
    process = under_way(base / "orphaned.yaml", "--nproc", "2")
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    ranks = [Path(f"/proc/{pid}") for pid in children]
    assert len(ranks) == 2
    process.kill()
    process.communicate()
    until = time.monotonic() + 60
    while any(rank.exists() for rank in ranks) and time.monotonic() < until:
        time.sleep(0.1)
    assert not any(rank.exists() for rank in ranks)
    folder = RunFolder(base / "orphaned")
    assert folder.find(TrainRound, 0) is None
    assert (folder.checkpoints / "latest").exists()


def test_what_deepspeed_itself_refuses_of_its_configuration_is_one_line(base: Path) -> None:
    process = train(base / "refused.yaml")
    stderr = process.communicate()[1]
    assert process.returncode == 2, stderr
    (said,) = errors(stderr)
    assert "train.deepspeed: DeepSpeed refuses it" in said
    assert "no_such_key" in said
    assert "Traceback" not in stderr


def test_a_stage_that_is_missing_is_said_once_whatever_the_number_of_ranks(
    base: Path, tiny_student: Path
) -> None:
    config = run_config("unscored", base, tiny_student)
    (base / "unscored.yaml").write_text(yaml.safe_dump(config))
    process = train(base / "unscored.yaml", "--nproc", "2")
    stderr = process.communicate()[1]
    assert process.returncode == 75
    assert stderr.count("round 0 has no finished rollout stage") == 1
    assert len(stderr.splitlines()) == 1
