"""``opdcache cache``: a group for looking at a cache, checking it, cleaning it and copying it."""

from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from ..store.cache import Cache

cache_url = click.argument("cache", metavar="CACHE")


def opened(url: str) -> "Cache":
    """A cache by URL or folder; it must be there."""
    from pathlib import Path

    from ..errors import UsageError
    from ..store.cache import Cache

    if "://" not in url and not any((Path(url) / part).is_dir() for part in ("commits", "runs")):
        raise UsageError("not a cache", where=url, remedy="give the folder that run files name")
    return Cache(url)


@click.group("cache")
def command() -> None:
    """List, verify, clean and copy a cache."""


@command.command("ls")
@cache_url
def ls(cache: str) -> None:
    """Rollout and score sets: who made them, how large, how old, which runs use them."""
    from ..store.upkeep import listed
    from .tables import cache_table

    click.echo(cache_table(listed(opened(cache))))


@command.command("show")
@cache_url
@click.argument("key")
def show(cache: str, key: str) -> None:
    """What a shard's KEY (or its first characters) was made of, and who made it."""
    from ..errors import UsageError
    from ..store.upkeep import listed, preimage

    found = [one.manifest for one in listed(opened(cache)) if one.manifest.key.startswith(key)]
    if len(found) != 1:
        raise UsageError(
            f"{len(found)} shards have a key that starts with {key!r}",
            where=cache,
            remedy="'opdcache cache ls' shows the keys",
        )
    click.echo(preimage(found[0]))


@command.command("verify")
@cache_url
@click.option("--deep", is_flag=True, help="decode every shard and hold it against its rollouts")
@click.pass_context
def verify(context: click.Context, cache: str, deep: bool) -> None:
    """Check every object against its manifest; exits 3 when something is wrong."""
    from ..store.upkeep import verify as check

    checked = 0

    def advance() -> None:
        nonlocal checked
        checked += 1

    problems = check(opened(cache), deep=deep, advance=advance)
    for problem in problems:
        click.echo(f"{problem.path}: {problem.reason}", err=True)
    click.echo(f"{checked:,} shards checked, {len(problems)} wrong")
    context.exit(3 if problems else 0)


@command.command("gc")
@cache_url
@click.option("--dry-run", is_flag=True, help="only say what would go")
@click.option(
    "--grace-hours",
    type=click.FloatRange(0, 24 * 365),
    default=24,
    show_default=True,
    help="what is younger stays",
)
def gc(cache: str, dry_run: bool, grace_hours: float) -> None:
    """Delete what no run uses and nobody is making; a shard that is taken up meanwhile stays."""
    from datetime import timedelta

    from ..store.upkeep import collect, garbage

    store = opened(cache)
    found = garbage(store, grace=timedelta(hours=grace_hours))
    for item in found:
        place = item.commit or item.objects[0]
        click.echo(f"{place}: {item.reason}, {item.size_bytes:,} bytes")
    if not dry_run:
        found = collect(store, found)
    total = sum(item.size_bytes for item in found)
    click.echo(f"{'would free' if dry_run else 'freed'} {total:,} bytes of {len(found)} shards")


@command.command("copy")
@cache_url
@click.argument("destination", metavar="DESTINATION")
@click.pass_context
def copy(context: click.Context, cache: str, destination: str) -> None:
    """Copy every shard and pin to another cache, checked; what is there stays as it is.

    Exits 3 when a shard is damaged; the others are copied.
    """
    from ..store.cache import Cache
    from ..store.upkeep import copy as copy_shards

    done = copy_shards(opened(cache), Cache(destination), lambda text: click.echo(text, err=True))
    click.echo(f"copied {done.shards:,} shards, {done.size_bytes:,} bytes; {done.present:,} there")
    for reason, count in done.left_behind.items():
        click.echo(f"left behind {count:,}: {reason}")
    for problem in done.damaged:
        click.echo(f"not copied: {problem.path}: {problem.reason}", err=True)
    context.exit(3 if done.damaged else 0)
