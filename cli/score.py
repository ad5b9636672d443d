"""``opdcache score``."""

from pathlib import Path

import click

from .common import open_context, stage_options, worker_option


@click.command("score")
@stage_options
@worker_option
@click.option(
    "--check",
    "num_checked",
    type=click.IntRange(min=1),
    metavar="N",
    help="then score N random completions again, and tell how far they are from what is stored",
)
@click.option(
    "--student",
    "of_student",
    is_flag=True,
    help="then score the student on its own completions, so that an audit has its entropy",
)
def command(
    run_file: Path, round_index: int, worker: str, num_checked: int | None, of_student: bool
) -> None:
    """Score a round's completions with the teacher."""
    from ..rounds import Step

    context = open_context(run_file, worker, step=Step(round_index, "score"))
    from ..score.stage import run, run_student
    from ..workers import at_work

    with at_work(context, "score", round_index) as noted:
        run(noted, round_index)
        if of_student:
            run_student(noted, round_index)
    if num_checked is not None:
        from ..score.check import check
        from .tables import noise_lines

        click.echo("\n".join(noise_lines(check(context, round_index, num_checked))))
