"""``opdcache recipes``: run files for a purpose, and small models to try them on."""

from pathlib import Path

import click


@click.group("recipes", invoke_without_command=True)
@click.pass_context
def command(context: click.Context) -> None:
    """List and copy recipes; make models to try them on."""
    if context.invoked_subcommand is None:
        context.invoke(list_)


@command.command("list")
def list_() -> None:
    """Every recipe: its name, what it is for, its files."""
    from ..jobs.recipe_files import recipes

    for recipe in recipes():
        click.echo(f"{recipe.name:<19}{recipe.summary}\n{'':<19}{', '.join(recipe.files)}")


@command.command("copy")
@click.argument("name", metavar="NAME")
@click.argument("folder", metavar="FOLDER", type=click.Path(path_type=Path, file_okay=False))
def copy(name: str, folder: Path) -> None:
    """Copy a recipe's files into FOLDER; what is there is never overwritten.

    The first file's header says what to run. No two recipes have a file of the same name, so one
    folder, with its cache and models, may hold several.
    """
    from ..jobs.recipe_files import copy_recipe

    for path in copy_recipe(name, folder):
        click.echo(path)


@command.command("models")
@click.argument("folder", metavar="FOLDER", type=click.Path(path_type=Path, file_okay=False))
def models(folder: Path) -> None:
    """Make the models that recipes name, in FOLDER/models; what is there stays.

    SmolLM2-135M-Instruct as 'teacher', without four of its thirty layers as 'student', and with
    weights of 3 bits as 'rounded': 270 MB or less each.
    """
    from ..jobs.models import make_models

    for path in make_models(folder / "models"):
        click.echo(path)


@command.command("damage")
@click.argument("model", metavar="MODEL")
@click.argument("out", metavar="OUT", type=click.Path(path_type=Path))
@click.option("--drop-layers", "layers", metavar="I,J,…", help="decoder layers to drop, from 0")
@click.option("--bits", type=click.IntRange(2, 8), help="round the linear layers' weights to these")
@click.option(
    "--group",
    type=click.IntRange(min=1),
    default=64,
    show_default=True,
    help="neighbouring weights that share a scale",
)
def damage(model: str, out: Path, layers: str | None, bits: int | None, group: int) -> None:
    """Save a smaller or coarser copy of MODEL as OUT, for the original to heal.

    MODEL is a folder or hub id, of a causal LM that is built like Llama; the copy is in the same
    format and dtype, whatever the bits: it is as coarse as a quantised model, and as large as ever.
    """
    from ..jobs import models
    from ..resolve import model_folder
    from ..runfile import local_model
    from ..schemas.teachers import ModelRef

    folder = model_folder(ModelRef(model=local_model(model, Path.cwd())))
    click.echo(
        f"{out}: {models.damage(folder, out, layers=_places(layers), bits=bits, group=group)}"
    )


def _places(text: str | None) -> tuple[int, ...]:
    try:
        return tuple(int(part) for part in text.split(",")) if text else ()
    except ValueError:
        raise click.BadParameter(
            "expected numbers, such as 5,14", param_hint="--drop-layers"
        ) from None
