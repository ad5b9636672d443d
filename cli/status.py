"""``opdcache status``."""

from pathlib import Path

import click

from .common import run_file


@click.command("status")
@run_file
def command(run_file: Path) -> None:
    """Show rounds and stages: shards done, tokens, time, cache hits. Loads no model."""
    from ..rounds import status
    from ..runfile import load_run
    from .tables import status_table

    click.echo(status_table(status(load_run(run_file))))
