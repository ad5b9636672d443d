"""Submits a run's jobs to Slurm: an array a rollout or score stage, a job over nodes a train stage.

Each job waits for the end, however it came, of the one before it; what it then finds missing is for
it to say. Waiting is left to Slurm's dependencies, and trying again to the scripts.
"""

import shlex
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from rich import box
from rich.console import Console
from rich.table import Table

from ..errors import ConfigError, LauncherError
from ..schemas.config import RunConfig
from .job import Job
from .templating import filled

_OURS = frozenset(
    {
        "array",
        "dependency",
        "job-name",
        "nodes",
        "ntasks",
        "ntasks-per-node",
        "open-mode",
        "output",
        "requeue",
        "no-requeue",
        "signal",
    }
)
"""Options of sbatch that follow from the run file's other keys, or that the scripts rely on."""


_THREADS = """\
export OMP_NUM_THREADS="${SLURM_CPUS_PER_TASK:-${OMP_NUM_THREADS:-1}}"
if [ -n "$SLURM_CPUS_PER_TASK" ]; then export SRUN_CPUS_PER_TASK="$SLURM_CPUS_PER_TASK"; fi"""


class Slurm:
    """The launcher of a Slurm cluster.

    Args:
        dry_run: print the scripts, and submit nothing.
        after: id of a job that the first one waits for the end of.
    """

    def __init__(
        self, config: RunConfig, *, dry_run: bool = False, after: str | None = None
    ) -> None:
        assert config.output is not None
        self._launch, self._dry_run, self._after = config.launch, dry_run, after
        self._folder = Path(config.output) / "slurm"

    def launch(self, jobs: Sequence[Job]) -> int:
        """See ``Launcher``. Prints the ids of the jobs, in a table.

        Raises:
            ConfigError: an option is not free, or a template is faulty.
            LauncherError: Slurm refuses a job, or is not there.
        """
        scripts = [self.script(job) for job in jobs]
        if self._dry_run:
            print("\n".join(scripts))
            return 0
        (self._folder / "logs").mkdir(parents=True, exist_ok=True)
        submitted: list[tuple[Job, str]] = []
        for job, script in zip(jobs, scripts, strict=True):
            path = self._folder / f"{job.name}.sh"
            path.write_text(script)
            after = submitted[-1][1] if submitted else self._after
            before = [number for _, number in submitted]
            submitted.append((job, _sbatch(path, job.run_file.parent, after, before)))
        _show(submitted, self._after)
        return 0

    def script(self, job: Job) -> str:
        """The batch script of a job."""
        slurm = self._launch.slurm
        train, worker = job.step.stage == "train", "@WORKER@"  # which no quotes are put around
        program = slurm.program or shlex.join([sys.executable, "-m", "opdcache.cli.main"])
        command = f"{program} {shlex.join(job.command(worker))}"
        values = {
            "name": job.name,
            "log": _quoted(self._folder / "logs" / f"{job.name}{'' if train else '-%a'}.log"),
            "fault": shlex.quote(str(self._folder / "logs" / f"{job.name}.fault")),
            "last": job.workers - 1,
            "nodes": job.nodes,
            "ranks": job.ranks,
            "warn_s": slurm.warn_s,
            "max_requeues": slurm.max_requeues,
            "options": "\n".join(f"#SBATCH --{option}" for option in self._options(job)),
            "setup": slurm.setup.rstrip(),
            "threads": _THREADS,
            "command": command.replace(worker, "${SLURM_ARRAY_TASK_ID}"),
        }
        return filled(self._launch, f"slurm/{'train' if train else 'workers'}.sh", values)

    def _options(self, job: Job) -> list[str]:
        """What the job asks for, as options of sbatch."""
        asked = job.resources
        named: dict[str, object] = {
            "gpus-per-node": asked.gpus or None,
            "cpus-per-task": asked.cpus,
            "mem": asked.memory,
            "time": None if asked.time_limit is None else -(-asked.time_limit // 60),
        }
        for place, given in (
            ("launch.slurm.options", self._launch.slurm.options),
            (f"launch.{job.step.stage}.slurm", asked.slurm),
        ):
            _refuse_ours(given, place)
            named |= given
        return [
            name if value is True else f"{name}={_quoted(value)}"
            for name, value in named.items()
            if value is not None and value is not False
        ]


def _quoted(value: object) -> str:
    """A value as sbatch reads it in a script."""
    text = str(value)
    return f'"{text}"' if any(sign.isspace() for sign in text) else text


def _refuse_ours(given: Mapping[str, object], place: str) -> None:
    for name in given:
        if name.lstrip("-") in _OURS:
            raise ConfigError(
                f"{place}: {name!r} is not free",
                remedy="it follows from launch's other keys; for more, copy jobs/templates/slurm "
                "and name the copy in launch.templates",
            )


def _sbatch(script: Path, folder: Path, after: str | None, before: Sequence[str]) -> str:
    """Submit a script, which begins in the folder; its job's id."""
    command = ["sbatch", "--parsable", *([f"--dependency=afterany:{after}"] if after else [])]
    try:
        done = subprocess.run(
            [*command, str(script)], capture_output=True, text=True, cwd=folder, check=False
        )
    except FileNotFoundError as error:
        raise LauncherError(
            "there is no sbatch on this machine", remedy="run this on a login node of the cluster"
        ) from error
    if done.returncode:
        said = done.stderr.strip().splitlines()
        cancel = f"; what is submitted already: scancel {' '.join(before)}" if before else ""
        raise LauncherError(
            f"Slurm refuses the job: {said[-1] if said else done.returncode}",
            where=script,
            remedy=f"see launch.slurm.options in the run file{cancel}",
        )
    return done.stdout.strip().partition(";")[0]


def _show(submitted: Sequence[tuple[Job, str]], before: str | None) -> None:
    table = Table("job", "round", "stage", "tasks", "after", "script", box=box.SIMPLE)
    for job, number in submitted:
        tasks = job.nodes * job.ranks if job.step.stage == "train" else job.workers
        script = f"slurm/{job.name}.sh"
        table.add_row(number, str(job.step.round), job.step.stage, str(tasks), before or "", script)
        before = number
    Console(width=120, no_color=True, highlight=False, file=sys.stdout).print(table)
