"""``opdcache report``."""

from pathlib import Path

import click

from .common import chosen_rounds, k_option, run_file, verifier_option


@click.command("report")
@run_file
@click.option(
    "-o",
    "output",
    type=click.Path(path_type=Path, dir_okay=False),
    default=Path("report.html"),
    show_default=True,
    help="the file to write",
)
@chosen_rounds
@k_option
@click.option(
    "--rows",
    "num_worst",
    type=click.IntRange(min=0),
    default=4,
    show_default=True,
    metavar="N",
    help="completions, and tokens, shown of each kind of worst case",
)
@click.option(
    "--row",
    "rows",
    multiple=True,
    metavar="SHARD:ROW",
    help="a completion to show besides, by its rollout shard; may be given again",
)
@click.option(
    "--png",
    "png_folder",
    type=click.Path(path_type=Path, file_okay=False),
    metavar="DIR",
    help="write every chart there too",
)
@verifier_option
def command(
    run_file: Path,
    output: Path,
    rounds: tuple[int, ...],
    k: int,
    num_worst: int,
    rows: tuple[str, ...],
    png_folder: Path | None,
    verifier: str | None,
) -> None:
    """Write one HTML file that says everything that a run's scored rounds tell.

    It needs no network and nothing beside it. Loads no model.
    """
    from ..audit.report import report

    for written in report(
        run_file,
        output,
        rounds=rounds,
        k=k,
        num_worst=num_worst,
        rows=rows,
        png_folder=png_folder,
        verifier=verifier,
    ):
        click.echo(f"{written}: {written.stat().st_size:,} bytes")
