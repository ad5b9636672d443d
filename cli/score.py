"""``opdcache score``."""

from pathlib import Path

import click

from .common import open_context, stage_options, worker_option


@click.command("score")
@stage_options
@worker_option
def command(run_file: Path, round_index: int, worker: str) -> None:
    """Score a round's completions with the teacher."""
    from ..rounds import Step

    context = open_context(run_file, worker, step=Step(round_index, "score"))
    from ..score.stage import run

    run(context, round_index)
