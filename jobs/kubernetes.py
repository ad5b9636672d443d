"""Renders a run's jobs for Kubernetes, and checks them against its published schemas.

Kubernetes has no order of jobs: a pod that finds inputs missing ends with exit code 75, and its
index is tried again later.
"""

import json
import re
import shlex
from collections.abc import Sequence

import yaml

from ..errors import ConfigError, NotInstalled
from ..identity import digest
from ..schemas.config import RunConfig
from ..schemas.launch import KubernetesLaunch
from .job import Job
from .templating import filled

# Ranks exchange data through it, and containers have little of it unless they ask.
_SHARED_MEMORY = {"name": "shared-memory", "emptyDir": {"medium": "Memory"}}


class Kubernetes:
    """The launcher of a Kubernetes cluster: prints manifests for ``kubectl apply -f -``.

    Raises:
        ConfigError: the run file has no ``launch.kubernetes``, or asks for ranks on several nodes.
    """

    def __init__(self, config: RunConfig) -> None:
        if config.launch.kubernetes is None:
            raise ConfigError(
                "launch.kubernetes: it is not given", remedy="it needs the image at least"
            )
        if config.launch.train.nodes > 1:
            raise ConfigError(
                "launch.train.nodes: a train job on Kubernetes has one node",
                got=config.launch.train.nodes,
                remedy="set it to 1, and ranks to the devices of a node",
            )
        self._launch, self._kubernetes = config.launch, config.launch.kubernetes
        self._run = str(config.output)

    def launch(self, jobs: Sequence[Job]) -> int:
        """See ``Launcher``.

        Raises:
            ConfigError: a manifest is not what Kubernetes takes.
            NotInstalled: the package with its schemas is not there.
        """
        print("---\n".join(self.manifest(job) for job in jobs))
        return 0

    def manifest(self, job: Job) -> str:
        """The manifest of a job, checked."""
        ours, train = self._kubernetes, job.step.stage == "train"
        ranks = ["--nproc", str(job.ranks)] if job.ranks > 1 else []
        values = {
            "name": _name(job.name, self._run),
            "time_limit": job.resources.time_limit,
            "namespace": ours.namespace,
            "workers": job.workers,
            "max_retries": ours.max_retries,
            "warn_s": ours.warn_s,
            "image": ours.image,
            "command": [
                *shlex.split(ours.program),
                *job.command("$(JOB_COMPLETION_INDEX)"),
                *ranks,
            ],
            "env": [{"name": name, "value": value} for name, value in _env(ours, job).items()],
            "env_from": [{"secretRef": {"name": name}} for name in ours.secrets],
            "resources": {"limits": _limits(job)},
            "volumes": [
                _SHARED_MEMORY,
                *(
                    {"name": claim, "persistentVolumeClaim": {"claimName": claim}}
                    for claim in ours.claims
                ),
            ],
            "mounts": [
                {"name": _SHARED_MEMORY["name"], "mountPath": "/dev/shm"},
                *({"name": claim, "mountPath": at} for claim, at in ours.claims.items()),
            ],
        }
        name = f"kubernetes/{'train' if train else 'workers'}.yaml"
        said = {key: json.dumps(value) for key, value in values.items()}
        text = filled(self._launch, name, said)
        _check(text, name)
        return text


def _name(name: str, run: str) -> str:
    """A job's name as Kubernetes takes it, with room for a pod's index: another run's is another,
    whatever its file is called."""
    mine = re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")[-47:].strip("-")
    return f"{mine}-{digest(run)[:4]}"


def _env(ours: KubernetesLaunch, job: Job) -> dict[str, str]:
    threads = {"OMP_NUM_THREADS": str(job.resources.cpus)} if job.resources.cpus else {}
    return threads | ours.env


def _limits(job: Job) -> dict[str, str | int]:
    asked = job.resources
    limits: dict[str, str | int] = {}
    if asked.gpus:
        limits["nvidia.com/gpu"] = asked.gpus
    if asked.cpus:
        limits["cpu"] = asked.cpus * job.ranks
    if asked.memory:
        limits["memory"] = f"{asked.memory}i"
    return limits


def _check(text: str, name: str) -> None:
    try:
        import kubernetes_validate
    except ModuleNotFoundError as error:
        raise NotInstalled(
            "kubernetes-validate, which has the schemas of Kubernetes, is not installed",
            remedy="pip install 'opdcache[kubernetes]'",
        ) from error
    try:
        data = yaml.safe_load(text)
        kubernetes_validate.validate(data, kubernetes_validate.latest_version(), strict=True)
    except (kubernetes_validate.ValidationError, yaml.YAMLError) as error:
        said = str(error).strip().splitlines()[0]
        raise ConfigError(
            f"not a manifest that Kubernetes takes: {said}",
            where=f"launch.kubernetes, template {name}",
        ) from error
