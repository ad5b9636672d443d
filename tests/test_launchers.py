"""What launchers are told, and what they hand to schedulers."""

import os
import re
import stat
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml
from click.testing import CliRunner

from opdcache.cli.main import cli
from opdcache.errors import ConfigError, LauncherError, OpdcacheError
from opdcache.jobs.job import Job, jobs_of
from opdcache.jobs.kubernetes import Kubernetes
from opdcache.jobs.slurm import Slurm
from opdcache.rounds import steps
from opdcache.runfile import load_run
from opdcache.schemas.config import RunConfig
from opdcache.schemas.launch import LaunchConfig

from .test_runfile import fault, run_file

LAUNCH: dict[str, Any] = {
    "rollout": {"workers": 3, "gpus": 1, "cpus": 4, "time_limit": "04:00:00"},
    "score": {"workers": 2, "memory": "64G", "slurm": {"partition": "big"}},
    "train": {"nodes": 2, "ranks": 8, "gpus": 8, "time_limit": "1-12:00"},
    "slurm": {
        "program": "opdcache",
        "options": {"partition": "small", "account": "us"},
        "setup": "module load cuda\n. env/bin/activate",
        "warn_s": 90,
        "max_requeues": 7,
    },
    "kubernetes": {
        "image": "registry/opdcache:1",
        "claims": {"work": "/data"},
        "env": {"HF_HOME": "/data/hf"},
        "secrets": ["store"],
        "warn_s": 90,
        "max_retries": 7,
    },
}


def run_of(folder: Path, **changes: Any) -> tuple[RunConfig, list[Job]]:
    """A run of two rounds and its jobs, none of them done."""
    path = run_file(folder, {"rounds": 2, "launch": LAUNCH | changes})
    config = load_run(path)
    return config, jobs_of(config, path)


def scripts(folder: Path, **changes: Any) -> dict[str, str]:
    config, jobs = run_of(folder, **changes)
    return {job.name: Slurm(config).script(job) for job in jobs}


def options(script: str) -> dict[str, str]:
    found = re.findall(r"^#SBATCH --([a-z-]+)(?:=(.*))?$", script, re.MULTILINE)
    assert len(dict(found)) == len(found), "said twice"
    return dict(found)


@pytest.mark.parametrize(
    ("given", "seconds"),
    [("04:00:00", 14400), ("00:30", 1800), ("1-12:00", 129600), (43200, 43200), (None, None)],
)
def test_time_limits_are_read_as_slurm_writes_them(given: object, seconds: int | None) -> None:
    read = LaunchConfig.model_validate({"rollout": {"time_limit": given}})
    assert read.rollout.time_limit == seconds
    unquoted = yaml.safe_load(f"time_limit: {given}") if given else {"time_limit": None}
    assert LaunchConfig.model_validate({"score": unquoted}).score.time_limit == seconds


@pytest.mark.parametrize("given", ["soon", "4:0:0", 30, "00:00:10"])
def test_a_time_limit_that_is_none_is_refused(tmp_path: Path, given: object) -> None:
    said = fault(run_file(tmp_path, {"launch.train": {"time_limit": given}}))
    assert "launch.train.time_limit" in said


def test_jobs_are_the_steps_that_are_left_in_order(tmp_path: Path) -> None:
    config, jobs = run_of(tmp_path)
    assert [job.step for job in jobs] == list(steps(config))
    assert [(job.workers, job.nodes * job.ranks) for job in jobs[:3]] == [(3, 1), (2, 1), (1, 16)]
    later = jobs_of(config, tmp_path / "run.yaml", range(1, 2))
    assert {job.step.round for job in later} == {1}


def test_slurm_s_options_are_those_of_the_run_file(tmp_path: Path) -> None:
    found = {name: options(script) for name, script in scripts(tmp_path).items()}
    common = {"open-mode": "append", "requeue": "", "signal": "USR1@90", "account": "us"}
    logs = tmp_path / "run" / "slurm" / "logs"
    assert found["run-000-rollout"] == common | {
        "job-name": "run-000-rollout",
        "array": "0-2",
        "ntasks": "1",
        "output": f"{logs}/run-000-rollout-%a.log",
        "gpus-per-node": "1",
        "cpus-per-task": "4",
        "time": "240",
        "partition": "small",
    }
    assert found["run-001-score"] == common | {
        "job-name": "run-001-score",
        "array": "0-1",
        "ntasks": "1",
        "output": f"{logs}/run-001-score-%a.log",
        "mem": "64G",
        "partition": "big",
    }
    assert found["run-001-train"] == common | {
        "job-name": "run-001-train",
        "nodes": "2",
        "ntasks-per-node": "8",
        "output": f"{logs}/run-001-train.log",
        "gpus-per-node": "8",
        "time": "2160",
        "partition": "small",
    }


