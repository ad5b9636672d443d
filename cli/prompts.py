"""``opdcache prompts``."""

from pathlib import Path
from typing import TYPE_CHECKING

import click

from .common import chosen_rounds, run_file

if TYPE_CHECKING:
    from ..schemas.selection import By

_file = click.Path(path_type=Path)


@click.command("prompts")
@run_file
@click.option("--out", "file", type=_file, required=True, metavar="FILE", help="JSONL to write")
@click.option(
    "--by",
    type=click.Choice(["likelihood", "overlap"]),
    default="likelihood",
    show_default=True,
    help="keep the prompts with the largest",
)
@click.option(
    "--keep",
    type=click.FloatRange(0, 1),
    default=0.5,
    show_default=True,
    metavar="SHARE",
    help="how many of those that may be kept",
)
@chosen_rounds
@click.option("--task", metavar="NAME", help="task of the chosen prompts; by default their own")
@click.option(
    "--apart-from",
    type=_file,
    multiple=True,
    metavar="FILE|RUN.yaml",
    help="keep no prompt that is there too; may be given again",
)
@click.option(
    "--embedder", type=_file, metavar="MODEL", help="keep none either that is near one of those"
)
@click.option(
    "--cosine",
    type=click.FloatRange(0, 1, min_open=True),
    default=0.6,
    show_default=True,
    help="of two embeddings, from which prompts are near",
)
@click.option("--other", type=_file, metavar="FILE", help="add these prompts, as a task")
@click.option("--other-task", default="other", show_default=True, metavar="NAME", help="their task")
@click.option("--json", "as_json", is_flag=True, help="one JSON object: schemas/selection.json")
def command(
    run_file: Path,
    file: Path,
    by: "By",
    keep: float,
    rounds: tuple[int, ...],
    task: str | None,
    apart_from: tuple[Path, ...],
    embedder: Path | None,
    cosine: float,
    other: Path | None,
    other_task: str,
    as_json: bool,
) -> None:
    """Choose prompts that suit the teacher, by the scores of a run's completions.

    What is written is a source for run files. No teacher is asked, and without --embedder no model
    is loaded.
    """
    from ..selection import Choice, select
    from .prompts_text import selection_lines

    if embedder is not None and not apart_from:
        raise click.UsageError("--embedder tells what is near the prompts of --apart-from")
    choice = Choice(by, keep, task, apart_from, embedder, cosine, other, other_task)
    chosen = select(run_file, file, choice, rounds)
    click.echo(chosen.model_dump_json(indent=1) if as_json else "\n".join(selection_lines(chosen)))
