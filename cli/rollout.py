"""``opdcache rollout``."""

from pathlib import Path

import click

from .common import open_context, stage_options, worker_option


@click.command("rollout")
@stage_options
@worker_option
def command(run_file: Path, round_index: int, worker: str) -> None:
    """Sample a round's completions with vLLM, and its held-out ones."""
    from ..rounds import Step

    context = open_context(run_file, worker, step=Step(round_index, "rollout"))
    from ..rollout.stage import run
    from ..workers import at_work

    with at_work(context, "rollout", round_index) as noted:
        run(noted, round_index)
