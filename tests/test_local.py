"""The launcher of one machine: what it starts, starts again, and makes of how processes end."""

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from multiprocessing import Process
from pathlib import Path
from typing import Any

import pytest

from opdcache.errors import StageError
from opdcache.jobs import local
from opdcache.jobs.job import jobs_of
from opdcache.runfile import load_run
from opdcache.runfolder import RunFolder

from .test_runfile import run_file

DONE = "done"


def _end(code: int) -> None:
    if code < 0:
        os.kill(os.getpid(), -code)
    sys.exit(code)


class Fakes:
    """Processes that end as they are told, in the order in which they are started."""

    def __init__(self, *codes: int) -> None:
        self.codes, self.started = list(codes), list[tuple[list[str], dict[str, str]]]()
        self.on_start: Callable[[], None] | None = None

    def start(self, arguments: Sequence[str], environment: Mapping[str, str]) -> Process:
        self.started.append((list(arguments), dict(environment)))
        process = Process(target=_end, args=(self.codes.pop(0) if self.codes else 0,))
        process.start()
        if self.on_start is not None:
            self.on_start()
        return process


def _stop() -> None:
    os.kill(os.getpid(), signal.SIGTERM)


@pytest.mark.parametrize("workers", [1, 3])
def test_a_stop_that_comes_while_a_process_starts_stops_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, workers: int
) -> None:
    path, fakes = run_file(tmp_path, {"launch.rollout": {"workers": workers}}), Fakes()
    fakes.on_start = _stop
    monkeypatch.setattr(local, "Processes", lambda **given: fakes)
    config = load_run(path)
    assert local.Local(config).launch(jobs_of(config, path)) == 75
    assert len(fakes.started) == 1


SLEEPER = """
import signal, sys, time
from opdcache.jobs import processes
if __name__ == "__main__":
    one = processes.Processes(with_vllm=False).start(["--version"], {"OMP_NUM_THREADS": "1"})
    one.join()
    assert one.exitcode == 0, one.exitcode
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    print("ready", flush=True)
    sys.stdin.readline()  # meanwhile the whole group gets a signal
    again = processes.Processes(with_vllm=False).start(["--version"], {"OMP_NUM_THREADS": "1"})
    again.join()
    from multiprocessing import forkserver
    print(again.exitcode, forkserver._forkserver._forkserver_pid, flush=True)
"""


@pytest.mark.slow
def test_a_signal_to_the_whole_group_does_not_end_what_starts_processes(tmp_path: Path) -> None:
    script = tmp_path / "sleeper.py"
    script.write_text(SLEEPER)
    process = subprocess.Popen(
        [sys.executable, script],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    assert process.stdout is not None
    assert process.stdin is not None
    assert process.stdout.readline().startswith("opdcache")
    assert process.stdout.readline() == "ready\n"
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    os.killpg(process.pid, signal.SIGUSR1)
    process.stdin.write("\n")
    process.stdin.flush()
    assert process.stdout.readline().startswith("opdcache")
    code, forkserver = process.stdout.readline().split()
    assert process.wait() == 0
    assert code == "0"
    assert forkserver in children


@pytest.fixture
def launched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Launches the first job of a run with fakes; gives the exit code and the fakes."""
    monkeypatch.setattr(local, "_LONGEST_PAUSE_S", 0.0)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)

    def launch(*codes: int, done: bool = False, **changes: Any) -> tuple[int, Fakes]:
        path = run_file(tmp_path, {"launch": changes})
        config, fakes = load_run(path), Fakes(*codes)
        monkeypatch.setattr(local, "Processes", lambda **given: fakes)
        if done:
            monkeypatch.setattr(RunFolder, "is_done", lambda *given: True)
            (job, *_) = [local.Job(s, path, 3, 1, 1, config.launch.rollout) for s in _steps(config)]
            return local.Local(config).launch([job]), fakes
        return local.Local(config).launch(jobs_of(config, path)[:1]), fakes

    return launch


def _steps(config: Any) -> Any:
    from opdcache.rounds import steps

    return steps(config)


def test_workers_are_told_their_place_and_share_the_cores(
    launched: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(7)))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,5,6,7")
    code, fakes = launched(0, 0, rollout={"workers": 2})
    assert code == 0
    for index, (arguments, environment) in enumerate(fakes.started):
        assert arguments[-2:] == ["--worker", f"{index}/2"]
        assert environment == {
            "OMP_NUM_THREADS": "3",
            "CUDA_VISIBLE_DEVICES": ("4,5", "6,7")[index],
        }


@pytest.mark.parametrize(
    ("seen", "workers", "gpus", "shares"),
    [
        ("0,1,2", 3, None, ["0", "1", "2"]),
        ("0,1,2", 2, None, ["0", "1"]),
        ("0,1,2,3", 2, 1, ["0", "1"]),
        ("0", 2, None, ["0", "0"]),  # they share it
        ("GPU-a,GPU-b", 1, 2, ["GPU-a,GPU-b"]),
        ("", 2, None, [None, None]),
        ("0,1", 1, None, [None]),  # one worker has what there is
    ],
)
def test_devices_are_divided_among_the_workers(
    launched: Any,
    monkeypatch: pytest.MonkeyPatch,
    seen: str,
    workers: int,
    gpus: int | None,
    shares: list[str | None],
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", seen)
    _, fakes = launched(rollout={"workers": workers, "gpus": gpus})
    assert [env.get("CUDA_VISIBLE_DEVICES") for _, env in fakes.started] == shares


@pytest.mark.parametrize("code", [-9, 75, 255])
def test_a_process_that_was_killed_or_may_succeed_later_is_started_again(
    launched: Any, capfd: pytest.CaptureFixture[str], code: int
) -> None:
    result, fakes = launched(0, code, code, 0, rollout={"workers": 2}, max_restarts=2)
    assert result == 0
    assert [arguments[-1] for arguments, _ in fakes.started[2:]] == ["1/2", "1/2"]
    said = capfd.readouterr().err
    assert said.count("started again") == 2
    assert "round 0 rollout: worker 1/2 of 'opdcache rollout'" in said


def test_it_is_started_again_so_often_and_no_more(launched: Any) -> None:
    with pytest.raises(StageError, match="'opdcache rollout' was ended by SIGKILL"):
        launched(-9, -9, 0, max_restarts=1)
    code, fakes = launched(75, 75, 0, max_restarts=1)
    assert (code, len(fakes.started)) == (75, 2)


@pytest.mark.parametrize("code", [1, 2, 3])
def test_a_failure_is_final_and_the_others_end_first(launched: Any, code: int) -> None:
    result, fakes = launched(0, code, 0, rollout={"workers": 3})
    assert (result, len(fakes.started)) == (code, 3)


def test_a_worker_that_failed_does_not_matter_where_the_others_finished_the_stage(
    launched: Any, capfd: pytest.CaptureFixture[str]
) -> None:
    code, _ = launched(0, 1, 0, done=True)
    assert code == 0
    assert "ended with exit code 1; the others finished the stage" in capfd.readouterr().err
