"""``opdcache evaluate``."""

from pathlib import Path

import click

from .common import open_context, run_file


@click.command("evaluate")
@run_file
@click.option(
    "--json", "as_json", is_flag=True, help="one JSON object, as schemas/evaluation.json says"
)
@click.option("--no-divergence", is_flag=True, help="accuracy alone: no model is compared")
def command(run_file: Path, as_json: bool, no_divergence: bool) -> None:
    """Compare each round's student with the teacher on held-out prompts: exactly, and by what a
    verifier says of their answers."""
    context = open_context(run_file)
    from ..evaluation.run import run
    from .evaluation_text import evaluation_lines

    evaluation = run(context, divergence=not no_divergence)
    if as_json:
        click.echo(evaluation.model_dump_json(indent=1))
    else:
        click.echo("\n".join(evaluation_lines(evaluation)))
