"""A real Slurm cluster on loopback ports, all of it in a folder, for as long as a test lasts."""

import ctypes
import os
import pwd
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from tests.s3_server import free_ports

START_S = 60
NODES = ("127.0.0.1", "127.0.0.2")  # names that resolve, for a job whose processes meet
DEVICES = ("null", "zero", "full", "random")  # each stands for a GPU
ENDED = {"COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY"}
UP = {"idle", "mixed", "allocated", "completing"}
PR_SET_CHILD_SUBREAPER = 36
# A requeued job waits until its old credential expires: 5 s is the least that Slurm takes.
# Nodes offer what is said here, not what the machine has.
CONF = """
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={controller_port}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
CredType=cred/munge
AuthInfo=socket={folder}/munge.socket,cred_expire=5
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/%n.log
SlurmctldDebug=verbose
SlurmdDebug=verbose
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
JobCompType=jobcomp/none
MpiDefault=none
MailProg=/bin/true
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SchedulerType=sched/backfill
SchedulerParameters=batch_sched_delay=0,sched_interval=1,sched_min_interval=0,bf_interval=1
SlurmdParameters=config_overrides
ReturnToService=2
KillWait=2
MinJobAge=3600
GresTypes=gpu
NodeName={nodes} Port={node_ports} CPUs=8 Gres=gpu:{gpus} RealMemory=64000
PartitionName=test Nodes=ALL Default=YES MaxTime=60 State=UP
"""


class SlurmCluster:
    """A controller, which can be killed and started again, and nodes of 8 CPUs and 4 GPUs."""

    def __init__(self, folder: Path) -> None:
        """`folder` is short, for it holds sockets: a link will do."""
        self._folder = folder
        self._processes: dict[str, subprocess.Popen[bytes]] = {}

    @property
    def environment(self) -> dict[str, str]:
        """Environment variables by which `sbatch` and its like find the cluster."""
        return {"SLURM_CONF": str(self._folder / "slurm.conf")}

    def start(self) -> None:
        """Start, and wait until every node takes jobs."""
        (self._folder / "state").mkdir()
        key = self._folder / "munge.key"
        key.touch(0o600)
        key.write_bytes(os.urandom(128))
        ports = [str(port) for port in free_ports(1 + len(NODES))]
        conf = CONF.format(
            folder=self._folder,
            host=socket.gethostname().split(".")[0],
            user=pwd.getpwuid(os.getuid()).pw_name,
            controller_port=ports[0],
            gpus=len(DEVICES),
            nodes=",".join(NODES),
            node_ports=",".join(ports[1:]),
        )
        (self._folder / "slurm.conf").write_text(conf)
        (self._folder / "gres.conf").write_text(
            "".join(f"Name=gpu File=/dev/{name}\n" for name in DEVICES)
        )
        files = [
            f"--{name}-file={self._folder}/munge.{name}" for name in ("key", "log", "pid", "seed")
        ]
        # Forced, for it would have others able to enter the folder.
        self._spawn("munged", "-F", "-f", f"-S{self._folder}/munge.socket", *files)
        _wait_until((self._folder / "munge.socket").exists, self._log)
        self._spawn("slurmctld", "-D")
        for node in NODES:
            self._spawn("slurmd", "-D", "-N", node, name=node)
        _wait_until(self._is_up, self._log)

    def run(self, *command: str | Path) -> str:
        """What a client command prints, without white space around it."""
        environment = os.environ | self.environment
        ended = subprocess.run(command, capture_output=True, text=True, env=environment)
        if ended.returncode:
            raise RuntimeError(f"{command}: {ended.stderr}")
        return ended.stdout.strip()

    def states(self, *job_ids: str) -> dict[str, str]:
        """The state of each job, and of each task of an array as `JOB_TASK`."""
        lines = self.run("squeue", "-h", "-r", "-t", "all", "-o", "%i %T", "-j", ",".join(job_ids))
        return dict(line.split() for line in lines.splitlines())

    def show(self, job_id: str) -> dict[str, str]:
        """What `scontrol show job` says of one job or task: `ExitCode`, `Restarts`, ..."""
        words = self.run("scontrol", "-o", "show", "job", job_id).split()
        return dict(word.split("=", 1) for word in words if "=" in word)

    def wait(self, *job_ids: str, timeout_s: float = 60) -> dict[str, str]:
        """The states of jobs, once all have ended: a job that is to run again has not."""
        found: dict[str, str] = {}

        def have_ended() -> bool:
            with suppress(RuntimeError):  # the controller may be away
                found.update(self.states(*job_ids))
            return bool(found) and ENDED.issuperset(found.values())

        _wait_until(have_ended, lambda: found, timeout_s)
        return found

    def restart_controller(self, signum: int = signal.SIGTERM) -> None:
        """Stop it, start it on the state that it saved, and wait until nodes take steps again.

        After SIGKILL it has forgotten up to the last 5 s: a job may be lost, or run twice.
        """
        self._processes["slurmctld"].send_signal(signum)
        self._processes["slurmctld"].wait()
        self._spawn("slurmctld", "-D")
        _wait_until(self._is_up, self._log)

    def stop(self) -> None:
        """End every process of the cluster and of its jobs."""
        for process in self._processes.values():
            process.send_signal(signal.SIGSTOP)  # it starts nothing more
        for process in self._processes.values():
            while _kill_below(process.pid):
                time.sleep(0.01)
            process.kill()
            process.wait()

    def _spawn(self, program: str, *arguments: str, name: str = "") -> None:
        path = shutil.which(program, path=f"{os.environ['PATH']}:/usr/sbin:/sbin")
        assert path, f"{program} is not installed"
        with (self._folder / f"{name or program}.err").open("ab") as log:
            self._processes[name or program] = subprocess.Popen(
                [path, *arguments],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env=os.environ | self.environment,
                preexec_fn=_adopt_orphans,
            )

    def _log(self) -> str:
        return "".join(path.read_text()[-1000:] for path in self._folder.glob("*.err"))

    def _is_up(self) -> bool:
        with suppress(RuntimeError):
            self.run("scontrol", "ping")  # does not wait for a controller, as `sinfo` does
            states = self.run("sinfo", "-h", "-N", "-o", "%T").split()
            return UP.issuperset(states)
        return False


