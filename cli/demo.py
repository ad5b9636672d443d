"""``opdcache demo``."""

from pathlib import Path

import click


@click.command("demo")
@click.argument("folder", metavar="[DIR]", default="demo", type=click.Path(path_type=Path))
@click.pass_context
def command(context: click.Context, folder: Path) -> None:
    """Heal a damaged SmolLM2-135M in three policy rounds, all on this machine."""
    from ..jobs.demo import run

    context.exit(run(folder))
