"""``opdcache train``."""

import os
from pathlib import Path

import click

from .common import num_ranks_option, open_context, stage_options


@click.command("train")
@stage_options
@num_ranks_option
@click.pass_context
def command(
    context: click.Context, run_file: Path, round_index: int, num_ranks: int | None
) -> None:
    """Train a round's student on its scored completions, and export the next one."""
    from ..rounds import Step
    from ..train.ranks import lost_ranks, slurm_ranks

    os.environ.update(slurm_ranks(os.environ))
    run_context = open_context(run_file, step=Step(round_index, "train"))
    if num_ranks is not None:
        from ..jobs.ranks import run_ranks

        context.exit(run_ranks(num_ranks, "train", str(run_file), "--round", str(round_index)))
    from ..train.stage import run
    from ..workers import at_work

    with at_work(run_context, "train", round_index) as noted, lost_ranks():
        run(noted, round_index)
