"""``opdcache train``."""

from pathlib import Path

import click

from .common import open_context, stage_options


@click.command("train")
@stage_options
def command(run_file: Path, round_index: int) -> None:
    """Train a round's student on its scored completions, and export the next one."""
    from ..rounds import Step

    context = open_context(run_file, step=Step(round_index, "train"))
    from ..train.stage import run

    run(context, round_index)