FAKES = {
    "srun": 'echo "$OMP_NUM_THREADS $*" >> {log}; exit {code}',
    "scontrol": 'echo "scontrol $*" >> {log}',
}


@pytest.mark.parametrize(
    ("code", "restarts", "requeues"),
    [(0, 0, False), (1, 0, False), (2, 0, False), (75, 0, True), (137, 6, True), (75, 7, False)],
)
def test_a_script_runs_a_worker_and_requeues_what_may_succeed_later(
    tmp_path: Path, code: int, restarts: int, requeues: bool
) -> None:
    folder = tmp_path / "with a space"
    folder.mkdir()
    script, log = scripts(folder, slurm=LAUNCH["slurm"] | {"setup": "export A=1"}), folder / "log"
    bin_folder = folder / "bin"
    bin_folder.mkdir()
    for name, text in FAKES.items():
        fake = bin_folder / name
        fake.write_text("#!/bin/bash\n" + text.format(log=f"'{log}'", code=code) + "\n")
        fake.chmod(fake.stat().st_mode | stat.S_IXUSR)
    variables = {
        "PATH": f"{bin_folder}:{os.environ['PATH']}",
        "SLURM_JOB_ID": "42",
        "SLURM_ARRAY_JOB_ID": "40",
        "SLURM_ARRAY_TASK_ID": "2",
        "SLURM_CPUS_PER_TASK": "4",
        "SLURM_RESTART_COUNT": str(restarts),
    }
    done = subprocess.run(
        ["bash", "-c", script["run-001-rollout"]], env=variables, capture_output=True, check=False
    )
    run, *rest = log.read_text().splitlines()
    assert run == (f"4 --ntasks=1 opdcache rollout {folder}/run.yaml --round 1 --worker 2/3"), (
        done.stderr
    )
    assert rest == (["scontrol requeue 40_2"] if requeues else [])
    assert done.returncode == (0 if requeues else code)


@pytest.mark.parametrize("place", ["slurm.options", "train.slurm"])
def test_an_option_that_the_launcher_decides_is_not_free(tmp_path: Path, place: str) -> None:
    path = run_file(tmp_path, {f"launch.{place}": {"array": "0-9"}})
    config = load_run(path)
    with pytest.raises(ConfigError, match=f"launch.{place}: 'array' is not free"):
        Slurm(config).launch(jobs_of(config, path))


def test_own_templates_take_the_place_of_ours(tmp_path: Path) -> None:
    own = tmp_path / "mine" / "slurm" / "train.sh"
    own.parent.mkdir(parents=True)
    own.write_text("# me@here, @@{name}\n@{name} $HOME @{command}\n")
    found = scripts(tmp_path, templates="mine")
    assert found["run-000-train"] == (
        f"# me@here, @{{name}}\nrun-000-train $HOME opdcache train {tmp_path}/run.yaml --round 0\n"
    )
    assert found["run-000-score"].startswith("#!/bin/bash")
    with pytest.raises(ConfigError, match=r"launch\.templates: there is no such folder"):
        scripts(tmp_path, templates="mien")
    own.write_text("@{nmae}\n")
    with pytest.raises(ConfigError, match=r"train.sh: template: nothing is called @\{nmae\}"):
        scripts(tmp_path, templates="mine")


def test_a_machine_without_slurm_and_a_job_that_slurm_refuses_are_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, jobs = run_of(tmp_path)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(LauncherError, match="there is no sbatch on this machine"):
        Slurm(config).launch(jobs)
    sbatch = tmp_path / "sbatch"
    sbatch.write_text(
        "#!/bin/sh\nfor last; do :; done\n"
        'case $last in *score*) echo "sbatch: error: invalid partition" >&2; exit 1;; esac\n'
        'echo "17;cluster"\n'
    )
    sbatch.chmod(0o755)
    with pytest.raises(LauncherError) as caught:
        Slurm(config).launch(jobs)
    assert "run-000-score.sh: Slurm refuses the job: sbatch: error: invalid partition" in str(
        caught.value
    )
    assert str(caught.value).endswith("what is submitted already: scancel 17")


