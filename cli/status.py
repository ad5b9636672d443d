"""``opdcache status``."""

import sys
import time
from pathlib import Path

import click

from .common import run_file


@click.command("status")
@run_file
@click.option("--watch", is_flag=True, help="show it again and again, until the run is done")
@click.option(
    "--interval",
    "interval_s",
    type=click.FloatRange(min=0.1),
    default=5.0,
    show_default=True,
    metavar="SECONDS",
    help="between two looks of --watch",
)
@click.option("--json", "as_json", is_flag=True, help="one JSON object: schemas/status.json")
def command(run_file: Path, watch: bool, interval_s: float, as_json: bool) -> None:
    """Show rounds, stages and workers: what is done, rates, time left, failures. Loads no model."""
    from ..errors import StoreUnavailable
    from ..rounds import status
    from ..runfile import load_run
    from .status_text import status_text

    config = load_run(run_file)
    while True:
        try:
            now = status(config)
        except StoreUnavailable as error:
            if not watch:
                raise
            click.echo(str(error), err=True)
            time.sleep(interval_s)
            continue
        text = now.model_dump_json() if as_json else status_text(now)
        if watch and not as_json and sys.stdout.isatty():
            click.clear()
        click.echo(text)
        if not watch or now.is_done:
            return
        time.sleep(interval_s)
