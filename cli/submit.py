"""``opdcache submit``."""

from pathlib import Path
from typing import TYPE_CHECKING

import click

from .common import run_file

if TYPE_CHECKING:
    from ..jobs.job import Job
    from ..schemas.config import RunConfig

rounds_option = click.option(
    "--rounds",
    "rounds",
    metavar="FIRST[-LAST]",
    help="only these rounds, such as 2 or 0-3; the last student's held-out samples are the round "
    "after the last",
)


@click.group("submit")
def command() -> None:
    """Hand a run's stages to a cluster, as jobs."""


@command.command("slurm")
@run_file
@rounds_option
@click.option("--after", metavar="JOB", help="id of a job whose end the first one waits for")
@click.option("--dry-run", is_flag=True, help="print the scripts, and submit nothing")
@click.pass_context
def slurm(
    context: click.Context, run_file: Path, rounds: str | None, after: str | None, dry_run: bool
) -> None:
    """Submit what is left of a run to Slurm, and print the jobs' ids.

    An array a rollout or score stage, a job over nodes a train stage, each after the one before.
    """
    from ..jobs.slurm import Slurm

    config, jobs = _jobs(run_file, rounds)
    if jobs:
        context.exit(Slurm(config, dry_run=dry_run, after=after).launch(jobs))


@command.command("kubernetes")
@run_file
@rounds_option
@click.pass_context
def kubernetes(context: click.Context, run_file: Path, rounds: str | None) -> None:
    """Print what is left of a run as manifests for kubectl, checked against Kubernetes' schemas.

    An Indexed Job a rollout or score stage, a Job of one pod a train stage.
    """
    from ..jobs.kubernetes import Kubernetes

    config, jobs = _jobs(run_file, rounds)
    if jobs:
        context.exit(Kubernetes(config).launch(jobs))


def _jobs(path: Path, rounds: str | None) -> "tuple[RunConfig, list[Job]]":
    from ..jobs.job import jobs_of
    from ..runfile import load_run

    config = load_run(path)
    chosen = None if rounds is None else _parse(rounds, config)
    jobs = jobs_of(config, path, chosen)
    if not jobs:
        click.echo("these rounds are done, nothing to submit", err=True)
    return config, jobs


def _parse(text: str, config: "RunConfig") -> range:
    first, _, last = text.partition("-")
    try:
        chosen = range(int(first), int(last or first) + 1)
    except ValueError:
        chosen = range(0)
    if not chosen or chosen[-1] > config.rounds:
        raise click.BadParameter(
            f"expected FIRST[-LAST] of rounds 0 to {config.rounds - 1}, such as 0-1",
            param_hint="--rounds",
        )
    return chosen