def test_every_job_waits_for_the_end_of_the_one_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    config, jobs = run_of(tmp_path)
    log = tmp_path / "log"
    (tmp_path / "sbatch").write_text(
        f'#!/bin/sh\necho "$*" >> {log}\nwc -l < {log} | sed "s/^ */10/"\n'
    )
    (tmp_path / "sbatch").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    assert Slurm(config).launch(jobs) == 0
    asked = [line.split() for line in log.read_text().splitlines()]
    assert [words[:-1] for words in asked] == [
        ["--parsable", *([f"--dependency=afterany:10{number}"] if number else [])]
        for number in range(len(jobs))
    ]
    scripts = [Path(words[-1]) for words in asked]
    assert [path.stem for path in scripts] == [job.name for job in jobs]
    assert [path.read_text() for path in scripts] == [Slurm(config).script(job) for job in jobs]
    rows = re.findall(r"^ +(10\d) +(\d) +(\w+) +(\d+) +(10\d)?", capsys.readouterr().out, re.M)
    assert [row[4] for row in rows] == ["", *(row[0] for row in rows[:-1])]
    assert [row[3] for row in rows] == ["3", "2", "16"] * 2


def test_options_without_a_value_and_with_spaces_are_written_as_sbatch_reads_them(
    tmp_path: Path,
) -> None:
    given = {"exclusive": True, "no-kill": False, "comment": "two words", "nice": 5}
    script = scripts(tmp_path, slurm={"options": given})["run-000-train"]
    assert [line for line in script.splitlines() if line.startswith("#SBATCH --")][-5:] == [
        "#SBATCH --gpus-per-node=8",
        "#SBATCH --time=2160",
        '#SBATCH --comment="two words"',
        "#SBATCH --exclusive",
        "#SBATCH --nice=5",
    ]


def test_a_limit_that_leaves_no_time_before_the_warning_is_refused(tmp_path: Path) -> None:
    said = fault(run_file(tmp_path, {"launch.score": {"time_limit": 200}}))
    assert "launch.score.time_limit: 200 s leave no time before the warning" in said


TRAIN_FAKE = """
export RANKS_CODE={code}
shift # --kill-on-bad-exit=1
export SLURM_PROCID=0
"$@"
true # the others, which lost a rank
exit {told}
"""


@pytest.mark.parametrize(
    ("code", "told", "ends", "requeues"),
    [
        (1, 75, 1, False),
        (2, 137, 2, False),
        (75, 75, 0, True),
        (137, 137, 0, True),
        (0, 0, 0, False),
    ],
)
def test_a_learner_is_requeued_unless_a_rank_failed_for_good(
    tmp_path: Path, code: int, told: int, ends: int, requeues: bool
) -> None:
    """srun tells the largest exit code; ranks that lost another one end with 75."""
    log, program = tmp_path / "log", tmp_path / "program"
    program.write_text(f'#!/bin/bash\necho "$*" >> {log}\nexit {code}\n')
    fakes = {
        "srun": TRAIN_FAKE.format(code=code, told=told),
        "scontrol": f'echo "scontrol $*" >> {log}',
    }
    for name, text in fakes.items():
        (tmp_path / name).write_text("#!/bin/bash\n" + text + "\n")
    for name in (*fakes, "program"):
        (tmp_path / name).chmod(0o755)
    config, jobs = run_of(tmp_path, slurm={"program": str(program)})
    script = Slurm(config).script(next(job for job in jobs if job.step.stage == "train"))
    (tmp_path / "run" / "slurm" / "logs").mkdir(parents=True)
    variables = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "SLURM_JOB_ID": "42"}
    done = subprocess.run(["bash", "-c", script], env=variables, capture_output=True, check=False)
    assert done.returncode == ends, done.stderr
    run, *rest = log.read_text().splitlines()
    assert run == f"train {tmp_path}/run.yaml --round 0"
    assert rest == (["scontrol requeue 42"] if requeues else [])


def test_a_dry_run_prints_scripts_and_leaves_nothing(tmp_path: Path) -> None:
    path = run_file(tmp_path, {"rounds": 2, "launch": LAUNCH})
    done = CliRunner().invoke(cli, ["submit", "slurm", str(path), "--dry-run", "--rounds", "1"])
    assert done.exit_code == 0
    assert re.findall("--job-name=(.*)", done.output) == [
        f"run-001-{stage}" for stage in ("rollout", "score", "train")
    ]
    assert [p.name for p in tmp_path.iterdir()] == ["run.yaml"]
    for wrong in ("x", "3", "1-0", "0-9"):
        refused = CliRunner().invoke(cli, ["submit", "slurm", str(path), "--rounds", wrong])
        assert refused.exit_code == 2
        assert "expected FIRST[-LAST] of rounds 0 to 1" in refused.output


