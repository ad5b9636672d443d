"""``opdcache evaluate``."""

from pathlib import Path

import click

from .common import open_context, run_file


@click.command("evaluate")
@run_file
def command(run_file: Path) -> None:
    """Compare each round's student with the teacher on held-out prompts, exactly."""
    context = open_context(run_file)
    from ..evaluate import ESTIMATOR, run
    from .tables import evaluation_table

    rows = run(context)
    click.echo(f"reverse KL: {ESTIMATOR}")
    click.echo(evaluation_table(rows))
