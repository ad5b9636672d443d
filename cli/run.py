"""``opdcache run``."""

from pathlib import Path

import click

from .common import num_ranks_option, run_file


@click.command("run")
@run_file
@click.option(
    "--workers",
    "num_workers",
    type=click.IntRange(min=1),
    metavar="N",
    help="processes that share the rollout stage, and then the score stage",
)
@num_ranks_option
@click.pass_context
def command(
    context: click.Context, run_file: Path, num_workers: int | None, num_ranks: int | None
) -> None:
    """Alternate rollout, score and train over all rounds, each stage in processes of its own.

    Stages that are done are left alone, so the same command goes on after any interruption.
    """
    from ..jobs.local import run

    context.exit(run(run_file, num_ranks, num_workers))
