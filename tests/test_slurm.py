"""A run through a real Slurm, in which things go wrong, and the same run on one machine."""

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from opdcache.rounds import status
from opdcache.runfile import load_run
from opdcache.runfolder import RunFolder
from opdcache.schemas.status import StageStatus
from opdcache.store.cache import Cache
from opdcache.store.upkeep import verify

from .faults.chaos import run_file
from .slurm_cluster import SlurmCluster, slurm_cluster

pytestmark = [pytest.mark.slurm, pytest.mark.timeout(1500)]

ROUNDS = 2
LAUNCH: dict[str, Any] = {
    "rollout": {"workers": 3, "cpus": 1},
    "score": {"workers": 3, "cpus": 1},
    "train": {"ranks": 2, "cpus": 1},
    "slurm": {"setup": "export DS_ACCELERATOR=cpu", "warn_s": 30},
}


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SlurmCluster]:
    with slurm_cluster(tmp_path_factory.mktemp("slurm")) as running:
        yield running


def write_run(folder: Path, name: str, student: Path, teacher: Path) -> Path:
    """A run of two rounds, long enough to be met in the middle of its training."""
    path = run_file(folder, name, student, teacher, f"cache-{name}")
    config = yaml.safe_load(path.read_text())
    config |= {"rounds": ROUNDS, "launch": LAUNCH}
    config["train"]["epochs"] = 4
    path.write_text(yaml.safe_dump(config))
    return path


def opdcache(*arguments: object) -> str:
    """What a command prints; one thread, as a job's worker has."""
    command = [sys.executable, "-m", "opdcache.cli.main", *map(str, arguments)]
    variables = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=variables)
    assert done.returncode == 0, done.stderr
    return done.stdout


def when(
    run: Path, round_index: int, stage: str, holds: Callable[[StageStatus], bool]
) -> StageStatus:
    """Wait until a stage is so far."""
    until = time.monotonic() + 300
    while time.monotonic() < until:
        now = status(load_run(run))
        (of,) = (s for s in now.stages if (s.round, s.stage) == (round_index, stage))
        if holds(of):
            return of
        time.sleep(0.1)
    raise AssertionError(f"{now.model_dump_json(indent=1)}\n{logs(run)}")


def logs(run: Path) -> str:
    folder = RunFolder(run.with_suffix("")).path / "slurm" / "logs"
    return "\n".join(f"{p.name}:\n{p.read_text()[-1500:]}" for p in sorted(folder.glob("*.log")))


def exported(run: Path) -> list[bytes]:
    folder = RunFolder(run.with_suffix(""))
    return [
        (folder.student_path(number) / "model.safetensors").read_bytes()
        for number in range(1, ROUNDS + 1)
    ]


def test_a_run_through_slurm_ends_in_the_bits_of_a_local_one_whatever_is_killed(
    cluster: SlurmCluster, tmp_path: Path, tiny_student: Path, tiny_teacher: Path
) -> None:
    tmp_path = tmp_path / "a folder"
    tmp_path.mkdir()
    run = write_run(tmp_path, "remote", tiny_student, tiny_teacher)
    table = opdcache("submit", "slurm", run)
    jobs = re.findall(r"^\s*(\d+)\s+(\d)\s+(rollout|score|train)\s+(\d)", table, re.MULTILINE)
    assert [(int(r), stage, int(n)) for _, r, stage, n in jobs] == [
        (r, stage, n)
        for r in range(ROUNDS)
        for stage, n in (("rollout", 3), ("score", 3), ("train", 2))
    ]
    of = {(int(r), stage): number for number, r, stage, _ in jobs}

    # A worker is killed in the middle of its first shard.
    sampling = when(run, 0, "rollout", lambda s: any(w.state == "running" for w in s.workers))
    victim = next(w for w in sampling.workers if w.state == "running")
    os.kill(victim.pid, signal.SIGKILL)

    # A training is cancelled, and put back in the queue by hand.
    when(run, 0, "train", lambda s: s.done >= 3)
    cluster.run("scancel", of[0, "train"])
    cluster.wait(of[0, "train"])
    saved = RunFolder(run.with_suffix("")).checkpoints / "latest"
    assert saved.read_text().startswith("round-000-update-")
    assert status(load_run(run)).stages[2].state != "done"
    cluster.run("scontrol", "requeue", of[0, "train"])

    # The controller goes away while workers sample.
    when(run, 1, "rollout", lambda s: s.done > 0 or s.state == "done")
    cluster.restart_controller()

    states = cluster.wait(*of.values(), timeout_s=600)
    assert set(states.values()) == {"COMPLETED"}, logs(run)
    assert status(load_run(run)).is_done
    task = f"{of[0, 'rollout']}_{victim.index}"
    assert int(cluster.show(task)["Restarts"]) == 1
    assert int(cluster.show(of[0, "train"])["Restarts"]) == 1
    assert opdcache("submit", "slurm", run) == ""  # nothing is left to submit

    local = write_run(tmp_path, "local", tiny_student, tiny_teacher)
    opdcache("run", local)
    assert exported(run) == exported(local)
    caches = [Cache(str(tmp_path / f"cache-{name}")) for name in ("remote", "local")]
    commits = [{info.path for info in cache.objects.list("commits")} for cache in caches]
    assert commits[0] == commits[1]
    assert verify(caches[0], deep=True) == []
    assert list(caches[0].objects.list("claims")) == []


def test_a_warning_before_the_time_limit_saves_and_requeues(
    cluster: SlurmCluster, tmp_path: Path, tiny_student: Path, tiny_teacher: Path
) -> None:
    """SIGUSR1, as Slurm sends it ahead of a limit: no shard is half made, the learner saves."""
    run = write_run(tmp_path, "warned", tiny_student, tiny_teacher)
    opdcache("rollout", run, "--round", 0)
    opdcache("score", run, "--round", 0)
    table = opdcache("submit", "slurm", run, "--rounds", "0")
    (number,) = re.findall(r"^\s*(\d+)\s+0\s+train", table, re.MULTILINE)
    under_way = when(run, 0, "train", lambda s: s.done >= 3)
    cluster.run("scancel", "--signal=USR1", number)
    assert cluster.wait(number, timeout_s=300) == {number: "COMPLETED"}, logs(run)
    assert int(cluster.show(number)["Restarts"]) == 1
    said = logs(run)
    (update,) = set(re.findall(r"stopped after update (\d+) of round 0, which is saved", said))
    assert int(update) >= under_way.done
    assert f"resuming after update {update}" in said
    assert status(load_run(run)).stages[2].state == "done"


def test_a_job_that_finds_inputs_missing_waits_in_the_queue_and_not_on_a_node(
    cluster: SlurmCluster, tmp_path: Path, tiny_student: Path, tiny_teacher: Path
) -> None:
    run = write_run(tmp_path, "early", tiny_student, tiny_teacher)
    config = yaml.safe_load(run.read_text())
    config["launch"]["slurm"]["max_requeues"] = 1
    run.write_text(yaml.safe_dump(config))
    table = opdcache("submit", "slurm", run, "--rounds", "1")
    (first, *others) = re.findall(r"^\s*(\d+)\s+1\s", table, re.MULTILINE)
    states = cluster.wait(first, *others, timeout_s=300)
    assert set(states.values()) == {"FAILED"}
    assert "round 0 has no finished train stage" in logs(run)
    shown = cluster.show(f"{first}_0")
    assert (shown["ExitCode"], shown["Restarts"]) == ("75:0", "1")
