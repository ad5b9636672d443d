"""Recipes: run files for a purpose, a folder each of ``recipes/``, listed and copied."""

import difflib
import os
from contextlib import ExitStack
from dataclasses import dataclass
from importlib.resources import files
from importlib.resources.abc import Traversable
from pathlib import Path

from ..errors import UsageError


@dataclass(frozen=True, slots=True)
class Recipe:
    """A recipe.

    Attributes:
        summary: the first line of its first file's header.
        files: names of its files; the header says in what order they are used.
    """

    name: str
    summary: str
    files: tuple[str, ...]


def recipes() -> list[Recipe]:
    """Every recipe, by name."""
    return [_recipe(folder) for folder in _folders()]


def copy_recipe(name: str, folder: Path) -> list[Path]:
    """Copy a recipe's files into a folder. Returns their paths.

    Raises:
        UsageError: there is no such recipe, or a file of that name is in the folder already; then
            nothing is copied.
    """
    found = {one.name: one for one in _folders()}
    if name not in found:
        near = difflib.get_close_matches(name, found, n=1)
        known = f"known recipes: {', '.join(found)}"
        raise UsageError(
            f"no recipe is called {name!r}",
            remedy=f"did you mean {near[0]!r}?" if near else known,
        )
    copies = {folder / file.name: file.read_text("utf-8") for file in _files(found[name])}
    for path in copies:
        if os.path.lexists(path):
            raise UsageError("is there already", where=path, remedy="choose another folder")
    folder.mkdir(parents=True, exist_ok=True)
    with ExitStack() as undo:
        for path, text in copies.items():
            with path.open("x", encoding="utf-8") as file:
                undo.callback(path.unlink)
                file.write(text)
        undo.pop_all()
    return list(copies)


def _folders() -> list[Traversable]:
    every = files(__package__).joinpath("recipes").iterdir()
    return sorted((one for one in every if one.is_dir()), key=lambda one: one.name)


def _files(folder: Traversable) -> list[Traversable]:
    return sorted(folder.iterdir(), key=lambda file: file.name)


def _recipe(folder: Traversable) -> Recipe:
    names = tuple(file.name for file in _files(folder))
    first = next(name for name in names if name.endswith(".yaml"))
    header = folder.joinpath(first).read_text("utf-8").partition("\n")[0]
    return Recipe(folder.name, header.removeprefix("# "), names)