@contextmanager
def slurm_cluster(folder: Path) -> Iterator[SlurmCluster]:
    """A running cluster with its files in `folder`; its environment variables are set meanwhile."""
    with tempfile.TemporaryDirectory(prefix="slurm-", dir="/tmp") as short:
        link = Path(short, "c")
        link.symlink_to(folder.resolve())
        cluster = SlurmCluster(link)
        before = {name: os.environ.get(name) for name in cluster.environment}
        try:
            cluster.start()
            os.environ.update(cluster.environment)
            yield cluster
        finally:
            cluster.stop()
            for name, value in before.items():
                os.environ.pop(name, None)
                if value is not None:
                    os.environ[name] = value


def _adopt_orphans() -> None:
    """What this process starts stays below it: Slurm's steps leave their parents."""
    ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1)


def _kill_below(pid: int) -> list[int]:
    """Kill every process below one; which of them were running."""
    children: dict[int, list[int]] = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):  # it has gone
            state, parent = stat.read_text().rpartition(")")[2].split()[:2]
            if state != "Z":
                children.setdefault(int(parent), []).append(int(stat.parent.name))
    found = list(children.get(pid, []))
    for each in found:
        found += children.get(each, [])
        with suppress(ProcessLookupError):
            os.kill(each, signal.SIGKILL)
    return found


def _wait_until(
    holds: Callable[[], bool], says: Callable[[], object], timeout_s: float = START_S
) -> None:
    deadline = time.monotonic() + timeout_s
    while not holds():
        assert time.monotonic() < deadline, says()
        time.sleep(0.1)