def manifests(folder: Path, **changes: Any) -> list[dict[str, Any]]:
    more = {"train": LAUNCH["train"] | {"nodes": 1}} | changes
    config, jobs = run_of(folder, **more)
    launcher = Kubernetes(config)
    return [yaml.safe_load(launcher.manifest(job)) for job in jobs]


def test_manifests_are_what_kubernetes_takes_and_what_the_run_file_says(tmp_path: Path) -> None:
    rollout, score, train, *_ = manifests(tmp_path)  # each checked against the schemas
    name = rollout["metadata"]["name"]
    assert re.fullmatch("run-000-rollout-[0-9a-f]{4}", name)
    (tmp_path / "other").mkdir()
    assert manifests(tmp_path / "other")[0]["metadata"]["name"] != name
    pod = rollout["spec"]["template"]["spec"]
    assert (pod["activeDeadlineSeconds"], pod["terminationGracePeriodSeconds"]) == (14400, 90)
    final, _ = rollout["spec"]["podFailurePolicy"]["rules"][::-1]
    assert final["onExitCodes"] == {"operator": "NotIn", "values": [75, 137, 143]}
    spec = rollout["spec"]
    assert (spec["completionMode"], spec["completions"], spec["parallelism"]) == ("Indexed", 3, 3)
    assert (spec["backoffLimitPerIndex"], score["spec"]["completions"]) == (7, 2)
    (container,) = spec["template"]["spec"]["containers"]
    assert container["command"] == [
        "opdcache",
        "rollout",
        f"{tmp_path}/run.yaml",
        "--round",
        "0",
        "--worker",
        "$(JOB_COMPLETION_INDEX)/3",
    ]
    assert container["resources"]["limits"] == {"nvidia.com/gpu": 1, "cpu": 4}
    assert {e["name"]: e["value"] for e in container["env"]} == {
        "OMP_NUM_THREADS": "4",
        "HF_HOME": "/data/hf",
    }
    assert container["envFrom"] == [{"secretRef": {"name": "store"}}]
    assert container["volumeMounts"] == [
        {"name": "shared-memory", "mountPath": "/dev/shm"},
        {"name": "work", "mountPath": "/data"},
    ]
    assert score["spec"]["template"]["spec"]["containers"][0]["resources"]["limits"] == {
        "memory": "64Gi"
    }
    assert train["spec"]["backoffLimit"] == 7
    (learner,) = train["spec"]["template"]["spec"]["containers"]
    assert learner["command"][-4:] == ["--round", "0", "--nproc", "8"]


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"kubernetes": None}, "launch.kubernetes: it is not given"),
        ({"train": LAUNCH["train"]}, "launch.train.nodes: a train job on Kubernetes has one node"),
    ],
)
def test_what_kubernetes_cannot_do_is_refused(
    tmp_path: Path, changes: dict[str, Any], said: str
) -> None:
    with pytest.raises(ConfigError, match=said):
        manifests(tmp_path, **changes)


def test_a_template_that_kubernetes_would_refuse_is_named(tmp_path: Path) -> None:
    own = tmp_path / "mine" / "kubernetes" / "workers.yaml"
    own.parent.mkdir(parents=True)
    own.write_text(
        "apiVersion: batch/v1\nkind: Job\nmetadata: {name: @{name}}\nspec: {tmplate: 1}\n"
    )
    with pytest.raises(OpdcacheError) as caught:
        manifests(tmp_path, templates="mine")
    assert "kubernetes/workers.yaml: not a manifest that Kubernetes takes" in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1


def test_names_are_what_kubernetes_allows(tmp_path: Path) -> None:
    path = tmp_path / f"My_run.{'x' * 60}-A.yaml"
    run_file(tmp_path, {"launch": LAUNCH | {"train": {}}}).rename(path)
    config = load_run(path)
    for job in jobs_of(config, path):
        name = yaml.safe_load(Kubernetes(config).manifest(job))["metadata"]["name"]
        assert re.fullmatch(r"[a-z0-9]([-a-z0-9]*[a-z0-9])?", name)
        assert len(name) <= 52
        assert name[:-5].endswith(f"000-{job.step.stage}")
