"""``opdcache inspect``."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import click

from .common import cache_option, chosen_rounds, k_option, reference_option

if TYPE_CHECKING:
    from ..audit.lookup import Place
    from ..audit.rows import Texts
    from ..audit.targets import Target
    from ..schemas.base import Model
    from ..schemas.inspection import Listing


@click.command("inspect")
@click.argument("of", metavar="RUN.yaml|KEY")
@cache_option
@chosen_rounds
@reference_option
@click.option("--row", metavar="ROW", help="show this one: SHARD:ROW, or N, counted from 0")
@click.option("--prompt", metavar="ID", help="the completions of a prompt; shown when it is one")
@click.option(
    "--worst",
    type=click.Choice(["advantage", "disagreement"]),
    help="list those with the least mean advantage, or the largest mean disagreement",
)
@click.option(
    "-n",
    "num",
    type=click.IntRange(min=1),
    default=10,
    show_default=True,
    help="completions that are listed",
)
@click.option(
    "--at",
    type=click.IntRange(min=0),
    metavar="T",
    help="with --row: what both models said at this token, counted from 0",
)
@k_option
@click.option(
    "--tokenizer",
    type=click.Path(path_type=Path),
    help="tokenizer.json, or its folder; of a run, the student's by default",
)
@click.option(
    "--json", "as_json", is_flag=True, help="one JSON object: schemas/inspect.json, inspect-list"
)
def command(
    of: str,
    cache: str | None,
    rounds: tuple[int, ...],
    reference: str | None,
    row: str | None,
    prompt: str | None,
    worst: Literal["advantage", "disagreement"] | None,
    num: int,
    at: int | None,
    k: int,
    tokenizer: Path | None,
    as_json: bool,
) -> None:
    """Show a stored completion token by token, or list completions to look at.

    Without --row it lists the first completions, those of a prompt, or the worst. Loads no model.
    """
    from ..audit import lookup
    from ..audit.targets import target

    if sum(option is not None for option in (row, prompt, worst)) > 1:
        raise click.UsageError("give one of --row, --prompt and --worst")
    if at is not None and row is None and prompt is None:
        raise click.UsageError("--at is of one completion: give its --row")
    looked_at = target([of], cache=cache, rounds=rounds, reference=reference)
    texts = _texts(looked_at, tokenizer)
    if row is not None:
        _show(looked_at, lookup.named(looked_at, row), texts, k, at, as_json)
        return
    found = (
        lookup.of_prompt(looked_at, prompt)
        if prompt is not None
        else lookup.worst(looked_at, worst, num)
        if worst is not None
        else lookup.first(looked_at, num)
    )
    if prompt is not None and len(found) == 1:
        one = lookup.Place(found[0].part, found[0].shard, found[0].row)
        _show(looked_at, one, texts, k, at, as_json)
    elif at is not None:
        rows = ", ".join(f"{one.shard.name}:{one.row}" for one in found)
        raise click.UsageError(f"--at is of one completion: give --row, one of {rows}")
    else:
        _list(lookup.listing(looked_at, found, texts), texts, as_json)


def _texts(target: "Target", given: Path | None) -> "Texts":
    """Of the tokenizer that was given, or of the student's, where it is at hand."""
    from ..audit.rows import Texts
    from ..audit.targets import TOKENIZER
    from ..errors import NotInstalled

    if given is None:
        try:
            return Texts(target.tokenizer)
        except NotInstalled as error:
            click.echo(f"note: {error}", err=True)
            return Texts()
    texts = Texts(given / TOKENIZER if given.is_dir() else given)
    shard = next((shard for part in target.parts for shard in part.shards), None)
    if shard is not None:
        identity = target.cache.need_rollouts(shard.scored.rollouts).identity
        if not texts.are_of(identity.vocabulary):
            note = "note: the rollouts have another vocabulary than this tokenizer: texts may be "
            click.echo(f"{note}those of other tokens", err=True)
    return texts


def _show(
    target: "Target", place: "Place", texts: "Texts", k: int, at: int | None, as_json: bool
) -> None:
    from ..audit.rows import read_row
    from ..errors import UsageError
    from .inspect_text import row_view, token_view
    from .screen import screen, show

    row = read_row(target.cache, place.shard, place.row, texts, k=k)
    if at is not None and at >= len(row.tokens):
        raise UsageError(
            f"there is no token {at}",
            where=f"{row.shard}:{row.row}",
            expected=f"0 to {len(row.tokens) - 1}" if row.tokens else "none: it is empty",
        )
    if as_json:
        _print_json(row)
        return
    console = screen()
    show(row_view(row, place, console) if at is None else token_view(row, at, console), console)
    _say_how_to_get_texts(texts)


def _list(listing: "Listing", texts: "Texts", as_json: bool) -> None:
    from .inspect_text import list_view
    from .screen import screen, show

    if as_json:
        _print_json(listing)
        return
    console = screen()
    show(list_view(listing, console), console)
    _say_how_to_get_texts(texts)


def _say_how_to_get_texts(texts: "Texts") -> None:
    if not texts.known:
        click.echo("note: --tokenizer PATH (a tokenizer.json, or its folder) gives texts", err=True)


def _print_json(record: "Model") -> None:
    """In ASCII: a terminal acts on some characters beyond it."""
    click.echo(json.dumps(json.loads(record.model_dump_json()), indent=1))
